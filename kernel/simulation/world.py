"""Devices, jobs and time: the loop of events."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from heapq import heappop, heappush
from typing import TypeAlias

from llmos.drivers.protocols import QueuedRequest, QueuePolicy
from llmos.kernel.core.history import Cost
from llmos.kernel.simulation.engine import Engine, Run
from llmos.kernel.simulation.jobs import Job, Machine, Trace

SAMPLES = 2_000
"""Readings of memory kept over a run; beyond them every other one is dropped."""

MakePolicy: TypeAlias = Callable[["World"], QueuePolicy]
"""A policy for one engine. The clairvoyant ones look at the world's jobs; others do not."""


@dataclass(slots=True)
class Outcome:
    """What a run gave."""

    trace: str
    jobs: int
    requests: int
    span_s: float
    """Simulated seconds until the last job was done."""
    completion_s: dict[int, float]
    """By job number: seconds from arrival to the end of its last call."""
    wait_s: list[float]
    """Of every request: seconds from submission to its entry into the batch."""
    served: dict[str, float]
    """By tenant: work."""
    gap_tokens: float
    """The largest difference that arose in served work divided by weight, between two tenants
    in one engine, over any time in which both always had something waiting there."""
    preempted: int
    hit_share: float
    """Part of the prompt tokens that was found in the cache."""
    memory: list[tuple[float, int, int]]
    """(seconds, KV tokens held, KV tokens remembered) over time, all devices together."""
    decisions: int
    """Entries into a batch."""


@dataclass(slots=True)
class Progress:
    """How far a job has come."""

    job: Job
    at: int = 0
    home: int = -1
    """Replica that has its prefixes."""


class _Watch:
    """Watches one engine: who enters and ends, and how the served work of tenants that always
    have something waiting there differs. Engines know nothing of each other's counters, so the
    difference means something within one alone."""

    def __init__(self, world: World, look: bool) -> None:
        self._world, self._look = world, look
        self._weights, self._cost = world.trace.weights, world.cost
        self.served: dict[str, float] = {}
        self._waiting: dict[str, int] = {}
        self._ranges: dict[tuple[str, str], tuple[float, float]] = {}
        """By pair: least and greatest difference since both have had something waiting."""
        self.largest = 0.0

    def waits(self, tenant: str) -> None:
        self._waiting[tenant] = self._waiting.get(tenant, 0) + 1

    def entered(self, run: Run) -> None:
        tenant = run.request.tenant
        self._waiting[tenant] -= 1
        if not self._waiting[tenant]:
            for pair in [p for p in self._ranges if tenant in p]:
                del self._ranges[pair]
        self._world.entered(run)
        if self._look:
            self.look()

    def put_back(self, run: Run) -> None:
        self.waits(run.request.tenant)

    def charged(self, request: QueuedRequest, read: int, written: int) -> None:
        work = self._cost.of(read, written) / self._weights.get(request.tenant, 1.0)
        self.served[request.tenant] = self.served.get(request.tenant, 0.0) + work

    def ended(self, run: Run) -> None:
        self._world.ended(run)

    def look(self) -> None:
        busy = sorted(t for t, n in self._waiting.items() if n)
        for at, one in enumerate(busy):
            for other in busy[at + 1 :]:
                gap = self.served.get(one, 0.0) - self.served.get(other, 0.0)
                low, high = self._ranges.get((one, other), (gap, gap))
                low, high = min(low, gap), max(high, gap)
                self._ranges[one, other] = (low, high)
                self.largest = max(self.largest, high - low)


class _Device:
    """Engines of several models that take turns on one device."""

    def __init__(self) -> None:
        self.engines: list[Engine] = []
        self.active: Engine | None = None
        self.version = 0
        self.turn = 0


class World:
    """All devices with all replicas, fed with a trace.

    Every model has one replica on each device that is listed for it. A request goes to the
    replica that remembers its turn's prefix, a new turn to that with the fewest requests.
    Engines on one device take turns by steps.
    """

    QUANTUM = 4
    """Steps that an engine takes before another one of its device that has work."""

    def __init__(
        self,
        trace: Trace,
        make_policy: MakePolicy,
        *,
        machines: Mapping[str, Machine],
        devices: int = 1,
        cost: Cost | None = None,
        watch_gap: bool = True,
    ) -> None:
        self.trace = trace
        self.now_s = 0.0
        self.cost = cost or Cost()
        self.jobs = {job.number: Progress(job) for job in trace.jobs}
        self.keys: dict[str, Progress] = {}
        """Of requests that wait or run."""
        self._watches: dict[str, _Watch] = {}
        self._events: list[tuple[float, int, str, int, int]] = []
        """(time, number, kind, job or device, version)."""
        self._number = 0
        self._devices = [_Device() for _ in range(devices)]
        self._replicas: dict[str, list[tuple[int, Engine]]] = {}
        for model, machine in machines.items():
            for number, device in enumerate(self._devices):
                watch = _Watch(self, watch_gap)
                engine = Engine(f"{model}@{number}", machine, make_policy(self), watch)
                self._watches[engine.name] = watch
                device.engines.append(engine)
                self._replicas.setdefault(model, []).append((number, engine))
        self._share = any(m.share_prefixes for m in machines.values())
        self._prompts: dict[int, list[int]] = {}
        self._completion: dict[int, float] = {}
        self._waits: list[float] = []
        self._memory: list[tuple[float, int, int]] = []
        self._every = 1
        self._looks = 0
        self._requests = 0
        self.decisions = 0

    def new_prompts(self, job: Job) -> list[int]:
        """Prompt tokens of each call of a job that are to be read, if nothing is forgotten."""
        found = self._prompts.get(job.number)
        if found is None:
            found = self._prompts[job.number] = job.new_prompts(self._share)
        return found

    # ------------------------------------------------------------ the loop

    def run(self) -> Outcome:
        """To the end of the last job."""
        arrivals = iter(sorted(self.trace.jobs, key=lambda j: (j.arrival_s, j.number)))
        coming = next(arrivals, None)
        while coming is not None or self._events:
            if coming is not None and (not self._events or coming.arrival_s <= self._events[0][0]):
                self.now_s = coming.arrival_s
                self._submit(self.jobs[coming.number])
                coming = next(arrivals, None)
                continue
            time_s, _, kind, number, version = heappop(self._events)
            if kind == "call":
                self.now_s = time_s
                self._submit(self.jobs[number])
                continue
            device = self._devices[number]
            if version != device.version:
                continue  # Its leap was cut.
            self.now_s = time_s
            engine = device.active
            assert engine is not None
            device.active = None
            engine.finish(time_s)
            self._go(number)
        assert not self.keys, f"{len(self.keys)} requests were never served"
        engines = [e for d in self._devices for e in d.engines]
        asked = sum(e.prefixes.asked_tokens for e in engines)
        return Outcome(
            trace=self.trace.name,
            jobs=len(self.jobs),
            requests=self._requests,
            span_s=self.now_s,
            completion_s=self._completion,
            wait_s=self._waits,
            served=self._served(),
            gap_tokens=max(w.largest for w in self._watches.values()),
            preempted=sum(e.preempted for e in engines),
            hit_share=sum(e.prefixes.hit_tokens for e in engines) / asked if asked else 0.0,
            memory=self._memory,
            decisions=self.decisions,
        )

    def _submit(self, progress: Progress) -> None:
        job = progress.job
        call = job.calls[progress.at]
        number, engine = self._replica(progress)
        hit = engine.prefixes.hit(job.tenant, call.blocks) if call.blocks else 0
        key = f"{job.number}.{progress.at}"
        deadline = None if job.deadline_s is None else job.arrival_s + job.deadline_s
        request = QueuedRequest(
            key, job.tenant, job.agent, max(1, call.prompt_tokens - hit), call.max_new_tokens,
            job.priority, deadline, self.now_s, 0, str(job.number),
        )  # fmt: skip
        if call.prompt_tokens + call.max_new_tokens > engine.machine.kv_tokens:
            raise ValueError(
                f"request {key} needs {call.prompt_tokens + call.max_new_tokens} tokens, "
                f"the KV cache holds {engine.machine.kv_tokens}"
            )
        self.keys[key] = progress
        self._requests += 1
        self._watches[engine.name].waits(job.tenant)
        engine.submit(Run(request, call), self.now_s)
        device = self._devices[number]
        if device.active is None:
            self._go(number)
        elif engine.open_seat or device.active is not engine:
            end = device.active.cut(self.now_s)
            if end is not None:
                self._end_at(end, number)

    def _replica(self, progress: Progress) -> tuple[int, Engine]:
        replicas = self._replicas.get(progress.job.model)
        if replicas is None:
            raise ValueError(f"no machine has the model {progress.job.model!r}")
        if progress.home < 0:
            loads = [len(e.waiting) + len(e.running) for _, e in replicas]
            progress.home = loads.index(min(loads))
        return replicas[progress.home]

    def _go(self, number: int) -> None:
        """Let the device take its next leap, if there is one."""
        device = self._devices[number]
        count = len(device.engines)
        for offset in range(count):
            engine = device.engines[(device.turn + offset) % count]
            if not engine.busy:
                continue
            end = engine.begin(self.now_s)
            if end is None:
                continue
            device.active = engine
            device.turn = (device.turn + offset + 1) % count
            leap = engine.leap
            assert leap is not None
            if leap.steps > self.QUANTUM and any(e.busy for e in device.engines if e is not engine):
                leap.steps = self.QUANTUM
                end = self.now_s + engine.seconds(leap, leap.steps)
            self._end_at(end, number)
            break
        self._sample()

    def _end_at(self, time_s: float, number: int) -> None:
        device = self._devices[number]
        device.version += 1
        self._number += 1
        heappush(self._events, (time_s, self._number, "leap", number, device.version))

    # ------------------------------------------------------------ what engines tell

    def ended(self, run: Run) -> None:
        """A call is done: the turn's next one, or its end."""
        progress = self.keys.pop(run.key)
        progress.at += 1
        job = progress.job
        if progress.at == len(job.calls):
            self._completion[job.number] = self.now_s - job.arrival_s
            return
        self._number += 1
        pause = run.call.pause_s
        heappush(self._events, (self.now_s + pause, self._number, "call", job.number, 0))

    def entered(self, run: Run) -> None:
        """A request was let in."""
        self.decisions += 1
        if run.entered_s < 0:
            self._waits.append(self.now_s - run.request.submitted_s)

    def _served(self) -> dict[str, float]:
        total: dict[str, float] = {}
        for watch in self._watches.values():
            for tenant, work in watch.served.items():
                total[tenant] = total.get(tenant, 0.0) + work
        return total

    def _sample(self) -> None:
        self._looks += 1
        if self._looks % self._every:
            return
        engines = [e for d in self._devices for e in d.engines]
        held = sum(e.held_tokens for e in engines)
        self._memory.append((self.now_s, held, sum(e.prefixes.tokens for e in engines)))
        if len(self._memory) >= 2 * SAMPLES:
            del self._memory[::2]
            self._every *= 2
