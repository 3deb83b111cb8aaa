"""What a trace consists of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from llmos.drivers.protocols import StepTime
from llmos.kernel.core.history import Cost


@dataclass(frozen=True, slots=True)
class Call:
    """One request to a model."""

    prompt_tokens: int
    new_tokens: int
    """That it will generate; no policy is told, but for the clairvoyant ones."""
    max_new_tokens: int
    """That it asks for."""
    blocks: tuple[tuple[int, int], ...] = ()
    """(id, tokens) of the pieces that the prompt begins with, where others may begin so too."""
    keeps: tuple[int, int] | None = None
    """(id, tokens) of what this call adds for the next one: the rest of its prompt and its
    answer."""
    pause_s: float = 0.0
    """Until the turn's next call: a tool, a person."""


@dataclass(frozen=True, slots=True)
class Job:
    """One turn of an agent: calls, one after the other."""

    number: int
    tenant: str
    program: str
    arrival_s: float
    calls: tuple[Call, ...]
    model: str = "model"
    agent_key: str = ""
    """Empty: an agent of its own."""
    priority: int = 0
    deadline_s: float | None = None
    """After its arrival."""

    @property
    def agent(self) -> str:
        """``tenant/program/key``."""
        return f"{self.tenant}/{self.program}/{self.agent_key or self.number}"

    def new_prompts(self, share: bool) -> list[int]:
        """Prompt tokens of each call that are to be read: with ``share`` those that the turn's
        former calls did not leave in the cache."""
        known: set[int] = set()
        found = []
        for call in self.calls:
            hit = sum(tokens for number, tokens in call.blocks if number in known) if share else 0
            found.append(max(1, call.prompt_tokens - hit))
            known.update(number for number, _ in call.blocks)
            if call.keeps is not None:
                known.add(call.keeps[0])
        return found

    def work(self, cost: Cost, share: bool) -> float:
        """Weighted tokens of all calls."""
        return cost.of(sum(self.new_prompts(share)), sum(c.new_tokens for c in self.calls))


@dataclass(frozen=True, slots=True)
class Machine:
    """What a model runs on, once per replica."""

    step: StepTime
    seats: int = 32
    """Requests in the batch at the same time."""
    kv_tokens: int = 1 << 20
    max_batch_tokens: int = 512
    share_prefixes: bool = True

    def work_s(self, call: Call, cached_tokens: int = 0) -> float:
        """Device time of a call when all seats are taken: its part of every step it is in."""
        step = self.step
        context = call.prompt_tokens + call.new_tokens / 2
        per_token = step.base_s / self.seats + step.batch_s + step.context_s * context
        return per_token * call.new_tokens + step.prompt_s * (call.prompt_tokens - cached_tokens)


CPU = Machine(StepTime(0.024, 0.00284, 1.5e-6, 0.0022, 0.0), kv_tokens=131_072)
"""SmolLM2-135M in bfloat16 on one thread: steps of 115 ms at 32 sequences, 206 ms at 64."""
GPU = Machine(
    StepTime(0.0085, 0.00004, 1.1e-8, 0.00004, 0.0), kv_tokens=400_000, max_batch_tokens=2048
)
"""Roughly an 8-billion model in bfloat16 on an 80 GB card: reading the weights bounds a step,
each token of context costs 128 KiB of memory traffic, a prompt token 16 GFLOP."""
MACHINES = {"cpu": CPU, "gpu": GPU}


@dataclass(slots=True)
class Trace:
    """Jobs in order of arrival."""

    name: str
    jobs: Sequence[Job]
    weights: dict[str, float] = field(default_factory=dict)
    """Of the tenants, where not 1."""

    @property
    def requests(self) -> int:
        """Calls of all jobs."""
        return sum(len(j.calls) for j in self.jobs)

    @property
    def span_s(self) -> float:
        """From the first arrival to the last."""
        return self.jobs[-1].arrival_s - self.jobs[0].arrival_s if self.jobs else 0.0

    def work_s(self, machine: Machine) -> float:
        """Device time that all of it takes at full batches."""
        return sum(
            machine.work_s(call, call.prompt_tokens - new)
            for job in self.jobs
            for call, new in zip(job.calls, job.new_prompts(machine.share_prefixes), strict=True)
        )

    def at_load(self, load: float, machine: Machine, devices: int = 1) -> Trace:
        """The same jobs with arrivals stretched so that work comes at ``load`` times the rate
        at which full batches are worked off. Above 1 it is a finite overload."""
        span = self.work_s(machine) / devices / load
        factor = span / self.span_s if self.span_s > 0 else 1.0
        start = self.jobs[0].arrival_s
        jobs = [replace(j, arrival_s=(j.arrival_s - start) * factor) for j in self.jobs]
        return Trace(self.name, jobs, self.weights)
