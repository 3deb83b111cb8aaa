"""A turn's rows as people look at them: one step for each call and each mark."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from llmos.drivers.errors import LlmosError
from llmos.drivers.stores.rows import TURN, JournalRow
from llmos.kernel import record
from llmos.syscalls.messages import Envelope

_RETRY = "Retry"
_MARKS = ("Patched", _RETRY)
"""As in :mod:`llmos.kernel.dispatch`, which loads Ray: the command line starts without."""


@dataclass(slots=True)
class Step:
    """A call with all that is recorded of it, or a mark."""

    seq: int
    name: str
    """Class name of the request, or the kind of a mark."""
    resource: str
    started_s: float
    """Since the turn began."""
    elapsed_s: float
    status: str
    """``ok``, ``error``, ``denied``, ``cancelled``; ``running``: no end is recorded, ``unknown``:
    nobody knows whether it happened, ``mark``: no call."""
    phases: list[str] = field(default_factory=list)
    """Of its rows, in order."""
    pieces: int = 0
    """Rows in which what a stream had handed out was kept before its end."""
    pos: int = 0
    """Of its last row: the order in which calls ended."""
    idem_key: str = ""
    """What the target of an effect was given to tell repetitions by."""
    effect: str = ""
    """``turn/seq`` of an effect that is unknown, as ``llmos effects resolve`` takes it."""
    request: Any = None
    result: Any = None
    provenance: Any = None
    labels: Any = None


@dataclass(slots=True)
class Trace:
    """A turn, ended or not."""

    turn: str
    agent: str
    epoch: int
    kind: str
    message: Any
    cause: str
    sender: str
    started_at: float
    elapsed_s: float | None
    """None: it has no end."""
    status: str
    """``ok``, ``error``, ``denied``, ``cancelled`` or ``running``."""
    reply: Any
    error: dict[str, Any] | None
    base: int
    """Number of the change of state that it began with."""
    changed: bool
    """Whether it left another state."""
    code_version: str
    steps: list[Step]

    @classmethod
    def of(cls, rows: Sequence[JournalRow]) -> Trace:
        """Out of the rows of one turn, of which there is at least one."""
        end = next((row for row in rows if row.kind == TURN), None)
        others = [row for row in rows if row is not end]
        began = end.ts if end is not None else min(row.ts for row in others)
        first = end or rows[0]
        result = record.view(end.result) if end is not None else {}
        kind, message, sender = _message(end)
        reply = result.get("reply")
        return cls(
            turn=first.turn,
            agent=first.agent,
            epoch=first.epoch,
            kind=kind,
            message=message,
            cause=first.cause,
            sender=sender,
            started_at=began,
            elapsed_s=end.elapsed_s if end is not None else None,
            status=_turn_status(end),
            reply=reply["body"] if isinstance(reply, dict) else None,
            error=result.get("error"),
            base=result.get("base", 0),
            changed="state" in result,
            code_version=first.code_version,
            steps=_steps(others, began),
        )

    def error_text(self) -> str:
        """The error in one text; empty if there is none."""
        return f"{self.error['error']}: {self.error['message']}" if self.error else ""

    def as_json(self, *, syscalls: bool = True) -> dict[str, Any]:
        """For ``--json``."""
        out = asdict(self)
        steps = out.pop("steps")
        return {**out, "syscalls": steps} if syscalls else out


def status(row: JournalRow) -> str:
    """What a row says of its call, in one word."""
    if row.phase == "failed":
        return status_of(_raised(row.result))
    words = {"result": "ok", "intent": "running", "partial": "running", "unknown": "unknown"}
    return words.get(row.phase, row.phase)


def status_of(error: LlmosError) -> str:
    """See :func:`llmos.kernel.dispatch.status_of`."""
    from llmos.kernel import dispatch

    return dispatch.status_of(error)


def _raised(result: bytes) -> LlmosError:
    try:
        return record.raised(result)
    except ValueError:
        return record.RecordedError("?", "")


def _turn_status(end: JournalRow | None) -> str:
    if end is None:
        return "running"
    if end.phase != "failed":
        return "ok"
    error = json.loads(end.result).get("error") if end.result else None
    return status_of(_raised(json.dumps(error or {}).encode()))


def _message(end: JournalRow | None) -> tuple[str, Any, str]:
    """Kind, body and sender of the message that the turn handled."""
    if end is None:
        return "", None, ""
    try:
        # Stream and number are of no interest here.
        envelope = Envelope.unpack(end.agent, "", 0, end.args)
        return end.name, record.view(envelope.wire.body), envelope.sender
    except (LlmosError, ValueError, TypeError):
        return end.name, None, ""


def _steps(rows: Sequence[JournalRow], began: float) -> list[Step]:
    calls: dict[int, list[JournalRow]] = {}
    steps: list[Step] = []
    for row in rows:
        if row.kind in _MARKS:
            steps.append(_step([row], began, "mark"))
            if row.kind != _RETRY:
                continue
        calls.setdefault(row.seq, []).append(row)
    for some in calls.values():
        own = [row for row in some if row.kind not in _MARKS]
        if own:
            # After a retry was allowed it is under way again.
            found = "running" if some[-1].kind == _RETRY else status(own[-1])
            steps.append(_step(own, began, found))
    return sorted(steps, key=lambda step: (step.seq, step.status == "mark", step.pos))


def _step(rows: list[JournalRow], began: float, status: str) -> Step:
    first, last = rows[0], rows[-1]
    args = next((row.args for row in rows if row.args), b"")
    ended = last.phase in ("result", "failed", "unknown")
    return Step(
        seq=last.seq,
        name=last.kind,
        resource=last.name,
        started_s=max(min(row.ts for row in rows) - began, 0.0),
        elapsed_s=last.elapsed_s,
        status=status,
        phases=[row.phase for row in rows],
        pieces=sum(1 for row in rows if row.phase == "partial"),
        pos=last.pos,
        idem_key=first.idem_key,
        effect=f"{last.turn}/{last.seq}" if status == "unknown" else "",
        request=record.view(args) or {},
        result=record.view(last.result) if ended else _written(rows),
        provenance=record.view(last.provenance) or [],
        labels=record.view(last.labels) or {},
    )


def _written(rows: list[JournalRow]) -> Any:
    """What a stream without an end had handed out."""
    pieces = [p for row in rows if row.phase == "partial" for p in json.loads(row.result)["pieces"]]
    text = "".join(str(text) for text, _ in pieces)
    return record.view(json.dumps({"text": text}).encode()) if pieces else None
