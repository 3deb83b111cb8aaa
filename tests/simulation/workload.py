"""What clients do in a run, and the run itself."""

from __future__ import annotations

import asyncio
import itertools
import random
from typing import Any, NamedTuple

from llmos.drivers.errors import LlmosError
from llmos.kernel.router import Router
from llmos.syscalls.errors import EffectUnknown, HandlerFailed
from llmos.syscalls.messages import Envelope, Reply, Wire
from tests.simulation.checker import History, Told, Violation, check
from tests.simulation.loop import run
from tests.simulation.programs import (
    ALICE,
    BELL,
    BOB,
    BROKER,
    CAROL,
    RACER,
    TILL,
    Arm,
    Charge,
    Done,
    Numbered,
    Pay,
    Race,
    Subscribe,
    Swap,
)
from tests.simulation.world import Faults, World, quietly

PATIENCE_S = 400.0
"""Virtual seconds after which a run that has not come to its end is stuck."""

PERSISTENCE = 20
"""How often a client that asks again may get one error, while nothing is wrong, until it
takes it for the answer."""


class Client:
    """Tells and asks, again and again until it knows."""

    def __init__(self, world: World, name: str, history: History) -> None:
        self._world = world
        self._stream, self._history = f"client:{name}", history
        self._router = Router(world)
        self._numbers = itertools.count(1)
        self._lines: dict[str, int] = {}

    def next_on(self, line: str) -> int:
        """Number of the next message of a line."""
        n = self._lines.get(line, 0)
        self._lines[line] = n + 1
        return n

    async def tell(self, agent: str, message: Numbered, *, ordered: bool = True) -> None:
        """Tell until it is acknowledged. Called without waiting, the order is the router's
        business; once a call has failed it is nobody's."""
        envelope = self._envelope(agent, message, asked=False)
        about = message.about
        self._history.sent[about] = Told(agent, about, "tell", ordered)
        while True:
            try:
                await self._router.post(envelope)
            except LlmosError:
                if not ordered:
                    pass
                envelope = envelope._replace(again=True)
                await asyncio.sleep(0.1)
            else:
                self._history.taken.append(about)
                return

    async def tell_many(self, agent: str, messages: list[Numbered]) -> None:
        """Several at once: the router keeps their order, as long as none of them fails."""
        about = [m.about for m in messages]

        async def one(message: Numbered) -> None:
            envelope = self._envelope(agent, message, asked=False)
            self._history.sent[message.about] = Told(agent, message.about, "tell", True)
            while True:
                try:
                    await self._router.post(envelope)
                except LlmosError:
                    for each in about:
                        self._history.sent[each] = self._history.sent[each]._replace(ordered=False)
                    envelope = envelope._replace(again=True)
                    await asyncio.sleep(0.1)
                else:
                    self._history.taken.append(message.about)
                    return

        await asyncio.gather(*(one(m) for m in messages))

    async def ask(self, agent: str, message: Numbered) -> None:
        """Ask until there is an answer."""
        envelope = self._envelope(agent, message, asked=True)
        about = message.about
        self._history.sent[about] = Told(agent, about, "ask", True)
        same: tuple[str, int] = ("", 0)
        while True:
            try:
                reply: Reply = await self._router.ask(envelope)
                done = reply.message()
            except (EffectUnknown, HandlerFailed) as error:
                self._history.errors[about] = str(error)
                return
            except LlmosError as error:
                same = (str(error), same[1] + 1) if str(error) == same[0] else (str(error), 1)
                if reply_is_final(error) or (same[1] > PERSISTENCE and self._world.healthy()):
                    self._history.errors[about] = str(error)
                    return
                envelope = envelope._replace(again=True)
                await asyncio.sleep(0.1)
                continue
            assert isinstance(done, Done), done
            assert done.about == about, (done, about)
            self._history.taken.append(about)
            self._history.replies[about] = (agent, done.place, done.value)
            return

    def _envelope(self, agent: str, message: Numbered, *, asked: bool) -> Envelope:
        return Envelope(
            agent,
            self._stream,
            Wire.of(message),
            self._stream,
            next(self._numbers),
            asked=asked,
            deadline_s=8.0,
        )


def reply_is_final(error: LlmosError) -> bool:
    """Whether asking again would only bring the same."""
    return type(error).__name__ in ("DeliveryFailed", "Quarantined")


class Run(NamedTuple):
    """How a run went."""

    violations: list[Violation]
    trace: list[str]
    happened: list[str]
    virtual_s: float
    handled: int


def simulate(seed: int, faults: Faults, *, size: int = 1) -> Run:
    """One run, from the beginning to the check."""
    chance = random.Random(seed ^ 0x5EED)
    with quietly(chance):
        return run(_main(seed, faults, size))


async def _main(seed: int, faults: Faults, size: int) -> Run:
    world = World(seed, faults)
    await world.start()
    history = History()
    first = Client(world, "0", history)
    await asyncio.gather(
        *(first.ask(a, Subscribe(line=f"client0>{a[-3:]}", n=0)) for a in (ALICE, BOB))
    )
    works = [
        _payer(Client(world, "1", history), size),
        _many(Client(world, "2", history), size),
        _swapper(Client(world, "3", history), size),
        _racer(Client(world, "4", history), size),
        _bell(Client(world, "5", history), size),
    ]
    tasks = [asyncio.create_task(work) for work in works]
    done, late = await asyncio.wait(tasks, timeout=PATIENCE_S)
    for task in done:
        task.result()
    world.heal()
    if late:
        await asyncio.wait(late, timeout=600.0)
    stuck = [t for t in tasks if not t.done()]
    quiet = await world.quiet(200.0) and not stuck
    violations = check(
        history,
        world.acts,
        world.store,
        uncertain=faults.uncertain > 0,
        zombies=bool(world.zombies),
        quiet=quiet,
    )
    handled = len(history.taken)
    now: float = asyncio.get_running_loop().time()
    return Run(violations, world.trace, world.happened, now, handled)


async def _payer(client: Client, size: int) -> None:
    for n in range(2 * size):
        to = BOB if n % 2 else CAROL
        number = client.next_on("client1>alice")
        await client.tell(ALICE, Pay(line="client1>alice", n=number, to=to, amount=3 + n))


async def _many(client: Client, size: int) -> None:
    messages: list[Any] = [
        Pay(line="client2>bob", n=client.next_on("client2>bob"), to=ALICE, amount=2 + n)
        for n in range(1 + 2 * size)
    ]
    await client.tell_many(BOB, messages)
    await client.tell(TILL, Charge(line="client2>till", n=0, tool="blind"))


async def _swapper(client: Client, size: int) -> None:
    for n in range(size):
        await client.ask(
            BROKER,
            Swap(line="client3>broker", n=n, source=CAROL, to=ALICE, amount=5),
        )
        await client.ask(
            CAROL, Charge(line="client3>carol", n=n, tool="query" if n % 2 else "sure")
        )


async def _racer(client: Client, size: int) -> None:
    for n in range(size):
        work = Race(line="client4>racer", n=n, tool="sure" if n % 2 else "query")
        if n % 2:
            await client.tell(RACER, work)
        else:
            await client.ask(RACER, work)


async def _bell(client: Client, size: int) -> None:
    for n in range(size):
        await client.tell(BELL, Arm(line="client5>bell arm", n=n, after_s=0.02 + n))
