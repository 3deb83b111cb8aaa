"""Small types that events, actions and state share."""

from __future__ import annotations

import enum
from dataclasses import dataclass
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


class AgentState(enum.StrEnum):
    """How an agent stands."""

    PENDING = "pending"
    """Waits for its models."""
    READY = "ready"
    MOVING = "moving"
    """Given to another host, which may not serve it before the store says so."""
    UNREACHABLE = "unreachable"
    """Its host was given up, and no other is there."""


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
    """Predicted: weights, KV blocks and workspace."""
    pinned: bool = False
    threads: int | None = None
    """Thread quota, where the system file sets it."""
    device: str | None = None
    """The device it must be on, where the system file sets it."""
