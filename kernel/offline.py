"""A system whose kernel is down: its store, opened directly, and what is done with it."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from llmos.drivers.errors import StoreUnavailable
from llmos.drivers.protocols import Store
from llmos.drivers.registry import driver
from llmos.drivers.stores.restore import restore as load
from llmos.drivers.stores.rows import JournalRow, LaunchRow, Part
from llmos.kernel import record
from llmos.kernel.operating import OperationRefused, Operator
from llmos.kernel.settings import Settings
from llmos.kernel.system import StoreTable, SystemConfig
from llmos.syscalls.errors import UnknownAgent


class SystemNote(BaseModel):
    """``<runs>/<system>/system.json``: what has to be known of a system whose kernel is down."""

    system: str
    store: StoreTable = StoreTable()
    """As in its file: an address ``env:NAME`` stays one, so that no password is written."""
    base: Path | None = None
    """Folder of its file, where its programs are."""

    @staticmethod
    def path(settings: Settings, system: str) -> Path:
        """Where it stands."""
        return settings.runs_dir / system / "system.json"

    @classmethod
    def write(cls, settings: Settings, config: SystemConfig) -> None:
        """Keep it, for this user alone."""
        note = cls(system=config.system.name, store=config.store, base=config.base.resolve())
        path = cls.path(settings, note.system)
        part = path.with_suffix(f".{os.getpid()}")
        part.touch(mode=0o600)
        part.write_text(note.model_dump_json())
        part.replace(path)

    @classmethod
    def find(cls, settings: Settings, system: str | None) -> SystemNote | None:
        """That of a system, or of the only one on this machine; None: there is none, or several."""
        folders = {p.parent for p in settings.runs_dir.glob(f"{system or '*'}/store.db")}
        folders |= {p.parent for p in settings.runs_dir.glob(f"{system or '*'}/system.json")}
        return cls.of(settings, folders.pop().name) if len(folders) == 1 else None

    @classmethod
    def of(cls, settings: Settings, system: str) -> SystemNote:
        """That of a system; where none was kept, its store is the file in its folder."""
        try:
            return cls.model_validate(json.loads(cls.path(settings, system).read_text()))
        except (OSError, ValueError, ValidationError):
            return cls(system=system)

    def address(self, settings: Settings) -> str:
        """Path or URL of the store.

        Raises:
            SystemFileError: the environment variable that holds it is not set.
        """
        return self.store.address(os.environ) or str(settings.run_dir(self.system) / "store.db")


@contextlib.contextmanager
def opened(settings: Settings, note: SystemNote) -> Iterator[Operator]:
    """The operations on the store of a system that is down.

    Raises:
        StoreUnavailable: there is none, or its kernel runs and owns it.
    """
    address = note.address(settings)
    if note.store.driver == "sqlite" and not Path(address).exists():
        raise StoreUnavailable(address, "there is no such file", remedy="See: llmos up FILE")
    store: Store = driver("store", note.store.driver)(address)
    try:
        yield Operator(StoreLedger(store), time.time)
    finally:
        store.close()


def restore(settings: Settings, backup: Path, *, system: str | None, url: str | None) -> str:
    """Load a backup into the empty store of a system that is down; returns where that is.

    Args:
        settings: This machine's.
        backup: What ``llmos backup`` wrote.
        system: Name of the system.
        url: A PostgreSQL database instead.

    Raises:
        StoreUnavailable: the backup is damaged, or the store is not empty or in use. Nothing
            was kept then.
    """
    if url is not None:
        load(backup, url)
        return url
    assert system is not None
    note = SystemNote.of(settings, system)
    settings.make_folders(system)
    address = note.address(settings)
    load(backup, address if note.store.driver == "postgres" else Path(address))
    return address


class StoreLedger:
    """A store without a kernel. Implements :class:`llmos.kernel.operating.Ledger`."""

    def __init__(self, store: Store) -> None:
        self._store = store

    async def read(self, method: str, *args: Any, **options: Any) -> Any:
        """Call a reading method of the store."""
        found = getattr(self._store, method)(*args, **options)
        if method == "turns_rows":
            return {turn: self._whole(rows) for turn, rows in found.items()}
        if method in ("turn", "turns"):
            return self._whole(found)
        if method == "handled":
            return self._whole([found])[0] if found is not None else None
        return found

    def _whole(self, rows: list[JournalRow]) -> list[JournalRow]:
        """Rows with their blobs in place."""

        def column(data: bytes) -> bytes:
            digest = record.referred(data)
            return data if digest is None else self._store.blob(digest) or b""

        return [row._replace(args=column(row.args), result=column(row.result)) for row in rows]

    async def commit(self, parts: Sequence[Part]) -> None:
        """Make parts durable."""
        for error in self._store.commit(parts):
            if error is not None:
                raise error

    async def launch_of(self, agent: str) -> LaunchRow | None:
        """The launch of an agent."""
        return self._store.launch_of(agent)

    async def resolve(self, agent: str) -> str:
        """Among those that are launched."""
        known = [row.agent for row in self._store.launches()]
        parts = [a for a in known if agent in (a.rsplit("/", 1)[0], *a.split("/"))]
        if len(parts) == 1:
            return parts[0]
        raise UnknownAgent(agent, parts or known)

    async def go_on(self, agent: str) -> None:
        """Nobody is to be told."""

    async def mail_came(self) -> None:
        """Nobody is to be told."""

    async def backup(self, target: str) -> int:
        """Write a copy."""
        return self._store.backup(Path(target))

    async def drain(self, host: str, timeout_s: float) -> None:
        """There are no hosts."""
        raise OperationRefused(f"{host} cannot be drained", "the kernel is down")

    async def rebalance(self) -> int:
        """There are no hosts."""
        raise OperationRefused("Nothing can be rebalanced", "the kernel is down")
