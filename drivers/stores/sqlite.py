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
import os
import sqlite3
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

from llmos.drivers.errors import StaleEpoch, StoreUnavailable
from llmos.drivers.protocols import (
    AgentDelete,
    AgentRow,
    AgentWrite,
    StateWrite,
    StoreWrite,
    SyscallRow,
    TurnRow,
)
from llmos.drivers.stores import schema
from llmos.drivers.stores.memory import NO_OWNER

BUSY_TIMEOUT_S = 5.0
"""How long to wait for a foreign program (a backup, a shell) that locks the database."""

_PUT_AGENT = schema.upsert("agents", schema.AGENT_COLUMNS)
_PUT_STATE = schema.upsert("states", ("agent", "state"))
_PUT_TURN = schema.upsert("turns", schema.TURN_COLUMNS)
_PUT_SYSCALL = schema.upsert("syscalls", schema.SYSCALL_COLUMNS, keys=2)
_AGENTS = schema.select("agents", schema.AGENT_COLUMNS, "ORDER BY agent")
_AGENT = schema.select("agents", schema.AGENT_COLUMNS, "WHERE agent = ?")
_NEWEST = "ORDER BY started_at DESC, turn DESC LIMIT ?"
_TURNS = schema.select("turns", schema.TURN_COLUMNS, _NEWEST)
_TURNS_OF = schema.select("turns", schema.TURN_COLUMNS, f"WHERE agent = ? {_NEWEST}")
_TURNS_FROM = schema.select(
    "turns", schema.TURN_COLUMNS, "WHERE turn >= ? AND turn < ? ORDER BY turn LIMIT 2"
)
_SYSCALLS = schema.select("syscalls", schema.SYSCALL_COLUMNS, "WHERE turn = ? ORDER BY seq")


class SqliteStore:
    """Rows in one SQLite file, owned by one process."""

    def __init__(self, path: Path | str) -> None:
        """Open the database, or create it with the folders above it.

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
                if reason := schema.prepare(self._writer):
                    raise self._unavailable(reason, remedy="Use another path or a newer LLM OS")
                mode = self._writer.execute("PRAGMA journal_mode = WAL").fetchone()[0]
                if mode != "wal":
                    raise self._unavailable(
                        f"its file system allows no write-ahead log (journal mode {mode})",
                        remedy="Use a local disk",
                    )
                self._writer.execute("PRAGMA synchronous = FULL")
                self._reader = self._connect()
                undo.callback(self._reader.close)
                self._reader.execute("PRAGMA query_only = ON")
            except (OSError, sqlite3.Error) as error:
                raise self._unavailable(str(error)) from error
            undo.pop_all()

    def commit(self, writes: Sequence[StoreWrite]) -> None:
        """Apply all writes, in order, in one transaction that is on disk when this returns.

        Raises:
            StaleEpoch: a StateWrite or TurnRow of another epoch than the agent's, or a
                StateWrite of an agent that is not registered.
            StoreUnavailable: disk full, I/O error, locked by another program, closed, or a
                value that no database can hold.
            In both cases nothing of ``writes`` was kept, and the store can be used again.
        """
        with self._lock:
            self._check_open()
            connection = self._writer
            try:
                connection.execute("BEGIN IMMEDIATE")
                for write in writes:
                    self._apply(connection, write)
                connection.execute("COMMIT")
            except (sqlite3.Error, UnicodeEncodeError, OverflowError) as error:
                self._roll_back()
                raise self._unavailable(str(error)) from error
            except BaseException:
                self._roll_back()
                raise

    def agents(self) -> list[AgentRow]:
        """All agents, ordered by id."""
        with self._reading() as connection:
            return [schema.agent_row(row) for row in connection.execute(_AGENTS)]

    def agent(self, agent: str) -> AgentRow | None:
        """One agent."""
        with self._reading() as connection:
            row = connection.execute(_AGENT, (agent,)).fetchone()
            return schema.agent_row(row) if row else None

    def state(self, agent: str) -> bytes | None:
        """Last committed state."""
        with self._reading() as connection:
            row = connection.execute(
                "SELECT state FROM states WHERE agent = ?", (agent,)
            ).fetchone()
            return bytes(row[0]) if row else None

    def turns(self, *, agent: str | None = None, limit: int = 50) -> list[TurnRow]:
        """Newest turns first."""
        count = max(limit, 0)
        with self._reading() as connection:
            if agent is None:
                rows = connection.execute(_TURNS, (count,))
            else:
                rows = connection.execute(_TURNS_OF, (agent, count))
            return [schema.turn_row(row) for row in rows]

    def turn(self, turn: str) -> tuple[TurnRow, list[SyscallRow]] | None:
        """A turn and its syscalls by seq. A unique prefix of the id will do."""
        if not turn:
            return None
        with self._reading() as connection:
            # One read transaction, so that turn and syscalls are of the same moment.
            connection.execute("BEGIN")
            try:
                # The id itself, where it exists, sorts before every longer one.
                found = connection.execute(_TURNS_FROM, (turn, turn + "\U0010ffff")).fetchall()
                if not found or (len(found) > 1 and found[0][0] != turn):
                    return None
                row = schema.turn_row(found[0])
                syscalls = [
                    schema.syscall_row(s) for s in connection.execute(_SYSCALLS, (row.turn,))
                ]
                return row, syscalls
            finally:
                connection.execute("COMMIT")

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
        connection = sqlite3.connect(
            self._path, timeout=BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False
        )
        connection.execute("PRAGMA foreign_keys = ON")
        return connection

    def _apply(self, connection: sqlite3.Connection, write: StoreWrite) -> None:
        if isinstance(write, SyscallRow):
            connection.execute(_PUT_SYSCALL, schema.syscall_values(write))
        elif isinstance(write, TurnRow):
            self._check_epoch(connection, write)
            connection.execute(_PUT_TURN, schema.turn_values(write))
        elif isinstance(write, StateWrite):
            self._check_epoch(connection, write)
            connection.execute(_PUT_STATE, (write.agent, write.state))
        elif isinstance(write, AgentWrite):
            connection.execute(_PUT_AGENT, schema.agent_values(write.row))
        elif isinstance(write, AgentDelete):
            connection.execute("DELETE FROM agents WHERE agent = ?", (write.agent,))

    def _check_epoch(self, connection: sqlite3.Connection, write: TurnRow | StateWrite) -> None:
        row = connection.execute(
            "SELECT epoch FROM agents WHERE agent = ?", (write.agent,)
        ).fetchone()
        if row is None and isinstance(write, StateWrite):
            raise StaleEpoch(write.agent, write.epoch, NO_OWNER)
        if row is not None and write.epoch != row[0]:
            raise StaleEpoch(write.agent, write.epoch, row[0])

    def _roll_back(self) -> None:
        # Some errors (disk full) make SQLite roll back by itself; then there is nothing to do.
        if self._writer.in_transaction:
            with contextlib.suppress(sqlite3.Error):
                self._writer.execute("ROLLBACK")

    @contextlib.contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        with self._read_lock:
            self._check_open()
            try:
                yield self._reader
            except (sqlite3.Error, UnicodeEncodeError) as error:
                raise self._unavailable(str(error)) from error

    def _check_open(self) -> None:
        if self._closed:
            raise self._unavailable("it is closed", remedy="Open it again")

    def _unavailable(self, reason: str, *, remedy: str = "") -> StoreUnavailable:
        if remedy:
            return StoreUnavailable(str(self._path), reason, remedy=remedy)
        return StoreUnavailable(str(self._path), reason)
