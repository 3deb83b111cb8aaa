"""The way from a host to the journal: in order, in groups, through the loss of the journal."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from llmos.drivers.errors import LlmosError, StaleEpoch, StoreUnavailable
from llmos.drivers.stores import wire
from llmos.drivers.stores.rows import Part, SetHold
from llmos.kernel import committer as module
from llmos.kernel.committer import Committer
from llmos.kernel.directory import Directory, DirectoryHolder
from llmos.kernel.remote import answers
from llmos.syscalls.errors import Busy, DeadlineExceeded
from tests.kernel.local import LocalHandle, until


class FakeJournal:
    """Keeps what it gets, in order."""

    def __init__(self) -> None:
        self.calls: list[list[Part]] = []
        self.gate = asyncio.Event()
        self.gate.set()
        self.refuse: dict[str, LlmosError] = {}
        """By agent."""
        self.raises: list[LlmosError] = []
        """What whole calls are answered with, one after the other."""

    @answers
    async def commit(self, parts: Any, *sender: Any) -> list[LlmosError | None]:
        if isinstance(parts, bytes):
            parts = wire.unpack(parts)
        if self.raises:
            raise self.raises.pop(0)
        self.calls.append(parts)
        await self.gate.wait()
        return [self.refuse.get(part[0].agent) for part in parts]

    def kept(self) -> list[str]:
        return [part[0].agent for parts in self.calls for part in parts]


class Bench:
    def __init__(self) -> None:
        self.journal = FakeJournal()
        self.directory = DirectoryHolder()
        self.committer = Committer(self.directory)
        self.handle = LocalHandle(self.journal)
        self.version = 0

    async def publish(self, handle: LocalHandle | None) -> None:
        self.version += 1
        await self.directory.set(Directory(self.version, journal=handle))

    def put(self, name: str) -> Any:
        return self.committer.put([SetHold(name, "")])


@pytest.fixture
async def bench() -> AsyncIterator[Bench]:
    made = Bench()
    await made.publish(made.handle)
    yield made
    made.journal.gate.set()
    made.journal.raises.clear()
    await made.committer.close()


async def test_parts_leave_in_order_and_in_groups(bench: Bench) -> None:
    bench.journal.gate.clear()
    tickets = [bench.put(f"{n:03}") for n in range(50)]
    await until(lambda: bench.journal.calls)
    tickets += [bench.put(f"{n:03}") for n in range(50, 100)]
    await asyncio.sleep(0.01)
    bench.journal.gate.set()
    await asyncio.gather(*(t.done for t in tickets))
    assert bench.journal.kept() == [f"{n:03}" for n in range(100)]
    assert len(bench.journal.calls) <= module.UNDER_WAY + 1


async def test_some_calls_are_under_way_and_no_more(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "UNDER_WAY", 2)
    bench.journal.gate.clear()
    tickets = []
    for n in range(9):
        tickets.append(bench.put(f"{n}"))
        await asyncio.sleep(0.005)
    assert len(bench.journal.calls) == module.UNDER_WAY
    bench.journal.gate.set()
    await asyncio.gather(*(t.done for t in tickets))
    assert bench.journal.kept() == [str(n) for n in range(9)]


async def test_a_call_is_bounded(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_PARTS", 10)
    await asyncio.gather(*(bench.put(f"{n:02}").done for n in range(35)))
    assert max(len(parts) for parts in bench.journal.calls) == 10
    assert bench.journal.kept() == [f"{n:02}" for n in range(35)]


async def test_each_part_has_its_own_answer(bench: Bench) -> None:
    bench.journal.refuse["b"] = StaleEpoch("b", 1, 2)
    tickets = [bench.put(name) for name in "abc"]
    results = await asyncio.gather(*(t.done for t in tickets), return_exceptions=True)
    assert [type(r) for r in results] == [type(None), StaleEpoch, type(None)]


async def test_a_part_may_be_changed_until_it_leaves(bench: Bench) -> None:
    ticket = bench.put("first")
    assert not ticket.sent
    ticket.part[0] = SetHold("other", "")
    await ticket.done
    assert ticket.sent
    assert bench.journal.kept() == ["other"]


async def test_a_lost_journal_gets_the_same_parts_again_in_order(bench: Bench) -> None:
    bench.journal.gate.clear()
    tickets = [bench.put("a")]
    await until(lambda: len(bench.journal.calls) == 1)
    tickets.append(bench.put("b"))
    await until(lambda: len(bench.journal.calls) == 2)
    tickets.append(bench.put("c"))
    bench.handle.kill()
    await asyncio.sleep(0.01)
    assert not any(t.done.done() for t in tickets)
    bench.journal.gate.set()
    bench.journal.calls.clear()
    await bench.publish(LocalHandle(bench.journal))
    await asyncio.gather(*(t.done for t in tickets))
    kept = bench.journal.kept()
    assert kept == ["a", "b", "c"]


async def test_a_journal_that_is_away_is_waited_for(bench: Bench) -> None:
    await bench.publish(None)
    ticket = bench.put("a")
    await asyncio.sleep(0.01)
    assert not ticket.done.done()
    await bench.publish(bench.handle)
    await ticket.done


async def test_a_journal_that_does_not_come_back_ends_with_a_deadline(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "COMMIT_S", 0.02)
    await bench.publish(None)
    with pytest.raises(DeadlineExceeded, match="commit"):
        await bench.committer.commit([SetHold("a", "")])
    await bench.publish(bench.handle)
    await bench.put("b").done


async def test_a_busy_journal_is_asked_again_and_the_order_is_kept(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "RETRY_S", 0.002)
    bench.journal.raises += [Busy("The journal", 9, 0.5)] * 2
    first = bench.put("a")
    await asyncio.sleep(0)
    await asyncio.gather(first.done, *(bench.put(name).done for name in "bcd"))
    assert sorted(bench.journal.kept()) == ["a", "b", "c", "d"]


async def test_a_store_that_cannot_be_written_refuses_all_of_a_call(bench: Bench) -> None:
    bench.journal.raises.append(StoreUnavailable("store", "disk full"))
    tickets = [bench.put(name) for name in "abc"]
    results = await asyncio.gather(*(t.done for t in tickets), return_exceptions=True)
    assert [type(r) for r in results] == [StoreUnavailable] * 3
    # Later ones are tried anew.
    await bench.put("d").done


async def test_too_many_that_wait_are_answered_busy(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_WAITING", 3)
    monkeypatch.setattr(module, "UNDER_WAY", 2)
    bench.journal.gate.clear()
    tickets = [bench.put("0")]
    await until(lambda: len(bench.journal.calls) == 1)
    tickets.append(bench.put("1"))
    await until(lambda: len(bench.journal.calls) == 2)
    tickets += [bench.put(str(n)) for n in range(2, 5)]
    with pytest.raises(Busy, match="journal"):
        bench.put("5")
    bench.journal.gate.set()
    await asyncio.gather(*(t.done for t in tickets))


async def test_who_leaves_takes_nothing_with_them(bench: Bench) -> None:
    bench.journal.gate.clear()
    waiting = asyncio.create_task(bench.committer.commit([SetHold("a", "")]))
    await asyncio.sleep(0)
    other = bench.put("b")
    await until(lambda: bench.journal.calls)
    waiting.cancel()
    await asyncio.sleep(0.005)
    bench.journal.gate.set()
    await other.done
    assert bench.journal.kept() == ["a", "b"]


async def test_close_waits_for_all(bench: Bench) -> None:
    tickets = [bench.put(str(n)) for n in range(5)]
    await bench.committer.close()
    assert all(t.done.done() for t in tickets)
