"""Slots: models resident on a device, as states with a history.

::

    cold ──▶ loading ──▶ ready ──▶ draining ──▶ cold
                │          │           │
                └──────────┴───────────┴──▶ failed ──▶ loading
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field

from llmos.drivers.errors import LlmosError


class SlotState(enum.StrEnum):
    """How a slot stands."""

    COLD = "cold"
    """Not on the device; holds no memory."""
    LOADING = "loading"
    """Memory is reserved, weights are on their way."""
    READY = "ready"
    DRAINING = "draining"
    """Takes no new lease; unloads when told it is done."""
    FAILED = "failed"
    """Could not be loaded, or its device is gone."""


ALLOWED: dict[SlotState, frozenset[SlotState]] = {
    SlotState.COLD: frozenset({SlotState.LOADING}),
    SlotState.LOADING: frozenset({SlotState.READY, SlotState.FAILED}),
    SlotState.READY: frozenset({SlotState.DRAINING, SlotState.FAILED}),
    SlotState.DRAINING: frozenset({SlotState.COLD, SlotState.FAILED}),
    SlotState.FAILED: frozenset({SlotState.LOADING, SlotState.COLD}),
}


UNMEASURED = frozenset({"workspace"})
"""Purposes that are predicted, and held only while a step runs."""
NOTED_ERROR = 0.03
"""A prediction that is further off is noted."""


def prediction_error(predicted: Mapping[str, int], measured: Mapping[str, int]) -> float | None:
    """Differences of all purposes over what was measured in all; None: nothing was, or nothing
    was predicted.

    They add up, so that too much for one purpose does not hide too little for another.
    """
    total = sum(measured.values())
    purposes = ({*predicted} - UNMEASURED) | {*measured}
    if not total or not predicted:
        return None
    return sum(abs(measured.get(p, 0) - predicted.get(p, 0)) for p in purposes) / total


class InvalidTransition(LlmosError):
    """A slot was sent into a state that its present one does not lead to."""

    def __init__(self, slot: Slot, to: SlotState, cause: str) -> None:
        self.slot, self.start, self.finish, self.cause = slot.name, slot.state, to, cause
        self.story = tuple(slot.history)
        lines = "\n".join(
            f"  {at:.3f}  {start} → {finish}  ({why})" for at, start, finish, why in self.story
        )
        super().__init__(
            f"Slot {slot.name} cannot go from {slot.state} to {to} for {cause}; its story:\n{lines}"
        )


@dataclass(slots=True)
class Slot:
    """One model on one device, or on none while cold."""

    name: str
    """The model's name in the system."""
    predicted_bytes: int
    """Weights, KV blocks, places for adapters and workspace."""
    predicted: Mapping[str, int] = field(default_factory=dict)
    """The same by purpose."""
    asked: dict[str, int] = field(default_factory=dict)
    """Bytes that manifests ask for, where that is more than predicted, by agent."""
    pinned: bool = False
    """Never unloaded to make room."""
    state: SlotState = SlotState.COLD
    device: str | None = None
    threads: int = 1
    """Thread quota on a CPU."""
    users: set[str] = field(default_factory=set)
    """Agents launched with it: its leases."""
    last_used: float = 0.0
    """When it was loaded, or when the last of its agents went: what was left longest goes first."""
    measured: Mapping[str, int] | None = None
    """Bytes that it kept by purpose when it was loaded last; None: it never was."""
    error: LlmosError | None = None
    history: list[tuple[float, SlotState, SlotState, str]] = field(default_factory=list)
    """(time, from, to, cause), the newest 32."""

    def move(self, to: SlotState, now: float, cause: str) -> None:
        """Change the state.

        Raises:
            InvalidTransition: with the slot's story.
        """
        if to not in ALLOWED[self.state]:
            raise InvalidTransition(self, to, cause)
        self.history.append((now, self.state, to, cause))
        del self.history[:-32]
        self.state = to

    @property
    def size_bytes(self) -> int:
        """What is reserved for it when it is loaded."""
        return max(self.predicted_bytes, *self.asked.values(), 0)

    @property
    def measured_bytes(self) -> int | None:
        """What it keeps, all purposes together."""
        return None if self.measured is None else sum(self.measured.values())

    @property
    def prediction_error(self) -> float | None:
        """How far the prediction was off; None: nothing was measured."""
        return prediction_error(self.predicted, self.measured or {})

    @property
    def needed_bytes(self) -> int:
        """What the ledger is to count once it is loaded: what was measured, and what was
        predicted of that which shows only in a step."""
        return sum({**self.predicted, **(self.measured or {})}.values())

    @property
    def idle(self) -> bool:
        """Ready, leased to nobody and not pinned: may be unloaded."""
        return self.state is SlotState.READY and not self.users and not self.pinned

    def validate(self) -> None:
        """State and fields agree."""
        on_device = self.state in (SlotState.LOADING, SlotState.READY, SlotState.DRAINING)
        assert (self.device is not None) == on_device, self
        assert self.predicted_bytes >= 0, self
        assert set(self.asked) <= self.users, self
        assert self.threads >= 1, self
        for (_, _, finish, _), (_, start, _, _) in zip(
            self.history, self.history[1:], strict=False
        ):
            assert finish is start, self.history
