"""What can happen to the kernel. Each event carries the time and the id of its cause."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

from llmos.drivers.errors import LlmosError
from llmos.kernel.core.types import DeviceSpec, ModelSpec, ProcessKind


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """The base: when it happened, and what made it happen."""

    now: float
    """Seconds on a monotonic clock."""
    cause: str
    """Id for logs: a request, a process, ``boot``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Booted(Event):
    """The kernel has read its configuration."""

    devices: tuple[DeviceSpec, ...]
    models: tuple[ModelSpec, ...]
    hosts: int
    """How many, at least 1."""
    services: tuple[ProcessKind, ...] = (ProcessKind.JOURNAL, ProcessKind.KNOWLEDGE)
    first_epoch: int = 1
    """Higher than every epoch in the store."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessUp(Event):
    """A process that the kernel started answers."""

    process: str
    incarnation: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessLost(Event):
    """A process died, or does not answer and was killed."""

    process: str
    incarnation: int
    reason: str
    chance: float = 0.5
    """In [0, 1): spreads restarts, so that what fell together does not come back together."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fenced(Event):
    """The store holds the epoch of these shards' host: it may serve them."""

    host: str
    epoch: int
    """That of the Fence. The host may have been restarted under a higher one meanwhile."""
    shards: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardsReleased(Event):
    """A host has ended its turns on these shards, or was cut off, and starts no more."""

    host: str
    shards: tuple[int, ...]
    to: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RebalanceAsked(Event):
    """Somebody wants the shards spread evenly over the hosts that are up."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DrainAsked(Event):
    """Somebody wants a host emptied and stopped; ``cause`` is answered by Drained or Refused."""

    process: str


@dataclass(frozen=True, slots=True, kw_only=True)
class HostAsked(Event):
    """Somebody wants one host more, e.g. to take what another serves that is to be drained."""

    process: str
    """A new name, or that of a host that was stopped: see ``spare_host()``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SlotLoaded(Event):
    """A model is resident."""

    slot: str
    measured: Mapping[str, int]
    """Bytes that it keeps on the device, by purpose."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SlotFailed(Event):
    """A model could not be loaded, or its engine broke."""

    slot: str
    error: LlmosError


@dataclass(frozen=True, slots=True, kw_only=True)
class SlotUnloaded(Event):
    """A draining model is off the device."""

    slot: str


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchAsked(Event):
    """Somebody wants an agent; ``cause`` is the request that will be answered."""

    agent: str
    """``tenant/program/key``, or ``tenant/program/*`` for any key."""
    models: tuple[tuple[str, int | None], ...]
    """Models it needs, each with the bytes its manifest asks for, if any."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KillAsked(Event):
    """Somebody wants an agent gone."""

    agent: str


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchGivenUp(Event):
    """The asker of a launch no longer waits."""

    request: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Tick(Event):
    """Time has passed; sent when a :class:`~.actions.WakeAt` is due."""


AnyEvent: TypeAlias = (
    Booted
    | ProcessUp
    | ProcessLost
    | Fenced
    | ShardsReleased
    | RebalanceAsked
    | DrainAsked
    | HostAsked
    | SlotLoaded
    | SlotFailed
    | SlotUnloaded
    | LaunchAsked
    | KillAsked
    | LaunchGivenUp
    | Tick
)
