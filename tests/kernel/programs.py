"""Programs that the host tests launch."""

from __future__ import annotations

import asyncio
import threading
from datetime import UTC, datetime
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field

from llmos import Agent, Context, Limits, LlmosError, Manifest, Message, on
from llmos.syscalls.generate import Generate
from llmos.syscalls.rules import Fact


class Say(Message):
    text: str = ""


class Said(Message):
    text: str


class Count(Message):
    by: int = 1


class Counted(Message):
    total: int


class Gate(Message):
    """Wait until the test opens the gate of this name."""

    name: str


class Peek(Message):
    """Read the total beside whatever runs."""

    gate: str = ""


class Do(Message):
    what: str


class Total(BaseModel):
    total: int = 0
    odd: Any = Field(default=None)


class DeskConfig(BaseModel):
    peer: str = ""


GATES: dict[str, asyncio.Event] = {}
STARTED: list[str] = []
"""What has begun, in order."""


def gate(name: str) -> asyncio.Event:
    return GATES.setdefault(name, asyncio.Event())


class Desk(Agent):
    manifest = Manifest(
        capabilities=(
            *("generate:chat", "embed:embed", "rules:desk", "clock"),
            *("ask:$peer", "send:$peer", "state:$peer"),
        ),
        limits=Limits(mailbox=3, concurrent_turns=2, turn_deadline_s=20),
    )
    State: ClassVar[type[BaseModel]] = Total
    Config: ClassVar[type[BaseModel]] = DeskConfig
    state: Total
    config: DeskConfig

    @on(Say, read_only=True)
    async def say(self, message: Say, os: Context) -> Said:
        return Said(text=(await os.generate("chat", message.text)).text)

    @on(Count)
    async def count(self, message: Count, os: Context) -> Counted:
        STARTED.append(f"count {message.by}")
        await os.now()
        self.state.total += message.by
        return Counted(total=self.state.total)

    @on(Gate)
    async def wait(self, message: Gate, os: Context) -> Counted:
        STARTED.append(message.name)
        self.state.total += 1000
        await gate(message.name).wait()
        return Counted(total=self.state.total)

    @on(Peek, read_only=True)
    async def peek(self, message: Peek, os: Context) -> Counted:
        STARTED.append(f"peek {message.gate}")
        if message.gate:
            await gate(message.gate).wait()
        return Counted(total=self.state.total)

    @on(Do)
    async def do(self, message: Do, os: Context) -> Message | None:
        self.state.total += 1_000_000
        match message.what:
            case "raise":
                raise ZeroDivisionError("one by zero")
            case "exit":
                raise SystemExit(3)
            case "type":
                return "not a message"  # type: ignore[return-value]
            case "denied":
                await os.generate("forbidden", "x")
            case "odd state":
                self.state.odd = b"\xff"
            case "huge reply":
                return Counted(total=2**80)
            case "tell":
                await os.send(self.config.peer, Count(by=5))
            case "tell and fail":
                await os.send(self.config.peer, Count(by=7))
                raise ValueError("too late")
            case "relay":
                return await os.ask(self.config.peer, Say(text="via desk"), Said)
            case "leave stream":
                async for text in os.stream(Generate(model="chat", prompt="one two three")):
                    return Said(text=text)
            case "rules":
                verdict = await os.rules("desk", [Fact.of("ask", amount=3)])
                return Said(text=str(verdict.fired[0].rule))
            case "read":
                return Counted(total=(await os.read_state(self.config.peer)).state["total"])
            case _:
                pass
        return None


class Liar(Agent):
    """Changes its state where it said it would not."""

    State: ClassVar[type[BaseModel]] = Total
    state: Total

    @on(Say, read_only=True)
    async def say(self, message: Say, os: Context) -> Said:
        self.state.total = 1
        return Said(text="changed")


class Stillborn(Desk):
    """Cannot be made."""

    def __init__(self, state: BaseModel, config: BaseModel) -> None:
        super().__init__(state, config)
        raise LookupError("no desk left")


class Strict(BaseModel):
    model_config = ConfigDict(strict=True)

    at: datetime | None = None
    pairs: dict[str, tuple[int, int]] = Field(default_factory=dict)


class Keeper(Agent):
    """Its state is strict: a date is a date, a pair is a tuple."""

    State: ClassVar[type[BaseModel]] = Strict
    state: Strict

    @on(Do)
    async def do(self, message: Do, os: Context) -> Said:
        if message.what == "keep":
            self.state.at = datetime(2026, 1, 2, tzinfo=UTC)
            self.state.pairs["a"] = (1, 2)
        return Said(text=f"{self.state.at} {self.state.pairs}")


STUCK = threading.Event()
"""Holds up the import of modules that wait for it."""

LATE: list[BaseException] = []
"""What syscalls after the end of their turn have raised."""


class Unruly(Agent):
    """Does what a turn must survive."""

    manifest = Manifest(capabilities=("random", "state:*"), limits=Limits(turn_deadline_s=0.2))

    @on(Do)
    async def do(self, message: Do, os: Context) -> Said:
        if message.what == "ignore cancellation":
            while True:
                try:
                    await gate("unruly").wait()
                    break
                except asyncio.CancelledError:
                    continue
        if message.what == "leave a task":
            _LEFT.append(asyncio.create_task(self._late(os)))
        if message.what.startswith("read "):
            await os.read_state(message.what.removeprefix("read "))
        return Said(text="done")

    async def _late(self, os: Context) -> None:
        await gate("late").wait()
        try:
            await os.random()
        except LlmosError as error:
            LATE.append(error)


_LEFT: list[asyncio.Task[None]] = []
