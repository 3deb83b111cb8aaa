"""The durable store of one machine: SQLite with a write-ahead log, synced at each commit.

One connection writes under a lock, one reads, so that a read never waits for a sync.
A lock file beside the database keeps other processes out: SQLite alone would let two
kernels take turns in writing, and each would believe itself the only one. The lock is
the operating system's and ends with the process, however that ends; a file that merely
exists, with a process id in it, was rejected because it survives a crash.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import sqlite3
import threading
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from llmos.drivers.errors import StoreError, StoreUnavailable
from llmos.drivers.stores import copies, migrations, rows
from llmos.drivers.stores.changes import (
    Changes,
    Entry,
    Known,
    RowKey,
    Tombstone,
    agent_values,
    mailroom,
)
from llmos.drivers.stores.dropping import OF_ALL_SQLITE, drop
from llmos.drivers.stores.reads import SqlReads
from llmos.drivers.stores.schema import (
    AGENTS_TAIL,
    ENTRY,
    FATE,
    SELECT,
    TABLES,
    dead_letter,
    dead_values,
    insert,
    upsert_tail,
)

BUSY_TIMEOUT_S = 5.0
"""How long to wait for a foreign program (a backup, a shell) that locks the database."""

_CACHED_STATEMENTS = 256

_LOG_PAGES = 4000
"""Length of the log, 16 MB, at which it is moved into the database. Longer than SQLite's own
1000: a busy page is then moved once for many commits."""

_CACHE_KIB = 64 * 1024
"""Pages that the writing connection may keep."""

_TURN_KEYS = "SELECT seq, phase, part FROM journal WHERE turn = ?"
_MAIL_ROW = f"{SELECT['mail']} WHERE receiver = ? AND stream = ? AND seq = ?"
_DEAD_LETTER = f"{SELECT['dead']} WHERE id = ?"
_TIMER_DUE = "SELECT due FROM timers WHERE agent = ? AND name = ?"

_PUT_AGENT = f"{insert('agents')} {AGENTS_TAIL}"
_PUT_LAUNCH = f"{insert('launches')} {upsert_tail('launches')}"
_PUT_SHARD = f"{insert('shards')} {upsert_tail('shards')}"
_PUT_ROW = insert("journal")
_PUT_BLOB = f"{insert('blobs')} ON CONFLICT (sha256) DO NOTHING"
_PUT_MAIL = insert("mail")
_BEGIN_MAIL = (
    "UPDATE mail SET not_before = ?, attempts = ?, deaths = ?, turn = ?, epoch = ? "
    "WHERE arrival = ?"
)
_DROP_MAIL = "DELETE FROM mail WHERE arrival = ?"
_PUT_DEAD = insert("dead")
_DROP_DEAD = "DELETE FROM dead WHERE id = ?"
_PUT_TIMER = f"{insert('timers')} {upsert_tail('timers')}"
_PUT_TOPIC = f"{insert('topics')} {upsert_tail('topics')}"
_PUT_MONITOR = f"{insert('monitors')} {upsert_tail('monitors')}"
_COUNT = "UPDATE counters SET value = ? WHERE name = ?"


class SqliteStore(SqlReads):
    """Rows in one SQLite file, owned by one process."""

    def __init__(self, path: Path | str) -> None:
        """Open the database, or create it with the folders above it.

        One that an older LLM OS wrote is brought up to this version, in one transaction.

        Raises:
            StoreUnavailable: another process owns it, it is not a store of LLM OS or of a
                newer one, or the path cannot be used.
        """
        self._path = Path(path)
        self._lock = threading.Lock()
        self._read_lock = threading.Lock()
        self._closed = False
        with contextlib.ExitStack() as undo:
            try:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                self._lock_file = self._own()
                undo.callback(os.close, self._lock_file)
                self._writer = self._connect()
                undo.callback(self._writer.close)
                if reason := migrations.prepare(self._writer):
                    raise self._unavailable(reason, remedy="Use another path or a newer LLM OS")
                mode = self._writer.execute("PRAGMA journal_mode = WAL").fetchone()[0]
                if mode != "wal":
                    raise self._unavailable(
                        f"its file system allows no write-ahead log (journal mode {mode})",
                        remedy="Use a local disk",
                    )
                self._writer.execute("PRAGMA synchronous = FULL")
                self._writer.execute(f"PRAGMA wal_autocheckpoint = {_LOG_PAGES}")
                self._writer.execute(f"PRAGMA cache_size = -{_CACHE_KIB}")
                self._known = self._load()
                self._reader = self._connect()
                undo.callback(self._reader.close)
                self._reader.execute("PRAGMA query_only = ON")
            except (OSError, sqlite3.Error) as error:
                raise self._unavailable(str(error)) from error
            undo.pop_all()

    def commit(self, parts: Sequence[rows.Part]) -> list[StoreError | None]:
        """Make parts durable, in order, in one transaction that is on disk when this returns.

        A part with a value that no store can hold is refused by itself, with
        StoreUnavailable in its place of the result.

        Raises:
            StoreUnavailable: disk full, I/O error, locked by another program, closed. Nothing
                of any part was kept, and the store can be used again.
        """
        with self._lock:
            self._check_open()
            writer = self._writer
            try:
                # Before the reads too: each of them would take and give back a lock of its own.
                writer.execute("BEGIN IMMEDIATE")
                changes = Changes(_Committed(writer), self._known, str(self._path))
                errors = changes.add(parts)
                if not changes.empty():
                    self._write(writer, changes)
                writer.execute("COMMIT")
            except (sqlite3.Error, OSError) as error:
                self._roll_back()
                raise self._unavailable(str(error)) from error
            except BaseException:
                self._roll_back()
                raise
            changes.keep()
            return errors

    def backup(self, target: Path) -> int:
        """Write a consistent copy while commits go on; returns its bytes.

        The copy is a store of its own, without the pages that are free in this one.

        Raises:
            StoreUnavailable: the target exists already, or cannot be written.
        """
        with self._read_lock:
            self._check_open()
        # A connection of its own: the reads go on, and SQLite keeps the pages of that moment
        # in the log until it is through.
        with (
            self._failing(),
            copies.new_file(target) as temporary,
            contextlib.closing(self._connect()) as connection,
        ):
            connection.execute("VACUUM INTO ?", (str(temporary),))
        return Path(target).stat().st_size

    def load(self, tables: Iterable[tuple[str, Iterator[tuple[Any, ...]]]]) -> None:
        """Take whole tables in, as a backup has them. Only into a store without rows.

        Raises:
            StoreUnavailable: it is not empty, or cannot be written; nothing was kept.
        """
        with self._lock, self._failing():
            self._check_open()
            writer = self._writer
            try:
                writer.execute("BEGIN IMMEDIATE")
                for table in TABLES:
                    if table.name == "counters":
                        writer.execute("DELETE FROM counters")
                    elif writer.execute(f"SELECT 1 FROM {table.name} LIMIT 1").fetchone():
                        raise self._unavailable(
                            f"it is not empty: there are {table.name}",
                            remedy="Restore into a new path",
                        )
                for name, values in tables:
                    writer.executemany(insert(name), values)
                writer.execute("COMMIT")
                self._known = self._load()
            except BaseException:
                self._roll_back()
                raise

    def close(self) -> None:
        """Flush and release the database for other processes. Idempotent."""
        with self._lock, self._read_lock:
            if self._closed:
                return
            self._closed = True
            try:
                self._reader.close()
                # The last connection moves the log into the database and removes it.
                self._writer.close()
            except sqlite3.Error as error:
                raise self._unavailable(str(error)) from error
            finally:
                os.close(self._lock_file)

    def _own(self) -> int:
        """Take the lock file; it is never deleted, since another process may be opening it."""
        handle = os.open(f"{self._path}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.ftruncate(handle, 0)
            os.pwrite(handle, f"{os.getpid()}\n".encode(), 0)
        except BlockingIOError as error:
            owner = os.pread(handle, 64, 0).decode("ascii", "replace").strip() or "unknown"
            os.close(handle)
            raise self._unavailable(
                f"it is in use by another process ({owner})",
                remedy="Stop the system that uses it, or give this one a path of its own",
            ) from error
        except BaseException:
            os.close(handle)
            raise
        return handle

    def _connect(self) -> sqlite3.Connection:
        return sqlite3.connect(
            self._path,
            timeout=BUSY_TIMEOUT_S,
            isolation_level=None,
            check_same_thread=False,
            cached_statements=_CACHED_STATEMENTS,
        )

    def _load(self) -> Known:
        """What is to be remembered of the rows."""
        known, run = Known(), self._writer.execute
        known.launches = {v[0]: rows.LaunchRow(*v) for v in run(SELECT["launches"])}
        known.shards = dict(run(SELECT["shards"]))
        known.waiting = dict(run("SELECT receiver, count(*) FROM mail GROUP BY receiver"))
        counters = dict(run(SELECT["counters"]))
        known.arrival, known.dead = counters["arrival"], counters["dead"]
        return known

    def _write(self, writer: sqlite3.Connection, changes: Changes) -> None:
        many = writer.executemany
        for tombstone in changes.tombstones.values():
            _drop(writer, tombstone)
        if changes.launches:
            gone = [(name,) for name, row in changes.launches.items() if row is None]
            many("DELETE FROM launches WHERE agent = ?", gone)
            many(_PUT_LAUNCH, [row for row in changes.launches.values() if row is not None])
        if changes.shards:
            many(_PUT_SHARD, list(changes.shards.items()))
        if changes.entries:
            many(_PUT_AGENT, agent_values(changes))
        if changes.journal:
            many(_PUT_ROW, list(changes.journal.values()))
        if changes.blobs:
            many(_PUT_BLOB, list(changes.blobs.items()))
        if changes.dead:
            many(_DROP_DEAD, [(id,) for id, row in changes.dead.items() if row is None])
        if changes.mail:
            deletes, updates, inserts = mailroom(changes)
            many(_DROP_MAIL, [(arrival,) for arrival in deletes])
            many(_BEGIN_MAIL, updates)
            many(_PUT_MAIL, inserts)
        if changes.dead:
            many(_PUT_DEAD, [dead_values(row) for row in changes.dead.values() if row is not None])
        if changes.timers:
            ended = [key for key, row in changes.timers.items() if row is None]
            many("DELETE FROM timers WHERE agent = ? AND name = ?", ended)
            many(_PUT_TIMER, [row for row in changes.timers.values() if row is not None])
        if changes.topics:
            ended = [key for key, wanted in changes.topics.items() if not wanted]
            many("DELETE FROM topics WHERE topic = ? AND agent = ?", ended)
            many(_PUT_TOPIC, [key for key, wanted in changes.topics.items() if wanted])
        if changes.monitors:
            ended = [key for key, linked in changes.monitors.items() if linked is None]
            many("DELETE FROM monitors WHERE watched = ? AND watcher = ?", ended)
            watched = [(*k, int(v)) for k, v in changes.monitors.items() if v is not None]
            many(_PUT_MONITOR, watched)
        known = self._known
        if changes.arrival != known.arrival:
            writer.execute(_COUNT, (changes.arrival, "arrival"))
        if changes.dead_id != known.dead:
            writer.execute(_COUNT, (changes.dead_id, "dead"))

    def _roll_back(self) -> None:
        # Some errors (disk full) make SQLite roll back by itself; then there is nothing to do.
        if self._writer.in_transaction:
            with contextlib.suppress(sqlite3.Error):
                self._writer.execute("ROLLBACK")

    def _rows(self, sql: str, values: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        with self._read_lock:
            self._check_open()
            with self._failing():
                return self._reader.execute(sql, values).fetchall()

    @contextlib.contextmanager
    def _failing(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, OSError, UnicodeEncodeError, OverflowError) as error:
            raise self._unavailable(str(error)) from error

    def _check_open(self) -> None:
        if self._closed:
            raise self._unavailable("it is closed", remedy="Open it again")

    def _unavailable(self, reason: str, *, remedy: str = "") -> StoreUnavailable:
        if remedy:
            return StoreUnavailable(str(self._path), reason, remedy=remedy)
        return StoreUnavailable(str(self._path), reason)


def _drop(writer: sqlite3.Connection, tombstone: Tombstone) -> None:
    for sql, values in drop(tombstone, OF_ALL_SQLITE, json.dumps(sorted(tombstone.spared))):
        writer.execute(sql, values)


class _Committed:
    """Point reads for :class:`llmos.drivers.stores.changes.Changes`, on the writing connection."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        # One cursor, used again: making one costs as much as a short read.
        self._run = connection.cursor().execute

    def entry(self, agent: str) -> Entry | None:
        found = self._run(ENTRY, (agent,)).fetchone()
        return Entry(*found) if found else None

    def turn_keys(self, turn: str) -> set[RowKey]:
        return set(self._run(_TURN_KEYS, (turn,)).fetchall())

    def fate(self, receiver: str, stream: str, seq: int) -> tuple[Any, Any, Any]:
        values = (receiver, stream, seq, receiver, stream, seq, receiver, f"{stream}#{seq}")
        found: tuple[Any, Any, Any] = self._run(FATE, values).fetchone()
        return found

    def mail_row(self, receiver: str, stream: str, seq: int) -> rows.MailRow | None:
        found = self._run(_MAIL_ROW, (receiver, stream, seq)).fetchone()
        return rows.MailRow(*found) if found else None

    def dead_letter(self, id: int) -> rows.DeadLetter | None:
        found = self._run(_DEAD_LETTER, (id,)).fetchone()
        return dead_letter(found) if found else None

    def timer_due(self, agent: str, name: str) -> float | None:
        found = self._run(_TIMER_DUE, (agent, name)).fetchone()
        return float(found[0]) if found else None
