"""Agents for benchmarks/durability.py. They look at the clock of the machine, which no agent
should: what they measure is not part of what they do."""

from __future__ import annotations

import time
from typing import ClassVar

from pydantic import BaseModel

from llmos import Agent, Context, Limits, Manifest, Message, on

HOPS: list[float] = []
"""Seconds from one durable message to the next, of all agents of this host."""
BEGAN: dict[str, float] = {}
"""When the turn of an agent began last in this process, seconds since 1970."""


class Tick(Message):
    """Goes round: each turn changes the state, sends the next one and acknowledges this one."""

    until: float
    """Seconds since 1970."""
    sent: float = 0.0
    """On this machine's monotonic clock; 0 for the first."""


class Hops(Message):
    """Hand over what was measured."""


class HopTimes(Message):
    """What was measured since the last time."""

    seconds: list[float]


class Work(Message):
    """A turn that takes its time."""

    seconds: float


class Beginnings(Message):
    """Hand over when turns began."""


class BeginTimes(Message):
    """By agent."""

    at: dict[str, float]


class Calls(Message):
    """Make syscalls that do nothing and say how long each took."""

    count: int


class CallTimes(Message):
    """Seconds of each."""

    seconds: list[float]


class Touch(Message):
    """The least that a message can be."""


class Touched(Message):
    """When its handler began, on this machine's monotonic clock."""

    at: float


class Count(BaseModel):
    """The state."""

    total: int = 0
    note: str = ""


class Bench(Agent):
    """Everything the benchmark asks for."""

    manifest = Manifest(
        capabilities=("send:*", "random", "clock"),
        limits=Limits(turn_deadline_s=600, syscalls_per_turn=100_000, mailbox=4096),
    )
    State: ClassVar[type[BaseModel]] = Count
    state: Count

    @on(Tick)
    async def tick(self, message: Tick, os: Context) -> None:
        """One durable message."""
        now = time.monotonic()
        if message.sent:
            HOPS.append(now - message.sent)
        self.state.total += 1
        if time.time() < message.until:
            await os.send(os.agent, Tick(until=message.until, sent=now))

    @on(Hops, read_only=True)
    async def hops(self, message: Hops, os: Context) -> HopTimes:
        """What was measured, once."""
        times = HOPS[:]
        HOPS.clear()
        return HopTimes(seconds=times)

    @on(Work)
    async def work(self, message: Work, os: Context) -> None:
        """Wait in mid-turn."""
        BEGAN[os.agent] = time.time()
        await os.random()
        await os.sleep(message.seconds)
        self.state.total += 1

    @on(Beginnings, read_only=True)
    async def beginnings(self, message: Beginnings, os: Context) -> BeginTimes:
        """When turns began in this process."""
        return BeginTimes(at=dict(BEGAN))

    @on(Calls, read_only=True)
    async def calls(self, message: Calls, os: Context) -> CallTimes:
        """Syscalls, one after the other."""
        seconds = []
        for _ in range(message.count):
            started = time.perf_counter()
            await os.random()
            seconds.append(time.perf_counter() - started)
        return CallTimes(seconds=seconds)

    @on(Touch, read_only=True)
    async def touch(self, message: Touch, os: Context) -> Touched:
        """Say when it began."""
        return Touched(at=time.monotonic())
