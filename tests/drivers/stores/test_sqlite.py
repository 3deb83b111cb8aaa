"""What is SQLite's own: the file, its lock, its versions, and a disk that fails."""

from __future__ import annotations

import json
import os
import random
import shutil
import sqlite3
import threading
from pathlib import Path
from typing import Any

import msgpack
import pytest

from llmos.drivers.errors import StoreUnavailable
from llmos.drivers.stores import chain
from llmos.drivers.stores.memory import MemoryStore
from llmos.drivers.stores.restore import restore
from llmos.drivers.stores.rows import EndMail, PutBlob, PutMail, SaveAgent, SetHold
from llmos.drivers.stores.sqlite import SqliteStore
from tests.drivers.stores.stores_suite import A, B, end, everything, launch, mail, ok, row


def test_a_second_opening_is_refused_until_the_first_closes(tmp_path: Path) -> None:
    path = tmp_path / "s.db"
    first = SqliteStore(path)
    ok(first, PutMail(mail(1)))
    with pytest.raises(StoreUnavailable, match="in use by another process") as caught:
        SqliteStore(path)
    assert caught.value.store == str(path)
    first.close()
    second = SqliteStore(path)
    assert len(second.mail()) == 1
    second.close()


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("PRAGMA user_version = 99", "newer LLM OS"),
        ("PRAGMA application_id = 7", "another program"),
    ],
)
def test_a_newer_schema_is_refused_and_untouched(tmp_path: Path, script: str, reason: str) -> None:
    path = tmp_path / "s.db"
    SqliteStore(path).close()
    connection = sqlite3.connect(path)
    connection.execute(script)
    connection.close()
    before = path.read_bytes()
    for _ in range(2):
        with pytest.raises(StoreUnavailable, match=reason):
            SqliteStore(path)
    assert path.read_bytes() == before


def test_paths_that_are_no_store(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("not a database, but long enough to be read as one" * 40)
    (tmp_path / "folder").mkdir()
    foreign = sqlite3.connect(tmp_path / "foreign")
    foreign.execute("CREATE TABLE mine (x)")
    foreign.close()
    for name in ("text", "folder", "foreign", "text/below"):
        with pytest.raises(StoreUnavailable, match=name):
            SqliteStore(tmp_path / name)
    for name in ("text", "folder", "foreign", "none"):
        with pytest.raises(StoreUnavailable, match=name):
            restore(tmp_path / name, MemoryStore())


def test_commits_are_synced_and_the_log_is_closed(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path / "s.db")
    assert store._writer.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    assert store._writer.execute("PRAGMA synchronous").fetchone() == (2,)
    ok(store, PutMail(mail(1)))
    store.close()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["s.db", "s.db.lock"]


def test_an_idle_agent_is_a_few_hundred_bytes(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path / "s.db")
    state = json.dumps({"name": "x" * 88}).encode()
    assert len(state) == 100
    names = [f"acme/customer_service/{i * 7919 % 20_000:08}" for i in range(20_000)]
    for start in range(0, 20_000, 1000):
        part = [SaveAgent(name, 3, state, 1, 2) for name in names[start : start + 1000]]
        assert store.commit([part]) == [None]
    store.close()
    assert (tmp_path / "s.db").stat().st_size / 20_000 < 400


# ---------------------------------------------------------------- version 1

VERSION_1 = """
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
PRAGMA application_id = 0x4C4C4F53;
PRAGMA user_version = 1;
"""


def version_1(path: Path) -> None:
    pack = msgpack.packb
    connection = sqlite3.connect(path)
    connection.executescript(VERSION_1)
    connection.execute("INSERT INTO agents VALUES (?, 'm:C', ?, 3, 7.5)", (A, pack({"k": 1})))
    connection.execute("INSERT INTO states VALUES (?, ?)", (A, pack({"name": "Žofie"})))
    for number, (agent, status) in enumerate(
        [(A, "done"), (B, "done"), (A, "failed"), (A, "running")]
    ):
        turn = f"T{number}"
        connection.execute(
            "INSERT INTO turns VALUES (?, ?, 3, 'Ask', ?, 'c', ?, 0.5, ?, ?, ?)",
            (
                turn,
                agent,
                b"\x80message",
                10.0 + number,
                status,
                pack({"text": "hi"}),
                "Code: no" if status == "failed" else "",
            ),
        )
        for seq in range(2):
            connection.execute(
                "INSERT INTO syscalls VALUES (?, ?, 'generate', 'llm', 0.25, 0.1, ?, ?, ?, ?, ?)",
                (turn, seq, "ok" if seq else "denied", pack({"q": seq}), b"", pack([]), pack({})),
            )
    connection.commit()
    connection.close()


def test_a_store_of_version_1_is_brought_up(tmp_path: Path) -> None:
    path = tmp_path / "s.db"
    version_1(path)
    shutil.copy(path, tmp_path / "old.db")
    store = SqliteStore(path)
    (launched,) = store.launches()
    assert (launched.agent, launched.program, launched.created_at) == (A, "m:C", 7.5)
    assert launched.id
    agent = store.agent(A)
    assert agent is not None
    assert agent.state is not None
    assert json.loads(agent.state) == {"name": "Žofie"}
    assert store.agent(B) is None
    assert [(r.turn, r.seq, r.phase, r.kind) for r in store.chain(A)] == [
        ("T0", 1, "failed", "generate"),
        ("T0", 2, "result", "generate"),
        ("T0", 0, "result", "turn"),
        ("T2", 1, "failed", "generate"),
        ("T2", 2, "result", "generate"),
        ("T2", 0, "failed", "turn"),
        ("T3", 1, "failed", "generate"),
        ("T3", 2, "result", "generate"),
    ]
    last = store.turn("T2")[-1]
    assert (last.name, last.args, last.result) == ("Ask", b"\x80message", b'"Code: no"')
    assert (last.ts, last.elapsed_s, last.cause, last.epoch) == (12.0, 0.5, "c", 3)
    call = store.turn("T0")[1]
    assert (call.args, call.provenance, call.ts) == (b'{"q": 1}', b"[]", 10.25)
    assert [t.turn for t in store.turns()] == ["T2", "T1", "T0"]
    for name in (A, B):
        assert chain.verify_agent(store, name) == []
    ok(store, row("T9", agent=A), row("T9", 2, agent=B))
    assert [store.chain(name)[-1].pos for name in (A, B)] == [9, 4]
    before = everything(store)
    store.close()
    store = SqliteStore(path)
    assert everything(store) == before
    store.close()
    copy = MemoryStore()
    restore(tmp_path / "old.db", copy)
    assert [t.turn for t in copy.turns()] == ["T2", "T1", "T0"]


def test_a_migration_that_breaks_off_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "s.db"
    version_1(path)

    def broken(*_: Any) -> Any:
        raise sqlite3.OperationalError("power cut")

    with monkeypatch.context() as patch:
        patch.setattr("llmos.drivers.stores.migrations._journal_1", broken)
        with pytest.raises(StoreUnavailable, match="power cut"):
            SqliteStore(path)
    connection = sqlite3.connect(path)
    tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master")}
    assert {"agents", "states", "turns", "syscalls"} <= tables
    assert "journal" not in tables
    connection.close()
    store = SqliteStore(path)
    assert len(store.turns()) == 3
    store.close()


# ---------------------------------------------------------------- faults


def test_a_full_disk_keeps_nothing_and_the_store_goes_on(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path / "s.db")
    ok(store, PutMail(mail(1)), row("T1"))
    before = everything(store)
    pages = store._writer.execute("PRAGMA page_count").fetchone()[0]
    store._writer.execute(f"PRAGMA max_page_count = {pages + 4}")
    big = PutBlob("b1", bytes(200_000))
    for _ in range(2):
        with pytest.raises(StoreUnavailable, match="full"):
            store.commit(
                [[PutMail(mail(2))], [row("T2"), big, SetHold(A, "x")], [EndMail(A, "s", 1)]]
            )
        assert everything(store) == before
    ok(store, row("T2", result=b"small"))
    assert store.chain(A)[-1].pos == 2
    store._writer.execute("PRAGMA max_page_count = 1000000")
    ok(store, big, PutMail(mail(2), limit=2))
    assert store.blob("b1") == bytes(200_000)
    assert chain.verify_agent(store, A) == []
    store.close()


class Failing:
    """A writing connection on which chosen statements fail as a broken disk makes them fail."""

    def __init__(self, connection: sqlite3.Connection, words: str) -> None:
        self._connection, self._words = connection, words
        self.failures = 0

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._connection, name)
        if name not in ("execute", "executemany"):
            return value

        def run(sql: str, *values: Any) -> Any:
            if self._words in sql and self.failures:
                self.failures -= 1
                raise sqlite3.OperationalError("disk I/O error")
            return value(sql, *values)

        return run


@pytest.mark.parametrize("words", ["BEGIN", "INSERT INTO journal", "DELETE FROM mail", "COMMIT"])
def test_an_io_error_keeps_nothing_and_the_store_goes_on(tmp_path: Path, words: str) -> None:
    store = SqliteStore(tmp_path / "s.db")
    ok(store, PutMail(mail(1)), row("T1"), launch())
    before = everything(store)
    failing = Failing(store._writer, words)
    store._writer = failing  # type: ignore[assignment]
    parts = [[PutMail(mail(2)), launch(A, "L2")], [end("T1"), SaveAgent(A, 3), EndMail(A, "s", 1)]]
    failing.failures = 1
    with pytest.raises(StoreUnavailable, match="I/O error"):
        store.commit(parts)
    assert everything(store) == before
    assert store.commit(parts) == [None, None]
    assert store.agent(A)[5] == 2  # type: ignore[index]
    assert chain.verify_agent(store, A) == []
    store.close()
    store = SqliteStore(tmp_path / "s.db")
    assert [m.seq for m in store.mail()] == [2]
    store.close()


def test_a_foreign_lock_ends_in_an_error_and_the_store_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmos.drivers.stores.sqlite.BUSY_TIMEOUT_S", 0.05)
    store = SqliteStore(tmp_path / "s.db")
    shell = sqlite3.connect(tmp_path / "s.db", isolation_level=None)
    shell.execute("BEGIN IMMEDIATE")
    with pytest.raises(StoreUnavailable, match="locked"):
        store.commit([[PutMail(mail(1))]])
    assert store.mail() == []
    shell.execute("ROLLBACK")
    shell.close()
    ok(store, PutMail(mail(1)))
    assert len(store.mail()) == 1
    store.close()


def test_a_read_does_not_wait_for_a_commit(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path / "s.db")
    ok(store, PutMail(mail(1)))
    inside, done = threading.Event(), threading.Event()
    real = store._write

    def slow(*values: Any) -> None:
        real(*values)
        inside.set()
        assert done.wait(30)

    store._write = slow  # type: ignore[method-assign]
    committing = threading.Thread(target=store.commit, args=([[PutMail(mail(2)), launch()]],))
    committing.start()
    try:
        assert inside.wait(30)
        assert [m.seq for m in store.mail()] == [1]
        assert store.launches() == []
        assert store.agent(A) is None
    finally:
        done.set()
        committing.join()
    assert [m.seq for m in store.mail()] == [1, 2]
    assert len(store.launches()) == 1
    store.close()


@pytest.mark.parametrize("seed", range(6))
def test_a_torn_log_leaves_a_prefix_of_the_commits(tmp_path: Path, seed: int) -> None:
    """What a power cut does to a log that was being written: its tail is short or wrong."""
    rng = random.Random(seed)
    path = tmp_path / "s.db"
    store = SqliteStore(path)
    sizes = []
    for seq in range(1, 41):
        ok(store, PutMail(mail(seq)))
        part = [row(f"T{seq}", 1), end(f"T{seq}", key=f"s#{seq}"), SaveAgent(A, seq, b"%d" % seq)]
        ok(store, *part, EndMail(A, "s", seq))
        sizes.append(os.path.getsize(f"{path}-wal"))
    for attempt in range(12):
        torn = tmp_path / f"{attempt}" / "s.db"
        torn.parent.mkdir()
        shutil.copy(path, torn)
        log = bytearray(Path(f"{path}-wal").read_bytes())
        # Never before the tenth commit: its bytes were synced long ago.
        at = rng.randrange(sizes[9], len(log))
        if attempt % 3 == 0:
            del log[at:]
        elif attempt % 3 == 1:
            log[at] ^= 1 << rng.randrange(8)
        else:
            log[at:] = rng.randbytes(len(log) - at)
        Path(f"{torn}-wal").write_bytes(log)
        opened = SqliteStore(torn)
        agent = opened.agent(A)
        assert agent is not None
        turns = len(opened.turns(limit=100))
        assert 10 <= turns <= 40
        assert (agent.sent, agent.state, agent.pos) == (turns, b"%d" % turns, 2 * turns)
        # Whole commits up to the damage.
        assert all(size > at for size in sizes[turns:])
        assert chain.verify_agent(opened, A) == []
        assert opened._writer.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        assert [m.seq for m in opened.mail()] in ([], [turns + 1])
        ok(opened, PutMail(mail(turns + 1)), row("more"))
        opened.close()
    store.close()


def test_no_statement_reads_a_whole_table(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path / "s.db")
    seen: list[str] = []
    store._reader.set_trace_callback(seen.append)
    store._writer.set_trace_callback(seen.append)
    ok(store, PutMail(mail(1)), row("T1", 1), end("T1"), SaveAgent(A, 1), EndMail(A, "s", 1))
    ok(store, PutMail(mail(2)))
    everything(store)
    store.turns(agent=A, before=1.0)
    store.turns(before=1.0)
    store.turns_rows(["T1", "T2"])
    store.mail(after=1)
    store._reader.set_trace_callback(None)
    store._writer.set_trace_callback(None)
    plans = {
        sql: [step[3] for step in store._writer.execute(f"EXPLAIN QUERY PLAN {sql}")]
        for sql in seen
        if sql.startswith(("SELECT", "UPDATE", "DELETE"))
    }
    assert len(plans) > 20
    for sql, plan in plans.items():
        if "count(*)" in sql:
            continue
        scans = [step for step in plan if "SCAN" in step and step != "SCAN CONSTANT ROW"]
        # Ordered by the key itself, and so read no further than the limit.
        assert not scans or ("LIMIT" in sql and "TEMP B-TREE" not in str(plan)), (sql, plan)
        if "idem_key =" in sql:
            assert "journal_handled" in str(plan), (sql, plan)
    store.close()
