"""An agent that notes what it is told, and the clients of the tests of nodes."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import ClassVar

from pydantic import BaseModel, Field

from llmos import Agent, Context, Limits, Manifest, Message, on
from llmos.kernel.client import Kernel

PROGRAM = "tests.cluster.noting:Noting"


class Note(Message):
    n: int
    seconds: float = 0.0
    """How long its turn lasts."""


class Tell(Message):
    pass


class Told(Message):
    seen: list[int]


class Notes(BaseModel):
    seen: list[int] = Field(default_factory=list)


def append(path: Path, text: str) -> None:
    with path.open("a") as file:
        file.write(text)


class Where(BaseModel):
    begun: str = ""
    """A file outside the system: a line for each turn that begins."""


class Noting(Agent):
    manifest = Manifest(capabilities=("clock",), limits=Limits(mailbox=512, turn_deadline_s=60))
    State: ClassVar[type[BaseModel]] = Notes
    Config: ClassVar[type[BaseModel]] = Where
    state: Notes
    config: Where

    @on(Note)
    async def note(self, message: Note, os: Context) -> None:
        if message.seconds:
            append(Path(self.config.begun), f"{os.agent} {message.n}\n")
            await os.sleep(message.seconds)
        self.state.seen.append(message.n)

    @on(Tell, read_only=True)
    async def tell(self, message: Tell, os: Context) -> Told:
        return Told(seen=self.state.seen)


class Load:
    """Tells each agent 0, 1, 2, … until it is stopped, each when the one before is durable."""

    def __init__(self, kernel: Kernel, agents: list[str], *, seconds: float = 0.0) -> None:
        self._kernel, self._seconds = kernel, seconds
        self.acknowledged = dict.fromkeys(agents, 0)
        self._stop = threading.Event()
        self._pool = ThreadPoolExecutor(len(agents))
        self._work = [self._pool.submit(self._tell, agent) for agent in agents]

    def _tell(self, agent: str) -> None:
        while not self._stop.is_set():
            note = Note(n=self.acknowledged[agent], seconds=self._seconds)
            self._kernel.tell(agent, note, deadline_s=120)
            self.acknowledged[agent] += 1
            time.sleep(0.02)

    def wait(self, more: int) -> None:
        """Until every agent has been told so many more."""
        wanted = {agent: n + more for agent, n in self.acknowledged.items()}
        until = time.monotonic() + 120
        while any(self.acknowledged[agent] < n for agent, n in wanted.items()):
            assert time.monotonic() < until, self.acknowledged
            assert not any(w.done() for w in self._work), [
                w.exception() for w in self._work if w.done()
            ]
            time.sleep(0.02)

    def stop(self) -> int:
        """Tell no more; returns how many were acknowledged."""
        self._stop.set()
        for work in self._work:
            work.result(timeout=120)
        self._pool.shutdown()
        return sum(self.acknowledged.values())

    def check(self, kernel: Kernel | None = None) -> None:
        """Every acknowledged message was handled once, in order."""
        kernel = kernel or self._kernel
        for agent, count in self.acknowledged.items():
            until = time.monotonic() + 60
            while True:
                told = kernel.ask(agent, Tell(), Told, deadline_s=60)
                if len(told.seen) >= count or time.monotonic() > until:
                    break
                time.sleep(0.1)
            assert told.seen == list(range(count)), agent


def all_serve(kernel: Kernel, agents: list[str]) -> float:
    """Ask every agent at once; returns seconds until the last has answered."""
    began = time.monotonic()
    with ThreadPoolExecutor(len(agents)) as pool:
        list(pool.map(lambda agent: kernel.ask(agent, Tell(), Told, deadline_s=90), agents))
    return time.monotonic() - began
