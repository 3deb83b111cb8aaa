"""Shortest expected remaining processing time first."""

from __future__ import annotations

from llmos.drivers.protocols import QueuedRequest
from llmos.kernel.core.policies.las import LeastAttained


class ShortestExpected(LeastAttained):
    """The turn first that is expected to need least work from now on, by what turns of its
    agent's program took before (:mod:`llmos.kernel.core.history`).

    The expectation is made when a request comes and stays while it waits.

    **Bound on the wait**: a request before which n others were submitted enters within
    ``8 · patience · (n + 1)`` entries.
    """

    def rank(self, request: QueuedRequest, now_s: float) -> float:
        """Work that its turn is expected to take from now on."""
        turn = self.history.queued(request, now_s)
        return self.history.remaining(request, turn.attained)

    def words(self, request: QueuedRequest, rank: float, now_s: float) -> str:
        """The work that its turn is expected to take."""
        return (
            f"its turn is expected to take {rank:.0f} more tokens of work, and the least goes first"
        )
