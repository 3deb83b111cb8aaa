"""Durable messages per second, recovery after a lost host, and a million idle agents.

    python -m benchmarks.durability [--json] [--agents 1 64 256] [--pairs 5] [--seconds 4]
        [--registered 1000 10000 100000 1000000] [--dir DIR] [--dbos-python PATH]

- *messages*: N agents, each with one message under way. A turn changes the state, sends the
  next message and acknowledges the one it has; all of that is one commit, and the next turn
  begins when it is durable. An *acknowledgement* is the time from the beginning of one such
  turn to the beginning of the next.
- *raw*: the same number of callers, each waiting for an intent row and a result row of 300
  bytes that one thread commits in groups into SQLite: what this disk can do at best.
- *dbos*: the same number of workflows in DBOS Transact on SQLite, a step each.
- *recovery*: 1,000 agents in mid-turn when their host is killed; for each the time until its
  turn goes on in the next one.
- *registered*: stores with so many agents; bytes of each, the time to activate one, and how
  the time of a message to an agent that is not in memory grows.

Ours, raw and dbos take turns, and each figure is the median over the rounds. Everything is on
one machine, so they share its cores with the client, Ray and each other's leftovers: believe
ratios.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgpack
import psutil
from rich.console import Console
from rich.table import Table

from benchmarks import durable_programs as p
from llmos.drivers.registry import driver
from llmos.drivers.stores.rows import LaunchRow, PutLaunch, SaveAgent
from llmos.kernel.client import Kernel
from llmos.kernel.settings import Settings
from llmos.kernel.system import SystemConfig

PROGRAM = "benchmarks.durable_programs:Bench"
LAUNCH = "bench/bench/*"
STATE_BYTES = 100
"""State of a registered agent."""
RECOVERING = 1_000
"""Agents in mid-turn when their host is killed."""
ACTIVATED = 400
"""Agents activated, of each number registered."""
CALLS = 2_000


def agent(number: int) -> str:
    """The name of an agent."""
    return f"bench/bench/a{number}"


@contextmanager
def kernel(folder: Path, name: str) -> Iterator[Kernel]:
    """A kernel with one host, with its store in this folder."""
    settings = Settings(home=folder, log_level="WARNING")
    text = f'[system]\nname = "{name}"\n[[devices]]\ndriver = "cpu"\nmemory = "1GiB"\nthreads = 1\n'
    system = SystemConfig.parse(text, "benchmark", Path.cwd())
    with Kernel.boot(system, settings=settings) as booted:
        booted.launch(PROGRAM, "*", tenant="bench")
        yield booted


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which that share of them is."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else float("nan")


def cpu_s() -> float:
    """CPU-seconds of this process and all below it, so far."""
    total = 0.0
    for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
        try:
            times = process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += times.user + times.system
    return total


# ---------------------------------------------------------------- messages


def messages(booted: Kernel, agents: int, seconds: float) -> dict[str, float]:
    """One round of ours."""
    booted.ask(agent(0), p.Hops(), p.HopTimes)
    before, started = cpu_s(), time.monotonic()
    until = time.time() + seconds

    async def begin() -> None:
        await asyncio.gather(
            *(booted.aio.tell(agent(n), p.Tick(until=until)) for n in range(agents))
        )

    booted.start(begin()).result(60)
    time.sleep(max(0.0, until - time.time()) + 0.5)
    times = booted.ask(agent(0), p.Hops(), p.HopTimes, deadline_s=60).seconds
    elapsed = time.monotonic() - started - 0.5
    return {
        "messages_per_s": len(times) / elapsed,
        "ack_p50_ms": percentile(times, 0.5) * 1000,
        "ack_p99_ms": percentile(times, 0.99) * 1000,
        "cpu_us_per_message": (cpu_s() - before) / max(len(times), 1) * 1e6,
    }


def peer(name: str, agents: int, seconds: float, folder: Path, extra: Sequence[str]) -> Any:
    """One round of a peer, in a process of its own; None if it is not installed."""
    command = [sys.executable, "-m", "benchmarks.durability_peers", name]
    command += ["--agents", str(agents), "--seconds", str(seconds)]
    command += ["--dir", str(folder), "--json", *extra]
    done = subprocess.run(command, capture_output=True, text=True, timeout=seconds + 120)
    if done.returncode:
        raise SystemExit(f"{name} failed:\n{done.stdout}{done.stderr}")
    result = json.loads(done.stdout.strip().splitlines()[-1])
    return result if result.get("messages_per_s") is not None else None


def measure_messages(args: argparse.Namespace, folder: Path, tell: Any) -> dict[str, Any]:
    """Ours, raw and dbos in turns."""
    out: dict[str, Any] = {
        k: {} for k in ("messages_per_s", "ack_p50_ms", "ack_p99_ms", "cpu_us_per_message")
    }
    out |= {"raw_commit_limit_per_s": {}, "dbos_steps_per_s": {}, "of_raw": {}, "of_dbos": {}}
    extra = ["--dbos-python", args.dbos_python] if args.dbos_python else []
    with kernel(folder / "ours", "durability") as booted:
        for n in args.agents:
            ours, raws, dbos = [], [], []
            messages(booted, n, 1.0)
            for number in range(args.pairs):
                ours.append(messages(booted, n, args.seconds))
                raws.append(peer("raw", n, args.seconds, folder, [])["messages_per_s"])
                steps = peer("dbos", n, args.seconds, folder, extra)
                if steps is not None:
                    dbos.append(steps["messages_per_s"])
                tell(f"{n} agents, round {number + 1}: {ours[-1]['messages_per_s']:.0f}/s")
            key = str(n)
            for name in ("messages_per_s", "ack_p50_ms", "ack_p99_ms", "cpu_us_per_message"):
                out[name][key] = statistics.median(o[name] for o in ours)
            out["raw_commit_limit_per_s"][key] = statistics.median(raws)
            out["of_raw"][key] = statistics.median(
                o["messages_per_s"] / r for o, r in zip(ours, raws, strict=True)
            )
            out["dbos_steps_per_s"][key] = statistics.median(dbos) if dbos else None
            out["of_dbos"][key] = (
                statistics.median(o["messages_per_s"] / d for o, d in zip(ours, dbos, strict=True))
                if dbos
                else None
            )
        tell("syscalls and messages")
        calls = booted.ask(agent(0), p.Calls(count=CALLS), p.CallTimes, deadline_s=60).seconds
        out["dispatch_p50_us"] = percentile(calls, 0.5) * 1e6
        ways, trips = [], []
        for _ in range(300):
            started = time.monotonic()
            touched = booted.ask(agent(0), p.Touch(), p.Touched)
            trips.append(time.monotonic() - started)
            ways.append(touched.at - started)
        out["message_p50_ms"] = percentile(ways, 0.5) * 1000
        out["ask_p50_ms"] = percentile(trips, 0.5) * 1000
    return out


# ---------------------------------------------------------------- recovery


def measure_recovery(folder: Path, tell: Any) -> dict[str, float]:
    """Kill the host of 1,000 agents in mid-turn."""
    with kernel(folder / "recovery", "recovery") as booted:
        names = [agent(n) for n in range(RECOVERING)]

        async def begin() -> None:
            await asyncio.gather(*(booted.aio.tell(a, p.Work(seconds=20)) for a in names))

        booted.start(begin()).result(120)
        witness = agent(RECOVERING)
        while True:
            began = booted.ask(witness, p.Beginnings(), p.BeginTimes).at
            if len(began) == RECOVERING:
                break
            time.sleep(0.1)
        time.sleep(0.5)
        (pid,) = [s["pid"] for s in booted.status()["hosts"].values()]
        killed = time.time()
        os.kill(pid, signal.SIGKILL)
        while True:
            began = booted.ask(witness, p.Beginnings(), p.BeginTimes, deadline_s=60).at
            if len(began) == RECOVERING:
                break
            if time.time() > killed + 60:
                raise SystemExit(f"only {len(began)} of {RECOVERING} agents came back")
            time.sleep(0.1)
        after = [at - killed for at in began.values()]
    tell(f"recovery: p95 {percentile(after, 0.95):.2f} s")
    return {
        "recovery_p50_s": percentile(after, 0.5),
        "recovery_p95_s": percentile(after, 0.95),
        "recovery_max_s": max(after),
    }


# ---------------------------------------------------------------- registered agents


def register(path: Path, count: int) -> float:
    """A store with so many agents; returns its bytes for each."""
    store = driver("store", "sqlite")(path)
    row = LaunchRow(LAUNCH, PROGRAM, bytes(msgpack.packb({})), "benchmark", time.time())
    store.commit([[PutLaunch(row)]])
    state = json.dumps({"total": 0, "note": "x" * (STATE_BYTES - 22)})
    for start in range(0, count, 10_000):
        part = [
            SaveAgent(agent(n), 0, state.encode(), 1, 1)
            for n in range(start, min(start + 10_000, count))
        ]
        store.commit([part])
    store.close()
    return path.stat().st_size / count


def measure_registered(counts: Sequence[int], folder: Path, tell: Any) -> dict[str, Any]:
    """How things grow with the number of agents that are registered."""
    growth: dict[str, Any] = {}
    rng = random.Random(1)
    for count in counts:
        name = f"registered-{count}"
        home = folder / name
        path = Settings(home=home).runs_dir / name / "store.db"
        path.parent.mkdir(parents=True)
        bytes_each = register(path, count)
        with kernel(home, name) as booted:
            (pid,) = [s["pid"] for s in booted.status()["hosts"].values()]
            memory = psutil.Process(pid).memory_info().rss
            booted.ask(agent(0), p.Touch())
            chosen = rng.sample(range(1, count), min(ACTIVATED, count - 1))
            cold, warm = [], []
            for n in chosen:
                started = time.monotonic()
                cold.append(booted.ask(agent(n), p.Touch(), p.Touched).at - started)
            for n in chosen:
                started = time.monotonic()
                warm.append(booted.ask(agent(n), p.Touch(), p.Touched).at - started)
            activation = booted.status()["hosts"]["host:0"]["activation"]
        growth[str(count)] = {
            "idle_bytes_per_agent": bytes_each,
            "activation_p50_ms": activation["p50_s"] * 1000,
            "activation_p99_ms": activation["p99_s"] * 1000,
            "dispatch_cold_p50_ms": percentile(cold, 0.5) * 1000,
            "dispatch_warm_p50_ms": percentile(warm, 0.5) * 1000,
            "host_memory_bytes": memory,
        }
        tell(f"{count} registered: {bytes_each:.0f} bytes each")
    last = growth[str(counts[-1])]
    return {
        "idle_bytes_per_agent": last["idle_bytes_per_agent"],
        "activation_p99_ms": last["activation_p99_ms"],
        "growth": growth,
    }


# ---------------------------------------------------------------- report


def report(console: Console, result: dict[str, Any]) -> None:
    """The tables."""
    table = Table(title="Durable messages")
    for column in ("agents", "messages/s", "ack p50", "ack p99", "raw/s", "of raw", "DBOS/s", "x"):
        table.add_column(column, justify="right")
    for n, rate in result["messages_per_s"].items():
        dbos = result["dbos_steps_per_s"][n]
        table.add_row(
            n,
            f"{rate:.0f}",
            f"{result['ack_p50_ms'][n]:.1f} ms",
            f"{result['ack_p99_ms'][n]:.1f} ms",
            f"{result['raw_commit_limit_per_s'][n]:.0f}",
            f"{result['of_raw'][n]:.0%}",
            f"{dbos:.0f}" if dbos else "not installed",
            f"{result['of_dbos'][n]:.1f}" if dbos else "",
        )
    console.print(table)
    console.print(
        f"Syscall that does nothing: {result['dispatch_p50_us']:.1f} µs. Message from another "
        f"process to its handler: {result['message_p50_ms']:.2f} ms; with its reply, durable: "
        f"{result['ask_p50_ms']:.2f} ms."
    )
    console.print(
        f"{RECOVERING} agents in mid-turn go on after their host was killed: p50 "
        f"{result['recovery_p50_s']:.2f} s, p95 {result['recovery_p95_s']:.2f} s."
    )
    grown = Table(title="Registered agents")
    for column in ("agents", "bytes each", "activation p50", "p99", "cold", "warm", "host"):
        grown.add_column(column, justify="right")
    for n, row in result["growth"].items():
        grown.add_row(
            n,
            f"{row['idle_bytes_per_agent']:.0f}",
            f"{row['activation_p50_ms']:.2f} ms",
            f"{row['activation_p99_ms']:.2f} ms",
            f"{row['dispatch_cold_p50_ms']:.2f} ms",
            f"{row['dispatch_warm_p50_ms']:.2f} ms",
            f"{row['host_memory_bytes'] / 1e6:.0f} MB",
        )
    console.print(grown)


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description="Durable messages, recovery, idle agents.")
    parser.add_argument("--agents", type=int, nargs="+", default=[1, 64, 256])
    parser.add_argument("--pairs", type=int, default=5, help="rounds of ours, raw and dbos")
    parser.add_argument("--seconds", type=float, default=4.0, help="of a round")
    parser.add_argument(
        "--registered", type=int, nargs="+", default=[1_000, 10_000, 100_000, 1_000_000]
    )
    parser.add_argument("--dir", type=Path, help="where the stores are made; default: TMPDIR")
    parser.add_argument("--dbos-python", help="an interpreter that can import dbos")
    parser.add_argument("--json", action="store_true", help="one JSON object on the last line")
    args = parser.parse_args()
    console = Console(stderr=args.json)

    def tell(text: str) -> None:
        console.print(f"[dim]{text}[/dim]")

    with tempfile.TemporaryDirectory(prefix="durability-", dir=args.dir) as made:
        folder = Path(made)
        result: dict[str, Any] = {"cores": os.cpu_count(), "pairs": args.pairs}
        result |= measure_messages(args, folder, tell)
        result |= measure_recovery(folder, tell)
        result |= measure_registered(args.registered, folder, tell)
    report(console, result)
    if args.json:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
