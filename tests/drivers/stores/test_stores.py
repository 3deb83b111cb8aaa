from __future__ import annotations

import sqlite3
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmos.drivers.errors import StaleEpoch, StoreUnavailable
from llmos.drivers.protocols import AgentDelete, StateWrite, Store, StoreWrite
from llmos.drivers.stores.memory import MemoryStore
from llmos.drivers.stores.sqlite import SqliteStore
from tests.drivers.stores.stores_suite import StoresSuite, agent, syscall, turn


class TestMemoryStore(StoresSuite):
    def make(self, path: Path) -> Store:
        return MemoryStore(path)


class TestSqliteStore(StoresSuite):
    def make(self, path: Path) -> Store:
        return SqliteStore(path)


_AGENT = st.sampled_from(["a", "b", "ab"])
_TURN = st.sampled_from(["t", "t1", "t2", "u"])
_EPOCH = st.integers(0, 3)
_WRITE: st.SearchStrategy[StoreWrite] = st.one_of(
    st.builds(agent, _AGENT, _EPOCH, st.binary(max_size=3)),
    st.builds(AgentDelete, _AGENT),
    st.builds(StateWrite, _AGENT, _EPOCH, st.binary(max_size=3)),
    st.builds(
        lambda t, s, a, e: turn(t, s, owner=a, epoch=e), _TURN, st.floats(0, 3), _AGENT, _EPOCH
    ),
    st.builds(syscall, _TURN, st.integers(0, 3), st.binary(max_size=3)),
)


def outcome(store: Store, writes: Sequence[StoreWrite]) -> tuple[object, ...] | None:
    try:
        store.commit(writes)
    except StaleEpoch as error:
        return error.agent, error.epoch, error.current
    return None


def contents(store: Store) -> object:
    return (
        store.agents(),
        [store.state(a) for a in ("a", "b", "ab")],
        store.turns(limit=100),
        store.turns(agent="a"),
        [store.turn(t) for t in ("t", "t1", "t2", "u", "")],
    )


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(_WRITE, max_size=6), max_size=6))
def test_sqlite_agrees_with_memory(batches: list[list[StoreWrite]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "s.db"
        memory, durable = MemoryStore(), SqliteStore(path)
        for writes in batches:
            assert outcome(durable, writes) == outcome(memory, writes)
        assert contents(durable) == contents(memory)
        durable.close()
        again = SqliteStore(path)
        assert contents(again) == contents(memory)
        again.close()


def test_a_second_opening_is_refused_until_the_first_closes(tmp_path: Path) -> None:
    path = tmp_path / "s.db"
    first = SqliteStore(path)
    first.commit([agent()])
    with pytest.raises(StoreUnavailable, match="in use by another process") as caught:
        SqliteStore(path)
    assert caught.value.store == str(path)
    first.close()
    second = SqliteStore(path)
    assert len(second.agents()) == 1
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


def test_a_full_disk_keeps_nothing_and_the_store_goes_on(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path / "s.db")
    store.commit([agent()])
    pages = store._writer.execute("PRAGMA page_count").fetchone()[0]
    store._writer.execute(f"PRAGMA max_page_count = {pages + 4}")
    with pytest.raises(StoreUnavailable, match="full"):
        store.commit([agent("b"), StateWrite("t/p/1", 1, bytes(200_000)), agent("c")])
    assert [row.agent for row in store.agents()] == ["t/p/1"]
    store.commit([StateWrite("t/p/1", 1, b"small")])
    assert store.state("t/p/1") == b"small"
    store._writer.execute("PRAGMA max_page_count = 1000000")
    store.commit([StateWrite("t/p/1", 1, bytes(200_000))])
    store.close()


def test_a_foreign_lock_ends_in_an_error_and_the_store_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmos.drivers.stores.sqlite.BUSY_TIMEOUT_S", 0.05)
    store = SqliteStore(tmp_path / "s.db")
    shell = sqlite3.connect(tmp_path / "s.db", isolation_level=None)
    shell.execute("BEGIN IMMEDIATE")
    with pytest.raises(StoreUnavailable, match="locked"):
        store.commit([agent()])
    assert store.agents() == []
    shell.execute("ROLLBACK")
    shell.close()
    store.commit([agent()])
    assert len(store.agents()) == 1
    store.close()


@pytest.mark.parametrize(
    "write",
    [
        agent("\ud800"),
        agent(epoch=2**70),
        replace(turn("x"), started_at=float("nan")),
        replace(turn("x"), message="text"),  # type: ignore[arg-type]
    ],
)
def test_a_row_that_cannot_be_stored_takes_nothing_with_it(
    tmp_path: Path, write: StoreWrite
) -> None:
    store = SqliteStore(tmp_path / "s.db")
    with pytest.raises(StoreUnavailable):
        store.commit([agent("a"), write])
    assert store.agents() == []
    store.commit([agent("a")])
    assert len(store.agents()) == 1
    store.close()


def test_commits_are_synced_and_the_log_is_closed(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path / "s.db")
    assert store._writer.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    assert store._writer.execute("PRAGMA synchronous").fetchone() == (2,)
    store.commit([agent()])
    store.close()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["s.db", "s.db.lock"]
