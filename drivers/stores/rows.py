"""What a store keeps, and what may be written into it.

Named tuples, not dataclasses: thousands of them a second cross from hosts to the journal's
process, and they pickle in a third of the time.

A *part* is a list of writes that becomes durable as a whole or not at all; a commit takes
many parts and makes one transaction of them (see :class:`llmos.drivers.protocols.Store`).
Every part may come again, because whoever sent it did not hear that it was kept: each write
says what it then does.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Literal, NamedTuple, TypeAlias

SHARDS = 256
"""Agents are owned in shards, so that changing the owner of a million agents is a few rows.
Fixed: a store would have to be rewritten to change it."""

NO_HASH = bytes(32)
"""The hash before the first row of an agent's chain."""


def shard_of(agent: str) -> int:
    """The shard of an agent, 0 to ``SHARDS`` - 1: the same in every process and release."""
    return zlib.crc32(agent.encode("utf-8", "surrogatepass")) % SHARDS


def pattern_of(agent: str) -> str:
    """The launch of any key of the agent's program: ``tenant/program/*``."""
    return f"{agent.rsplit('/', 1)[0]}/*"


# ---------------------------------------------------------------- rows


class LaunchRow(NamedTuple):
    """What somebody launched: one agent, or every agent of a program."""

    agent: str
    """``tenant/program/key``, or ``tenant/program/*`` for any key."""
    program: str
    """``module:Class``."""
    config: bytes
    """msgpack of the program's configuration."""
    id: str
    """Another launch of the same name is another one: what an old one's turn commits late
    is refused."""
    created_at: float


class AgentRow(NamedTuple):
    """An agent that has had a turn. All that an idle agent costs."""

    agent: str
    state: bytes | None = None
    """JSON; None: it never changed."""
    state_version: int = 0
    """Schema version of the program's State that wrote it."""
    changes: int = 0
    """Turns that have changed the state."""
    sent: int = 0
    """Messages it has sent; numbers the next one."""
    pos: int = 0
    """Rows in its chain."""
    head: bytes = NO_HASH
    """Hash of the last of them."""
    hold: str = ""
    """Why it gets no turns: ``quarantined`` or ``unknown effect``; empty: it does."""
    story: str = ""
    """What led to that, for people."""


Phase: TypeAlias = Literal["intent", "result", "failed", "unknown", "partial", "mark"]
"""``intent``: an effect is about to happen. ``result``, ``failed``: how it ended. ``unknown``:
nobody knows whether it happened. ``partial``: a piece of a stream. ``mark``: a code change."""

TURN = "turn"
"""``kind`` of the row that ends a turn; its seq is 0."""


class JournalRow(NamedTuple):
    """One line of an agent's journal. The store fills in ``pos`` and the hashes.

    (turn, seq, phase, part) is unique; the same row again is left out.
    """

    agent: str
    turn: str
    seq: int
    """Number of the syscall in its turn, from 1, in the order they were made; 0 ends the turn."""
    phase: str
    """See :data:`Phase`."""
    kind: str
    """Class name of the request; ``turn`` for the end of a turn."""
    name: str
    """The resource: a model, a corpus, an agent, a tool; for a turn the kind of its message."""
    args_hash: bytes = b""
    """16 bytes of BLAKE2b over ``args``."""
    args: bytes = b""
    """JSON of the request; for a turn the message's envelope in msgpack."""
    result: bytes = b""
    """JSON of the response or of the error. A *reference* ``sha256:<hex>`` stands for an
    ``args`` or ``result`` that is kept as a blob."""
    labels: bytes = b""
    """JSON."""
    provenance: bytes = b""
    """JSON list."""
    idem_key: str = ""
    """What an outside target was given to tell repetitions by; for a turn ``stream#seq`` of its
    message, by which a message that comes again finds its reply."""
    epoch: int = 0
    code_version: str = ""
    """First 16 hex digits of the sha256 of the program's source."""
    model_digest: str = ""
    cause: str = ""
    """For a turn: ``turn/seq`` that sent the message, empty from outside."""
    ts: float = 0.0
    """When it began, seconds since 1970."""
    elapsed_s: float = 0.0
    part: int = 0
    """Numbers the pieces of a stream, and code marks between two syscalls."""
    pos: int = 0
    """Place in the agent's chain, from 1: the order in which things ended."""
    prev_hash: bytes = b""
    hash: bytes = b""

    @property
    def tenant(self) -> str:
        """Whose agent it is."""
        return self.agent.split("/", 1)[0]


class MailRow(NamedTuple):
    """A message that waits, or is being handled. (receiver, stream, seq) is unique."""

    receiver: str
    stream: str
    """Who numbered it: an agent, a client, a turn that asks, a timer."""
    seq: int
    envelope: bytes
    """msgpack: see :class:`llmos.syscalls.messages.Envelope`."""
    priority: int = 0
    """Higher comes first, but never before an earlier message of the same stream."""
    not_before: float = 0.0
    """Seconds since 1970; after a failed attempt."""
    attempts: int = 0
    """Turns begun for it."""
    deaths: int = 0
    """Hosts lost with its turn under way."""
    turn: str = ""
    """The turn that was begun for it last; its rows are handed back when it runs again."""
    epoch: int = 0
    """Epoch of the host that began that turn."""
    arrival: int = 0
    """Filled in by the store: the order of arrival, over all receivers."""

    @property
    def key(self) -> tuple[str, str, int]:
        """What it is deduplicated by."""
        return self.receiver, self.stream, self.seq


class DeadLetter(NamedTuple):
    """A message that was given up."""

    id: int
    mail: MailRow
    reason: str
    story: str
    """What happened at each attempt, and the slice of the journal, for people."""
    died_at: float


class TimerRow(NamedTuple):
    """A message that an agent will be sent at a time. (agent, name) is unique."""

    agent: str
    name: str
    due: float
    """Seconds since 1970."""
    envelope: bytes
    cron: str = ""
    """Five fields; empty: once."""
    tz: str = "UTC"


class MonitorRow(NamedTuple):
    """An agent that is told when another one ends."""

    watched: str
    watcher: str
    linked: bool = False
    """Whether the watcher ends with it."""


# ---------------------------------------------------------------- writes


class Own(NamedTuple):
    """The part counts only if this epoch owns the agent's shard, and the launch still stands.

    Refused with StaleEpoch. Comes first in every part that an agent's host sends.
    """

    agent: str
    epoch: int
    launch: str = ""
    """Id of the launch; empty: do not ask for one."""


class TakeShards(NamedTuple):
    """Give shards to an owner. Owners before it, with higher or lower epochs, are shut out."""

    shards: tuple[int, ...]
    epoch: int


class PutLaunch(NamedTuple):
    """Launch, or replace a launch of that name."""

    row: LaunchRow


class DropLaunch(NamedTuple):
    """Forget a launch, its agents' states, mail, timers, topics and monitors.

    The journal and the chains stay: an agent of that name that comes again goes on with its
    chain.
    """

    agent: str


class Append(NamedTuple):
    """A row for the journal; again: left out."""

    row: JournalRow


class PutBlob(NamedTuple):
    """Bytes that are too long for a row; again: left out."""

    sha256: str
    data: bytes


class SaveAgent(NamedTuple):
    """What changed in an agent's row."""

    agent: str
    sent: int
    state: bytes | None = None
    """None: it stays as it is."""
    state_version: int = 0
    changes: int = 0


class SetHold(NamedTuple):
    """Stop an agent's turns, or let them go on (an empty ``hold``)."""

    agent: str
    hold: str
    story: str = ""


class PutMail(NamedTuple):
    """A message for a mailbox.

    Again: left out, whether it still waits, is a dead letter or was handled (a turn of the
    receiver has its ``stream#seq`` as ``idem_key``).
    """

    row: MailRow
    limit: int = 0
    """The part is refused with MailboxFull if so many wait for the receiver; 0: no limit."""


class BeginMail(NamedTuple):
    """An attempt at a message begins, or is put off: the row's counters are replaced."""

    receiver: str
    stream: str
    seq: int
    attempts: int
    deaths: int
    turn: str
    epoch: int
    not_before: float = 0.0


class EndMail(NamedTuple):
    """A message has been handled. The part is refused with AlreadyHandled if it does not wait."""

    receiver: str
    stream: str
    seq: int


class BuryMail(NamedTuple):
    """A message becomes a dead letter. Again: left out."""

    receiver: str
    stream: str
    seq: int
    reason: str
    story: str
    died_at: float


class ReviveDead(NamedTuple):
    """A dead letter goes back into its mailbox, at the end, for one more attempt.

    Its lost hosts are forgotten; its attempts are not, since by their number what they did
    outside is found.
    """

    id: int


class DropDead(NamedTuple):
    """A dead letter is thrown away."""

    id: int


class PutTimer(NamedTuple):
    """Set a timer, or replace the one of that name."""

    row: TimerRow


class DropTimer(NamedTuple):
    """Forget a timer. With ``due``: only if it still is due then."""

    agent: str
    name: str
    due: float | None = None


class TakeTimer(NamedTuple):
    """A timer fires. The part is refused with AlreadyHandled if it is not due then any more:
    it was replaced, cancelled, dropped with its launch, or has fired."""

    agent: str
    name: str
    due: float


class Subscribe(NamedTuple):
    """An agent wants what is published under a topic."""

    topic: str
    """``tenant/name``."""
    agent: str


class Unsubscribe(NamedTuple):
    """An agent wants it no more."""

    topic: str
    agent: str


class PutMonitor(NamedTuple):
    """Watch an agent."""

    row: MonitorRow


class DropMonitor(NamedTuple):
    """Watch an agent no more."""

    watched: str
    watcher: str


Write: TypeAlias = (
    Own
    | TakeShards
    | PutLaunch
    | DropLaunch
    | Append
    | PutBlob
    | SaveAgent
    | SetHold
    | PutMail
    | BeginMail
    | EndMail
    | BuryMail
    | ReviveDead
    | DropDead
    | PutTimer
    | DropTimer
    | TakeTimer
    | Subscribe
    | Unsubscribe
    | PutMonitor
    | DropMonitor
)

Part: TypeAlias = Sequence[Write]
