"""A program whose handlers are given by the tests, and tools that outlive hosts."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, ClassVar

from pydantic import BaseModel, Field

from llmos import Agent, Context, Limits, Manifest, Message, on
from llmos.drivers.protocols import ToolOutcome
from llmos.drivers.tools.memory import MemoryTool
from llmos.syscalls.exits import Exited

ACTOR, OTHER, THIRD = "acme/actor/main", "acme/actor/other", "acme/actor/third"
PROGRAM = "tests.kernel.durable:Actor"
SYSTEM = """
[tools.keyed]
driver = "memory"
[tools.asked]
driver = "memory"
[tools.plain]
driver = "memory"
"""


class Run(Message):
    """Do what a test has put under this name."""

    script: str
    n: int = 0


class Look(Message):
    """Read the state beside whatever runs."""


class Done(Message):
    value: Any = None


class Kept(BaseModel):
    log: list[Any] = Field(default_factory=list)


Script = Callable[["Actor", Context, Run], Awaitable[Any]]

SCRIPTS: dict[str, Script] = {}
SEEN: list[Any] = []
"""What scripts have noted, over all attempts."""


class Actor(Agent):
    manifest = Manifest(
        capabilities=(
            *("generate:*", "embed:*", "retrieve:*", "clock", "random", "timer"),
            *("ask:*", "send:*", "state:*", "call:*", "publish:*", "subscribe:*", "monitor:*"),
        ),
        limits=Limits(mailbox=20, concurrent_turns=4, turn_deadline_s=20),
    )
    State: ClassVar[type[BaseModel]] = Kept
    state: Kept

    @on(Run)
    async def run(self, message: Run, os: Context) -> Done | None:
        value = await SCRIPTS[message.script](self, os, message)
        return None if value is None else Done(value=value)

    @on(Exited)
    async def exited(self, message: Exited, os: Context) -> None:
        self.state.log.append(["exited", message.agent, message.reason])

    @on(Look, read_only=True)
    async def look(self, message: Look, os: Context) -> Done:
        return Done(value=self.state.log)


class Bank(MemoryTool):
    """A tool that outlives hosts, and can be held up before and after what it does."""

    def __init__(self, name: str, **options: Any) -> None:
        super().__init__(name, options)
        self.before, self.after = asyncio.Event(), asyncio.Event()
        self.before.set()
        self.after.set()
        self.entered = self.left = 0

    async def call(self, arguments: Mapping[str, Any], idem_key: str) -> ToolOutcome:
        self.entered += 1
        await self.before.wait()
        outcome = await super().call(arguments, idem_key)
        self.left += 1
        await self.after.wait()
        return outcome


def script(function: Script) -> Script:
    """Put a function under its own name."""
    SCRIPTS[function.__name__] = function
    return function
