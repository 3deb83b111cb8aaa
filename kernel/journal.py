"""The journal process: the one writer of the store, committing in groups.

Whoever waits for a commit waits together with all others that came meanwhile: one
fsync for all of them.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from llmos.drivers.errors import LlmosError, StaleEpoch, StoreUnavailable
from llmos.drivers.protocols import AgentRow, Store, StoreWrite, SyscallRow, TurnRow
from llmos.drivers.registry import driver
from llmos.kernel import logs
from llmos.kernel.metrics import COMMIT_ROWS, COMMITS, Exported, export
from llmos.kernel.remote import answers
from llmos.syscalls.errors import Busy

log = logging.getLogger("llmos.journal")

MAX_WAITING = 100_000
"""Writes that may wait for a commit; more are answered Busy."""
MAX_GROUP = 2_000
"""Writes of one transaction: keeps its latency in milliseconds."""


class JournalServer:
    """Owns the store. Runs as a Ray actor."""

    def __init__(self, name: str, store: str, path: str, log_dir: str, log_level: str) -> None:
        logs.configure(Path(log_dir), name, log_level)
        self._name = name
        self._store: Store = self._open(store, path)
        self._waiting: list[tuple[Sequence[StoreWrite], asyncio.Future[None]]] = []
        self._count = 0
        self._wake = asyncio.Event()
        self._ended = asyncio.Event()
        # One thread: the store's only writer. Reads share it, so they see what was committed.
        self._thread = ThreadPoolExecutor(1, "store")
        self._writer: asyncio.Task[None] | None = None

    @staticmethod
    def _open(store: str, path: str) -> Store:
        """Open the store; a predecessor that was just killed may hold it a moment longer."""
        until = time.monotonic() + 10.0
        while True:
            try:
                opened: Store = driver("store", store)(Path(path))
            except StoreUnavailable:
                if time.monotonic() > until:
                    raise
                time.sleep(0.1)
            else:
                return opened

    async def ready(self) -> bool:
        """Start writing."""
        if self._writer is None:
            self._writer = asyncio.create_task(self._write())
        return True

    async def lifeline(self) -> None:
        """Returns when the process is closed; fails when it is lost, which is how that is seen."""
        await self._ended.wait()

    async def ping(self) -> bool:
        """Answer."""
        return True

    @answers
    async def commit(self, writes: Sequence[StoreWrite]) -> None:
        """Return when all writes are durable.

        Raises:
            StaleEpoch, StoreUnavailable: nothing of them was kept.
            Busy: too many writes are waiting.
        """
        if self._count + len(writes) > MAX_WAITING:
            raise Busy("The journal", self._count, 0.5)
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((writes, future))
        self._count += len(writes)
        self._wake.set()
        await future

    async def _write(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._wake.wait()
            self._wake.clear()
            while self._waiting:
                group: list[tuple[Sequence[StoreWrite], asyncio.Future[None]]] = []
                size = 0
                while self._waiting and size < MAX_GROUP:
                    group.append(self._waiting.pop(0))
                    size += len(group[-1][0])
                self._count -= size
                results = await loop.run_in_executor(self._thread, self._commit_group, group)
                for (_, future), error in zip(group, results, strict=True):
                    if future.cancelled():
                        continue
                    if error is None:
                        future.set_result(None)
                    else:
                        future.set_exception(error)

    def _commit_group(
        self, group: list[tuple[Sequence[StoreWrite], asyncio.Future[None]]]
    ) -> list[LlmosError | None]:
        """One transaction for all; one each if that fails, so that each gets its own answer."""
        started = time.perf_counter()
        writes = [w for part, _ in group for w in part]
        results: list[LlmosError | None] = [None] * len(group)
        try:
            self._store.commit(writes)
        except Exception:
            log.debug("a group was refused", exc_info=True)
            for index, (part, _) in enumerate(group):
                try:
                    self._store.commit(part)
                except (StaleEpoch, StoreUnavailable) as error:
                    log.warning("commit refused: %s", error)
                    results[index] = error
                except Exception as error:
                    # A write that the store chokes on must not end the writer: everybody
                    # after it would wait for ever.
                    log.exception("commit failed")
                    results[index] = StoreUnavailable(self._name, repr(error))
        COMMITS.observe(time.perf_counter() - started)
        COMMIT_ROWS.observe(len(writes))
        return results

    async def _read(self, method: Any, *args: Any, **kwargs: Any) -> Any:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, lambda: method(*args, **kwargs))

    @answers
    async def agents(self) -> list[AgentRow]:
        """All registered agents."""
        rows: list[AgentRow] = await self._read(self._store.agents)
        return rows

    @answers
    async def activate(self, agent: str) -> tuple[AgentRow | None, bytes | None]:
        """Row and state of an agent."""

        def both() -> tuple[AgentRow | None, bytes | None]:
            return self._store.agent(agent), self._store.state(agent)

        row: tuple[AgentRow | None, bytes | None] = await self._read(both)
        return row

    @answers
    async def turns(self, agent: str | None, limit: int) -> list[TurnRow]:
        """Newest turns first."""
        rows: list[TurnRow] = await self._read(self._store.turns, agent=agent, limit=limit)
        return rows

    @answers
    async def turn(self, turn: str) -> tuple[TurnRow, list[SyscallRow]] | None:
        """A turn with its syscalls."""
        row: tuple[TurnRow, list[SyscallRow]] | None = await self._read(self._store.turn, turn)
        return row

    async def metrics(self) -> Exported:
        """This process's metrics."""
        return export(self._name)

    async def close(self) -> None:
        """Finish what waits and close the store."""
        waiting = [future for _, future in self._waiting]
        if waiting:
            await asyncio.wait(waiting)
        await self._read(self._store.close)
        self._ended.set()
