"""What an engine remembers of its jobs as a whole: bounds, outcomes, rate."""

from __future__ import annotations

from collections import deque

from llmos.drivers.protocols import FinishReason


class Outcomes:
    """Counts of finished jobs and the rate at which they leave. Guarded by the engine's lock."""

    WINDOW = 32
    """Jobs over which the rate is measured."""

    def __init__(self) -> None:
        self.finished = 0
        self.failed = 0
        self.cancelled = 0
        self._ends: deque[float] = deque(maxlen=self.WINDOW)

    def count(self, reason: FinishReason, now: float) -> None:
        """A job has left at ``now`` (seconds, monotonic)."""
        if reason == "error":
            self.failed += 1
        elif reason == "cancelled":
            self.cancelled += 1
        else:
            self.finished += 1
        self._ends.append(now)

    def retry_after_s(self, now: float) -> float:
        """Seconds until a job is likely to have left; 1 before anything was measured."""
        if len(self._ends) < 2:
            return 1.0
        rate = len(self._ends) / max(now - self._ends[0], 1e-3)
        return min(max(1 / rate, 0.05), 60.0)
