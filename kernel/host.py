"""The host process: agents' turns run here, many agents in one process.

Agents are virtual: a message activates its agent (program, configuration and state from
the store), the turn runs, and what is idle is dropped again when there are many.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
from collections import OrderedDict
from collections.abc import Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgpack
from pydantic import BaseModel

from llmos.drivers.errors import LlmosError, StaleEpoch
from llmos.drivers.protocols import StateWrite, StoreWrite, SyscallRow, TurnRow, TurnStatus
from llmos.kernel import logs, record
from llmos.kernel.clock import Clock, SystemClock
from llmos.kernel.context import Context
from llmos.kernel.core.runqueue import RunQueue, Turn
from llmos.kernel.directory import Directory, DirectoryHolder
from llmos.kernel.dispatch import TurnDispatcher, as_llmos_error
from llmos.kernel.manifest import Manifest
from llmos.kernel.metrics import TURN_WAIT, TURNS, Exported, export
from llmos.kernel.program import HandlerSpec, Program, ProgramError, ProgramLoader, make_config
from llmos.kernel.remote import Handle, ProcessGone, answers, call
from llmos.kernel.router import Router
from llmos.kernel.services import RemoteServices
from llmos.syscalls.errors import (
    Busy,
    Cancelled,
    DeadlineExceeded,
    ReadOnlyTurn,
    UnhandledMessage,
    UnknownAgent,
)
from llmos.syscalls.messages import Envelope, Message, Reply, Wire

log = logging.getLogger("llmos.host")

MAX_ACTIVE = 10_000
"""Agents in memory; the longest idle are dropped beyond that."""
COMMIT_S = 30.0
"""Longest wait for a commit: a journal that was lost is back much sooner."""
STOP_S = 2.0
"""What a cancelled handler is given to clean up."""
MAX_REMEMBERED = 1_024
"""Replies kept for askers that ask again with the same message id."""


@dataclass(slots=True)
class _Active:
    """An agent in memory."""

    agent: str
    program: Program
    name: str
    """``module:Class``."""
    manifest: Manifest
    config: BaseModel
    state: BaseModel


class HostServer:
    """Runs turns. A Ray actor; all its work is on one event loop."""

    def __init__(
        self,
        name: str,
        epoch: int,
        kernel: Handle,
        search: str | None,
        log_dir: str,
        log_level: str,
    ) -> None:
        logs.configure(Path(log_dir), name, log_level)
        self._name = name
        self._epoch = epoch
        self._programs = ProgramLoader(Path(search) if search else None)
        self._clock: Clock = SystemClock()
        self._directory = DirectoryHolder()
        self._router = Router(kernel)
        self._services = RemoteServices(
            f"{name}@{epoch}", self._directory, self._clock, self._router
        )
        self._active: OrderedDict[str, _Active] = OrderedDict()
        self._activating: dict[str, asyncio.Task[_Active]] = {}
        self._queue = RunQueue()
        self._starts: dict[str, asyncio.Future[None]] = {}
        self._turns: OrderedDict[str, asyncio.Task[Reply]] = OrderedDict()
        self._background: set[asyncio.Task[None]] = set()
        self._closing = False
        self._ended = asyncio.Event()

    async def ready(self) -> int:
        """This process's id."""
        return os.getpid()

    async def lifeline(self) -> None:
        """Returns when the process is closed; fails when it is lost, which is how that is seen."""
        await self._ended.wait()

    async def ping(self) -> bool:
        """Answer: the event loop is free."""
        return True

    async def directory(self, directory: Directory) -> None:
        """Take the newest directory."""
        await self._directory.set(directory)

    # -- programs

    @answers
    async def inspect(self, program: str, tenant: str, config: dict[str, Any]) -> Manifest:
        """Load a program and check that all it names is there; returns its manifest.

        Raises:
            ProgramError: it cannot be loaded or does not take the configuration.
            UnknownResource, RuleSyntaxError, DocumentError: a store is missing or broken.
        """
        loaded = await self._programs.load(program)
        made = make_config(program, loaded, config)
        manifest = loaded.manifest.resolve(made)
        _first_state(program, loaded)
        await self._services.check_stores(tenant, manifest.stores)
        return manifest

    async def _activate(self, agent: str) -> _Active:
        """The agent in memory; two messages at once activate it once."""
        active = self._active.get(agent)
        if active is not None:
            self._active.move_to_end(agent)
            return active
        task = self._activating.get(agent)
        if task is None:
            task = asyncio.create_task(self._load(agent))
            self._activating[agent] = task
            task.add_done_callback(lambda _: self._activating.pop(agent, None))
        return await asyncio.shield(task)

    async def _load(self, agent: str) -> _Active:
        row, stored = await self._services.stored(agent)
        if row is None:
            raise UnknownAgent(agent)
        program = await self._programs.load(row.program)
        config = make_config(row.program, program, msgpack.unpackb(row.config))
        manifest = program.manifest.resolve(config)
        if stored is None:
            state = _first_state(row.program, program)
        else:
            # As JSON, which is how it was written: a strict model takes a date from a text
            # there, and not elsewhere.
            state = program.State.model_validate_json(json.dumps(msgpack.unpackb(stored)))
        limits = manifest.limits
        self._queue.limit(agent, mailbox=limits.mailbox, concurrent_turns=limits.concurrent_turns)
        active = _Active(agent, program, row.program, manifest, config, state)
        self._active[agent] = active
        self._passivate()
        return active

    def _passivate(self) -> None:
        """Drop the longest idle agents beyond the bound; their state is in the store."""
        busy = {t.agent for t in self._queue.running.values()}
        for agent in list(self._active):
            if len(self._active) <= MAX_ACTIVE:
                break
            if agent not in busy and not self._queue.waiting(agent):
                del self._active[agent]
                self._queue.forget(agent)

    async def drop(self, agent: str, by: str) -> None:
        """The agent was killed or moved: cancel its turns and forget it."""
        for task in list(self._turns.values()):
            if not task.done() and task.get_name() == agent:
                task.cancel(by)
        activating = self._activating.get(agent)
        if activating is not None:
            activating.cancel(by)
        self._active.pop(agent, None)
        self._queue.forget(agent)

    # -- delivery

    async def deliver(self, envelope: Envelope) -> Reply:
        """Handle a message and reply. The same message id is handled once."""
        task = self._take_in(envelope)
        try:
            reply = await asyncio.shield(task)
        except asyncio.CancelledError:
            if not task.done():
                task.cancel("its asker")
            raise
        if isinstance(reply.error, StaleEpoch):
            # Not this message's fault: it may come again, here or elsewhere.
            self._turns.pop(envelope.id, None)
        return reply

    @answers
    async def post(self, envelope: Envelope) -> None:
        """Put a message into the mailbox; return when it is there.

        Raises:
            Busy: the mailbox is full.
            UnknownAgent, UnhandledMessage, InvalidMessage.
        """
        if envelope.id in self._turns:
            return
        active = await self._activate(envelope.receiver)
        spec = _handler(active, envelope)
        envelope.wire.decode(spec.message, envelope.receiver)
        if self._queue.waiting(envelope.receiver) >= active.manifest.limits.mailbox:
            raise Busy(f"The mailbox of {envelope.receiver}", active.manifest.limits.mailbox, 0.5)
        task = self._take_in(envelope)
        # Its first step goes as far as the queue: of posts that came together all saw the
        # same room, and one that found none after all must not count as taken.
        await asyncio.sleep(0)
        if task.done() and not task.cancelled():
            reply = task.result()
            if reply.error is not None and not reply.turn:
                self._turns.pop(envelope.id, None)
                raise reply.error

    def _take_in(self, envelope: Envelope) -> asyncio.Task[Reply]:
        task = self._turns.get(envelope.id)
        if task is None:
            task = asyncio.create_task(self._serve(envelope), name=envelope.receiver)
            self._turns[envelope.id] = task
            for old in list(self._turns):
                if len(self._turns) <= MAX_REMEMBERED:
                    break
                if self._turns[old].done():
                    del self._turns[old]
        return task

    async def _serve(self, envelope: Envelope) -> Reply:
        """From the mailbox to the reply; every error becomes part of the reply."""
        until = self._clock.monotonic() + envelope.deadline_s
        arrived = self._clock.monotonic()
        agent = envelope.receiver
        try:
            if self._closing:
                raise Cancelled(f"The message to {agent}", "shutdown")
            async with asyncio.timeout(envelope.deadline_s):
                active = await self._activate(agent)
                spec = _handler(active, envelope)
                message = envelope.wire.decode(spec.message, agent)
                await self._start(envelope, active, spec)
        except TimeoutError:
            error = DeadlineExceeded(f"waiting for a turn of {agent}", envelope.deadline_s)
            return Reply("", agent, error=error)
        except asyncio.CancelledError as cancelled:
            by = str(cancelled.args[0]) if cancelled.args else "its asker"
            return Reply("", agent, error=Cancelled(f"The message to {agent}", by))
        except LlmosError as error:
            return Reply("", agent, error=error.with_traceback(None))
        except Exception as error:
            # Loading runs the program's own code.
            log.exception("activating %s", agent)
            return Reply("", agent, error=as_llmos_error(error, agent, ""))
        TURN_WAIT.labels(program=active.name).observe(self._clock.monotonic() - arrived)
        try:
            left = max(until - self._clock.monotonic(), 0.001)
            return await self._turn(envelope, active, spec, message, left)
        finally:
            self._queue.done(envelope.id)
            self._pump()

    async def _start(self, envelope: Envelope, active: _Active, spec: HandlerSpec) -> None:
        """Wait for the turn."""
        agent = envelope.receiver
        turn = Turn(envelope.id, agent, agent.split("/", 1)[0], spec.read_only)
        if not self._queue.offer(turn):
            raise Busy(f"The mailbox of {agent}", self._queue.waiting(agent), 0.5)
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._starts[envelope.id] = future
        self._pump()
        try:
            await future
        except asyncio.CancelledError:
            if not self._queue.withdraw(envelope.id, agent):
                # It was started in the very moment it was cancelled.
                self._queue.done(envelope.id)
            self._pump()
            raise
        finally:
            self._starts.pop(envelope.id, None)

    def _pump(self) -> None:
        for turn in self._queue.take():
            future = self._starts.get(turn.id)
            if future is not None and not future.done():
                future.set_result(None)

    # -- the turn

    async def _turn(
        self,
        envelope: Envelope,
        active: _Active,
        spec: HandlerSpec,
        message: Message,
        deadline_s: float,
    ) -> Reply:
        agent = envelope.receiver
        began, began_at = self._clock.monotonic(), self._clock.time()
        turn = f"{int(began_at * 1000):011x}{os.urandom(5).hex()}"
        rows: list[SyscallRow] = []
        outbox: list[Envelope] = []
        dispatcher = TurnDispatcher(
            agent=agent,
            turn=turn,
            chain=envelope.chain,
            manifest=active.manifest,
            services=self._services.for_turn(outbox),
            clock=self._clock,
            deadline_s=min(deadline_s, active.manifest.limits.turn_deadline_s),
            labels=envelope.labels,
            recorded=rows.append,
        )
        reply, error, state = await self._handle(active, spec, message, dispatcher)
        dispatcher.finish()
        wire: Wire | None = None
        packed: bytes | None = None
        if error is None:
            try:
                wire = Wire.of(reply) if reply is not None else None
                packed = _pack_state(state) if state is not None else None
            except (LlmosError, ValueError, TypeError, OverflowError, RecursionError) as unfit:
                # Too large, or holds what has no form outside this process.
                wire, error = None, as_llmos_error(unfit, agent, turn)
        elapsed = self._clock.monotonic() - began
        row = TurnRow(
            turn=turn,
            agent=agent,
            epoch=self._epoch,
            kind=envelope.wire.kind,
            message=record.pack(envelope.wire.json()),
            cause=envelope.cause or envelope.id,
            started_at=began_at,
            elapsed_s=elapsed,
            status=TurnStatus.DONE if error is None else TurnStatus.FAILED,
            reply=record.pack(wire.json() if wire else None),
            error=f"{error.code}: {error}" if error else "",
        )
        writes: list[StoreWrite] = [row, *rows]
        if error is None and packed is not None:
            writes.append(StateWrite(agent, self._epoch, packed))
        try:
            await self._commit(writes)
        except LlmosError as refused:
            # Not durable, so nobody may see it: not the state, the messages or the reply.
            log.error("turn %s of %s could not be committed: %s", turn, agent, refused)
            self._active.pop(agent, None)
            error, wire = refused, None
        else:
            if error is None:
                if state is not None:
                    active.state = state
                for outgoing in outbox:
                    self._spawn(self._router.post(outgoing), f"message to {outgoing.receiver}")
        TURNS.labels(program=active.name, status=error.code if error else "ok").observe(elapsed)
        return Reply(
            turn,
            agent,
            wire=wire,
            error=error,
            labels=dispatcher.labels,
            provenance=tuple(dispatcher.provenance),
            elapsed_s=elapsed,
        )

    async def _handle(
        self, active: _Active, spec: HandlerSpec, message: Message, dispatcher: TurnDispatcher
    ) -> tuple[Message | None, LlmosError | None, BaseModel | None]:
        """Run the handler: its reply, its error, and the new state if there is one."""
        agent, turn = dispatcher.agent, dispatcher.turn
        deadline_s = dispatcher.remaining_s
        with logs.turn_context(agent, turn):
            try:
                state = active.state.model_copy(deep=True)
                instance = active.program(state, active.config)
                handler = getattr(instance, spec.method)(message, Context(dispatcher))
                reply = await self._run(handler, deadline_s, agent, turn)
                if reply is not None and not isinstance(reply, Message):
                    raise TypeError(
                        f"{spec.method} returned {type(reply).__name__}, not a Message or None"
                    )
                changed = instance.state != active.state
                if changed and spec.read_only:
                    raise ReadOnlyTurn(agent, spec.method, "changed the state")
            except asyncio.CancelledError as cancelled:
                by = str(cancelled.args[0]) if cancelled.args else "its asker"
                return None, Cancelled(f"The turn of {agent}", by), None
            except LlmosError as error:
                log.warning("turn failed: %s", error)
                return None, error.with_traceback(None), None
            except (Exception, SystemExit) as error:
                log.exception("handler %s failed", spec.method)
                return None, as_llmos_error(error, agent, turn), None
        return reply, None, instance.state if changed else None

    async def _run(
        self,
        handler: Coroutine[Any, Any, Message | None],
        deadline_s: float,
        agent: str,
        turn: str,
    ) -> Message | None:
        """Run a handler to its end or its deadline.

        In a task of its own: one that swallows its cancellation is left behind, since it
        would otherwise keep its agent from ever having another turn.
        """

        async def guarded() -> Message | None:
            try:
                return await handler
            except SystemExit as error:
                # Out of a task it would end the whole process.
                raise as_llmos_error(error, agent, turn) from None

        task = asyncio.create_task(guarded())
        try:
            done, _ = await asyncio.wait({task}, timeout=deadline_s)
        except asyncio.CancelledError:
            await self._stop(task, agent)
            raise
        if not done:
            await self._stop(task, agent)
            raise DeadlineExceeded(f"the turn of {agent}", deadline_s)
        return task.result()

    @staticmethod
    async def _stop(task: asyncio.Task[Message | None], agent: str) -> None:
        task.add_done_callback(lambda ended: ended.cancelled() or ended.exception())
        task.cancel("the end of the turn")
        await asyncio.wait({task}, timeout=STOP_S)
        if not task.done():
            log.error("the handler of %s ignores its cancellation and is left behind", agent)

    async def _commit(self, writes: list[StoreWrite]) -> None:
        """Make it durable, and see it through: a turn that is cancelled here may be in the
        store already, and then its state and its messages must follow."""
        commit = asyncio.create_task(self._commit_now(writes))
        while not commit.done():
            try:
                await asyncio.wait([commit])
            except asyncio.CancelledError:
                log.info("cancelled while it was being committed: too late")
        commit.result()

    async def _commit_now(self, writes: list[StoreWrite]) -> None:
        try:
            async with asyncio.timeout(COMMIT_S):
                while True:
                    version = self._directory.current.version
                    journal = await self._directory.service("journal")
                    try:
                        await call(journal.commit.remote(writes), "the journal")
                    except ProcessGone:
                        # It may have committed before it died: the same rows again do no harm.
                        await self._directory.newer(version)
                    else:
                        return
        except TimeoutError:
            raise DeadlineExceeded("the commit of the turn", COMMIT_S) from None

    def _spawn(self, work: Coroutine[Any, Any, None], what: str) -> None:
        async def guarded() -> None:
            try:
                await work
            except LlmosError as error:
                log.error("%s was not delivered: %s", what, error)

        task = asyncio.create_task(guarded())
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    # -- looking and ending

    async def statistics(self) -> dict[str, Any]:
        """Agents in memory, turns that run and wait."""
        return {
            "active": len(self._active),
            "running": len(self._queue.running),
            "waiting": len(self._queue),
            "pid": os.getpid(),
        }

    async def metrics(self) -> Exported:
        """This process's metrics."""
        return export(self._name)

    async def close(self, grace_s: float) -> None:
        """Take nothing new; give what runs ``grace_s`` seconds, then cancel it."""
        self._closing = True
        pending = [t for t in self._turns.values() if not t.done()]
        if pending:
            _, late = await asyncio.wait(pending, timeout=grace_s)
            for task in late:
                task.cancel("shutdown")
            if late:
                await asyncio.wait(late, timeout=2.0)
        if self._background:
            await asyncio.wait(self._background, timeout=grace_s)
        self._ended.set()


def _handler(active: _Active, envelope: Envelope) -> HandlerSpec:
    spec = active.program.handlers.get(envelope.wire.kind)
    if spec is None:
        raise UnhandledMessage(envelope.receiver, envelope.wire.kind, active.program.handlers)
    return spec


def _first_state(name: str, program: Program) -> BaseModel:
    try:
        return program.State()
    except ValueError as error:
        raise ProgramError(
            name, f"State cannot begin empty: {error}", remedy="Give every field a default"
        ) from None


def _pack_state(state: BaseModel) -> bytes:
    return bytes(msgpack.packb(state.model_dump(mode="json")))
