from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from llmos.drivers.errors import StaleEpoch, StoreUnavailable
from llmos.drivers.protocols import (
    AgentRow,
    AgentWrite,
    StateWrite,
    Store,
    StoreWrite,
    SyscallRow,
    TurnRow,
    TurnStatus,
)
from llmos.kernel import journal
from llmos.kernel.journal import JournalServer
from llmos.syscalls.errors import Busy


class Counting:
    """A store in front of the real one: counts commits, and can be held up or broken."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.groups: list[int] = []
        self.gate = threading.Event()
        self.gate.set()
        self.breaks_on: bytes | None = None

    def commit(self, writes: Sequence[StoreWrite]) -> None:
        assert self.gate.wait(5)
        self.groups.append(len(writes))
        for write in writes:
            if isinstance(write, StateWrite) and write.state == self.breaks_on:
                raise ZeroDivisionError("a bug in the store")
        self._store.commit(writes)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)


def registered(agent: str, epoch: int = 1) -> AgentWrite:
    return AgentWrite(AgentRow(agent, "m:Desk", b"\x80", epoch, 1.0))


def turn(agent: str, number: int, epoch: int = 1) -> TurnRow:
    return TurnRow(
        f"{number:04d}", agent, epoch, "Hi", b"", "c", 1.0, 0.1, TurnStatus.DONE, b"", ""
    )


class Bench:
    def __init__(self, folder: Path) -> None:
        self.server = JournalServer(
            "journal", "sqlite", str(folder / "store.db"), str(folder), "INFO"
        )
        self.store = Counting(self.server._store)
        self.server._store = self.store

    async def commit(self, *writes: StoreWrite) -> Any:
        """What the actor returns: None, or a typed error."""
        return await self.server.commit(writes)


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    made = Bench(tmp_path)
    await made.server.ready()
    await made.server.ready()
    yield made
    await made.server.close()
    assert made.server._writer is not None
    made.server._writer.cancel()
    made.server._thread.shutdown()


async def held_up(bench: Bench) -> asyncio.Task[Any]:
    """A commit that is under way and does not end before the gate is opened."""
    bench.store.gate.clear()
    first = asyncio.create_task(bench.commit(registered("a/first/x")))
    await asyncio.sleep(0.01)
    return first


async def test_what_was_committed_can_be_read(bench: Bench) -> None:
    row = SyscallRow("0001", 1, "Now", "", 0.0, 0.1, "ok", b"", b"", b"", b"")
    assert await bench.commit(registered("a/b/c")) is None
    assert await bench.commit(turn("a/b/c", 1), row, StateWrite("a/b/c", 1, b"s")) is None
    assert await bench.server.activate("a/b/c") == (registered("a/b/c").row, b"s")
    assert await bench.server.activate("a/b/none") == (None, None)
    assert await bench.server.agents() == [registered("a/b/c").row]
    assert await bench.server.turns(None, 10) == [turn("a/b/c", 1)]
    assert await bench.server.turns("a/b/other", 10) == []
    assert await bench.server.turn("0001") == (turn("a/b/c", 1), [row])


async def test_all_who_wait_share_one_commit(bench: Bench) -> None:
    first = await held_up(bench)
    rest = [asyncio.create_task(bench.commit(registered(f"a/b/{n}"))) for n in range(50)]
    await asyncio.sleep(0.01)
    bench.store.gate.set()
    assert set(await asyncio.gather(first, *rest)) == {None}
    assert bench.store.groups == [1, 50]
    assert len(await bench.server.agents()) == 51  # type: ignore[arg-type]


async def test_a_group_is_bounded(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "MAX_GROUP", 20)
    first = await held_up(bench)
    rest = [asyncio.create_task(bench.commit(registered(f"a/b/{n}"))) for n in range(50)]
    await asyncio.sleep(0.01)
    bench.store.gate.set()
    await asyncio.gather(first, *rest)
    assert bench.store.groups == [1, 20, 20, 10]


async def test_one_stale_owner_does_not_fail_the_others(bench: Bench) -> None:
    await bench.commit(registered("a/b/old", epoch=5), registered("a/b/new", epoch=5))
    first = await held_up(bench)
    tasks = [
        asyncio.create_task(bench.commit(*writes))
        for writes in (
            (turn("a/b/new", 1, 5), StateWrite("a/b/new", 5, b"new")),
            (turn("a/b/old", 2, 4), StateWrite("a/b/old", 4, b"old")),
            (turn("a/b/new", 3, 5),),
        )
    ]
    await asyncio.sleep(0.01)
    bench.store.gate.set()
    await first
    good, stale, also_good = await asyncio.gather(*tasks)
    assert (good, also_good) == (None, None)
    assert isinstance(stale, StaleEpoch)
    assert (stale.agent, stale.epoch, stale.current) == ("a/b/old", 4, 5)
    assert (await bench.server.activate("a/b/new"))[1] == b"new"  # type: ignore[index]
    assert (await bench.server.activate("a/b/old"))[1] is None  # type: ignore[index]
    assert [t.turn for t in await bench.server.turns(None, 10)] == ["0003", "0001"]  # type: ignore[union-attr]


async def test_a_bug_in_the_store_fails_its_write_and_not_the_writer(bench: Bench) -> None:
    await bench.commit(registered("a/b/c"))
    bench.store.breaks_on = b"poison"
    first = await held_up(bench)
    tasks = [
        asyncio.create_task(bench.commit(StateWrite("a/b/c", 1, state)))
        for state in (b"poison", b"fine")
    ]
    await asyncio.sleep(0.01)
    bench.store.gate.set()
    async with asyncio.timeout(5):
        await first
        broken, fine = await asyncio.gather(*tasks)
    assert isinstance(broken, StoreUnavailable)
    assert "ZeroDivisionError" in str(broken)
    assert fine is None
    assert await bench.commit(registered("a/b/later")) is None


async def test_too_many_waiting_writes_are_answered_busy(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal, "MAX_WAITING", 3)
    first = await held_up(bench)
    waiting = [asyncio.create_task(bench.commit(registered(f"a/b/{n}"))) for n in range(3)]
    await asyncio.sleep(0.01)
    refused = await bench.commit(registered("a/b/more"))
    assert isinstance(refused, Busy)
    assert refused.waiting == 3
    bench.store.gate.set()
    assert set(await asyncio.gather(first, *waiting)) == {None}
    assert await bench.commit(registered("a/b/more")) is None


async def test_one_who_no_longer_waits_holds_up_nobody(bench: Bench) -> None:
    first = await held_up(bench)
    gone = asyncio.create_task(bench.commit(registered("a/b/gone")))
    stays = asyncio.create_task(bench.commit(registered("a/b/stays")))
    await asyncio.sleep(0.01)
    gone.cancel()
    bench.store.gate.set()
    assert await first is None
    assert await stays is None
    assert (await bench.server.metrics()).process == "journal"
