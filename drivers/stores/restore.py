"""Bring a backup back: into an empty store, with every arrival, position and hash as it was."""

from __future__ import annotations

import contextlib
import shutil
import sqlite3
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

from llmos.drivers.errors import StoreUnavailable
from llmos.drivers.registry import driver
from llmos.drivers.stores import copies, migrations


class Loads(Protocol):
    """A store that takes whole tables in."""

    def load(self, tables: Iterable[tuple[str, Iterator[tuple[Any, ...]]]]) -> None:
        """All of them or, raising StoreUnavailable, nothing."""
        ...

    def close(self) -> None:
        """Flush and release."""
        ...


def restore(source: Path | str, into: Loads | Path | str) -> None:
    """Load a backup into a store that is open, or into the one of that path or PostgreSQL URL.

    A backup by an older LLM OS is brought up to this version on the way; the file itself is
    only read.

    Raises:
        StoreUnavailable: the backup is none or damaged, or the store is not empty or cannot
            be written; then nothing was kept.
    """
    with contextlib.ExitStack() as stack:
        connection = stack.enter_context(_opened(Path(source)))
        if isinstance(into, Path | str):
            kind = "postgres" if is_url(into) else "sqlite"
            store: Loads = driver("store", kind)(into)
            stack.callback(store.close)
        else:
            store = into
        try:
            store.load(copies.read(connection))
        except sqlite3.Error as error:
            raise StoreUnavailable(str(source), str(error), remedy=_REMEDY) from error


def is_url(path: Path | str) -> bool:
    """Whether it names a PostgreSQL database, not a file."""
    return str(path).startswith(("postgresql://", "postgres://"))


_REMEDY = "Take another backup"


@contextlib.contextmanager
def _opened(source: Path) -> Iterator[sqlite3.Connection]:
    """A copy of the backup, at this version, in a read transaction."""
    if not source.is_file():
        raise StoreUnavailable(str(source), "there is no such file", remedy="Name a backup")
    with tempfile.TemporaryDirectory() as folder:
        # A copy: SQLite writes beside a file that it reads, and a backup stays as it is.
        copy = Path(folder) / "backup"
        try:
            shutil.copyfile(source, copy)
            with contextlib.closing(sqlite3.connect(copy, isolation_level=None)) as connection:
                if not connection.execute("PRAGMA application_id").fetchone()[0]:
                    raise StoreUnavailable(str(source), "it is no backup", remedy="Name a backup")
                damage = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
                reason = damage if damage != "ok" else migrations.prepare(connection)
                if reason:
                    raise StoreUnavailable(str(source), reason, remedy=_REMEDY)
                yield connection
        except (sqlite3.Error, OSError) as error:
            raise StoreUnavailable(str(source), str(error), remedy=_REMEDY) from error
