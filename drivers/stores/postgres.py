"""The durable store of a cluster: PostgreSQL.

One connection writes, a small pool reads. An advisory lock that the writing session holds
keeps other processes out: it ends with the session, however that ends, and a session ends only
after what it had under way, so whoever takes the lock next reads settled rows. Connections
through a pooler must therefore be pooled by session, not by transaction.

A commit is a few round trips, whatever its size: what has to be known of the committed rows is
asked for in one go, the journal's rows are copied, the rest is written from arrays.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import psycopg
from psycopg import conninfo
from psycopg.rows import TupleRow
from psycopg_pool import ConnectionPool, PoolClosed, PoolTimeout

from llmos.drivers.errors import StoreError, StoreUnavailable
from llmos.drivers.stores import copies, rows
from llmos.drivers.stores.changes import (
    Changes,
    Entry,
    Key,
    Known,
    RowKey,
    agent_values,
    faults_of,
    mailroom,
)
from llmos.drivers.stores.dropping import OF_ALL_POSTGRES, drop
from llmos.drivers.stores.reads import SqlReads
from llmos.drivers.stores.schema import (
    AGENTS_TAIL,
    APPLICATION_ID,
    BY_NAME,
    ENTRY,
    FATE,
    POSTGRES,
    SELECT,
    TABLES,
    VERSION,
    dead_letter,
    dead_values,
    kinds_of,
    statements,
    upsert_tail,
)
from llmos.drivers.stores.watch import Watch

ANSWER_S = 15.0
"""Longest wait for an answer to a commit or a read: half of what a host waits for a commit."""
OPEN_S = 60.0
"""Longest wait while a database is opened, which may have to be migrated and looked through."""
RECONNECT_S = 5.0
"""How long a call waits for a lost server to come back."""

LOCK_WAIT_S = 2.0
"""How long to wait for the session of a process that just died to end."""

READERS = 4
"""Connections for reads, at most."""

_LOCK = (APPLICATION_ID, 1)

_TYPES = {"text": "text", "blob": "bytea", "int": "bigint", "real": "double precision"}

_Connection = psycopg.Connection[TupleRow]


def _q(sql: str) -> str:
    """PostgreSQL's marks for SQLite's. All statements are constants, put together here."""
    return sql.replace("?", "%s")


def _insert(name: str, tail: str = "") -> str:
    """An insert of many rows, given as one array for each column."""
    arrays = ", ".join(f"%b::{_TYPES[kind]}[]" for kind in kinds_of(name))
    columns = ", ".join(BY_NAME[name].columns)
    return f"INSERT INTO {name} ({columns}) SELECT * FROM unnest({arrays}) {tail}"


def _copy(name: str) -> str:
    columns = ", ".join(BY_NAME[name].columns)
    return f"COPY {name} ({columns}) FROM STDIN (FORMAT BINARY)"


_COPY_TYPES = {t.name: [_TYPES[kind] for kind in kinds_of(t.name)] for t in TABLES}

# Subqueries with a limit or an offset are looked up row by row in an index; a join could be
# planned as a scan of the whole journal while the tables have no statistics yet.
_ENTRIES = _q(ENTRY.replace("SELECT", "SELECT agent,").replace("= ?", "= ANY(%b::text[])"))
_TURN_KEYS = _q(
    "SELECT k.turn, j.seq, j.phase, j.part FROM unnest(%b::text[]) AS k (turn), LATERAL "
    "(SELECT seq, phase, part FROM journal WHERE turn = k.turn OFFSET 0) AS j"
)
_FATES = _q(
    "SELECT k.r, k.s, k.n, "
    "(SELECT true FROM mail WHERE receiver = k.r AND stream = k.s AND seq = k.n LIMIT 1), "
    "(SELECT true FROM dead WHERE receiver = k.r AND stream = k.s AND seq = k.n LIMIT 1), "
    "(SELECT true FROM journal WHERE agent = k.r AND idem_key = k.s || '#' || k.n "
    "AND seq = 0 AND kind = 'turn' LIMIT 1) "
    "FROM unnest(%b::text[], %b::text[], %b::bigint[]) AS k (r, s, n)"
)
_MAIL_ROWS = _q(
    f"SELECT {', '.join(f'm.{c}' for c in rows.MailRow._fields)} "
    "FROM unnest(%b::text[], %b::text[], %b::bigint[]) AS k (r, s, n), LATERAL "
    "(SELECT * FROM mail WHERE receiver = k.r AND stream = k.s AND seq = k.n LIMIT 1) AS m"
)
_MAIL_ROW = _q(f"{SELECT['mail']} WHERE receiver = ? AND stream = ? AND seq = ?")
_DEAD_LETTER = _q(f"{SELECT['dead']} WHERE id = ?")
_TIMER_DUE = _q("SELECT due FROM timers WHERE agent = ? AND name = ?")

_PUT_AGENTS = _insert("agents", AGENTS_TAIL)
_PUT_LAUNCHES = _insert("launches", upsert_tail("launches"))
_PUT_SHARDS = _insert("shards", upsert_tail("shards"))
_PUT_ROWS = _copy("journal")
_PUT_BLOBS = _insert("blobs", "ON CONFLICT (sha256) DO NOTHING")
_PUT_MAIL = _insert("mail")
_BEGIN_MAIL = _q(
    "UPDATE mail SET not_before = k.b, attempts = k.a, deaths = k.d, turn = k.t, epoch = k.e "
    "FROM unnest(%b::double precision[], %b::bigint[], %b::bigint[], %b::text[], %b::bigint[], "
    "%b::bigint[]) AS k (b, a, d, t, e, arrival) WHERE mail.arrival = k.arrival"
)
_PUT_DEAD = _insert("dead")
_PUT_TIMERS = _insert("timers", upsert_tail("timers"))
_PUT_TOPICS = _insert("topics", upsert_tail("topics"))
_PUT_MONITORS = _insert("monitors", upsert_tail("monitors"))


def _drop_pairs(name: str, first: str, second: str) -> str:
    return (
        f"DELETE FROM {name} WHERE ({first}, {second}) IN "
        "(SELECT * FROM unnest(%b::text[], %b::text[]))"
    )


_DROP_TIMERS = _drop_pairs("timers", "agent", "name")
_DROP_TOPICS = _drop_pairs("topics", "topic", "agent")
_DROP_MONITORS = _drop_pairs("monitors", "watched", "watcher")


class PostgresStore(SqlReads):
    """Rows in the schema ``llmos`` of one PostgreSQL database, written by one process."""

    def __init__(self, path: str) -> None:
        """Connect, and create or bring up the tables.

        ``path`` is a URL (``postgresql://user@host/database``) or a conninfo string; what it
        leaves out comes from the environment, as for every program on libpq.

        Raises:
            StoreUnavailable: no connection, another process owns the database, or a newer
                LLM OS wrote it.
        """
        self._lock = threading.Lock()
        self._closed = False
        self._watch = Watch()
        self._writer: _Connection | None = None
        self._known = Known()
        try:
            options = conninfo.conninfo_to_dict(path)
        except psycopg.Error as error:
            self._name = "postgres"
            raise self._unavailable(
                str(error), remedy="Give a URL such as postgresql://user@host/database"
            ) from error
        # The name in errors and logs: never with a password.
        self._name = "postgresql://{}/{}".format(
            options.get("host") or "", options.get("dbname") or options.get("user") or ""
        )
        defaults: dict[str, Any] = {
            "connect_timeout": 5,
            "application_name": "llmos",
            # A lost peer is noticed in some ten seconds, not in the system's two hours.
            "keepalives_idle": 5,
            "keepalives_interval": 2,
            "keepalives_count": 3,
            "tcp_user_timeout": 10_000,
        }
        self._conninfo = conninfo.make_conninfo(**(defaults | options))
        self._connect()
        self._pool: ConnectionPool[_Connection] = ConnectionPool(
            self._conninfo,
            kwargs={"autocommit": True, "prepare_threshold": 0},
            configure=_configure_reader,
            min_size=1,
            max_size=READERS,
            timeout=RECONNECT_S,
            # Not kept up with backoff while the server is away: the next read tries anew.
            reconnect_timeout=0.5,
            name="llmos",
            open=True,
        )

    def commit(self, parts: Sequence[rows.Part]) -> list[StoreError | None]:
        """Make parts durable, in order, in one transaction that is on disk when this returns.

        A part with a value that no store can hold is refused by itself, with
        StoreUnavailable in its place of the result.

        Raises:
            StoreUnavailable: no connection, disk full, closed, another process has the store
                now. Nothing of any part was kept; except that a connection lost during the
                commit leaves that unknown, and the same parts may come again.
        """
        with self._lock, self._writing() as writer, self._watch.over(writer, ANSWER_S):
            faults = faults_of(parts)
            committed = _Committed(writer)
            with writer.pipeline():
                writer.execute("BEGIN")
                committed.prefetch(
                    self._known, (p for p, f in zip(parts, faults, strict=True) if not f)
                )
            changes = Changes(committed, self._known, self._name)
            errors = changes.add(parts, faults)
            if changes.journal:
                with writer.cursor().copy(_PUT_ROWS) as copy:
                    copy.set_types(_COPY_TYPES["journal"])
                    for row in changes.journal.values():
                        copy.write_row(row)
            with writer.pipeline():
                if not changes.empty():
                    self._write(writer, changes)
                writer.execute("COMMIT")
            changes.keep()
            return errors

    def backup(self, target: Path) -> int:
        """Write everything as a SQLite store while commits go on; returns its bytes.

        Raises:
            StoreUnavailable: the target exists already or cannot be written, or the
                connection was lost.
        """
        self._check_open()
        with self._failing(), psycopg.connect(self._conninfo) as connection:
            connection.execute("SET search_path TO llmos")
            connection.commit()
            connection.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
            connection.read_only = True
            return copies.write(Path(target), _read(connection))

    def load(self, tables: Iterable[tuple[str, Iterator[tuple[Any, ...]]]]) -> None:
        """Take whole tables in, as a backup has them. Only into a store without rows.

        Raises:
            StoreUnavailable: it is not empty, or cannot be written; nothing was kept.
        """
        with self._lock, self._writing() as writer:
            writer.execute("BEGIN")
            for table in TABLES:
                if table.name == "counters":
                    writer.execute("DELETE FROM counters")
                elif writer.execute(_q(f"SELECT 1 FROM {table.name} LIMIT 1")).fetchone():
                    raise self._unavailable(
                        f"it is not empty: there are {table.name}",
                        remedy="Restore into a new database",
                    )
            for name, values in tables:
                with writer.cursor().copy(_copy(name)) as copy:
                    copy.set_types(_COPY_TYPES[name])
                    for row in values:
                        copy.write_row(row)
            writer.execute("COMMIT")
            self._known = _load(writer)

    def close(self) -> None:
        """Release the database for other processes. Idempotent."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._pool.close()
            self._disconnect()
            self._watch.close()

    # ------------------------------------------------------------ connections

    def _connect(self) -> None:
        """Connect, own the database, and know what is in it."""
        with contextlib.ExitStack() as undo:
            try:
                writer = psycopg.connect(self._conninfo, autocommit=True, prepare_threshold=0)
                undo.callback(writer.close)
                with self._watch.over(writer, OPEN_S):
                    known = self._take(writer)
            except psycopg.Error as error:
                raise self._unavailable(str(error)) from error
            undo.pop_all()
        self._writer, self._known = writer, known

    def _take(self, writer: _Connection) -> Known:
        """Own the database, make its schema one of this version, and read what is known."""
        deadline = time.monotonic() + LOCK_WAIT_S
        while not _scalar(writer, "SELECT pg_try_advisory_lock(%s, %s)", _LOCK):
            if time.monotonic() > deadline:
                raise self._unavailable(
                    "it is in use by another process",
                    remedy="Stop the system that uses it, or give this one a database of its own",
                )
            time.sleep(0.05)
        # Whatever the server's default is: what is acknowledged survives power loss.
        writer.execute("SET synchronous_commit TO on")
        writer.execute(f"SET lock_timeout TO '{RECONNECT_S}s'")
        if reason := _prepare(writer):
            raise self._unavailable(reason, remedy="Use another database or a newer LLM OS")
        known = _load(writer)
        # All that this connection does from now on goes by an index.
        writer.execute("SET enable_seqscan TO off")
        writer.execute("SET jit TO off")
        return known

    def _disconnect(self) -> None:
        if self._writer is not None:
            with contextlib.suppress(psycopg.Error):
                self._writer.close()
            self._writer = None

    def _reconnect(self) -> None:
        """Connect again, within bounds, if the connection is known to be lost.

        What another process did meanwhile is read anew, with the lock held.
        """
        deadline = time.monotonic() + RECONNECT_S
        while self._writer is None or self._writer.closed:
            try:
                self._connect()
            except StoreUnavailable:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.1)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[_Connection]:
        """The writing connection; rolled back, or given up, if what is done with it fails."""
        self._check_open()
        self._reconnect()
        writer = self._writer
        assert writer is not None
        try:
            yield writer
        except BaseException as error:
            lost = writer.closed
            if not lost:
                try:
                    with self._watch.over(writer, ANSWER_S):
                        writer.execute("ROLLBACK")
                except psycopg.Error:
                    lost = True
            if lost:
                self._disconnect()
            if isinstance(error, psycopg.Error | OSError):
                raise self._unavailable(str(error)) from error
            raise

    def _rows(self, sql: str, values: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        self._check_open()
        query = _q(sql)
        deadline = time.monotonic() + RECONNECT_S
        while True:
            try:
                with (
                    self._pool.connection(timeout=RECONNECT_S) as reader,
                    self._watch.over(reader, ANSWER_S),
                ):
                    return reader.execute(query, values).fetchall()
            except PoolClosed:
                self._check_open()
                raise
            except psycopg.OperationalError as error:
                # The pool hands out connections that a restarted server has forgotten, each
                # of them once. (Checking each before use would double the round trips.)
                if isinstance(error, PoolTimeout) or time.monotonic() > deadline:
                    raise self._unavailable(str(error)) from error
                time.sleep(0.02)
            except (psycopg.Error, UnicodeEncodeError) as error:
                raise self._unavailable(str(error)) from error

    @contextlib.contextmanager
    def _failing(self) -> Iterator[None]:
        try:
            yield
        except (psycopg.Error, OSError) as error:
            raise self._unavailable(str(error)) from error

    def _check_open(self) -> None:
        if self._closed:
            raise self._unavailable("it is closed", remedy="Open it again")

    def _unavailable(
        self, reason: str, *, remedy: str = "See whether the server runs and can be reached"
    ) -> StoreUnavailable:
        return StoreUnavailable(self._name, " ".join(reason.split()), remedy=remedy)

    # ------------------------------------------------------------ writes

    def _write(self, writer: _Connection, changes: Changes) -> None:
        run = writer.execute

        def many(sql: str, values: Sequence[Sequence[Any]]) -> None:
            """Carry out a statement that takes an array for each column."""
            if values:
                run(sql, [list(column) for column in zip(*values, strict=True)])

        def gone(table: dict[Any, Any], nothing: Any) -> list[Any]:
            return [key for key, value in table.items() if value is nothing]

        for tombstone in changes.tombstones.values():
            for sql, values in drop(tombstone, OF_ALL_POSTGRES, sorted(tombstone.spared)):
                run(_q(sql), values)
        if names := gone(changes.launches, None):
            run("DELETE FROM launches WHERE agent = ANY(%b::text[])", (names,))
        many(_PUT_LAUNCHES, [row for row in changes.launches.values() if row is not None])
        many(_PUT_SHARDS, list(changes.shards.items()))
        many(_PUT_AGENTS, agent_values(changes))
        many(_PUT_BLOBS, list(changes.blobs.items()))
        if ids := gone(changes.dead, None):
            run("DELETE FROM dead WHERE id = ANY(%b::bigint[])", (ids,))
        deletes, updates, inserts = mailroom(changes)
        if deletes:
            run("DELETE FROM mail WHERE arrival = ANY(%b::bigint[])", (deletes,))
        many(_BEGIN_MAIL, updates)
        many(_PUT_MAIL, inserts)
        many(_PUT_DEAD, [dead_values(row) for row in changes.dead.values() if row is not None])
        many(_DROP_TIMERS, gone(changes.timers, None))
        many(_PUT_TIMERS, [row for row in changes.timers.values() if row is not None])
        many(_DROP_TOPICS, gone(changes.topics, False))
        many(_PUT_TOPICS, [key for key, wanted in changes.topics.items() if wanted])
        many(_DROP_MONITORS, gone(changes.monitors, None))
        many(
            _PUT_MONITORS,
            [(*k, int(linked)) for k, linked in changes.monitors.items() if linked is not None],
        )
        known = self._known
        for name, value, before in (
            ("arrival", changes.arrival, known.arrival),
            ("dead", changes.dead_id, known.dead),
        ):
            if value != before:
                run("UPDATE counters SET value = %s WHERE name = %s", (value, name))


class _Committed:
    """Point reads for :class:`llmos.drivers.stores.changes.Changes`.

    What the parts will most likely ask for is read before, for all of them at once.
    """

    def __init__(self, connection: _Connection) -> None:
        self._connection = connection
        self._entries: dict[str, Entry | None] = {}
        self._turns: dict[str, set[RowKey]] = {}
        self._fates: dict[Key, tuple[Any, Any, Any]] = {}
        self._mail: dict[Key, rows.MailRow | None] = {}

    def prefetch(self, known: Known, parts: Iterable[rows.Part]) -> None:
        """Read what these parts will ask for. In a pipeline: one round trip."""
        for part in parts:
            for write in part:
                match write:
                    case rows.Append(row):
                        self._want_entry(known, row.agent)
                        if row.turn not in known.turns:
                            self._turns[row.turn] = set()
                    case rows.SaveAgent() | rows.SetHold():
                        self._want_entry(known, write.agent)
                    case rows.PutMail(row):
                        self._fates[row.key] = (None, None, None)
                    case rows.EndMail() | rows.BeginMail() | rows.BuryMail():
                        if write[:3] not in known.mail:
                            self._mail[write[:3]] = None
                    case _:
                        pass
        run = self._connection.execute
        entries = run(_ENTRIES, (list(self._entries),)) if self._entries else None
        turns = run(_TURN_KEYS, (list(self._turns),)) if self._turns else None
        fates = run(_FATES, _columns(self._fates)) if self._fates else None
        mail = run(_MAIL_ROWS, _columns(self._mail)) if self._mail else None
        for values in entries or ():
            self._entries[values[0]] = Entry(*values[1:])
        for turn, *key in turns or ():
            self._turns[turn].add(cast(RowKey, tuple(key)))
        for receiver, stream, seq, *fate in fates or ():
            self._fates[receiver, stream, seq] = cast(tuple[Any, Any, Any], tuple(fate))
        for values in mail or ():
            row = rows.MailRow(*values)
            self._mail[row.key] = row

    def _want_entry(self, known: Known, agent: str) -> None:
        if agent not in known.entries:
            self._entries[agent] = None

    def _one(self, sql: str, values: Sequence[Any]) -> Any:
        return self._connection.execute(sql, values).fetchone()

    def entry(self, agent: str) -> Entry | None:
        if agent not in self._entries:
            found = self._one(_q(ENTRY), (agent,))
            self._entries[agent] = Entry(*found) if found else None
        return self._entries[agent]

    def turn_keys(self, turn: str) -> set[RowKey]:
        if turn not in self._turns:
            found = self._connection.execute(_TURN_KEYS, ([turn],)).fetchall()
            self._turns[turn] = {(v[1], v[2], v[3]) for v in found}
        return self._turns[turn]

    def fate(self, receiver: str, stream: str, seq: int) -> tuple[Any, Any, Any]:
        key = (receiver, stream, seq)
        if key not in self._fates:
            self._fates[key] = self._one(_q(FATE), (*key, *key, receiver, f"{stream}#{seq}"))
        return self._fates[key]

    def mail_row(self, receiver: str, stream: str, seq: int) -> rows.MailRow | None:
        key = (receiver, stream, seq)
        if key not in self._mail:
            found = self._one(_MAIL_ROW, key)
            self._mail[key] = rows.MailRow(*found) if found else None
        return self._mail[key]

    def dead_letter(self, id: int) -> rows.DeadLetter | None:
        found = self._one(_DEAD_LETTER, (id,))
        return dead_letter(found) if found else None

    def timer_due(self, agent: str, name: str) -> float | None:
        found = self._one(_TIMER_DUE, (agent, name))
        return float(found[0]) if found else None


def _columns(keys: Iterable[Key]) -> list[list[Any]]:
    return [list(column) for column in zip(*keys, strict=True)]


def _scalar(connection: _Connection, sql: str, values: Sequence[Any] = ()) -> Any:
    found = connection.execute(sql, values).fetchone()
    return found[0] if found else None


def _configure_reader(connection: _Connection) -> None:
    connection.execute("SET search_path TO llmos")
    connection.execute("SET default_transaction_read_only TO on")
    connection.execute("SET jit TO off")


def _create(connection: _Connection) -> None:
    for statement in statements(POSTGRES):
        connection.execute(statement)
    # Room in each page for the next version of its rows, which then need no new index entries.
    connection.execute("ALTER TABLE agents SET (fillfactor = 70)")


STEPS: dict[int, tuple[int, Callable[[_Connection], None]]] = {0: (2, _create)}
"""By the version that is there, 0 for none: what it becomes, and how. There was no version 1."""


def _prepare(connection: _Connection) -> str:
    """Make the schema one of this version, in one transaction.

    Returns why it cannot be used, or nothing. The caller holds the lock.
    """
    connection.execute("SET search_path TO llmos")
    version = 0
    if _scalar(connection, "SELECT to_regclass('llmos.meta')"):
        version = int(_scalar(connection, "SELECT value FROM meta WHERE name = 'version'"))
    if version == VERSION:
        return ""
    if version > VERSION:
        return f"it was written by a newer LLM OS (schema {version}, known is {VERSION})"
    with connection.transaction():
        connection.execute("CREATE SCHEMA IF NOT EXISTS llmos")
        connection.execute("CREATE TABLE IF NOT EXISTS meta (name text PRIMARY KEY, value text)")
        while version != VERSION:
            if version not in STEPS:
                return f"nothing is known of its schema {version}"
            version, step = STEPS[version]
            step(connection)
        connection.execute(
            "INSERT INTO meta VALUES ('version', %s) "
            "ON CONFLICT (name) DO UPDATE SET value = excluded.value",
            (str(VERSION),),
        )
    return ""


def _load(connection: _Connection) -> Known:
    """What is to be remembered of the rows."""
    known, run = Known(), connection.execute
    known.launches = {v[0]: rows.LaunchRow(*v) for v in run(_q(SELECT["launches"]))}
    known.shards = {v[0]: v[1] for v in run(_q(SELECT["shards"]))}
    waiting = run("SELECT receiver, count(*) FROM mail GROUP BY receiver")
    known.waiting = {v[0]: v[1] for v in waiting}
    counters = {v[0]: v[1] for v in run(_q(SELECT["counters"]))}
    known.arrival, known.dead = counters["arrival"], counters["dead"]
    return known


def _read(connection: _Connection) -> copies.Tables:
    """All tables ordered by key, some rows at a time."""
    for table in TABLES:
        with connection.cursor(f"copy_{table.name}") as cursor:
            cursor.itersize = copies.ROWS_AT_ONCE
            cursor.execute(_q(f"{SELECT[table.name]} ORDER BY {', '.join(table.key)}"), binary=True)
            yield table.name, iter(cursor)
