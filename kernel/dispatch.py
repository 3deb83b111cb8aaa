"""The dispatcher: one for each turn, between the agent's context and the handlers.

For every syscall, in this order: bound on their number, the record of an earlier run,
capability, labels, deadline, what must be durable before, handler, provenance and labels
joined into the turn, record, metrics.

Results are handed to the agent one by one, each only when all that the one before set off
has run. So which calls an agent makes next depends only on the order in which results were
handed back, which is the order of the rows in its journal, and a turn that runs again with
them takes the same way.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

from llmos.drivers.errors import LlmosError, ToolUncertain
from llmos.drivers.protocols import GenerationChunk
from llmos.drivers.stores.rows import TURN, JournalRow
from llmos.kernel import record
from llmos.kernel.clock import Clock
from llmos.kernel.core.errors import Nondeterminism
from llmos.kernel.core.labels import refusal
from llmos.kernel.core.replay import Recorded, Replay
from llmos.kernel.manifest import Manifest
from llmos.kernel.metrics import SYSCALLS
from llmos.kernel.turnlog import TurnLog
from llmos.syscalls import (  # the import registers the handlers
    classify,
    clock,
    effects,
    embed,
    exits,
    generate,
    graph,
    messages,
    retrieve,
    rules,
    show,
    state,
    timers,
    topics,
)
from llmos.syscalls.base import HANDLERS, Caller, Request, Response, Services
from llmos.syscalls.effects import Call
from llmos.syscalls.errors import (
    Busy,
    CallCycle,
    Cancelled,
    CapabilityDenied,
    DeadlineExceeded,
    EffectUnknown,
    LabelViolation,
    UnknownAgent,
)
from llmos.syscalls.generate import Generate
from llmos.syscalls.labels import Labels, Provenance
from llmos.syscalls.messages import Ask, Send
from llmos.syscalls.show import Show
from llmos.syscalls.state import ReadState

if TYPE_CHECKING:
    from types import ModuleType

ResponseT = TypeVar("ResponseT", bound=Response)

FAMILIES: tuple[ModuleType, ...] = (
    classify,
    clock,
    effects,
    embed,
    exits,
    generate,
    graph,
    messages,
    retrieve,
    rules,
    show,
    state,
    timers,
    topics,
)
"""The syscall families that this kernel serves."""

_TO_AGENTS = (Ask, Send)

SETTLE = 8
"""Rounds of the event loop that a result is given to set off what it sets off: more than
gather, wait_for and task groups inside one another need."""
PATCHED = "Patched"
"""``kind`` of the mark that :meth:`TurnDispatcher.patched` leaves."""
RETRY = "Retry"
"""``kind`` of the mark by which a person says that an unknown effect may be tried again."""
STALL_S = 5.0
"""A turn that runs again and for so long does not make the call that it made before takes
another way than it did."""


class TurnDispatcher:
    """Carries out the syscalls of one turn. Implements :class:`llmos.kernel.context.Dispatcher`."""

    def __init__(
        self,
        *,
        agent: str,
        turn: str,
        chain: tuple[str, ...],
        manifest: Manifest,
        services: Services,
        clock: Clock,
        deadline_s: float,
        labels: Labels,
        log: TurnLog,
        epoch: int = 0,
        code_version: str = "",
        recorded: list[JournalRow] | None = None,
        message_id: str = "",
        carried: dict[str, JournalRow] | None = None,
        began_at: float | None = None,
        again: bool = False,
    ) -> None:
        self.agent = agent
        self.turn = turn
        self.labels = labels
        self.provenance: dict[Provenance, None] = {}
        """Everything the turn rests on, in the order it was seen."""
        self.count = 0
        self.stopped: LlmosError | None = None
        """Why the turn cannot go on: it has left the way it took before, or nobody knows
        whether an effect happened. Its handler then waits to be cancelled."""
        self.on_stop: Callable[[], None] | None = None
        """Called once when that is so."""
        self._ended = False
        self._chain = chain
        self._manifest = manifest
        self._services = services
        self._clock = clock
        self._began = clock.monotonic()
        self._began_at = clock.time() if began_at is None else began_at
        self._deadline_s = deadline_s
        self._log = log
        self._epoch = epoch
        self._code_version = code_version
        self._digest = ""
        self._open: dict[int, tuple[Request[Any], float, bytes, bytes]] = {}
        """Syscalls that have begun and not ended: request, start, arguments and their hash."""
        self._parallel = False
        """Whether two were ever under way at once: only then the order of results needs care."""
        self._gate: asyncio.Lock | None = None
        """Where results wait for one another. Most turns need none."""
        self._message_id = message_id
        self._again = again
        """Whether an earlier run of the turn was cut off. Nothing need be recorded of it, yet
        it may have asked others."""
        self._carried = carried or {}
        """How calls outside ended in earlier attempts at the message, by idem_key: they are
        not made again."""
        self._keys: dict[int, str] = {}
        """The idem_key of each call outside, by seq."""
        self._calls: dict[tuple[str, bytes], int] = {}
        self._marks = 0
        self._patches: dict[str, bool] = {}
        self._pieces: dict[int, list[tuple[str, int]]] = {}
        """What an earlier run has handed out of each stream, and in how many rows."""
        self._parts: dict[int, int] = {}
        self._replay: Replay | None = None
        if recorded:
            self._replay = self._make_replay(recorded)
        self._places: dict[int, asyncio.Future[None]] = {}
        self._went_live = asyncio.Event() if self._replay is not None else None
        """Set once all that is recorded was handed back."""
        if self._went_live is not None and self._replay is not None and self._replay.live:
            self._went_live.set()

    @property
    def remaining_s(self) -> float:
        """Seconds until the turn's deadline."""
        return max(0.0, self._began + self._deadline_s - self._clock.monotonic())

    @property
    def ended(self) -> bool:
        """Whether its handler has ended, and the turn is being committed."""
        return self._ended

    def under_way(self) -> list[tuple[int, Request[Any], float]]:
        """Syscalls that have begun and not ended: number, request, seconds since."""
        now = self._clock.monotonic()
        return [(seq, request, now - began) for seq, (request, began, *_) in self._open.items()]

    async def call(self, request: Request[ResponseT], deadline_s: float | None) -> ResponseT:
        """Carry out one syscall, or hand back what is recorded of it."""
        seq, args, digest = self._begin(request)
        intent: JournalRow | None = None
        if self._replay is not None:
            found = await self._match(seq, request, args, digest)
            if found is not None and found.phase != "intent":
                return await self._hand_back(seq, request, found)
            intent = found.row if found is not None else None  # type: ignore[assignment]
        try:
            self._check(request)
            budget = self._budget(deadline_s)
            if request.immediate:
                handler = HANDLERS[type(request)]
                response = await handler(request, self._caller(seq), self._services)
            elif request.reach == "outside":
                response = await self._effect(request, seq, args, digest, intent, budget)
            else:
                try:
                    async with asyncio.timeout(budget):
                        response = await self._carry_out(request, seq, budget)
                    self._in_time()
                except TimeoutError:
                    raise DeadlineExceeded(f"{request.syscall} of {self.agent}", budget) from None
        except BaseException as error:
            await self._turn_of(seq, error)
            self._end(request, seq, error=error)
            raise
        if self._parallel or self._replay is not None:
            await self._turn_of(seq, None)
        self._see(response)
        self._end(request, seq, response=response)
        return response  # type: ignore[return-value]

    async def _carry_out(self, request: Request[Any], seq: int, budget_s: float) -> Response:
        handler = HANDLERS[type(request)]
        if request.reach != "visible":
            return await handler(request, self._caller(seq, budget_s), self._services)
        await self._log.barrier()
        asking = asyncio.ensure_future(handler(request, self._caller(seq), self._services))
        try:
            return await asyncio.shield(asking)
        except asyncio.CancelledError as cancelled:
            # A turn that will run again asks again, and must not find that it was cancelled.
            if not (self._ended or self.stopped):
                asking.cancel(*cancelled.args)
            raise

    # ---------------------------------------------------------------- effects

    async def _effect(
        self,
        request: Request[Any],
        seq: int,
        args: bytes,
        digest: bytes,
        intent: JournalRow | None,
        budget_s: float,
    ) -> Response:
        """Something that nobody can take back: the intent is durable before it begins.

        When its deadline passes, what it did is found out, as after a crash: a handler that
        went on with an error might do it a second time.
        """
        key = self._keys[seq]
        caller = replace(self._caller(seq), idem_key=key)
        earlier = self._carried.get(key) if intent is None else None
        if earlier is not None and earlier.phase == "result":
            response: Response = record.response_of(request, earlier)
            return response
        # Each retry that a person has allowed is numbered, so that its rows are new ones.
        attempt = intent.part if intent is not None else 0
        uncertain: LlmosError | None = None
        if intent is None or intent.phase == "mark":
            row = self._row(request, seq, "intent", args, digest, idem_key=key, part=attempt)
            self._log.add(row)
            await self._log.barrier()
            if earlier is None or earlier.phase == "failed":
                try:
                    async with asyncio.timeout(budget_s):
                        return await HANDLERS[type(request)](request, caller, self._services)
                except ToolUncertain as error:
                    uncertain = error
                except TimeoutError:
                    uncertain = DeadlineExceeded(f"{request.syscall} of {self.agent}", budget_s)
        assert isinstance(request, Call)
        found = await effects.recover(request, caller, self._services)
        if found is not None:
            return found
        unknown = EffectUnknown(self.agent, self.turn, seq, request.tool, key)
        self._log.add(
            self._row(
                request,
                seq,
                "unknown",
                args,
                digest,
                result=record.error_of(uncertain or unknown),
                idem_key=key,
                part=attempt,
            )
        )
        raise await self._stop(unknown)

    async def _stop(self, error: LlmosError) -> LlmosError:
        """The turn cannot go on: whoever runs it sees that and cancels the handler.

        An error would not do: a handler may catch it and go on.
        """
        if self.stopped is None:
            self.stopped = error
            if self.on_stop is not None:
                self.on_stop()
        await asyncio.get_running_loop().create_future()
        return error  # Nobody sets that future: the handler is cancelled here.

    # ---------------------------------------------------------------- streams

    async def stream(
        self, request: Generate, deadline_s: float | None
    ) -> AsyncIterator[GenerationChunk]:
        """Carry out ``generate``, chunk by chunk.

        Pieces that an earlier run handed out are handed out again; if it was cut off in the
        middle, the model goes on from exactly there.
        """
        seq, args, digest = self._begin(request)
        chunks: list[GenerationChunk] = []
        fresh: list[tuple[str, int]] = []
        part = 0

        def piece() -> JournalRow | None:
            nonlocal part
            if not fresh or self._ended:
                return None
            part += 1
            result = json.dumps({"pieces": fresh}).encode()
            fresh.clear()
            return self._row(request, seq, "partial", args, digest, result=result, part=part)

        live = request
        if self._replay is not None:
            found = await self._match(seq, request, args, digest)
            pieces = self._pieces.get(seq, [])
            part = self._parts.get(seq, 0)
            chunks += [GenerationChunk("", text, tokens) for text, tokens in pieces]
            if pieces and (found is None or found.phase == "intent"):
                written = "".join(text for text, _ in pieces)
                left = request.max_new_tokens - sum(tokens for _, tokens in pieces)
                live = request.model_copy(
                    update={"prefix": request.prefix + written, "max_new_tokens": max(left, 1)}
                )
            for again in chunks:
                yield again
            if found is not None and found.phase != "intent":
                content = json.loads(found.row.result) if found.row.result else {}  # type: ignore[attr-defined]
                for text, tokens in content.get("pieces", []):
                    yield GenerationChunk("", text, tokens)
                await self._hand_back(seq, request, found)
                return
        finished = False
        self._log.pieces.append(piece)
        try:
            self._check(request)
            budget = self._budget(deadline_s)
            until = self._clock.monotonic() + budget
            digest_of = await self._services.model_digest(request.model)
            self._digest = digest_of
            adapter = await generate.adapter_labels(request, self._caller(seq), self._services)
            source = generate.stream(live, self._caller(seq, budget), self._services)
            async with aclosing(source) as stream:  # type: ignore[type-var]
                while True:
                    patience_s = max(until - self._clock.monotonic(), 0.0)
                    try:
                        async with asyncio.timeout(patience_s):
                            chunk = await anext(stream, None)
                    except TimeoutError:
                        raise DeadlineExceeded(f"generate of {self.agent}", budget) from None
                    if chunk is None:
                        break
                    if not chunks:
                        # Whoever has read a part has read the model, even if they leave now.
                        caller = self._caller(seq)
                        self._see(generate.collect(request, caller, [chunk], digest_of, adapter))
                    chunks.append(chunk)
                    fresh.append((chunk.text, chunk.tokens))
                    self._log.soon()
                    yield chunk
            response = generate.collect(request, self._caller(seq), chunks, digest_of, adapter)
            finished = True
        except BaseException as error:
            last = piece()
            if last is not None:
                self._log.add(last)
            self._end(request, seq, error=error)
            raise
        finally:
            self._log.pieces.remove(piece)
            if finished:
                if self._parallel or self._replay is not None:
                    await self._turn_of(seq, None)
                self._see(response)
                self._end(request, seq, response=response, pieces=fresh)

    # ---------------------------------------------------------------- running again

    def _make_replay(self, rows: list[JournalRow]) -> Replay:
        recorded: list[Recorded] = []
        marks: list[str] = []
        for row in rows:
            if row.phase == "partial":
                pieces = self._pieces.setdefault(row.seq, [])
                pieces += [(text, tokens) for text, tokens in json.loads(row.result)["pieces"]]
                self._parts[row.seq] = max(row.part, self._parts.get(row.seq, 0))
            elif row.kind != TURN and row.kind != PATCHED:
                recorded.append(_recorded(row))
            if row.phase == "mark":
                self._marks = max(self._marks, row.part)
                if row.kind == PATCHED:
                    marks.append(row.name)
        return Replay(self.agent, self.turn, recorded, marks)

    async def _match(
        self, seq: int, request: Request[Any], args: bytes, digest: bytes
    ) -> Recorded | None:
        assert self._replay is not None
        try:
            return self._replay.match(
                seq,
                type(request).__name__,
                request.resource,
                digest,
                args.decode("utf-8", "replace"),
            )
        except Nondeterminism as error:
            raise await self._stop(error) from None

    async def _hand_back(self, seq: int, request: Request[ResponseT], found: Recorded) -> ResponseT:
        """What an earlier run of this turn got, when its turn has come."""
        row = found.row
        assert isinstance(row, JournalRow)
        if found.cancelled:
            # The handler cancelled it, and will again.
            await asyncio.get_running_loop().create_future()
        if found.phase == "unknown":
            key = row.idem_key
            raise await self._stop(EffectUnknown(self.agent, self.turn, seq, row.name, key))
        response: ResponseT | None = None
        if found.phase != "failed":
            response = record.response_of(request, row)
            if request.reach == "deferred":
                await self._defer_again(seq, request, response)
        await self._turn_of(seq, None, recorded=True)
        self._open.pop(seq, None)
        if response is None:
            raise record.raised(row.result)
        self._see(response)
        if isinstance(request, Show):
            # Whoever waits may not have seen it before the host was lost.
            self._services.show(self.turn, seq, request.text)
        return response

    async def _defer_again(self, seq: int, request: Request[Any], response: Response) -> None:
        """What a call leaves to the commit of its turn was lost with the run that made it: only
        its answer is in the journal. Here, where the call is made, so that messages keep their
        order."""
        if isinstance(request, timers.SetTimer) and isinstance(response, timers.TimerSet):
            # Due when the agent was told, not so long after this run.
            self._services.defer(timers.timer_of(request, response.due, self.labels))
        else:
            await HANDLERS[type(request)](request, self._caller(seq), self._services)

    async def _turn_of(
        self, seq: int, error: BaseException | None, *, recorded: bool = False
    ) -> None:
        """Wait until the result of this call may be handed to the agent.

        A cancelled call does not wait: it is the handler that cancels it.
        """
        if isinstance(error, asyncio.CancelledError | GeneratorExit):
            return
        replay = self._replay
        if replay is not None and not replay.live:
            assert self._went_live is not None
            if not recorded:
                await self._went_live.wait()
            elif replay.next_seq() != seq:
                place = self._places[seq] = asyncio.get_running_loop().create_future()
                try:
                    async with asyncio.timeout(STALL_S):
                        await place
                except TimeoutError:
                    await self._stalled(replay)
                finally:
                    self._places.pop(seq, None)
        if self._parallel:
            self._gate = self._gate or asyncio.Lock()
            async with self._gate:
                for _ in range(SETTLE):
                    await asyncio.sleep(0)
        if replay is not None and recorded:
            replay.handed_back(seq)
            if replay.live and self._went_live is not None:
                self._went_live.set()
            else:
                following = self._places.get(replay.next_seq() or 0)
                if following is not None and not following.done():
                    following.set_result(None)

    async def _stalled(self, replay: Replay) -> None:
        try:
            replay.finish()
        except Nondeterminism as error:
            await self._stop(error)

    def patched(self, name: str) -> bool:
        """Whether to run the code that this change brought: False only for a turn that began
        before it and now runs again."""
        replay = self._replay
        if name in self._patches:
            return self._patches[name]
        marked = replay is not None and name in replay.marks
        answer = self._patches[name] = replay is None or replay.patched(name)
        if answer and not marked:
            self._in_time()
            self._marks += 1
            self._log.add(
                JournalRow(
                    agent=self.agent,
                    turn=self.turn,
                    seq=self.count,
                    phase="mark",
                    kind=PATCHED,
                    name=name,
                    epoch=self._epoch,
                    code_version=self._code_version,
                    ts=self._clock.time(),
                    part=self._marks,
                )
            )
        return answer

    # ---------------------------------------------------------------- steps

    def finish(self, *, whole: bool = True) -> LlmosError | None:
        """The handler has ended: what it left open is recorded as cancelled.

        A stream that a handler leaves with ``break`` is closed by the garbage collector, some
        time after the turn has been committed.

        Args:
            whole: It came to its end by itself, and so must have made every call that an
                earlier run of the turn made.

        Returns why the turn must not be committed.
        """
        for piece in self._log.pieces:
            last = piece()
            if last is not None:
                self._log.add(last)
        for seq, (request, *_) in list(self._open.items()):
            self._end(request, seq, error=GeneratorExit())
        self._ended = True
        if self.stopped is not None:
            return self.stopped
        if self._replay is not None and whole:
            try:
                self._replay.finish()
            except Nondeterminism as error:
                return error
        return None

    def put_down(self) -> None:
        """The turn goes on in another host, from here: what its handler does while it is
        cancelled belongs to no turn."""
        for piece in self._log.pieces:
            last = piece()
            if last is not None:
                self._log.add(last)
        self._ended = True

    def _begin(self, request: Request[Any]) -> tuple[int, bytes, bytes]:
        self._in_time()
        self.count += 1
        started = self._clock.monotonic()
        args = record.args_of(request)
        digest = record.hash_of(args)
        if self._open:
            self._parallel = True
        if request.reach == "outside":
            call = (request.resource, digest)
            number = self._calls[call] = self._calls.get(call, 0) + 1
            self._keys[self.count] = idem_key(self._message_id or self.turn, *call, number)
        self._open[self.count] = (request, started, args, digest)
        return self.count, args, digest

    def _in_time(self) -> None:
        """A task that a handler left behind makes no syscalls: its turn has been recorded.
        Nor does a handler that cleans up after it was stopped: it will run again."""
        if self._ended or self.stopped is not None:
            raise Cancelled(f"A syscall of {self.agent}", "the end of its turn")

    def _check(self, request: Request[Any]) -> None:
        limits = self._manifest.limits
        if self.count > limits.syscalls_per_turn:
            raise Busy(f"Turn {self.turn} (limits.syscalls_per_turn)", self.count - 1, 0.0)
        if not self._manifest.allows(request.syscall, request.resource):
            raise CapabilityDenied(
                self.agent, request.syscall, request.resource, self._manifest.capabilities
            )
        if isinstance(request, ReadState) and _tenant(request.agent) != _tenant(self.agent):
            # As with corpora: what belongs to another tenant is not there.
            raise UnknownAgent(request.agent)
        if isinstance(request, _TO_AGENTS):
            tenant, receiver = _tenant(self.agent), _tenant(request.agent)
            reason = refusal(self.labels, tenant, receiver)
            if reason is not None:
                raise LabelViolation(
                    self.agent,
                    request.agent,
                    reason,
                    remedy="Send only what does not come from that data, in a turn of its own",
                )
        if isinstance(request, Ask):
            chain = (*self._chain, self.agent)
            if request.agent in chain:
                raise CallCycle(request.agent, chain)
            if len(chain) > limits.call_depth:
                raise Busy(f"The chain of calls {' → '.join(chain)}", len(chain), 0.0)

    def _budget(self, deadline_s: float | None) -> float:
        remaining = self.remaining_s
        return remaining if deadline_s is None else min(deadline_s, remaining)

    def _caller(self, seq: int, budget_s: float | None = None) -> Caller:
        until = None if budget_s is None else self._clock.monotonic() + budget_s
        return Caller(
            self.agent,
            _tenant(self.agent),
            self.turn,
            self._chain,
            self.labels,
            seq,
            again=self._again,
            deadline_s=until,
        )

    def _see(self, response: Response) -> None:
        self.labels = self.labels.join(response.labels)
        if response.provenance:
            self.provenance.update(dict.fromkeys(response.provenance))

    def _end(
        self,
        request: Request[Any],
        seq: int,
        *,
        response: Response | None = None,
        error: BaseException | None = None,
        pieces: list[tuple[str, int]] | None = None,
    ) -> None:
        entry = self._open.pop(seq, None)
        if entry is None or self._ended:
            return  # The turn is over, and this was recorded with it.
        _, started, args, digest = entry
        elapsed = self._clock.monotonic() - started
        SYSCALLS.labels(request.syscall, status_of(error)).observe(elapsed)
        if self.stopped is not None and isinstance(error, asyncio.CancelledError | GeneratorExit):
            return  # It did not end: it was stopped with its turn, and will be made again.
        if error is None:
            assert response is not None
            result, phase = record.result_of(response), "result"
            if pieces:
                content = json.loads(result)
                result = json.dumps({**content, "pieces": pieces}).encode()
                pieces.clear()
        else:
            if isinstance(error, asyncio.CancelledError | GeneratorExit):
                error = Cancelled(f"{request.syscall} of {self.agent}", "its turn")
                # An effect under way when its turn was cancelled: nobody heard how it ended.
                phase = "unknown" if request.reach == "outside" else "failed"
            else:
                phase = "failed"
            result = record.error_of(error)
        self._log.add(
            self._row(
                request,
                seq,
                phase,
                args,
                digest,
                result=result,
                response=response,
                elapsed_s=elapsed,
                idem_key=self._keys.get(seq, ""),
                started=started,
            )
        )

    def _row(
        self,
        request: Request[Any],
        seq: int,
        phase: str,
        args: bytes,
        digest: bytes,
        *,
        result: bytes = b"",
        response: Response | None = None,
        idem_key: str = "",
        elapsed_s: float = 0.0,
        started: float | None = None,
        part: int = 0,
    ) -> JournalRow:
        began = self._began if started is None else started
        return JournalRow(
            agent=self.agent,
            turn=self.turn,
            seq=seq,
            phase=phase,
            kind=type(request).__name__,
            name=request.resource,
            args_hash=digest,
            args=args if part <= 1 else b"",
            result=result,
            labels=record.pack_labels(response.labels) if response is not None else b"",
            provenance=record.pack_provenance(response.provenance) if response is not None else b"",
            idem_key=idem_key,
            epoch=self._epoch,
            code_version=self._code_version,
            model_digest=_model_digest(response),
            ts=self._began_at + (began - self._began),
            elapsed_s=elapsed_s,
            part=part,
        )


def idem_key(message_id: str, tool: str, args_hash: bytes, number: int) -> str:
    """What names a call outside for ever: the message, the tool, the arguments, and how many
    calls with the same ones the handling of the message has made."""
    text = f"{message_id}\n{tool}\n{args_hash.hex()}\n{number}"
    return hashlib.blake2b(text.encode("utf-8", "backslashreplace"), digest_size=16).hexdigest()


def status_of(error: BaseException | None) -> str:
    """``ok``, ``denied``, ``cancelled`` or ``error``: for metrics and people."""
    if error is None:
        return "ok"
    if isinstance(error, CapabilityDenied | LabelViolation):
        return "denied"
    if isinstance(error, asyncio.CancelledError | GeneratorExit | Cancelled):
        return "cancelled"
    return "error"


def _recorded(row: JournalRow) -> Recorded:
    """A row as the core looks at it."""
    phase: Any = "intent" if row.phase == "mark" else row.phase
    # The handler cancelled it, or left it open.
    cancelled = row.phase == "failed" and row.result.startswith(b'{"error":"Cancelled"')
    args = row.args.decode("utf-8", "replace")
    kind = Call.__name__ if row.kind == RETRY else row.kind
    return Recorded(row.seq, kind, row.name, row.args_hash, phase, row, cancelled, args)


def _model_digest(response: Response | None) -> str:
    if response is None:
        return ""
    return next((p.version for p in response.provenance if p.kind == "model"), "")


def _tenant(agent: str) -> str:
    return agent.split("/", 1)[0]


def as_llmos_error(error: BaseException, agent: str, turn: str) -> LlmosError:
    """What the asker gets to see of an error that a handler let through."""
    import traceback

    from llmos.syscalls.errors import HandlerFailed

    if isinstance(error, LlmosError):
        return error
    frames = traceback.extract_tb(error.__traceback__)
    last = frames[-1] if frames else None
    where = f"{last.filename.rsplit('/', 1)[-1]}:{last.lineno} in {last.name}" if last else "?"
    return HandlerFailed(agent, turn, f"{type(error).__name__}: {error}", where)
