"""``timer``: messages to oneself at a time, or again and again.

A timer is set when the turn commits, and outlives hosts and restarts. What it brings is a
message like any other: one turn, tried again like others, in the order of the mailbox.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, Field, model_validator

from llmos.syscalls.base import Caller, Request, Response, Services, handles
from llmos.syscalls.deferred import NoTimer, Timer
from llmos.syscalls.errors import InvalidRequest
from llmos.syscalls.labels import Labels
from llmos.syscalls.messages import Wire

MAX_AHEAD_S = 10 * 366 * 86_400.0
"""How far ahead a timer may be due: ten years."""


def _printable(name: str) -> str:
    # Names are keys in the store and stand in tables; no database holds a NUL.
    if not name.isprintable():
        raise ValueError("a timer's name has printable characters only")
    return name


TimerName = Annotated[str, Field(min_length=1, max_length=100), AfterValidator(_printable)]
"""Tells the timers of one agent apart; 1 to 100 printable characters."""


class TimerSet(Response):
    """The timer will be there when the turn has committed."""

    due: float
    """When it is due first, in seconds since 1970."""


class TimerCancelled(Response):
    """The timer will be gone when the turn has committed, if it was there."""


class SetTimer(Request[TimerSet]):
    """Get a message at a time; replaces this agent's timer of that name."""

    syscall: ClassVar[str] = "timer"
    reach: ClassVar[Literal["deferred"]] = "deferred"

    name: TimerName
    message: Wire
    after_s: float | None = Field(default=None, ge=0, le=MAX_AHEAD_S, allow_inf_nan=False)
    """Seconds from now."""
    at: float | None = Field(default=None, allow_inf_nan=False)
    """Seconds since 1970; what is past is due at once."""
    cron: str | None = Field(default=None, min_length=1, max_length=200)
    """Again and again: five fields, minute to day of the week."""
    tz: str = Field(default="UTC", min_length=1, max_length=64)
    """Time zone of ``cron``, e.g. ``Europe/Berlin``."""

    @model_validator(mode="after")
    def _one_of_three(self) -> SetTimer:
        given = [n for n in ("after_s", "at", "cron") if getattr(self, n) is not None]
        if len(given) != 1:
            raise ValueError(
                f"exactly one of after_s, at and cron; given: {', '.join(given) or 'none'}"
            )
        return self


class CancelTimer(Request[TimerCancelled]):
    """Forget a timer of this agent; nothing happens if there is none."""

    syscall: ClassVar[str] = "timer"
    reach: ClassVar[Literal["deferred"]] = "deferred"

    name: TimerName


@handles(SetTimer)
async def set_timer(request: SetTimer, caller: Caller, services: Services) -> TimerSet:
    """Work out when it is due, and leave it to the commit.

    Raises:
        InvalidRequest: due more than ten years ahead, no such time zone, or the cron
            expression cannot be read.
    """
    now = services.time()
    if request.cron is not None:
        due = services.next_due(request.cron, request.tz)
    elif request.at is not None:
        due = request.at
    else:
        assert request.after_s is not None
        due = now + request.after_s
    if due > now + MAX_AHEAD_S:
        field = "cron" if request.cron is not None else "at"
        raise InvalidRequest("timer", field, "it is due more than ten years ahead")
    services.defer(timer_of(request, due, caller.labels))
    return TimerSet(due=due)


def timer_of(request: SetTimer, due: float, labels: Labels) -> Timer:
    """The timer that is set when the turn commits."""
    return Timer(request.name, due, request.message, labels, request.cron or "", request.tz)


@handles(CancelTimer)
async def cancel_timer(request: CancelTimer, caller: Caller, services: Services) -> TimerCancelled:
    """Leave it to the commit."""
    services.defer(NoTimer(request.name))
    return TimerCancelled()
