"""The agents that work while they are killed.

Every handler that changes something does three things, in this order: it counts in its state,
it may involve others (a model, an agent, a message), and it calls the ledger.
"""

from __future__ import annotations

import os as system
from typing import ClassVar

from pydantic import BaseModel, Field

from llmos import Agent, Context, Limits, Manifest, Message, on
from llmos.drivers.errors import LlmosError


class Note(Message):
    """Told. ``number`` counts from 1 for each pair of sender and receiver."""

    sender: str
    number: int
    think: bool = False
    """Have a model write something first."""
    consult: str = ""
    """An agent to ask first."""
    forward: str = ""
    """An agent to send a note of its own."""


class Add(Message):
    """Asked, by a client."""

    sender: str
    number: int


class Added(Message):
    """The truth about it: no two replies of one agent have the same total."""

    total: int
    sender: str
    number: int


class Tick(Message):
    """Asked, by an agent in the middle of a turn."""

    sender: str
    turn: str


class Ticked(Message):
    total: int


class Ping(Message):
    pass


class Pong(Message):
    pid: int
    agent: str


class Book(BaseModel):
    """What an agent has seen."""

    last: dict[str, int] = Field(default_factory=dict)
    """Highest number by sender of notes."""
    notes: dict[str, int] = Field(default_factory=dict)
    """How many by sender."""
    sent: dict[str, int] = Field(default_factory=dict)
    """Notes of its own, by receiver."""
    total: int = 0
    """Questions answered."""
    ticks: int = 0
    disorder: list[str] = Field(default_factory=list)
    """Notes that came after a later one."""


class Plain(Agent):
    """Launched one by one; asks nobody."""

    manifest = Manifest(
        models=("chat",),
        stores=("tool:ledger",),
        capabilities=("generate:chat", "call:ledger", "send:t/*"),
        limits=Limits(mailbox=256, concurrent_turns=64, turn_deadline_s=120),
    )
    State: ClassVar[type[BaseModel]] = Book
    state: Book

    @on(Note)
    async def note(self, message: Note, os: Context) -> None:
        book, sender = self.state, message.sender
        last = book.last.get(sender, 0)
        if message.number <= last:
            book.disorder.append(f"{sender} {message.number} after {last}")
        book.last[sender] = max(message.number, last)
        book.notes[sender] = book.notes.get(sender, 0) + 1
        if message.think:
            try:
                await os.generate("chat", f"note {message.number}", max_new_tokens=8, deadline_s=20)
            except LlmosError as error:
                os.log.info("no text: %s", error)
        if message.consult:
            try:
                await os.ask(
                    message.consult, Tick(sender=os.agent, turn=os.turn), Ticked, deadline_s=30
                )
            except LlmosError as error:
                os.log.info("no answer: %s", error)
        if message.forward:
            number = book.sent.get(message.forward, 0) + 1
            book.sent[message.forward] = number
            await os.send(message.forward, Note(sender=os.agent, number=number))
        await os.call_tool(
            "ledger", receiver=os.agent, sender=sender, id=f"note {sender} {message.number}"
        )

    @on(Add)
    async def add(self, message: Add, os: Context) -> Added:
        self.state.total += 1
        await os.call_tool(
            "ledger",
            receiver=os.agent,
            sender=message.sender,
            id=f"add {message.sender} {message.number}",
        )
        return Added(total=self.state.total, sender=message.sender, number=message.number)

    @on(Tick)
    async def tick(self, message: Tick, os: Context) -> Ticked:
        self.state.ticks += 1
        await os.call_tool(
            "ledger", receiver=os.agent, sender=message.sender, id=f"tick {message.turn}"
        )
        return Ticked(total=self.state.ticks)

    @on(Ping, read_only=True)
    async def ping(self, message: Ping, os: Context) -> Pong:
        return Pong(pid=system.getpid(), agent=os.agent)


class Worker(Plain):
    """Launched as a pattern; may ask the plain ones."""

    manifest = Manifest(
        models=("chat",),
        stores=("tool:ledger",),
        capabilities=("generate:chat", "call:ledger", "send:t/*", "ask:t/plain/*"),
        limits=Limits(mailbox=256, concurrent_turns=64, turn_deadline_s=120),
    )


WORKERS = tuple(f"t/worker/w{n}" for n in range(20))
PLAIN = tuple(f"t/plain/p{n}" for n in range(4))
AGENTS = (*WORKERS, *PLAIN)
