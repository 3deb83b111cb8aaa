"""First come, first served."""

from __future__ import annotations

from llmos.drivers.protocols import QueuedRequest
from llmos.kernel.core.policies.ranked import Ranked


class Fcfs(Ranked):
    """In order of submission; what was put back keeps its old place.

    **Bound on the wait**: a request before which n others were submitted enters within n + 1
    entries.
    """

    def rank(self, request: QueuedRequest, now_s: float) -> float:
        """When it was submitted."""
        return request.submitted_s
