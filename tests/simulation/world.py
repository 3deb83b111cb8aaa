"""Processes, a network between them, a store, tools and a little kernel: all in one loop.

The servers are the real ones. A process that is killed is *mute*: what is left of it in
memory can send nothing, call no tool and write nothing any more. A process that is *cut off*
is not reached any more and has been replaced, but goes on and reaches the others: a zombie.

Whatever may be the last thing that a process does is a *boundary*: :meth:`World.boundary`
counts them, and a plan says what goes wrong at which of them.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import logging
import pickle
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import msgpack
from ray.exceptions import RayActorError

from llmos.drivers.errors import (
    LlmosError,
    StoreError,
    StoreUnavailable,
    ToolUnavailable,
    ToolUncertain,
)
from llmos.drivers.protocols import ToolOutcome
from llmos.drivers.stores.memory import MemoryStore
from llmos.drivers.stores.rows import (
    SHARDS,
    LaunchRow,
    Own,
    Part,
    PutLaunch,
    TakeShards,
    shard_of,
)
from llmos.kernel import host, inbox, logs
from llmos.kernel.directory import Directory
from llmos.kernel.host import HostServer
from llmos.kernel.journal import JournalServer
from llmos.kernel.remote import call
from llmos.kernel.router import Location
from llmos.kernel.system import SystemConfig
from llmos.syscalls.errors import DeadlineExceeded
from tests.simulation.loop import VirtualClock
from tests.simulation.programs import PROGRAMS

PROCESS: contextvars.ContextVar[Process | None] = contextvars.ContextVar("process", default=None)
"""Whose work this is; None: the test's, which never dies."""

MAY_LOSE = ("commit", "commit_packed", "read", "deliver", "post")
"""Calls that fail while both processes live on."""
HOSTS = ("host:0", "host:1")
SYSTEM = "".join(f'[tools.{tool}]\ndriver = "memory"\n' for tool in ("sure", "query", "blind"))


@dataclass(frozen=True)
class Faults:
    """What goes wrong in a run."""

    at: Mapping[int, str] = field(default_factory=dict)
    """Boundary → what happens there; see :meth:`World._happen`."""
    delay_s: float = 0.002
    """Longest usual way of a request or an answer."""
    late: float = 0.0
    """Share of answers that take up to ``late_s``."""
    late_s: float = 0.4
    lost: float = 0.0
    """Share of calls that fail before or after they were carried out."""
    uncertain: float = 0.0
    """Share of calls of tools whose answer is lost."""
    deaths: int = 1000
    """Hosts that may be lost with a message before it is given up."""
    fencing: bool = True
    """Whether the store looks at epochs."""


class Process:
    """Something that can die by itself."""

    def __init__(self, world: World, name: str, epoch: int = 0) -> None:
        self.world, self.name, self.epoch = world, name, epoch
        self.server: Any = None
        self.alive = True
        self.cut = False
        self.lost = asyncio.Event()
        """Set when the others see that it is gone."""
        self.answers: set[asyncio.Future[Any]] = set()
        self.context = contextvars.copy_context()
        self.context.run(PROCESS.set, self)

    def gone(self) -> None:
        """Calls to it fail from now on, and those under way."""
        self.lost.set()
        for answer in list(self.answers):
            if not answer.done():
                answer.set_exception(RayActorError())

    def start(self, make: Callable[[], Any]) -> Any:
        """Make its server, as in a process of its own."""
        self.server = self.context.run(make)
        return self.server


async def forever() -> Any:
    """What a dead process does."""
    return await asyncio.get_running_loop().create_future()


def mute() -> bool:
    """Whether whoever runs this is dead."""
    process = PROCESS.get()
    return process is not None and not process.alive


class Handle:
    """What others have of a process; like a Ray actor's."""

    def __init__(self, process: Process) -> None:
        self._process = process

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return _Method(self._process, name)


class _Method(NamedTuple):
    process: Process
    name: str

    def remote(self, *args: Any, **kwargs: Any) -> asyncio.Future[Any]:
        """Call it."""
        return self.process.world.send(self.process, self.name, args, kwargs)


class Act(NamedTuple):
    """Something that a tool did outside."""

    tool: str
    key: str
    about: str


class OutsideTool:
    """A tool that writes down all it does, as its target would see it."""

    def __init__(self, world: World, name: str) -> None:
        self.world, self.name = world, name
        self.idempotent, self.queryable = name == "sure", name != "blind"

    async def call(self, arguments: Mapping[str, Any], idem_key: str) -> ToolOutcome:
        """Do it: at once, since how long a request may travel is the target's business."""
        world = self.world
        world.boundary(f"before {self.name}", PROCESS.get())
        if mute():
            return await forever()  # type: ignore[no-any-return]
        about = str(arguments["about"])
        if not (self.idempotent and (self.name, idem_key) in world.outcomes):
            world.acts.append(Act(self.name, idem_key, about))
            text = f"{self.name} {about} {len(world.acts)}"
            world.outcomes.setdefault((self.name, idem_key), text)
        outcome = world.outcomes[self.name, idem_key]
        world.boundary(f"after {self.name}", PROCESS.get())
        if mute():
            return await forever()  # type: ignore[no-any-return]
        await asyncio.sleep(world.way())
        if world.chance.random() < world.faults.uncertain and not world.healed:
            raise ToolUncertain(self.name, "its answer was lost")
        return ToolOutcome(outcome, "")

    async def lookup(self, idem_key: str) -> ToolOutcome | None:
        """What it did."""
        if not self.queryable:
            raise ToolUnavailable(self.name, "it cannot be asked")
        if mute():
            return await forever()  # type: ignore[no-any-return]
        found = self.world.outcomes.get((self.name, idem_key))
        return ToolOutcome(found, "") if found is not None else None

    async def close(self) -> None:
        """Nothing to release."""


class SimStore:
    """A store with faults."""

    def __init__(self, world: World, inner: MemoryStore) -> None:
        self._world, self.inner = world, inner

    def commit(self, parts: Sequence[Part]) -> list[StoreError | None]:
        """Commit, unless the store is away."""
        world = self._world
        if world.refusing == "all":
            raise StoreUnavailable("sim", "it is away")
        if not world.faults.fencing:
            parts = [[w for w in part if not isinstance(w, Own)] for part in parts]
        if world.refusing == "some":
            # Neither good nor bad: each group has its own fate.
            fate = world.chance.random()
            if fate < 0.4:
                raise StoreUnavailable("sim", "it is away")
            if fate < 0.5:
                self.inner.commit(parts)
                raise StoreUnavailable("sim", "nobody knows whether this was kept")
        return self.inner.commit(parts)

    def __getattr__(self, name: str) -> Any:
        if self._world.refusing == "all" or (
            self._world.refusing == "some" and self._world.chance.random() < 0.2
        ):
            raise StoreUnavailable("sim", "it is away")
        return getattr(self.inner, name)


class SimJournal(JournalServer):
    """The journal without threads, with boundaries around its commits."""

    def __init__(self, world: World, process: Process) -> None:
        self._world, self._process = world, process
        super().__init__("journal", "memory", "", "", "")

    def _open(self, store: str, path: str) -> Any:
        return SimStore(self._world, self._world.store)

    async def _run(self, executor: Any, work: Callable[[], Any]) -> Any:
        if executor is self._writing:
            await asyncio.sleep(self._world.way())
            self._world.boundary("before commit", self._process)
        if not self._process.alive:
            await forever()
        done = work()
        if executor is self._writing:
            self._world.boundary("after commit", self._process)
            if not self._process.alive:
                await forever()
        return done


class World:
    """Everything of one run."""

    def __init__(self, seed: int, faults: Faults) -> None:
        self.chance = random.Random(seed)
        self.faults = faults
        self.started = self.healed = False
        self.clock = VirtualClock(self.chance)
        self.store = MemoryStore("sim")
        self.refusing = ""
        self.acts: list[Act] = []
        self.outcomes: dict[tuple[str, str], str] = {}
        self.trace: list[str] = []
        """Every boundary that was passed."""
        self.happened: list[str] = []
        self.system = SystemConfig.parse(
            f"{SYSTEM}[mailboxes]\ndeaths = {faults.deaths}\n", "system.toml", Path()
        )
        self.epoch = 0
        self.version = 0
        self.kernel = Process(self, "kernel")
        self.kernel.server = self
        self.processes: dict[str, Process] = {}
        self.zombies: list[Process] = []
        self.served: dict[str, bool] = dict.fromkeys(HOSTS, False)
        """Whether the store holds the epoch of the host as it is now."""
        self.shards = [HOSTS[n % 2] for n in range(SHARDS)]
        for n, agent in enumerate(PROGRAMS):
            self.shards[shard_of(agent)] = HOSTS[n % 2]
        self.moving: set[int] = set()
        self._context = contextvars.copy_context()
        self._control = asyncio.Lock()
        self._last: dict[tuple[int, int], float] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._busy = 0

    # ---------------------------------------------------------------- what goes wrong

    def boundary(self, what: str, process: Process | None) -> None:
        """Something that may be the last thing."""
        if self.healed or not self.started:
            return
        name = process.name if process is not None else "client"
        self.trace.append(f"{what} {name}")
        action = self.faults.at.get(len(self.trace))
        if action is not None:
            self.happened.append(f"{len(self.trace)} {action}")
            self._happen(action)

    def _happen(self, action: str) -> None:
        kind, _, rest = action.partition(" ")
        match kind:
            case "kill":
                for name in rest.split(","):
                    self.kill(name)
            case "cut":
                self.cut(rest)
            case "move":
                self.spawn(self._move(rest))
            case "refuse":
                how, _, seconds = rest.partition(" ")
                self.refusing = how
                loop = asyncio.get_running_loop()
                loop.call_later(float(seconds), self._accept_again)
            case "clock":
                self.clock.ahead_s += float(rest)
            case _:
                raise ValueError(action)

    def _accept_again(self) -> None:
        self.refusing = ""

    def kill(self, name: str) -> None:
        """End a process, this very moment."""
        process = self.processes[name]
        if not process.alive:
            return
        process.alive = False
        if name == "journal":
            self.store = self.store.reopen()
        process.gone()
        if name != "journal":
            self._end(process)

    def _end(self, process: Process) -> None:
        """What is left of a host has no one to talk to; this only saves time."""
        server = process.server
        if server is not None:
            for task in [*server._tasks, *server._inbox._tasks]:
                task.cancel("killed")

    def cut(self, name: str) -> None:
        """The others do not reach a host any more, and believe it dead."""
        process = self.processes[name]
        if not process.alive or process.cut:
            return
        process.cut = True
        self.zombies.append(process)
        process.gone()

    def heal(self) -> None:
        """Nothing more goes wrong; all timers are due."""
        self.healed = True
        self.refusing = ""
        self.clock.ahead_s = max(self.clock.ahead_s, 0.0) + 7200.0
        for zombie in self.zombies:
            zombie.alive = False
            self._end(zombie)

    # ---------------------------------------------------------------- the network

    def healthy(self) -> bool:
        """Whether nothing is down now."""
        return not self.refusing and not self._busy and all(self.served.values())

    def way(self) -> float:
        """How long something travels."""
        return self.chance.random() * self.faults.delay_s

    def send(
        self, target: Process, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> asyncio.Future[Any]:
        """A call: to one process they start in the order in which one caller made them."""
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[Any] = loop.create_future()
        caller = PROCESS.get()
        if caller is not None and not caller.alive:
            return answer
        if method == "commit":
            args = pickle.loads(pickle.dumps(args))
        pair = (id(caller), id(target))
        at = max(loop.time() + self.way(), self._last.get(pair, 0.0) + 1e-6)
        self._last[pair] = at
        lost = ""
        if self.faults.lost and not self.healed and method in MAY_LOSE:
            client = caller is None
            # Between hosts only a death loses answers: who is asked in mid-turn and does
            # not answer fails the turn, which is the program's business.
            if (client or target.name == "journal") and self.chance.random() < self.faults.lost:
                lost = self.chance.choice(("before", "after"))
                if target.name == "journal" and self.chance.random() < 0.5:
                    loop.call_later(0.3, self._publish_soon)
        loop.call_at(at, self._arrive, target, method, args, kwargs, answer, caller, lost)
        return answer

    def _arrive(
        self,
        target: Process,
        method: str,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        answer: asyncio.Future[Any],
        caller: Process | None,
        lost: str,
    ) -> None:
        loop = asyncio.get_running_loop()
        if answer.done():
            return
        if not target.alive or target.cut or lost == "before":
            loop.call_later(self.way(), self._answer, answer, caller, method, RayActorError())
            return
        target.answers.add(answer)
        work = loop.create_task(
            getattr(target.server, method)(*args, **kwargs), context=target.context.copy()
        )

        def done(work: asyncio.Task[Any]) -> None:
            target.answers.discard(answer)
            if work.cancelled() or answer.done():
                if not work.cancelled():
                    work.exception()
                return
            result: Any = work.exception() or work.result()
            if lost:
                result = RayActorError()
            elif isinstance(result, LlmosError) or method in MAY_LOSE:
                result = pickle.loads(pickle.dumps(result))
            wait = self.way()
            if self.faults.late and not self.healed and self.chance.random() < self.faults.late:
                wait += self.chance.random() * self.faults.late_s
            target.answers.add(answer)
            loop.call_later(wait, self._answer, answer, caller, method, result, target)

        work.add_done_callback(done)

        def cancelled(answer: asyncio.Future[Any]) -> None:
            target.answers.discard(answer)
            if answer.cancelled() and not work.done() and (caller is None or caller.alive):
                work.cancel()  # As ray.cancel does.

        answer.add_done_callback(cancelled)

    def _answer(
        self,
        answer: asyncio.Future[Any],
        caller: Process | None,
        method: str,
        result: Any,
        target: Process | None = None,
    ) -> None:
        if method not in ("directory", "hint", "ready", "release"):
            self.boundary(f"answer {method} to", caller)
        if target is not None:
            target.answers.discard(answer)
        if answer.done() or (caller is not None and not caller.alive):
            return
        if isinstance(result, RayActorError) or (
            isinstance(result, BaseException) and not isinstance(result, LlmosError)
        ):
            answer.set_exception(result)
        else:
            answer.set_result(result)

    # ---------------------------------------------------------------- the kernel's part

    async def start(self) -> None:
        """Launch everything."""
        parts: list[Part] = []
        for agent, program in PROGRAMS.items():
            path = f"{program.__module__}:{program.__name__}"
            config = bytes(msgpack.packb({}))
            parts.append([PutLaunch(LaunchRow(agent, path, config, f"id of {agent}", 1.0))])
        assert not any(self.store.commit(parts))
        self._new_journal()
        await Handle(self.processes["journal"]).ready.remote()
        self.spawn(self._keep_journal())
        for name in HOSTS:
            await self._new_host(name)
            self.spawn(self._keep_host(name))
        await self.publish()
        self.started = True

    def _new_journal(self) -> None:
        process = self.processes["journal"] = Process(self, "journal")
        process.start(lambda: SimJournal(self, process))

    async def _keep_journal(self) -> None:
        while True:
            process = self.processes["journal"]
            await process.lost.wait()
            self._busy += 1
            await asyncio.sleep(self.chance.random() * 0.1)
            self._new_journal()
            with contextlib.suppress(RayActorError):  # Killed again: the next round sees it.
                await Handle(self.processes["journal"]).ready.remote()
            await self.publish()
            self._busy -= 1

    async def _new_host(self, name: str) -> None:
        """A host under a new epoch, and the store told so."""
        self.epoch += 1
        epoch = self.epoch
        process = self.processes[name] = Process(self, name, epoch)
        handle = Handle(self.kernel)
        server = process.start(
            lambda: HostServer(name, epoch, handle, self.system, "", "", self._clock_of(process))
        )
        for program in PROGRAMS.values():
            server._programs._loaded[f"{program.__module__}:{program.__name__}"] = program
        for tool in ("sure", "query", "blind"):
            server._services._tools[tool] = OutsideTool(self, tool)
        try:
            await Handle(process).ready.remote()
        except RayActorError:
            return
        async with self._control:
            mine = tuple(n for n, owner in enumerate(self.shards) if owner == name)
            await self._take(mine, epoch)
            self.served[name] = self.processes[name] is process

    def _clock_of(self, process: Process) -> VirtualClock:
        return _HostClock(self, process)

    async def _take(self, shards: tuple[int, ...], epoch: int) -> None:
        while True:
            journal = Handle(self.processes["journal"])
            try:
                found = await call(journal.commit.remote([[TakeShards(shards, epoch)]]), "journal")
            except LlmosError:
                await asyncio.sleep(0.05)
                continue
            if found == [None]:
                return
            await asyncio.sleep(0.05)

    async def _keep_host(self, name: str) -> None:
        while True:
            process = self.processes[name]
            await process.lost.wait()
            self._busy += 1
            self.served[name] = False
            await asyncio.sleep(self.chance.random() * 0.1)
            if self.chance.random() < 0.5:
                await self.publish()
            await self._new_host(name)
            await self.publish()
            self._busy -= 1

    async def _move(self, pair: str) -> None:
        """Let one host release half of its shards to the other."""
        source, _, to = pair.partition(">")
        self._busy += 1
        async with self._control:
            agents = [a for a in PROGRAMS if self.shards[shard_of(a)] == source]
            shards = tuple({shard_of(a) for a in agents[: max(1, len(agents) // 2)]})
            if shards and self.served[source] and self.served[to]:
                handle = Handle(self.processes[source])
                # It may be lost or hang; the shards go anyway.
                with contextlib.suppress(LlmosError):
                    await call(handle.release.remote(shards, 0.2), source, 6.0)
                for shard in shards:
                    self.shards[shard] = to
                # Nobody serves them until the store holds the epoch of their new host.
                self.moving.update(shards)
                if self.served[to]:
                    await self._take(shards, self.processes[to].epoch)
                self.moving.clear()
        await self.publish()
        self._busy -= 1

    def _publish_soon(self) -> None:
        self.spawn(self.publish())

    async def publish(self) -> None:
        """Tell every host who serves what."""
        self.version += 1
        up = {n: p for n in HOSTS if self.served[n] and not (p := self.processes[n]).lost.is_set()}
        journal = self.processes["journal"]
        directory = Directory(
            self.version,
            journal=Handle(journal) if journal.alive else None,
            hosts={name: Handle(process) for name, process in up.items()},
            shards=tuple(
                (name, up[name].epoch) if name in up and shard not in self.moving else ("", 0)
                for shard, name in enumerate(self.shards)
            ),
        )
        for name in HOSTS:
            process = self.processes[name]
            if not process.lost.is_set():
                Handle(process).directory.remote(directory).add_done_callback(_seen)

    async def locate(
        self, agent: str, not_at: tuple[str, int] | None, timeout_s: float
    ) -> Location:
        """Where an agent is served."""
        loop = asyncio.get_running_loop()
        until = loop.time() + timeout_s
        while loop.time() < until:
            name = self.shards[shard_of(agent)]
            process = self.processes[name]
            route = (name, process.epoch)
            served = self.served[name] and shard_of(agent) not in self.moving
            if served and not process.lost.is_set() and route != not_at:
                return Location(name, process.epoch, Handle(process))
            await asyncio.sleep(0.01)
        raise DeadlineExceeded(f"finding a host for {agent}", timeout_s)

    def forget(self, agent: str) -> None:
        """Nothing: it is always asked anew."""

    async def ended(self, agent: str, reason: str, story: str) -> None:
        """An agent was quarantined."""

    def spawn(self, work: Any) -> None:
        """Do something beside."""
        # Not the work of whichever process has set it off, which may be dead the next moment.
        task = asyncio.get_running_loop().create_task(work, context=self._context.copy())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def quiet(self, timeout_s: float) -> bool:
        """Wait until no mail is left but that of held agents, and nothing happens for a while."""
        loop = asyncio.get_running_loop()
        until = loop.time() + timeout_s
        calm = 0
        while loop.time() < until:
            await asyncio.sleep(0.5)
            held = {row.agent for row in self.store.agents(held=True)}
            left = [m for m in self.store.mail() if m.receiver not in held]
            timers = self.store.timers(before=self.clock.time())
            calm = 0 if left or timers or self._busy else calm + 1
            if calm >= 7:
                return True
        return False


class _HostClock(VirtualClock):
    """A host's clock: the machine's, until the host is dead."""

    def __init__(self, world: World, process: Process) -> None:
        self._world, self._process = world, process

    @property
    def ahead_s(self) -> float:  # type: ignore[override]
        """The machine's."""
        return self._world.clock.ahead_s

    async def sleep(self, seconds: float) -> None:
        """Wait; a dead process waits for ever."""
        await asyncio.sleep(seconds)
        if not self._process.alive:
            await forever()

    def random(self) -> float:
        """By the seed."""
        return self._world.chance.random()


def _seen(done: asyncio.Future[Any]) -> None:
    if not done.cancelled():
        done.exception()


@contextmanager
def quietly(chance: random.Random) -> Iterator[None]:
    """No log files, no logs, and turn ids by the seed."""
    logger = logging.getLogger("llmos")
    before = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    fake = SimpleNamespace(urandom=chance.randbytes)
    idle = SimpleNamespace(collect=int, freeze=int, set_threshold=lambda *_: None)
    try:
        with (
            mock.patch.object(logs, "configure", return_value=None),
            mock.patch.object(inbox, "os", fake),
            # It would freeze what earlier runs have left.
            mock.patch.object(host, "gc", idle),
        ):
            yield
    finally:
        logger.setLevel(before)
