"""Restart decisions: how often, how fast, and when to give up."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field


def spread(delay_s: float, jitter: float, chance: float) -> float:
    """A delay made up to ``jitter`` (a share of it) shorter or longer.

    What failed together, because of one cause, must not try again together.

    Args:
        delay_s: seconds.
        jitter: 0 to 1.
        chance: in [0, 1); 0.5 leaves the delay as it is.
    """
    return delay_s * (1.0 + jitter * (2.0 * chance - 1.0))


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
    """Before jitter."""
    jitter: float = 0.2
    """Share of a delay by which chance makes it shorter or longer."""


@dataclass(slots=True)
class Restarts:
    """The crashes of one process."""

    policy: RestartPolicy = field(default_factory=RestartPolicy)
    crashes: deque[float] = field(default_factory=deque)

    def crashed(self, now: float, chance: float = 0.5) -> float | None:
        """Record a crash; returns seconds to wait before the restart, or None to give up.

        Args:
            now: seconds on a monotonic clock.
            chance: in [0, 1).
        """
        while self.crashes and now - self.crashes[0] > self.policy.window_s:
            self.crashes.popleft()
        self.crashes.append(now)
        n = len(self.crashes)
        if n > self.policy.intensity:
            return None
        if n == 1:
            delay_s = self.policy.first_delay_s
        else:
            delay_s = min(self.policy.step_s * 2.0 ** (n - 2), self.policy.max_delay_s)
        return spread(delay_s, self.policy.jitter, chance)
