"""Programs of the corpus. What they do must not change for turns that are recorded: a change
goes behind ``os.patched(…)``, or into a program of its own."""

from __future__ import annotations

import asyncio
from typing import Any, ClassVar

from pydantic import BaseModel, Field

from llmos import Agent, Context, Limits, LlmosError, Manifest, Message, on
from llmos.syscalls.generate import Generate
from llmos.syscalls.rules import Fact

PEER = "acme/teller/main"


class Go(Message):
    """Do what the program is there for."""

    text: str = "one two three"


class Done(Message):
    texts: list[str] = Field(default_factory=list)
    number: float = 0.0


class Tally(BaseModel):
    turns: int = 0
    seen: list[str] = Field(default_factory=list)


class Gatherer(Agent):
    """Calls side by side: their results come in any order."""

    manifest = Manifest(capabilities=("generate:chat", "embed:embed", "clock", "random"))
    State: ClassVar[type[BaseModel]] = Tally
    state: Tally

    @on(Go)
    async def go(self, message: Go, os: Context) -> Done:
        first, second, vectors, now = await asyncio.gather(
            os.generate("chat", f"{message.text} {self.state.turns}"),
            os.generate("chat", "another"),
            os.embed("embed", [message.text, "x"]),
            os.now(),
        )
        self.state.turns += 1
        self.state.seen.append(first.text)
        assert now > 0
        return Done(texts=[first.text, second.text, os.uuid()], number=float(len(vectors.vectors)))


class Racer(Agent):
    """First of many: the losers are cancelled."""

    manifest = Manifest(capabilities=("generate:chat", "clock"))

    @on(Go)
    async def go(self, message: Go, os: Context) -> Done:
        tasks = [
            asyncio.create_task(os.generate("chat", message.text)),
            asyncio.create_task(os.generate("chat", f"{message.text} again")),
            asyncio.create_task(self._late(os)),
        ]
        done, pending = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in pending:
            task.cancel()
        await asyncio.wait(tasks)
        text = next(task for task in tasks if task in done).result().text
        return Done(texts=[text], number=await os.now())

    @staticmethod
    async def _late(os: Context) -> Any:
        await os.sleep(30)
        return await os.generate("chat", "too late")


class Booker(Agent):
    """An effect outside, one that the target refuses, and a state that remembers."""

    manifest = Manifest(
        stores=("tool:booking", "tool:strict"), capabilities=("call:booking", "call:strict")
    )
    State: ClassVar[type[BaseModel]] = Tally
    state: Tally

    @on(Go)
    async def go(self, message: Go, os: Context) -> Done:
        booked = await os.call_tool("booking", what=message.text)
        refused = ""
        try:
            await os.call_tool("strict", what=message.text)
        except LlmosError as error:
            refused = error.code
        self.state.turns += 1
        self.state.seen.append(booked.idem_key.rpartition("/")[2])
        return Done(texts=[str(booked.output), refused])


class Streamer(Agent):
    """Text as it is written; then a stream that is left early."""

    manifest = Manifest(capabilities=("generate:chat",))

    @on(Go, read_only=True)
    async def go(self, message: Go, os: Context) -> Done:
        request = Generate(model="chat", prompt=message.text)
        whole = [text async for text in os.stream(request)]
        first = ""
        async for text in os.stream(request):
            first = text
            break
        return Done(texts=["".join(whole), first])


class Patched(Agent):
    """A change of code between two calls."""

    manifest = Manifest(capabilities=("random", "clock"))

    @on(Go)
    async def go(self, message: Go, os: Context) -> Done:
        number = await os.random()
        if os.patched("ask-twice"):
            number += await os.random()
        # Turns recorded before this was written have no such mark, and must not be asked.
        if os.patched("later-change"):
            number += await os.now()
        return Done(number=number)


class Teller(Agent):
    """Is asked."""

    @on(Go)
    async def go(self, message: Go, os: Context) -> Done:
        return Done(texts=[message.text.upper()])


class Asker(Agent):
    """Asks another agent, tells it something, decides by rules."""

    manifest = Manifest(
        stores=("rules:desk",), capabilities=(f"ask:{PEER}", f"send:{PEER}", "rules:desk")
    )

    @on(Go)
    async def go(self, message: Go, os: Context) -> Done:
        told = await os.ask(PEER, message, Done)
        await os.send(PEER, Go(text="for later"), priority=3)
        verdict = await os.rules("desk", [Fact.of("ask", amount=3)])
        return Done(texts=[*told.texts, verdict.fired[0].rule])


class Planner(Agent):
    """Leaves things to the end of its turn: timers, topics, monitors."""

    manifest = Manifest(capabilities=("timer", "subscribe:news", "publish:news", "monitor:*"))

    @on(Go)
    async def go(self, message: Go, os: Context) -> Done:
        due = await os.timer("once", message, after_s=86_400)
        again = await os.schedule("daily", message, "30 8 * * mon-fri", "Europe/Berlin")
        await os.cancel_timer("never set")
        await os.subscribe("news")
        receivers = await os.publish("news", message)
        await os.monitor(PEER)
        return Done(number=float(due > 0) + float(again > 0) + receivers)


class Failing(Agent):
    """Raises an error of its own."""

    manifest = Manifest(capabilities=("random",))

    @on(Go)
    async def go(self, message: Go, os: Context) -> Done:
        await os.random()
        raise ZeroDivisionError(message.text)


class Slow(Agent):
    """Is cut off by its deadline."""

    manifest = Manifest(capabilities=("random", "clock"), limits=Limits(turn_deadline_s=0.3))

    @on(Go)
    async def go(self, message: Go, os: Context) -> Done:
        await os.random()
        await os.sleep(60)
        return Done()
