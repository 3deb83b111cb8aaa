"""The dispatcher: one for each turn, between the agent's context and the handlers.

For every syscall, in this order: bound on their number, capability, deadline, handler,
provenance and labels joined into the turn, record, metrics.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from llmos.drivers.errors import LlmosError
from llmos.drivers.protocols import GenerationChunk, SyscallRow
from llmos.kernel import record
from llmos.kernel.clock import Clock
from llmos.kernel.core.labels import refusal
from llmos.kernel.manifest import Manifest
from llmos.kernel.metrics import SYSCALLS
from llmos.syscalls import (  # the import registers the handlers
    clock,
    embed,
    generate,
    graph,
    messages,
    retrieve,
    rules,
    state,
)
from llmos.syscalls.base import HANDLERS, Caller, Request, Response, Services
from llmos.syscalls.errors import (
    Busy,
    CallCycle,
    Cancelled,
    CapabilityDenied,
    DeadlineExceeded,
    LabelViolation,
    UnknownAgent,
)
from llmos.syscalls.generate import Generate
from llmos.syscalls.labels import Labels, Provenance
from llmos.syscalls.messages import Ask, Send
from llmos.syscalls.state import ReadState

if TYPE_CHECKING:
    from types import ModuleType

ResponseT = TypeVar("ResponseT", bound=Response)

FAMILIES: tuple[ModuleType, ...] = (
    clock,
    embed,
    generate,
    graph,
    messages,
    retrieve,
    rules,
    state,
)
"""The syscall families that this kernel serves."""


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
        recorded: Callable[[SyscallRow], None],
    ) -> None:
        self.agent = agent
        self.turn = turn
        self.labels = labels
        self.provenance: dict[Provenance, None] = {}
        """Everything the turn rests on, in the order it was seen."""
        self.count = 0
        self._ended = False
        self._chain = chain
        self._manifest = manifest
        self._services = services
        self._clock = clock
        self._began = clock.monotonic()
        self._deadline_s = deadline_s
        self._recorded = recorded
        self._open: dict[int, tuple[Request[Any], float]] = {}
        """Syscalls that have begun and not ended, by seq."""

    @property
    def remaining_s(self) -> float:
        """Seconds until the turn's deadline."""
        return max(0.0, self._began + self._deadline_s - self._clock.monotonic())

    async def call(self, request: Request[ResponseT], deadline_s: float | None) -> ResponseT:
        """Carry out one syscall."""
        seq, started = self._begin(request)
        try:
            self._check(request)
            budget = self._budget(deadline_s)
            handler = HANDLERS[type(request)]
            try:
                async with asyncio.timeout(budget):
                    response = await handler(request, self._caller(), self._services)
                self._in_time()
            except TimeoutError:
                raise DeadlineExceeded(f"{request.syscall} of {self.agent}", budget) from None
        except BaseException as error:
            self._end(request, seq, started, error=error)
            raise
        self._see(response)
        self._end(request, seq, started, response=response)
        return response  # type: ignore[return-value]

    async def stream(
        self, request: Generate, deadline_s: float | None
    ) -> AsyncIterator[GenerationChunk]:
        """Carry out ``generate``, chunk by chunk."""
        seq, started = self._begin(request)
        chunks: list[GenerationChunk] = []
        finished = False
        try:
            self._check(request)
            budget = self._budget(deadline_s)
            until = self._clock.monotonic() + budget
            source = generate.stream(request, self._caller(), self._services)
            async with aclosing(source) as stream:  # type: ignore[type-var]
                while True:
                    left = until - self._clock.monotonic()
                    try:
                        async with asyncio.timeout(max(left, 0.0)):
                            chunk = await anext(stream, None)
                    except TimeoutError:
                        raise DeadlineExceeded(f"generate of {self.agent}", budget) from None
                    if chunk is None:
                        break
                    if not chunks:
                        # Whoever has read a part has read the model, even if they leave now.
                        digest = await self._services.model_digest(request.model)
                        self._see(generate.collect(request, self._caller(), [chunk], digest))
                    chunks.append(chunk)
                    yield chunk
            digest = await self._services.model_digest(request.model)
            response = generate.collect(request, self._caller(), chunks, digest)
            finished = True
        except BaseException as error:
            self._end(request, seq, started, error=error)
            raise
        finally:
            if finished:
                self._see(response)
                self._end(request, seq, started, response=response)

    # ---------------------------------------------------------------- steps

    def finish(self) -> None:
        """The handler has ended: what it left open is recorded as cancelled.

        A stream that a handler leaves with ``break`` is closed by the garbage collector, some
        time after the turn has been committed.
        """
        self._ended = True
        for seq, (request, started) in list(self._open.items()):
            self._end(request, seq, started, error=GeneratorExit())

    def _begin(self, request: Request[Any]) -> tuple[int, float]:
        self._in_time()
        self.count += 1
        started = self._clock.monotonic()
        self._open[self.count] = (request, started)
        return self.count, started

    def _in_time(self) -> None:
        """A task that a handler left behind makes no syscalls: its turn has been recorded."""
        if self._ended:
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
        if isinstance(request, Ask | Send):
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

    def _caller(self) -> Caller:
        return Caller(
            agent=self.agent,
            tenant=_tenant(self.agent),
            turn=self.turn,
            chain=self._chain,
            labels=self.labels,
        )

    def _see(self, response: Response) -> None:
        self.labels = self.labels.join(response.labels)
        self.provenance.update(dict.fromkeys(response.provenance))

    def _end(
        self,
        request: Request[Any],
        seq: int,
        started: float,
        *,
        response: Response | None = None,
        error: BaseException | None = None,
    ) -> None:
        if self._open.pop(seq, None) is None:
            return  # The turn is over, and this was recorded with it.
        status: Literal["ok", "error", "denied", "cancelled"] = "ok"
        if isinstance(error, CapabilityDenied | LabelViolation):
            status = "denied"
        elif isinstance(error, asyncio.CancelledError | GeneratorExit | Cancelled):
            status = "cancelled"
        elif error is not None:
            status = "error"
        elapsed = self._clock.monotonic() - started
        SYSCALLS.labels(syscall=request.syscall, status=status).observe(elapsed)
        self._recorded(
            SyscallRow(
                turn=self.turn,
                seq=seq,
                name=type(request).__name__,
                resource=request.resource,
                started_s=started - self._began,
                elapsed_s=elapsed,
                status=status,
                request=record.pack(request),
                result=record.pack(response) if error is None else record.pack_error(error),
                provenance=record.pack_provenance(response.provenance if response else ()),
                labels=record.pack_labels(response.labels if response else Labels()),
            )
        )


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
