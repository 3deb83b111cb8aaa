"""What becomes of a message whose turn failed, or whose host was lost with it.

Two counters, for two ways to go wrong. A *failure* is a turn that raised: its cause may be
outside and pass, so the message waits, longer each time. A *death* is a host lost while the
turn ran: most often chance hit the message, so it runs again at once; a message under which
hosts die again is poison and must not take the others' hosts with it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from llmos.kernel.core.restarts import spread


@dataclass(frozen=True, slots=True)
class MailPolicy:
    """How often a message is tried."""

    attempts: int = 5
    """Turns that may fail before the message is given up."""
    deaths: int = 2
    """Hosts that may be lost with it before it is given up."""
    first_delay_s: float = 0.5
    factor: float = 2.0
    """Each wait is so many times the one before."""
    max_delay_s: float = 60.0
    """Before jitter."""
    jitter: float = 0.2
    """Share of a delay by which chance makes it shorter or longer."""


class Retry(NamedTuple):
    """Try again, at the front of its stream."""

    delay_s: float


class Bury(NamedTuple):
    """Make it a dead letter."""

    reason: str


class Answer(NamedTuple):
    """Give the error to whoever asked, and end the message."""


def after_failure(
    policy: MailPolicy, attempts: int, asked: bool, retryable: bool, chance: float
) -> Retry | Bury | Answer:
    """A turn raised.

    Args:
        policy: how often.
        attempts: turns begun for the message, this one among them.
        asked: whether somebody waits for the reply. It is never tried again: they get the
            error now and know better what to do.
        retryable: whether the same turn may fare better later. A body that does not fit,
            a missing capability or a bug found by the replay never will.
        chance: in [0, 1).
    """
    if asked:
        return Answer()
    if not retryable:
        return Bury("an error that another attempt would not change")
    if attempts >= policy.attempts:
        return Bury(f"{attempts} of {policy.attempts} attempts failed")
    try:
        delay_s = policy.first_delay_s * policy.factor ** max(0, attempts - 1)
    except OverflowError:
        delay_s = policy.max_delay_s
    return Retry(spread(min(delay_s, policy.max_delay_s), policy.jitter, chance))


def after_death(policy: MailPolicy, deaths: int, asked: bool) -> Retry | Bury:
    """The host was lost while the turn ran.

    The turn runs again whether somebody asked or not: what it did is recorded, so the asker
    gets the answer that was under way.

    Args:
        policy: how often.
        deaths: hosts lost with this message, this one among them.
        asked: whether somebody waits for the reply; they get the error if it is buried.
    """
    if deaths >= policy.deaths:
        who = "; its asker gets the error" if asked else ""
        return Bury(f"{deaths} hosts were lost while they handled it{who}")
    return Retry(0.0)
