"""Small types that events, actions and state share."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal


class ProcessKind(enum.StrEnum):
    """Processes that the kernel starts and watches."""

    DEVICE = "device"
    HOST = "host"
    JOURNAL = "journal"
    KNOWLEDGE = "knowledge"


class ProcessState(enum.StrEnum):
    """How a process stands."""

    STARTING = "starting"
    UP = "up"
    WAITING = "waiting"
    """Lost; a restart is due later."""
    GIVEN_UP = "given up"
    """Crashed too often."""
    STOPPED = "stopped"
    """Drained, or of no use without a process that was given up. Not restarted."""


class AgentState(enum.StrEnum):
    """How an agent stands."""

    PENDING = "pending"
    """Waits for its models."""
    READY = "ready"


class ShardState(enum.StrEnum):
    """How a shard of the agents stands."""

    SERVED = "served"
    """The store holds the epoch of its host, which serves it whenever it is up."""
    MOVING = "moving"
    """Given to a host, which may not serve it before the store says so."""
    UNREACHABLE = "unreachable"
    """No host is left."""


@dataclass(frozen=True, slots=True)
class DeviceSpec:
    """A device as the core sees it."""

    name: str
    kind: Literal["cpu", "cuda"]
    capacity_bytes: int
    threads: int


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """A model as the core sees it."""

    name: str
    kind: Literal["causal", "encoder"]
    size_bytes: int
    """Predicted: weights, KV blocks, places for adapters and workspace."""
    pinned: bool = False
    threads: int | None = None
    """Thread quota, where the system file sets it."""
    device: str | None = None
    """The device it must be on, where the system file sets it."""
    predicted: Mapping[str, int] = field(default_factory=dict)
    """The size by purpose."""
