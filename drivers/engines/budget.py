"""How many tokens a server may be asked for in a minute. Pure: time is handed in."""

from __future__ import annotations

import math


class TokenBudget:
    """A bucket of tokens that fills evenly and holds one minute's worth at most.

    What a request may take at most is taken when it begins; what it did not need is given
    back. A request that took more than it said leaves a debt, and others wait for that.
    """

    def __init__(self, tokens_per_minute: int, now_s: float) -> None:
        """0: no limit."""
        self.capacity = tokens_per_minute
        """Most tokens that one request can have; 0: no limit."""
        self._level = float(tokens_per_minute)
        self._at_s = now_s

    def level(self, now_s: float) -> float:
        """Tokens that may be taken now; negative: a debt."""
        # A clock that goes back fills nothing.
        filled = max(0.0, now_s - self._at_s) * self.capacity / 60.0
        return min(float(self.capacity), self._level + filled)

    def wait_s(self, tokens: int, now_s: float) -> float:
        """Seconds until so many can be taken; infinite: never."""
        if not self.capacity:
            return 0.0
        if tokens > self.capacity:
            return math.inf
        return max(0.0, (tokens - self.level(now_s)) * 60.0 / self.capacity)

    def take(self, tokens: int, now_s: float) -> None:
        """Take them; ask :meth:`wait_s` first. Negative: give back."""
        if not self.capacity:
            return
        self._level = min(float(self.capacity), self.level(now_s) - tokens)
        self._at_s = max(now_s, self._at_s)
