"""The tables of the SQLite store, and how a database is recognised as one."""

from __future__ import annotations

import sqlite3
from operator import attrgetter

from llmos.drivers.protocols import AgentRow, SyscallRow, TurnRow, TurnStatus

VERSION = 1
"""Kept in ``user_version``; a database with a higher one is refused."""

APPLICATION_ID = 0x4C4C4F53
"""Kept in the file's header ("LLOS"), so that no other program's database is taken over."""

TABLES = """
CREATE TABLE agents (
    agent TEXT PRIMARY KEY, program TEXT NOT NULL, config BLOB NOT NULL,
    epoch INTEGER NOT NULL, created_at REAL NOT NULL
) STRICT, WITHOUT ROWID;
CREATE TABLE states (
    agent TEXT PRIMARY KEY REFERENCES agents (agent) ON DELETE CASCADE, state BLOB NOT NULL
) STRICT;
CREATE TABLE turns (
    turn TEXT PRIMARY KEY, agent TEXT NOT NULL, epoch INTEGER NOT NULL, kind TEXT NOT NULL,
    message BLOB NOT NULL, cause TEXT NOT NULL, started_at REAL NOT NULL,
    elapsed_s REAL NOT NULL, status TEXT NOT NULL, reply BLOB NOT NULL, error TEXT NOT NULL
) STRICT;
CREATE INDEX turns_by_time ON turns (started_at, turn);
CREATE INDEX turns_by_agent ON turns (agent, started_at, turn);
CREATE TABLE syscalls (
    turn TEXT NOT NULL, seq INTEGER NOT NULL, name TEXT NOT NULL, resource TEXT NOT NULL,
    started_s REAL NOT NULL, elapsed_s REAL NOT NULL, status TEXT NOT NULL,
    request BLOB NOT NULL, result BLOB NOT NULL, provenance BLOB NOT NULL, labels BLOB NOT NULL,
    PRIMARY KEY (turn, seq)
) STRICT;
"""

AGENT_COLUMNS = ("agent", "program", "config", "epoch", "created_at")
TURN_COLUMNS = (
    "turn",
    "agent",
    "epoch",
    "kind",
    "message",
    "cause",
    "started_at",
    "elapsed_s",
    "status",
    "reply",
    "error",
)
SYSCALL_COLUMNS = (
    "turn",
    "seq",
    "name",
    "resource",
    "started_s",
    "elapsed_s",
    "status",
    "request",
    "result",
    "provenance",
    "labels",
)

agent_values = attrgetter(*AGENT_COLUMNS)
turn_values = attrgetter(*TURN_COLUMNS)
syscall_values = attrgetter(*SYSCALL_COLUMNS)


def upsert(table: str, columns: tuple[str, ...], keys: int = 1) -> str:
    """SQL that adds a row or replaces it; the first ``keys`` columns are its key.

    ``INSERT OR REPLACE`` was rejected: it deletes the old row first, and with an agent's
    row would go its state.
    """
    marks = ", ".join("?" * len(columns))
    changes = ", ".join(f"{c} = excluded.{c}" for c in columns[keys:])
    return (
        f"INSERT INTO {table} ({', '.join(columns)}) VALUES ({marks}) "
        f"ON CONFLICT ({', '.join(columns[:keys])}) DO UPDATE SET {changes}"
    )


def select(table: str, columns: tuple[str, ...], rest: str) -> str:
    """SQL that reads whole rows."""
    return f"SELECT {', '.join(columns)} FROM {table} {rest}"


def agent_row(values: tuple[object, ...]) -> AgentRow:
    """A row as it is known outside."""
    return AgentRow(*values)  # type: ignore[arg-type]


def turn_row(values: tuple[object, ...]) -> TurnRow:
    """A row as it is known outside."""
    named = dict(zip(TURN_COLUMNS, values, strict=True))
    named["status"] = TurnStatus(str(named["status"]))
    return TurnRow(**named)  # type: ignore[arg-type]


def syscall_row(values: tuple[object, ...]) -> SyscallRow:
    """A row as it is known outside."""
    return SyscallRow(*values)  # type: ignore[arg-type]


def prepare(connection: sqlite3.Connection) -> str:
    """Create the tables in a new database, or check those of an old one.

    Returns why the database cannot be used, or nothing.
    """
    version = connection.execute("PRAGMA user_version").fetchone()[0]
    application = connection.execute("PRAGMA application_id").fetchone()[0]
    if application == APPLICATION_ID:
        if version > VERSION:
            return f"it was written by a newer LLM OS (schema {version}, known is {VERSION})"
        return ""
    if version or application or connection.execute("SELECT 1 FROM sqlite_master").fetchone():
        return "it is another program's database"
    # One transaction: a crash in the middle leaves an empty file, which is begun again.
    connection.executescript(
        f"BEGIN IMMEDIATE; {TABLES} PRAGMA application_id = {APPLICATION_ID}; "
        f"PRAGMA user_version = {VERSION}; COMMIT;"
    )
    return ""
