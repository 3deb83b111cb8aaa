from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from llmos.drivers.errors import StaleEpoch
from llmos.kernel.remote import ProcessGone, answers, call
from llmos.kernel.router import Location, Router
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
        self.act: Callable[[Envelope], Any] | None = None

    async def deliver(self, envelope: Envelope) -> Reply:
        self.seen.append(envelope)
        made = self.act(envelope) if self.act else None
        if asyncio.iscoroutine(made):
            made = await made
        return made or Reply(f"turn-{self.epoch}", AGENT)

    @answers
    async def post(self, envelope: Envelope) -> None:
        self.seen.append(envelope)
        if self.act:
            self.act(envelope)


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
        self.router = Router(self.handle)
        self.handles: list[LocalHandle] = []

    async def host(self) -> FakeHost:
        """A new owner of the agent."""
        made = FakeHost(len(self.handles) + 1)
        self.handles.append(LocalHandle(made))
        async with self.kernel.moved:
            self.kernel.places.append(Location(f"host:{made.epoch}", made.epoch, self.handles[-1]))
            self.kernel.moved.notify_all()
        return made


def envelope(deadline_s: float = 5.0, receiver: str = AGENT) -> Envelope:
    return Envelope(receiver, "client:1", Wire.of(Ping()), deadline_s=deadline_s)


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
    with pytest.raises(DeadlineExceeded, match="delivery"):
        await net.router.post(envelope(0.03))


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
