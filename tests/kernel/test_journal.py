from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from llmos.drivers.errors import LlmosError, StaleEpoch, StoreUnavailable
from llmos.drivers.protocols import Store
from llmos.drivers.stores.rows import (
    SHARDS,
    AgentRow,
    Append,
    JournalRow,
    LaunchRow,
    Own,
    Part,
    PutBlob,
    PutLaunch,
    SaveAgent,
    SetHold,
    TakeShards,
    Write,
)
from llmos.kernel import journal, record
from llmos.kernel.journal import JournalServer
from llmos.syscalls.errors import Busy, InvalidRequest


class Counting:
    """A store in front of the real one: counts commits, and can be held up or broken."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.groups: list[int] = []
        """Parts of each commit."""
        self.gate = threading.Event()
        self.gate.set()
        self.breaks_on: bytes | None = None
        self.broken: Exception = ZeroDivisionError("a bug in the store")

    def commit(self, parts: Sequence[Part]) -> Sequence[LlmosError | None]:
        assert self.gate.wait(5)
        self.groups.append(len(parts))
        for part in parts:
            for write in part:
                if isinstance(write, SaveAgent) and write.state == self.breaks_on:
                    raise self.broken
        return self._store.commit(parts)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)


def launched(agent: str) -> PutLaunch:
    return PutLaunch(LaunchRow(agent, "m:Desk", b"\x80", f"id of {agent}", 1.0))


def turn(agent: str, number: int, **given: Any) -> JournalRow:
    row = JournalRow(
        agent, f"{number:04d}", 0, "result", "turn", "Hi", result=b"{}", ts=float(number)
    )
    return row._replace(**given)


class Bench:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.server = JournalServer(
            "journal", "sqlite", str(folder / "store.db"), str(folder), "INFO"
        )
        self.store = Counting(self.server._store)
        self.server._store = self.store

    async def commit(self, *writes: Write) -> Any:
        """What becomes of one part: None, or a typed error."""
        answer = await self.server.commit([writes])
        assert isinstance(answer, list | LlmosError)
        return answer[0] if isinstance(answer, list) else answer


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    made = Bench(tmp_path)
    await made.server.ready()
    await made.server.ready()
    yield made
    await made.server.close()
    assert made.server._writer is not None
    made.server._writer.cancel()
    made.server._writing.shutdown()
    made.server._reading.shutdown()


async def held_up(bench: Bench) -> asyncio.Task[Any]:
    """A commit that is under way and does not end before the gate is opened."""
    bench.store.gate.clear()
    first = asyncio.create_task(bench.commit(launched("a/first/x")))
    await asyncio.sleep(0.01)
    return first


async def test_what_was_committed_can_be_read(bench: Bench) -> None:
    call = JournalRow("a/b/c", "0001", 1, "result", "Now", "", result=b"{}")
    assert await bench.commit(launched("a/b/c")) is None
    end = turn("a/b/c", 1)
    assert await bench.commit(Append(call), Append(end), SaveAgent("a/b/c", 0, b"{}", 1, 1)) is None
    ((launch, row), nobody) = await bench.server.activate(["a/b/c", "a/b/none"])
    assert launch == launched("a/b/c").row
    assert (row.agent, row.state, row.changes, row.pos) == ("a/b/c", b"{}", 1, 2)
    assert nobody == (None, None)
    assert await bench.server.read("launches") == [launched("a/b/c").row]
    (found,) = await bench.server.read("turns", limit=10)
    assert (found.turn, found.kind) == ("0001", "turn")
    assert [r.seq for r in await bench.server.read("turn", "0001")] == [1, 0]
    assert (await bench.server.read("turns_rows", ["0001"])).keys() == {"0001"}


async def test_only_what_reads_is_reached_from_outside(bench: Bench) -> None:
    for method in ("commit", "close", "__init__", "no_such_method"):
        assert isinstance(await bench.server.read(method), InvalidRequest)


async def test_long_columns_come_back_whole_but_for_the_chain(bench: Bench) -> None:
    """A chain's hashes are over the rows as they are kept."""
    digest, reference = record.blob_of(b"x" * 9000)
    row = JournalRow("a/b/c", "0001", 1, "result", "Now", "", result=reference)
    end = turn("a/b/c", 1, result=reference, idem_key="s#1")
    await bench.commit(launched("a/b/c"), PutBlob(digest, b"x" * 9000), Append(row), Append(end))
    assert [r.result for r in await bench.server.read("turn", "0001")] == [b"x" * 9000] * 2
    assert (await bench.server.read("turns", limit=1))[0].result == b"x" * 9000
    assert (await bench.server.read("turns_rows", ["0001"]))["0001"][0].result == b"x" * 9000
    assert (await bench.server.read("handled", "a/b/c", "s#1")).result == b"x" * 9000
    assert await bench.server.read("handled", "a/b/c", "s#2") is None
    assert [r.result for r in await bench.server.read("chain", "a/b/c")] == [reference] * 2


async def test_all_who_wait_share_one_commit(bench: Bench) -> None:
    first = await held_up(bench)
    rest = [asyncio.create_task(bench.commit(launched(f"a/b/{n}"))) for n in range(50)]
    await asyncio.sleep(0.01)
    bench.store.gate.set()
    assert set(await asyncio.gather(first, *rest)) == {None}
    assert bench.store.groups == [1, 50]
    assert len(await bench.server.read("launches")) == 51


async def test_a_group_is_bounded(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "MAX_GROUP", 20)
    first = await held_up(bench)
    rest = [asyncio.create_task(bench.commit(launched(f"a/b/{n}"))) for n in range(50)]
    await asyncio.sleep(0.01)
    bench.store.gate.set()
    await asyncio.gather(first, *rest)
    assert bench.store.groups == [1, 20, 20, 10]


async def test_one_stale_owner_does_not_fail_the_others(bench: Bench) -> None:
    await bench.commit(launched("a/b/c"), TakeShards(tuple(range(SHARDS)), 5))
    first = await held_up(bench)

    def ended(number: int, epoch: int, state: bytes) -> asyncio.Task[Any]:
        own = Own("a/b/c", epoch)
        save = SaveAgent("a/b/c", 0, state, 1, number)
        row = turn("a/b/c", number, epoch=epoch)
        return asyncio.create_task(bench.commit(own, Append(row), save))

    tasks = [ended(1, 5, b"1"), ended(2, 4, b"2"), ended(3, 5, b"3")]
    await asyncio.sleep(0.01)
    bench.store.gate.set()
    await first
    good, stale, also_good = await asyncio.gather(*tasks)
    assert (good, also_good) == (None, None)
    assert isinstance(stale, StaleEpoch)
    assert (stale.agent, stale.epoch, stale.current) == ("a/b/c", 4, 5)
    assert bench.store.groups[-1] == 3
    row: AgentRow = await bench.server.read("agent", "a/b/c")
    assert (row.state, row.changes) == (b"3", 3)
    assert [t.turn for t in await bench.server.read("turns", limit=10)] == ["0003", "0001"]


async def test_a_call_of_many_parts_has_a_result_for_each(bench: Bench) -> None:
    await bench.commit(TakeShards(tuple(range(SHARDS)), 5))
    parts: list[Part] = [[Own("a/b/c", epoch), launched(f"a/b/{epoch}")] for epoch in (5, 4, 5)]
    results = await bench.server.commit(parts)
    assert [type(r) for r in results] == [type(None), StaleEpoch, type(None)]  # type: ignore[union-attr]


async def test_a_bug_in_the_store_fails_its_group_and_not_the_writer(bench: Bench) -> None:
    await bench.commit(launched("a/b/c"))
    for broken in (ZeroDivisionError("a bug"), StoreUnavailable("store", "disk full")):
        bench.store.breaks_on, bench.store.broken = b"poison", broken
        first = await held_up(bench)
        poison = asyncio.create_task(bench.commit(SaveAgent("a/b/c", 0, b"poison", 1, 1)))
        await asyncio.sleep(0.01)
        bench.store.gate.set()
        async with asyncio.timeout(5):
            await first
            refused = await poison
        assert isinstance(refused, StoreUnavailable)
        assert str(broken.args[0]) in str(refused)
        # Who comes after is served.
        assert await bench.commit(SaveAgent("a/b/c", 0, b"fine", 1, 1)) is None


async def test_too_many_waiting_writes_are_answered_busy(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal, "MAX_WAITING", 3)
    first = await held_up(bench)
    waiting = [asyncio.create_task(bench.commit(launched(f"a/b/{n}"))) for n in range(3)]
    await asyncio.sleep(0.01)
    refused = await bench.commit(launched("a/b/more"))
    assert isinstance(refused, Busy)
    assert refused.waiting == 3
    bench.store.gate.set()
    assert set(await asyncio.gather(first, *waiting)) == {None}
    assert await bench.commit(launched("a/b/more")) is None


async def test_one_who_no_longer_waits_holds_up_nobody(bench: Bench) -> None:
    first = await held_up(bench)
    gone = asyncio.create_task(bench.commit(launched("a/b/gone")))
    stays = asyncio.create_task(bench.commit(launched("a/b/stays")))
    await asyncio.sleep(0.01)
    gone.cancel()
    bench.store.gate.set()
    assert await first is None
    assert await stays is None
    assert (await bench.server.metrics()).process == "journal"


async def test_reads_do_not_wait_for_a_write(bench: Bench) -> None:
    await bench.commit(launched("a/b/c"))
    first = await held_up(bench)
    async with asyncio.timeout(2):
        assert len(await bench.server.read("launches")) == 1
    bench.store.gate.set()
    await first


async def test_a_copy_is_made_while_commits_go_on(bench: Bench) -> None:
    await bench.commit(launched("a/b/c"))
    size = await bench.server.backup(str(bench.folder / "copy.db"))
    assert isinstance(size, int)
    assert size > 0
    await bench.commit(launched("a/b/later"))
    copied = JournalServer("j", "sqlite", str(bench.folder / "copy.db"), str(bench.folder), "INFO")
    assert [launch.agent for launch in await copied.read("launches")] == ["a/b/c"]
    await copied.close()


async def test_what_waits_when_the_journal_closes_is_still_kept(tmp_path: Path) -> None:
    made = Bench(tmp_path)
    await made.server.ready()
    first = await held_up(made)
    second = asyncio.create_task(made.commit(launched("a/b/second")))
    await asyncio.sleep(0.01)
    closing = asyncio.create_task(made.server.close())
    await asyncio.sleep(0.01)
    made.store.gate.set()
    assert await asyncio.gather(first, second) == [None, None]
    await closing
    assert made.server._writer is not None
    made.server._writer.cancel()
    again = JournalServer("j", "sqlite", str(tmp_path / "store.db"), str(tmp_path), "INFO")
    assert len(await again.read("launches")) == 2
    await again.close()


async def test_what_was_sent_behind_a_call_that_was_not_taken_does_not_overtake_it(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    await bench.commit(launched("a/b/c"))
    await held_up(bench)

    def sent(number: int, *, first: bool, writes: int = 1) -> asyncio.Task[Any]:
        part = [SetHold("a/b/c", str(number))] * writes
        return asyncio.create_task(bench.server.commit([part], "host:0", number, first))

    monkeypatch.setattr("llmos.kernel.journal.MAX_WAITING", 3)
    waiting = asyncio.create_task(bench.commit(launched("a/b/d")))
    await asyncio.sleep(0)
    one, two, three = sent(1, first=True, writes=3), sent(2, first=False), sent(3, first=False)
    assert all(isinstance(answer, Busy) for answer in await asyncio.gather(one, two, three))
    other = asyncio.create_task(bench.server.commit([[SetHold("a/b/d", "x")]], "host:1", 1, True))
    bench.store.gate.set()
    await waiting
    assert await other == [None]
    # Also what comes when there is room again, before the first has come again.
    assert isinstance(await sent(4, first=False), Busy)
    assert await sent(1, first=True, writes=3) == [None]
    assert await sent(2, first=False) == [None]
