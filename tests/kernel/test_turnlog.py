"""The journal of one turn: written behind, waited for where it must be."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from llmos.drivers.errors import StaleEpoch, StoreUnavailable
from llmos.drivers.stores.rows import Append, JournalRow, Own, PutBlob, PutMail, Write
from llmos.drivers.stores.rows import MailRow as Mail
from llmos.kernel import committer, record
from llmos.kernel.committer import Kept, Ticket
from llmos.kernel.soon import Soon
from llmos.kernel.turnlog import TurnLog, writes_of
from llmos.syscalls.errors import Busy
from tests.kernel.local import until

OWN = Own("a/b/c", 1, "launch")
OPENING = PutMail(Mail("a/b/c", "s", 1, b"e"))


def row(seq: int, **given: Any) -> JournalRow:
    return JournalRow("a/b/c", "t", seq, "result", "Now", "")._replace(**given)


class Sink:
    """A committer that a test answers for."""

    def __init__(self) -> None:
        self.tickets: list[Ticket] = []
        self.soon = Soon(lambda: committer.FLUSH_S)
        self.automatic = True
        self.full = False

    def put(self, part: list[Write]) -> Ticket:
        if self.full:
            raise Busy("The way to the journal", 9, 0.5)
        done = Kept()
        ticket = Ticket(part, done)
        self.tickets.append(ticket)
        if self.automatic:
            done.set_result(None)
        return ticket

    async def commit(self, part: list[Write]) -> None:
        await self.put(part).done

    def parts(self) -> list[list[Any]]:
        """What has left, without the owner that every part begins with."""
        for ticket in self.tickets:
            assert ticket.part[0] == OWN
        return [
            [w.row.seq if isinstance(w, Append) else w for w in t.part[1:]] for t in self.tickets
        ]


@pytest.fixture
def sink() -> Sink:
    return Sink()


def log_of(sink: Sink, *opening: Write) -> TurnLog:
    return TurnLog(OWN, sink, opening)  # type: ignore[arg-type]


async def test_rows_wait_for_others_and_leave_together(
    sink: Sink, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(committer, "FLUSH_S", 0.01)
    log = log_of(sink)
    log.add(row(1))
    log.add(row(2))
    assert sink.parts() == []
    await until(lambda: sink.tickets)
    assert sink.parts() == [[1, 2]]
    log.add(row(3))
    assert await log.rest() == [Append(row(3))]
    await asyncio.sleep(0.02)
    assert len(sink.tickets) == 1


async def test_a_barrier_sends_what_there_is_and_waits_for_it(sink: Sink) -> None:
    sink.automatic = False
    log = log_of(sink)
    await log.barrier()
    assert sink.parts() == []
    log.add(row(1))
    waiting = asyncio.create_task(log.barrier())
    await asyncio.sleep(0)
    assert sink.parts() == [[1]]
    assert not waiting.done()
    sink.tickets[0].done.set_result(None)
    await waiting
    assert await log.rest() == []


async def test_a_barrier_waits_for_what_left_before(
    sink: Sink, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(committer, "FLUSH_S", 0.0)
    sink.automatic = False
    log = log_of(sink)
    log.add(row(1))
    await until(lambda: sink.tickets)
    waiting = asyncio.create_task(log.barrier())
    await asyncio.sleep(0.005)
    assert not waiting.done()
    sink.tickets[0].done.set_result(None)
    await waiting


async def test_a_barrier_that_fails_says_so_and_its_rows_are_written_again(sink: Sink) -> None:
    sink.automatic = False
    log = log_of(sink)
    log.add(row(1))
    waiting = asyncio.create_task(log.barrier())
    await asyncio.sleep(0)
    log.add(row(2))
    sink.tickets[0].done.fail(StoreUnavailable("store", "disk full"))
    with pytest.raises(StoreUnavailable):
        await waiting
    # In their order.
    assert await log.rest() == [Append(row(1)), Append(row(2))]


async def test_a_way_that_is_full_keeps_the_rows_for_later(
    sink: Sink, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(committer, "FLUSH_S", 0.001)
    sink.full = True
    log = log_of(sink, OPENING)
    log.add(row(1))
    await asyncio.sleep(0.01)
    with pytest.raises(Busy):
        await log.barrier()
    sink.full = False
    await until(lambda: sink.tickets)
    assert sink.parts() == [[OPENING, 1]]


async def test_another_owner_ends_it(sink: Sink) -> None:
    sink.automatic = False
    log = log_of(sink)
    log.add(row(1))
    waiting = asyncio.create_task(log.barrier())
    await asyncio.sleep(0)
    sink.tickets[0].done.fail(StaleEpoch("a/b/c", 1, 2))
    with pytest.raises(StaleEpoch):
        await waiting


async def test_a_turn_that_is_over_at_once_needs_no_opening(sink: Sink) -> None:
    log = log_of(sink, OPENING)
    assert not log.opened
    log.add(row(1))
    assert await log.rest() == [Append(row(1))]
    assert sink.parts() == []


async def test_the_opening_leaves_with_the_first_rows_and_once(sink: Sink) -> None:
    log = log_of(sink, OPENING)
    log.add(row(1))
    await log.barrier()
    assert log.opened
    log.add(row(2))
    await log.barrier()
    assert sink.parts() == [[OPENING, 1], [2]]


async def test_a_turn_that_lasts_is_opened_without_rows(
    sink: Sink, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(committer, "FLUSH_S", 0.001)
    log = log_of(sink, OPENING)
    await until(lambda: sink.tickets)
    assert sink.parts() == [[OPENING]]
    assert await log.rest() == []


async def test_an_opening_that_was_lost_comes_with_the_rest(sink: Sink) -> None:
    sink.automatic = False
    log = log_of(sink, OPENING)
    log.add(row(1))
    waiting = asyncio.create_task(log.barrier())
    await asyncio.sleep(0)
    sink.tickets[0].done.fail(StoreUnavailable("store", "disk full"))
    with pytest.raises(StoreUnavailable):
        await waiting
    assert await log.rest() == [OPENING, Append(row(1))]


async def test_a_waiter_that_is_cancelled_forgets_no_rows(sink: Sink) -> None:
    sink.automatic = False
    log = log_of(sink)
    log.add(row(1))
    waiting = asyncio.create_task(log.barrier())
    await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    sink.tickets[0].done.fail(StoreUnavailable("store", "disk full"))
    assert await log.rest() == [Append(row(1))]


async def test_streams_under_way_give_what_they_have_handed_out(sink: Sink) -> None:
    log = log_of(sink)
    fresh = [row(1, phase="partial", part=1)]
    log.pieces.append(lambda: fresh.pop() if fresh else None)
    await log.barrier()
    await log.barrier()
    assert [t.part[1:] for t in sink.tickets] == [[Append(row(1, phase="partial", part=1))]]


async def test_nothing_leaves_after_the_end(sink: Sink, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(committer, "FLUSH_S", 0.001)
    discarded, ended = log_of(sink), log_of(sink)
    discarded.add(row(1))
    discarded.discard()
    await ended.rest()
    discarded.add(row(2))
    ended.add(row(3))
    await asyncio.sleep(0.01)
    assert sink.tickets == []


def test_what_is_long_is_kept_apart_once_for_each_column() -> None:
    long, other = b"x" * (record.MAX_INLINE_BYTES + 1), b"y" * 9000
    writes = writes_of([row(1), row(2, args=long, result=other), row(3, result=b"short")])
    digests = {w.sha256: w.data for w in writes if isinstance(w, PutBlob)}
    rows = [w.row for w in writes if isinstance(w, Append)]
    assert set(digests.values()) == {long, other}
    assert digests[record.referred(rows[1].args) or ""] == long
    assert digests[record.referred(rows[1].result) or ""] == other
    assert rows[2].result == b"short"
    # A blob stands before what refers to it.
    assert [type(w) for w in writes] == [Append, PutBlob, PutBlob, Append, Append]
