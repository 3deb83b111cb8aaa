"""Least attained service first."""

from __future__ import annotations

from llmos.drivers.protocols import QueuedRequest
from llmos.kernel.core.history import Cost, History
from llmos.kernel.core.policies.ranked import Ranked


class LeastAttained(Ranked):
    """The turn that has had least work done for it first. Knows nothing of programs, and is
    good where turns that have lasted will last (heavy tails).

    **Bound on the wait**: a request before which n others were submitted enters within
    ``8 · patience · (n + 1)`` entries.
    """

    def __init__(self, *, cost: Cost | None = None, patience: int = 6) -> None:
        super().__init__()
        self.patience = patience
        self.history = History(cost)

    def rank(self, request: QueuedRequest, now_s: float) -> float:
        """Work done for its turn."""
        return self.history.queued(request, now_s).attained

    def words(self, request: QueuedRequest, rank: float, now_s: float) -> str:
        """The work that its turn has had."""
        return f"its turn has had {rank:.0f} tokens of work, and the least goes first"

    def begun_s(self, request: QueuedRequest, now_s: float) -> float:
        """When its turn first asked."""
        return self.history.begun_s(request)

    def remove(self, key: str, now_s: float) -> None:
        """A job waits no longer."""
        request = self.request(key)
        super().remove(key, now_s)
        self.history.left(request, now_s)

    def served(self, tenant: str, agent: str, read: int, written: int, now_s: float) -> None:
        """Counts for the agent's turn."""
        self.history.served(agent, read, written, now_s)

    def validate(self) -> None:
        """Queue and history are whole."""
        super().validate()
        self.history.validate()
