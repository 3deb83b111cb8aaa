"""The kernel's state machine: :meth:`KernelCore.handle` takes an event, returns actions.

It decides which processes run, what stays in memory, which agent is where, what waits
and what restarts. It does nothing itself; the shell (:mod:`llmos.kernel.server`)
carries the actions out and answers with events.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import singledispatchmethod

from llmos.drivers.errors import LlmosError, UnknownModel
from llmos.kernel.core import actions as act
from llmos.kernel.core import events as ev
from llmos.kernel.core.errors import (
    AlreadyLaunched,
    DoesNotFit,
    HostUnavailable,
    NoDevice,
    SlotUnavailable,
)
from llmos.kernel.core.ledger import Ledger, OverCapacity
from llmos.kernel.core.restarts import RestartPolicy, Restarts
from llmos.kernel.core.slots import Slot, SlotState
from llmos.kernel.core.types import (
    AgentState,
    DeviceSpec,
    ModelSpec,
    ProcessKind,
    ProcessState,
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


@dataclass(slots=True)
class AgentEntry:
    """An agent that has been launched or waits for it."""

    agent: str
    models: tuple[str, ...]
    state: AgentState = AgentState.PENDING
    host: str = ""


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
            self.slots[model.name] = Slot(model.name, model.size_bytes, pinned=model.pinned)
        for kind in event.services:
            out += self._start(kind.value, kind, event)
        for name in self.devices:
            out += self._start(f"device:{name}", ProcessKind.DEVICE, event)
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
        mine = tuple(sorted(a.agent for a in self.agents.values() if a.host == name))
        fence = act.Fence(host=name, epoch=process.epoch, agents=mine, cause=event.cause)
        # The fence comes first: once it is durable, whatever the old process still does
        # under its old epoch is refused by the store.
        return [fence, start] if mine else [start]

    @_handle.register
    def _process_up(self, event: ev.ProcessUp) -> Actions:
        process = self._current(event.process, event.incarnation)
        if process is None or process.state is not ProcessState.STARTING:
            return []
        process.state = ProcessState.UP
        out: Actions = []
        if process.kind is ProcessKind.HOST:
            for entry in self.agents.values():
                if entry.state is AgentState.UNREACHABLE:
                    entry.host, entry.state = process.name, AgentState.MOVING
            out += self._fence_moving(process, event)
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
        delay = process.restarts.crashed(event.now)
        out: Actions = [
            act.Note(
                level="warning",
                text=f"{process.name} was lost ({event.reason}); "
                + ("giving up" if delay is None else f"restart in {delay:.1f} s"),
                cause=event.cause,
            )
        ]
        if process.kind is ProcessKind.DEVICE:
            out += self._device_lost(process, event)
        if process.kind is ProcessKind.HOST:
            client = f"{process.name}@{process.epoch}"
            out.append(act.ForgetClient(client=client, cause=event.cause))
        if delay is None:
            process.state = ProcessState.GIVEN_UP
            if process.kind is ProcessKind.HOST:
                out += self._move_agents(process, event)
            if process.kind is ProcessKind.DEVICE:
                out += self._bring_back(event)
            return out + self._advance(event)
        if delay == 0.0:
            out += self._start(process.name, process.kind, event)
        else:
            process.state = ProcessState.WAITING
            process.restart_at = event.now + delay
            out.append(act.WakeAt(when=process.restart_at, cause=event.cause))
        return out

    def _device_lost(self, process: Process, event: ev.ProcessLost) -> Actions:
        device = process.name.removeprefix("device:")
        error = SlotUnavailable(device, f"the device process was lost: {event.reason}")
        for slot in self.slots.values():
            if slot.device != device:
                continue
            self.ledger.release(device, slot.name)
            slot.device = None
            slot.error = error
            slot.move(SlotState.FAILED, event.now, event.cause)
        return []

    def _move_agents(self, process: Process, event: ev.Event) -> Actions:
        """A host is given up: its agents go to the others, or nowhere."""
        out: Actions = []
        for entry in self.agents.values():
            if entry.host != process.name or entry.state is AgentState.PENDING:
                continue
            entry.host = self._least_loaded_host()
            entry.state = AgentState.MOVING if entry.host else AgentState.UNREACHABLE
        for other in self.processes.values():
            if other.kind is ProcessKind.HOST and other.state is not ProcessState.GIVEN_UP:
                out += self._fence_moving(other, event)
        out.append(act.RoutesChanged(host=process.name, cause=event.cause))
        return out

    def _fence_moving(self, process: Process, event: ev.Event) -> Actions:
        """Fence the agents that are on their way to a host."""
        moving = tuple(
            sorted(
                a.agent
                for a in self.agents.values()
                if a.host == process.name and a.state is AgentState.MOVING
            )
        )
        if not moving:
            return []
        return [act.Fence(host=process.name, epoch=process.epoch, agents=moving, cause=event.cause)]

    @_handle.register
    def _fenced(self, event: ev.Fenced) -> Actions:
        for agent in event.agents:
            entry = self.agents.get(agent)
            on_its_way = entry is not None and entry.state is AgentState.MOVING
            if entry is not None and on_its_way and entry.host == event.host:
                entry.state = AgentState.READY
        return [act.RoutesChanged(host=event.host, cause=event.cause)]

    @_handle.register
    def _tick(self, event: ev.Tick) -> Actions:
        out: Actions = []
        for process in list(self.processes.values()):
            if process.restart_at is not None and process.restart_at <= event.now:
                out += self._start(process.name, process.kind, event)
        return out

    # ------------------------------------------------------------ slots

    @_handle.register
    def _slot_loaded(self, event: ev.SlotLoaded) -> Actions:
        slot = self.slots[event.slot]
        if slot.state is not SlotState.LOADING or slot.device is None:
            return []
        difference = self.ledger.commit(slot.device, slot.name, event.measured_bytes)
        slot.measured_bytes = event.measured_bytes
        slot.error = None
        slot.last_used = event.now
        slot.move(SlotState.READY, event.now, event.cause)
        out: Actions = []
        if difference > 0:
            out.append(
                act.Note(
                    level="warning",
                    text=f"model {slot.name} takes {event.measured_bytes} bytes, "
                    f"{difference} more than predicted",
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
        """Devices a model may be on, without those whose process was given up."""
        return [
            name
            for name in ([spec.device] if spec.device else self.devices)
            if name in self.devices
            and self.processes[f"device:{name}"].state is not ProcessState.GIVEN_UP
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
        causal = sum(1 for m in self.models.values() if m.kind == "causal")
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
        out.append(act.Killed(agent=event.agent, host=entry.host, cause=event.cause))
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
        host = self._least_loaded_host()
        entry = self.agents[launch.agent]
        if not host:
            if any(
                p.kind is ProcessKind.HOST and p.state is not ProcessState.GIVEN_UP
                for p in self.processes.values()
            ):
                return []  # One is coming; ProcessUp goes on here.
            del self.launches[launch.request]
            reasons = {p.reason for p in self.processes.values() if p.kind is ProcessKind.HOST}
            error = HostUnavailable(
                launch.agent, "; ".join(sorted(reasons)) or "none is configured"
            )
            self._drop_user(launch.agent, event)
            return [act.Refused(error=error, cause=launch.request)]
        del self.launches[launch.request]
        entry.state, entry.host = AgentState.READY, host
        epoch = self.processes[host].epoch
        return [act.Launched(agent=launch.agent, host=host, epoch=epoch, cause=launch.request)]

    def _least_loaded_host(self) -> str:
        """The host that is not given up and has fewest agents; "" if there is none."""
        load = {
            p.name: 0
            for p in self.processes.values()
            if p.kind is ProcessKind.HOST and p.state is not ProcessState.GIVEN_UP
        }
        for entry in self.agents.values():
            if entry.host in load:
                load[entry.host] += 1
        return min(load, key=lambda name: (load[name], name), default="")

    # ------------------------------------------------------------ questions

    def route(self, agent: str) -> tuple[str, int] | None:
        """Host and epoch that serve an agent now; None while its host is coming back.

        Raises:
            UnknownAgent: nobody of that name is launched.
            HostUnavailable: no host is left.
        """
        entry = self.agents.get(agent)
        if entry is None:
            raise UnknownAgent(agent, self.agents)
        if entry.state is AgentState.UNREACHABLE:
            raise HostUnavailable(agent, "its host crashed too often")
        if entry.state in (AgentState.PENDING, AgentState.MOVING):
            return None
        process = self.processes[entry.host]
        return (entry.host, process.epoch) if process.state is ProcessState.UP else None

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
            if entry.state in (AgentState.READY, AgentState.MOVING):
                assert entry.host in self.processes, entry
                assert self.processes[entry.host].state is not ProcessState.GIVEN_UP, entry
            for name in entry.models:
                assert entry.agent in self.slots[name].users, entry
        for launch in self.launches.values():
            assert self.agents[launch.agent].state is AgentState.PENDING, launch
        epochs = [p.epoch for p in self.processes.values()]
        assert len(epochs) == len(set(epochs)), epochs
        assert all(e < self.next_epoch for e in epochs), epochs
        for process in self.processes.values():
            assert (process.restart_at is not None) == (process.state is ProcessState.WAITING)
