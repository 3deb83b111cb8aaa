"""What every store must do."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from llmos.drivers.errors import StaleEpoch, StoreUnavailable
from llmos.drivers.protocols import (
    AgentDelete,
    AgentRow,
    AgentWrite,
    StateWrite,
    Store,
    SyscallRow,
    TurnRow,
    TurnStatus,
)


def agent(name: str = "t/p/1", epoch: int = 1, config: bytes = b"{}") -> AgentWrite:
    return AgentWrite(AgentRow(name, "m:C", config, epoch, 1.5))


def turn(
    name: str, started_at: float = 0.0, *, owner: str = "t/p/1", epoch: int = 1, error: str = ""
) -> TurnRow:
    return TurnRow(
        name, owner, epoch, "ask", b"\x00m", "c", started_at, 0.25, TurnStatus.DONE, b"r", error
    )


def syscall(of: str, seq: int, result: bytes = b"ok") -> SyscallRow:
    return SyscallRow(of, seq, "generate", "llm", 0.1, 0.2, "ok", b"q", result, b"p", b"l")


class StoresSuite:
    def make(self, path: Path) -> Store:
        raise NotImplementedError

    @pytest.fixture
    def store(self, tmp_path: Path) -> Iterator[Store]:
        store = self.make(tmp_path / "deep" / "store.db")
        yield store
        store.close()

    def test_rows_come_back_as_they_were(self, store: Store) -> None:
        row = turn("01ab", 3.0, error="Ženě: \x00 漢")
        store.commit(
            [agent(), row, syscall("01ab", 2), syscall("01ab", 0), StateWrite("t/p/1", 1, b"s")]
        )
        assert store.agents() == [agent().row]
        assert store.agent("t/p/1") == agent().row
        assert store.state("t/p/1") == b"s"
        assert store.turn("01ab") == (row, [syscall("01ab", 0), syscall("01ab", 2)])
        found = store.turns()
        assert found == [row]
        assert found[0].status is TurnStatus.DONE

    def test_what_is_not_there(self, store: Store) -> None:
        assert store.agents() == []
        assert store.agent("x") is None
        assert store.state("x") is None
        assert store.turns() == []
        assert store.turn("x") is None
        store.commit([])
        store.commit([AgentDelete("nobody")])

    def test_rows_with_the_same_key_are_replaced(self, store: Store) -> None:
        store.commit([agent(), StateWrite("t/p/1", 1, b"1"), turn("a", 1.0), syscall("a", 0)])
        store.commit([agent(config=b"new"), turn("a", 2.0), syscall("a", 0, b"again")])
        assert store.agents() == [agent(config=b"new").row]
        assert store.state("t/p/1") == b"1"
        assert store.turn("a") == (turn("a", 2.0), [syscall("a", 0, b"again")])
        store.commit([StateWrite("t/p/1", 1, b"2"), StateWrite("t/p/1", 1, b"3")])
        assert store.state("t/p/1") == b"3"

    def test_agents_are_ordered_by_id(self, store: Store) -> None:
        store.commit([agent(name) for name in ("b", "a", "É", "B")])
        assert [row.agent for row in store.agents()] == ["B", "a", "b", "É"]

    def test_newest_turns_first(self, store: Store) -> None:
        store.commit([turn(f"t{i}", float(i % 5), owner=f"a{i % 2}") for i in range(10)])
        assert [t.turn for t in store.turns(limit=4)] == ["t9", "t4", "t8", "t3"]
        assert [t.turn for t in store.turns(agent="a1", limit=2)] == ["t9", "t3"]
        assert store.turns(agent="none") == []
        assert store.turns(limit=0) == []
        assert len(store.turns()) == 10

    def test_a_unique_prefix_finds_a_turn(self, store: Store) -> None:
        store.commit([turn("abc1"), turn("abc2"), turn("ab"), turn("%_x"), syscall("abc2", 1)])
        found = store.turn("abc2")
        assert found is not None
        assert len(found[1]) == 1
        for wanted, prefix in (("ab", "ab"), ("%_x", "%"), ("abc1", "abc1")):
            found = store.turn(prefix)
            assert found is not None
            assert found[0].turn == wanted
        for prefix in ("abc", "a", "", "_", "b", "abc11"):
            assert store.turn(prefix) is None

    def test_another_epoch_commits_nothing_whether_lower_or_higher(self, store: Store) -> None:
        store.commit([agent(epoch=3), StateWrite("t/p/1", 3, b"new")])
        # Higher: an owner whose agents were moved to a host that was started before it.
        with pytest.raises(StaleEpoch):
            store.commit([StateWrite("t/p/1", 4, b"moved away")])
        assert store.state("t/p/1") == b"new"

    def test_an_older_epoch_commits_nothing(self, store: Store) -> None:
        store.commit([agent(epoch=3), StateWrite("t/p/1", 3, b"new")])
        for late in (StateWrite("t/p/1", 2, b"old"), turn("t", epoch=2)):
            with pytest.raises(StaleEpoch) as caught:
                store.commit([agent("other"), turn("u", owner="x"), late, agent("more")])
            assert (caught.value.agent, caught.value.epoch, caught.value.current) == ("t/p/1", 2, 3)
            assert pickle.loads(pickle.dumps(caught.value)).current == 3
        assert [row.agent for row in store.agents()] == ["t/p/1"]
        assert store.turns() == []
        assert store.state("t/p/1") == b"new"
        store.commit([StateWrite("t/p/1", 3, b"next")])
        assert store.state("t/p/1") == b"next"

    def test_the_epoch_is_checked_in_order_within_a_commit(self, store: Store) -> None:
        store.commit([agent(epoch=1), StateWrite("t/p/1", 1, b"a"), agent(epoch=2)])
        with pytest.raises(StaleEpoch):
            store.commit([agent(epoch=5), StateWrite("t/p/1", 4, b"b")])
        row = store.agent("t/p/1")
        assert row is not None
        assert row.epoch == 2
        store.commit([StateWrite("t/p/1", 2, b"c"), agent(epoch=9)])
        assert store.state("t/p/1") == b"c"

    def test_a_deleted_agent_leaves_its_turns_and_no_state(self, store: Store) -> None:
        store.commit([agent(), StateWrite("t/p/1", 1, b"s"), turn("a"), syscall("a", 0)])
        store.commit([AgentDelete("t/p/1")])
        assert store.agents() == []
        assert store.state("t/p/1") is None
        assert store.turn("a") == (turn("a"), [syscall("a", 0)])
        with pytest.raises(StaleEpoch):
            store.commit([StateWrite("t/p/1", 1, b"ghost")])
        store.commit([turn("late")])
        store.commit([agent()])
        assert store.state("t/p/1") is None

    def test_closed_is_closed(self, store: Store) -> None:
        store.close()
        store.close()
        for call in (
            lambda: store.commit([agent()]),
            store.agents,
            lambda: store.agent("x"),
            lambda: store.state("x"),
            store.turns,
            lambda: store.turn("x"),
        ):
            with pytest.raises(StoreUnavailable, match="closed"):
                call()

    def test_threads_commit_and_read_together(self, store: Store) -> None:
        def work(i: int) -> bool:
            name = f"a{i}"
            store.commit([agent(name), StateWrite(name, 1, b"%d" % i), turn(f"t{i}", owner=name)])
            return store.state(name) == b"%d" % i and store.turn(f"t{i}") is not None

        with ThreadPoolExecutor(8) as pool:
            assert all(pool.map(work, range(60)))
        assert len(store.agents()) == len(store.turns(limit=100)) == 60
