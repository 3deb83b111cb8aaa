"""The kernel actor: feeds the core events and carries out its actions."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import msgpack

from llmos.drivers.devices.precision import Precision
from llmos.drivers.errors import LlmosError
from llmos.drivers.protocols import DeviceInfo
from llmos.drivers.stores.rows import (
    DropLaunch,
    LaunchRow,
    MailRow,
    MonitorRow,
    Part,
    PutLaunch,
    PutMail,
    SetHold,
    TakeShards,
    Write,
)
from llmos.kernel import logs, workers
from llmos.kernel.clock import Clock, SystemClock
from llmos.kernel.core import actions as act
from llmos.kernel.core import events as ev
from llmos.kernel.core.errors import KernelError
from llmos.kernel.core.placement import Node
from llmos.kernel.core.restarts import RestartPolicy
from llmos.kernel.core.state import KernelCore
from llmos.kernel.core.types import DeviceSpec, ProcessKind, ProcessState
from llmos.kernel.inventory import Inventory
from llmos.kernel.looking import Looking
from llmos.kernel.manifest import Manifest
from llmos.kernel.metrics import EVICTIONS, RESTARTS, MetricsEndpoint
from llmos.kernel.nodes import NodeDrain, Nodes
from llmos.kernel.program import ProgramError
from llmos.kernel.remote import Handle, ProcessGone, answers, call
from llmos.kernel.router import Location
from llmos.kernel.settings import Settings
from llmos.kernel.slots import Slots
from llmos.kernel.system import AgentTable, SystemConfig
from llmos.kernel.why import Why
from llmos.syscalls.errors import DeadlineExceeded, UnknownAgent
from llmos.syscalls.exits import Exited
from llmos.syscalls.messages import Envelope, Wire

log = logging.getLogger("llmos.kernel")

PING_S = 2.0
"""How often a process is asked whether it answers."""
RELEASE_S = 10.0
"""What a host gets to end its turns on shards that it gives away."""
START_S = 120.0
"""A process that has not come up after so long is killed."""


class KernelServer(Inventory, Slots, Looking, Why, NodeDrain):
    """The control plane of one system. A Ray actor."""

    def __init__(self, system: SystemConfig, settings: Settings, home: Node | None = None) -> None:
        self._system = system
        self._settings = settings
        self._run = settings.runs_dir / system.system.name
        logs.configure(self._run / "logs", "kernel", settings.log_level)
        self._clock: Clock = SystemClock()
        restarts = system.restarts
        self._core = KernelCore(
            policy=RestartPolicy(intensity=restarts.intensity, window_s=restarts.window_s)
        )
        self._nodes = Nodes(home, file=system.store.driver == "sqlite")
        self._handles: dict[str, Handle] = {}
        self._kinds: dict[str, ProcessKind] = {}
        self._infos: dict[str, DeviceInfo] = {}
        self._digests: dict[str, str] = {}
        self._paths: dict[str, Path] = {}
        self._dtypes: dict[str, Precision] = {}
        self._model_errors: dict[str, LlmosError] = {}
        self._adapters = self._declared_adapters()
        self._adapters_lock = asyncio.Lock()
        self._manifests: dict[str, Manifest] = {}
        self._programs: dict[str, AgentTable] = {}
        self._launches: dict[str, LaunchRow] = {}
        self._requests: dict[str, asyncio.Future[Any]] = {}
        self._routes_changed = asyncio.Condition()
        self._version = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._fences: dict[str, asyncio.Task[None]] = {}
        self._stopping: set[str] = set()
        """Processes that are stopped on purpose: their end is no loss."""
        self._rows = asyncio.Lock()
        """Held while the store's rows of agents are changed: launch, kill and fence read
        and write them in several steps."""
        self._booting: asyncio.Task[None] | None = None
        self._endpoint: MetricsEndpoint | None = None
        self._closing = False
        self._self: Handle = None
        self._started_at = self._clock.time()
        if workers.restarted():
            # Nobody may ask for long, but timers are due and mail waits. (Ray runs this method
            # in the actor's loop.)
            self._spawn(self._booted())

    # ---------------------------------------------------------------- boot

    @answers
    async def boot(self) -> dict[str, Any]:
        """Start everything and bring the store's agents back; returns when all serves.

        Raises:
            LlmosError: a device is missing, or no process can be kept alive.
        """
        await self._booted()
        return await self._status()

    async def _booted(self) -> None:
        """Boot once, whoever asks first; one that Ray restarted asks itself."""
        if self._booting is None:
            self._booting = asyncio.create_task(self._boot())
        await asyncio.shield(self._booting)

    async def _boot(self) -> None:
        self._self = workers.this_actor()
        await self._nodes.start()
        if self._system.system.metrics_port is not None:
            self._serve_metrics(self._system.system.metrics_port)
        devices = await asyncio.to_thread(self._find_devices)
        models = await asyncio.to_thread(self._find_models)
        epoch = int(self._clock.time() * 1000)  # Above every epoch of an earlier boot.
        self._apply(
            ev.Booted(
                now=self._clock.monotonic(),
                cause="boot",
                devices=tuple(
                    DeviceSpec(i.name, i.kind, i.budget_bytes, i.threads) for i in devices
                ),
                models=tuple(models),
                hosts=self._system.hosts.count,
                first_epoch=epoch,
            )
        )
        self._spawn(self._keep_pinging())
        await self._wait_up()
        await self._recover()

    async def _wait_up(self) -> None:
        """Until every process serves or was given up; an essential one given up is an error."""

        def settled() -> bool:
            return all(
                p.state in (ProcessState.UP, ProcessState.GIVEN_UP)
                for p in self._core.processes.values()
            )

        try:
            async with asyncio.timeout(START_S + 30.0), self._routes_changed:
                await self._routes_changed.wait_for(settled)
        except TimeoutError:
            raise DeadlineExceeded("starting the kernel's processes", START_S + 30.0) from None
        for process in self._core.processes.values():
            if process.state is ProcessState.GIVEN_UP:
                raise KernelError(
                    f"{process.name} does not start: {process.reason}", remedy="See: llmos logs"
                )

    async def _recover(self) -> None:
        """Launch again what the store says was launched.

        Where the system file says something else about an agent, the file counts: the agent
        keeps its state and gets the new program or configuration.
        """
        declared = {agent_id(table): table for table in self._system.agents}
        rows: list[LaunchRow] = await self._read("launches")
        for row in rows:
            self._launches[row.agent] = row
            tenant, _, key = row.agent.split("/", 2)
            table = AgentTable(
                program=row.program, tenant=tenant, key=key, config=msgpack.unpackb(row.config)
            )
            try:
                await self._launch(declared.get(row.agent, table), 60.0)
            except LlmosError as error:
                log.error("agent %s does not come back: %s", row.agent, error)

    # ---------------------------------------------------------------- agents

    @answers
    async def launch(self, table: AgentTable, timeout_s: float) -> dict[str, Any]:
        """Launch an agent; returns when it can be asked.

        Raises:
            ProgramError, UnknownModel, UnknownResource, RuleSyntaxError, DoesNotFit, …
        """
        await self._booted()
        return await self._launch(table, timeout_s)

    async def _launch(self, table: AgentTable, timeout_s: float) -> dict[str, Any]:
        agent = agent_id(table)
        running = self._programs.get(agent)
        if running == table and agent in self._core.agents:
            return self._agent(agent)
        until = self._clock.monotonic() + timeout_s
        host = await self._any_host(timeout_s)
        left = max(until - self._clock.monotonic(), 0.001)
        manifest: Manifest = await call(
            host.inspect.remote(table.program, table.tenant, table.config),
            f"inspecting {table.program}",
            left,
        )
        for need in manifest.models:
            if need.name in self._model_errors:
                raise self._model_errors[need.name]
        packed = pack_config(table)
        request = f"launch:{agent}:{os.urandom(4).hex()}"
        event = ev.LaunchAsked(
            now=self._clock.monotonic(),
            cause=request,
            agent=agent,
            models=tuple((n.name, int(n.memory) if n.memory else None) for n in manifest.models),
        )
        left = max(until - self._clock.monotonic(), 0.001)
        await self._request(request, event, left)
        try:
            async with self._rows:
                before = self._launches.get(agent)
                if before is None or (before.program, before.config) != (table.program, packed):
                    # Who was launched before keeps what it has, and gets the new program.
                    launch = before.id if before is not None else os.urandom(8).hex()
                    row = LaunchRow(agent, table.program, packed, launch, self._clock.time())
                    await self._commit([[PutLaunch(row)]])
                    self._launches[agent] = row
        except BaseException:
            # Also when the asker has gone: what nobody was told of must not hold the name.
            self._apply(ev.KillAsked(now=self._clock.monotonic(), cause=request, agent=agent))
            raise
        self._manifests[agent], self._programs[agent] = manifest, table
        log.info("launched %s", agent)
        return self._agent(agent)

    async def _request(self, request: str, event: ev.AnyEvent, timeout_s: float) -> Any:
        """Hand the core an event and wait for the action that answers it."""
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._requests[request] = future
        self._apply(event)
        try:
            async with asyncio.timeout(timeout_s):
                return await future
        except TimeoutError:
            self._take_back(request, future)
            raise DeadlineExceeded(f"waiting for memory ({request})", timeout_s) from None
        except asyncio.CancelledError:
            self._take_back(request, future)
            raise
        finally:
            self._requests.pop(request, None)

    def _take_back(self, request: str, future: asyncio.Future[Any]) -> None:
        """Nobody waits for this request any more."""
        now = self._clock.monotonic()
        answered = future.done() and not future.cancelled() and future.exception() is None
        if answered and isinstance(future.result(), act.Launched):
            agent = future.result().agent
            self._apply(ev.KillAsked(now=now, cause=request, agent=agent))
        else:
            self._apply(ev.LaunchGivenUp(now=now, cause=request, request=request))

    async def _any_host(self, timeout_s: float) -> Handle:
        def first() -> Handle:
            for name, process in self._core.processes.items():
                if process.kind is ProcessKind.HOST and process.state is ProcessState.UP:
                    return self._handles.get(name)
            return None

        try:
            async with asyncio.timeout(timeout_s), self._routes_changed:
                await self._routes_changed.wait_for(lambda: first() is not None)
        except TimeoutError:
            raise DeadlineExceeded("waiting for a host", timeout_s) from None
        return first()

    async def _journal(self, method: str, *args: Any, **options: Any) -> Any:
        """Call the journal; waits while it is being restarted.

        Raises:
            DeadlineExceeded: it did not come back within 30 s.
        """
        try:
            async with asyncio.timeout(30.0):
                while True:
                    handle = self._handles.get("journal")
                    if handle is not None:
                        with contextlib.suppress(ProcessGone):
                            return await call(
                                getattr(handle, method).remote(*args, **options), "the journal"
                            )

                    def is_back(lost: Handle = handle) -> bool:
                        return self._handles.get("journal") not in (None, lost)

                    async with self._routes_changed:
                        await self._routes_changed.wait_for(is_back)
        except TimeoutError:
            raise DeadlineExceeded(f"the journal ({method})", 30.0) from None

    async def _read(self, method: str, *args: Any, **options: Any) -> Any:
        """Call a reading method of the store."""
        return await self._journal("read", method, *args, **options)

    async def _commit(self, parts: list[Part]) -> None:
        """Make parts durable; raises why the first one that was refused was."""
        for error in await self._journal("commit", parts):
            if error is not None:
                raise error

    @answers
    async def kill(self, agent: str) -> dict[str, Any]:
        """Cancel an agent's turns and forget it and its state.

        Raises:
            UnknownAgent
        """
        await self._booted()
        agent = self._resolve(agent)
        if agent not in self._core.agents:
            raise UnknownAgent(agent, self._core.agents)  # One of a pattern: kill that.
        request = f"kill:{agent}:{os.urandom(4).hex()}"
        # The row first: what comes in from now on does not find the agent in the store.
        async with self._rows:
            told = await self._exit_notices(agent, "killed", "")
            await self._commit([[DropLaunch(agent), *told]])
            event = ev.KillAsked(now=self._clock.monotonic(), cause=request, agent=agent)
            await self._request(request, event, 30.0)
            for known in (self._manifests, self._programs, self._launches):
                known.pop(agent, None)
        for name, handle in list(self._handles.items()):
            if self._kinds[name] is not ProcessKind.HOST:
                continue
            try:
                await call(handle.drop.remote(agent, "a kill"), name, 10.0)
            except LlmosError as error:
                log.warning("%s may go on with a turn of %s: %s", name, agent, error)
        self._hint_all()
        log.info("killed %s", agent)
        return {"agent": agent}

    @answers
    async def ended(self, agent: str, reason: str, story: str) -> None:
        """A host has quarantined an agent: whoever watches it gets a message."""
        told = await self._exit_notices(agent, reason, story)
        if told:
            await self._commit([told])
            self._hint_all()

    async def _exit_notices(self, agent: str, reason: str, story: str) -> list[Write]:
        """Messages for those who watch an agent; those linked to it are held with it."""
        watchers: list[MonitorRow] = await self._read("monitors", agent)
        seq = int(self._clock.time() * 1000)
        out: list[Write] = []
        for watcher in watchers:
            envelope = Envelope(
                receiver=watcher.watcher,
                sender="exit",
                wire=Wire.of(Exited(agent=agent, reason=reason, story=story)),
                stream=f"exit:{agent}",
                seq=seq,
            )
            if watcher.linked:
                why = f"it is linked to {agent}, which was {reason}"
                out.append(SetHold(watcher.watcher, "quarantined", why))
                for name, handle in self._handles.items():
                    if self._kinds[name] is ProcessKind.HOST:
                        handle.hold.remote(watcher.watcher, "quarantined", why)
            row = MailRow(watcher.watcher, envelope.stream, seq, envelope.pack())
            out.append(PutMail(row))
        return out

    def _hint_all(self) -> None:
        """There is new mail in the store for somebody."""
        for name, handle in self._handles.items():
            if self._kinds[name] is ProcessKind.HOST:
                handle.hint.remote()

    @answers
    async def locate(
        self, agent: str, not_at: tuple[str, int] | None, timeout_s: float
    ) -> Location:
        """Where an agent is served; waits while that is nowhere.

        Args:
            agent: Its id, or an unambiguous part of it.
            not_at: A host and its epoch that the asker found lost.
            timeout_s: How long to wait.

        Raises:
            UnknownAgent, HostUnavailable; DeadlineExceeded after ``timeout_s``.
        """

        def found() -> Location | None:
            route = self._core.route(self._resolve(agent))
            handle = self._handles.get(route[0]) if route is not None else None
            if route is None or handle is None or route == not_at:
                return None
            return Location(route[0], route[1], handle)

        try:
            async with asyncio.timeout(timeout_s):
                await self._booted()
                async with self._routes_changed:
                    await self._routes_changed.wait_for(lambda: found() is not None)
                location = found()
        except TimeoutError:
            raise DeadlineExceeded(f"finding a host for {agent}", timeout_s) from None
        assert location is not None
        return location

    @answers
    async def resolve(self, agent: str) -> str:
        """The full id of an agent named in full or by an unambiguous part.

        Raises:
            UnknownAgent
        """
        await self._booted()
        return self._resolve(agent)

    def _resolve(self, agent: str) -> str:
        if agent in self._core.agents or (agent.count("/") == 2 and self._core.serves(agent)):
            return agent
        parts = [a for a in self._core.agents if agent in (a.rsplit("/", 1)[0], *a.split("/"))]
        if len(parts) == 1:
            return parts[0]
        raise UnknownAgent(agent, parts or self._core.agents)

    # ---------------------------------------------------------------- the core's actions

    def _apply(self, event: ev.AnyEvent) -> None:
        """Feed the core and carry out what it says, in order."""
        for action in self._core.handle(event):
            log.debug("%s ⇒ %s", type(event).__name__, action)
            self._carry_out(action)
        self._measure()

    def _carry_out(self, action: act.AnyAction) -> None:
        match action:
            case act.StartProcess():
                RESTARTS.labels(process=action.process)  # So that it is exported as 0.
                self._kinds[action.process] = action.kind
                self._spawn(self._watch(action))
            case act.Fence():
                before = self._fences.get(action.host)
                self._fences[action.host] = self._spawn(self._fence(action, before))
            case act.LoadSlot():
                self._spawn(self._load(action))
            case act.UnloadSlot():
                EVICTIONS.labels(model=action.slot).inc()
                self._spawn(self._unload(action))
            case act.ForgetClient():
                for name, handle in self._handles.items():
                    if self._kinds[name] is ProcessKind.DEVICE:
                        handle.forget.remote(action.client)
            case act.Launched() | act.Killed() | act.Drained():
                self._answer(action.cause, action)
                self._spawn(self._announce())
            case act.ReleaseShards():
                self._spawn(self._release(action))
            case act.StopProcess():
                self._spawn(self._stop_process(action))
            case act.Refused():
                self._answer(action.cause, action.error)
            case act.RoutesChanged():
                self._spawn(self._announce())
            case act.WakeAt():
                self._spawn(self._wake(action))
            case act.Note():
                log.log(logging.getLevelName(action.level.upper()), action.text)

    def _answer(self, request: str, value: Any) -> None:
        future = self._requests.get(request)
        if future is None or future.done():
            return
        if isinstance(value, LlmosError):
            future.set_exception(value)
        else:
            future.set_result(value)

    async def _wake(self, action: act.WakeAt) -> None:
        await self._clock.sleep(max(0.0, action.when - self._clock.monotonic()))
        # Timers of uvloop may be a millisecond early: a tick that comes before its time would
        # start nothing, and no other one would come.
        now = max(self._clock.monotonic(), action.when)
        self._apply(ev.Tick(now=now, cause=action.cause))

    async def _watch(self, action: act.StartProcess) -> None:
        """Start a process, say when it is up, and when it is gone."""
        name = action.process
        reason, handle = "", None
        try:
            if name in self._fences:
                await self._fences.pop(name)
            self._stopping.discard(name)
            where = await self._nodes.choose(name, action.kind)
            handle = workers.start(
                action, self._system, self._settings, self._run, self._infos, self._self, where
            )
            ready = await call(handle.ready.remote(), name, START_S)
            if name in self._stopping:
                workers.kill(handle)  # Stopped while it was starting.
                self._nodes.gone(name)
                await self._announce()
                return
            node = await call(workers.node_of(handle), name, START_S)
            self._nodes.put(name, action.kind, node)
            log.info("%s is up (incarnation %d)", name, action.incarnation)
            self._handles[name] = handle
            if isinstance(ready, DeviceInfo):
                log.info("%s: %s, %d bytes", name, ready.product, ready.budget_bytes)
            await self._announce()
            self._apply(
                ev.ProcessUp(
                    now=self._clock.monotonic(),
                    cause=name,
                    process=name,
                    incarnation=action.incarnation,
                )
            )
            await self._announce()
            await call(handle.lifeline.remote(), name)
            reason = "it was closed"
        except LlmosError as error:
            reason = str(error)
        except Exception as error:
            # A bug of ours or of Ray: the process counts as lost, and the log has the rest.
            log.exception("watching %s", name)
            reason = repr(error)
        if self._closing or name in self._stopping:
            self._nodes.gone(name)
            await self._announce()
            return
        if self._core.processes[name].incarnation != action.incarnation:
            return  # It was stopped, and has been started anew: that one is watched by itself.
        RESTARTS.labels(process=name).inc()
        self._handles.pop(name, None)
        self._nodes.gone(name)
        if handle is not None:
            # It may be alive: too slow to start, or cut off. Two of them must not be.
            workers.kill(handle)
        await self._announce()
        self._apply(
            ev.ProcessLost(
                now=self._clock.monotonic(),
                cause=name,
                process=name,
                incarnation=action.incarnation,
                reason=reason,
                chance=self._clock.random(),
            )
        )
        await self._announce()

    async def _fence(self, action: act.Fence, before: asyncio.Task[None] | None) -> None:
        """Give shards to a host in the store: owners before it can commit no more."""
        if before is not None and not before.done():
            await asyncio.wait([before])
        await self._commit([[TakeShards(action.shards, action.epoch)]])
        self._apply(
            ev.Fenced(
                now=self._clock.monotonic(),
                cause=action.cause,
                host=action.host,
                epoch=action.epoch,
                shards=action.shards,
            )
        )

    async def _release(self, action: act.ReleaseShards) -> None:
        """Let a host end its turns on shards that another one is to have."""
        handle = self._handles.get(action.host)
        if handle is not None:
            try:
                await call(
                    handle.release.remote(action.shards, RELEASE_S),
                    action.host,
                    2 * RELEASE_S + 5.0,
                )
            except LlmosError as error:
                log.warning("%s did not release its shards: %s", action.host, error)
        self._apply(
            ev.ShardsReleased(
                now=self._clock.monotonic(),
                cause=action.cause,
                host=action.host,
                shards=action.shards,
                to=action.to,
            )
        )

    async def _stop_process(self, action: act.StopProcess) -> None:
        self._stopping.add(action.process)
        handle = self._handles.pop(action.process, None)
        await self._announce()
        if handle is None:
            return
        args = (1.0,) if self._kinds[action.process] is ProcessKind.HOST else ()
        await self._close(action.process, handle.close.remote(*args), 5.0)
        workers.kill(handle)
        if self._core.processes[action.process].state is ProcessState.STOPPED:
            self._nodes.gone(action.process)
        await self._announce()

    async def _keep_pinging(self) -> None:
        """Kill what no longer answers: a hung process holds up its agents for ever."""
        patience_s = self._system.system.hang_timeout_s

        async def ping(name: str, handle: Handle) -> None:
            try:
                await call(handle.ping.remote(), name, patience_s)
            except DeadlineExceeded:
                log.error("%s has not answered for %.0f s and is killed", name, patience_s)
                workers.kill(handle)
            except LlmosError as error:
                log.debug("ping: %s", error)  # It is gone; its lifeline says so, too.

        pending: dict[str, asyncio.Task[None]] = {}
        while not self._closing:
            await self._clock.sleep(PING_S)
            for name, handle in list(self._handles.items()):
                if name not in pending or pending[name].done():
                    pending[name] = self._spawn(ping(name, handle))

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._finished)
        return task

    def _finished(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            log.error("a task of the kernel failed", exc_info=task.exception())

    # ---------------------------------------------------------------- ending

    async def shutdown(self, grace_s: float) -> None:
        """Let turns end, then stop every process in order: hosts, knowledge, devices, journal."""
        if self._closing:
            return
        self._closing = True
        order = (
            ProcessKind.HOST,
            ProcessKind.KNOWLEDGE,
            ProcessKind.DEVICE,
            ProcessKind.JOURNAL,
        )
        for kind in order:
            handles = {n: h for n, h in self._handles.items() if self._kinds[n] is kind}
            args = (grace_s,) if kind is ProcessKind.HOST else ()
            await asyncio.gather(
                *(self._close(n, h.close.remote(*args), grace_s) for n, h in handles.items())
            )
            for handle in handles.values():
                workers.kill(handle)
        if self._endpoint is not None:
            await asyncio.to_thread(self._endpoint.close)
        for task in self._tasks:
            if task is not asyncio.current_task():
                task.cancel()
        log.info("shut down")

    async def _close(self, name: str, ref: Any, grace_s: float) -> None:
        try:
            await call(ref, name, grace_s + 5.0)
        except LlmosError as error:
            log.warning("closing %s: %s", name, error)


def agent_id(table: AgentTable) -> str:
    """``tenant/program/key``, the program's class name in kebab case."""
    name = table.program.rpartition(":")[2]
    kebab = "".join(f"-{c.lower()}" if c.isupper() and i else c.lower() for i, c in enumerate(name))
    return f"{table.tenant}/{kebab}/{table.key}"


def pack_config(table: AgentTable) -> bytes:
    """A configuration as it is stored.

    Raises:
        ProgramError: it holds what has no form outside this process, e.g. a TOML date.
    """
    try:
        return bytes(msgpack.packb(table.config))
    except (TypeError, ValueError, OverflowError) as error:
        raise ProgramError(
            table.program,
            f"config cannot be stored: {error}",
            remedy="Write dates and the like as strings",
        ) from None
