"""Programs that the cluster tests launch."""

from __future__ import annotations

import asyncio
import os as system
import threading
from typing import ClassVar

from pydantic import BaseModel

from llmos import Agent, Context, Limits, Manifest, Message, on
from llmos.kernel.manifest import ModelNeed
from llmos.syscalls.errors import CapabilityDenied
from llmos.syscalls.generate import Generate
from llmos.syscalls.rules import Fact


class Say(Message):
    text: str = ""


class Said(Message):
    text: str
    pid: int = 0


class Count(Message):
    by: int = 1


class Counted(Message):
    total: int


class Fail(Message):
    how: str = "raise"


class Wait(Message):
    seconds: float


class Relay(Message):
    to: str
    text: str


class Counter(BaseModel):
    total: int = 0


class Config(BaseModel):
    model: str = "chat"
    embedder: str = "embed"
    corpus: str = ""
    rules: str = ""
    peer: str = ""


class Worker(Agent):
    manifest = Manifest(
        models=("$model",),
        stores=("corpus:$corpus", "rules:$rules"),
        capabilities=(
            "generate:$model",
            "embed:$embedder",
            "retrieve:$corpus",
            "rules:$rules",
            "clock",
            "random",
            "ask:$peer",
            "send:$peer",
            "state:$peer",
        ),
        limits=Limits(mailbox=8, concurrent_turns=32, turn_deadline_s=30),
    )
    State: ClassVar[type[BaseModel]] = Counter
    Config: ClassVar[type[BaseModel]] = Config
    state: Counter
    config: Config

    @on(Say, read_only=True)
    async def say(self, message: Say, os: Context) -> Said:
        made = await os.generate(self.config.model, message.text, max_new_tokens=32)
        return Said(text=made.text, pid=system.getpid())

    @on(Count)
    async def count(self, message: Count, os: Context) -> Counted:
        before = self.state.total
        await os.sleep(0.001)
        self.state.total = before + message.by
        return Counted(total=self.state.total)

    @on(Wait)
    async def wait(self, message: Wait, os: Context) -> Said:
        os.log.info("waiting", extra={"seconds": message.seconds})
        await os.sleep(message.seconds)
        return Said(text="waited", pid=system.getpid())

    @on(Fail)
    async def fail(self, message: Fail, os: Context) -> Said:
        self.state.total += 1_000_000
        if message.how == "raise":
            raise ZeroDivisionError("one by zero")
        if message.how == "exit":
            raise SystemExit(3)
        if message.how == "type":
            return "not a message"  # type: ignore[return-value]
        if message.how == "denied":
            await os.generate("forbidden", "x")
        if message.how == "caught":
            try:
                await os.generate("forbidden", "x")
            except CapabilityDenied as denied:
                return Said(text=f"denied {denied.resource}")
        return Said(text="?")

    @on(Relay)
    async def relay(self, message: Relay, os: Context) -> Said:
        return await os.ask(message.to, Say(text=message.text), Said)


class Reader(Agent):
    """Changes its state where it said it would not."""

    @on(Say, read_only=True)
    async def say(self, message: Say, os: Context) -> Said:
        self.state.total = 1
        return Said(text="changed")

    State: ClassVar[type[BaseModel]] = Counter
    state: Counter


class Scholar(Worker):
    @on(Say, read_only=True)
    async def say(self, message: Say, os: Context) -> Said:
        found = await os.retrieve(self.config.corpus, message.text, k=1)
        return Said(text=found.passages[0].text)


class Judge(Worker):
    @on(Say, read_only=True)
    async def say(self, message: Say, os: Context) -> Said:
        verdict = await os.rules(self.config.rules, [Fact.of("request", amount=int(message.text))])
        first = verdict.first("decision")
        return Said(text=str(first.get("action")) if first else "none")


class Stubborn(Agent):
    """Blocks its whole process: what a runaway loop does."""

    State: ClassVar[type[BaseModel]] = Counter
    state: Counter

    @on(Wait)
    async def wait(self, message: Wait, os: Context) -> None:
        await asyncio.sleep(0.3)
        threading.Event().wait(message.seconds)

    @on(Count)
    async def count(self, message: Count, os: Context) -> Counted:
        self.state.total += message.by
        return Counted(total=self.state.total)


class Greedy(Worker):
    """Asks for more memory than any device has."""

    manifest = Manifest(models=(ModelNeed(name="chat", memory="64GiB"),))


class Narrator(Worker):
    """Shows what the model writes while it writes."""

    manifest = Manifest(models=("chat",), capabilities=("generate:chat", "show", "clock"))

    @on(Say, read_only=True)
    async def say(self, message: Say, os: Context) -> Said:
        said = ""
        request = Generate(model="chat", prompt=message.text, raw=True, max_new_tokens=64)
        async for piece in os.stream(request):
            await os.show(piece)
            await os.sleep(0.05)
            said += piece
        return Said(text=said, pid=system.getpid())
