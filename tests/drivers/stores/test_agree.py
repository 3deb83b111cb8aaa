"""Whatever is written, in whatever order: all stores answer and look like the plain model."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmos.drivers.stores import chain
from llmos.drivers.stores.memory import MemoryStore
from llmos.drivers.stores.rows import (
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
from llmos.drivers.stores.sqlite import SqliteStore
from tests.drivers.stores.model import Model, seen

EXAMPLES = 150

AGENTS = ["t/p/a", "t/p/b", "t/p/c/d", "t/q/a"]
TOPICS = ["t/x", "t/y"]
BLOBS = ["b1", "b2"]
SHARDS = tuple({shard_of(a) for a in AGENTS})

agent = st.sampled_from(AGENTS)
launched = st.sampled_from([*AGENTS, "t/p/*", "t/q/*", "t/p/c/*"])
small = st.integers(1, 3)
data = st.binary(max_size=2)
number = st.sampled_from([0.0, 1.0, 2.5])
text = st.sampled_from(["", "x", "Ž"])
turn = st.sampled_from(["T1", "T2", "T3", "T"])
stream = st.sampled_from(["s", "u"])


def journal_row(
    agent: str, turn: str, end: bool, seq: int, phase: str, stream: str, number: int, ts: float
) -> Append:
    if end:
        return Append(
            JournalRow(agent, turn, 0, "result", "turn", "k", idem_key=f"{stream}#{number}", ts=ts)
        )
    return Append(JournalRow(agent, turn, seq, phase, "K", "k", ts=ts, part=number % 2))


row = st.builds(
    journal_row,
    agent,
    turn,
    st.booleans(),
    small,
    st.sampled_from(["intent", "result"]),
    stream,
    small,
    number,
)
mail_row = st.builds(
    lambda *values: MailRow(*values), agent, stream, small, data, st.integers(0, 1)
)
end_mail = st.builds(EndMail, agent, stream, small)
put_mail = st.builds(PutMail, mail_row, st.sampled_from([0, 1, 2]))
write: st.SearchStrategy[Any] = st.one_of(
    st.builds(Own, agent, st.sampled_from([1, 1, 2]), st.sampled_from(["", "", "L1", "L2"])),
    st.builds(TakeShards, st.sampled_from([SHARDS, SHARDS[:1]]), st.sampled_from([1, 1, 2])),
    st.builds(
        PutLaunch, st.builds(LaunchRow, launched, text, data, st.sampled_from(["L1", "L2"]), number)
    ),
    st.builds(DropLaunch, launched),
    row,
    row,
    st.builds(PutBlob, st.sampled_from(BLOBS), data),
    st.builds(SaveAgent, agent, small, st.none() | data, small, small),
    st.builds(SetHold, agent, text, text),
    put_mail,
    put_mail,
    put_mail,
    st.builds(BeginMail, agent, stream, small, small, small, turn, small, number),
    end_mail,
    end_mail,
    st.builds(BuryMail, agent, stream, small, text, text, number),
    st.builds(ReviveDead, small),
    st.builds(DropDead, small),
    st.builds(PutTimer, st.builds(lambda *v: TimerRow(*v), agent, text, number, data)),
    st.builds(DropTimer, agent, text, st.none() | number),
    st.builds(TakeTimer, agent, text, number),
    st.builds(Subscribe, st.sampled_from(TOPICS), agent),
    st.builds(Unsubscribe, st.sampled_from(TOPICS), agent),
    st.builds(PutMonitor, st.builds(MonitorRow, agent, agent, st.booleans())),
    st.builds(DropMonitor, agent, agent),
)
first = [[TakeShards(SHARDS, 1), PutLaunch(LaunchRow("t/p/*", "m:C", b"", "L1", 0.0))]]
groups = st.lists(
    st.lists(st.lists(write, min_size=1, max_size=5), min_size=1, max_size=8),
    min_size=1,
    max_size=5,
).map(lambda found: [first, *found])


def answers(store: Any, parts: Any) -> list[str | None]:
    return [None if e is None else type(e).__name__ for e in store.commit(parts)]


def agree(groups: Any, open_store: Callable[[], Any]) -> None:
    model, memory, store = Model(), MemoryStore(), open_store()
    try:
        for parts in groups:
            expected = model.commit(parts)
            assert answers(memory, parts) == expected
            assert answers(store, parts) == expected
            assert seen(memory, AGENTS, TOPICS, BLOBS) == model.visible()
        assert seen(store, AGENTS, TOPICS, BLOBS) == model.visible()
        store.close()
        store, memory = open_store(), memory.reopen()
        assert seen(store, AGENTS, TOPICS, BLOBS) == model.visible()
        for parts in groups:
            expected = model.commit(parts)
            assert answers(store, parts) == expected
            assert answers(memory, parts) == expected
        assert seen(store, AGENTS, TOPICS, BLOBS) == model.visible()
        assert seen(memory, AGENTS, TOPICS, BLOBS) == model.visible()
        for name in AGENTS:
            assert store.turns(agent=name) == memory.turns(agent=name)
            assert store.chain(name) == memory.chain(name)
            assert chain.verify_agent(store, name) == []
        assert store.turns() == memory.turns()
    finally:
        store.close()


@settings(max_examples=EXAMPLES, deadline=None)
@given(groups)
def test_memory_and_sqlite_agree_with_the_model(groups: Any) -> None:
    with tempfile.TemporaryDirectory() as folder:
        agree(groups, lambda: SqliteStore(Path(folder) / "s.db"))


@settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(groups=groups)
def test_postgres_agrees_with_the_model(database: Callable[[], str], groups: Any) -> None:
    pytest.importorskip("psycopg")
    from llmos.drivers.stores.postgres import PostgresStore

    url = database()
    agree(groups, lambda: PostgresStore(url))
