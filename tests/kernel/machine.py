"""A whole little kernel in one event loop: hosts, journal, device and knowledge, no Ray."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgpack

from llmos.drivers.errors import StaleEpoch
from llmos.drivers.protocols import EngineOptions, Tool
from llmos.drivers.stores import wire
from llmos.drivers.stores.rows import (
    SHARDS,
    AgentRow,
    JournalRow,
    LaunchRow,
    Part,
    PutLaunch,
    TakeShards,
)
from llmos.kernel.clock import SystemClock
from llmos.kernel.core.types import ProcessKind
from llmos.kernel.device import DeviceServer
from llmos.kernel.directory import Directory, SlotRoute
from llmos.kernel.host import HostServer
from llmos.kernel.journal import JournalServer
from llmos.kernel.knowledge import KnowledgeServer
from llmos.kernel.operating import Operator
from llmos.kernel.remote import answers
from llmos.kernel.router import Location
from llmos.kernel.server import KernelServer
from llmos.kernel.system import SystemConfig
from llmos.syscalls.messages import Envelope, Message, Reply, Wire
from tests.kernel.local import LocalHandle

DESK, PEER, LIAR, BORN = "acme/desk/main", "acme/desk/peer", "acme/liar/main", "acme/born/main"
RULES = {
    "templates": {"ask": {"amount": "integer"}, "yes": {"amount": "integer"}},
    "rules": [
        {"name": "agree", "when": {"ask": {"amount": "?a"}}, "then": {"yes": {"amount": "?a"}}}
    ],
}
SYSTEM = '[rules.desk]\npath = "desk.json"\ndriver = "memory"\n'
SYSTEM += '[rules.theirs]\npath = "desk.json"\ndriver = "memory"\ntenant = "globex"\n'


class GuardedJournal(JournalServer):
    """The journal, with a gate before commits and an error to answer one with."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.gate = asyncio.Event()
        self.gate.set()
        self.refuse: Exception | None = None
        self.refuse_all: Exception | None = None
        self.commits = 0
        self.parts: list[Part] = []

    async def commit(self, parts: Any, *sender: Any) -> Any:
        if isinstance(parts, bytes):
            parts = wire.unpack(parts)
        self.commits += 1
        await self.gate.wait()
        if self.refuse_all is not None:
            return self.refuse_all
        if self.refuse is not None:
            error, self.refuse = self.refuse, None
            return error
        self.parts += parts
        return await super().commit(parts, *sender)


class Line:
    """The way of one host to the journal; nothing that is sent after a cut arrives."""

    def __init__(self, journal: GuardedJournal) -> None:
        self.journal = journal
        self.cut = False

    async def commit(self, parts: Any, *sender: Any) -> Any:
        if isinstance(parts, bytes):
            parts = wire.unpack(parts)
        if self.cut:
            return [StaleEpoch("?", 0, 1)] * len(parts)
        return await self.journal.commit(parts, *sender)

    async def read(self, *args: Any, **options: Any) -> Any:
        if self.cut:
            return StaleEpoch("?", 0, 1)
        return await self.journal.read(*args, **options)

    async def activate(self, agents: Sequence[str]) -> Any:
        return await self.journal.activate(agents)


class MovedClock(SystemClock):
    """The real one, but for a wall clock that somebody sets."""

    ahead_s = 0.0

    def time(self) -> float:
        return super().time() + self.ahead_s


class OneHost:
    """The kernel's part: everybody is on the one host."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self.ended_agents: list[tuple[str, str]] = []

    @answers
    async def locate(
        self, agent: str, not_at: tuple[str, int] | None, timeout_s: float
    ) -> Location:
        return Location("host:0", self._machine.epoch, self._machine.host_handle)

    @answers
    async def ended(self, agent: str, reason: str, story: str) -> None:
        self.ended_agents.append((agent, reason))
        machine = self._machine
        kernel: Any = SimpleNamespace(
            _read=machine.read,
            _clock=machine.clock,
            _handles={"host:0": machine.host_handle},
            _kinds={"host:0": ProcessKind.HOST},
        )
        told = await KernelServer._exit_notices(kernel, agent, reason, story)
        if told:
            assert await machine.journal.commit([told]) == [None]
            await machine.host.hint()


class Records:
    """The store and the host, for a person's operations. See ``llmos.kernel.operating``."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine

    async def read(self, method: str, *args: Any, **options: Any) -> Any:
        return await self._machine.read(method, *args, **options)

    async def commit(self, parts: Sequence[Part]) -> None:
        for refused in await self._machine.journal.commit(parts):
            if refused is not None:
                raise refused

    async def launch_of(self, agent: str) -> LaunchRow | None:
        found: list[tuple[LaunchRow | None, AgentRow | None]]
        found = await self._machine.journal.activate([agent])  # type: ignore[assignment]
        return found[0][0]

    async def resolve(self, agent: str) -> str:
        return agent

    async def go_on(self, agent: str) -> None:
        await self._machine.host.go_on(agent)

    async def mail_came(self) -> None:
        await self._machine.host.hint()

    async def backup(self, target: str) -> int:
        raise NotImplementedError

    async def drain(self, host: str, timeout_s: float) -> None:
        raise NotImplementedError

    async def rebalance(self) -> int:
        raise NotImplementedError


class Machine:
    """All servers, and the newest directory in each."""

    def __init__(self, folder: Path, system: str = SYSTEM) -> None:
        self.folder = folder
        (folder / "desk.json").write_text(json.dumps(RULES))
        self.logs = (str(folder / "logs"), "INFO")
        self.epoch = 1
        self.version = 0
        self.numbers = itertools.count(1)
        self.system = SystemConfig.parse(system, "system.toml", folder)
        self.journal = GuardedJournal("journal", "sqlite", str(folder / "store.db"), *self.logs)
        self.device = DeviceServer("device:cpu:0", "memory", 0, 1 << 30, 1, *self.logs)
        self.knowledge = KnowledgeServer(
            "knowledge", self.system, str(folder / "cache"), *self.logs
        )
        self.clock = MovedClock()
        self.tools: dict[str, Tool] = {}
        """By name: what is outside, and outlives hosts."""
        self.operator = Operator(Records(self), self.clock.time)
        self.kernel = OneHost(self)
        self.kernel_handle = LocalHandle(self.kernel)
        self.journal_handle = LocalHandle(Line(self.journal))
        self.device_handle = LocalHandle(self.device)
        self.knowledge_handle = LocalHandle(self.knowledge)
        self.hosts: list[HostServer] = []

    async def start(self) -> None:
        await self.journal.ready()
        await self.knowledge.ready()
        await self.device.load("echo", "causal", EngineOptions("chat", Path()))
        await self.device.load("hash", "encoder", EngineOptions("embed", Path()))
        for agent, program in ((DESK, "Desk"), (PEER, "Desk"), (LIAR, "Liar"), (BORN, "Stillborn")):
            await self.register(agent, f"tests.kernel.programs:{program}")
        await self.new_host()

    async def new_host(self, *, dead: bool = False) -> None:
        """Another host takes over; with ``dead`` the one before is cut off at once."""
        if self.hosts:
            self.epoch += 1
            if dead:
                await self.kill()
        self.host = HostServer(
            *("host:0", self.epoch, self.kernel_handle, self.system, *self.logs), self.clock
        )
        self.host._services._tools.update(self.tools)
        self.hosts.append(self.host)
        self.host_handle = LocalHandle(self.host)
        await self.host.ready()
        assert await self.journal.commit([[TakeShards(tuple(range(SHARDS)), self.epoch)]]) == [None]
        await self.publish()

    async def kill(self) -> None:
        """The host is lost: what it has not sent never arrives, and nobody hears of it again."""
        self.journal_handle._server.cut = True
        self.journal_handle = LocalHandle(Line(self.journal))
        self.host_handle.kill()
        await abandon(self.host)

    async def publish(self, **without: None) -> None:
        self.version += 1
        services: dict[str, Any] = {
            "journal": self.journal_handle,
            "knowledge": self.knowledge_handle,
            "devices": {"device:cpu:0": self.device_handle},
        }
        slots = {
            "chat": SlotRoute("causal", "cpu:0", "d-chat", incarnation=1),
            "embed": SlotRoute("encoder", "cpu:0", "d-embed", incarnation=1),
        }
        await self.host_handle.directory.remote(
            Directory(
                self.version,
                slots=slots,
                hosts={"host:0": self.host_handle},
                shards=tuple(("host:0", self.epoch) for _ in range(SHARDS)),
                **{**services, **without},
            )
        )

    async def register(self, agent: str, program: str, **config: Any) -> None:
        if agent == DESK and not config:
            config = {"peer": PEER}
        row = LaunchRow(agent, program, bytes(msgpack.packb(config)), f"id of {agent}", 1.0)
        assert await self.journal.commit([[PutLaunch(row)]]) == [None]

    async def stop(self) -> None:
        self.journal.gate.set()
        self.journal.refuse_all = None
        await self.host.close(0.1)
        for host in self.hosts:
            await abandon(host)
        if self.journal._writer is not None:
            self.journal._writer.cancel()
        await self.knowledge.close()
        await self.device.close()
        await self.journal.close()
        self.journal._writing.shutdown()
        self.journal._reading.shutdown()

    # -- what tests do

    def envelope(self, agent: str, message: Message, **more: Any) -> Envelope:
        more = {"asked": True, "stream": "client:1", "seq": next(self.numbers), **more}
        return Envelope(agent, "client:1", Wire.of(message), **more)

    async def deliver(self, agent: str, message: Message, **more: Any) -> Reply:
        reply = await self.host_handle.deliver.remote(self.envelope(agent, message, **more))
        assert isinstance(reply, Reply)
        return reply

    async def ask(self, agent: str, message: Message, **more: Any) -> Any:
        return (await self.deliver(agent, message, **more)).message()

    def asking(self, agent: str, message: Message, **more: Any) -> asyncio.Task[Any]:
        return asyncio.create_task(self.ask(agent, message, **more))

    async def post(self, *envelopes: Envelope) -> list[Any]:
        results: list[Any] = await self.host_handle.post.remote(
            [e._replace(asked=False) for e in envelopes]
        )
        return results

    async def tell(self, agent: str, message: Message, **more: Any) -> Any:
        return (await self.post(self.envelope(agent, message, **more)))[0]

    async def read(self, method: str, *args: Any, **options: Any) -> Any:
        found = await self.journal.read(method, *args, **options)
        assert not isinstance(found, Exception), found
        return found

    async def turns(self, agent: str) -> list[JournalRow]:
        rows: list[JournalRow] = await self.read("turns", agent=agent, limit=100)
        return rows

    async def stored(self, agent: str) -> Any:
        row = await self.read("agent", agent)
        return json.loads(row.state) if row is not None and row.state else None


async def abandon(host: HostServer) -> None:
    """What is left of a host that was killed: nothing of it goes on."""
    host._inbox.closing = True
    while tasks := [*host._tasks, *host._inbox._tasks]:
        for task in tasks:
            task.cancel("killed")
        _, late = await asyncio.wait(tasks, timeout=1.0)
        if late:
            break
    if host._inbox._timer is not None:
        host._inbox._timer.cancel()
    for _, link in host._services._links.values():
        for work in (link._flushing, link._polling):
            if work is not None:
                work.cancel()
