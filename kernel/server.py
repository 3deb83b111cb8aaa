"""The kernel actor: feeds the core events and carries out its actions."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import Coroutine
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import msgpack

from llmos.drivers.devices.precision import Precision, resolve_precision
from llmos.drivers.errors import LlmosError
from llmos.drivers.models.footprint import predict_footprint
from llmos.drivers.models.store import ModelStore
from llmos.drivers.protocols import AgentDelete, AgentRow, AgentWrite, DeviceInfo, EngineOptions
from llmos.kernel import logs, workers
from llmos.kernel.clock import Clock, SystemClock
from llmos.kernel.core import actions as act
from llmos.kernel.core import events as ev
from llmos.kernel.core.errors import KernelError
from llmos.kernel.core.slots import SlotState
from llmos.kernel.core.state import KernelCore
from llmos.kernel.core.types import DeviceSpec, ModelSpec, ProcessKind, ProcessState
from llmos.kernel.directory import Directory, SlotRoute
from llmos.kernel.manifest import Manifest
from llmos.kernel.metrics import AGENTS, MEMORY, RESTARTS, Exported, MetricsEndpoint, export, render
from llmos.kernel.program import ProgramError
from llmos.kernel.remote import Handle, ProcessGone, answers, call
from llmos.kernel.router import Location
from llmos.kernel.settings import Settings
from llmos.kernel.system import AgentTable, SystemConfig
from llmos.syscalls.errors import DeadlineExceeded, UnknownAgent

log = logging.getLogger("llmos.kernel")

PING_S = 2.0
"""How often a process is asked whether it answers."""
START_S = 120.0
"""A process that has not come up after so long is killed."""


class KernelServer:
    """The control plane of one system. A Ray actor."""

    def __init__(self, system: SystemConfig, settings: Settings) -> None:
        self._system = system
        self._settings = settings
        self._run = settings.runs_dir / system.system.name
        logs.configure(self._run / "logs", "kernel", settings.log_level)
        self._clock: Clock = SystemClock()
        self._core = KernelCore()
        self._handles: dict[str, Handle] = {}
        self._kinds: dict[str, ProcessKind] = {}
        self._infos: dict[str, DeviceInfo] = {}
        self._digests: dict[str, str] = {}
        self._paths: dict[str, Path] = {}
        self._dtypes: dict[str, Precision] = {}
        self._model_errors: dict[str, LlmosError] = {}
        self._manifests: dict[str, Manifest] = {}
        self._programs: dict[str, AgentTable] = {}
        self._requests: dict[str, asyncio.Future[Any]] = {}
        self._routes_changed = asyncio.Condition()
        self._version = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._fences: dict[str, asyncio.Task[None]] = {}
        self._rows = asyncio.Lock()
        """Held while the store's rows of agents are changed: launch, kill and fence read
        and write them in several steps."""
        self._booting: asyncio.Task[None] | None = None
        self._endpoint: MetricsEndpoint | None = None
        self._closing = False
        self._self: Handle = None
        self._started_at = self._clock.time()

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
        """Boot once, whoever asks first: a kernel actor that Ray restarted is asked by anybody."""
        if self._booting is None:
            self._booting = asyncio.create_task(self._boot())
        await asyncio.shield(self._booting)

    async def _boot(self) -> None:
        self._self = workers.this_actor()
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

    def _find_devices(self) -> list[DeviceInfo]:
        from llmos.drivers.devices.discover import discover
        from llmos.drivers.errors import DeviceUnavailable

        found = {i.name: i for i in discover()}
        if not self._system.devices:
            infos = list(found.values())
        else:
            infos = []
            for table in self._system.devices:
                info = found.get(table.name)
                if info is None:
                    raise DeviceUnavailable(
                        table.name, "this machine has none", remedy="Devices: " + ", ".join(found)
                    )
                infos.append(
                    DeviceInfo(
                        name=info.name,
                        kind=info.kind,
                        total_bytes=info.total_bytes,
                        budget_bytes=int(table.memory or info.budget_bytes),
                        threads=table.threads or info.threads,
                        product=info.product,
                        compute_capability=info.compute_capability,
                    )
                )
        self._infos = {i.name: i for i in infos}
        return infos

    def _find_models(self) -> list[ModelSpec]:
        """Models whose files are there; what is wrong with the others is kept for who asks."""
        store = ModelStore(self._settings.models_dir)
        embedders = {c.embedder for c in self._system.corpora.values()}
        specs = []
        for name, table in self._system.models.items():
            size = 0
            if table.needs_files:
                try:
                    files = store.get(table.source)
                except LlmosError as error:
                    self._model_errors[name] = error
                    log.error("model %s: %s", name, error)
                    continue
                self._digests[name], self._paths[name] = files.digest, files.path
                info = self._infos.get(table.device or "") or self._default_device()
                self._dtypes[name] = resolve_precision(table.dtype, table.engine, info)
                size = predict_footprint(
                    files.path,
                    kind=table.kind,
                    dtype=self._dtypes[name],
                    kv_tokens=table.kv_tokens,
                    max_batch_tokens=table.max_batch_tokens,
                    max_batch_texts=table.max_batch_texts,
                ).total_bytes
            else:
                self._digests[name] = table.engine
            specs.append(
                ModelSpec(
                    name=name,
                    kind=table.kind,
                    size_bytes=size,
                    pinned=name in embedders,
                    threads=table.threads,
                    device=table.device,
                )
            )
        return specs

    def _default_device(self) -> DeviceInfo:
        """Where a model goes that is not told where: to a GPU if there is one."""
        return max(self._infos.values(), key=lambda i: (i.kind == "cuda", i.budget_bytes))

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
        rows: list[AgentRow] = await self._journal("agents")
        for row in rows:
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
        packed = _pack_config(table)
        request = f"launch:{agent}:{os.urandom(4).hex()}"
        event = ev.LaunchAsked(
            now=self._clock.monotonic(),
            cause=request,
            agent=agent,
            models=tuple((n.name, int(n.memory) if n.memory else None) for n in manifest.models),
        )
        left = max(until - self._clock.monotonic(), 0.001)
        launched: act.Launched = await self._request(request, event, left)
        try:
            async with self._rows:
                while True:
                    # Its host may have been restarted meanwhile, under another epoch.
                    epoch = self._epoch_of(agent)
                    row = AgentRow(agent, table.program, packed, epoch, self._clock.time())
                    await self._journal("commit", [AgentWrite(row)])
                    if self._epoch_of(agent) == epoch:
                        break
        except BaseException:
            # Also when the asker has gone: what nobody was told of must not hold the name.
            self._apply(ev.KillAsked(now=self._clock.monotonic(), cause=request, agent=agent))
            raise
        self._manifests[agent], self._programs[agent] = manifest, table
        log.info("launched %s on %s", agent, launched.host)
        return self._agent(agent)

    def _epoch_of(self, agent: str) -> int:
        """The epoch of the host that an agent is given to."""
        entry = self._core.agents.get(agent)
        if entry is None or not entry.host:
            raise UnknownAgent(agent)  # It was killed in this very moment.
        return self._core.processes[entry.host].epoch

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

    async def _journal(self, method: str, *args: Any) -> Any:
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
                            return await call(getattr(handle, method).remote(*args), "the journal")

                    def is_back(lost: Handle = handle) -> bool:
                        return self._handles.get("journal") not in (None, lost)

                    async with self._routes_changed:
                        await self._routes_changed.wait_for(is_back)
        except TimeoutError:
            raise DeadlineExceeded(f"the journal ({method})", 30.0) from None

    @answers
    async def kill(self, agent: str) -> dict[str, Any]:
        """Cancel an agent's turns and forget it and its state.

        Raises:
            UnknownAgent
        """
        await self._booted()
        agent = self._resolve(agent)
        request = f"kill:{agent}:{os.urandom(4).hex()}"
        # The row first: what comes in from now on does not find the agent in the store.
        async with self._rows:
            await self._journal("commit", [AgentDelete(agent)])
            event = ev.KillAsked(now=self._clock.monotonic(), cause=request, agent=agent)
            killed: act.Killed = await self._request(request, event, 30.0)
            self._manifests.pop(agent, None)
            self._programs.pop(agent, None)
        handle = self._handles.get(killed.host)
        if handle is not None:
            try:
                await call(handle.drop.remote(agent, "a kill"), killed.host, 10.0)
            except LlmosError as error:
                log.warning("%s may go on with a turn of %s: %s", killed.host, agent, error)
        log.info("killed %s", agent)
        return {"agent": agent}

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
        if agent in self._core.agents:
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
                self._fences[action.host] = self._spawn(self._fence(action))
            case act.LoadSlot():
                self._spawn(self._load(action))
            case act.UnloadSlot():
                self._spawn(self._unload(action))
            case act.ForgetClient():
                for name, handle in self._handles.items():
                    if self._kinds[name] is ProcessKind.DEVICE:
                        handle.forget.remote(action.client)
            case act.Launched() | act.Killed():
                self._answer(action.cause, action)
                self._spawn(self._announce())
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
        self._apply(ev.Tick(now=self._clock.monotonic(), cause=action.cause))

    async def _watch(self, action: act.StartProcess) -> None:
        """Start a process, say when it is up, and when it is gone."""
        name = action.process
        reason, handle = "", None
        try:
            if name in self._fences:
                await self._fences.pop(name)
            handle = workers.start(
                action, self._system, self._settings, self._run, self._infos, self._self
            )
            ready = await call(handle.ready.remote(), name, START_S)
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
        except LlmosError as error:
            reason = str(error)
        except Exception as error:
            # A bug of ours or of Ray: the process counts as lost, and the log has the rest.
            log.exception("watching %s", name)
            reason = repr(error)
        if self._closing:
            return
        RESTARTS.labels(process=name).inc()
        self._handles.pop(name, None)
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
            )
        )
        await self._announce()

    async def _fence(self, action: act.Fence) -> None:
        """Raise the epoch of a host's agents in the store: older owners can commit no more."""
        async with self._rows:
            writes = []
            for agent in action.agents:
                row, _ = await self._journal("activate", agent)
                if row is not None:
                    writes.append(AgentWrite(replace(row, epoch=action.epoch)))
            await self._journal("commit", writes)
        self._apply(
            ev.Fenced(
                now=self._clock.monotonic(),
                cause=action.cause,
                host=action.host,
                agents=action.agents,
            )
        )

    async def _load(self, action: act.LoadSlot) -> None:
        table = self._system.models[action.slot]
        options = EngineOptions(
            model=action.slot,
            path=self._paths.get(action.slot, Path()),
            dtype=self._dtypes.get(action.slot, "float32"),
            threads=action.threads,
            kv_tokens=table.kv_tokens,
            max_batch_tokens=table.max_batch_tokens,
            max_batch_texts=table.max_batch_texts,
            max_waiting=table.max_waiting,
        )
        handle = self._handles.get(f"device:{action.device}")
        if handle is None:
            return  # It died meanwhile; the core hears of that and decides again.
        try:
            measured = await call(
                handle.load.remote(table.engine, table.kind, options), f"loading {action.slot}"
            )
        except ProcessGone:
            return
        except LlmosError as error:
            event: ev.AnyEvent = ev.SlotFailed(
                now=self._clock.monotonic(), cause=action.cause, slot=action.slot, error=error
            )
        else:
            event = ev.SlotLoaded(
                now=self._clock.monotonic(),
                cause=action.cause,
                slot=action.slot,
                measured_bytes=measured,
            )
        self._apply(event)
        await self._announce()

    async def _unload(self, action: act.UnloadSlot) -> None:
        handle = self._handles.get(f"device:{action.device}")
        if handle is None:
            return
        try:
            await call(handle.unload.remote(action.slot), f"unloading {action.slot}")
        except ProcessGone:
            return  # The core hears that its device is lost.
        except LlmosError as error:
            log.error("unloading %s: %s", action.slot, error)
        self._apply(
            ev.SlotUnloaded(now=self._clock.monotonic(), cause=action.cause, slot=action.slot)
        )
        await self._announce()

    async def _announce(self) -> None:
        """Tell every process who serves what, and wake who waits for a route."""
        self._version += 1
        slots: dict[str, SlotRoute] = {}
        for name, table in self._system.models.items():
            slot = self._core.slots.get(name)
            error = self._model_errors.get(name)
            if slot is not None and slot.state is SlotState.FAILED:
                # A device that is being restarted will load it again: let them wait.
                device_lost = any(
                    p.kind is ProcessKind.DEVICE and p.state is not ProcessState.UP
                    for p in self._core.processes.values()
                )
                error = None if device_lost else slot.error
            resident = slot is not None and slot.state is SlotState.READY
            device = slot.device if slot is not None and resident else None
            process = self._core.processes.get(f"device:{device}")
            slots[name] = SlotRoute(
                table.kind,
                device,
                self._digests.get(name, ""),
                error,
                process.incarnation if process else 0,
            )
        directory = Directory(
            version=self._version,
            kernel=self._self,
            journal=self._handles.get("journal"),
            knowledge=self._handles.get("knowledge"),
            devices={
                n: h for n, h in self._handles.items() if self._kinds[n] is ProcessKind.DEVICE
            },
            slots=slots,
        )
        for name, handle in list(self._handles.items()):
            if self._kinds[name] in (ProcessKind.HOST, ProcessKind.KNOWLEDGE):
                handle.directory.remote(directory)
        async with self._routes_changed:
            self._routes_changed.notify_all()

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

    def _measure(self) -> None:
        MEMORY.clear()
        for device, account in self._core.ledger.accounts.items():
            for owner, reservation in account.reservations.items():
                MEMORY.labels(device=device, owner=owner).set(reservation.held_bytes)
            MEMORY.labels(device=device, owner="free").set(account.free_bytes)
        counts: dict[str, int] = {}
        for entry in self._core.agents.values():
            counts[entry.state.value] = counts.get(entry.state.value, 0) + 1
        for state in ("pending", "ready", "unreachable"):
            AGENTS.labels(state=state).set(counts.get(state, 0))

    # ---------------------------------------------------------------- looking

    def _agent(self, agent: str) -> dict[str, Any]:
        entry = self._core.agents[agent]
        table = self._programs.get(agent)
        manifest = self._manifests.get(agent)
        return {
            "agent": agent,
            "program": table.program if table else "",
            "state": entry.state.value,
            "host": entry.host,
            "models": list(entry.models),
            "capabilities": list(manifest.capabilities) if manifest else [],
            "description": manifest.description if manifest else "",
        }

    @answers
    async def ps(self) -> list[dict[str, Any]]:
        """All agents."""
        await self._booted()
        return [self._agent(agent) for agent in sorted(self._core.agents)]

    @answers
    async def status(self) -> dict[str, Any]:
        """Processes, devices with memory by owner, slots, knowledge."""
        await self._booted()
        return await self._status()

    async def _status(self) -> dict[str, Any]:
        core = self._core
        knowledge: dict[str, Any] = {"corpora": {}, "graphs": {}}
        statistics: dict[str, Any] = {}
        for name, handle in list(self._handles.items()):
            try:
                if name == "knowledge":
                    knowledge = await call(handle.status.remote(), name, 5.0)
                elif self._kinds[name] in (ProcessKind.HOST, ProcessKind.DEVICE):
                    statistics[name] = await call(handle.statistics.remote(), name, 5.0)
            except LlmosError as error:
                log.warning("status of %s: %s", name, error)
        return {
            "system": self._system.system.name,
            "started_at": self._started_at,
            "run": str(self._run),
            "processes": [
                {
                    "name": p.name,
                    "state": p.state.value,
                    "incarnation": p.incarnation,
                    "pid": statistics.get(p.name, {}).get("pid"),
                    "reason": p.reason,
                }
                for p in core.processes.values()
            ],
            "devices": [
                {
                    "name": name,
                    "kind": spec.kind,
                    "product": self._infos[name].product,
                    "threads": spec.threads,
                    "capacity_bytes": spec.capacity_bytes,
                    "free_bytes": core.ledger.free_bytes(name),
                    "used_bytes": statistics.get(f"device:{name}", {}).get("used_bytes"),
                    "owners": {
                        o: {"reserved": r.reserved_bytes, "measured": r.committed_bytes}
                        for o, r in core.ledger.accounts[name].reservations.items()
                    },
                }
                for name, spec in core.devices.items()
            ],
            "slots": [
                {
                    "model": s.name,
                    "source": self._system.models[s.name].source,
                    "state": s.state.value,
                    "device": s.device,
                    "threads": s.threads,
                    "predicted_bytes": s.size_bytes,
                    "measured_bytes": s.measured_bytes,
                    "users": len(s.users),
                    "error": str(s.error) if s.error else None,
                    "statistics": _statistics(
                        statistics.get(f"device:{s.device}", {}).get("slots", {}).get(s.name)
                    ),
                }
                for s in core.slots.values()
            ],
            "missing_models": {n: str(e) for n, e in self._model_errors.items()},
            "knowledge": knowledge,
            "hosts": {n: s for n, s in statistics.items() if n.startswith("host")},
            "agents": len(core.agents),
            "metrics_port": self._endpoint.port if self._endpoint else None,
        }

    @answers
    async def knowledge(self) -> dict[str, Any]:
        """Corpora and graphs: what is ready, and how far the others are.

        Raises:
            ProcessGone: the knowledge process is being restarted.
        """
        await self._booted()
        handle = self._handles.get("knowledge")
        if handle is None:
            raise ProcessGone("knowledge", "it is being restarted", final=False)
        found: dict[str, Any] = await call(handle.status.remote(), "knowledge", 10.0)
        return found

    async def metrics(self) -> str:
        """Prometheus text of all processes."""
        return render(await self._exports())

    async def _exports(self) -> list[Exported]:
        exports: list[Exported] = [export("kernel")]
        for name, handle in list(self._handles.items()):
            with contextlib.suppress(LlmosError):
                exports.append(await call(handle.metrics.remote(), name, 5.0))
        return exports

    def _serve_metrics(self, port: int) -> None:
        loop = asyncio.get_running_loop()

        def gather() -> list[Exported]:
            return asyncio.run_coroutine_threadsafe(self._exports(), loop).result(30.0)

        try:
            self._endpoint = MetricsEndpoint(port, gather)
        except OSError as error:
            raise KernelError(
                f"metrics_port = {port}: {error}", remedy="Choose another port, or 0 for a free one"
            ) from None
        log.info("metrics at http://127.0.0.1:%d/metrics", self._endpoint.port)

    @answers
    async def turns(self, agent: str | None, limit: int) -> Any:
        """Newest turns first."""
        if agent is not None:
            with contextlib.suppress(UnknownAgent):
                agent = self._resolve(agent)
        return await self._journal("turns", agent, limit)

    @answers
    async def turn(self, turn: str) -> Any:
        """A turn with its syscalls."""
        return await self._journal("turn", turn)

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


def _statistics(statistics: Any) -> dict[str, Any] | None:
    return asdict(statistics) if statistics is not None else None


def _pack_config(table: AgentTable) -> bytes:
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
