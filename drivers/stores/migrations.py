"""How a SQLite store comes to the present version, from nothing or from an older one.

:data:`STEPS` says what a version becomes, and by what. A new version adds one step, written
in SQL of its own: the tables' names in :mod:`llmos.drivers.stores.schema` are those of the
last version, which a step must not lean on.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import msgpack

from llmos.drivers.stores import rows
from llmos.drivers.stores.chain import seal
from llmos.drivers.stores.schema import APPLICATION_ID, SQLITE, VERSION, statements


def prepare(connection: sqlite3.Connection) -> str:
    """Make the database one of this version, in one transaction.

    Returns why it cannot be used, or nothing. A crash in the middle leaves it as it was.
    """
    version = connection.execute("PRAGMA user_version").fetchone()[0]
    application = connection.execute("PRAGMA application_id").fetchone()[0]
    if application == APPLICATION_ID:
        if version > VERSION:
            return f"it was written by a newer LLM OS (schema {version}, known is {VERSION})"
        if version == VERSION:
            return ""
    elif version or application or connection.execute("SELECT 1 FROM sqlite_master").fetchone():
        return "it is another program's database"
    connection.execute("BEGIN IMMEDIATE")
    try:
        # Asked again: before the lock was held, another process may have done it.
        version = connection.execute("PRAGMA user_version").fetchone()[0]
        while version != VERSION:
            step = STEPS.get(version)
            if step is None:
                return f"nothing is known of its schema {version}"
            step.carry_out(connection)
            version = step.becomes
        connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        connection.execute(f"PRAGMA user_version = {VERSION}")
        connection.execute("COMMIT")
    finally:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
    return ""


def _create(connection: sqlite3.Connection) -> None:
    for statement in statements(SQLITE):
        connection.execute(statement)


def _from_1(connection: sqlite3.Connection) -> None:
    """Version 1 had a row per turn and per syscall, in msgpack, without chain or mail."""
    for table in ("agents", "states", "turns", "syscalls"):
        connection.execute(f"ALTER TABLE {table} RENAME TO old_{table}")
    _create(connection)
    connection.executemany(
        "INSERT INTO launches (agent, program, config, id, created_at) VALUES (?, ?, ?, ?, ?)",
        [
            (agent, program, config, _launch_id(agent, created_at), created_at)
            for agent, program, config, created_at in connection.execute(
                "SELECT agent, program, config, created_at FROM old_agents"
            )
        ],
    )
    ends: dict[str, rows.JournalRow] = {}
    marks = ", ".join("?" * len(rows.JournalRow._fields))
    connection.executemany(
        f"INSERT INTO journal ({', '.join(rows.JournalRow._fields)}) VALUES ({marks})",
        _journal_1(connection, ends),
    )
    states = {
        agent: _json(state)
        for agent, state in connection.execute("SELECT agent, state FROM old_states")
    }
    launched = {a for (a,) in connection.execute("SELECT agent FROM old_agents")}
    for agent in sorted(states.keys() | ends.keys()):
        end = ends.get(agent)
        connection.execute(
            "INSERT INTO agents (agent, state, state_version, changes, sent, pos, head, hold, "
            "story, dropped) VALUES (?, ?, 0, ?, 0, ?, ?, '', '', ?)",
            (
                agent,
                states.get(agent),
                int(agent in states),
                end.pos if end else 0,
                end.hash if end else rows.NO_HASH,
                int(agent not in launched),
            ),
        )
    for table in ("states", "agents", "turns", "syscalls"):
        connection.execute(f"DROP TABLE old_{table}")


def _journal_1(
    connection: sqlite3.Connection, ends: dict[str, rows.JournalRow]
) -> Iterator[rows.JournalRow]:
    """The rows of version 1 in the order in which they ended, chained; fills in ``ends``."""
    turns = connection.execute(
        "SELECT turn, agent, epoch, kind, message, cause, started_at, elapsed_s, status, reply, "
        "error FROM old_turns ORDER BY agent, started_at, turn"
    )
    for turn, agent, epoch, kind, message, cause, ts, elapsed_s, status, reply, error in turns:
        end = ends.get(agent)
        pos, head = (end.pos, end.hash) if end else (0, rows.NO_HASH)
        calls = connection.execute(
            "SELECT seq, name, resource, started_s, elapsed_s, status, request, result, "
            "provenance, labels FROM old_syscalls WHERE turn = ? ORDER BY seq",
            (turn,),
        ).fetchall()
        # Syscalls were numbered from 0, which now is the turn's own number.
        first = 1 - min((call[0] for call in calls), default=1)
        found = [
            rows.JournalRow(
                agent=agent,
                turn=turn,
                seq=seq + first,
                phase="result" if call_status == "ok" else "failed",
                kind=name,
                name=resource,
                args_hash=hashlib.blake2b(_json(request), digest_size=16).digest(),
                args=_json(request),
                result=_json(result),
                labels=_json(labels),
                provenance=_json(provenance),
                epoch=epoch,
                ts=ts + started_s,
                elapsed_s=call_elapsed_s,
            )
            for (
                seq,
                name,
                resource,
                started_s,
                call_elapsed_s,
                call_status,
                request,
                result,
                provenance,
                labels,
            ) in calls
        ]
        # One that still ran when the system stopped has no end, and never gets one.
        if status != "running":
            found.append(
                rows.JournalRow(
                    agent=agent,
                    turn=turn,
                    seq=0,
                    phase="result" if status == "done" else "failed",
                    kind=rows.TURN,
                    name=kind,
                    args_hash=hashlib.blake2b(message, digest_size=16).digest(),
                    args=message,
                    result=json.dumps(error).encode() if error else _json(reply),
                    epoch=epoch,
                    cause=cause,
                    ts=ts,
                    elapsed_s=elapsed_s,
                )
            )
        for row in found:
            sealed = seal(row, pos + 1, head)
            pos, head = sealed.pos, sealed.hash
            ends[agent] = sealed
            yield sealed


def _json(packed: bytes) -> bytes:
    """msgpack as JSON; what is neither stays as it is."""
    if not packed:
        return b""
    try:
        return json.dumps(msgpack.unpackb(packed), default=_readable).encode()
    except (ValueError, TypeError, msgpack.UnpackException):
        return packed


def _readable(value: Any) -> str:
    return bytes(value).decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


def _launch_id(agent: str, created_at: float) -> str:
    """Launches had none; the same one in every run of the migration."""
    return hashlib.sha256(f"{agent} {created_at!r}".encode()).hexdigest()[:16]


class Step(NamedTuple):
    """From one version to another."""

    becomes: int
    carry_out: Callable[[sqlite3.Connection], None]


STEPS: dict[int, Step] = {0: Step(2, _create), 1: Step(2, _from_1)}
"""By the version that is there; 0: a new file."""
