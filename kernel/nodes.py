"""The nodes of the cluster: which there are, what of ours is on which, draining one."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from typing import Any, cast

import ray
from ray.exceptions import RayError

from llmos.kernel.core import events as ev
from llmos.kernel.core.errors import HostUnavailable, NodeNeeded, UnknownNode
from llmos.kernel.core.placement import Node, Place, place, same_machine
from llmos.kernel.core.types import ProcessKind, ProcessState
from llmos.kernel.operations import Operations
from llmos.syscalls.errors import DeadlineExceeded

log = logging.getLogger("llmos.nodes")

LOOK_S = 1.0
"""Pause before nodes are looked for again."""
LIST_S = 5.0
"""What Ray's control store gets to say which nodes there are."""
REACH_S = 1.0
"""What a node gets to take a connection: the control store notices a lost one seconds later."""


def here() -> Node:
    """The node that this process is on."""
    id = str(ray.get_runtime_context().get_node_id())
    return next((node for node in _listed() if node.id == id), Node(id, ""))


def _listed() -> list[Node]:
    """The nodes that Ray takes for alive."""
    return [
        Node(str(n["NodeID"]), str(n["NodeManagerAddress"]), int(n["NodeManagerPort"]))
        for n in cast("list[dict[str, Any]]", ray.nodes())  # type: ignore[no-untyped-call]
        if n["Alive"]
    ]


async def _reached(node: Node) -> bool:
    """Whether something listens on a node's port."""
    try:
        async with asyncio.timeout(REACH_S):
            _, writer = await asyncio.open_connection(node.address, node.port)
    except (OSError, TimeoutError):
        return False
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()
    return True


class Nodes:
    """What the kernel knows of its cluster's nodes.

    Args:
        home: the node of whoever booted the system: its folders are there.
        file: whether the store is a file in these folders.
    """

    def __init__(self, home: Node | None, *, file: bool) -> None:
        self._home = home
        self._file = file
        self._known: list[Node] = []
        self._at: dict[str, str] = {}
        """Node of each process that runs or is being started."""
        self._kinds: dict[str, ProcessKind] = {}
        self.kernel = ""
        """Id of the kernel's own node."""
        self.closed: set[str] = set()
        """Ids of drained nodes: they get nothing new for as long as this kernel runs."""

    @property
    def file_on(self) -> Node | None:
        """The node with the store's file."""
        return self._home if self._file else None

    async def start(self) -> None:
        """Look where the kernel is; wait for the machine of the store, if it is a file."""
        self.kernel = str(ray.get_runtime_context().get_node_id())
        if self._home is None:
            self._home = await asyncio.to_thread(here)
        home, told = self.file_on, False
        while home is not None and same_machine(await self.reachable(), home) is None:
            if not told:
                log.error("waiting for node %s (%s): the store is there", home.id, home.address)
                told = True
            await asyncio.sleep(LOOK_S)

    async def look(self) -> list[Node]:
        """The nodes that Ray takes for alive; the last known if it cannot be asked."""
        try:
            async with asyncio.timeout(LIST_S):
                self._known = await asyncio.to_thread(_listed)
        except (TimeoutError, RayError, RuntimeError) as error:
            log.warning("which nodes there are cannot be found out: %r", error)
        return self._known

    async def reachable(self) -> list[Node]:
        """The nodes that answer, at once: Ray's list still has a lost one for some seconds."""
        nodes = await self.look()
        if len(nodes) < 2:
            return nodes
        answers = await asyncio.gather(
            *(_reached(node) if node.id != self.kernel else _yes() for node in nodes)
        )
        for node, answer in zip(nodes, answers, strict=True):
            if not answer:
                log.warning("node %s (%s) does not answer", node.id, node.address)
        return [node for node, answer in zip(nodes, answers, strict=True) if answer]

    async def choose(self, process: str, kind: ProcessKind) -> Place:
        """Where to start a process; waits until there is a node for it."""
        told = False
        while True:
            nodes = await self.reachable()
            found = place(
                kind,
                nodes,
                kernel=self.kernel,
                hosts=self._hosts(but=process),
                closed=self.closed,
                file_on=self.file_on,
            )
            if found is not None:
                # At once, so that others that are just being placed count it.
                self.put(process, kind, found.node)
                log.info("%s goes to node %s, one of %d", process, found.node, len(nodes))
                return found
            if not told:
                log.error("%s waits for a node that can take it", process)
                told = True
            await asyncio.sleep(LOOK_S)

    def put(self, process: str, kind: ProcessKind, node: str) -> None:
        """A process is on a node."""
        self._at[process], self._kinds[process] = node, kind

    def gone(self, process: str) -> None:
        """A process has ended."""
        self._at.pop(process, None)

    def of(self, process: str) -> str:
        """Id of a process's node; empty while it runs nowhere."""
        return self._at.get(process, "")

    def on(self, node: str) -> list[str]:
        """Processes on a node."""
        return sorted(name for name, at in self._at.items() if at == node)

    def address(self, node: str) -> str:
        """Address of a node; empty if it is not known any more."""
        return next((n.address for n in self._known if n.id == node), "")

    def _hosts(self, but: str = "") -> dict[str, int]:
        found: dict[str, int] = {}
        for name, node in self._at.items():
            if self._kinds[name] is ProcessKind.HOST and name != but:
                found[node] = found.get(node, 0) + 1
        return found

    async def find(self, name: str) -> Node:
        """The node of an address, or of an id or the beginning of one.

        Raises:
            UnknownNode: there is none, or several are meant.
        """
        nodes = await self.look()
        found = [n for n in nodes if n.address == name]
        if name and not found:
            found = [n for n in nodes if n.id.startswith(name)]
        if len(found) != 1:
            raise UnknownNode(name, [n.id for n in found], [f"{n.id} ({n.address})" for n in nodes])
        return found[0]

    async def table(self) -> list[dict[str, Any]]:
        """For ``llmos status``."""
        return [
            {
                "id": node.id,
                "address": node.address,
                "kernel": node.id == self.kernel,
                "drained": node.id in self.closed,
                "processes": self.on(node.id),
            }
            for node in await self.look()
        ]

    async def keeping(self, node: Node) -> dict[str, str]:
        """What of a node's processes cannot be moved, and why."""
        found: dict[str, str] = {}
        others = [n for n in await self.reachable() if n.id != node.id]
        if node.id == self.kernel:
            found["kernel"] = "the kernel itself is there"
        for name in self.on(node.id):
            kind = self._kinds[name]
            if kind is ProcessKind.DEVICE:
                found[name] = "devices are those of the kernel's node"
            elif kind is ProcessKind.JOURNAL and self.file_on is not None:
                there = same_machine(others, self.file_on)
                if there is None or there.id in self.closed:
                    found[name] = "the store is a file on this node"
            elif all(n.id in self.closed for n in others):
                found[name] = "there is no other node"
        return found


async def _yes() -> bool:
    return True


class NodeDrain(Operations):
    """Mixed into the kernel actor: operations on records and hosts, and on whole nodes."""

    _nodes: Nodes
    _routes_changed: asyncio.Condition

    async def _drain_node(self, name: str, timeout_s: float) -> None:
        """Leave nothing of ours on a node, and start nothing there any more.

        For each of its hosts one is started elsewhere first, which then takes its agents:
        turns end where they run, and there are as many hosts afterwards as before.

        Raises:
            UnknownNode
            NodeNeeded: something there cannot be moved; nothing was changed.
            DeadlineExceeded: not within ``timeout_s``; what was moved stays so.
            HostUnavailable: no host starts elsewhere.
        """
        nodes = self._nodes
        node = await nodes.find(name)
        needed = await nodes.keeping(node)
        if needed:
            raise NodeNeeded(node.id, node.address, needed)
        already = node.id in nodes.closed
        nodes.closed.add(node.id)
        until = self._clock.monotonic() + timeout_s
        try:
            while on_it := nodes.on(node.id):
                left = until - self._clock.monotonic()
                if left <= 0:
                    raise DeadlineExceeded(f"draining node {node.id}", timeout_s)
                first = min(on_it, key=lambda n: self._kinds[n] is not ProcessKind.HOST)
                if self._kinds[first] is ProcessKind.HOST:
                    await self._spare_host(left)
                    left = max(until - self._clock.monotonic(), 0.001)
                    await self._drain(first, left)
                    # What the core has said is stopped ends within some seconds.
                    await self._away(first, node.id, left)
                else:
                    await self._move(first, node.id, left)
        except BaseException:
            if not already:
                nodes.closed.discard(node.id)
            raise
        log.info("node %s (%s) is drained", node.id, node.address)

    async def _spare_host(self, timeout_s: float) -> str:
        """Start one host more; returns its name when it is up."""
        host = self._core.spare_host()
        now = self._clock.monotonic()
        self._apply(ev.HostAsked(now=now, cause=f"spare:{host}", process=host))

        def settled() -> bool:
            process = self._core.processes.get(host)
            return process is None or process.state is ProcessState.UP or not process.live

        await self._until(settled, f"starting {host}", timeout_s)
        process = self._core.processes.get(host)
        if process is None or process.state is not ProcessState.UP:
            raise HostUnavailable(host, process.reason if process else "hosts cannot work now")
        return host

    async def _move(self, name: str, node: str, timeout_s: float) -> None:
        """End a process; the kernel starts it again, elsewhere."""
        handle = self._handles.get(name)
        if handle is not None:
            # Not closed: who asks it while it is closing would be refused, where a call to a
            # process that is gone is made again. What it has acknowledged is durable.
            ray.kill(handle, no_restart=True)
        await self._away(name, node, timeout_s)

        def back() -> bool:
            process = self._core.processes[name]
            return process.state is ProcessState.UP or not process.live

        await self._until(back, f"moving {name}", timeout_s)
        if self._nodes.of(name) == node:
            # The others went away meanwhile. To try again would only end it again.
            raise NodeNeeded(node, self._nodes.address(node), {name: "it came back there"})

    async def _away(self, name: str, node: str, timeout_s: float) -> None:
        await self._until(lambda: self._nodes.of(name) != node, f"ending {name}", timeout_s)

    async def _until(self, so: Callable[[], bool], what: str, timeout_s: float) -> None:
        try:
            async with asyncio.timeout(timeout_s), self._routes_changed:
                await self._routes_changed.wait_for(so)
        except TimeoutError:
            raise DeadlineExceeded(what, timeout_s) from None
