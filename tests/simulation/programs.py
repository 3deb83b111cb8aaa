"""The agents of the simulated system. Each keeps in its state what it has handled, in order."""

from __future__ import annotations

import asyncio
from typing import ClassVar

from pydantic import BaseModel

from llmos import Agent, Context, Limits, Manifest, Message, on

START = 1000
"""Money that every account begins with."""
NEWS = "news"
TENANT = "acme"


def name(key: str) -> str:
    """The agent of that key; all are of one launch each."""
    return f"{TENANT}/sim/{key}"


ALICE, BOB, CAROL = name("alice"), name("bob"), name("carol")
BROKER, RACER, BELL, TILL = name("broker"), name("racer"), name("bell"), name("till")
ACCOUNTS = (ALICE, BOB, CAROL)


class Numbered(Message):
    """A message that can be told from all others: number ``n`` of its ``line``."""

    line: str
    """Who sends to whom."""
    n: int

    @property
    def about(self) -> str:
        """Its name."""
        return f"{self.line}#{self.n}"


class Pay(Numbered):
    """Give money to another account."""

    to: str
    amount: int


class Credit(Numbered):
    """Money from another account."""

    amount: int


class Take(Numbered):
    """Somebody takes money, and waits for the answer."""

    amount: int


class Swap(Numbered):
    """Take from one account and give to another, asking both."""

    source: str
    to: str
    amount: int


class Charge(Numbered):
    """Call a tool."""

    tool: str


class Race(Numbered):
    """Things that come out differently each time, and a tool call that depends on them."""

    tool: str


class Arm(Numbered):
    """Set a timer, and tell everybody."""

    after_s: float


class Ring(Numbered):
    """What the timer brings."""


class News(Numbered):
    """What was published."""


class Subscribe(Numbered):
    """Begin to listen."""


class Done(Message):
    """Handled: what, and as which one."""

    about: str
    place: int
    value: str = ""


class Book(BaseModel):
    """What an agent remembers."""

    balance: int = START
    seen: list[str] = []
    """Names of what was handled, in order."""
    out: dict[str, int] = {}
    """How many were sent on each line."""
    charged: list[str] = []
    """What tools answered."""


class Base(Agent):
    """Keeps the book."""

    manifest = Manifest(
        capabilities=(
            *("clock", "random", "timer", "publish:*", "subscribe:*"),
            *("ask:*", "send:*", "call:*", "generate:*"),
        ),
        limits=Limits(turn_deadline_s=400, mailbox=100),
    )
    State: ClassVar[type[BaseModel]] = Book
    state: Book

    def note(self, message: Numbered, value: str = "") -> Done:
        """It is handled."""
        self.state.seen.append(message.about)
        return Done(about=message.about, place=len(self.state.seen) - 1, value=value)

    def next_on(self, line: str) -> int:
        """Number of the next message of a line."""
        n = self.state.out.get(line, 0)
        self.state.out[line] = n + 1
        return n


def short(agent: str) -> str:
    """Its key."""
    return agent.rsplit("/", 1)[1]


class Account(Base):
    """Has money."""

    @on(Pay)
    async def pay(self, message: Pay, os: Context) -> Done:
        self.state.balance -= message.amount
        line = f"{short(os.agent)}>{short(message.to)}"
        await os.send(message.to, Credit(line=line, n=self.next_on(line), amount=message.amount))
        return self.note(message)

    @on(Credit)
    async def credit(self, message: Credit, os: Context) -> Done:
        self.state.balance += message.amount
        if message.amount % 2:
            await os.now()
        return self.note(message)

    @on(Take)
    async def take(self, message: Take, os: Context) -> Done:
        self.state.balance -= message.amount
        if message.amount > 0:
            found = await os.call_tool("sure", about=message.about)
            self.state.charged.append(str(found.output))
        return self.note(message)

    @on(Subscribe)
    async def subscribe(self, message: Subscribe, os: Context) -> Done:
        await os.subscribe(NEWS)
        return self.note(message)

    @on(News)
    async def news(self, message: News, os: Context) -> None:
        self.note(message)

    @on(Charge)
    async def charge(self, message: Charge, os: Context) -> Done:
        found = await os.call_tool(message.tool, about=message.about)
        self.state.charged.append(str(found.output))
        return self.note(message, str(found.output))


class Broker(Base):
    """Asks others while its own turn runs."""

    @on(Swap)
    async def swap(self, message: Swap, os: Context) -> Done:
        line = f"take {message.line}"
        await os.ask(message.source, Take(line=line, n=message.n, amount=message.amount), Done)
        line = f"give {message.line}"
        given = await os.ask(message.to, Take(line=line, n=message.n, amount=-message.amount), Done)
        return self.note(message, str(given.place))


class Racer(Base):
    """Gathers, races, and acts on what came out."""

    @on(Race)
    async def race(self, message: Race, os: Context) -> Done:
        now, chance, other = await asyncio.gather(
            os.now(),
            os.random(),
            os.ask(BROKER, Charge(line=f"peek {message.line}", n=message.n, tool=""), Done),
        )
        waits = [await os.random() * 0.02 for _ in range(2)]
        runners = [asyncio.create_task(os.sleep(wait)) for wait in waits]
        await asyncio.wait(runners, return_when=asyncio.FIRST_COMPLETED)
        winner = next(i for i, task in enumerate(runners) if task.done())
        for task in runners:
            task.cancel()
        value = f"{now} {chance} {other.place} {winner}"
        found = await os.call_tool(message.tool, about=message.about, value=value)
        self.state.charged.append(str(found.output))
        return self.note(message, value)


class PeekBroker(Broker):
    """A broker that also says how much it has seen."""

    @on(Charge, read_only=True)
    async def peek(self, message: Charge, os: Context) -> Done:
        await os.random()
        return Done(about=message.about, place=len(self.state.seen))


class Bell(Base):
    """Sets timers and publishes."""

    @on(Arm)
    async def arm(self, message: Arm, os: Context) -> Done:
        line = f"ring {message.line}"
        await os.timer(
            f"{message.line} {message.n}", Ring(line=line, n=message.n), after_s=message.after_s
        )
        await os.publish(NEWS, News(line="bell*", n=self.next_on("bell*")))
        return self.note(message)

    @on(Ring)
    async def ring(self, message: Ring, os: Context) -> None:
        found = await os.call_tool("sure", about=message.about)
        self.state.charged.append(str(found.output))
        self.note(message)


PROGRAMS: dict[str, type[Base]] = {
    ALICE: Account,
    BOB: Account,
    CAROL: Account,
    BROKER: PeekBroker,
    RACER: Racer,
    BELL: Bell,
    TILL: Account,
}
"""Agent to its program."""
