"""The journal process: the one writer of the store, committing in groups.

Whoever waits for a commit waits together with all others that came meanwhile: one
fsync for all of them.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from llmos.drivers.errors import LlmosError, StoreUnavailable
from llmos.drivers.protocols import Store
from llmos.drivers.registry import driver
from llmos.drivers.stores import wire
from llmos.drivers.stores.rows import AgentRow, JournalRow, LaunchRow, Part
from llmos.kernel import logs, record
from llmos.kernel.metrics import COMMIT_ROWS, COMMITS, Exported, export
from llmos.kernel.remote import answers
from llmos.syscalls.errors import Busy, InvalidRequest

log = logging.getLogger("llmos.journal")

T = TypeVar("T")

GC_THRESHOLD = 20_000
"""Objects made since the last collection of the youngest."""
MAX_WAITING = 100_000
"""Writes that may wait for a commit; more are answered Busy."""
MAX_GROUP = 4_000
"""Writes of one transaction: keeps its latency in milliseconds."""
OPEN_S = 30.0
"""How long a store that cannot be opened is tried: a predecessor that was just killed may
hold it a moment longer, and a database may be starting."""

READS = frozenset(
    {
        "agent",
        "agents",
        "blob",
        "chain",
        "chain_end",
        "count_agents",
        "dead",
        "handled",
        "launches",
        "mail",
        "monitors",
        "shards",
        "subscribers",
        "timers",
        "timers_of",
        "turn",
        "turns",
        "turns_rows",
        "waiting",
    }
)
"""What may be read from outside this process: methods of the store."""


class JournalServer:
    """Owns the store. Runs as a Ray actor."""

    def __init__(self, name: str, store: str, path: str, log_dir: str, log_level: str) -> None:
        logs.configure(Path(log_dir), name, log_level)
        self._name = name
        self._store = self._open(store, path)
        self._waiting: deque[tuple[Sequence[Part], asyncio.Future[list[LlmosError | None]]]] = (
            deque()
        )
        self._count = 0
        self._taken: dict[str, int] = {}
        """By host: the number of its call that was taken last."""
        self._wake = asyncio.Event()
        self._ended = asyncio.Event()
        # One thread writes; reads have their own, and so never wait for a sync.
        self._writing = ThreadPoolExecutor(1, "store-write")
        self._reading = ThreadPoolExecutor(2, "store-read")
        self._writer: asyncio.Task[None] | None = None

    def _open(self, store: str, path: str) -> Store:
        until = time.monotonic() + OPEN_S
        while True:
            try:
                opened: Store = driver("store", store)(path)
            except StoreUnavailable:
                if time.monotonic() > until:
                    raise
                time.sleep(0.1)
            else:
                return opened

    async def ready(self) -> bool:
        """Start writing."""
        if self._writer is None:
            # As in hosts: what was imported stays, and the collector need not look at it.
            gc.collect()
            gc.freeze()
            gc.set_threshold(GC_THRESHOLD, 20, 20)
            self._writer = asyncio.create_task(self._write())
        return True

    async def lifeline(self) -> None:
        """Returns when the process is closed; fails when it is lost, which is how that is seen."""
        await self._ended.wait()

    async def ping(self) -> bool:
        """Answer."""
        return True

    @answers
    async def commit(
        self,
        parts: Sequence[Part] | bytes,
        sender: str = "",
        number: int = 0,
        first: bool = True,
    ) -> list[LlmosError | None]:
        """Return when all parts are durable or refused; one result for each.

        Args:
            parts: Parts, or what a host's committer has packed them into.
            sender: Whose parts they are.
            number: Of the call, among those of the sender.
            first: Whether all that the sender sent before is settled. What is not must not
                overtake a call that was refused, or that never arrived.

        Raises:
            Busy: too many writes are waiting, or the call before this one was not taken;
                nothing was taken.
        """
        if isinstance(parts, bytes):
            parts = wire.unpack(parts)
        size = sum(len(part) for part in parts)
        full = self._count and self._count + size > MAX_WAITING
        if full or (not first and self._taken.get(sender) != number - 1):
            raise Busy("The journal", self._count, 0.5)
        self._taken[sender] = number
        future: asyncio.Future[list[LlmosError | None]] = asyncio.get_running_loop().create_future()
        self._waiting.append((parts, future))
        self._count += size
        self._wake.set()
        return await future

    async def _write(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            while self._waiting:
                group = []
                size = 0
                while self._waiting and size < MAX_GROUP:
                    group.append(self._waiting.popleft())
                    size += sum(len(part) for part in group[-1][0])
                self._count -= size
                parts = [part for some, _ in group for part in some]
                results = await self._run(self._writing, partial(self._commit, parts))
                start = 0
                for some, future in group:
                    if not future.done():
                        future.set_result(results[start : start + len(some)])
                    start += len(some)

    async def _run(self, executor: ThreadPoolExecutor, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(executor, work)

    def _commit(self, parts: list[Part]) -> list[LlmosError | None]:
        """One transaction for all. A store that cannot be written refuses them all."""
        started = time.perf_counter()
        results: list[LlmosError | None]
        try:
            results = list(self._store.commit(parts))
        except StoreUnavailable as error:
            log.error("%d parts could not be kept: %s", len(parts), error)
            results = [error.with_traceback(None)] * len(parts)
        except Exception as error:
            # A part that the store chokes on must not end the writer: everybody after it
            # would wait for ever.
            log.exception("commit failed")
            results = [StoreUnavailable(self._name, repr(error), remedy="See: llmos logs")] * len(
                parts
            )
        COMMITS.observe(time.perf_counter() - started)
        COMMIT_ROWS.observe(sum(len(part) for part in parts))
        return results

    @answers
    async def read(self, method: str, *args: Any, **options: Any) -> Any:
        """Call a reading method of the store; references to blobs are resolved."""
        if method not in READS:
            raise InvalidRequest("journal", method, "is no reading method of the store")
        return await self._run(self._reading, lambda: self._read(method, args, options))

    def _read(self, method: str, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        found = getattr(self._store, method)(*args, **options)
        if method == "turns_rows":
            return {turn: self._resolved(rows) for turn, rows in found.items()}
        if method in ("turn", "turns"):
            return self._resolved(found)
        if method == "handled":
            return self._resolved([found])[0] if found is not None else None
        return found

    def _resolved(self, rows: list[JournalRow]) -> list[JournalRow]:
        """Rows with their blobs in place. A chain is not resolved: its hashes are over the rows."""
        out = []
        for row in rows:
            changes: dict[str, Any] = {}
            for column in ("args", "result"):
                digest = record.referred(getattr(row, column))
                if digest is not None:
                    changes[column] = self._store.blob(digest) or b""
            out.append(row._replace(**changes) if changes else row)
        return out

    @answers
    async def activate(
        self, agents: Sequence[str]
    ) -> list[tuple[LaunchRow | None, AgentRow | None]]:
        """Launch and row of each agent."""

        def all_of_them() -> list[tuple[LaunchRow | None, AgentRow | None]]:
            return [(self._store.launch_of(a), self._store.chain_end(a)) for a in agents]

        return await self._run(self._reading, all_of_them)

    @answers
    async def backup(self, target: str) -> int:
        """Write a consistent copy while commits go on; returns its bytes.

        Raises:
            StoreUnavailable
        """
        return await self._run(self._reading, lambda: self._store.backup(Path(target)))

    async def metrics(self) -> Exported:
        """This process's metrics."""
        return export(self._name)

    async def close(self) -> None:
        """Finish what waits and close the store."""
        waiting = [future for _, future in self._waiting]
        if waiting:
            await asyncio.wait(waiting)
        await self._run(self._writing, self._store.close)
        self._ended.set()
