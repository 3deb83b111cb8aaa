from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from llmos.drivers.errors import LlmosError, StaleEpoch
from llmos.drivers.stores.rows import SHARDS
from llmos.kernel.directory import Directory, DirectoryHolder
from llmos.kernel.remote import ProcessGone, answers, call
from llmos.kernel.router import DirectoryLocator, KernelLocator, Location, Router
from llmos.syscalls.errors import Busy, DeadlineExceeded, UnknownAgent
from llmos.syscalls.messages import Envelope, Message, Reply, Wire
from tests.kernel.local import LocalHandle, until

AGENT = "acme/desk/main"


class Ping(Message):
    number: int = 0


class FakeHost:
    """Answers with its epoch, or with what it was told to."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch
        self.seen: list[Envelope] = []
        self.batches: list[int] = []
        self.act: Callable[[Envelope], Any] | None = None

    async def deliver(self, envelope: Envelope) -> Reply:
        self.seen.append(envelope)
        made = self.act(envelope) if self.act else None
        if asyncio.iscoroutine(made):
            made = await made
        return made or Reply(f"turn-{self.epoch}", AGENT)

    async def post(self, envelopes: Sequence[Envelope]) -> list[LlmosError | None]:
        self.batches.append(len(envelopes))
        results: list[LlmosError | None] = []
        for envelope in envelopes:
            self.seen.append(envelope)
            try:
                if self.act:
                    self.act(envelope)
            except LlmosError as error:
                results.append(error)
            else:
                results.append(None)
        return results


class FakeKernel:
    """Knows where the agent is, epoch by epoch; waits where it is nowhere."""

    def __init__(self) -> None:
        self.places: list[Location] = []
        self.moved = asyncio.Condition()

    @answers
    async def locate(
        self, agent: str, not_at: tuple[str, int] | None, timeout_s: float
    ) -> Location:
        if agent != AGENT:
            raise UnknownAgent(agent, [AGENT])
        try:
            async with asyncio.timeout(timeout_s), self.moved:
                await self.moved.wait_for(
                    lambda: self.places and (self.places[-1].host, self.places[-1].epoch) != not_at
                )
        except TimeoutError:
            raise DeadlineExceeded(f"finding {agent}", timeout_s) from None
        return self.places[-1]


class Net:
    def __init__(self) -> None:
        self.kernel = FakeKernel()
        self.handle = LocalHandle(self.kernel)
        self.router = Router(KernelLocator(self.handle))
        self.handles: list[LocalHandle] = []

    async def host(self) -> FakeHost:
        """A new owner of the agent."""
        made = FakeHost(len(self.handles) + 1)
        self.handles.append(LocalHandle(made))
        async with self.kernel.moved:
            self.kernel.places.append(Location(f"host:{made.epoch}", made.epoch, self.handles[-1]))
            self.kernel.moved.notify_all()
        return made


numbers = itertools.count(1)


def envelope(deadline_s: float = 5.0, receiver: str = AGENT) -> Envelope:
    at = ("client:1", next(numbers))
    return Envelope(receiver, "client:1", Wire.of(Ping()), *at, deadline_s=deadline_s)


@pytest.fixture
async def net() -> Net:
    return Net()


async def test_the_kernel_is_asked_once(net: Net) -> None:
    host = await net.host()
    assert [(await net.router.ask(envelope())).turn for _ in range(3)] == ["turn-1"] * 3
    assert net.handle.calls == ["locate"]
    assert 0 < host.seen[0].deadline_s <= 5.0


async def test_a_lost_host_is_found_again_and_gets_the_same_message(net: Net) -> None:
    first = await net.host()
    arrived = asyncio.Event()

    async def hang() -> None:
        arrived.set()
        await asyncio.Event().wait()

    first.act = lambda e: hang()
    sent = envelope()
    asking = asyncio.create_task(net.router.ask(sent))
    await arrived.wait()
    net.handles[0].kill()
    second = await net.host()
    assert (await asking).turn == "turn-2"
    assert first.seen[0].id == second.seen[0].id == sent.id
    # The successor is told to look whether it was handled already.
    assert [first.seen[0].again, second.seen[0].again] == [False, True]
    assert second.seen[0].deadline_s <= first.seen[0].deadline_s
    # Who asks next goes to the new one at once.
    assert (await net.router.ask(envelope())).turn == "turn-2"


async def test_a_stale_owner_is_left_for_the_next(net: Net) -> None:
    first = await net.host()
    first.act = lambda e: Reply("", AGENT, error=StaleEpoch(AGENT, 1, 2))
    asking = asyncio.create_task(net.router.ask(envelope()))
    await until(lambda: first.seen)
    second = await net.host()
    assert (await asking).turn == "turn-2"
    assert second.seen[0].id == first.seen[0].id


async def test_errors_of_the_turn_are_the_reply(net: Net) -> None:
    host = await net.host()
    host.act = lambda e: Reply("t", AGENT, error=Busy("desk", 3, 0.1))
    reply = await net.router.ask(envelope())
    assert isinstance(reply.error, Busy)
    assert len(host.seen) == 1


async def test_an_unknown_agent_is_told(net: Net) -> None:
    with pytest.raises(UnknownAgent) as caught:
        await net.router.ask(envelope(receiver="acme/nobody/main"))
    assert caught.value.known == (AGENT,)


async def test_an_agent_that_is_nowhere_is_waited_for_until_the_deadline(net: Net) -> None:
    with pytest.raises(DeadlineExceeded):
        await net.router.ask(envelope(0.02))
    asking = asyncio.create_task(net.router.ask(envelope()))
    await asyncio.sleep(0.01)
    await net.host()
    assert (await asking).turn == "turn-1"


async def test_the_deadline_holds_over_all_attempts(net: Net) -> None:
    host = await net.host()
    host.act = lambda e: Reply("", AGENT, error=StaleEpoch(AGENT, 1, 2))
    with pytest.raises(DeadlineExceeded):
        await net.router.ask(envelope(0.05))
    assert len(host.seen) == 1


async def test_a_message_waits_for_room_in_the_mailbox(net: Net) -> None:
    host = await net.host()

    def full_twice(e: Envelope) -> None:
        if len(host.seen) < 3:
            raise Busy("mailbox", 8, 0.005)

    host.act = full_twice
    sent = envelope()
    await net.router.post(sent)
    assert [e.id for e in host.seen] == [sent.id] * 3


async def test_a_mailbox_that_stays_full_ends_with_the_deadline(net: Net) -> None:
    host = await net.host()

    def full(e: Envelope) -> None:
        raise Busy("mailbox", 8, 0.5)

    host.act = full
    with pytest.raises(Busy, match="mailbox"):
        await net.router.post(envelope(0.03))


async def test_a_host_that_says_nothing_ends_with_the_deadline(net: Net) -> None:
    host = await net.host()
    gate = asyncio.Event()

    async def silent(envelopes: Sequence[Envelope]) -> Any:
        await gate.wait()
        return [None] * len(envelopes)

    host.post = silent  # type: ignore[method-assign]
    with pytest.raises(DeadlineExceeded, match="delivery"):
        await net.router.post(envelope(0.03))
    gate.set()


async def test_posts_to_one_receiver_arrive_in_order_also_after_busy(net: Net) -> None:
    host = await net.host()
    taken: list[int] = []
    refusals = {2: 2, 5: 1}

    def some_busy(e: Envelope) -> None:
        # As a host does: what comes after a refused one is refused, too.
        if taken and e.seq < taken[-1]:
            raise AssertionError("overtaken")
        number = e.seq - first
        if busy or refusals.get(number, 0) > 0:
            if not busy:
                refusals[number] -= 1
                busy.append(number)
            raise Busy("mailbox", 8, 0.002)
        taken.append(e.seq)

    busy: list[int] = []
    real = host.post

    async def post(envelopes: Sequence[Envelope]) -> Any:
        busy.clear()
        return await real(envelopes)

    host.post = post  # type: ignore[method-assign]
    host.act = some_busy
    sent = [envelope() for _ in range(8)]
    first = sent[0].seq
    await asyncio.gather(*(net.router.post(e) for e in sent))
    assert taken == [e.seq for e in sent]


async def test_posts_that_come_together_share_a_call(net: Net) -> None:
    host = await net.host()
    await asyncio.gather(*(net.router.post(envelope()) for _ in range(50)))
    assert sum(host.batches) == 50
    assert len(host.batches) <= 3
    await until(lambda: not net.router._tasks)


async def test_an_error_is_of_its_own_message(net: Net) -> None:
    host = await net.host()

    def second_fails(e: Envelope) -> None:
        if len(host.seen) == 2:
            raise UnknownAgent(AGENT)

    host.act = second_fails
    results = await asyncio.gather(
        *(net.router.post(envelope()) for _ in range(3)), return_exceptions=True
    )
    assert [type(r) for r in results] == [type(None), UnknownAgent, type(None)]


async def test_a_stale_host_posts_again_elsewhere_as_a_repetition(net: Net) -> None:
    first = await net.host()

    def stale(e: Envelope) -> None:
        raise StaleEpoch(AGENT, 1, 2)

    first.act = stale
    posting = asyncio.create_task(net.router.post(envelope()))
    await until(lambda: first.seen)
    second = await net.host()
    await posting
    assert second.seen[0].again


# ------------------------------------------------------------------ the directory as locator


async def test_a_host_reads_the_directory_and_waits_for_a_newer_one() -> None:
    holder = DirectoryHolder()
    locator = DirectoryLocator(holder)
    handle = LocalHandle(FakeHost(1))
    nobody = tuple(("", 0) for _ in range(SHARDS))
    await holder.set(Directory(1, hosts={"host:0": handle}, shards=nobody))
    with pytest.raises(DeadlineExceeded, match="finding a host"):
        await locator.locate(AGENT, None, 0.01)
    looking = asyncio.create_task(locator.locate(AGENT, ("host:0", 1), 5.0))
    for version, epoch in ((2, 1), (3, 2)):
        shards = tuple(("host:0", epoch) for _ in range(SHARDS))
        await holder.set(Directory(version, hosts={"host:0": handle}, shards=shards))
        await asyncio.sleep(0.005)
    found = await looking
    # The one that was found lost is not given again.
    assert (found.host, found.epoch, found.handle) == ("host:0", 2, handle)
    assert (await locator.locate(AGENT, None, 1.0)).epoch == 2


async def test_a_message_to_a_lost_host_goes_to_the_next(net: Net) -> None:
    await net.host()
    net.handles[0].kill()
    posting = asyncio.create_task(net.router.post(envelope()))
    await asyncio.sleep(0.01)
    second = await net.host()
    await posting
    assert len(second.seen) == 1


# ------------------------------------------------------------------ calls


async def test_a_call_raises_what_the_method_returned_and_what_became_of_it() -> None:
    kernel = FakeKernel()
    handle = LocalHandle(kernel)
    with pytest.raises(UnknownAgent):
        await call(handle.locate.remote("x/y/z", 0, 1.0), "kernel")
    slow = handle.locate.remote(AGENT, 0, 5.0)
    with pytest.raises(DeadlineExceeded) as caught:
        await call(slow, "the kernel", 0.01)
    assert (caught.value.what, caught.value.deadline_s) == ("the kernel", 0.01)
    hanging = asyncio.create_task(call(handle.locate.remote(AGENT, 0, 5.0), "the kernel"))
    await asyncio.sleep(0.01)
    handle.kill()
    with pytest.raises(ProcessGone):
        await hanging


async def test_cancelling_a_call_starts_no_ray() -> None:
    import ray

    handle = LocalHandle(FakeKernel())
    calling = asyncio.create_task(call(handle.locate.remote(AGENT, 0, 5.0), "the kernel"))
    await asyncio.sleep(0.01)
    calling.cancel()
    with pytest.raises(asyncio.CancelledError):
        await calling
    assert not ray.is_initialized()
