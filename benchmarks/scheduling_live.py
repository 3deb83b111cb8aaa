"""The simulator against the engine itself, and the fairness of a policy in it.

One engine with SmolLM2 on one thread, no kernel around it. It is asked for its own step times,
the simulator is given them and the same jobs, and what it predicts is compared with what the
engine then takes. Whatever else this machine does meanwhile counts as an error of the
prediction; the error with step times fitted to the same round is told beside it.
"""

from __future__ import annotations

import dataclasses
import random
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from benchmarks.engine_rig import PAGE_TOKENS, WAIT_S, load_tokenizer, make_prompts
from llmos.drivers.engines.causal import TransformersCausalEngine
from llmos.drivers.protocols import (
    EngineOptions,
    GenerationChunk,
    GenerationJob,
    QueuedRequest,
    QueuePolicy,
    SamplingParams,
    Standing,
)
from llmos.kernel.core import policies
from llmos.kernel.core.history import Cost
from llmos.kernel.simulation.jobs import Call, Job, Machine, Trace
from llmos.kernel.simulation.report import percentile
from llmos.kernel.simulation.run import simulate

TENANTS = ("north", "east", "west")
KV_TOKENS = 1024
STEP_TOKENS = 128


@dataclasses.dataclass(frozen=True, slots=True)
class Asked:
    """A job of the simulator, and the prompt that makes it one of the engine."""

    job: Job
    text: str


def staggered(path: Path, jobs: int, seed: int, every_s: float) -> list[Asked]:
    """Jobs of one call each that come one after the other, from three tenants in turn."""
    chance = random.Random(seed)
    lengths = [chance.randint(24, 160) for _ in range(jobs)]
    at = 0.0
    found = []
    for number, prompt in enumerate(make_prompts(load_tokenizer(path), lengths)):
        found.append(_asked(number, TENANTS[number % 3], at, prompt, chance.randint(1, 4)))
        at += chance.expovariate(1 / every_s)
    return found


def backlog(path: Path, jobs: int) -> list[Asked]:
    """Two tenants whose jobs are all there at the beginning, first those of the one that asks
    for more."""
    chance = random.Random(5)
    heavy = [chance.randint(64, 128) for _ in range(jobs)]
    light = [chance.randint(16, 48) for _ in range(2 * jobs)]
    prompts = make_prompts(load_tokenizer(path), heavy + light)
    return [
        _asked(n, "heavy" if n < jobs else "light", 0.0, prompt, 3 if n < jobs else 1)
        for n, prompt in enumerate(prompts)
    ]


def _asked(number: int, tenant: str, at: float, prompt: Any, pages: int) -> Asked:
    # Whole blocks of the KV cache, which the simulator does not know.
    new = PAGE_TOKENS * pages + -len(prompt.ids) % PAGE_TOKENS
    job = Job(number, tenant, "bench", at, (Call(len(prompt.ids), new, new),))
    return Asked(job, prompt.text)


def options(path: Path) -> EngineOptions:
    """One thread, little KV cache so that jobs wait for it, and nothing remembered."""
    return EngineOptions(
        "live",
        path,
        threads=1,
        kv_tokens=KV_TOKENS,
        max_batch_tokens=STEP_TOKENS,
        share_prefixes=False,
    )


def machine(engine: TransformersCausalEngine) -> Machine:
    """The engine as the simulator sees it, with the step times that it knows by now.

    Raises:
        RuntimeError: it has measured none.
    """
    step = engine.step_time()
    if step is None:
        raise RuntimeError("the engine has not measured its steps")
    return Machine(
        step,
        seats=STEP_TOKENS,
        kv_tokens=KV_TOKENS,
        max_batch_tokens=STEP_TOKENS,
        share_prefixes=False,
    )


def run(
    engine: TransformersCausalEngine, asked: Sequence[Asked], policy: QueuePolicy
) -> dict[int, float]:
    """Hand the jobs to the engine when they are due; seconds from there to their ends.

    Raises:
        TimeoutError: not all ended within ``WAIT_S``.
        LlmosError: what a job failed with.
    """
    engine.use_policy(policy)
    ended: dict[int, float] = {}
    errors: list[Exception] = []
    left = threading.Semaphore(0)

    def listener(number: int) -> Callable[[GenerationChunk], None]:
        def deliver(chunk: GenerationChunk) -> None:
            if chunk.finish is None:
                return
            if chunk.error is not None:
                errors.append(chunk.error)
            ended[number] = time.monotonic()
            left.release()

        return deliver

    began = time.monotonic()
    for one in asked:
        time.sleep(max(0.0, began + one.job.arrival_s - time.monotonic()))
        job, call = one.job, one.job.calls[0]
        params = SamplingParams(max_new_tokens=call.max_new_tokens, ignore_eos=True)
        engine.submit(
            GenerationJob(
                f"live-{job.number}",
                one.text,
                params,
                tenant=job.tenant,
                agent=job.agent,
                turn=str(job.number),
            ),
            listener(job.number),
        )
    for _ in asked:
        if not left.acquire(timeout=WAIT_S):
            raise TimeoutError(f"not all of {len(asked)} jobs ended within {WAIT_S} s")
    if errors:
        raise errors[0]
    return {a.job.number: ended[a.job.number] - began - a.job.arrival_s for a in asked}


class Watched:
    """A policy, and the largest gap of served work between two tenants that always wait: as the
    simulator measures it."""

    def __init__(self, policy: QueuePolicy) -> None:
        self._policy, self._cost = policy, Cost()
        self._waiting: dict[str, str] = {}
        """Tenant by key."""
        self._served: dict[str, float] = {}
        self._range: tuple[float, float] | None = None
        self.largest = 0.0

    def add(self, request: QueuedRequest, now_s: float) -> None:
        """A job waits from now on."""
        self._waiting[request.key] = request.tenant
        self._policy.add(request, now_s)

    def remove(self, key: str, now_s: float) -> None:
        """A job waits no longer."""
        del self._waiting[key]
        self._policy.remove(key, now_s)

    def first(self, now_s: float) -> str | None:
        """Who enters next; between two steps, so everybody was charged for the last one."""
        self._look()
        return self._policy.first(now_s)

    def served(self, tenant: str, agent: str, read: int, written: int, now_s: float) -> None:
        """A step has read and written tokens for somebody."""
        self._served[tenant] = self._served.get(tenant, 0.0) + self._cost.of(read, written)
        self._policy.served(tenant, agent, read, written, now_s)

    def victim(self, running: Sequence[QueuedRequest], now_s: float) -> str | None:
        """Who gives way."""
        return self._policy.victim(running, now_s)

    def standing(self, key: str, now_s: float) -> Standing:
        """Where a job that waits stands."""
        return self._policy.standing(key, now_s)

    def _look(self) -> None:
        if len(set(self._waiting.values())) < 2:
            self._range = None
            return
        gap = self._served.get("heavy", 0.0) - self._served.get("light", 0.0)
        low, high = self._range or (gap, gap)
        self._range = low, high = min(low, gap), max(high, gap)
        self.largest = max(self.largest, high - low)


def error(path: Path, *, jobs: int = 24, rounds: int = 3, every_s: float = 0.5) -> dict[str, Any]:
    """``sim_live_error``: how far the predicted mean completion is off, the median of rounds."""
    found = []
    with closing(TransformersCausalEngine(options(path))) as engine:
        # The engine learns its step times from a round that does not count.
        run(engine, staggered(path, jobs // 2, 99, every_s), policies.make("fair"))
        for seed in range(rounds):
            asked = staggered(path, jobs, seed, every_s)
            trace = Trace("live", [a.job for a in asked])
            before = simulate(trace, "fair", machine(engine)).completion_s
            took = run(engine, asked, policies.make("fair"))
            after = simulate(trace, "fair", machine(engine)).completion_s
            live = statistics.fmean(took.values())
            found.append(
                {
                    "live_mean_s": live,
                    "predicted_mean_s": statistics.fmean(before.values()),
                    "hindsight_mean_s": statistics.fmean(after.values()),
                    "live_p95_s": percentile(list(took.values()), 0.95),
                    "predicted_p95_s": percentile(list(before.values()), 0.95),
                }
            )
        step = machine(engine).step
    errors = [abs(r["predicted_mean_s"] / r["live_mean_s"] - 1) for r in found]
    hindsight = [abs(r["hindsight_mean_s"] / r["live_mean_s"] - 1) for r in found]
    return {
        "sim_live_error": statistics.median(errors),
        "sim_live": {
            "errors": errors,
            "errors_in_hindsight": hindsight,
            "rounds": found,
            "step_time": dataclasses.asdict(step),
        },
    }


def gaps(path: Path, jobs: int = 16) -> dict[str, Any]:
    """Gaps of two tenants that always wait in the engine, and the policy's bound."""
    asked = backlog(path, jobs)
    cost = Cost()
    longest = max(a.job.calls[0].prompt_tokens for a in asked)
    found = {}
    with closing(TransformersCausalEngine(options(path))) as engine:
        for name in ("fair", "fcfs"):
            watched = Watched(policies.make(name))
            run(engine, asked, watched)
            found[name] = watched.largest
    return {
        "gap_tokens": {"live": found},
        "gap_bound_tokens": {"live": 2 * max(cost.read * longest, cost.written * KV_TOKENS)},
    }
