"""The queue of an engine that was given no policy: who came first enters first."""

from __future__ import annotations

from collections.abc import Sequence

from llmos.drivers.protocols import QueuedRequest, Standing


class Fifo:
    """In order of arrival, and nobody gives way. See :class:`llmos.drivers.protocols.QueuePolicy`.

    The order is that of ``submitted_s`` and not of :meth:`add`: a job that was put back
    came before those that arrived while it ran.
    """

    def __init__(self) -> None:
        self._waiting: dict[str, float] = {}
        """When each was submitted, the earliest first."""

    def add(self, request: QueuedRequest, now_s: float) -> None:
        """A job waits from now on."""
        last = next(reversed(self._waiting.values()), 0.0)
        self._waiting[request.key] = request.submitted_s
        if request.submitted_s < last:
            # Rare: only what ran or paused before comes back out of order.
            self._waiting = dict(sorted(self._waiting.items(), key=lambda w: w[1]))

    def remove(self, key: str, now_s: float) -> None:
        """A job waits no longer."""
        del self._waiting[key]

    def first(self, now_s: float) -> str | None:
        """Who came first."""
        return next(iter(self._waiting), None)

    def served(self, tenant: str, agent: str, read: int, written: int, now_s: float) -> None:
        """Nothing is owed to anybody."""

    def victim(self, running: Sequence[QueuedRequest], now_s: float) -> str | None:
        """Nobody."""
        return None

    def standing(self, key: str, now_s: float) -> Standing:
        """After those that came before."""
        order = list(self._waiting)
        return Standing(tuple(order[: order.index(key)]), "jobs enter in order of arrival")
