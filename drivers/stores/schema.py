"""The tables of the durable stores, in SQLite's words and in PostgreSQL's."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

from llmos.drivers.stores import rows

VERSION = 2
"""Of the tables. A database with a higher one is refused; one with a lower one is brought up."""

APPLICATION_ID = 0x4C4C4F53
"""In the header of a SQLite file ("LLOS"), so that no other program's is taken over."""

SQLITE = {
    "text": "TEXT",
    "blob": "BLOB",
    "int": "INTEGER",
    "real": "REAL",
    "rowid": " STRICT",
    "packed": " STRICT, WITHOUT ROWID",
}
"""What the words in braces in :data:`TABLES_2` are in SQLite."""

POSTGRES = {
    # Ordered by bytes, as Python and SQLite order text.
    "text": 'text COLLATE "C"',
    "blob": "bytea",
    "int": "bigint",
    "real": "double precision",
    "rowid": "",
    "packed": "",
}
"""What they are in PostgreSQL."""

TABLES_2 = """
CREATE TABLE counters (name {text} PRIMARY KEY, value {int} NOT NULL){packed};
INSERT INTO counters VALUES ('arrival', 0), ('dead', 0);
CREATE TABLE launches (
    agent {text} PRIMARY KEY, program {text} NOT NULL, config {blob} NOT NULL,
    id {text} NOT NULL, created_at {real} NOT NULL
){packed};
CREATE TABLE shards (shard {int} PRIMARY KEY, epoch {int} NOT NULL){rowid};
CREATE TABLE agents (
    agent {text} PRIMARY KEY, state {blob}, state_version {int} NOT NULL,
    changes {int} NOT NULL, sent {int} NOT NULL, pos {int} NOT NULL, head {blob} NOT NULL,
    hold {text} NOT NULL, story {text} NOT NULL, dropped {int} NOT NULL
){packed};
CREATE INDEX agents_held ON agents (agent) WHERE hold <> '';
CREATE TABLE journal (
    agent {text} NOT NULL, turn {text} NOT NULL, seq {int} NOT NULL, phase {text} NOT NULL,
    kind {text} NOT NULL, name {text} NOT NULL, args_hash {blob} NOT NULL, args {blob} NOT NULL,
    result {blob} NOT NULL, labels {blob} NOT NULL, provenance {blob} NOT NULL,
    idem_key {text} NOT NULL, epoch {int} NOT NULL, code_version {text} NOT NULL,
    model_digest {text} NOT NULL, cause {text} NOT NULL, ts {real} NOT NULL,
    elapsed_s {real} NOT NULL, part {int} NOT NULL, pos {int} NOT NULL,
    prev_hash {blob} NOT NULL, hash {blob} NOT NULL
){rowid};
CREATE UNIQUE INDEX journal_turn ON journal (turn, seq, phase, part);
CREATE INDEX journal_chain ON journal (agent, pos, seq, ts);
CREATE INDEX journal_handled ON journal (agent, idem_key) WHERE seq = 0 AND kind = 'turn';
CREATE INDEX journal_ends ON journal (ts, turn)
    WHERE seq = 0 AND kind = 'turn' AND phase <> 'mark';
CREATE TABLE blobs (sha256 {text} PRIMARY KEY, data {blob} NOT NULL){rowid};
CREATE TABLE mail (
    receiver {text} NOT NULL, stream {text} NOT NULL, seq {int} NOT NULL,
    envelope {blob} NOT NULL, priority {int} NOT NULL, not_before {real} NOT NULL,
    attempts {int} NOT NULL, deaths {int} NOT NULL, turn {text} NOT NULL, epoch {int} NOT NULL,
    arrival {int} PRIMARY KEY
){rowid};
CREATE UNIQUE INDEX mail_key ON mail (receiver, stream, seq);
CREATE TABLE dead (
    id {int} PRIMARY KEY,
    receiver {text} NOT NULL, stream {text} NOT NULL, seq {int} NOT NULL,
    envelope {blob} NOT NULL, priority {int} NOT NULL, not_before {real} NOT NULL,
    attempts {int} NOT NULL, deaths {int} NOT NULL, turn {text} NOT NULL, epoch {int} NOT NULL,
    arrival {int} NOT NULL,
    reason {text} NOT NULL, story {text} NOT NULL, died_at {real} NOT NULL
){rowid};
CREATE UNIQUE INDEX dead_key ON dead (receiver, stream, seq);
CREATE TABLE timers (
    agent {text} NOT NULL, name {text} NOT NULL, due {real} NOT NULL, envelope {blob} NOT NULL,
    cron {text} NOT NULL, tz {text} NOT NULL, PRIMARY KEY (agent, name)
){packed};
CREATE INDEX timers_due ON timers (due, agent, name);
CREATE TABLE topics (
    topic {text} NOT NULL, agent {text} NOT NULL, PRIMARY KEY (topic, agent)
){packed};
CREATE INDEX topics_of ON topics (agent);
CREATE TABLE monitors (
    watched {text} NOT NULL, watcher {text} NOT NULL, linked {int} NOT NULL,
    PRIMARY KEY (watched, watcher)
){packed};
CREATE INDEX monitors_by ON monitors (watcher)
"""
"""Version 2, and so it stays: a later version is written as what it changes in this one (see
:mod:`llmos.drivers.stores.migrations`)."""


class Table(NamedTuple):
    """What copies of whole tables, and the statements below, go by."""

    name: str
    columns: tuple[str, ...]
    key: tuple[str, ...]
    """Orders a copy."""


_MAIL = rows.MailRow._fields

TABLES = (
    Table("counters", ("name", "value"), ("name",)),
    Table("launches", rows.LaunchRow._fields, ("agent",)),
    Table("shards", ("shard", "epoch"), ("shard",)),
    Table("agents", (*rows.AgentRow._fields, "dropped"), ("agent",)),
    Table("journal", rows.JournalRow._fields, ("agent", "pos")),
    Table("blobs", ("sha256", "data"), ("sha256",)),
    Table("mail", _MAIL, ("arrival",)),
    Table("dead", ("id", *_MAIL, "reason", "story", "died_at"), ("id",)),
    Table("timers", rows.TimerRow._fields, ("agent", "name")),
    Table("topics", ("topic", "agent"), ("topic", "agent")),
    Table("monitors", rows.MonitorRow._fields, ("watched", "watcher")),
)
"""All of them, in the order in which they are copied."""

BY_NAME = {table.name: table for table in TABLES}


def statements(words: dict[str, str]) -> list[str]:
    """The statements that make an empty database one of version 2."""
    return [s.strip() for s in TABLES_2.format(**words).split(";")]


def insert(name: str) -> str:
    """SQL that adds a row to a table, with ``?`` for its values."""
    columns = BY_NAME[name].columns
    return f"INSERT INTO {name} ({', '.join(columns)}) VALUES ({', '.join('?' * len(columns))})"


def upsert_tail(name: str) -> str:
    """What makes an insert replace the row of the same key.

    ``INSERT OR REPLACE`` was rejected: PostgreSQL has none, and it writes all indexes anew.
    """
    table = BY_NAME[name]
    changes = ", ".join(f"{c} = excluded.{c}" for c in table.columns if c not in table.key)
    return f"ON CONFLICT ({', '.join(table.key)}) DO " + (
        f"UPDATE SET {changes}" if changes else "NOTHING"
    )


AGENTS_TAIL = upsert_tail("agents").replace(
    "state = excluded.state,", "state = coalesce(excluded.state, agents.state),"
)
"""A state that did not change is not read to be written again: None leaves it as it is."""

SELECT = {table.name: f"SELECT {', '.join(table.columns)} FROM {table.name}" for table in TABLES}
"""Whole rows of a table."""

SELECT_AGENT = f"SELECT {', '.join(rows.AgentRow._fields)} FROM agents"
"""Rows of agents without the flag."""

ENTRY = (
    "SELECT state_version, changes, sent, pos, head, hold, story, dropped FROM agents "
    "WHERE agent = ?"
)
"""An agent's row without its state."""

HANDLED = "seq = 0 AND kind = 'turn'"
"""Which rows end turns, in the very words of the index of handled messages."""

TURN_ENDS = f"{HANDLED} AND phase <> 'mark'"
"""The same rows, in the words of the index by time. A mark never is of that kind; but without
other words PostgreSQL, as long as it has no statistics, may look a message up by time."""

FATE = (
    "SELECT EXISTS (SELECT 1 FROM mail WHERE receiver = ? AND stream = ? AND seq = ?), "
    "EXISTS (SELECT 1 FROM dead WHERE receiver = ? AND stream = ? AND seq = ?), "
    f"EXISTS (SELECT 1 FROM journal WHERE agent = ? AND idem_key = ? AND {HANDLED})"
)
"""Whether a message waits, is dead, was handled."""


def journal_row(values: Any) -> rows.JournalRow:
    """A row as it is known outside."""
    row: rows.JournalRow = tuple.__new__(rows.JournalRow, values)
    return row


def dead_letter(values: Any) -> rows.DeadLetter:
    """A row of ``dead`` as it is known outside."""
    return rows.DeadLetter(values[0], rows.MailRow(*values[1:12]), *values[12:])


def dead_values(letter: rows.DeadLetter) -> tuple[Any, ...]:
    """A row of ``dead`` in the order of its columns."""
    return (letter.id, *letter.mail, letter.reason, letter.story, letter.died_at)


def kinds_of(name: str) -> list[str]:
    """The columns' kinds (``text``, ``blob``, ``int``, ``real``), in their order in ``TABLES``."""
    text = next(t for t in statements(_KINDS) if t.startswith(f"CREATE TABLE {name} "))
    found = dict(re.findall(r"(\w+) <(\w+)>", text))
    return [found[column] for column in BY_NAME[name].columns]


_KINDS = {word: f"<{word}>" for word in SQLITE}
