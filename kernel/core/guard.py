"""Stops agents that go round in circles: the same call with the same arguments, again and
again within one turn and the turns it asks for."""

from __future__ import annotations

from collections import OrderedDict, deque
from dataclasses import dataclass
from hashlib import blake2b

MAX_TURNS = 50_000
"""Turns that are watched at the same time; beyond them the one that called longest ago is let
go."""
WINDOW = 64
"""Calls of a turn that are remembered. One that repeats itself does so within them."""


@dataclass(frozen=True, slots=True)
class Repeated:
    """A call was made as often as it may be."""

    turn: str
    syscall: str
    resource: str
    times: int


class LoopGuard:
    """Counts equal calls within a turn's last :data:`WINDOW` calls.

    A call is equal if kind, resource and arguments are. What changes by itself (a clock, a
    queue that is polled) is for the caller to leave out: the guard is meant for generations
    and tools. Memory: 16 bytes and a counter for each call remembered.
    """

    def __init__(self, limit: int = 8) -> None:
        if limit < 1:
            raise ValueError(f"limit is {limit}")
        self.limit = limit
        self._turns: OrderedDict[str, tuple[deque[bytes], dict[bytes, int]]] = OrderedDict()

    def called(self, turn: str, syscall: str, resource: str, args: str) -> Repeated | None:
        """A turn (or the turn at the root of a chain) makes a call; None: it may.

        Args:
            args: a canonical form, such as JSON with sorted keys.
        """
        kind = "\0".join((syscall, resource, args)).encode("utf-8", "surrogatepass")
        call = blake2b(kind, digest_size=16).digest()
        watched = self._turns.get(turn)
        if watched is None:
            watched = self._turns[turn] = (deque(), {})
            if len(self._turns) > MAX_TURNS:
                self._turns.popitem(last=False)
        else:
            self._turns.move_to_end(turn)
        recent, counts = watched
        if counts.get(call, 0) >= self.limit:
            return Repeated(turn, syscall, resource, counts[call])
        recent.append(call)
        counts[call] = counts.get(call, 0) + 1
        if len(recent) > WINDOW:
            old = recent.popleft()
            counts[old] -= 1
            if not counts[old]:
                del counts[old]
        return None

    def ended(self, turn: str) -> None:
        """A turn is over. Idempotent."""
        self._turns.pop(turn, None)

    def validate(self) -> None:
        """Bounds hold and counts are those of the calls remembered."""
        assert len(self._turns) <= MAX_TURNS
        for turn, (recent, counts) in self._turns.items():
            assert len(recent) <= WINDOW, turn
            assert sum(counts.values()) == len(recent), turn
            assert all(0 < n <= self.limit for n in counts.values()), turn
