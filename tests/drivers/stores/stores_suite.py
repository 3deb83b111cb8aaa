"""What every store must do."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from llmos.drivers.errors import (
    AlreadyHandled,
    MailboxFull,
    StaleEpoch,
    StoreError,
    StoreUnavailable,
)
from llmos.drivers.protocols import Store
from llmos.drivers.stores import chain
from llmos.drivers.stores.memory import MemoryStore
from llmos.drivers.stores.restore import restore
from llmos.drivers.stores.rows import (
    NO_HASH,
    SHARDS,
    AgentRow,
    Append,
    BeginMail,
    BuryMail,
    DropDead,
    DropLaunch,
    DropMonitor,
    DropTimer,
    EndMail,
    JournalRow,
    LaunchRow,
    MailRow,
    MonitorRow,
    Own,
    Part,
    PutBlob,
    PutLaunch,
    PutMail,
    PutMonitor,
    PutTimer,
    ReviveDead,
    SaveAgent,
    SetHold,
    Subscribe,
    TakeShards,
    TakeTimer,
    TimerRow,
    Unsubscribe,
    shard_of,
)

A, B, C = "t/p/1", "t/p/2", "t/q/1"
ALL = TakeShards(tuple(range(SHARDS)), 1)


def launch(agent: str = "t/p/*", id: str = "L1") -> PutLaunch:
    return PutLaunch(LaunchRow(agent, "m:C", b"{}", id, 1.5))


def mail(seq: int = 1, receiver: str = A, stream: str = "s", **values: Any) -> MailRow:
    return MailRow(receiver, stream, seq, values.pop("envelope", b"\x00e"), **values)


def row(
    turn: str = "T1", seq: int = 1, phase: str = "result", agent: str = A, **values: Any
) -> Append:
    defaults: dict[str, Any] = {
        "kind": "turn" if seq == 0 else "Generate",
        "name": "llm",
        "args_hash": b"h" * 16,
        "args": b"\x00args",
        "result": "Ženě 漢".encode(),
        "labels": b"{}",
        "provenance": b"[]",
        "epoch": 1,
        "code_version": "c",
        "model_digest": "d",
        "ts": 1.25,
        "elapsed_s": 0.5,
    }
    return Append(JournalRow(agent, turn, seq, phase, **(defaults | values)))


def end(turn: str = "T1", agent: str = A, key: str = "s#1", **values: Any) -> Append:
    return row(turn, 0, "result", agent, idem_key=key, **values)


def one(store: Store, *part: Any) -> StoreError | None:
    """Commit one part."""
    (error,) = store.commit([part])
    return error


def ok(store: Store, *part: Any) -> None:
    assert one(store, *part) is None


def everything(store: Any) -> dict[str, Any]:
    """All that can be read, for comparing."""
    agents = store.agents(limit=10**6)
    journal = {t.turn: store.turn(t.turn) for t in store.turns(limit=10**6)}
    return {
        "launches": store.launches(),
        "shards": store.shards(),
        "agents": agents,
        "count": store.count_agents(),
        "ends": [store.chain_end(a) for a in (A, B, C, "t/p/3", "t/p/4")],
        "held": store.agents(held=True),
        "mail": store.mail(limit=10**6),
        "waiting": {a: store.waiting(a) for a in (A, B, C)},
        "dead": store.dead(limit=10**6),
        "timers": store.timers(before=1e12),
        "timers_of": {a: store.timers_of(a) for a in (A, B, C)},
        "topics": {t: store.subscribers(t) for t in ("t/a", "t/b")},
        "monitors": {a: store.monitors(a) for a in (A, B, C)},
        "turns": store.turns(limit=10**6),
        "rows": journal,
        "chains": {a: store.chain(a, limit=10**6) for a in (A, B, C)},
        "handled": [store.handled(a, f"s#{i}") for a in (A, B, C) for i in range(4)],
        "blobs": [store.blob(b) for b in ("b1", "b2")],
    }


class StoresSuite:
    def make(self, path: Path) -> Any:
        """A new, empty store. ``path`` is of a folder that is there."""
        raise NotImplementedError

    def again(self, store: Any, path: Path) -> Any:
        """What a new process finds after the store was closed."""
        raise NotImplementedError

    @pytest.fixture
    def store(self, tmp_path: Path) -> Iterator[Any]:
        store = self.make(tmp_path)
        store.commit([[ALL, launch()]])
        yield store
        store.close()

    def verify(self, store: Any, *agents: str) -> None:
        for agent in agents:
            assert chain.verify_agent(store, agent) == []

    # ------------------------------------------------------------ parts

    def test_nothing(self, tmp_path: Path) -> None:
        store = self.make(tmp_path)
        assert store.commit([]) == []
        assert store.commit([[], []]) == [None, None]
        for found in (
            store.launches(),
            store.agents(),
            store.mail(),
            store.waiting(A),
            store.dead(),
            store.timers(before=1e12),
            store.timers_of(A),
            store.subscribers("t/a"),
            store.monitors(A),
            store.turns(),
            store.turn("x"),
            store.turn(""),
            store.chain(A),
        ):
            assert found == []
        assert store.shards() == store.turns_rows(["x"]) == store.turns_rows([]) == {}
        assert store.launch_of(A) is store.agent(A) is store.handled(A, "s#1") is None
        assert store.blob("b") is store.chain_end(A) is None
        assert store.count_agents() == 0
        store.close()

    def test_a_refused_part_changes_nothing_and_the_others_stay(self, store: Any) -> None:
        before = everything(store)
        full = [
            row(),
            SaveAgent(A, 5, b"{}", 1, 1),
            SetHold(B, "quarantined"),
            PutMail(mail(1)),
            PutMail(mail(2)),
            BuryMail(A, "s", 1, "r", "s", 1.0),
            PutBlob("b1", b"x"),
            launch(C, "L9"),
            TakeShards((1, 2), 9),
            PutTimer(TimerRow(A, "n", 1.0, b"e")),
            Subscribe("t/a", A),
            PutMonitor(MonitorRow(A, B)),
            DropLaunch("t/p/*"),
            EndMail(A, "s", 3),
        ]
        refused, kept = store.commit([full, [PutMail(mail(7))]])
        assert isinstance(refused, AlreadyHandled)
        assert kept is None
        assert [m.seq for m in store.mail()] == [7]
        ok(store, EndMail(A, "s", 7))
        assert everything(store) == before
        self.verify(store, A, B)

    def test_a_part_is_checked_against_those_before_it(self, store: Any) -> None:
        errors = store.commit(
            [
                [PutMail(mail(1), limit=1)],
                [PutMail(mail(2), limit=1)],
                [EndMail(A, "s", 1)],
                [EndMail(A, "s", 1)],
                [PutMail(mail(2), limit=1)],
                [TakeShards((shard_of(B),), 2), Own(B, 2)],
                [Own(B, 1), SetHold(B, "x")],
                [PutMail(mail(1, B)), EndMail(B, "s", 1)],
            ]
        )
        kinds = [None if e is None else type(e) for e in errors]
        assert kinds == [None, MailboxFull, None, AlreadyHandled, None, None, StaleEpoch, None]
        assert (errors[1].agent, errors[1].waiting) == (A, 1)
        assert errors[3].message == "s#1"
        assert (errors[6].epoch, errors[6].current) == (1, 2)
        assert [m.key for m in store.mail()] == [(A, "s", 2)]

    # ------------------------------------------------------------ owners

    def test_only_the_very_epoch_owns(self, tmp_path: Path) -> None:
        store = self.make(tmp_path)
        error = one(store, Own(A, 0), SetHold(A, "x"))
        assert isinstance(error, StaleEpoch)
        assert error.current == -1
        assert isinstance(one(store, Own(A, -1), SetHold(A, "x")), StaleEpoch)
        ok(store, TakeShards((shard_of(A),), 5))
        # Higher too: an owner whose shards were given back to one that started before it.
        for epoch in (4, 6):
            error = one(store, Own(A, epoch), SetHold(A, "x"))
            assert isinstance(error, StaleEpoch)
            assert (error.agent, error.epoch, error.current) == (A, epoch, 5)
        ok(store, Own(A, 5), SetHold(A, "x"))
        ok(store, TakeShards((shard_of(A),), 3))
        assert isinstance(one(store, Own(A, 5)), StaleEpoch)
        ok(store, Own(A, 3))
        assert store.shards() == {shard_of(A): 3}
        store.close()

    def test_a_late_turn_of_an_old_launch_is_refused(self, store: Any) -> None:
        ok(store, Own(A, 1, "L1"))
        assert isinstance(one(store, Own(C, 1, "L1")), StaleEpoch)
        ok(store, launch(A, "L2"))
        assert isinstance(one(store, Own(A, 1, "L1")), StaleEpoch)
        ok(store, Own(A, 1, "L2"))
        ok(store, Own(B, 1, "L1"))
        ok(store, DropLaunch(A))
        ok(store, Own(A, 1, "L1"))
        ok(store, launch("t/p/*", "L3"))
        error = one(store, Own(A, 1, "L1"), SetHold(A, "x"))
        assert isinstance(error, StaleEpoch)
        assert error.current == -1
        assert store.agents() == []

    # ------------------------------------------------------------ launches

    def test_launches(self, store: Any) -> None:
        ok(store, launch("t/a/1", "L2"), launch(A, "L3"))
        assert [r.agent for r in store.launches()] == ["t/a/1", "t/p/*", A]
        assert store.launch_of(A).id == "L3"
        assert store.launch_of(B) == launch().row
        assert store.launch_of("t/a/2") is None
        ok(store, launch(A, "L4"))
        assert store.launch_of(A).id == "L4"
        ok(store, DropLaunch("nobody/x/1"))
        assert len(store.launches()) == 3

    def fill(self, store: Any, *agents: str) -> None:
        for agent in agents:
            ok(
                store,
                PutMail(mail(1, agent)),
                row(f"T{agent}", 1, agent=agent),
                end(f"T{agent}", agent),
                SaveAgent(agent, 4, b"{}", 2, 1),
                EndMail(agent, "s", 1),
                PutMail(mail(2, agent)),
                PutMail(mail(3, agent)),
                BuryMail(agent, "s", 3, "r", "s", 1.0),
                PutTimer(TimerRow(agent, "n", 5.0, b"e")),
                Subscribe("t/a", agent),
                PutMonitor(MonitorRow(agent, "t/z/1")),
                PutMonitor(MonitorRow("t/z/2", agent)),
                SetHold(agent, "quarantined", "story"),
            )

    def test_a_dropped_agent_leaves_its_journal_and_its_chain(self, store: Any) -> None:
        self.fill(store, A, B)
        ends = store.chain_end(A)
        ok(store, DropLaunch(A))
        assert store.agent(A) is None
        assert (
            [r.agent for r in store.agents()] == [r.agent for r in store.agents(held=True)] == [B]
        )
        assert store.count_agents() == 1
        assert store.chain_end(A) == AgentRow(A, sent=4, pos=2, head=ends.head)
        assert store.waiting(A) == store.timers_of(A) == store.monitors(A) == []
        assert [m.receiver for m in store.mail()] == [B]
        assert [t.agent for t in store.timers(before=9.0)] == [B]
        assert store.subscribers("t/a") == [B]
        assert [m.watcher for m in store.monitors("t/z/2")] == [B]
        assert len(store.dead()) == 2
        assert len(store.chain(A)) == 2
        # A message that it handled stays handled; one that waited is forgotten.
        ok(store, PutMail(mail(1)), PutMail(mail(2), limit=1))
        assert [m.seq for m in store.waiting(A)] == [2]
        ok(store, row("T9", agent=A))
        assert store.agent(A).pos == 3
        assert store.agent(A).state is None
        assert store.agent(A).sent == 4
        assert store.agent(A).hold == ""
        ok(store, SaveAgent(A, 2, b"[]", 1, 1))
        assert store.agent(A)[:5] == (A, b"[]", 1, 1, 4)
        self.verify(store, A, B)

    def test_a_dropped_pattern_spares_agents_with_a_launch_of_their_own(self, store: Any) -> None:
        agents = (A, B, "t/p/3", C, "t/p/x/y", "t/p2/1")
        self.fill(store, *agents)
        ok(store, launch(B, "L2"))
        ok(store, DropLaunch("t/p/*"))
        left = sorted([B, C, "t/p/x/y", "t/p2/1"])
        assert [r.agent for r in store.agents()] == left
        assert sorted(m.receiver for m in store.mail()) == left
        assert store.subscribers("t/a") == left
        assert [r.agent for r in store.launches()] == [B]
        ok(store, *(SaveAgent(a, 1) for a in agents))
        assert [r.state for r in store.agents()] == [
            b"{}" if r.agent in left else None for r in store.agents()
        ]

    def test_dropping_and_filling_in_one_commit(self, store: Any) -> None:
        self.fill(store, A, B)
        errors = store.commit(
            [
                [PutMail(mail(5)), SaveAgent(A, 9, b"old"), BeginMail(B, "s", 2, 1, 0, "T", 1)],
                [DropLaunch("t/p/*"), launch("t/p/*", "L2")],
                [EndMail(A, "s", 2)],
                [PutMail(mail(6), limit=1), SaveAgent(A, 1), PutMail(mail(2, B))],
                [PutMail(mail(7), limit=1)],
                [PutTimer(TimerRow(A, "m", 1.0, b"e")), DropTimer(B, "n", 5.0)],
                [Subscribe("t/a", B), PutMonitor(MonitorRow(A, "t/z/1", True))],
            ]
        )
        kinds = [None if e is None else type(e) for e in errors]
        assert kinds == [None, None, AlreadyHandled, None, MailboxFull, None, None]
        assert [(m.receiver, m.seq, m.turn) for m in store.mail()] == [(A, 6, ""), (B, 2, "")]
        assert store.agent(A)[:5] == (A, None, 0, 0, 9)
        assert [t.name for t in store.timers(before=99.0)] == ["m"]
        assert store.subscribers("t/a") == [B]
        assert store.monitors(A) == [MonitorRow(A, "t/z/1", True)]
        assert store.launch_of(A).id == "L2"
        errors = store.commit([[PutMail(mail(8), limit=2)], [PutMail(mail(9), limit=2)]])
        assert errors[0] is None
        assert isinstance(errors[1], MailboxFull)

    # ------------------------------------------------------------ journal

    def test_rows_come_back_as_they_were(self, store: Any) -> None:
        written = row(
            "01ab", 3, "failed", idem_key="k", cause="c/1", part=7, ts=3, elapsed_s=-0.0
        ).row
        ok(store, Append(written))
        (found,) = store.turn("01ab")
        assert found[:19] == written[:19]
        assert (found.pos, found.prev_hash, len(found.hash)) == (1, NO_HASH, 32)
        assert found.tenant == "t"
        assert type(found.args) is bytes
        assert type(found.ts) is float
        self.verify(store, A)

    def test_the_same_row_is_left_out(self, store: Any) -> None:
        ok(store, row("T1", 1, "intent"), row("T1", 1, "intent", result=b"other"))
        ok(store, row("T1", 1, "intent"), row("T1", 1, "result"), row("T1", 1, "result", part=1))
        ok(store, row("T1", 1, "result", part=1), row("T2", 1, "result"))
        rows = store.chain(A)
        assert [(r.turn, r.phase, r.part, r.pos) for r in rows] == [
            ("T1", "intent", 0, 1),
            ("T1", "result", 0, 2),
            ("T1", "result", 1, 3),
            ("T2", "result", 0, 4),
        ]
        assert rows[0].result == "Ženě 漢".encode()
        assert store.agent(A).pos == 4
        assert store.agent(A).head == rows[-1].hash
        self.verify(store, A)

    def test_chains_are_of_agents_and_show_every_change(self, store: Any) -> None:
        for i in range(5):
            ok(store, row(f"T{i}", 1), row(f"U{i}", 1, agent=B), row(f"T{i}", 2))
        rows = store.chain(A)
        assert [r.pos for r in rows] == list(range(1, 11))
        assert [r.pos for r in store.chain(B)] == list(range(1, 6))
        assert [r.pos for r in store.chain(A, after=3, limit=2)] == [4, 5]
        assert store.chain(A, after=10) == store.chain(A, limit=0) == []
        self.verify(store, A, B)
        own = store.agent(A)

        def problems(rows: list[JournalRow], agent: AgentRow | None = own) -> list[tuple[int, str]]:
            return [(f.pos, f.problem) for f in chain.verify(rows, agent)]

        assert problems(rows) == []
        assert problems([*rows[:4], rows[4]._replace(result=b"no"), *rows[5:]]) == [(5, "edited")]
        resealed = chain.seal(rows[4]._replace(result=b"no"), 5, rows[3].hash)
        assert problems([*rows[:4], resealed, *rows[5:]]) == [(6, "missing")]
        assert problems([*rows[:4], *rows[6:]]) == [(5, "missing")]
        assert problems([*rows[:4], rows[5], rows[4], *rows[6:]])[0] == (5, "missing")
        assert (5, "order") in problems([*rows[:4], rows[5], rows[4], *rows[6:]])
        assert problems(rows[:-1]) == [(10, "tail")]
        assert problems([*rows[:-1], chain.seal(rows[-1]._replace(seq=9), 10, rows[8].hash)]) == [
            (11, "tail")
        ]
        assert problems(rows, None) == [(10, "tail")]
        assert problems([]) == [(1, "tail")]
        assert problems([], None) == []

    def test_turns(self, store: Any) -> None:
        for i in range(10):
            agent = (A, B)[i % 2]
            ok(store, end(f"t{i}", agent, f"k#{i}", ts=float(i % 5)), row(f"t{i}", 1, agent=agent))
        ok(store, row("open", 1, ts=99.0), row("marked", 0, "mark", kind="mark", ts=99.0))
        assert [t.turn for t in store.turns(limit=4)] == ["t9", "t4", "t8", "t3"]
        assert [t.turn for t in store.turns(agent=B, limit=2)] == ["t9", "t7"]
        assert [t.turn for t in store.turns(before=1.0)] == ["t5", "t0"]
        assert [t.turn for t in store.turns(before=2.0, agent=A, limit=1)] == ["t6"]
        assert store.turns(agent="none") == store.turns(limit=0) == store.turns(limit=-1) == []
        assert len(store.turns()) == 10
        assert [r.seq for r in store.turn("open")] == [1]
        found = store.turns_rows(["t3", "none", "open", "t3"])
        assert {t: [r.seq for r in rows] for t, rows in found.items()} == {
            "t3": [0, 1],
            "open": [1],
        }
        assert len(store.turns_rows([f"t{i}" for i in range(500)])) == 10
        assert store.handled(A, "k#2").turn == "t2"
        assert store.handled(B, "k#2") is store.handled(A, "k#3") is None

    def test_a_unique_prefix_finds_a_turn(self, store: Any) -> None:
        ok(store, *(row(t, 1) for t in ("abc1", "abc2", "ab", "%_x", "é1")), row("abc2", 2))
        assert [r.seq for r in store.turn("abc2")] == [1, 2]
        for prefix, turn in (("ab", "ab"), ("%", "%_x"), ("abc1", "abc1"), ("é", "é1")):
            assert store.turn(prefix)[0].turn == turn
        for prefix in ("abc", "a", "", "_", "b", "abc11"):
            assert store.turn(prefix) == []

    def test_blobs(self, store: Any) -> None:
        ok(store, PutBlob("b1", bytes(range(256)) * 1000), PutBlob("b1", b"other"))
        ok(store, PutBlob("b1", b"other"), PutBlob("b2", b""))
        assert store.blob("b1") == bytes(range(256)) * 1000
        assert store.blob("b2") == b""

    # ------------------------------------------------------------ agents

    def test_agents(self, store: Any) -> None:
        ok(store, *(SaveAgent(f"t/p/{k}", 1, b"s", 3, 2) for k in ("b", "a", "É", "B", "漢")))
        names = ["t/p/B", "t/p/a", "t/p/b", "t/p/É", "t/p/漢"]
        assert [r.agent for r in store.agents()] == names
        assert [r.agent for r in store.agents(after="t/p/a", limit=2)] == names[2:4]
        assert store.agents(limit=0) == []
        assert store.count_agents() == 5
        assert store.agent("t/p/a") == AgentRow("t/p/a", b"s", 3, 2, 1)
        ok(store, SaveAgent("t/p/a", 7))
        assert store.agent("t/p/a") == AgentRow("t/p/a", b"s", 3, 2, 7)
        ok(store, SaveAgent("t/p/a", 5, b"", 4, 3))
        assert store.agent("t/p/a") == AgentRow("t/p/a", b"", 4, 3, 7)

    def test_holds(self, store: Any) -> None:
        ok(store, SetHold(A, ""))
        assert store.agent(A) is None
        ok(store, SetHold(A, "quarantined", "story"), SaveAgent(B, 1, b"s"), SetHold(C, "x"))
        assert [(r.agent, r.hold, r.story) for r in store.agents(held=True)] == [
            (A, "quarantined", "story"),
            (C, "x", ""),
        ]
        assert [r.agent for r in store.agents(held=True, after=A, limit=1)] == [C]
        ok(store, SetHold(A, ""), SaveAgent(C, 1, b"s"))
        assert store.agent(A) == AgentRow(A)
        assert [r.agent for r in store.agents(held=True)] == [C]
        assert store.agent(C).state == b"s"

    # ------------------------------------------------------------ mail

    def test_mail_waits_in_the_order_of_arrival(self, store: Any) -> None:
        full = mail(1, B, priority=-3, not_before=2.5, attempts=1, deaths=2, turn="T", epoch=4)
        ok(store, PutMail(mail(2)), PutMail(full), PutMail(mail(1)))
        found = store.mail()
        assert [m.key for m in found] == [(A, "s", 2), (B, "s", 1), (A, "s", 1)]
        assert found[1] == full._replace(arrival=found[1].arrival)
        arrivals = [m.arrival for m in found]
        assert arrivals == sorted(set(arrivals))
        assert arrivals[0] > 0
        assert store.mail(after=arrivals[0], limit=1) == [found[1]]
        assert store.mail(after=arrivals[-1]) == store.mail(limit=0) == []
        assert [m.seq for m in store.waiting(A)] == [2, 1]

    def test_arrivals_only_grow(self, tmp_path: Path) -> None:
        store = self.make(tmp_path)
        last = 0
        for seq in range(1, 4):
            ok(store, PutMail(mail(seq)))
            (found,) = store.mail()
            assert found.arrival > last
            last = found.arrival
            ok(store, EndMail(A, "s", seq))
            store.close()
            store = self.again(store, tmp_path)
        store.close()

    def test_a_message_that_comes_again_is_left_out(self, store: Any) -> None:
        ok(store, PutMail(mail(1)), PutMail(mail(1, envelope=b"again")))
        ok(store, PutMail(mail(1, envelope=b"again"), limit=1))
        assert [m.envelope for m in store.mail()] == [b"\x00e"]
        ok(store, end(), EndMail(A, "s", 1))
        ok(store, PutMail(mail(1)))
        ok(store, PutMail(mail(2)), BuryMail(A, "s", 2, "r", "s", 1.0))
        ok(store, PutMail(mail(2)))
        assert store.mail() == []
        assert store.handled(A, "s#1").turn == "T1"
        # All of it in one commit.
        store.commit(
            [
                [PutMail(mail(3)), end("T3", key="s#3"), EndMail(A, "s", 3), PutMail(mail(3))],
                [PutMail(mail(3))],
                [PutMail(mail(4)), BuryMail(A, "s", 4, "", "", 0.0), PutMail(mail(4))],
                [PutMail(mail(4))],
            ]
        )
        assert store.mail() == []
        # Another receiver's or another stream's is another one.
        ok(store, PutMail(mail(1, B)), PutMail(mail(1, A, "s2")))
        assert len(store.mail()) == 2

    def test_only_the_end_of_a_turn_says_that_a_message_was_handled(self, store: Any) -> None:
        ok(store, row("T1", 1, idem_key="s#1"), row("T1", 0, "mark", kind="m", idem_key="s#1"))
        ok(store, PutMail(mail(1)))
        assert len(store.mail()) == 1
        # Acknowledged without a turn: forgotten, so it may come again.
        ok(store, EndMail(A, "s", 1))
        ok(store, PutMail(mail(1)))
        assert len(store.mail()) == 1

    def test_a_full_mailbox(self, store: Any) -> None:
        for seq in range(3):
            ok(store, PutMail(mail(seq), limit=3))
        error = one(store, PutMail(mail(9, B)), PutMail(mail(3), limit=3))
        assert isinstance(error, MailboxFull)
        assert (error.agent, error.waiting) == (A, 3)
        assert store.waiting(B) == []
        ok(store, PutMail(mail(2), limit=3))
        ok(store, PutMail(mail(1, B), limit=1))
        ok(store, EndMail(A, "s", 0), PutMail(mail(3), limit=3))
        assert isinstance(one(store, PutMail(mail(4), limit=3), EndMail(A, "s", 1)), MailboxFull)
        ok(store, BuryMail(A, "s", 1, "", "", 0.0))
        ok(store, PutMail(mail(4), limit=3))
        ok(store, PutMail(mail(5)))
        assert len(store.waiting(A)) == 4

    def test_the_limit_counts_what_was_there_before(self, tmp_path: Path) -> None:
        store = self.make(tmp_path)
        ok(store, PutMail(mail(1)), PutMail(mail(2)))
        store.close()
        store = self.again(store, tmp_path)
        assert isinstance(one(store, PutMail(mail(3), limit=2)), MailboxFull)
        ok(store, EndMail(A, "s", 1))
        ok(store, PutMail(mail(3), limit=2))
        store.close()

    def test_beginning_replaces_the_counters(self, store: Any) -> None:
        ok(store, PutMail(mail(1, priority=2)), PutMail(mail(2)))
        first = store.mail()[0]
        ok(store, BeginMail(A, "s", 1, 3, 1, "T", 7, 8.5), BeginMail(A, "s", 9, 1, 1, "T", 1))
        assert store.mail()[0] == first._replace(
            attempts=3, deaths=1, turn="T", epoch=7, not_before=8.5
        )
        ok(store, PutMail(mail(3)), BeginMail(A, "s", 3, 1, 0, "U", 1))
        ok(store, BeginMail(A, "s", 1, 4, 1, "V", 7), BeginMail(A, "s", 1, 5, 1, "W", 7))
        assert [(m.seq, m.attempts, m.turn) for m in store.mail()] == [
            (1, 5, "W"),
            (2, 0, ""),
            (3, 1, "U"),
        ]

    def test_a_message_is_acknowledged_once(self, store: Any) -> None:
        ok(store, PutMail(mail(1)))
        ok(store, end("T1"), SaveAgent(A, 1, b"1"), EndMail(A, "s", 1))
        error = one(store, end("T2"), SaveAgent(A, 1, b"2"), EndMail(A, "s", 1))
        assert isinstance(error, AlreadyHandled)
        assert (error.agent, error.message) == (A, "s#1")
        assert isinstance(one(store, EndMail(A, "s", 1)), AlreadyHandled)
        assert store.agent(A).state == b"1"
        assert store.turn("T2") == []

    def test_the_end_of_a_turn_that_comes_again_is_left_out(self, store: Any) -> None:
        ok(store, PutMail(mail(1)), PutMail(mail(1, B)), row("T1", 1))
        part: Part = [
            Own(A, 1),
            row("T1", 2),
            end("T1"),
            SaveAgent(A, 2, b"1", 1, 1),
            PutMail(mail(5, B, A), limit=2),
            EndMail(A, "s", 1),
        ]
        assert store.commit([part, part]) == [None, None]
        # What came after it stays, and what then would be refused is not asked for.
        ok(store, SaveAgent(A, 3, b"2", 1, 2), EndMail(B, A, 5), PutMail(mail(2, B)))
        before = everything(store)
        assert store.commit([part]) == [None]
        assert everything(store) == before
        assert isinstance(one(store, Own(A, 2), *part[1:]), StaleEpoch)
        self.verify(store, A)

    def test_dead_letters(self, store: Any) -> None:
        for seq in range(1, 5):
            ok(store, PutMail(mail(seq, attempts=5, deaths=1, turn="T", not_before=3.0)))
        for seq in (2, 1, 3):
            bury = BuryMail(A, "s", seq, f"reason {seq}", "story", 2.5)
            ok(store, bury, bury)
            ok(store, bury)
        ok(store, BuryMail(A, "s", 99, "", "", 0.0))
        letters = store.dead()
        assert [(d.mail.seq, d.reason, d.story, d.died_at) for d in letters] == [
            (3, "reason 3", "story", 2.5),
            (1, "reason 1", "story", 2.5),
            (2, "reason 2", "story", 2.5),
        ]
        assert letters[0].mail.attempts == 5
        assert store.dead(limit=1) == letters[:1]
        assert [m.seq for m in store.mail()] == [4]
        assert isinstance(one(store, EndMail(A, "s", 2)), AlreadyHandled)
        last = store.mail()[0].arrival
        ok(store, ReviveDead(letters[2].id), ReviveDead(letters[2].id), ReviveDead(10**9))
        ok(store, ReviveDead(letters[2].id), DropDead(letters[1].id), DropDead(letters[1].id))
        assert [d.mail.seq for d in store.dead()] == [3]
        again = store.mail()[-1]
        assert again.arrival > last
        assert again == mail(2, attempts=5, turn="T", arrival=again.arrival)
        assert isinstance(one(store, PutMail(mail(9), limit=2)), MailboxFull)
        ok(store, PutMail(mail(1)))
        assert [m.seq for m in store.mail()] == [4, 2, 1]
        ok(store, BuryMail(A, "s", 2, "twice", "", 9.0))
        assert [d.reason for d in store.dead()] == ["twice", "reason 3"]
        assert store.dead()[0].id > letters[0].id

    def test_dead_letters_in_one_commit(self, store: Any) -> None:
        ok(store, PutMail(mail(1)), BuryMail(A, "s", 1, "r", "", 0.0))
        (letter,) = store.dead()
        ok(
            store,
            ReviveDead(letter.id),
            BeginMail(A, "s", 1, 1, 0, "T", 1),
            BuryMail(A, "s", 1, "again", "", 0.0),
            PutMail(mail(1)),
        )
        assert [d.reason for d in store.dead()] == ["again"]
        ok(store, DropDead(store.dead()[0].id), PutMail(mail(1)), EndMail(A, "s", 1))
        assert store.dead() == store.mail() == []

    # ------------------------------------------------------------ timers, topics, monitors

    def test_timers(self, store: Any) -> None:
        noon = TimerRow(A, "noon", 12.0, b"e", "0 12 * * *", "Europe/Prague")
        ok(store, PutTimer(noon), PutTimer(TimerRow(B, "b", 5.0, b"f")))
        ok(store, PutTimer(TimerRow(A, "a", 5, b"g")))
        assert [(t.agent, t.name) for t in store.timers(before=13.0)] == [
            (A, "a"),
            (B, "b"),
            (A, "noon"),
        ]
        assert store.timers(before=5.0) == store.timers(before=99, limit=0) == []
        assert len(store.timers(before=12.0)) == 2
        assert len(store.timers(before=99.0, limit=1)) == 1
        assert store.timers_of(A) == [TimerRow(A, "a", 5.0, b"g"), noon]
        ok(store, PutTimer(noon._replace(due=36.0)))
        ok(store, DropTimer(A, "noon", 12.0), DropTimer(A, "x"), DropTimer(A, "y", 1.0))
        assert store.timers_of(A)[1].due == 36.0
        ok(store, DropTimer(A, "noon", 36.0), DropTimer(B, "b"))
        assert [t.name for t in store.timers(before=99.0)] == ["a"]
        ok(
            store,
            PutTimer(noon),
            DropTimer(A, "noon", 1.0),
            DropTimer(A, "a"),
            DropTimer(A, "a", 5),
        )
        assert store.timers(before=99.0) == [noon]

    def test_a_timer_fires_only_as_it_is(self, store: Any) -> None:
        """What was replaced, cancelled or fired meanwhile is not fired, nor set again."""
        noon = TimerRow(A, "noon", 12.0, b"e", "0 12 * * *", "UTC")
        ok(store, PutTimer(noon))
        again = PutTimer(noon._replace(due=36.0))
        parts = [
            [TakeTimer(A, "noon", 11.0), again],
            [TakeTimer(A, "noon", 12.0), again],
            [TakeTimer(A, "noon", 12.0), again],
            [DropTimer(A, "noon")],
            [TakeTimer(A, "noon", 36.0), PutTimer(noon._replace(due=60.0))],
        ]
        results = store.commit(parts)
        assert [type(r) for r in results] == [
            AlreadyHandled,
            type(None),
            AlreadyHandled,
            type(None),
            AlreadyHandled,
        ]
        assert store.timers(before=99.0) == []

    def test_topics(self, store: Any) -> None:
        ok(
            store,
            Subscribe("t/a", B),
            Subscribe("t/a", A),
            Subscribe("t/a", A),
            Subscribe("t/b", C),
        )
        ok(store, Subscribe("t/a", A))
        assert store.subscribers("t/a") == [A, B]
        assert store.subscribers("t/b") == [C]
        ok(store, Unsubscribe("t/a", A), Unsubscribe("t/a", A), Unsubscribe("t/c", A))
        ok(store, Subscribe("t/b", A), Unsubscribe("t/b", A), Subscribe("t/b", A))
        assert store.subscribers("t/a") == [B]
        assert store.subscribers("t/b") == [A, C]

    def test_monitors(self, store: Any) -> None:
        ok(store, PutMonitor(MonitorRow(A, C)), PutMonitor(MonitorRow(A, B, True)))
        assert store.monitors(A) == [MonitorRow(A, B, True), MonitorRow(A, C, False)]
        assert store.monitors(B) == []
        ok(store, PutMonitor(MonitorRow(A, B)), DropMonitor(A, C), DropMonitor(A, "x"))
        assert store.monitors(A) == [MonitorRow(A, B, False)]

    # ------------------------------------------------------------ values

    @pytest.mark.parametrize(
        "write",
        [
            PutMail(mail(1, "t/p/\ud800")),
            PutMail(mail(1, "t/p/\0")),
            PutMail(mail(2**70)),
            PutMail(mail(-(2**63) - 1)),
            PutMail(mail(1, not_before=float("nan"))),
            PutMail(mail(1, envelope="text")),
            PutMail(mail(1, envelope=bytearray(b"x"))),
            PutMail(mail(True)),
            PutMail(mail(1, stream="s" * 1100)),
            PutMail(mail(1, stream=None)),  # type: ignore[arg-type]
            row(result=None),
            row(idem_key="a\0b"),
            row(name="\udfff"),
            row(ts="now"),
            row("é" * 600),
            SaveAgent(A, 1, "text"),  # type: ignore[arg-type]
            SaveAgent("\ud800", 1),
            EndMail("\ud800", "s", 1),
            BuryMail(A, "s", 1, "\0", "", 0.0),
            TakeShards((SHARDS,), 1),
            TakeShards((-1,), 1),
            PutTimer(TimerRow("\0", "n", 1.0, b"")),
            Subscribe("t", "\ud800"),
            DropTimer(A, "n", float("nan")),
            "no write",
        ],
    )
    def test_a_value_that_no_store_holds_refuses_its_part_alone(
        self, store: Any, write: Any
    ) -> None:
        good: Part = [PutMail(mail(7)), row("good")]
        errors = store.commit([good, [SetHold(A, "x"), write, SetHold(B, "x")], [PutMail(mail(8))]])
        assert [type(e) for e in errors] == [type(None), StoreUnavailable, type(None)]
        assert [m.seq for m in store.mail()] == [7, 8]
        assert store.agents(held=True) == []

    def test_values_at_their_limits(self, store: Any) -> None:
        big = 2**63 - 1
        ok(
            store,
            PutMail(mail(big, priority=-(2**63), not_before=float("inf"), stream="s" * 1000)),
            row("T" * 1000, 1, idem_key="k" * 1000, ts=1e300, name="n" * 100_000),
            end("U" * 1000, key="k" * 1024),
            SaveAgent(A, big, bytes(300_000), 0, 0),
        )
        (found,) = store.mail()
        assert (found.seq, found.priority, found.not_before) == (big, -(2**63), float("inf"))
        assert store.agent(A).sent == big
        self.verify(store, A)

    # ------------------------------------------------------------ the store

    def test_closed_is_closed(self, store: Any, tmp_path: Path) -> None:
        store.close()
        store.close()
        for call in (
            lambda: store.commit([[PutMail(mail(1))]]),
            store.launches,
            lambda: store.launch_of(A),
            store.shards,
            lambda: store.agent(A),
            lambda: store.chain_end(A),
            store.agents,
            store.count_agents,
            store.mail,
            lambda: store.waiting(A),
            store.dead,
            lambda: store.timers(before=1.0),
            lambda: store.timers_of(A),
            lambda: store.subscribers("t"),
            lambda: store.monitors(A),
            store.turns,
            lambda: store.turn("T"),
            lambda: store.turns_rows(["T"]),
            lambda: store.turns_rows([]),
            lambda: store.handled(A, "s#1"),
            lambda: store.chain(A),
            lambda: store.blob("b"),
            lambda: store.backup(tmp_path / "closed"),
        ):
            with pytest.raises(StoreUnavailable, match="closed"):
                call()

    def test_everything_is_there_again(self, tmp_path: Path) -> None:
        store = self.make(tmp_path)
        ok(store, ALL, launch(), launch(C, "L2"), PutBlob("b1", b"x"))
        self.fill(store, A, B, C)
        ok(store, DropLaunch(C), row("open", 1, "intent"))
        before = everything(store)
        store.close()
        store = self.again(store, tmp_path)
        assert everything(store) == before
        ok(store, row("open", 1, "intent"), row("open", 1))
        assert len(store.turn("open")) == 2
        assert isinstance(one(store, EndMail(A, "s", 1)), AlreadyHandled)
        ok(store, PutMail(mail(1)), PutMail(mail(3)))
        assert [m.seq for m in store.waiting(A)] == [2]
        self.verify(store, A, B, C)
        store.close()

    def test_threads_commit_and_read_together(self, store: Any) -> None:
        def work(i: int) -> bool:
            agent = f"t/p/{i % 7}"
            for n in range(5):
                seq = i * 10 + n
                ok(store, Own(agent, 1, "L1"), PutMail(mail(seq, agent)))
                part = [row(f"{seq}", 1, agent=agent), end(f"{seq}", agent, f"s#{seq}")]
                ok(store, *part, SaveAgent(agent, seq, b"%d" % seq), EndMail(agent, "s", seq))
                if store.handled(agent, f"s#{seq}") is None or len(store.turn(f"{seq}")) != 2:
                    return False
            return True

        with ThreadPoolExecutor(8) as pool:
            assert all(pool.map(work, range(1, 29)))
        assert len(store.turns(limit=1000)) == 140
        assert store.mail() == []
        assert sum(r.pos for r in store.agents()) == 280
        self.verify(store, *(f"t/p/{i}" for i in range(7)))

    def test_a_backup_is_a_store(self, store: Any, tmp_path: Path) -> None:
        from llmos.drivers.stores.sqlite import SqliteStore

        ok(store, launch(C, "L2"), PutBlob("b1", b"x" * 5000), SaveAgent(B, 1))
        self.fill(store, A, C, "t/p/3")
        ok(store, DropLaunch(C), row("open", 1, "intent"))
        ok(store, PutMail(mail(50)), end("T50", key="s#50"), EndMail(A, "s", 50))
        before = everything(store)
        target = tmp_path / "copy.db"
        assert store.backup(target) == target.stat().st_size > 5000
        with pytest.raises(StoreUnavailable, match="exists"):
            store.backup(target)
        with pytest.raises(StoreUnavailable):
            store.backup(tmp_path / "none" / "copy.db")
        ok(store, PutMail(mail(60)))
        fresh = MemoryStore()
        restore(target, fresh)
        assert everything(fresh) == before
        with pytest.raises(StoreUnavailable, match="not empty"):
            restore(target, store)
        restore(target, tmp_path / "new" / "store.db")
        opened = SqliteStore(tmp_path / "new" / "store.db")
        assert everything(opened) == before
        opened.close()
        opened = SqliteStore(target)
        assert everything(opened) == before
        for other in (fresh, opened):
            ok(other, PutMail(mail(70)))
            assert other.waiting(A)[-1].arrival == store.waiting(A)[-1].arrival
            self.verify(other, A, B, C)
        opened.close()
        left = {p.name for p in tmp_path.iterdir()} - {"copy.db", "copy.db.lock", "new"}
        assert not [name for name in left if "copy" in name]

    def test_restoring_into_a_new_store_of_this_kind(self, tmp_path: Path) -> None:
        source = MemoryStore()
        ok(source, ALL, launch(), launch(C, "L2"), PutBlob("b1", b"x"))
        self.fill(source, A, B, C)
        ok(source, DropLaunch(C), PutMail(mail(80)), row("open", 1))
        source.backup(tmp_path / "copy.db")
        store = self.make(tmp_path)
        restore(tmp_path / "copy.db", store)
        assert everything(store) == everything(source)
        for other in (store, source):
            ok(
                other,
                Own(A, 1, "L1"),
                PutMail(mail(1)),
                PutMail(mail(90)),
                row("open", 1),
                row("open", 2),
            )
            assert isinstance(one(other, PutMail(mail(91), limit=3)), MailboxFull)
        assert everything(store) == everything(source)
        store.close()
        store = self.again(store, tmp_path)
        assert everything(store) == everything(source)
        self.verify(store, A, B, C)
        store.close()

    def test_a_backup_while_commits_go_on(self, store: Any, tmp_path: Path) -> None:
        stop = threading.Event()
        done = []

        def work() -> None:
            seq = 0
            while not stop.is_set():
                seq += 1
                ok(store, PutMail(mail(seq)))
                ok(store, end(f"T{seq}", key=f"s#{seq}"), SaveAgent(A, seq), EndMail(A, "s", seq))
                done.append(seq)
                # Or a store in memory grows faster than it can be copied and verified.
                stop.wait(0.001)

        worker = threading.Thread(target=work)
        worker.start()
        try:
            for i in range(3):
                while len(done) < 20 * (i + 1):
                    stop.wait(0.005)
                at_least = len(done)
                store.backup(tmp_path / f"{i}.db")
                copy = MemoryStore()
                restore(tmp_path / f"{i}.db", copy)
                self.verify(copy, A)
                assert len(copy.turns(limit=10**6)) == copy.agent(A).sent >= at_least
                assert len(copy.mail()) <= 1
        finally:
            stop.set()
            worker.join()
