"""Timers: a host finds in the store which of its agents' timers are due, and turns each into
a message in the commit that takes the timer away."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Iterable

from llmos.drivers.errors import AlreadyHandled, LlmosError
from llmos.drivers.stores.rows import MailRow, Own, PutMail, PutTimer, TakeTimer, TimerRow, Write
from llmos.kernel.clock import Clock, next_due
from llmos.kernel.committer import Committer
from llmos.kernel.services import RemoteServices
from llmos.syscalls.errors import InvalidRequest

log = logging.getLogger("llmos.timers")

LOOK_S = 1.0
"""How often the store is asked what is due soon; also how late a wall clock that was set is
noticed."""
PAGE = 1_000
"""Timers taken at a time; a backlog of many is worked off page by page."""


class Timers:
    """The timers of one host's agents."""

    def __init__(
        self,
        *,
        epoch: int,
        clock: Clock,
        committer: Committer,
        services: RemoteServices,
        owns: Callable[[str], bool],
        deliver: Callable[[Iterable[MailRow]], None],
    ) -> None:
        self._epoch = epoch
        self._clock = clock
        self._committer = committer
        self._services = services
        self._owns = owns
        self._deliver = deliver
        self._changed = asyncio.Event()

    def changed(self) -> None:
        """A timer was set: it may be due before the next look."""
        self._changed.set()

    async def run(self) -> None:
        """Fire what is due, for ever."""
        while True:
            next_at = self._clock.time() + LOOK_S
            try:
                soon: list[TimerRow] = await self._services.read_store(
                    "timers", before=next_at, limit=PAGE
                )
                now = self._clock.time()
                mine = [t for t in soon if self._owns(t.agent)]
                due = [t for t in mine if t.due <= now]
                fired = await self._fire(due, now)
                later = [t.due for t in mine if t.due > now]
                next_at = min([next_at, *later])
                if len(soon) == PAGE and fired:
                    # Only if something went away: else the same page would come again at once.
                    continue
            except LlmosError as error:
                log.warning("timers: %s", error)
            wait_s = min(max(next_at - self._clock.time(), 0.001), LOOK_S)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait_s):
                    await self._changed.wait()
            self._changed.clear()

    async def _fire(self, due: list[TimerRow], now: float) -> int:
        """Turn them into messages; returns how many are no longer due."""
        tickets = []
        for timer in due:
            seq = int(timer.due * 1000)
            stream = f"timer:{timer.name}"
            mail = MailRow(timer.agent, stream, seq, timer.envelope)
            part: list[Write] = [
                Own(timer.agent, self._epoch),
                TakeTimer(timer.agent, timer.name, timer.due),
                PutMail(mail),
            ]
            if timer.cron:
                # From now on, not from when it was due: what was missed is made up for once.
                try:
                    again = next_due(timer.cron, timer.tz, max(now, timer.due))
                except InvalidRequest as error:
                    log.error("timer %s of %s ends: %s", timer.name, timer.agent, error)
                else:
                    part.append(PutTimer(timer._replace(due=again)))
            tickets.append((self._committer.put(part), mail))
        delivered = []
        gone = 0
        for ticket, mail in tickets:
            try:
                await asyncio.shield(ticket.done)
            except AlreadyHandled:
                # It was replaced or cancelled just now; or it has fired, and nobody heard of
                # it, and then its message is found in the store.
                log.debug("a timer of %s has changed", mail.receiver)
                gone += 1
            except LlmosError as error:
                log.warning("a timer of %s: %s", mail.receiver, error)
            else:
                delivered.append(mail)
        self._deliver(delivered)
        return gone + len(delivered)
