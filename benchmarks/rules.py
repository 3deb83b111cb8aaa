"""Expert rules: the AI4I failure rules on both drivers, Miss Manners, and evaluations per second.

    python -m benchmarks.rules [--data ../shared/data] [--json]

ends with one line of JSON: for each driver the rows whose labels HDF, PWF and OSF the
rules do not give (0 of 10,000) and rows per second; firings of manners 16 and 64 (183
and 2,271 in the benchmark's own documentation) with seconds, a process's start
included; and the time of one small evaluation, which is what an agent waits for.

The temperature difference is a slot of its own, taken in binary floating point as the
data set's author did: in decimal arithmetic 12 rows lie exactly on the limit of 8.6 K.
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llmos.drivers.protocols import Fact
from llmos.drivers.registry import driver
from llmos.drivers.rules.clips_run import run_program
from llmos.drivers.rules.files import driver_of, read_source

REPOSITORY = Path(__file__).parents[1]
DATA = REPOSITORY.parent / "shared" / "data"
AI4I = DATA / "ai4i2020" / "ai4i2020.csv"
EXAMPLES = REPOSITORY / "examples" / "rules"
MODES = ("HDF", "PWF", "OSF")
_BATCH = 1000
"""Machines in one evaluation."""


def read_machines(path: Path) -> tuple[list[Fact], dict[Any, frozenset[str]]]:
    """The machines as facts, and the failures that each is labelled with, by id."""
    machines, labels = [], {}
    with path.open(encoding="utf-8-sig", newline="") as file:
        for row in csv.DictReader(file):
            identity = int(row["UDI"])
            gap = float(row["Process temperature [K]"]) - float(row["Air temperature [K]"])
            slots = {
                "id": identity,
                "quality": row["Type"],
                "temperature_gap": gap,
                "speed": int(row["Rotational speed [rpm]"]),
                "torque": float(row["Torque [Nm]"]),
                "wear": int(row["Tool wear [min]"]),
            }
            machines.append(Fact("machine", slots))
            labels[identity] = frozenset(mode for mode in MODES if row[mode] == "1")
    return machines, labels


def failures_of(file: Path, machines: Sequence[Fact]) -> Mapping[Any, frozenset[str]]:
    """What a rule file says of each machine."""
    source = read_source(file)
    base = driver("rules", driver_of(file, source))(file.name, source)
    found: dict[Any, set[str]] = {machine.slots["id"]: set() for machine in machines}
    for start in range(0, len(machines), _BATCH):
        outcome = base.evaluate(
            machines[start : start + _BATCH], max_firings=1_000_000, timeout_s=60.0
        )
        for fact in outcome.facts:
            if fact.template == "failure":
                found[fact.slots["id"]].add(str(fact.slots["mode"]))
    return {identity: frozenset(modes) for identity, modes in found.items()}


def ai4i(path: Path) -> dict[str, Any]:
    """Disagreements and speed of both drivers."""
    machines, labels = read_machines(path)
    told = {}
    for name, file in (("clips", "machine_failure.clp"), ("zen", "machine_failure.json")):
        begun = time.perf_counter()
        found = failures_of(EXAMPLES / file, machines)
        seconds = time.perf_counter() - begun
        wrong = sum((mode in found[i]) != (mode in labels[i]) for i in labels for mode in MODES)
        told[name] = {
            "rows": len(machines),
            "disagreements": wrong,
            "rows_per_s": round(len(machines) / seconds),
        }
    return told


def manners(folder: Path) -> dict[str, Any]:
    """Firings and seconds of Miss Manners."""
    told = {}
    for guests in (16, 64):
        begun = time.perf_counter()
        done = run_program([folder / "manners.clp", folder / f"manners{guests}.fct"])
        told[str(guests)] = {
            "firings": done.firings,
            "seconds": round(time.perf_counter() - begun, 3),
        }
    return told


def latency(repeats: int = 500) -> dict[str, Any]:
    """Milliseconds of an evaluation of one fact in a warm child process."""
    machine = Fact(
        "machine",
        {"id": 1, "quality": "L", "temperature_gap": 8.0, "speed": 1300, "torque": 65.0, "wear": 9},
    )
    told = {}
    for name, file in (("clips", "machine_failure.clp"), ("zen", "machine_failure.json")):
        base = driver("rules", name)(file, read_source(EXAMPLES / file))
        times = []
        for _ in range(repeats):
            begun = time.perf_counter()
            base.evaluate([machine])
            times.append((time.perf_counter() - begun) * 1000)
        cuts = statistics.quantiles(times, n=20)
        told[name] = {"p50_ms": round(cuts[9], 3), "p95_ms": round(cuts[18], 3)}
    return told


def main() -> None:
    """Run all parts."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--json", action="store_true", help="print the JSON alone")
    options = parser.parse_args()
    told = {
        "ai4i": ai4i(options.data / "ai4i2020" / "ai4i2020.csv"),
        "manners": manners(options.data / "clips" / "examples" / "manners"),
        "latency": latency(),
    }
    if not options.json:
        for part, value in told.items():
            for name, numbers in value.items():
                print(f"{part:8} {name:6} {numbers}")
    print(json.dumps(told))


if __name__ == "__main__":
    main()
