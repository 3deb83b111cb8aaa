"""Simulate policies on a trace.

    python -m llmos.kernel.simulation TRACE [--policy fcfs,serpt,fair] [--load 1.2]

TRACE is a file (Mooncake JSONL, Azure CSV, recorded agent runs) or the name of a made-up one
(``agents``, ``backlog``). Figures are relative to the first policy.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from llmos.drivers.errors import LlmosError
from llmos.drivers.protocols import StepTime
from llmos.kernel.simulation import report, traces
from llmos.kernel.simulation.jobs import MACHINES, Job, Machine, Trace
from llmos.kernel.simulation.run import NAMES, simulate
from llmos.kernel.simulation.world import Outcome

PAST_SEED = 1_000_003
"""Added to the seed of a made-up trace: what the policies have seen before is another one."""


def parser() -> argparse.ArgumentParser:
    """What the command takes."""
    made = argparse.ArgumentParser("python -m llmos.kernel.simulation", description=__doc__)
    made.formatter_class = argparse.RawDescriptionHelpFormatter
    add = made.add_argument
    add("trace", metavar="TRACE")
    add("--policy", default="fcfs,serpt,fair", help=f"of {', '.join(NAMES)}; with commas")
    add("--load", type=float, help="stretch arrivals; 1 is what the devices can do")
    add("--jobs", type=int, help="so many jobs (made-up: 2000; recorded: all)")
    add("--seed", type=int, default=0)
    add("--tenants", type=int, help="deal the jobs out to so many tenants")
    add("--models", type=int, default=1, help="deal the jobs out to so many models")
    add("--devices", type=int, default=1, help="each with a replica of every model")
    add("--machine", choices=sorted(MACHINES), default="gpu")
    add("--step-time", type=Path, help="JSON with the fields of an engine's StepTime")
    add("--seats", type=int, help="requests in a batch at the same time")
    add("--kv-tokens", type=int)
    add("--no-prefixes", action="store_true", help="remember no prefixes")
    add("--cold", action="store_true", help="policies know nothing of the programs yet")
    add("--plots", type=Path, metavar="FOLDER", help="write SVG files there")
    add("--json", action="store_true")
    return made


def machine(given: argparse.Namespace) -> Machine:
    """The machine that the options describe."""
    made = MACHINES[given.machine]
    if given.step_time is not None:
        fields = json.loads(given.step_time.read_text("utf-8"))
        made = dataclasses.replace(made, step=StepTime(**fields))
    return dataclasses.replace(
        made,
        seats=given.seats or made.seats,
        kv_tokens=given.kv_tokens or made.kv_tokens,
        share_prefixes=made.share_prefixes and not given.no_prefixes,
    )


def load(given: argparse.Namespace, on: Machine, seed: int) -> Trace:
    """The trace that the options describe.

    Raises:
        TraceError: it cannot be read.
    """
    if given.trace in traces.MADE_UP:
        trace = traces.MADE_UP[given.trace](given.jobs or 2000, seed)
    else:
        trace = traces.read(Path(given.trace), limit=given.jobs)

    def dealt(job: Job) -> Job:
        # A multiplier, so that neighbours do not fall to tenants and models in step.
        lot = job.number * 2_654_435_761 >> 8
        tenant = f"tenant{lot % given.tenants}" if given.tenants else job.tenant
        model = f"model{(lot >> 8) % given.models}" if given.models > 1 else job.model
        return dataclasses.replace(job, tenant=tenant, model=model)

    trace = Trace(trace.name, [dealt(j) for j in trace.jobs], trace.weights)
    if given.load is not None:
        trace = trace.at_load(given.load, on, given.devices)
    return trace


def show(results: dict[str, dict[str, Any]], trace: Trace) -> None:
    """Print a table, relative to the first policy."""
    table = Table(title=f"{trace.name}: {len(trace.jobs)} jobs, {trace.requests} requests")
    for name in ("policy", "mean", "", "p50", "p95", "p99", "", "longest wait", "gap", "cached"):
        table.add_column(name, justify="left" if name == "policy" else "right")
    base = next(iter(results.values()))["completion_s"]
    for name, found in results.items():
        times = found["completion_s"]
        table.add_row(
            name,
            f"{times['mean']:.1f} s",
            f"{base['mean'] / times['mean']:.2f} ×",
            *(f"{times[p]:.1f}" for p in ("p50", "p95", "p99")),
            f"{base['p99'] / times['p99']:.2f} ×",
            f"{found['longest_wait_s']:.1f}",
            f"{found['gap_tokens']:.0f}",
            f"{found['cached_share']:.0%}",
        )
    Console(width=110).print(table)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run; returns the exit code."""
    given = parser().parse_args(arguments)
    names = given.policy.split(",")
    unknown = [n for n in names if n not in NAMES]
    if unknown:
        parser().error(f"no policy {unknown[0]!r}; known: {', '.join(NAMES)}")
    outcomes: dict[str, Outcome] = {}
    results: dict[str, dict[str, Any]] = {}
    try:
        on = machine(given)
        trace = load(given, on, given.seed)
        made_up = given.trace in traces.MADE_UP
        past = None if given.cold or not made_up else load(given, on, given.seed + PAST_SEED)
        for name in names:
            started = time.perf_counter()
            outcomes[name] = simulate(trace, name, on, devices=given.devices, past=past)
            results[name] = report.figures(outcomes[name])
            results[name]["took_s"] = time.perf_counter() - started
    except (LlmosError, OSError, ValueError, TypeError) as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        return 1
    files = report.plots(outcomes, given.plots) if given.plots else []
    if given.json:
        print(json.dumps({"trace": trace.name, "load": given.load, "policies": results}))  # noqa: T201
    else:
        show(results, trace)
        for file in files:
            print(file)  # noqa: T201
    return 0


if __name__ == "__main__":
    sys.exit(main())
