"""When to leave a failing server alone, and how long to wait between attempts.

Pure: time and chance are handed in.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

BreakerState: TypeAlias = Literal["closed", "open", "half-open"]


class CircuitBreaker:
    """Closed: everybody may ask. After some failures in a row open: nobody may. Once the pause
    is over half-open: one attempt is let through; if it succeeds, closed, else open again for
    twice as long.

    Each attempt that :meth:`begin` let through ends with exactly one of :meth:`succeeded`,
    :meth:`failed` and :meth:`gave_up`. Attempts that began before it opened may end after; their
    failures change nothing then, but a success closes it, since the server is there.
    """

    def __init__(self, failures: int = 5, pause_s: float = 1.0, longest_s: float = 60.0) -> None:
        """``failures`` in a row open it, for ``pause_s`` at first and ``longest_s`` at most."""
        if failures < 1 or not 0 < pause_s <= longest_s:
            raise ValueError("failures from 1 up, and 0 < pause_s <= longest_s")
        self._limit, self._first_s, self._longest_s = failures, pause_s, longest_s
        self.failures = 0
        """In a row."""
        self._pause_s = pause_s
        self._until_s: float | None = None
        """Set while it is not closed: when the pause ends."""
        self._round = 0
        """How often it opened; attempts of an earlier round are out of date."""
        self._probing = False

    def state(self, now_s: float) -> BreakerState:
        """What it is now."""
        if self._until_s is None:
            return "closed"
        return "half-open" if now_s >= self._until_s else "open"

    def retry_after_s(self, now_s: float) -> float:
        """Seconds until :meth:`begin` may let somebody through; 0: now. While the one attempt
        of the half-open state runs nobody knows, so the first pause is told."""
        if self._until_s is None:
            return 0.0
        if now_s < self._until_s:
            return self._until_s - now_s
        return self._first_s if self._probing else 0.0

    def begin(self, now_s: float) -> int | None:
        """Begin an attempt; returns what names it at its end. None: it may not begin."""
        if self._until_s is not None:
            if now_s < self._until_s or self._probing:
                return None
            self._probing = True
        return self._round

    def succeeded(self) -> None:
        """The server answered."""
        self.failures, self._pause_s = 0, self._first_s
        self._until_s, self._probing = None, False

    def failed(self, attempt: int, now_s: float) -> None:
        """The server did not answer as a server should."""
        if attempt != self._round:
            return
        self.failures += 1
        if self._probing:
            self._pause_s = min(self._pause_s * 2, self._longest_s)
        elif self.failures < self._limit:
            return
        self._until_s, self._probing = now_s + self._pause_s, False
        self._round += 1

    def gave_up(self, attempt: int) -> None:
        """The attempt ended on our side, before anything was learnt of the server."""
        if attempt == self._round:
            self._probing = False

    def validate(self) -> None:
        """Raise AssertionError if the parts contradict each other."""
        assert self.failures >= 0
        assert self._first_s <= self._pause_s <= self._longest_s
        assert not self._probing or self._until_s is not None
        assert self._until_s is not None or self.failures < self._limit


def backoff_s(
    attempt: int, chance: float, *, base_s: float = 0.25, longest_s: float = 20.0
) -> float:
    """How long to wait before attempt ``attempt`` (the first repetition is 1).

    Full jitter: evenly spread between 0 and the exponential bound, so that those who failed
    together do not come back together. ``chance`` is from [0, 1). Equal jitter (half of the
    bound is certain) was the alternative; it spreads a crowd over half the time only.
    """
    if attempt < 1 or not 0 <= chance < 1:
        raise ValueError("attempt from 1 up, chance from [0, 1)")
    return float(chance * min(longest_s, base_s * 2.0 ** min(attempt - 1, 60)))
