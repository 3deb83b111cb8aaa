"""Tables of what people operate on: dead letters, effects, held agents, timers, mail."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from llmos.drivers.errors import LlmosError
from llmos.drivers.stores.rows import DeadLetter, MailRow, TimerRow
from llmos.kernel import record
from llmos.shell import render
from llmos.shell.trace import Trace
from llmos.syscalls.messages import Envelope

if TYPE_CHECKING:
    from llmos.kernel.operating import DeadStory, Held, UnknownEffect


def when(at: float) -> str:
    """A time for people; empty for none."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(at)) if at else ""


def age(seconds: float) -> str:
    """A span of time for people, in its largest units: ``3d 4h``, ``2m 5s``."""
    left = max(round(seconds), 0)
    parts = []
    for unit, size in (("d", 86_400), ("h", 3_600), ("m", 60), ("s", 1)):
        count, left = divmod(left, size)
        if count:
            parts.append(f"{count}{unit}")
    return " ".join(parts[:2]) or "0s"


def table(*columns: str) -> Table:
    """A table without lines. What is to be copied out of it stands in one piece."""
    made = Table(box=None, pad_edge=False)
    for column in columns:
        made.add_column(column, overflow="fold", no_wrap=column in ("ID", "EFFECT", "KEY"))
    return made


# ---------------------------------------------------------------- mail


def mail_json(mail: MailRow, *, body: bool = True) -> dict[str, Any]:
    """A message that waits, for ``--json``."""
    out: dict[str, Any] = {
        "message": f"{mail.stream}#{mail.seq}",
        "receiver": mail.receiver,
        "kind": "?",
        "sender": "",
        "asked": False,
        "cause": "",
        "attempts": mail.attempts,
        "deaths": mail.deaths,
        "priority": mail.priority,
        "not_before": mail.not_before or None,
        "turn": mail.turn,
        "arrival": mail.arrival,
        "sent_at": None,
    }
    try:
        envelope = Envelope.unpack(mail.receiver, mail.stream, mail.seq, mail.envelope)
    except (LlmosError, ValueError, TypeError):
        return out  # By a newer LLM OS: the rest can still be shown.
    out |= {"kind": envelope.wire.kind, "sender": envelope.sender, "asked": envelope.asked}
    out["cause"] = envelope.cause
    timed = mail.stream.startswith("timer:")  # Their numbers are when they were due.
    out["sent_at"] = mail.seq / 1000 if timed else envelope.sent_at or None
    if body:
        out["body"] = record.view(envelope.wire.body)
    return out


def mail(rows: Sequence[MailRow], now: float) -> RenderableType:
    """``llmos mail``."""
    if not rows:
        return Text("Nothing waits.")
    made = table(
        *("MESSAGE", "KIND", "FROM", "AGE", "PRIORITY", "ATTEMPTS", "HOSTS LOST", "TURN"),
        "NOT BEFORE",
    )
    for row in rows:
        shown = mail_json(row, body=False)
        made.add_row(
            shown["message"],
            shown["kind"],
            shown["sender"],
            age(now - shown["sent_at"]) if shown["sent_at"] else "",
            str(row.priority),
            str(row.attempts),
            str(row.deaths),
            row.turn,
            when(row.not_before) if row.not_before > now else "",
        )
    return made


# ---------------------------------------------------------------- dead letters


def dead_json(letter: DeadLetter) -> dict[str, Any]:
    """A dead letter, for ``--json``."""
    return {
        "id": letter.id,
        **mail_json(letter.mail),
        "reason": letter.reason,
        "story": letter.story,
        "died_at": letter.died_at,
    }


def dead_letters(letters: Sequence[DeadLetter]) -> RenderableType:
    """``llmos dlq list``."""
    if not letters:
        return Text("There are no dead letters.")
    made = table("ID", "DIED", "AGENT", "MESSAGE", "KIND", "ATTEMPTS", "REASON")
    for letter in letters:
        shown = mail_json(letter.mail, body=False)
        made.add_row(
            str(letter.id),
            when(letter.died_at),
            letter.mail.receiver,
            shown["message"],
            shown["kind"],
            str(letter.mail.attempts),
            letter.reason,
        )
    return made


def dead_story(story: DeadStory) -> RenderableType:
    """``llmos dlq show``."""
    letter = story.letter
    shown = mail_json(letter.mail)
    head = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    head.add_row("dead letter", str(letter.id))
    head.add_row("agent", letter.mail.receiver)
    head.add_row("message", f"{shown['message']}  {shown['kind']} {shown.get('body', '')}")
    head.add_row("from", f"{shown['sender']} {shown['cause']}".strip())
    head.add_row("died", when(letter.died_at))
    head.add_row("reason", Text(letter.reason, style="red"))
    head.add_row("attempts", f"{letter.mail.attempts}, hosts lost: {letter.mail.deaths}")
    parts: list[RenderableType] = [head, Text(), Text(letter.story)]
    for rows in story.turns:
        parts += [Text(), render.turn(Trace.of(rows))]
    tail = f"llmos dlq retry {letter.id}    llmos dlq drop {letter.id}"
    return Group(*parts, Text(tail, style="dim"))


# ---------------------------------------------------------------- held agents, effects, timers


def held(agents: Sequence[Held]) -> RenderableType:
    """``llmos held``."""
    if not agents:
        return Text("No agent is held.")
    made = table("AGENT", "HELD", "STORY")
    for agent in agents:
        made.add_row(agent.agent, Text(agent.hold, style="red"), agent.story)
    return made


def effect_json(effect: UnknownEffect) -> dict[str, Any]:
    """An unknown effect, for ``--json``."""
    request = record.view(effect.args) or {}
    return {
        "effect": f"{effect.turn}/{effect.seq}",
        "agent": effect.agent,
        "tool": effect.tool,
        "arguments": request.get("arguments"),
        "idem_key": effect.idem_key,
        "error": record.view(effect.error),
        "began_at": effect.ts,
    }


def effects(found: Sequence[UnknownEffect]) -> RenderableType:
    """``llmos effects list``."""
    if not found:
        return Text("No effect is unknown.")
    made = table("EFFECT", "AGENT", "TOOL", "BEGAN", "KEY", "ARGUMENTS")
    for effect in found:
        shown = effect_json(effect)
        made.add_row(
            shown["effect"],
            effect.agent,
            effect.tool,
            when(effect.ts),
            effect.idem_key,
            str(shown["arguments"]),
        )
    return made


def timer_json(timer: TimerRow) -> dict[str, Any]:
    """A timer, for ``--json``."""
    kind, body = "?", None
    try:
        envelope = Envelope.unpack(timer.agent, "", 0, timer.envelope)
        kind, body = envelope.wire.kind, record.view(envelope.wire.body)
    except (LlmosError, ValueError, TypeError):
        kind = "?"
    return {
        "agent": timer.agent,
        "name": timer.name,
        "due": timer.due,
        "cron": timer.cron,
        "tz": timer.tz,
        "kind": kind,
        "body": body,
    }


def timers(rows: Sequence[TimerRow]) -> RenderableType:
    """``llmos timers``."""
    if not rows:
        return Text("No timer is set.")
    made = table("AGENT", "NAME", "DUE", "AGAIN", "MESSAGE")
    for row in rows:
        shown = timer_json(row)
        again = f"{row.cron} ({row.tz})" if row.cron else ""
        made.add_row(row.agent, row.name, when(row.due), again, f"{shown['kind']} {shown['body']}")
    return made
