"""Virtual time: an event loop that never waits, and a clock that can be set.

When nothing is ready, time jumps to the next timer. So an hour of waiting costs nothing, and
the same seed gives the same run.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")

BEGIN_S = 1_700_000_000.0
"""The wall clock when a run begins."""


class Stuck(Exception):
    """Nothing is ready and no timer is set: whoever still waits would wait for ever."""


MAX_ROUNDS = 60_000
"""Rounds of the loop that a run may take: one that goes on for ever is found, not waited for."""


class Endless(Exception):
    """Something turns round and round."""


class VirtualLoop(asyncio.BaseEventLoop):
    """An event loop without files or sockets, whose time is a number."""

    def __init__(self) -> None:
        super().__init__()
        self._now = 0.0
        self._rounds = 0
        self._selector = self
        self._clock_resolution = 1e-9

    def time(self) -> float:
        """Virtual seconds since the loop was made."""
        return self._now

    def select(self, timeout: float | None) -> list[Any]:
        """What a selector would do: here nothing ever comes from outside."""
        self._rounds += 1
        if self._rounds > MAX_ROUNDS:
            raise Endless([str(handle) for handle in list(vars(self)["_ready"])[:20]])
        if timeout is None:
            raise Stuck
        if timeout > 0:
            self._now += timeout
        return []

    def _process_events(self, event_list: list[Any]) -> None:
        """There are none."""

    def _write_to_self(self) -> None:
        """Nobody has to be woken."""

    def call_soon_threadsafe(  # type: ignore[override]
        self, callback: Any, *args: Any, context: Any = None
    ) -> Any:
        """There are no threads here: whoever starts one breaks determinism."""
        raise AssertionError("a thread has come into a simulation")


def run(main: Coroutine[Any, Any, T]) -> T:
    """Run to the end in a loop of its own, and clear up what is left running."""
    loop = VirtualLoop()
    loop.set_exception_handler(lambda *_: None)
    try:
        return loop.run_until_complete(main)
    finally:
        loop._rounds = 0
        for _ in range(5):
            left = asyncio.all_tasks(loop)
            if not left:
                break
            for task in left:
                task.cancel()
            loop.call_later(3.0, loop.stop)
            loop.run_forever()
        loop.close()


class VirtualClock:
    """The kernel's clock on virtual time; its wall clock can be set."""

    def __init__(self, chance: random.Random) -> None:
        self._chance = chance
        self.ahead_s = 0.0
        """How far the wall clock was put forward, or (below zero) back."""

    def monotonic(self) -> float:
        """Virtual seconds."""
        return asyncio.get_running_loop().time()

    def time(self) -> float:
        """Seconds since 1970, as the wall clock was set."""
        return BEGIN_S + self.ahead_s + asyncio.get_running_loop().time()

    async def sleep(self, seconds: float) -> None:
        """Wait, in virtual time."""
        await asyncio.sleep(seconds)

    def random(self) -> float:
        """A number in [0, 1), by the seed."""
        return self._chance.random()
