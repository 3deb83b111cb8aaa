"""A plain server object behind a handle like Ray's: ``handle.method.remote(...)``.

Arguments and results are pickled on the way, as between processes; a handle that is
killed raises what Ray raises. So a whole little kernel runs in one event loop.
"""

from __future__ import annotations

import asyncio
import itertools
import pickle
from collections.abc import Callable
from typing import Any

from ray.exceptions import RayActorError

from llmos.drivers.stores.rows import JournalRow
from llmos.kernel.turnlog import TurnLog

_ALIVE: dict[int, LocalHandle] = {}
_numbers = itertools.count()


def _find(number: int) -> LocalHandle:
    return _ALIVE[number]


class _Method:
    def __init__(self, handle: LocalHandle, name: str) -> None:
        self._handle, self._name = handle, name

    def remote(self, *args: Any, **kwargs: Any) -> asyncio.Task[Any]:
        # Pickled now and not when the task runs: later changes are not seen over there.
        sent = pickle.dumps((args, kwargs))
        return asyncio.create_task(self._handle._run(self._name, sent))


async def until(condition: Callable[[], object], timeout_s: float = 5.0) -> None:
    """Let everything run until something has become so."""
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110 - for what has no event to wait for
            await asyncio.sleep(0.001)


class RowLog(TurnLog):
    """The journal of one turn in a list: a row is durable as soon as a barrier asks for it."""

    def __init__(self) -> None:
        self.rows: list[JournalRow] = []
        self.durable = 0
        """How many rows there were at the last barrier."""
        self.barriers = 0
        self.pieces = []

    def add(self, row: JournalRow) -> None:
        self.rows.append(row)

    def soon(self) -> None:
        pass

    async def barrier(self) -> None:
        self.rows += [row for piece in self.pieces if (row := piece()) is not None]
        self.barriers += 1
        self.durable = len(self.rows)


class LocalHandle:
    """A handle to a server in this event loop."""

    def __init__(self, server: Any) -> None:
        self._server = server
        self._dead = asyncio.Event()
        self._number = next(_numbers)
        self.calls: list[str] = []
        """Names of the methods that were called."""
        _ALIVE[self._number] = self

    def __getattr__(self, name: str) -> _Method:
        if name.startswith("_"):
            raise AttributeError(name)
        return _Method(self, name)

    def __reduce__(self) -> tuple[Any, ...]:
        return _find, (self._number,)

    async def _run(self, name: str, sent: bytes) -> Any:
        self.calls.append(name)
        args, kwargs = pickle.loads(sent)
        if self._dead.is_set():
            raise RayActorError
        work = asyncio.ensure_future(getattr(self._server, name)(*args, **kwargs))
        death = asyncio.create_task(self._dead.wait())
        try:
            await asyncio.wait([work, death], return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                raise RayActorError
            return pickle.loads(pickle.dumps(work.result()))
        finally:
            death.cancel()
            if not work.done():
                work.cancel()

    def kill(self) -> None:
        """From now on every call fails, and so do those in progress."""
        self._dead.set()
