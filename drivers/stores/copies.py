"""Copies of whole stores: a backup is one SQLite file, whatever store it is of.

Rows are copied as they are, table by table, so arrivals, positions and hashes stay.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

from llmos.drivers.errors import StoreUnavailable
from llmos.drivers.stores import migrations
from llmos.drivers.stores.schema import SELECT, TABLES, insert

ROWS_AT_ONCE = 1000
"""How many rows of a table are in memory at a time."""

Tables: TypeAlias = Iterable[tuple[str, Iterator[tuple[Any, ...]]]]
"""Name and rows of every table; each must be read before the next is asked for."""


@contextlib.contextmanager
def new_file(target: Path) -> Iterator[Path]:
    """A temporary path beside the target, which becomes the target if all goes well.

    Raises:
        StoreUnavailable: the target exists already, or its folder cannot be written.
    """
    target = Path(target)
    try:
        if target.exists():
            raise FileExistsError
        with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as folder:
            temporary = Path(folder) / "copy"
            yield temporary
            _sync(temporary)
            # A link, not a rename: it fails where somebody else made the target meanwhile.
            os.link(temporary, target)
        _sync(target.parent)
    except FileExistsError:
        raise StoreUnavailable(str(target), "it exists already", remedy="Name a new file") from None
    except OSError as error:
        raise StoreUnavailable(str(target), str(error)) from error


def write(target: Path, tables: Tables) -> int:
    """Write tables as a SQLite store; returns its bytes.

    Raises:
        StoreUnavailable: the target exists already, or cannot be written.
    """
    with new_file(target) as temporary:
        try:
            with contextlib.closing(sqlite3.connect(temporary, isolation_level=None)) as new:
                # Nobody sees the file before it is whole, and then it is synced once.
                new.execute("PRAGMA synchronous = OFF")
                migrations.prepare(new)
                new.execute("BEGIN")
                new.execute("DELETE FROM counters")
                for name, values in tables:
                    new.executemany(insert(name), values)
                new.execute("COMMIT")
        except sqlite3.Error as error:
            raise StoreUnavailable(str(target), str(error)) from error
    return Path(target).stat().st_size


def read(connection: sqlite3.Connection) -> Tables:
    """All tables of a SQLite store, ordered by key."""
    for table in TABLES:
        cursor = connection.execute(f"{SELECT[table.name]} ORDER BY {', '.join(table.key)}")
        yield table.name, iter(cursor)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
