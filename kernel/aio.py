"""A kernel for asyncio: :class:`AsyncKernel`."""

from __future__ import annotations

import asyncio
import functools
import itertools
import os
import sys
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from pathlib import Path
from typing import Any, TypeVar, cast, overload

import ray
from pydantic import ValidationError

from llmos.drivers.errors import LlmosError
from llmos.drivers.stores.rows import JournalRow
from llmos.kernel.cluster import Cluster, RunFile, started_at
from llmos.kernel.offline import SystemNote
from llmos.kernel.operating import CHANGES, OPERATIONS, Operator
from llmos.kernel.remote import Handle, ProcessGone, call
from llmos.kernel.router import RETRY_S, KernelLocator, Router
from llmos.kernel.settings import Settings
from llmos.kernel.system import AgentTable, SystemConfig
from llmos.syscalls.errors import DeadlineExceeded
from llmos.syscalls.labels import Labels, Sensitivity
from llmos.syscalls.messages import Envelope, Message, MessageT, Reply, Wire

T = TypeVar("T")

BOOT_S = 300.0
"""Longest wait for the kernel's processes."""
STALL_S = 120.0
"""Embedding a large corpus may take long; without any progress it is given up after this."""
LAUNCH_S = 120.0
"""Default wait of a launch: models may have to be loaded."""
ASK_S = 120.0
"""Default deadline of a question."""
OPERATE_S = 3_700.0
"""Longest operation: a backup of a large store."""


class InvalidLaunch(LlmosError):
    """A launch that no agent could come of: a key, tenant or configuration of a wrong form."""

    def __init__(self, field: str, reason: str) -> None:
        self.field, self.reason = field, reason
        super().__init__(f"{field}: {reason}")


class AsyncKernel:
    """A kernel, for asyncio. Make one with :meth:`boot` or :meth:`connect`."""

    def __init__(
        self,
        cluster: Cluster,
        handle: Handle,
        system: str,
        settings: Settings,
        *,
        owner: bool,
        detached: bool = False,
    ) -> None:
        self.system = system
        """Name of the system."""
        self._cluster = cluster
        self._handle = handle
        self._settings = settings
        self._owner = owner
        self._detached = detached
        self._router = Router(KernelLocator(handle))
        self._name = f"client:{os.getpid()}"
        self._stream = f"client:{uuid.uuid4().hex}"
        self._sent = itertools.count(1)
        self._open = True

    # -- coming and going

    @classmethod
    async def boot(
        cls,
        system: SystemConfig | Path | str | None = None,
        *,
        address: str | None = None,
        settings: Settings | None = None,
        detached: bool = False,
        launch: bool = True,
        progress: Callable[[str], None] | None = None,
    ) -> AsyncKernel:
        """Boot a kernel, launch the agents of its system file, wait until its corpora are ready.

        Args:
            system: A system file or what was read from one; None is an empty system.
            address: A Ray cluster to boot in. Without it the one of ``RAY_ADDRESS`` (which
                Ray sets inside a job), else a Ray of our own on this machine.
            settings: This machine's settings; None reads the environment.
            detached: The kernel outlives this process (in a cluster it is joined to).
            launch: Whether to launch the file's agents.
            progress: Is told in words what is being waited for.

        Raises:
            SystemFileError, SettingsError, ClusterError, DriverError, KernelError: nothing is
                left running, nor after a cancellation, which waits for that.
        """
        settings = settings or Settings()
        if system is None:
            config = SystemConfig(base=Path.cwd())
        elif isinstance(system, SystemConfig):
            config = system
        else:
            config = SystemConfig.read(Path(system))
        tell = progress or (lambda text: None)
        # Before Ray, which takes seconds to start.
        settings.make_folders(config.system.name)
        tell("starting Ray")
        cluster = await _start(settings, address)
        handle: Handle | None = None
        run: RunFile | None = None
        try:
            tell("starting the kernel's processes")
            handle = cluster.kernel(config, settings, detached=detached)
            kernel = cls(
                cluster, handle, config.system.name, settings, owner=True, detached=detached
            )
            await call(handle.boot.remote(), "booting the kernel", BOOT_S)
            pid = 0 if detached and cluster.joined else os.getpid()
            run = RunFile(
                system=config.system.name,
                address=cluster.address,
                pid=pid,
                started=(started_at(pid) or 0) if pid else 0,
                token=cluster.token,
            )
            run.write(settings)
            SystemNote.write(settings, config)
            if launch:
                for agent in config.agents:
                    tell(f"launching {agent.program}")
                    await kernel._launch(agent, LAUNCH_S)
            await kernel._wait_for_corpora(tell)
        except BaseException:
            path = RunFile.path(settings, run.system) if run is not None else None
            await _to_the_end(asyncio.to_thread(_stop, cluster, handle, path))
            raise
        return kernel

    async def _wait_for_corpora(self, tell: Callable[[str], None]) -> None:
        """Until all are ready or cannot be; the latter hear of it who launch or ask."""
        loop = asyncio.get_running_loop()
        last, changed = "", loop.time()
        while True:
            corpora = (await self._call("knowledge", timeout_s=BOOT_S))["corpora"]
            building = [
                f"{name} {c['embedded']}/{c['passages']}"
                for name, c in corpora.items()
                if not c["ready"]
            ]
            if not building:
                return
            text = "embedding " + ", ".join(building)
            if text != last:
                last, changed = text, loop.time()
                tell(text)
            elif loop.time() - changed > STALL_S:
                raise DeadlineExceeded(text, STALL_S)
            await asyncio.sleep(0.25)

    @classmethod
    async def connect(
        cls,
        system: str | None = None,
        *,
        address: str | None = None,
        settings: Settings | None = None,
    ) -> AsyncKernel:
        """Connect to a kernel that runs.

        Args:
            system: Its name; None takes the only one there is on this machine.
            address: The Ray cluster it is in; None looks among the runs of this machine.
            settings: This machine's settings; None reads the environment.

        Raises:
            ClusterError: it is not there.
        """
        settings = settings or Settings()
        target, token = address or settings.ray_address, None
        if target is None:
            run = RunFile.find(settings, system)
            target, system, token = run.address, run.system, run.token
        cluster = await _start(settings, target, token)
        try:
            handle = cluster.find(system or "system")
        except BaseException:
            await _to_the_end(asyncio.to_thread(cluster.stop))
            raise
        return cls(cluster, handle, system or "system", settings, owner=False)

    async def close(self) -> None:
        """Leave: shut the kernel down if this object booted it, else only disconnect."""
        if self._owner and not self._detached:
            await self.shutdown()
        elif self._open:
            self._open = False
            await asyncio.to_thread(self._cluster.stop)

    async def shutdown(self, grace_s: float = 5.0) -> None:
        """Let turns end for ``grace_s`` seconds, then stop everything. Idempotent."""
        if not self._open:
            return
        self._open = False
        try:
            await call(self._handle.shutdown.remote(grace_s), "shutdown", grace_s * 2 + 30.0)
        finally:
            path = RunFile.path(self._settings, self.system)
            await _to_the_end(asyncio.to_thread(_stop, self._cluster, self._handle, path))

    async def __aenter__(self) -> AsyncKernel:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()

    async def _call(self, method: str, *args: Any, timeout_s: float) -> Any:
        """Call the kernel actor; while a detached one is being restarted, try again.

        Only for what may be asked twice.
        """
        ask = functools.partial(getattr(self._handle, method).remote, *args)
        return await self._until_back(ask, timeout_s)

    async def _until_back(self, ask: Callable[[], Awaitable[Any]], timeout_s: float) -> Any:
        loop = asyncio.get_running_loop()
        until = loop.time() + timeout_s
        while True:
            left = max(until - loop.time(), 0.001)
            try:
                return await call(ask(), "the kernel", left)
            except ProcessGone as gone:
                if gone.final or loop.time() > until:
                    raise
                await asyncio.sleep(RETRY_S)

    # -- agents

    async def launch(
        self,
        program: str | type,
        key: str = "main",
        *,
        tenant: str = "default",
        config: dict[str, Any] | None = None,
        timeout_s: float = LAUNCH_S,
    ) -> str:
        """Launch an agent; returns its id when it can be asked.

        Launching the same program with the same configuration again changes nothing.

        Args:
            program: ``module:Class`` or the class itself.
            key: Tells agents of one program apart.
            tenant: Whose agent it is.
            config: Fields of the program's Config.
            timeout_s: How long to wait for its models.

        Raises:
            InvalidLaunch, ProgramError, UnknownModel, UnknownResource, RuleSyntaxError, DoesNotFit,
            AlreadyLaunched, DeadlineExceeded.
        """
        try:
            table = AgentTable(
                program=program if isinstance(program, str) else program_path(program),
                tenant=tenant,
                key=key,
                config=config if config is not None else {},
            )
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(map(str, first["loc"]))
            raise InvalidLaunch(field, first["msg"].removeprefix("Value error, ")) from None
        return await self._launch(table, timeout_s)

    async def _launch(self, table: AgentTable, timeout_s: float) -> str:
        info = await self._call("launch", table, timeout_s, timeout_s=timeout_s + 10.0)
        return str(info["agent"])

    @overload
    async def ask(
        self, agent: str, message: Message, *, deadline_s: float = ASK_S
    ) -> Message | None: ...

    @overload
    async def ask(
        self, agent: str, message: Message, reply: type[MessageT], *, deadline_s: float = ASK_S
    ) -> MessageT: ...

    async def ask(
        self,
        agent: str,
        message: Message,
        reply: type[MessageT] | None = None,
        *,
        deadline_s: float = ASK_S,
    ) -> Message | None:
        """Ask an agent and wait for its answer.

        Args:
            agent: Its id, or an unambiguous part of it.
            message: What to ask.
            reply: Check the answer to be of this class.
            deadline_s: Give up after so long; what the question started is cancelled.

        Raises:
            LlmosError: whatever the agent or the kernel has to say; always typed.
        """
        answer = await self.ask_reply(agent, Wire.of(message), deadline_s=deadline_s)
        if reply is not None:
            if answer.error is not None:
                raise answer.error
            return (answer.wire or Wire.of_json("nothing", {})).decode(reply, self._name)
        return answer.message()

    async def ask_reply(self, agent: str, wire: Wire, *, deadline_s: float = ASK_S) -> Reply:
        """Like :meth:`ask`, but returns the whole reply: turn, labels, provenance, error."""
        return await self._router.ask(await self._envelope(agent, wire, deadline_s, asked=True))

    async def stream(
        self, agent: str, message: Message, *, deadline_s: float = ASK_S
    ) -> AsyncGenerator[str | Reply, None]:
        """Ask an agent; pieces of text as its turn shows them, and at the end its whole reply.

        A piece is durable before it comes, so nothing that was shown is ever taken back.
        """
        envelope = await self._envelope(agent, Wire.of(message), deadline_s, asked=True)
        async with aclosing(self._router.ask_shown(envelope)) as pieces:
            async for piece in pieces:
                yield piece

    async def tell(
        self, agent: str, message: Message, *, priority: int = 0, deadline_s: float = 30.0
    ) -> str:
        """Put a message into an agent's mailbox; returns its id when it is durable there.

        It is then handled once, whatever dies meanwhile; messages of this kernel object to
        one agent are handled in the order in which they were told.

        Args:
            agent: Its id, or an unambiguous part of it.
            message: What to tell.
            priority: Higher comes before what others have told it.
            deadline_s: Give up after so long; it may then still arrive.

        Raises:
            Busy: the mailbox was full all the time.
            DeadlineExceeded, UnknownAgent, UnhandledMessage, InvalidMessage, Quarantined.
        """
        wire = Wire.of(message)
        envelope = await self._envelope(agent, wire, deadline_s, priority=priority)
        await self._router.post(envelope)
        return envelope.id

    async def _envelope(
        self, agent: str, wire: Wire, deadline_s: float, *, asked: bool = False, priority: int = 0
    ) -> Envelope:
        if agent.count("/") != 2:
            agent = await self._call("resolve", agent, timeout_s=deadline_s)
        return Envelope(
            receiver=agent,
            sender=self._name,
            wire=wire,
            stream=self._stream,
            seq=next(self._sent),
            asked=asked,
            deadline_s=deadline_s,
            priority=priority,
            # What comes from outside is the tenant's own, and may try to instruct.
            labels=Labels(
                tenants=frozenset({agent.split("/", 1)[0]}),
                sensitivity=Sensitivity.INTERNAL,
                trusted=False,
            ),
        )

    async def kill(self, agent: str) -> str:
        """Cancel an agent's turns and forget it; returns its full id.

        Raises:
            UnknownAgent
        """
        return str((await call(self._handle.kill.remote(agent), "the kernel", 60.0))["agent"])

    # -- adapters

    async def load_adapter(
        self,
        name: str,
        model: str,
        path: Path | str,
        *,
        tenant: str | None = None,
        sensitivity: str = "internal",
    ) -> dict[str, Any]:
        """Add an adapter while the system runs, or replace it by a new version.

        Args:
            name: What agents call it.
            model: The causal model that it changes.
            path: Folder as peft saves it, on the machine of the model's device; a relative one
                begins at the system file, as in it.
            tenant: Whose it is; without one, every tenant may be given it.
            sensitivity: Of the data that it was trained on; its answers carry it.

        Raises:
            AdapterUnusable, AdaptersFull: nothing has changed.
        """
        arguments = (name, model, str(path), tenant, sensitivity)
        loading = self._handle.load_adapter.remote(*arguments)
        row: dict[str, Any] = await call(loading, "the kernel", BOOT_S)
        return row

    async def unload_adapter(self, name: str) -> None:
        """Refuse new requests for an adapter at once; those that run go on with it.

        Raises:
            UnknownAdapter
        """
        await call(self._handle.unload_adapter.remote(name), "the kernel", BOOT_S)

    async def adapters(self) -> list[dict[str, Any]]:
        """All adapters: name, model, tenant, path, state, bytes, error."""
        found: list[dict[str, Any]] = await self._call("adapters", timeout_s=BOOT_S)
        return found

    # -- looking

    async def ps(self) -> list[dict[str, Any]]:
        """All agents: id, program, state, host, models, capabilities."""
        found: list[dict[str, Any]] = await self._call("ps", timeout_s=BOOT_S)
        return found

    async def status(self) -> dict[str, Any]:
        """Processes, devices with memory by owner, slots, corpora and graphs."""
        found: dict[str, Any] = await self._call("status", timeout_s=BOOT_S)
        return found

    async def top(self) -> dict[str, Any]:
        """What is used now and by whom: memory, slots, tokens of the last minute, hosts."""
        found: dict[str, Any] = await self._call("top", timeout_s=30.0)
        return found

    async def why(self, agent: str) -> dict[str, Any]:
        """What an agent waits for: a tree of reasons, each with a sentence and its figures.

        Raises:
            UnknownAgent
        """
        found: dict[str, Any] = await self._call("why", agent, timeout_s=60.0)
        return found

    async def metrics(self) -> str:
        """Prometheus text of all processes."""
        return str(await self._call("metrics", timeout_s=30.0))

    async def turns(self, agent: str | None = None, limit: int = 50) -> list[JournalRow]:
        """Ends of turns, those that began last first."""
        return await self.operator.turns(agent, limit)

    async def turn(self, turn: str) -> list[JournalRow]:
        """All rows of a turn in the order they were written; a unique prefix of the id will do."""
        return await self.operator.turn(turn)

    # -- operating

    @property
    def operator(self) -> Operator:
        """What a person does with the records: dead letters, unknown effects, held agents, …

        The methods are carried out by the kernel actor.
        """
        return cast(Operator, _RemoteOperator(self))

    async def _operate(self, operation: str, *args: Any, **options: Any) -> Any:
        if operation not in CHANGES:
            ask = functools.partial(self._handle.operate.remote, operation, *args, **options)
            return await self._until_back(ask, OPERATE_S)
        ref = self._handle.operate.remote(operation, *args, **options)
        return await call(ref, "the kernel", OPERATE_S)


class _RemoteOperator:
    """An :class:`Operator` whose methods are carried out by the kernel actor.

    Not one method for each: they would be a second list of all operations, in step by hand.
    """

    def __init__(self, kernel: AsyncKernel) -> None:
        self._kernel = kernel

    def __getattr__(self, operation: str) -> Callable[..., Awaitable[Any]]:
        if operation not in OPERATIONS:
            raise AttributeError(operation)
        return functools.partial(self._kernel._operate, operation)


def program_path(program: type) -> str:
    """``module:Class`` of a program's class; for a script, its file's name is the module."""
    module = program.__module__
    if module == "__main__":
        main = getattr(sys.modules["__main__"], "__file__", None)
        if main is not None:
            module = Path(main).stem
    return f"{module}:{program.__qualname__}"


async def _start(settings: Settings, address: str | None, token: Path | None = None) -> Cluster:
    """Connect to Ray or start one; if cancelled meanwhile, stop it again."""
    # A thread cannot be cancelled: it would go on and leave a Ray that nobody knows of.
    starting = asyncio.ensure_future(asyncio.to_thread(Cluster.start, settings, address, token))
    try:
        return await asyncio.shield(starting)
    except asyncio.CancelledError:
        await _to_the_end(_undo(starting))
        raise


async def _undo(starting: Awaitable[Cluster]) -> None:
    try:
        cluster = await starting
    except LlmosError:
        return  # It did not start: nothing is to be stopped, and nobody waits to hear why.
    await asyncio.to_thread(cluster.stop)


async def _to_the_end(work: Awaitable[T]) -> T:
    """Wait for work that must not be left half done, through any number of cancellations.

    A cancellation that came meanwhile is raised when it is done.
    """
    task = asyncio.ensure_future(work)
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.wait([task])
        except asyncio.CancelledError as error:
            cancelled = error
    result = task.result()
    if cancelled is not None:
        raise cancelled
    return result


def _stop(cluster: Cluster, handle: Handle | None, run: Path | None) -> None:
    if handle is not None and ray.is_initialized():
        ray.kill(handle, no_restart=True)
    cluster.stop()
    if run is not None:
        run.unlink(missing_ok=True)
