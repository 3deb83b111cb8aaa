"""Earliest deadline first."""

from __future__ import annotations

from llmos.drivers.protocols import QueuedRequest
from llmos.kernel.core.policies.ranked import Ranked


class EarliestDeadline(Ranked):
    """The earliest deadline first. A request without one, or with a later one, counts as due
    ``horizon_s`` after its submission.

    **Bound on the wait**: what is submitted more than ``horizon_s`` after a request does not
    overtake it, as long as deadlines lie after the submission. It enters after at most as many
    entries as there are requests submitted up to then.
    """

    def __init__(self, *, horizon_s: float = 300.0) -> None:
        super().__init__()
        self.horizon_s = horizon_s

    def rank(self, request: QueuedRequest, now_s: float) -> float:
        """When it is due."""
        return self.due_s(request)

    def words(self, request: QueuedRequest, rank: float, now_s: float) -> str:
        """When it is due."""
        if request.deadline_s is None or request.deadline_s > rank:
            return f"it has no near deadline and counts as due in {rank - now_s:.0f} s"
        return f"its deadline is in {rank - now_s:.1f} s, and the earliest goes first"

    def due_s(self, request: QueuedRequest) -> float:
        """When a request is due; never before its submission."""
        latest = request.submitted_s + self.horizon_s
        if request.deadline_s is None:
            return latest
        return max(request.submitted_s, min(latest, request.deadline_s))

    def gives_way(self, running: QueuedRequest, first: QueuedRequest) -> float | None:
        """The latest due, to one that has a deadline and is due before."""
        if first.deadline_s is None:
            return None
        later = self.due_s(running) - self.due_s(first)
        return later if later > 0 else None
