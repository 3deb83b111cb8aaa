"""What the core tells the shell to do. Each action carries the id of its cause."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from llmos.drivers.errors import LlmosError
from llmos.kernel.core.types import ProcessKind


@dataclass(frozen=True, slots=True, kw_only=True)
class Action:
    """The base."""

    cause: str


@dataclass(frozen=True, slots=True, kw_only=True)
class StartProcess(Action):
    """Start a process; answer with ProcessUp or ProcessLost of this incarnation."""

    process: str
    kind: ProcessKind
    incarnation: int
    epoch: int
    """For a host: the epoch under which it commits; higher than that of any before it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StopProcess(Action):
    """Stop a process for good; no answer is waited for."""

    process: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Fence(Action):
    """Write a host's epoch to shards before it serves them; answer with Fenced.

    The store takes commits under exactly this epoch, so that the owner before is shut out
    whether its epoch was lower (the process was restarted) or higher (the shards moved).
    """

    host: str
    epoch: int
    shards: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ReleaseShards(Action):
    """Let a host end its turns on these shards, within a bound, and start no more of them;
    answer with ShardsReleased, with the same fields.
    """

    host: str
    shards: tuple[int, ...]
    to: str
    """The host that is to serve them next."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Drained(Action):
    """A host serves nothing any more and is stopped; ``cause`` is the request."""

    process: str


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadSlot(Action):
    """Load a model; answer with SlotLoaded or SlotFailed."""

    slot: str
    device: str
    threads: int


@dataclass(frozen=True, slots=True, kw_only=True)
class UnloadSlot(Action):
    """Unload a model; answer with SlotUnloaded."""

    slot: str
    device: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ForgetClient(Action):
    """A host is gone: devices cancel what it had in them."""

    client: str
    """``process@epoch``: its successor is another client."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Launched(Action):
    """A launch has succeeded; ``cause`` is the request."""

    agent: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Killed(Action):
    """An agent is gone, or for ``tenant/program/*`` the launch of any key; hosts drop what
    they have of it.
    """

    agent: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Refused(Action):
    """A request has failed; ``cause`` is the request."""

    error: LlmosError


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutesChanged(Action):
    """Shards of this host can be reached again, or can no more: see ``shard_map()``."""

    host: str


@dataclass(frozen=True, slots=True, kw_only=True)
class WakeAt(Action):
    """Send a Tick at this time."""

    when: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Note(Action):
    """Something an operator should read."""

    level: str
    text: str


AnyAction: TypeAlias = (
    StartProcess
    | StopProcess
    | Fence
    | ReleaseShards
    | Drained
    | LoadSlot
    | UnloadSlot
    | ForgetClient
    | Launched
    | Killed
    | Refused
    | RoutesChanged
    | WakeAt
    | Note
)
