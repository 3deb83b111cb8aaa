"""Priorities that grow with age."""

from __future__ import annotations

from llmos.drivers.protocols import QueuedRequest
from llmos.kernel.core.policies.ranked import Ranked

HIGHEST = 100
"""Priorities above count as this, below its negative as that: the bound needs one."""


class Priority(Ranked):
    """The highest priority first; each ``ageing_s`` of waiting counts as one step more.

    Two that wait age alike, so their order never changes: the rank is the time at which a
    request of priority 0 would have had to be submitted to stand beside it.

    **Bound on the wait**: what is submitted more than ``(HIGHEST - p) · ageing_s`` after a
    request of priority p does not overtake it. It enters after at most as many entries as
    there are requests submitted up to then.
    """

    def __init__(self, *, ageing_s: float = 30.0) -> None:
        super().__init__()
        self.ageing_s = ageing_s

    def rank(self, request: QueuedRequest, now_s: float) -> float:
        """When it was submitted, moved by its priority."""
        return request.submitted_s - _bounded(request.priority) * self.ageing_s

    def words(self, request: QueuedRequest, rank: float, now_s: float) -> str:
        """Its priority."""
        aged = int((now_s - request.submitted_s) / self.ageing_s)
        return f"its priority is {request.priority}, and {aged} more for its age"

    def gives_way(self, running: QueuedRequest, first: QueuedRequest) -> float | None:
        """The lowest priority, to a higher one. Age moves a request forward in the queue, but
        throws nobody out: else all that run would be thrown out in the end."""
        lower = _bounded(first.priority) - _bounded(running.priority)
        return float(lower) if lower > 0 else None


def _bounded(priority: int) -> int:
    return max(-HIGHEST, min(HIGHEST, priority))
