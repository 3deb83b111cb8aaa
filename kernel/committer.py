"""The way from a host to the journal: parts in order, many in one call.

What gathers while calls are under way leaves with the next one. Up to four are under way at
a time, so that the journal has work while an answer travels; their order is kept, because
Ray starts calls of one caller in the order they were made, the journal queues a call's parts
in its first step, and it takes a call only if it has taken the one before, unless that is
settled. So what was refused, or never arrived, is not overtaken by what had left behind it.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from typing import Any

from llmos.drivers.errors import LlmosError
from llmos.drivers.stores import wire
from llmos.drivers.stores.rows import Write
from llmos.kernel.directory import DirectoryHolder
from llmos.kernel.remote import ProcessGone, call
from llmos.kernel.soon import Soon
from llmos.syscalls.errors import Busy, DeadlineExceeded

log = logging.getLogger("llmos.committer")

FLUSH_S = 0.02
"""How long a row may wait for others before it leaves: what a crash can make happen again."""
COMMIT_S = 30.0
"""Longest wait for a commit: a journal that was lost is back much sooner."""
MAX_PARTS = 512
"""Parts of one call."""
MAX_WAITING = 50_000
"""Parts that may wait; one more is answered Busy."""
UNDER_WAY = 4
"""Calls at a time."""
LEAVE_AT = 32
"""Parts that are enough for a call of their own."""
RETRY_S = 0.05
"""Pause before a journal that was too busy is asked again."""


class Kept(asyncio.Future[None]):
    """Set when a part is durable; otherwise raises why it was refused or could not be kept.

    Whoever waits for it cannot cancel it: a cancellation reaches them when the outcome is
    there. So a turn can see its commit through without ``asyncio.shield``, which costs as
    much as half of what else a commit does here. Who wants to leave at once uses it.
    """

    def cancel(self, msg: Any = None) -> bool:
        """Do nothing; see :meth:`abandon`."""
        return False

    def abandon(self) -> None:
        """There will be no outcome: the way to the journal is being closed."""
        super().cancel()

    def fail(self, error: BaseException) -> None:
        """Set the error, which counts as seen, whether or not somebody waits for it."""
        self.set_exception(error)
        self.exception()


class Ticket:
    """A part on its way. ``part`` may be changed until ``sent``."""

    __slots__ = ("done", "part", "sent")

    def __init__(self, part: list[Write], done: Kept) -> None:
        self.part = part
        self.done = done
        self.sent = False


class Committer:
    """One host's parts. All on one event loop."""

    def __init__(self, directory: DirectoryHolder, name: str = "") -> None:
        """``name``: of the host, by which the journal knows the order of its calls."""
        self._directory = directory
        self._name = name
        self._waiting: deque[Ticket] = deque()
        self._flights: set[asyncio.Task[None]] = set()
        self._last: asyncio.Task[None] | None = None
        """The flight that left last."""
        self.soon = Soon(lambda: FLUSH_S)
        """For rows of turns that are to leave."""
        self._number = 0
        """Of the flight that left last."""
        self._resending = 0
        """Flights that have to leave once more: those behind them wait, to keep the order."""
        self._sender: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._room = asyncio.Event()

    def put(self, part: list[Write]) -> Ticket:
        """Queue a part.

        Raises:
            Busy: too many wait already.
        """
        if len(self._waiting) >= MAX_WAITING:
            raise Busy("The way to the journal", len(self._waiting), 0.5)
        ticket = Ticket(part, Kept(loop=self._loop or self._here()))
        self._waiting.append(ticket)
        if (
            len(self._waiting) >= LEAVE_AT
            and len(self._flights) < UNDER_WAY
            and not self._resending
            and self._directory.current.journal is not None
        ):
            # At once, not in the next round of the loop: where hundreds of turns end in one
            # round, the journal would have nothing to do in it, and the host nothing after it.
            self._leave()
        elif self._sender is None or self._sender.done():
            self._sender = asyncio.create_task(self._send())
        return ticket

    def _here(self) -> asyncio.AbstractEventLoop:
        self._loop = asyncio.get_running_loop()
        return self._loop

    async def commit(self, part: list[Write]) -> None:
        """Queue a part and wait until it is durable.

        Raises:
            StoreError: it was refused or could not be kept.
            DeadlineExceeded: the journal did not answer in ``COMMIT_S`` seconds; it may or
                may not have been kept.
            Busy
        """
        await asyncio.shield(self.put(part).done)

    async def _send(self) -> None:
        while self._waiting:
            if len(self._flights) >= UNDER_WAY:
                self._room.clear()
                await self._room.wait()
                continue
            self._leave()
            # Let it leave before the next one is made up.
            await asyncio.sleep(0)

    def _leave(self) -> None:
        """Send off what waits."""
        batch: list[Ticket] = []
        while self._waiting and len(batch) < MAX_PARTS:
            ticket = self._waiting.popleft()
            ticket.sent = True
            batch.append(ticket)
        before = self._last if self._last is not None and not self._last.done() else None
        # Packed here: Ray's pickler asks for each row whether it must be treated specially,
        # and takes twelve times as long.
        packed = wire.pack([ticket.part for ticket in batch])
        journal = self._directory.current.journal
        ref: Any = None
        self._number += 1
        if journal is not None and not self._resending:
            ref = journal.commit.remote(packed, self._name, self._number, not self._flights)
        version = self._directory.current.version
        flight = self._fly(batch, packed, self._number, before, ref, version)
        self._last = asyncio.create_task(flight)
        self._flights.add(self._last)
        self._last.add_done_callback(self._landed)

    def _landed(self, flight: asyncio.Task[None]) -> None:
        self._flights.discard(flight)
        self._room.set()
        if not flight.cancelled() and flight.exception() is not None:
            log.error("a commit failed unexpectedly", exc_info=flight.exception())

    async def _fly(
        self,
        batch: list[Ticket],
        packed: bytes,
        number: int,
        before: asyncio.Task[None] | None,
        ref: Any,
        version: int,
    ) -> None:
        try:
            async with asyncio.timeout(COMMIT_S):
                results = await self._deliver(packed, number, before, ref, version)
        except TimeoutError:
            late = DeadlineExceeded("the commit", COMMIT_S)
            results = [late] * len(batch)
        except LlmosError as error:
            results = [error] * len(batch)
        except BaseException as error:
            for ticket in batch:
                if ticket.done.done():
                    continue
                if isinstance(error, GeneratorExit):
                    continue  # The loop is gone, and whoever waited in it.
                if isinstance(error, asyncio.CancelledError):
                    # As an exception it could not be told from a cancellation of whoever waits.
                    ticket.done.abandon()
                else:
                    ticket.done.fail(error)
            raise
        for ticket, result in zip(batch, results, strict=True):
            if ticket.done.done():
                continue
            if result is None:
                ticket.done.set_result(None)
            else:
                ticket.done.fail(result)

    async def _deliver(
        self,
        packed: bytes,
        number: int,
        before: asyncio.Task[None] | None,
        ref: Any,
        version: int,
    ) -> list[LlmosError | None]:
        """Wait for an answer.

        Args:
            packed: The parts.
            number: Of the flight.
            before: The flight that left before this one, if it was under way then.
            ref: The call, if it has been made.
            version: Of the directory then.
        """
        again = False
        try:
            while True:
                try:
                    if ref is None:
                        if before is not None:
                            # Those that left earlier go first again.
                            await asyncio.wait([before])
                        version = self._directory.current.version
                        journal: Any = await self._directory.service("journal")
                        ref = journal.commit.remote(packed, self._name, number, True)
                    results: list[LlmosError | None] = await call(ref, "the journal")
                except ProcessGone:
                    # It may have committed before it died: the same parts again do no harm.
                    ref = None
                    if not again:
                        again, self._resending = True, self._resending + 1
                    await self._directory.newer(version)
                except Busy as busy:
                    ref = None
                    if not again:
                        again, self._resending = True, self._resending + 1
                    await asyncio.sleep(min(busy.retry_after_s, RETRY_S))
                else:
                    return results
        finally:
            if again:
                self._resending -= 1

    async def close(self) -> None:
        """Wait for what is under way."""
        while self._waiting or self._flights:
            if self._flights:
                await asyncio.wait(list(self._flights))
            else:
                await asyncio.sleep(0)
