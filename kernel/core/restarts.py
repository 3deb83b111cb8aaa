"""Restart decisions: how often, how fast, and when to give up."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class RestartPolicy:
    """At most ``intensity`` restarts within ``window_s``; each waits longer than the last.

    The shape is Erlang's supervisor intensity (OTP design principles, "Maximum Restart
    Intensity"), with a backoff between the attempts.
    """

    intensity: int = 3
    window_s: float = 60.0
    first_delay_s: float = 0.0
    """The first restart is immediate: most crashes do not repeat."""
    step_s: float = 0.5
    max_delay_s: float = 10.0


@dataclass(slots=True)
class Restarts:
    """The crashes of one process."""

    policy: RestartPolicy = field(default_factory=RestartPolicy)
    crashes: deque[float] = field(default_factory=deque)

    def crashed(self, now: float) -> float | None:
        """Record a crash; returns seconds to wait before the restart, or None to give up."""
        while self.crashes and now - self.crashes[0] > self.policy.window_s:
            self.crashes.popleft()
        self.crashes.append(now)
        n = len(self.crashes)
        if n > self.policy.intensity:
            return None
        if n == 1:
            return self.policy.first_delay_s
        return min(self.policy.step_s * 2.0 ** (n - 2), self.policy.max_delay_s)
