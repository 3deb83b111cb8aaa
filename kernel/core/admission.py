"""Whether a model may become resident now, later, or never, and with how much KV cache.

What could not fit an empty device is refused at once, with the numbers. What does not fit now
waits in order. Before anybody waits or is refused, KV budgets give: a model is content with
any between its least and what it wants.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import TypeAlias


@dataclass(frozen=True, slots=True)
class Wanted:
    """A model that is to become resident on a device."""

    owner: str
    fixed_bytes: int
    """Weights and workspace."""
    kv_bytes: int
    """KV cache that it wants."""
    least_kv_bytes: int
    """With less it cannot serve its longest request."""


@dataclass(frozen=True, slots=True)
class Granted:
    """It fits, with so much KV cache."""

    owner: str
    kv_bytes: int


@dataclass(frozen=True, slots=True)
class Refused:
    """It can never fit."""

    owner: str
    needed_bytes: int
    capacity_bytes: int
    """Of the device, without what is pinned."""


@dataclass(frozen=True, slots=True)
class Delayed:
    """It waits."""

    owner: str
    position: int
    """1: next."""
    estimate_s: float | None
    """Until there is room, by how fast room came before; None: it never came yet."""


Decision: TypeAlias = Granted | Refused | Delayed


class Admission:
    """One device's queue for memory. The ledger stays the account: what is granted here must be
    reserved there before the next decision."""

    def __init__(self, capacity_bytes: int) -> None:
        self.capacity_bytes = capacity_bytes
        self._waiting: OrderedDict[str, Wanted] = OrderedDict()
        self._freed_bytes = 0.0
        self._since_s: float | None = None

    def ask(self, wanted: Wanted, free_bytes: int, pinned_bytes: int, now_s: float) -> Decision:
        """Somebody wants in.

        Args:
            free_bytes: what the ledger says is free, with what can be evicted at once.
            pinned_bytes: held by what never leaves.

        Raises:
            ValueError: the owner waits already, or its figures make no sense.
        """
        if wanted.owner in self._waiting:
            raise ValueError(f"{wanted.owner} waits already")
        if not 0 <= wanted.least_kv_bytes <= wanted.kv_bytes or wanted.fixed_bytes < 0:
            raise ValueError(f"these bytes make no sense: {wanted}")
        needed = wanted.fixed_bytes + wanted.least_kv_bytes
        if needed > self.capacity_bytes - pinned_bytes:
            return Refused(wanted.owner, needed, self.capacity_bytes - pinned_bytes)
        # Nobody is overtaken: a small model would hold up a large one for ever.
        if not self._waiting and needed <= free_bytes:
            return self._grant(wanted, free_bytes)
        self._waiting[wanted.owner] = wanted
        if self._since_s is None:
            self._since_s = now_s
        return self.delay(wanted.owner, free_bytes, now_s)

    def room(self, freed_bytes: int, free_bytes: int, now_s: float) -> list[Granted]:
        """Bytes were given back; those that may come in now, in order."""
        self._freed_bytes += freed_bytes
        if self._since_s is None:
            self._since_s = now_s
        granted = []
        while self._waiting:
            wanted = next(iter(self._waiting.values()))
            if wanted.fixed_bytes + wanted.least_kv_bytes > free_bytes:
                break
            del self._waiting[wanted.owner]
            # The next in line gets its least before this one gets more than its own.
            behind = next(iter(self._waiting.values()), None)
            kept = behind.fixed_bytes + behind.least_kv_bytes if behind else 0
            grant = self._grant(wanted, max(free_bytes - kept, self._needed(wanted)))
            granted.append(grant)
            free_bytes -= wanted.fixed_bytes + grant.kv_bytes
        return granted

    def withdraw(self, owner: str) -> bool:
        """It does not want any more; False: it did not wait."""
        return self._waiting.pop(owner, None) is not None

    def delay(self, owner: str, free_bytes: int, now_s: float) -> Delayed:
        """How somebody who waits stands. KeyError: it does not wait."""
        position = list(self._waiting).index(owner) + 1 if owner in self._waiting else 0
        if not position:
            raise KeyError(owner)
        before = list(self._waiting.values())[:position]
        missing = sum(self._needed(wanted) for wanted in before) - free_bytes
        passed = now_s - self._since_s if self._since_s is not None else 0.0
        rate = self._freed_bytes / passed if passed > 0 else 0.0
        return Delayed(owner, position, max(0.0, missing) / rate if rate > 0 else None)

    @staticmethod
    def _needed(wanted: Wanted) -> int:
        return wanted.fixed_bytes + wanted.least_kv_bytes

    @staticmethod
    def _grant(wanted: Wanted, free_bytes: int) -> Granted:
        return Granted(wanted.owner, min(wanted.kv_bytes, free_bytes - wanted.fixed_bytes))

    def validate(self) -> None:
        """Whoever waits could fit an empty device."""
        for owner, wanted in self._waiting.items():
            assert owner == wanted.owner
            assert self._needed(wanted) <= self.capacity_bytes, wanted
