"""What a syscall leaves to the end of its turn: it happens with the commit, or not at all."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, TypeAlias

from llmos.syscalls.labels import NO_LABELS, Labels

if TYPE_CHECKING:
    from llmos.syscalls.messages import Wire


class Post(NamedTuple):
    """A message to an agent."""

    receiver: str
    wire: Wire
    cause: str
    """``turn/seq`` of the syscall."""
    priority: int = 0
    labels: Labels = NO_LABELS


class Timer(NamedTuple):
    """A message to oneself at a time; replaces the timer of that name."""

    name: str
    due: float
    """Seconds since 1970."""
    wire: Wire
    labels: Labels = NO_LABELS
    cron: str = ""
    tz: str = "UTC"


class NoTimer(NamedTuple):
    """Forget a timer."""

    name: str


class Subscription(NamedTuple):
    """Begin or cease to receive what is published under a topic."""

    topic: str
    """``tenant/name``."""
    on: bool


class Watch(NamedTuple):
    """Begin or cease to be told when an agent ends."""

    agent: str
    on: bool
    linked: bool = False
    """End with it."""


Deferred: TypeAlias = Post | Timer | NoTimer | Subscription | Watch
