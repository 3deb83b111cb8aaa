"""The kernel's state machine: :meth:`KernelCore.handle` takes an event, returns actions.

It decides which processes run, what stays in memory, which agent is where, what waits
and what restarts. It does nothing itself; the shell (:mod:`llmos.kernel.server`)
carries the actions out and answers with events.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import singledispatchmethod

from llmos.drivers.errors import LlmosError, UnknownModel
from llmos.drivers.stores.rows import SHARDS, pattern_of, shard_of
from llmos.kernel.core import actions as act
from llmos.kernel.core import events as ev
from llmos.kernel.core.errors import (
    AlreadyLaunched,
    DoesNotFit,
    HostUnavailable,
    NoDevice,
    NoOtherHost,
    SlotUnavailable,
    UnknownProcess,
)
from llmos.kernel.core.ledger import Ledger, OverCapacity
from llmos.kernel.core.restarts import RestartPolicy, Restarts
from llmos.kernel.core.shards import Shard, balance, fewest, grouped
from llmos.kernel.core.slots import NOTED_ERROR, Slot, SlotState
from llmos.kernel.core.supervision import NEEDS, falls_with
from llmos.kernel.core.types import (
    AgentState,
    DeviceSpec,
    ModelSpec,
    ProcessKind,
    ProcessState,
    ShardState,
)
from llmos.syscalls.errors import UnknownAgent

Actions = list[act.AnyAction]


@dataclass(slots=True)
class Process:
    """A process that the kernel watches."""

    name: str
    kind: ProcessKind
    state: ProcessState
    incarnation: int
    epoch: int
    restarts: Restarts
    restart_at: float | None = None
    reason: str = ""
    """Why it was lost last."""
    drains: tuple[str, ...] = ()
    """Requests that want this host empty and stopped; there are none once they are answered."""

    @property
    def live(self) -> bool:
        """Runs, or will run again."""
        return self.state not in (ProcessState.GIVEN_UP, ProcessState.STOPPED)

    @property
    def started(self) -> bool:
        """Runs, or is on its way up."""
        return self.state in (ProcessState.STARTING, ProcessState.UP)


@dataclass(slots=True)
class AgentEntry:
    """An agent that has been launched or waits for it."""

    agent: str
    """``tenant/program/key``, or ``tenant/program/*`` for any key."""
    models: tuple[str, ...]
    state: AgentState = AgentState.PENDING


@dataclass(slots=True)
class Launch:
    """A launch that waits for models."""

    request: str
    agent: str
    models: tuple[str, ...]


@dataclass(slots=True)
class KernelCore:
    """All that the kernel knows, and what it decides from it."""

    policy: RestartPolicy = field(default_factory=RestartPolicy)
    ledger: Ledger = field(default_factory=Ledger)
    processes: dict[str, Process] = field(default_factory=dict)
    devices: dict[str, DeviceSpec] = field(default_factory=dict)
    models: dict[str, ModelSpec] = field(default_factory=dict)
    slots: dict[str, Slot] = field(default_factory=dict)
    shards: list[Shard] = field(default_factory=lambda: [Shard() for _ in range(SHARDS)])
    agents: dict[str, AgentEntry] = field(default_factory=dict)
    launches: OrderedDict[str, Launch] = field(default_factory=OrderedDict)
    """Launches that wait, by request, in the order they came."""
    next_epoch: int = 1

    def handle(self, event: ev.AnyEvent) -> Actions:
        """Take an event, change the state, say what to do about it."""
        return self._handle(event)

    @singledispatchmethod
    def _handle(self, event: ev.AnyEvent) -> Actions:
        raise TypeError(f"The core takes no {type(event).__name__}")

    # ------------------------------------------------------------ processes

    @_handle.register
    def _booted(self, event: ev.Booted) -> Actions:
        out: Actions = []
        self.next_epoch = max(self.next_epoch, event.first_epoch)
        for device in event.devices:
            self.devices[device.name] = device
            self.ledger.open(device.name, device.capacity_bytes)
        for model in event.models:
            self.models[model.name] = model
            self.slots[model.name] = Slot(
                model.name, model.size_bytes, model.predicted, pinned=model.pinned
            )
        for kind in event.services:
            out += self._start(kind.value, kind, event)
        for name in self.devices:
            out += self._start(f"device:{name}", ProcessKind.DEVICE, event)
        for number, shard in enumerate(self.shards):
            shard.host, shard.state = f"host:{number % event.hosts}", ShardState.MOVING
        for number in range(event.hosts):
            out += self._start(f"host:{number}", ProcessKind.HOST, event)
        for slot in self.slots.values():
            if slot.pinned:
                out += self._make_resident(slot, event)
        return out

    def _start(self, name: str, kind: ProcessKind, event: ev.Event) -> Actions:
        process = self.processes.get(name)
        if process is None:
            process = Process(name, kind, ProcessState.STARTING, 0, 0, Restarts(self.policy))
            self.processes[name] = process
        process.state = ProcessState.STARTING
        process.restart_at = None
        process.incarnation += 1
        process.epoch = self.next_epoch
        self.next_epoch += 1
        start = act.StartProcess(
            process=name,
            kind=kind,
            incarnation=process.incarnation,
            epoch=process.epoch,
            cause=event.cause,
        )
        if kind is not ProcessKind.HOST:
            return [start]
        # The fence comes first: once it is durable, whatever the old process still does
        # under its old epoch is refused by the store.
        return [*self._fence(self._shards_of(name), event), start]

    @_handle.register
    def _process_up(self, event: ev.ProcessUp) -> Actions:
        process = self._current(event.process, event.incarnation)
        if process is None or process.state is not ProcessState.STARTING:
            return []
        process.state = ProcessState.UP
        out: Actions = []
        if process.kind is ProcessKind.HOST:
            # What others serve stays with them, even where this host now has less than its
            # share: each move cuts turns off or holds them up. RebalanceAsked does it.
            orphans = [
                number
                for number, shard in enumerate(self.shards)
                if shard.state is ShardState.UNREACHABLE
            ]
            out += self._give([(number, process.name) for number in orphans], event)
            out.append(act.RoutesChanged(host=process.name, cause=event.cause))
        elif process.kind is ProcessKind.DEVICE:
            device = process.name.removeprefix("device:")
            for slot in self.slots.values():
                if slot.state is SlotState.LOADING and slot.device == device:
                    out.append(self._load(slot, device, event))
            out += self._bring_back(event)
        return out + self._advance(event)

    @_handle.register
    def _process_lost(self, event: ev.ProcessLost) -> Actions:
        process = self._current(event.process, event.incarnation)
        if process is None or process.state not in (ProcessState.STARTING, ProcessState.UP):
            return []
        process.reason = event.reason
        delay = process.restarts.crashed(event.now, event.chance)
        if process.drains:
            process.state, plan = ProcessState.STOPPED, "it was being drained and stays down"
        elif delay is None:
            process.state, plan = ProcessState.GIVEN_UP, "giving up"
        else:
            process.state, plan = ProcessState.WAITING, f"restart in {delay:.1f} s"
            process.restart_at = event.now + delay
        text = f"{process.name} was lost ({event.reason}); {plan}"
        out: Actions = [act.Note(level="warning", text=text, cause=event.cause)]
        if process.kind is ProcessKind.DEVICE:
            self._device_lost(process, event)
        if process.kind is ProcessKind.HOST:
            client = f"{process.name}@{process.epoch}"
            out.append(act.ForgetClient(client=client, cause=event.cause))
            out += self._host_lost(process, event)
        if process.state is ProcessState.GIVEN_UP:
            if process.kind is ProcessKind.DEVICE:
                out += self._bring_back(event)
            out += self._stop_dependents(process, event)
        if not process.live:
            return out + self._advance(event)
        if delay == 0.0:
            out += self._start(process.name, process.kind, event)
        elif process.restart_at is not None:
            out.append(act.WakeAt(when=process.restart_at, cause=event.cause))
        return out

    def _device_lost(self, process: Process, event: ev.Event) -> None:
        device = process.name.removeprefix("device:")
        error = SlotUnavailable(device, f"the device process was lost: {process.reason}")
        for slot in self.slots.values():
            if slot.device != device:
                continue
            self.ledger.release(device, slot.name)
            slot.device = None
            slot.error = error
            slot.move(SlotState.FAILED, event.now, event.cause)

    def _stop_dependents(self, process: Process, event: ev.Event) -> Actions:
        """A process is given up: those that cannot work without it are stopped."""
        kinds = falls_with(process.kind)
        fallen = [p for p in self.processes.values() if p.kind in kinds and p.live]
        if not fallen:
            return []
        names = ", ".join(p.name for p in fallen)
        text = f"{process.name} was given up; stopped, being of no use without it: {names}"
        out: Actions = [act.Note(level="error", text=text, cause=event.cause)]
        for other in fallen:
            other.reason = f"{process.name} was given up"
            out += self._stop(other, event)
        for other in fallen:
            if other.kind is ProcessKind.HOST:
                out += self._leave(other, event)
            if other.kind is ProcessKind.DEVICE:
                self._device_lost(other, event)
        return out

    def _stop(self, process: Process, event: ev.Event) -> Actions:
        """Stop a process for good."""
        out: Actions = []
        if process.started:
            out.append(act.StopProcess(process=process.name, cause=event.cause))
            if process.kind is ProcessKind.HOST:
                client = f"{process.name}@{process.epoch}"
                out.append(act.ForgetClient(client=client, cause=event.cause))
        process.state = ProcessState.STOPPED
        process.restart_at = None
        return out

    @_handle.register
    def _tick(self, event: ev.Tick) -> Actions:
        out: Actions = []
        for process in list(self.processes.values()):
            if process.restart_at is not None and process.restart_at <= event.now:
                out += self._start(process.name, process.kind, event)
        return out

    # ------------------------------------------------------------ shards

    def _hosts(self) -> list[Process]:
        return [p for p in self.processes.values() if p.kind is ProcessKind.HOST]

    def _shards_of(self, host: str) -> list[int]:
        return [number for number, shard in enumerate(self.shards) if shard.host == host]

    def _takers(self, *, prefer_up: bool = False) -> dict[str, int]:
        """Hosts that may be given shards, each with how many it has or is about to get.

        Those that run or come back, without those being drained.
        """
        takers = [p for p in self._hosts() if p.live and not p.drains]
        if prefer_up:
            takers = [p for p in takers if p.state is ProcessState.UP] or takers
        loads = {p.name: 0 for p in takers}
        for shard in self.shards:
            host = shard.to or shard.host
            if host in loads:
                loads[host] += 1
        return loads

    def _fence(self, numbers: Iterable[int], event: ev.Event) -> Actions:
        """Have the store hold the epochs of these shards' hosts; until then they are moving.

        Nothing is written for a host that is not there: its start does it, under a new epoch.
        """
        by_host: dict[str, list[int]] = {}
        for number in numbers:
            shard = self.shards[number]
            shard.state = ShardState.MOVING
            by_host.setdefault(shard.host, []).append(number)
        return [
            act.Fence(
                host=host,
                epoch=self.processes[host].epoch,
                shards=tuple(sorted(mine)),
                cause=event.cause,
            )
            for host, mine in by_host.items()
            if self.processes[host].started
        ]

    def _give(self, moves: Iterable[tuple[int, str]], event: ev.Event) -> Actions:
        """Give shards to hosts, and fence them there."""
        numbers = []
        for number, host in moves:
            shard = self.shards[number]
            before = self.processes.get(shard.host)
            if before is not None and before.drains:
                shard.left |= {before.name}
            shard.host, shard.to = host, ""
            numbers.append(number)
        return self._fence(numbers, event)

    def _host_lost(self, process: Process, event: ev.Event) -> Actions:
        """Its shards wait for it to come back, or go to others."""
        if not process.live:
            return self._leave(process, event)
        # It need not release any more what it was asked to.
        numbers = [number for number in self._shards_of(process.name) if self.shards[number].to]
        out = self._hand_over(process, numbers, event)
        out.append(act.RoutesChanged(host=process.name, cause=event.cause))
        return out + self._finish_drains(event)

    def _leave(self, process: Process, event: ev.Event) -> Actions:
        """A host will not come back: its shards go to the others, or nowhere."""
        out = self._cancel_drains(event)
        loads = self._takers()
        moves: list[tuple[int, str]] = []
        for number in self._shards_of(process.name):
            if loads:
                host = fewest(loads)
                loads[host] += 1
                moves.append((number, host))
            else:
                self.shards[number] = Shard()
        out += self._give(moves, event)
        out.append(act.RoutesChanged(host=process.name, cause=event.cause))
        return out + self._finish_drains(event)

    @_handle.register
    def _fenced(self, event: ev.Fenced) -> Actions:
        process = self.processes.get(event.host)
        stale: list[int] = []
        for number in event.shards:
            shard = self.shards[number]
            if shard.state is ShardState.UNREACHABLE:
                continue
            if process is None or (shard.host, process.epoch) != (event.host, event.epoch):
                stale.append(number)
            elif shard.state is ShardState.MOVING:
                shard.state, shard.left = ShardState.SERVED, frozenset()
        # An answer to a Fence of the past, which may have been written after that of the
        # present owner and shut it out: the owner's is written again.
        out = self._fence(stale, event)
        out.append(act.RoutesChanged(host=event.host, cause=event.cause))
        if process is not None and process.drains:
            out += self._ask_release(process, event)
        return out + self._finish_drains(event)

    @_handle.register
    def _shards_released(self, event: ev.ShardsReleased) -> Actions:
        process = self.processes.get(event.host)
        numbers = [
            number
            for number in event.shards
            if self.shards[number].host == event.host and self.shards[number].to == event.to
        ]
        if process is None or not event.to or not numbers:
            return []
        out = self._hand_over(process, numbers, event)
        out.append(act.RoutesChanged(host=event.host, cause=event.cause))
        return out + self._finish_drains(event)

    def _hand_over(self, process: Process, numbers: Iterable[int], event: ev.Event) -> Actions:
        """A host serves these shards no more: they go where they were meant to go.

        If that host has become unfit meanwhile: back, or, from one that is being drained, to
        another.
        """
        loads = self._takers(prefer_up=True)
        fit = self._takers()
        moves: list[tuple[int, str]] = []
        for number in numbers:
            to = self.shards[number].to
            if to not in fit:
                to = fewest(loads) if process.drains else process.name
                loads[to] = loads.get(to, 0) + 1
            moves.append((number, to))
        return self._give(moves, event)

    @_handle.register
    def _rebalance_asked(self, event: ev.RebalanceAsked) -> Actions:
        up = [p.name for p in self._hosts() if p.state is ProcessState.UP and not p.drains]
        loads = {host: n for host, n in self._takers().items() if host in up}
        movable: dict[str, list[int]] = {host: [] for host in up}
        for number, shard in enumerate(self.shards):
            if shard.host in movable and shard.state is ShardState.SERVED and not shard.to:
                movable[shard.host].append(number)
        moves = balance(loads, movable)
        text = f"{len(moves)} of {SHARDS} shards move, to spread them over {len(up)} hosts"
        return [
            act.Note(level="info", text=text, cause=event.cause),
            *self._release(moves, event),
        ]

    def _release(self, moves: list[tuple[int, str, str]], event: ev.Event) -> Actions:
        """Ask hosts to end their turns on shards that others will serve."""
        for number, _, to in moves:
            self.shards[number].to = to
        return [
            act.ReleaseShards(host=host, shards=numbers, to=to, cause=event.cause)
            for host, to, numbers in grouped(moves)
        ]

    @_handle.register
    def _drain_asked(self, event: ev.DrainAsked) -> Actions:
        process = self.processes.get(event.process)
        if process is None or process.kind is not ProcessKind.HOST:
            known = [p.name for p in self._hosts()]
            return [act.Refused(error=UnknownProcess(event.process, known), cause=event.cause)]
        if process.drains:
            process.drains += (event.cause,)
            return []
        if not process.live:
            return [act.Drained(process=process.name, cause=event.cause)]
        others = [p for p in self._hosts() if p is not process and not p.drains]
        if not any(p.state is ProcessState.UP for p in others):
            return [act.Refused(error=NoOtherHost(process.name), cause=event.cause)]
        process.drains = (event.cause,)
        if process.state is ProcessState.UP:
            return self._ask_release(process, event) + self._finish_drains(event)
        # It has no turns that could be waited for.
        return self._stop(process, event) + self._leave(process, event)

    @_handle.register
    def _host_asked(self, event: ev.HostAsked) -> Actions:
        process = self.processes.get(event.process)
        if process is not None and (process.kind is not ProcessKind.HOST or process.live):
            return []
        if any(p.kind in NEEDS[ProcessKind.HOST] and not p.live for p in self.processes.values()):
            return []
        return self._start(event.process, ProcessKind.HOST, event)

    def _ask_release(self, process: Process, event: ev.Event) -> Actions:
        """Have a host that is being drained release what it serves.

        What is still on its way to it follows when its Fence is answered: a host asked to
        release what it has not yet been given would be given it afterwards.
        """
        loads = self._takers(prefer_up=True)
        moves: list[tuple[int, str, str]] = []
        for number in self._shards_of(process.name):
            shard = self.shards[number]
            if shard.state is ShardState.SERVED and not shard.to:
                to = fewest(loads)
                loads[to] += 1
                moves.append((number, process.name, to))
        return self._release(moves, event)

    def _cancel_drains(self, event: ev.Event) -> Actions:
        """If nobody is left to take their shards, the hosts being drained keep them."""
        if self._takers():
            return []
        out: Actions = []
        for process in self._hosts():
            if process.live:
                error = NoOtherHost(process.name, "the other hosts were lost meanwhile")
                out += [act.Refused(error=error, cause=cause) for cause in process.drains]
                process.drains = ()
                for shard in self.shards:
                    shard.left -= {process.name}
        return out

    def _finish_drains(self, event: ev.Event) -> Actions:
        """Stop the hosts whose shards are all fenced elsewhere."""
        out: Actions = []
        for process in self._hosts():
            if not process.drains or any(
                shard.host == process.name or process.name in shard.left for shard in self.shards
            ):
                continue
            out += self._stop(process, event)
            out += [act.Drained(process=process.name, cause=cause) for cause in process.drains]
            process.drains = ()
        return out

    # ------------------------------------------------------------ slots

    @_handle.register
    def _slot_loaded(self, event: ev.SlotLoaded) -> Actions:
        slot = self.slots[event.slot]
        if slot.state is not SlotState.LOADING or slot.device is None:
            return []
        slot.measured = dict(event.measured)
        difference = self.ledger.commit(slot.device, slot.name, slot.needed_bytes)
        error = slot.prediction_error or 0.0
        slot.error = None
        slot.last_used = event.now
        slot.move(SlotState.READY, event.now, event.cause)
        out: Actions = []
        if error > NOTED_ERROR or difference > NOTED_ERROR * slot.size_bytes:
            out.append(
                act.Note(
                    level="warning",
                    text=f"model {slot.name} keeps {slot.measured_bytes} bytes ({slot.measured}), "
                    f"predicted were {dict(slot.predicted)}: {error:.1%} off, "
                    f"and {max(difference, 0)} more than reserved",
                    cause=event.cause,
                )
            )
        return out + self._advance(event)

    @_handle.register
    def _slot_failed(self, event: ev.SlotFailed) -> Actions:
        slot = self.slots[event.slot]
        if slot.state not in (SlotState.LOADING, SlotState.READY, SlotState.DRAINING):
            return []
        if slot.device is not None:
            self.ledger.release(slot.device, slot.name)
        slot.device = None
        slot.error = event.error
        slot.move(SlotState.FAILED, event.now, event.cause)
        out: Actions = [
            act.Note(level="error", text=f"model {slot.name}: {event.error}", cause=event.cause)
        ]
        return out + self._advance(event)

    @_handle.register
    def _slot_unloaded(self, event: ev.SlotUnloaded) -> Actions:
        slot = self.slots[event.slot]
        if slot.state is not SlotState.DRAINING or slot.device is None:
            return []
        self.ledger.release(slot.device, slot.name)
        slot.device = None
        slot.move(SlotState.COLD, event.now, event.cause)
        return self._advance(event)

    def _make_resident(self, slot: Slot, event: ev.Event) -> Actions:
        """Load a slot if there is room, else make room, else leave it waiting."""
        if slot.state in (SlotState.LOADING, SlotState.READY, SlotState.DRAINING):
            return []
        spec = self.models[slot.name]
        names = self._usable_devices(spec)
        fitting = [n for n in names if self.ledger.free_bytes(n) >= slot.size_bytes]
        if fitting:
            device = max(fitting, key=self.ledger.free_bytes)
            self.ledger.reserve(device, slot.name, slot.size_bytes)
            slot.device = device
            slot.threads = self._thread_quota(spec, self.devices[device])
            slot.move(SlotState.LOADING, event.now, event.cause)
            if self.processes[f"device:{device}"].state is ProcessState.UP:
                return [self._load(slot, device, event)]
            return []  # ProcessUp of the device loads it.
        return self._make_room(slot, names, event)

    def _usable_devices(self, spec: ModelSpec) -> list[str]:
        """Devices a model may be on, without those whose process is gone for good."""
        return [
            name
            for name in ([spec.device] if spec.device else self.devices)
            if name in self.devices and self.processes[f"device:{name}"].live
        ]

    def _make_room(self, slot: Slot, names: list[str], event: ev.Event) -> Actions:
        """Unload idle slots, longest unused first, on the device where fewest must go."""
        best: list[Slot] | None = None
        for name in names:
            free = self.ledger.free_bytes(name)
            # What drains already will be free soon: do not unload more than is needed.
            draining = sum(
                self.ledger.accounts[name].reservations[s.name].held_bytes
                for s in self.slots.values()
                if s.device == name and s.state is SlotState.DRAINING
            )
            free += draining
            victims: list[Slot] = []
            idle = [s for s in self.slots.values() if s.device == name and s.idle]
            for victim in sorted(idle, key=lambda s: (s.last_used, s.name)):
                if free >= slot.size_bytes:
                    break
                free += self.ledger.accounts[name].reservations[victim.name].held_bytes
                victims.append(victim)
            if free >= slot.size_bytes and (best is None or len(victims) < len(best)):
                best = victims
        out: Actions = []
        for victim in best or []:
            assert victim.device is not None
            victim.move(SlotState.DRAINING, event.now, event.cause)
            out.append(act.UnloadSlot(slot=victim.name, device=victim.device, cause=event.cause))
        return out

    def _thread_quota(self, spec: ModelSpec, device: DeviceSpec) -> int:
        """Threads of a slot.

        One core is left to the hosts and the store: threads of one computation wait for
        each other at every step, so a single one that has to share its core holds up all
        of them. An encoder gets half: its texts are short. The causal models of the
        system share what there is.
        """
        if spec.threads is not None:
            return max(1, min(spec.threads, device.threads))
        usable = max(1, device.threads - 1)
        if spec.kind == "encoder":
            return max(1, usable // 2)
        # What has no bytes here computes elsewhere.
        causal = sum(1 for m in self.models.values() if m.kind == "causal" and m.size_bytes)
        return max(1, usable // max(1, causal))

    def _load(self, slot: Slot, device: str, event: ev.Event) -> act.LoadSlot:
        return act.LoadSlot(slot=slot.name, device=device, threads=slot.threads, cause=event.cause)

    def _bring_back(self, event: ev.Event) -> Actions:
        """Reload what is needed and is not there: after a device came back."""
        out: Actions = []
        for slot in self.slots.values():
            if slot.state is SlotState.FAILED and (slot.users or slot.pinned):
                out += self._make_resident(slot, event)
        return out

    # ------------------------------------------------------------ agents

    @_handle.register
    def _launch_asked(self, event: ev.LaunchAsked) -> Actions:
        names = tuple(name for name, _ in event.models)
        problem = self._launch_problem(event)
        if problem is not None:
            return [act.Refused(error=problem, cause=event.cause)]
        for name, asked in event.models:
            slot = self.slots[name]
            if asked is not None and slot.device is not None:
                try:
                    self.ledger.grow(slot.device, name, asked)
                except OverCapacity as full:
                    return [act.Refused(error=full, cause=event.cause)]
        self.agents[event.agent] = AgentEntry(event.agent, names)
        self.launches[event.cause] = Launch(event.cause, event.agent, names)
        out: Actions = []
        for name, asked in event.models:
            slot = self.slots[name]
            slot.users.add(event.agent)
            if asked is not None:
                slot.asked[event.agent] = asked
            if slot.state is SlotState.FAILED and not self._coming_back(slot):
                # A new launch is a new try: what went wrong before may be mended.
                slot.error = None
                slot.move(SlotState.COLD, event.now, event.cause)
            out += self._make_resident(slot, event)
        return out + self._advance(event)

    def _launch_problem(self, event: ev.LaunchAsked) -> LlmosError | None:
        """Why this launch can never succeed."""
        if event.agent in self.agents:
            return AlreadyLaunched(event.agent)
        for name, asked in event.models:
            if name not in self.models:
                return UnknownModel(name, self.models, remedy=f"Add [models.{name}] to system.toml")
            needed = max(self.slots[name].size_bytes, asked or 0)
            spec = self.models[name]
            usable = self._usable_devices(spec)
            if not usable:
                return NoDevice(name, spec.device, self.devices)
            # What is pinned never makes room.
            pinned = {d: self._pinned_bytes(d, name) for d in usable}
            device = max(usable, key=lambda d: self.devices[d].capacity_bytes - pinned[d])
            capacity = self.devices[device].capacity_bytes
            if needed > capacity - pinned[device]:
                return DoesNotFit(event.agent, name, needed, device, capacity, pinned[device])
        return None

    def _pinned_bytes(self, device: str, but: str) -> int:
        """Bytes of a device that slots other than this one hold for good."""
        return sum(
            self.ledger.accounts[device].reservations[s.name].held_bytes
            for s in self.slots.values()
            if s.pinned and s.device == device and s.name != but
        )

    @_handle.register
    def _launch_given_up(self, event: ev.LaunchGivenUp) -> Actions:
        launch = self.launches.pop(event.request, None)
        if launch is None:
            return []
        self._drop_user(launch.agent, event)
        return self._advance(event)

    @_handle.register
    def _kill_asked(self, event: ev.KillAsked) -> Actions:
        entry = self.agents.get(event.agent)
        if entry is None:
            return [act.Refused(error=UnknownAgent(event.agent, self.agents), cause=event.cause)]
        out: Actions = []
        for launch in [x for x in self.launches.values() if x.agent == event.agent]:
            del self.launches[launch.request]
            error = UnknownAgent(event.agent)
            out.append(act.Refused(error=error, cause=launch.request))
        out.append(act.Killed(agent=event.agent, cause=event.cause))
        self._drop_user(event.agent, event)
        return out + self._advance(event)

    def _advance(self, event: ev.Event) -> Actions:
        """Go on with the launches that wait, in order; finish those whose models are ready."""
        out: Actions = []
        for launch in list(self.launches.values()):
            slots = [self.slots[name] for name in launch.models]
            failed = next((s for s in slots if s.state is SlotState.FAILED), None)
            if failed is not None and not self._coming_back(failed):
                del self.launches[launch.request]
                error = failed.error or SlotUnavailable(failed.name, "unknown reason")
                out.append(act.Refused(error=error, cause=launch.request))
                self._drop_user(launch.agent, event)
                continue
            if all(s.state is SlotState.READY for s in slots):
                out += self._finish_launch(launch, event)
                continue
            for slot in slots:
                out += self._make_resident(slot, event)
        return out

    def _coming_back(self, slot: Slot) -> bool:
        """Whether a failed slot will be tried again: a device of it is being restarted."""
        return isinstance(slot.error, SlotUnavailable) and any(
            self.processes[f"device:{name}"].state in (ProcessState.STARTING, ProcessState.WAITING)
            for name in self._usable_devices(self.models[slot.name])
        )

    def _drop_user(self, agent: str, event: ev.Event) -> None:
        """An agent is gone: its leases end."""
        entry = self.agents.pop(agent)
        for name in entry.models:
            self.slots[name].users.discard(agent)
            self.slots[name].last_used = event.now
            self.slots[name].asked.pop(agent, None)

    def _finish_launch(self, launch: Launch, event: ev.Event) -> Actions:
        del self.launches[launch.request]
        if not any(p.live for p in self._hosts()):
            self._drop_user(launch.agent, event)
            error = HostUnavailable(launch.agent, self._why_no_host())
            return [act.Refused(error=error, cause=launch.request)]
        self.agents[launch.agent].state = AgentState.READY
        return [act.Launched(agent=launch.agent, cause=launch.request)]

    def _why_no_host(self) -> str:
        """Why no host is left."""
        for process in self.processes.values():
            if process.kind in NEEDS[ProcessKind.HOST] and not process.live:
                return f"hosts cannot work without {process.name}, which was given up" + (
                    f" ({process.reason})" if process.reason else ""
                )
        reasons = sorted({p.reason for p in self._hosts() if p.reason})
        return f"the hosts are stopped or crashed too often: {'; '.join(reasons) or 'none is left'}"

    # ------------------------------------------------------------ questions

    def serves(self, agent: str) -> bool:
        """Whether the agent, or any key of its program, is launched and has its models."""
        entry = self.agents.get(agent)
        if entry is None or entry.state is not AgentState.READY:
            entry = self.agents.get(pattern_of(agent))
        return entry is not None and entry.state is AgentState.READY

    def route(self, agent: str) -> tuple[str, int] | None:
        """Host and epoch that serve an agent now; None while that is on its way.

        Raises:
            UnknownAgent: neither it nor any key of its program is launched.
            HostUnavailable: no host is left.
        """
        if not self.serves(agent):
            if agent in self.agents or pattern_of(agent) in self.agents:
                return None
            raise UnknownAgent(agent, self.agents)
        shard = self.shards[shard_of(agent)]
        if shard.state is ShardState.UNREACHABLE:
            raise HostUnavailable(agent, self._why_no_host())
        process = self.processes[shard.host]
        if shard.state is ShardState.MOVING or process.state is not ProcessState.UP:
            return None
        return process.name, process.epoch

    def spare_host(self) -> str:
        """Name for one host more: of one that was stopped, else a new one."""
        hosts = {p.name: p for p in self._hosts()}
        for name, process in hosts.items():
            if process.state is ProcessState.STOPPED and not process.drains:
                return name
        return next(n for n in map("host:{}".format, range(len(hosts) + 1)) if n not in hosts)

    def epoch_of(self, host: str) -> int:
        """The epoch under which a host commits now.

        Raises:
            UnknownProcess: there is no such host.
        """
        process = self.processes.get(host)
        if process is None or process.kind is not ProcessKind.HOST:
            raise UnknownProcess(host, [p.name for p in self._hosts()])
        return process.epoch

    def shard_map(self) -> tuple[tuple[str, int], ...]:
        """For each shard the host that serves it now and its epoch; ("", 0): nobody does."""
        up = {p.name: (p.name, p.epoch) for p in self._hosts() if p.state is ProcessState.UP}
        nobody = ("", 0)
        return tuple(
            up.get(shard.host, nobody) if shard.state is ShardState.SERVED else nobody
            for shard in self.shards
        )

    def _current(self, name: str, incarnation: int) -> Process | None:
        """The process, unless the news is about an incarnation that is history."""
        process = self.processes.get(name)
        return process if process is not None and process.incarnation == incarnation else None

    def validate(self) -> None:
        """Everything agrees with everything."""
        self.ledger.validate()
        checks: list[Callable[[], None]] = [s.validate for s in self.slots.values()]
        for check in checks:
            check()
        for slot in self.slots.values():
            for device, account in self.ledger.accounts.items():
                assert (slot.name in account.reservations) == (slot.device == device), slot
            for user in slot.users:
                assert user in self.agents, (slot.name, user)
                assert slot.name in self.agents[user].models, (slot.name, user)
        for entry in self.agents.values():
            for name in entry.models:
                assert entry.agent in self.slots[name].users, entry
        for launch in self.launches.values():
            assert self.agents[launch.agent].state is AgentState.PENDING, launch
        epochs = [p.epoch for p in self.processes.values()]
        assert len(epochs) == len(set(epochs)), epochs
        assert all(e < self.next_epoch for e in epochs), epochs
        for process in self.processes.values():
            assert (process.restart_at is not None) == (process.state is ProcessState.WAITING)
        self._validate_shards()

    def _validate_shards(self) -> None:
        assert len(self.shards) == SHARDS
        hosts = {p.name: p for p in self._hosts()}
        for number, shard in enumerate(self.shards):
            shard.validate()
            if shard.state is ShardState.UNREACHABLE:
                assert not any(p.state is ProcessState.UP for p in hosts.values()), number
                continue
            assert hosts[shard.host].live, (number, shard)
            if shard.to:
                assert shard.to in hosts, (number, shard)
                assert hosts[shard.host].state is ProcessState.UP, (number, shard)
            for name in shard.left:
                assert hosts[name].drains, (number, shard)
        for process in self.processes.values():
            if not process.drains:
                continue
            assert process.kind is ProcessKind.HOST, process
            assert process.state in (ProcessState.UP, ProcessState.STOPPED), process
            assert any(s.host == process.name or process.name in s.left for s in self.shards)
            if process.live:
                # Somebody is there to take what it has.
                assert any(p.live and not p.drains for p in hosts.values()), process
        if any(p.kind in NEEDS[ProcessKind.HOST] and not p.live for p in self.processes.values()):
            assert not any(p.live for p in hosts.values())
