"""A recorded turn, run again with the recorded results only: nothing goes out.

The handler runs as in a host, on the same dispatcher. A call that the record does not hold
ends it; what comes of it is compared with what came of it then.
"""

from __future__ import annotations

import asyncio
import difflib
import dis
import itertools
import json
import pdb
import sys
from collections.abc import Coroutine
from pathlib import Path
from types import CodeType
from typing import Any, NamedTuple, cast

from llmos.drivers.errors import LlmosError
from llmos.drivers.stores.rows import AgentRow, JournalRow, MailRow, Own
from llmos.kernel import record
from llmos.kernel.activation import Active, Prepared
from llmos.kernel.clock import SystemClock
from llmos.kernel.core.attempts import MailPolicy
from llmos.kernel.core.replay import Recorded
from llmos.kernel.core.supervision import AgentSupervisor
from llmos.kernel.dispatch import PATCHED, TurnDispatcher
from llmos.kernel.program import ProgramLoader
from llmos.kernel.recording import Recording
from llmos.kernel.turnlog import TurnLog
from llmos.kernel.turns import Entry, TurnRunner
from llmos.syscalls.base import Request, Response, Services
from llmos.syscalls.errors import (
    Cancelled,
    DeadlineExceeded,
    EffectUnknown,
    UnhandledMessage,
)
from llmos.syscalls.messages import Message, Wire

TIMEOUT_S = 60.0
"""What a handler gets: everything it waits for is at hand."""
DEBUG_S = 1e9
"""The same with somebody looking."""
QUIET_S = 0.5
"""A turn that was cut off is cut off again when it has gone no further for so long."""
MAX_DIFF_LINES = 80
"""Of a difference are shown."""


class NotRecorded(LlmosError):
    """The turn that is run again makes a call that its record does not hold."""

    def __init__(self, agent: str, turn: str, seq: int, kind: str, name: str) -> None:
        self.agent, self.turn, self.seq = agent, turn, seq
        self.kind, self.name = kind, name
        super().__init__(
            f"Call {seq} of turn {turn} of {agent}, {kind}({name}), is not recorded",
            remedy="Offline nothing goes out: here the turn was cut off, or its code has changed",
        )


class Replayed(NamedTuple):
    """What came of it."""

    turn: str
    agent: str
    identical: bool
    """Reply, error, state, labels and every call are those of the record; of a turn that has
    no end: as far as it goes."""
    ended: bool
    """Whether the record has an end to compare with."""
    differences: tuple[str, ...]
    """Each a heading and a diff."""
    calls: int
    """Made in this run."""
    code_version: str
    """Of the program that ran."""
    recorded_code: str
    """Of the program that was recorded."""
    reply: Wire | None
    error: LlmosError | None


async def replay(
    recording: Recording, *, search: Path | None = None, debugger: pdb.Pdb | None = None
) -> Replayed:
    """Run a recorded turn again.

    Args:
        recording: The turn.
        search: A folder that is put on the import path first, for its program.
        debugger: Stops at the first line of the handler.

    Raises:
        ProgramError, StateError: the program cannot be loaded, or its state cannot.
        UnhandledMessage, InvalidMessage: it does not take the message any more.
    """
    rows, end, agent, turn = recording.rows, recording.end, recording.agent, recording.turn
    launch, envelope = recording.launch, recording.envelope
    program = await ProgramLoader(search).load(launch.program)
    prepared = Prepared(launch, program)
    version = recording.state_version or program.state_version
    active = Active(
        agent, prepared, AgentRow(agent, recording.state, version, changes=recording.base)
    )
    spec = program.handlers.get(envelope.wire.kind)
    if spec is None:
        raise UnhandledMessage(agent, envelope.wire.kind, program.handlers)
    message = envelope.wire.decode(spec.message, agent)
    first = end or rows[0]
    dispatcher = _Again(
        agent=agent,
        turn=turn,
        chain=envelope.chain,
        manifest=prepared.manifest,
        services=cast(Services, _Nothing()),
        clock=SystemClock(),
        deadline_s=DEBUG_S if debugger is not None else TIMEOUT_S,
        labels=envelope.labels,
        log=_NoLog(),
        epoch=first.epoch,
        code_version=first.code_version,
        recorded=[row for row in rows if row is not end],
        began_at=first.ts,
        ended=end is not None,
    )
    recorded = json.loads(end.result) if end is not None else {}
    cut_off = _cut_off(recorded.get("error"))
    mail = MailRow(agent, envelope.stream, envelope.seq, envelope.pack(), turn=turn)
    entry = Entry(envelope.id, envelope, mail, spec, message, 0.0)
    reply, error, state = await _Runner(debugger, cut_off).again(active, entry, dispatcher)
    whole = end is not None and not isinstance(error, Cancelled | DeadlineExceeded)
    stopped = dispatcher.finish(whole=whole)
    wire: Wire | None = None
    if error is None and reply is not None:
        wire = Wire.of(reply)
    differences: list[str] = []
    cut_here = end is None and isinstance(stopped, NotRecorded | EffectUnknown)
    if stopped is not None and not cut_here:
        differences.append(str(stopped))
    elif end is not None:
        now = json.loads(
            record.turn_result(wire, error, recording.base, state if error is None else None)
        )
        labels = json.loads(record.pack_labels(dispatcher.labels) or b"{}")
        differences += _compare(recorded, now)
        differences += _differing("labels", json.loads(end.labels or b"{}"), labels)
    return Replayed(
        turn=turn,
        agent=agent,
        identical=not differences,
        ended=end is not None,
        differences=tuple(differences),
        calls=dispatcher.count,
        code_version=prepared.code_version,
        recorded_code=first.code_version,
        reply=wire,
        error=stopped or error,
    )


# ---------------------------------------------------------------- what is compared


def _compare(then: dict[str, Any], now: dict[str, Any]) -> list[str]:
    out: list[str] = []
    out += _differing("reply", then.get("reply"), now.get("reply"))
    out += _differing("error", _error(then.get("error")), _error(now.get("error")))
    out += _differing("state", then.get("state"), now.get("state"))
    return out


def _error(error: dict[str, Any] | None) -> Any:
    """Without where in the code it was raised, which any change moves."""
    if error is None or "where" not in error.get("facts", {}):
        return error
    facts = {k: v for k, v in error["facts"].items() if k not in ("where", "remedy")}
    return {"error": error["error"], "facts": facts}


def _differing(what: str, then: Any, now: Any) -> list[str]:
    if then == now:
        return []
    lines = difflib.unified_diff(_pretty(then), _pretty(now), "recorded", "now", n=2, lineterm="")
    shown = "\n".join(itertools.islice(lines, MAX_DIFF_LINES))
    return [f"the {what} differs\n{shown}"]


def _pretty(value: Any) -> list[str]:
    return json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False).splitlines()


def _cut_off(error: dict[str, Any] | None) -> LlmosError | None:
    """The error of a turn that did not come to its end by itself."""
    if error is None:
        return None
    raised = record.raised(json.dumps(error).encode())
    return raised if isinstance(raised, Cancelled | DeadlineExceeded) else None


# ---------------------------------------------------------------- what it runs on


class _Again(TurnDispatcher):
    """A dispatcher that has the record and nothing else."""

    def __init__(self, *, recorded: list[JournalRow], ended: bool, **given: Any) -> None:
        super().__init__(recorded=recorded, **given)
        self._ended_then = ended
        self._recorded_marks = {r.name for r in recorded if r.kind == PATCHED}
        if self._replay is None:
            self._replay = self._make_replay(recorded)

    async def _match(
        self, seq: int, request: Request[Any], args: bytes, digest: bytes
    ) -> Recorded | None:
        found = await super()._match(seq, request, args, digest)
        if found is None or found.phase == "intent":
            # Not as an error of the call: a handler may catch it and go on.
            kind, name = type(request).__name__, request.resource
            await self._stop(NotRecorded(self.agent, self.turn, seq, kind, name))
        return found

    def patched(self, name: str) -> bool:
        """As it was answered then: of a turn that has ended all answers are recorded."""
        if self._ended_then:
            return name in self._recorded_marks
        return super().patched(name)

    async def _defer_again(self, seq: int, request: Request[Any], response: Response) -> None:
        """It was left to the commit of the turn, then."""

    def progress(self) -> tuple[int, int | None]:
        """Changes with every call and every result."""
        assert self._replay is not None
        return self.count, self._replay.next_seq()


class _Nothing:
    """No services: no call gets so far."""

    def defer(self, action: object) -> None:
        """It was left to the commit of the turn, then."""


class _NoLog(TurnLog):
    """Nothing is recorded of it."""

    def __init__(self) -> None:
        super().__init__(Own("", 0), cast(Any, None))

    def add(self, row: JournalRow) -> None:
        """Left out."""

    def soon(self) -> None:
        """There is nothing to be flushed."""

    async def barrier(self) -> None:
        """Everything is durable."""


class _Runner(TurnRunner):
    """Runs the handler as a host does."""

    def __init__(self, debugger: pdb.Pdb | None, cut_off: LlmosError | None) -> None:
        nothing = cast(Any, None)
        super().__init__(0, SystemClock(), nothing, nothing, MailPolicy(), AgentSupervisor())
        self._debugger = debugger
        self._cut_off = cut_off

    async def again(
        self, active: Active, entry: Entry, dispatcher: _Again
    ) -> tuple[Message | None, LlmosError | None, bytes | None]:
        """The handler's reply, its error, and the new state if there is one."""
        return await self._handle(active, entry, dispatcher)

    async def _run(
        self, handler: Coroutine[Any, Any, Message | None], dispatcher: TurnDispatcher
    ) -> Message | None:
        if self._debugger is not None:
            handler = _debugged(self._debugger, handler)
        if self._cut_off is None:
            return await super()._run(handler, dispatcher)
        assert isinstance(dispatcher, _Again)
        return await self._until_quiet(handler, dispatcher, self._cut_off)

    async def _until_quiet(
        self,
        handler: Coroutine[Any, Any, Message | None],
        dispatcher: _Again,
        cut_off: LlmosError,
    ) -> Message | None:
        running = asyncio.create_task(super()._run(handler, dispatcher))
        while True:
            before = dispatcher.progress()
            await asyncio.wait({running}, timeout=QUIET_S)
            if running.done():
                break
            if dispatcher.progress() == before:
                running.cancel("the end of the record")
                await asyncio.wait({running})
                break
        if not running.cancelled():
            return running.result()
        raise cut_off


async def _debugged(
    debugger: pdb.Pdb, handler: Coroutine[Any, Any, Message | None]
) -> Message | None:
    """Stop at the handler's first line. The debugger sees this task's thread only."""
    code = cast(CodeType, cast(Any, handler).cr_code)
    debugger.reset()
    refused = debugger.set_break(code.co_filename, _first_line(code), temporary=True)
    if refused is not None:
        handler.close()
        raise RuntimeError(refused)
    before = sys.gettrace()
    sys.settrace(debugger.trace_dispatch)
    try:
        return await handler
    finally:
        sys.settrace(before)


def _first_line(code: CodeType) -> int:
    """Of the body, not of the decorators."""
    lines = [line for _, line in dis.findlinestarts(code) if line is not None]
    return next((line for line in lines if line != code.co_firstlineno), code.co_firstlineno)
