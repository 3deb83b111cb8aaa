"""Clients that tell and ask all the time, and write down outside the system what they heard."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections import Counter
from collections.abc import Coroutine
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from llmos.drivers.errors import LlmosError
from llmos.kernel.client import AsyncKernel
from llmos.syscalls.messages import Wire
from tests.chaos.programs import AGENTS, PLAIN, Add, Added, Note

PATIENCE_S = 10.0
"""How much later than its deadline an ask may end."""


@dataclass(slots=True)
class Deed:
    """One message of a client, and what it heard about it."""

    kind: str
    """``tell`` or ``ask``."""
    client: str
    receiver: str
    number: int
    begun_at: float
    ended_at: float = 0.0
    outcome: str = "pending"
    """``acked``, ``replied``, the code of a typed error, ``untyped …`` or ``pending``."""
    error: str = ""
    message_id: str = ""
    turn: str = ""
    total: int = 0
    late: bool = False
    """It ended more than :data:`PATIENCE_S` after its deadline."""


@dataclass
class History:
    """All deeds, also in a file of their own as they end."""

    file: Path
    deeds: list[Deed] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._out = self.file.open("a", buffering=1)

    def begin(self, kind: str, client: str, receiver: str, number: int) -> Deed:
        deed = Deed(kind, client, receiver, number, time.time())
        self.deeds.append(deed)
        return deed

    def end(self, deed: Deed, outcome: str, error: str = "") -> None:
        deed.ended_at, deed.outcome, deed.error = time.time(), outcome, error
        self._out.write(json.dumps(asdict(deed)) + "\n")


class Client:
    """One sender: a stream of its own, with its own numbers for each receiver."""

    def __init__(self, name: str, kernel: AsyncKernel, history: History, seed: int) -> None:
        self.name = name
        # A kernel object of its own numbers its messages by itself.
        self._kernel = AsyncKernel(
            kernel._cluster, kernel._handle, kernel.system, kernel._settings, owner=False
        )
        self._history = history
        self._chance = random.Random(seed)
        self._told: Counter[str] = Counter()
        self._asked: Counter[str] = Counter()
        self._under_way: set[asyncio.Task[None]] = set()
        self._stop = asyncio.Event()

    def stop(self) -> None:
        """Begin nothing new."""
        self._stop.set()

    async def tell(self, rate: float, window: int = 16) -> None:
        """Tell about ``rate`` notes a second, with up to ``window`` not yet acknowledged."""
        chance = self._chance
        while not self._stop.is_set():
            for receiver in chance.sample(AGENTS, 2):
                # Several to one receiver at once: they must stay in order.
                for _ in range(chance.choice((1, 1, 2, 4))):
                    self._told[receiver] += 1
                    self._start(self._tell_one(receiver, self._told[receiver], self._note()))
            await self._pause(4.0 / rate * chance.uniform(0.2, 1.8))
            while len(self._under_way) >= window and not self._stop.is_set():
                await asyncio.wait(
                    self._under_way, timeout=0.5, return_when=asyncio.FIRST_COMPLETED
                )
        await self._rest()

    def _note(self) -> dict[str, Any]:
        chance = self._chance
        return {
            "think": chance.random() < 0.3,
            "consult": chance.choice(PLAIN) if chance.random() < 0.15 else "",
            "forward": chance.choice(AGENTS) if chance.random() < 0.25 else "",
        }

    async def _tell_one(self, receiver: str, number: int, what: dict[str, Any]) -> None:
        if receiver in PLAIN:
            what["consult"] = ""  # They ask nobody, so that none waits for another in a ring.
        if what["forward"] == receiver:
            what["forward"] = ""
        deed = self._history.begin("tell", self.name, receiver, number)
        try:
            message = Note(sender=self.name, number=number, **what)
            deed.message_id = await self._kernel.tell(receiver, message, deadline_s=60.0)
        except LlmosError as error:
            self._history.end(deed, error.code, str(error))
        except Exception as error:  # noqa: BLE001
            self._history.end(deed, f"untyped {type(error).__name__}", repr(error))
        else:
            self._history.end(deed, "acked")

    async def ask(self, rate: float) -> None:
        """Ask about ``rate`` questions a second, several at a time."""
        chance = self._chance
        while not self._stop.is_set():
            receiver = chance.choice(AGENTS)
            self._asked[receiver] += 1
            self._start(self._ask_one(receiver, self._asked[receiver], chance.choice((3, 15, 60))))
            await self._pause(chance.uniform(0.2, 1.8) / rate)
            while len(self._under_way) >= 16 and not self._stop.is_set():
                await asyncio.wait(
                    self._under_way, timeout=0.5, return_when=asyncio.FIRST_COMPLETED
                )
        await self._rest()

    async def _ask_one(self, receiver: str, number: int, deadline_s: float) -> None:
        deed = self._history.begin("ask", self.name, receiver, number)
        message = Wire.of(Add(sender=self.name, number=number))
        try:
            reply = await self._kernel.ask_reply(receiver, message, deadline_s=deadline_s)
            deed.turn = reply.turn
            if reply.error is not None:
                raise reply.error
            assert reply.wire is not None
            deed.total = reply.wire.decode(Added, self.name).total
        except LlmosError as error:
            self._history.end(deed, error.code, str(error))
        except Exception as error:  # noqa: BLE001
            self._history.end(deed, f"untyped {type(error).__name__}", repr(error))
        else:
            self._history.end(deed, "replied")
        deed.late = deed.ended_at - deed.begun_at > deadline_s + PATIENCE_S

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._under_way.add(task)
        task.add_done_callback(self._under_way.discard)

    async def _pause(self, seconds: float) -> None:
        try:
            async with asyncio.timeout(seconds):
                await self._stop.wait()
        except TimeoutError:
            pass

    async def _rest(self) -> None:
        """What is under way ends by itself: everything has a deadline."""
        if self._under_way:
            await asyncio.wait(self._under_way, timeout=60.0 + 2 * PATIENCE_S)
        for task in list(self._under_way):
            task.cancel()  # Its deed stays pending, which the checker counts.
