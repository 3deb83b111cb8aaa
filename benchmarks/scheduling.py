"""Policies of the queue against first come, first served, in the simulator.

    python -m benchmarks.scheduling [--json] [--only completion,recorded,fairness,flood,decision,
        ledger,live] [--seeds 5] [--jobs 4000] [--machine gpu] [--traces FOLDER]
        [--smollm2 FOLDER] [--minilm FOLDER]

- *completion*: made-up agents of several steps with heavy tails, at loads from 0.5 to 3 times
  what the device can do (above 1: a finite overload). For each policy the mean and the 99th
  percentile of the time from a turn's arrival to the end of its last call, as a ratio to first
  come, first served on the same turns (above 1: better), the mean over the seeds. Policies with
  a history have seen another trace of the same programs before. ``shortest-known`` sorts single
  requests by what is known of them, ``shortest-request`` by their true lengths, ``srpt`` turns
  by their true lengths. *saving of the clairvoyant*: how much of the time that srpt saves
  against first come, first served is saved without knowing the future.
- *recorded*: the same ratios on recorded traces, where their files are at hand.
- *fairness*: two tenants that always have something waiting; the largest gap of served work.
- *flood*: a calm tenant alone, and beside one that asks for 20 times more than there is.
- *decision*: microseconds to name the first, take it out and put another in, with 100,000
  waiting.
- *ledger*: predicted bytes of models against those that loaded engines say they keep
  (:mod:`benchmarks.scheduling_memory`).
- *live*: the predicted mean completion time against that of the engine itself with SmolLM2, and
  the gap of two tenants in it (:mod:`benchmarks.scheduling_live`). Left out where the model is
  not at hand.

What is simulated is exactly repeatable; only *decision* and *live* measure this machine.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from llmos.drivers.protocols import QueuedRequest
from llmos.kernel.core import policies
from llmos.kernel.core.history import Cost
from llmos.kernel.settings import Settings
from llmos.kernel.simulation import traces
from llmos.kernel.simulation.jobs import MACHINES, Call, Job, Machine, Trace
from llmos.kernel.simulation.report import figures, percentile
from llmos.kernel.simulation.run import simulate

LOADS = (0.5, 0.8, 0.95, 1.2, 2.0, 3.0)
COMPARED = ("serpt", "fair", "las", "shortest-known", "shortest-request", "srpt")
PAST_SEED = 10_007
RECORDED = {
    "mooncake": "mooncake_conversation_trace.jsonl",
    "azure": "azure2023_conv.csv",
    "agent-runs": "gpt4o_trajectories_calls.jsonl",
}
console = Console(stderr=True, width=110)


def completion(machine: Machine, jobs: int, seeds: int) -> dict[str, Any]:
    """Ratios to fcfs by load and policy; above 1 is better."""
    found: dict[str, Any] = {}
    for load in LOADS:
        ratios: dict[str, list[tuple[float, float]]] = {}
        savings: dict[str, list[float]] = {}
        longest: dict[str, list[float]] = {}
        for seed in range(seeds):
            trace = traces.agents(jobs, seed=seed).at_load(load, machine)
            past = traces.agents(jobs, seed=seed + PAST_SEED)
            base = figures(simulate(trace, "fcfs", machine, watch_gap=False))
            means = {"fcfs": base["completion_s"]["mean"]}
            for name in COMPARED:
                other = figures(simulate(trace, name, machine, past=past, watch_gap=False))
                times = other["completion_s"]
                means[name] = times["mean"]
                ratios.setdefault(name, []).append(
                    (means["fcfs"] / times["mean"], base["completion_s"]["p99"] / times["p99"])
                )
                longest.setdefault(name, []).append(
                    other["longest_wait_s"] / max(base["longest_wait_s"], 1e-9)
                )
            possible = means["fcfs"] - means["srpt"]
            for name in ("serpt", "fair"):
                if possible > 0.01 * means["fcfs"]:
                    savings.setdefault(name, []).append((means["fcfs"] - means[name]) / possible)
        found[str(load)] = {
            name: {
                "mean": statistics.fmean(m for m, _ in pairs),
                "mean_worst_seed": min(m for m, _ in pairs),
                "p99": statistics.fmean(p for _, p in pairs),
                "longest_wait": statistics.fmean(longest[name]),
            }
            for name, pairs in ratios.items()
        } | {"saving_of_clairvoyant": {n: statistics.fmean(s) for n, s in savings.items()}}
    return found


def recorded(folder: Path, machine: Machine) -> dict[str, Any]:
    """The same on recorded traces at load 1.2; those without a file are left out."""
    found: dict[str, Any] = {}
    for name, pattern in RECORDED.items():
        file = next(iter(sorted(folder.rglob(pattern))), None)
        if file is None:
            continue
        trace = traces.read(file).at_load(1.2, machine)
        base = figures(simulate(trace, "fcfs", machine, watch_gap=False))["completion_s"]
        found[name] = {"requests": trace.requests}
        for policy in ("serpt", "las", "shortest-request", "srpt"):
            other = figures(simulate(trace, policy, machine, watch_gap=False))
            times = other["completion_s"]
            found[name][policy] = {
                "mean": base["mean"] / times["mean"],
                "p99": base["p99"] / times["p99"],
                "cached_share": other["cached_share"],
            }
    return found


def fairness(machine: Machine, jobs: int) -> dict[str, Any]:
    """Gaps of two tenants that always have something waiting."""
    trace = traces.backlog(jobs, seed=1)
    # Work as in the policy: a token written counts twice.
    cost = Cost()
    bound = 2 * max(
        cost.read * max(c.prompt_tokens for j in trace.jobs for c in j.calls),
        cost.written * machine.kv_tokens,
    )
    # M, as far as the seats allow: what can be in the batch at once.
    inside = machine.seats * max(
        c.prompt_tokens + c.max_new_tokens for j in trace.jobs for c in j.calls
    )
    gaps = {n: simulate(trace, n, machine).gap_tokens for n in ("fcfs", "fair", "fair-fcfs")}
    return {
        "gap_tokens": {"simulated": gaps},
        "gap_bound_tokens": {"simulated": min(bound, 2 * cost.written * inside)},
        "gap_fcfs_over_fair": gaps["fcfs"] / max(gaps["fair"], 1.0),
    }


def flood(machine: Machine, jobs: int) -> dict[str, Any]:
    """The 95th percentile of a calm tenant's requests, with a flood beside it over without.

    Steps are kept short (256 tokens), since a step that reads prompts holds up all that
    write; how long steps may be is the engine's choice, not the queue's.
    """
    machine = dataclasses.replace(machine, max_batch_tokens=256)
    chance = random.Random(4)

    def asked(number: int, tenant: str, at: float) -> Job:
        call = Call(chance.randint(100, 400), chance.randint(32, 160), 256)
        return Job(number, tenant, "chat", at, (call,))

    calm = [asked(n, "calm", 0.0) for n in range(jobs)]
    work = Trace("calm", calm).work_s(machine)
    # A fifth of the device: within the tenant's share by any measure.
    calm = [dataclasses.replace(j, arrival_s=5 * work * n / jobs) for n, j in enumerate(calm)]
    more = [asked(jobs + n, "flood", 0.0) for n in range(20 * jobs)]
    # It asks for 20 times as much, in bursts of 100.
    more = [
        dataclasses.replace(j, arrival_s=5 * work * (n // 100) / (len(more) / 100))
        for n, j in enumerate(more)
    ]

    def p95(trace: Trace, policy: str) -> float:
        times = simulate(trace, policy, machine, watch_gap=False).completion_s
        return percentile([times[j.number] for j in calm], 0.95)

    both = Trace("flood", sorted([*calm, *more], key=lambda j: j.arrival_s))
    alone = p95(Trace("calm", calm), "fair")
    return {name: p95(both, name) / alone for name in ("fair", "fair-fcfs", "serpt", "fcfs")}


def decision_us(name: str, waiting: int = 100_000) -> float:
    """Microseconds of first, remove and add, the median of some rounds."""
    policy = policies.make(name)
    chance = random.Random(7)

    def anybody(number: int, now_s: float) -> QueuedRequest:
        tenant = f"t{chance.randrange(50)}"
        agent = f"{tenant}/p{chance.randrange(20)}/a{chance.randrange(5000)}"
        return QueuedRequest(
            f"r{number}", tenant, agent, chance.randint(1, 4000), chance.randint(1, 1000),
            chance.randint(0, 9), now_s + chance.uniform(0, 100), now_s, 0, f"{number % 70_000}",
        )  # fmt: skip

    for number in range(waiting):
        policy.add(anybody(number, number * 1e-3), number * 1e-3)
    rounds = []
    now_s = waiting * 1e-3
    for part in range(20):
        coming = [anybody(waiting + part * 500 + n, now_s) for n in range(500)]
        started = time.perf_counter()
        for request in coming:
            key = policy.first(now_s)
            assert key is not None
            policy.remove(key, now_s)
            policy.add(request, now_s)
        rounds.append((time.perf_counter() - started) / len(coming) * 1e6)
        now_s += 0.5
    return statistics.median(rounds)


def live(smollm2: Path | None) -> dict[str, Any]:
    """The engine itself, where its model is at hand."""
    if smollm2 is None:
        console.print("live: no SmolLM2 at hand")
        return {}
    from benchmarks import scheduling_live

    return scheduling_live.error(smollm2) | scheduling_live.gaps(smollm2)


def ledger(smollm2: Path | None, minilm: Path | None) -> dict[str, Any]:
    """Predictions of memory."""
    from benchmarks import scheduling_memory

    return scheduling_memory.ledger(smollm2, minilm)


def _folder(given: Path | None, name: str) -> Path | None:
    """The folder of a model: the one given, else that of the model store, if it is there."""
    path = given or Path(Settings().models_dir) / name
    return path if (path / "config.json").is_file() else None


def join(found: dict[str, Any], more: dict[str, Any]) -> None:
    """Add a section's keys; several sections fill one object of some of them."""
    for name, value in more.items():
        if isinstance(value, dict) and isinstance(found.get(name), dict):
            found[name] |= value
        else:
            found[name] = value


def show(found: dict[str, Any]) -> None:
    """Tables for people."""
    if "completion" in found:
        table = Table(
            title="Times of turns, relative to first come, first served (above 1: better)"
        )
        table.add_column("load", justify="right")
        for name in COMPARED:
            table.add_column(f"{name}\nmean / p99", justify="right")
        table.add_column("saving of the\nclairvoyant", justify="right")
        for load, row in found["completion"].items():
            saving = row["saving_of_clairvoyant"].get("serpt")
            table.add_row(
                load,
                *(f"{row[n]['mean']:.2f} / {row[n]['p99']:.2f}" for n in COMPARED),
                f"{saving:.0%}" if saving is not None else "",
            )
        console.print(table)
    for name in (
        "recorded", "gap_tokens", "gap_bound_tokens", "flood_p95_ratio", "ledger_prediction_error",
        "sim_live_error", "sim_live",
    ):  # fmt: skip
        if name in found:
            console.print(name, found[name])
    if "decision_us_at_100k" in found:
        console.print(
            "µs a decision", {n: round(t, 1) for n, t in found["decision_us_at_100k"].items()}
        )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run; returns the exit code."""
    parser = argparse.ArgumentParser("python -m benchmarks.scheduling")
    sections = ("completion", "recorded", "fairness", "flood", "decision", "ledger", "live")
    parser.add_argument("--only", default=",".join(sections))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=4000)
    parser.add_argument("--machine", choices=sorted(MACHINES), default="gpu")
    parser.add_argument("--no-prefixes", action="store_true", help="remember no prefixes")
    parser.add_argument("--traces", type=Path, default=Path("../shared/data"))
    parser.add_argument("--smollm2", type=Path, help="folder of SmolLM2-135M-Instruct")
    parser.add_argument("--minilm", type=Path, help="folder of all-MiniLM-L6-v2")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args(arguments)
    chosen = given.only.split(",")
    if unknown := set(chosen) - set(sections):
        parser.error(f"no section {', '.join(sorted(unknown))}; known: {', '.join(sections)}")
    machine = MACHINES[given.machine]
    if given.no_prefixes:
        machine = dataclasses.replace(machine, share_prefixes=False)
    smollm2 = _folder(given.smollm2, "smollm2-135m-instruct")
    minilm = _folder(given.minilm, "minilm-l6")
    found: dict[str, Any] = {"machine": given.machine, "prefixes": machine.share_prefixes}
    work: dict[str, Callable[[], dict[str, Any]]] = {
        "completion": lambda: {"completion": completion(machine, given.jobs, given.seeds)},
        "recorded": lambda: {"recorded": recorded(given.traces, machine)},
        "fairness": lambda: fairness(machine, given.jobs),
        "flood": lambda: {"flood_p95_ratio": flood(machine, max(50, given.jobs // 10))},
        "decision": lambda: {"decision_us_at_100k": {n: decision_us(n) for n in policies.NAMES}},
        "ledger": lambda: ledger(smollm2, minilm),
        "live": lambda: live(smollm2),
    }
    for name in sections:
        if name in chosen:
            started = time.perf_counter()
            join(found, work[name]())
            console.print(f"{name}: {time.perf_counter() - started:.0f} s")
    if "completion" in found:
        found["saving_of_clairvoyant"] = {
            load: row["saving_of_clairvoyant"].get("serpt")
            for load, row in found["completion"].items()
        }
    show(found)
    if given.json:
        print(json.dumps(found))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
