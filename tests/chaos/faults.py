"""What is done to the system: a seeded sequence of faults, and how each is carried out."""

from __future__ import annotations

import asyncio
import contextlib
import random
import signal
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import psutil

TITLES = {
    "host": "ray::HostServer",
    "stop": "ray::HostServer",
    "device": "ray::DeviceServer",
    "journal": "ray::JournalServer",
    "knowledge": "ray::KnowledgeServer",
    "kernel": "ray::KernelServer",
}
"""What the victims call themselves."""

_DECK = ("host",) * 9 + ("journal",) * 4 + ("stop",) * 2 + ("device",) * 2 + ("knowledge",)
"""The share of each kind."""


def sequence(chance: random.Random, kills: int, *, kernel: bool, nodes: bool) -> list[str]:
    """Kinds of faults in a random order, each with its share in every twenty."""
    cards = [*_DECK, *(("kernel",) if kernel else ()), *(("node",) * 3 if nodes else ())]
    found: list[str] = []
    while len(found) < kills:
        chance.shuffle(cards)
        found += cards
    return found[:kills]


@dataclass(slots=True)
class Fault:
    """One fault, and what came of it."""

    number: int
    kind: str
    at: float = 0.0
    """Seconds since 1970; 0: there was no victim."""
    pid: int = 0
    note: str = ""
    recovered_s: float | None = None
    """Until every agent answered again."""
    clean: bool = True
    """Whether no other fault came before that."""


def victims(title: str) -> list[psutil.Process]:
    """Processes of our Ray by what they call themselves."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            # One that is stopped is not there for other faults.
            gone = process.status() in (psutil.STATUS_ZOMBIE, psutil.STATUS_STOPPED)
            if not gone and title in " ".join(process.cmdline()):
                found.append(process)
    return sorted(found, key=lambda p: p.pid)


@dataclass
class Killer:
    """Carries out faults."""

    chance: random.Random
    hang_timeout_s: float
    probe: Callable[[], Awaitable[float]]
    """Ask every agent; returns the seconds until the last has answered."""
    nodes: Any = None
    """A ``ray.cluster_utils.Cluster``."""
    patience: float = 0.7
    """Share of the faults that are recovered from before the next one comes."""
    done: list[Fault] = field(default_factory=list)
    say: Callable[[str], None] = print
    _later: set[asyncio.Task[None]] = field(default_factory=set)
    _open: set[int] = field(default_factory=set)

    async def run(self, kinds: list[str]) -> None:
        """One fault after the other; some come before the last one is recovered from."""
        for number, kind in enumerate(kinds, 1):
            fault = Fault(number, kind)
            self.done.append(fault)
            for other in self._open:
                self.done[other - 1].clean = False
            fault.clean = not self._open
            await self._inflict(fault)
            watching = self._spawn(self._watch(fault))
            if self.chance.random() < self.patience:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(60.0):
                        await asyncio.shield(watching)
            await asyncio.sleep(self.chance.uniform(0.1, 1.5))
        if self._later:
            await asyncio.wait(self._later, timeout=120.0)

    async def _inflict(self, fault: Fault) -> None:
        if fault.kind == "node":
            await self._remove_node(fault)
            return
        until = time.monotonic() + 30.0
        while not (found := victims(TITLES[fault.kind])):
            if time.monotonic() > until:
                fault.note = "no such process"
                return
            await asyncio.sleep(0.1)
        victim = self.chance.choice(found)
        fault.pid, fault.at = victim.pid, time.time()
        try:
            if fault.kind == "stop":
                victim.send_signal(signal.SIGSTOP)
                self._spawn(self._go_on(fault, victim))
            else:
                victim.kill()
        except psutil.NoSuchProcess:
            fault.note = "it had just died"

    async def _go_on(self, fault: Fault, victim: psutil.Process) -> None:
        """Longer than the kernel's patience: its successor is at work when it wakes up."""
        await asyncio.sleep(self.hang_timeout_s * self.chance.uniform(1.2, 2.5))
        try:
            victim.send_signal(signal.SIGCONT)
            fault.note = "it woke up"
        except psutil.NoSuchProcess:
            fault.note = "killed while it was stopped"

    async def _remove_node(self, fault: Fault) -> None:
        node = max(self.nodes.worker_nodes, key=_actors, default=None)
        if node is None:
            fault.note = "no node"
            return
        fault.note, fault.at = f"with {_actors(node)} actors", time.time()
        await asyncio.to_thread(self.nodes.remove_node, node, False)

        async def add() -> None:
            await asyncio.sleep(self.chance.uniform(0.5, 3.0))
            await asyncio.to_thread(self.nodes.add_node, num_cpus=2)

        self._spawn(add())

    async def _watch(self, fault: Fault) -> None:
        self._open.add(fault.number)
        try:
            await self.probe()
            fault.recovered_s = time.time() - fault.at if fault.at else None
        except TimeoutError:
            fault.note += " not all agents answered"
        finally:
            self._open.discard(fault.number)
        at = f"{fault.recovered_s:.1f} s" if fault.recovered_s is not None else "?"
        self.say(
            f"{fault.number:4} {fault.kind:9} pid {fault.pid:<7} recovered in {at} {fault.note}"
        )

    def _spawn(self, work: Any) -> asyncio.Task[None]:
        task: asyncio.Task[None] = asyncio.create_task(work)
        self._later.add(task)
        task.add_done_callback(self._later.discard)
        return task


def _actors(node: Any) -> int:
    """Our actors below a node's raylet."""
    raylets = node.all_processes.get("raylet", [])
    count = 0
    for one in raylets:
        with contextlib.suppress(psutil.NoSuchProcess):
            for child in psutil.Process(one.process.pid).children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess):
                    count += any(t in " ".join(child.cmdline()) for t in set(TITLES.values()))
    return count
