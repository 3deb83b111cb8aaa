"""What all policies of one queue share: requests sorted by a rank that is fixed as they come.

A rank that changed while a request waits would have to be looked up for all that wait. So
each policy is made such that the order between two waiting requests never changes, and a
decision costs O(log n).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heappush

from llmos.drivers.protocols import QueuedRequest, Standing

MAX_ENTERED = 16_384
"""Requests whose entry into the batch is remembered, to protect them from giving way at once."""

OLDEST = 8
"""Of the places that go by age, every so-manieth is for the request that waits longest."""


@dataclass(frozen=True, slots=True)
class Waiting:
    """A request in the queue."""

    request: QueuedRequest
    rank: float
    """The lowest enters first."""
    number: int
    """Of the arrival; breaks ties."""


class Ranked(ABC):
    """A queue by rank, in which every ``patience``-th place goes by age: to the turn that
    began first, and each eighth of these places to the request that was submitted first.

    The first keeps the slowest turns from being slower than in order of arrival: a long turn
    comes back again and again, and each time many shorter ones have come meanwhile. (With all
    these places for the oldest request, the 99th percentile of whole turns was 1.2 times that
    of first come, first served.) The second makes the bound hold beside a turn without end.

    **Bound on the wait** (with patience): a request before which n others that wait, or come
    back from the batch, were submitted enters within ``8 · patience · (n + 1)`` entries of its
    queue, whatever arrives after it. Policies without patience state their own bound.
    """

    patience: int | None = None
    """None: the rank alone decides."""
    least_service: int = 32
    """Tokens that a request must have written since it entered before it gives way again, or
    a sixteenth of its length if that is more: with it each preemption is paid for by so much
    progress, and two cannot throw each other out for ever."""

    def __init__(self) -> None:
        self._waiting: dict[str, Waiting] = {}
        self._ranks: list[tuple[float, int, str]] = []
        """Heap of (rank, number, key). Who has left is skipped when it comes up."""
        self._begun: list[tuple[float, int, str]] = []
        """The same by when the request's turn began; empty without patience, as is the next."""
        self._ages: list[tuple[float, int, str]] = []
        """The same by when the request was submitted."""
        self._number = 0
        self._entries = 0
        """Entries so far, modulo eight times the patience."""
        self._entered: dict[str, tuple[int, int]] = {}
        """Tokens written when it entered and prompt tokens to be read then, by key; the newest
        last."""

    def __len__(self) -> int:
        return len(self._waiting)

    # ------------------------------------------------------------ for the policies

    @abstractmethod
    def rank(self, request: QueuedRequest, now_s: float) -> float:
        """Where a request stands; the lowest enters first."""

    def begun_s(self, request: QueuedRequest, now_s: float) -> float:
        """When the turn of a request began, as far as the policy knows."""
        return request.submitted_s

    def gives_way(self, running: QueuedRequest, first: QueuedRequest) -> float | None:
        """How gladly a running request would make room for the first that waits: the highest
        does; None: not for this one."""
        return None

    # ------------------------------------------------------------ QueuePolicy

    def add(self, request: QueuedRequest, now_s: float) -> None:
        """A job waits from now on."""
        if request.key in self._waiting:
            raise ValueError(f"{request.key} waits already")
        self._number += 1
        entry = Waiting(request, self.rank(request, now_s), self._number)
        self._waiting[request.key] = entry
        heappush(self._ranks, (entry.rank, entry.number, request.key))
        if self.patience is not None:
            heappush(self._begun, (self.begun_s(request, now_s), entry.number, request.key))
            heappush(self._ages, (request.submitted_s, entry.number, request.key))

    def remove(self, key: str, now_s: float) -> None:
        """A job waits no longer, having been let in or gone. KeyError: it did not wait."""
        first = self.first(now_s) == key
        entry = self._waiting.pop(key)
        if first:
            # Whether it was let in or has gone is not told; to count one who has gone as let
            # in does no harm to the bound: whoever was before another is so no more.
            if self.patience is not None:
                self._entries = (self._entries + 1) % (OLDEST * self.patience)
            self._entered.pop(key, None)
            self._entered[key] = (entry.request.new_tokens, entry.request.prompt_tokens)
            if len(self._entered) > MAX_ENTERED:
                del self._entered[next(iter(self._entered))]
        self._compact()

    def first(self, now_s: float) -> str | None:
        """Who enters next."""
        if self.patience is not None and (self._entries + 1) % self.patience == 0:
            oldest = self._entries + 1 == OLDEST * self.patience
            return self._top(self._ages if oldest else self._begun)
        return self._top(self._ranks)

    def served(  # noqa: B027
        self, tenant: str, agent: str, read: int, written: int, now_s: float
    ) -> None:
        """Nothing is owed to anybody, unless the policy says so."""

    def victim(self, running: Sequence[QueuedRequest], now_s: float) -> str | None:
        """Who of the running gives way to the first."""
        key = self.first(now_s)
        if key is None:
            return None
        return self.victim_for(self._waiting[key].request, running)

    def standing(self, key: str, now_s: float) -> Standing:
        """Where a request stands by rank. KeyError: it does not wait."""
        mine = self._waiting[key]
        reason = self.words(mine.request, mine.rank, now_s)
        if self.patience is not None:
            reason += f"; every {self.patience}th place goes by age"
        return Standing(tuple(k for k in self.order() if self.place(k) < self.place(key)), reason)

    def order(self) -> list[str]:
        """All that wait, by rank."""
        return sorted(self._waiting, key=self.place)

    def words(self, request: QueuedRequest, rank: float, now_s: float) -> str:
        """Why a request stands where it does: a clause."""
        return "jobs enter in order of submission"

    # ------------------------------------------------------------ for policies of policies

    def victim_for(self, first: QueuedRequest, running: Sequence[QueuedRequest]) -> str | None:
        """Who of the running gives way to a request."""
        best: tuple[float, float, str] | None = None
        for job in running:
            willing = self.gives_way(job, first)
            if willing is None or not self.may_leave(job):
                continue
            # Among equals whoever came last: it has lost least.
            offer = (willing, job.submitted_s, job.key)
            if best is None or offer > best:
                best = offer
        return best[2] if best else None

    def may_leave(self, job: QueuedRequest) -> bool:
        """Whether a running request has made enough progress since it entered: what it would
        have to read again must be in proportion to what it has written."""
        before, _ = self._entered.get(job.key, (0, 0))
        return job.new_tokens - before >= max(self.least_service, self.length(job) // 16)

    def length(self, job: QueuedRequest) -> int:
        """Tokens of a running request that would have to be read again."""
        # What runs has read its prompt: how long it was is known from when it entered.
        _, prompt = self._entered.get(job.key, (0, 0))
        return max(prompt, job.prompt_tokens) + job.new_tokens

    def request(self, key: str) -> QueuedRequest:
        """A waiting request."""
        return self._waiting[key].request

    def place(self, key: str) -> tuple[float, int]:
        """Rank and number of a waiting request."""
        entry = self._waiting[key]
        return entry.rank, entry.number

    # ------------------------------------------------------------ inside

    def _live(self, entry: tuple[float, int, str]) -> bool:
        waiting = self._waiting.get(entry[2])
        return waiting is not None and waiting.number == entry[1]

    def _top(self, heap: list[tuple[float, int, str]]) -> str | None:
        while heap and not self._live(heap[0]):
            heappop(heap)
        return heap[0][2] if heap else None

    def _compact(self) -> None:
        # What has left stays in a heap until it comes up; that must not become the most of it.
        for heap in (self._ranks, self._begun, self._ages):
            if len(heap) > 64 and len(heap) > 3 * len(self._waiting):
                heap[:] = [entry for entry in heap if self._live(entry)]
                heapify(heap)

    def validate(self) -> None:
        """Every waiting request stands in the heaps, and they are bounded."""
        for heap in (self._ranks, self._begun, self._ages)[: 1 if self.patience is None else 3]:
            live = {entry[2] for entry in heap if self._live(entry)}
            assert live == set(self._waiting), live ^ set(self._waiting)
            assert len(heap) <= 64 + 3 * len(self._waiting), len(heap)
        assert len(self._entered) <= MAX_ENTERED
        assert 0 <= self._entries < OLDEST * (self.patience or 1), self._entries
