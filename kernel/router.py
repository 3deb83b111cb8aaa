"""Finding the host of an agent, and delivering messages to it."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass

from llmos.drivers.errors import StaleEpoch
from llmos.kernel.remote import Handle, ProcessGone, call
from llmos.syscalls.errors import Busy, DeadlineExceeded, DeliveryFailed
from llmos.syscalls.messages import Envelope, Reply

log = logging.getLogger("llmos.router")

MAX_LOSSES = 2
"""Hosts that may be lost with a message in them before it is given up."""
RETRY_S = 0.2
"""Pause before a kernel that is being restarted is asked again."""


@dataclass(frozen=True, slots=True)
class Location:
    """Where an agent is."""

    host: str
    epoch: int
    handle: Handle


class Router:
    """Delivers envelopes to hosts directly; asks the kernel only where an agent is.

    A host that dies is found again under a newer epoch, and the same envelope goes there:
    its id lets a host that has seen it answer without doing the work twice.
    """

    def __init__(self, kernel: Handle) -> None:
        self._kernel = kernel
        self._known: dict[str, Location] = {}

    async def locate(
        self, agent: str, not_at: tuple[str, int] | None, timeout_s: float
    ) -> Location:
        """Where the agent is, but for a host and epoch found lost; waits while it is nowhere."""
        known = self._known.get(agent)
        if known is not None and (known.host, known.epoch) != not_at:
            return known
        loop = asyncio.get_running_loop()
        until = loop.time() + timeout_s
        while True:
            left = max(until - loop.time(), 0.001)
            try:
                found: Location = await call(
                    self._kernel.locate.remote(agent, not_at, left),
                    f"the kernel (for {agent})",
                    left + 5.0,
                )
            except ProcessGone as gone:
                # A detached kernel comes back and knows from the store who is launched.
                if gone.final or loop.time() > until:
                    raise
                await asyncio.sleep(RETRY_S)
            else:
                self._known[agent] = found
                return found

    async def ask(self, envelope: Envelope) -> Reply:
        """Deliver, and wait for the end of the turn.

        Raises:
            DeadlineExceeded: no reply in time, whatever happened meanwhile.
            DeliveryFailed: two hosts were lost with the message in them.
            UnknownAgent, HostUnavailable.
        """
        loop = asyncio.get_running_loop()
        until = loop.time() + envelope.deadline_s
        lost: tuple[str, int] | None = None
        losses = 0
        while True:
            left = until - loop.time()
            if left <= 0:
                raise DeadlineExceeded(f"the answer of {envelope.receiver}", envelope.deadline_s)
            location = await self.locate(envelope.receiver, lost, left)
            left = max(until - loop.time(), 0.001)
            ref = location.handle.deliver.remote(envelope.with_deadline(left))
            try:
                # The host keeps the deadline itself; the margin is for a host that hangs.
                reply: Reply = await call(ref, f"the answer of {envelope.receiver}", left + 2.0)
            except ProcessGone as error:
                losses += 1
                self._lost(envelope, location, losses, error)
                lost = (location.host, location.epoch)
                continue
            if isinstance(reply.error, StaleEpoch):
                # It moved, or is just moving: the kernel knows where to.
                self._known.pop(envelope.receiver, None)
                await asyncio.sleep(RETRY_S)
                continue
            return reply

    async def post(self, envelope: Envelope) -> None:
        """Deliver into the mailbox; return when it is there. Tries again until the deadline."""
        loop = asyncio.get_running_loop()
        until = loop.time() + envelope.deadline_s
        lost: tuple[str, int] | None = None
        losses = 0
        while True:
            left = until - loop.time()
            if left <= 0:
                raise DeadlineExceeded(f"delivery to {envelope.receiver}", envelope.deadline_s)
            location = await self.locate(envelope.receiver, lost, left)
            try:
                await call(location.handle.post.remote(envelope), envelope.receiver, left)
            except ProcessGone as error:
                losses += 1
                self._lost(envelope, location, losses, error)
                lost = (location.host, location.epoch)
            except Busy as busy:
                await asyncio.sleep(min(busy.retry_after_s, max(until - loop.time(), 0.0)))
            else:
                return

    def _lost(
        self, envelope: Envelope, location: Location, losses: int, error: ProcessGone
    ) -> None:
        """A host was lost with the message in it: look for its successor, or give up.

        Raises:
            DeliveryFailed: it was one host too many.
        """
        self._known.pop(envelope.receiver, None)
        if losses >= MAX_LOSSES:
            raise DeliveryFailed(envelope.receiver, envelope.id, losses, error.reason) from None
        log.warning("%s was lost (%s); its successor is asked", location.host, error.reason)
