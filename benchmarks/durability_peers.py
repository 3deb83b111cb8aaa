"""Durable steps per second of two peers, on this machine's disk.

    python -m benchmarks.durability_peers raw --agents 64 --seconds 5 --dir DIR --json
    python -m benchmarks.durability_peers dbos --agents 64 --seconds 5 --dir DIR --json \
        [--dbos-python PATH] [--journal delete] [--pool 20]

In both, ``--agents`` callers go round in a closed loop: each takes its next step when the
last one is durable, and a step carries about 300 bytes.

- raw: what this disk can do at best. One thread commits whatever waits (an intent row and
  a result row per step) as one transaction into SQLite, WAL, ``synchronous=FULL``.
- dbos: one workflow per caller in DBOS Transact on a SQLite system database with
  ``synchronous=FULL``; a step is one DBOS step, whose checkpoint DBOS writes by itself.
  Its default journal (``delete``) is replaced by WAL, and its pool of 20 connections by
  one, because both are faster here: SQLite has one writer, and connections that find it
  busy sleep. ``--journal delete --pool 20`` measures it as it comes.

The work is the same in every run; how many steps fit into the time is what is measured.
The first fifth of the time, at most a second, is not counted. SIGTERM and SIGINT end the
measurement early: what was measured is printed with ``interrupted`` set, and the exit
status is 128 and the signal. A peer that is not installed is told as such, with status 0.

Nothing but the standard library is imported, and dbos if it is there: so ``--dbos-python``
can be the interpreter of any environment that has dbos, and ours need not have it.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib
import importlib.metadata
import importlib.util
import json
import os
import signal
import sqlite3
import statistics
import sys
import tempfile
import threading
import time
from array import array
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any, TypeAlias

Step: TypeAlias = tuple[int, bytes, bytes, "asyncio.Future[None]"]
"""Primary key, intent, result, and who waits."""

BODY_BYTES = 300
CHECKPOINT_PAGES = 1000
"""SQLite's own default."""
SYNCS_PER_CHECKPOINT = 3
"""The log before it is copied, the database after, and the log's header when it begins anew."""
MAX_AGENTS = 4096
CLOSE_TIMEOUT_S = 30.0
NOT_INSTALLED = "not measured: pip install dbos"


def body(kind: str, agent: int, number: int) -> str:
    """What a step carries: the same in every run, and no two alike."""
    return f"{kind} {agent:06d} {number:09d} ".ljust(BODY_BYTES, "x")


class Stop:
    """Set by a signal or at the end of the time; read by every caller's loop."""

    def __init__(self) -> None:
        self.signal = 0
        self.asked = False

    def install(self) -> None:
        """From here on SIGTERM and SIGINT end the measurement, not the process. Once."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.signal, self.asked = number, True
        # The next one kills: a peer that hangs must not hold up whoever started us.
        signal.signal(number, signal.SIG_DFL)

    async def wait(self, seconds: float) -> None:
        """Return after some seconds, or soon after a signal."""
        end = time.perf_counter() + seconds
        # Looked at and not waited for: a signal handler may not touch a loop's event.
        while not self.asked and (left := end - time.perf_counter()) > 0:  # noqa: ASYNC110
            await asyncio.sleep(min(left, 0.05))


class Meter:
    """Counts steps and their latencies within the window that counts."""

    def __init__(self) -> None:
        self._on = False
        self._latencies = array("d")
        self._began = self._cpu = 0.0
        self.seconds = self.cpu_s = 0.0

    @property
    def steps(self) -> int:
        """Steps in the window so far."""
        return len(self._latencies)

    def add(self, latency_s: float) -> None:
        """One step is durable."""
        if self._on:
            self._latencies.append(latency_s)

    def begin(self) -> None:
        """Open the window."""
        self._began, self._cpu, self._on = time.perf_counter(), time.process_time(), True

    def end(self) -> None:
        """Close it."""
        self._on = False
        self.seconds = time.perf_counter() - self._began
        self.cpu_s = time.process_time() - self._cpu

    def figures(self) -> dict[str, Any]:
        """Rates and latencies; the latencies are None where no step ended."""
        times = sorted(self._latencies)
        return {
            "messages": len(times),
            "messages_per_s": round(len(times) / self.seconds, 1) if self.seconds else 0.0,
            "p50_ack_ms": _percentile_ms(times, 0.50),
            "p99_ack_ms": _percentile_ms(times, 0.99),
            "cpu_s": round(self.cpu_s, 3),
            "seconds": round(self.seconds, 3),
        }


def _percentile_ms(ordered: Sequence[float], share: float) -> float | None:
    if not ordered:
        return None
    return round(1000 * ordered[min(len(ordered) - 1, int(share * len(ordered)))], 3)


def fdatasync_ms(folder: Path, times: int = 50) -> float:
    """Median of appending a page and making it durable: how the disk is doing just now."""
    path, taken = folder / "fdatasync", []
    with path.open("wb", buffering=0) as file:
        for _ in range(times):
            began = time.perf_counter()
            file.write(bytes(4096))
            os.fdatasync(file.fileno())
            taken.append(time.perf_counter() - began)
    path.unlink()
    return round(1000 * statistics.median(taken), 3)


def _warm_up_s(seconds: float) -> float:
    return min(1.0, seconds / 5)


async def _warm_up(stop: Stop, seconds: float) -> None:
    """Let the callers run for the part of the time that is not counted."""
    await stop.wait(_warm_up_s(seconds))


async def _measure(meter: Meter, stop: Stop, seconds: float) -> None:
    """Let the callers run for the rest of the time, and tell them to stop."""
    meter.begin()
    await stop.wait(seconds - _warm_up_s(seconds))
    meter.end()
    stop.asked = True


# ---------------------------------------------------------------- raw


class GroupCommit:
    """One thread that commits whatever waits as one transaction."""

    def __init__(self, path: Path, loop: asyncio.AbstractEventLoop) -> None:
        self._path, self._loop = path, loop
        self._waiting: deque[Step] = deque()
        self._wake = threading.Event()
        self._closing = False
        self._broken: Exception | None = None
        self._keys = 0
        self.commits = self.checkpoints = 0
        self.settings = ""
        self._thread = threading.Thread(target=self._run, name="group-commit", daemon=True)
        self._thread.start()

    @property
    def syncs(self) -> int:
        """How often the disk was told to make things durable: once a commit, and checkpoints."""
        return self.commits + SYNCS_PER_CHECKPOINT * self.checkpoints

    def write(self, intent: bytes, result: bytes) -> asyncio.Future[None]:
        """Hand over one step; the future is done when it is durable. In the loop's thread."""
        if self._broken:
            raise self._broken
        done: asyncio.Future[None] = self._loop.create_future()
        self._keys += 1
        self._waiting.append((self._keys, intent, result, done))
        self._wake.set()
        return done

    def close(self) -> None:
        """Commit what waits and end the thread."""
        self._closing = True
        self._wake.set()
        self._thread.join(CLOSE_TIMEOUT_S)

    def _run(self) -> None:
        db = sqlite3.connect(self._path, isolation_level=None)
        steps: list[Step] = []
        try:
            (journal,) = db.execute("PRAGMA journal_mode=WAL").fetchone()
            db.execute("PRAGMA synchronous=FULL")
            (synchronous,) = db.execute("PRAGMA synchronous").fetchone()
            self.settings = f"{journal}, synchronous={synchronous}"
            # By hand, so that they can be counted.
            db.execute("PRAGMA wal_autocheckpoint=0")
            for table in ("intents", "results"):
                db.execute(f"CREATE TABLE {table} (id INTEGER PRIMARY KEY, body BLOB NOT NULL)")
            pages = 0
            while not (self._closing and not self._waiting):
                self._wake.wait()
                self._wake.clear()
                steps = [self._waiting.popleft() for _ in range(len(self._waiting))]
                if not steps:
                    continue
                db.execute("BEGIN IMMEDIATE")
                db.executemany("INSERT INTO intents VALUES (?, ?)", [(s[0], s[1]) for s in steps])
                db.executemany("INSERT INTO results VALUES (?, ?)", [(s[0], s[2]) for s in steps])
                db.execute("COMMIT")
                self.commits += 1
                self._loop.call_soon_threadsafe(_settle, steps, None)
                # Estimated: the last page of each table, and the pages that the rows fill.
                pages += 2 + len(steps) * 2 * BODY_BYTES // 4096
                steps = []
                if pages >= CHECKPOINT_PAGES:
                    db.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()
                    self.checkpoints, pages = self.checkpoints + 1, 0
        except sqlite3.Error as error:
            self._broken = error
            self._loop.call_soon_threadsafe(_settle, [*steps, *self._waiting], error)
        finally:
            db.close()


def _settle(steps: Sequence[Step], error: Exception | None) -> None:
    for *_, done in steps:
        if done.done():
            continue
        if error is None:
            done.set_result(None)
        else:
            done.set_exception(error)


async def raw(agents: int, seconds: float, folder: Path, stop: Stop) -> dict[str, Any]:
    """Measure the group commit."""
    meter = Meter()
    writer = GroupCommit(folder / "raw.sqlite", asyncio.get_running_loop())

    async def caller(agent: int) -> None:
        number = 0
        while not stop.asked:
            intent, result = body("intent", agent, number), body("result", agent, number)
            began = time.perf_counter()
            await writer.write(intent.encode(), result.encode())
            meter.add(time.perf_counter() - began)
            number += 1

    try:
        async with asyncio.TaskGroup() as tasks:
            for agent in range(agents):
                tasks.create_task(caller(agent))
            await _warm_up(stop, seconds)
            before = writer.commits, writer.syncs
            await _measure(meter, stop, seconds)
            commits, syncs = writer.commits - before[0], writer.syncs - before[1]
    finally:
        writer.close()
    return {
        **meter.figures(),
        "commits_per_s": round(commits / meter.seconds, 1),
        "fsyncs_per_s": round(syncs / meter.seconds, 1),
        "steps_per_commit": round(meter.steps / max(commits, 1), 2),
        "database": writer.settings,
    }


# ---------------------------------------------------------------- dbos


async def dbos(
    agents: int, seconds: float, folder: Path, stop: Stop, journal: str, pool: int
) -> dict[str, Any]:
    """Measure DBOS Transact. It must be importable."""
    api = importlib.import_module("dbos")
    path, meter = folder / "dbos.sqlite", Meter()
    # The journal mode is a property of the file, so DBOS takes it over.
    made = sqlite3.connect(path)
    made.execute(f"PRAGMA journal_mode={journal}")
    made.close()
    api.DBOS(
        config={
            "name": "durability-peer",
            "application_version": "1",
            "system_database_url": f"sqlite:///{path}",
            "sys_db_pool_size": pool,
            "log_level": "ERROR",
            # Workflows and their database calls run in these threads.
            "max_executor_threads": max(64, agents + 8),
        }
    )

    async def write(agent: int, number: int) -> str:
        return body("result", agent, number)

    step = api.DBOS.step()(write)

    async def loop(agent: int) -> None:
        number = 0
        while not stop.asked:
            began = time.perf_counter()
            await step(agent, number)
            meter.add(time.perf_counter() - began)
            number += 1

    workflow = api.DBOS.workflow()(loop)
    api.DBOS.launch()
    try:
        handles = [await api.DBOS.start_workflow_async(workflow, n) for n in range(agents)]
        await _warm_up(stop, seconds)
        await _measure(meter, stop, seconds)
        async with asyncio.timeout(CLOSE_TIMEOUT_S):
            for handle in handles:
                await handle.get_result()
    finally:
        stop.asked = True
        api.DBOS.destroy(workflow_completion_timeout_sec=int(CLOSE_TIMEOUT_S))
    kept = sqlite3.connect(path)
    (rows,) = kept.execute("SELECT count(*) FROM operation_outputs").fetchone()
    # Not set by DBOS, so a connection of ours has what its connections have.
    (synchronous,) = kept.execute("PRAGMA synchronous").fetchone()
    (mode,) = kept.execute("PRAGMA journal_mode").fetchone()
    kept.close()
    if rows < meter.steps:
        raise RuntimeError(f"DBOS kept {rows} checkpoints of {meter.steps} steps")
    return {
        **meter.figures(),
        "database": f"{mode}, synchronous={synchronous}",
        "pool": pool,
        "version": importlib.metadata.version("dbos"),
    }


# ---------------------------------------------------------------- command line


def run(args: argparse.Namespace, stop: Stop) -> dict[str, Any]:
    """Measure one peer; returns the object that ``--json`` prints."""
    result: dict[str, Any] = {"peer": args.peer, "agents": args.agents, "measured": True}
    if args.peer == "dbos" and importlib.util.find_spec("dbos") is None:
        return {**result, "measured": False, "why": NOT_INSTALLED}
    args.dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="durability-", dir=args.dir) as name:
        folder = Path(name)
        result["fdatasync_ms"] = fdatasync_ms(folder)
        if args.peer == "raw":
            work = raw(args.agents, args.seconds, folder, stop)
        else:
            work = dbos(args.agents, args.seconds, folder, stop, args.journal, args.pool)
        result |= asyncio.run(work)
    result["interrupted"] = bool(stop.signal)
    result["python"] = sys.version.split()[0]
    result["sqlite"] = sqlite3.sqlite_version
    return result


def told(result: dict[str, Any]) -> str:
    """For people."""
    head = f"{result['peer']}, {result['agents']} agents"
    if not result["measured"]:
        return f"{head}: {result['why']}"
    return (
        f"{head}: {result['messages_per_s']:,} messages/s, "
        f"p50 {result['p50_ack_ms']} ms, p99 {result['p99_ack_ms']} ms, "
        f"{result['cpu_s']} CPU-s in {result['seconds']} s "
        f"({result['database']}; fdatasync {result['fdatasync_ms']} ms)"
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("peer", choices=["raw", "dbos"])
    parser.add_argument("--agents", type=int, default=64, help="callers at the same time")
    parser.add_argument("--seconds", type=float, default=5.0, help="warm-up included")
    parser.add_argument(
        "--dir", type=Path, required=True, help="a folder on the disk to measure; made if need be"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object on the last line")
    parser.add_argument("--dbos-python", type=Path, help="an interpreter that can import dbos")
    parser.add_argument("--journal", choices=["wal", "delete"], default="wal", help="dbos only")
    parser.add_argument("--pool", type=int, default=1, help="dbos only: database connections")
    return parser


def main() -> None:
    """Entry point."""
    parser = _parser()
    args = parser.parse_args()
    if not 1 <= args.agents <= MAX_AGENTS:
        parser.error(f"--agents takes a number from 1 to {MAX_AGENTS}")
    if not 0 < args.seconds <= 3600:
        parser.error("--seconds takes a number above 0, at most 3600")
    if args.pool < 1:
        parser.error("--pool takes a number from 1")
    if args.peer == "dbos" and args.dbos_python is not None:
        _go_over_to(args.dbos_python, parser)
    stop = Stop()
    stop.install()
    result = run(args, stop)
    print(told(result))
    if args.json:
        print(json.dumps(result), flush=True)
    sys.exit(128 + stop.signal if stop.signal else 0)


def _go_over_to(python: Path, parser: argparse.ArgumentParser) -> None:
    """Become this program in another interpreter: one process, so signals need no passing on."""
    if not os.access(python, os.X_OK):
        parser.error(f"--dbos-python: {python} is not a program")
    rest = list(sys.argv[1:])
    at = next(i for i, word in enumerate(rest) if word.split("=")[0] == "--dbos-python")
    del rest[at : at + (1 if "=" in rest[at] else 2)]
    os.execv(python, [str(python), __file__, *rest])


if __name__ == "__main__":
    main()
