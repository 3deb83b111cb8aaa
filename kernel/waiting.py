"""What one host has for an agent: its turns under way, and its messages that wait."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llmos.syscalls.classify import Classify
from llmos.syscalls.clock import Sleep
from llmos.syscalls.effects import Call
from llmos.syscalls.embed import Embed
from llmos.syscalls.generate import Generate
from llmos.syscalls.messages import Ask

if TYPE_CHECKING:
    from llmos.kernel.clock import Clock
    from llmos.kernel.inbox import Inbox
    from llmos.kernel.turns import Entry
    from llmos.syscalls.base import Request

MAX_SHOWN = 50
"""Messages that are told of one by one."""


def look(inbox: Inbox, clock: Clock, agent: str) -> dict[str, Any]:
    """Plain data: turns under way with their calls, and what waits, in order, with what holds
    each up."""
    mine = [e for e in inbox.entries.values() if e.mail.receiver == agent]
    running = [e for e in mine if e.id in inbox.mailboxes.running]
    waiting = inbox.mailboxes.order(agent)
    shown = []
    for place, turn in enumerate(waiting[:MAX_SHOWN]):
        entry = inbox.entries.get(turn.id)
        if entry is not None:
            ahead = [t for t in waiting[:place] if t.stream == turn.stream]
            holds = _holds(inbox, clock, agent, running, turn.not_before, turn.read_only)
            shown.append(
                {
                    **_message(entry, clock),
                    "position": place + 1,
                    "behind": "its stream" if ahead else "others" if place else "",
                    **holds,
                }
            )
    return {
        "turns": [_turn(e, clock) for e in running],
        "messages": shown,
        "waiting": len(waiting),
    }


def _message(entry: Entry, clock: Clock) -> dict[str, Any]:
    envelope = entry.envelope
    return {
        "message": envelope.id,
        "kind": envelope.wire.kind,
        "sender": envelope.sender,
        "asked": envelope.asked,
        "waited_s": clock.monotonic() - entry.arrived,
        "attempts": entry.mail.attempts,
        "story": list(entry.story),
    }


def _holds(
    inbox: Inbox,
    clock: Clock,
    agent: str,
    running: list[Entry],
    not_before: float,
    read_only: bool,
) -> dict[str, Any]:
    """What keeps a message from being started, whatever stands before it."""
    writes = [e.mail.turn for e in running if not e.spec.read_only]
    reads = [e.mail.turn for e in running if e.spec.read_only]
    boxes = inbox.mailboxes
    by: str
    turns: list[str]
    if boxes.held(agent):
        by, turns = "hold", []
    elif not_before > clock.time():
        by, turns = "time", []
    elif writes:
        by, turns = "turn", writes
    elif reads and (not read_only or len(reads) >= boxes.side_by_side(agent)):
        by, turns = "readers", reads
    elif len(boxes.running) >= boxes.running_limit:
        by, turns = "host", []
    else:
        by, turns = "", []
    return {
        "by": by,
        "turns": turns,
        "not_before": not_before if by == "time" else None,
        "host_limit": boxes.running_limit if by == "host" else None,
    }


def _turn(entry: Entry, clock: Clock) -> dict[str, Any]:
    dispatcher = entry.dispatcher
    calls = [] if dispatcher is None else dispatcher.under_way()
    return {
        **_message(entry, clock),
        "turn": entry.mail.turn,
        "remaining_s": dispatcher.remaining_s if dispatcher is not None else None,
        "stage": "starting"
        if dispatcher is None
        else "committing"
        if dispatcher.ended
        else "calling"
        if calls
        else "computing",
        "calls": [
            {"seq": seq, "syscall": r.syscall, "since_s": since_s, **_facts(r)}
            for seq, r, since_s in calls
        ],
    }


def _facts(request: Request[Any]) -> dict[str, Any]:
    match request:
        case Generate():
            return {"for": "model", "name": request.model}
        case Embed() | Classify():
            return {"for": "encoder", "name": request.model}
        case Ask():
            return {"for": "agent", "name": request.agent}
        case Sleep():
            return {"for": "time", "name": "", "seconds": request.seconds}
        case Call():
            return {"for": "tool", "name": request.tool}
    return {"for": "kernel", "name": request.resource}
