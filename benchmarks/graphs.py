"""Knowledge graphs: loading two real ones, and two-hop queries, on every driver.

    python -m benchmarks.graphs [--data ../shared/data] [--queries 300] [--json]

The whole Disease Ontology and the disease part of Hetionet are read and loaded (target:
under 30 s each); then for random nodes the neighbourhood of two hops is asked for (at
most 500 edges), once and again, and the time of every query is taken (target: 95% under
20 ms). Neighbours, paths, a pattern of two steps and PageRank are timed as well. Answers
of all drivers to all queries must be equal. Ends with one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llmos.drivers.graphs.ladybug_graph import LadybugGraph
from llmos.drivers.graphs.load import load_graph
from llmos.drivers.graphs.memory import MemoryGraph
from llmos.drivers.graphs.networkx_graph import NetworkxGraph
from llmos.drivers.protocols import Edge, Graph, Node, Triple

DATA = Path(__file__).parents[2] / "shared" / "data"
GRAPHS = ("disease_ontology", "hetionet_disease")


def queries(graph: Graph, starts: list[str], ends: list[str]) -> dict[str, Callable[[int], Any]]:
    """What is asked, by name; the number says which start."""
    return {
        "two_hops": lambda i: graph.subgraph([starts[i]], hops=2),
        "neighbours": lambda i: graph.neighbours(starts[i]),
        "paths": lambda i: graph.paths(starts[i], ends[i], max_hops=3),
        "pattern": lambda i: graph.match([Triple(starts[i], "?r", "?x"), Triple("?y", "?r", "?x")]),
        "pagerank": lambda i: graph.pagerank({starts[i]: 1.0}),
    }


def measure(
    make: Callable[[], Graph],
    nodes: list[Node],
    edges: list[Edge],
    starts: list[str],
    ends: list[str],
) -> tuple[dict[str, Any], list[Any]]:
    """Times of a driver, and its answers."""
    begun = time.perf_counter()
    graph = make()
    graph.upsert(nodes, edges)
    told: dict[str, Any] = {"upsert_s": round(time.perf_counter() - begun, 2)}
    told["nodes"], told["edges"] = graph.size()
    answers = []
    for name, ask in queries(graph, starts, ends).items():
        times = []
        for i in range(len(starts)):
            begun = time.perf_counter()
            answers.append(_told(ask, i))
            times.append((time.perf_counter() - begun) * 1000)
        cuts = statistics.quantiles(times, n=100)
        told[name] = {
            "p50_ms": round(cuts[49], 2),
            "p95_ms": round(cuts[94], 2),
            "max_ms": round(max(times), 2),
        }
    graph.close()
    return told, answers


def _told(ask: Callable[[int], Any], i: int) -> Any:
    try:
        return ask(i)
    except Exception as error:  # noqa: BLE001 - a refusal is an answer, and must be equal, too
        return repr(error)


def main() -> None:
    """Run all graphs on all drivers."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--queries", type=int, default=300)
    parser.add_argument("--json", action="store_true", help="print the JSON alone")
    options = parser.parse_args()
    told: dict[str, Any] = {}
    for name in GRAPHS:
        begun = time.perf_counter()
        nodes, edges = load_graph(options.data / name)
        told[name] = {"read_s": round(time.perf_counter() - begun, 2), "drivers": {}}
        chance = random.Random(7)
        # Ends of edges, so that nodes come as often as they have edges: hubs are asked, too.
        starts = [chance.choice(edges).subject for _ in range(options.queries)]
        ends = [chance.choice(edges).object for _ in range(options.queries)]
        first: list[Any] | None = None
        with tempfile.TemporaryDirectory() as folder:
            makers: dict[str, Callable[[], Graph]] = {
                "memory": MemoryGraph,
                "networkx": NetworkxGraph,
                "ladybug": lambda at=Path(folder): LadybugGraph("bench", at / "graph.lbug"),  # type: ignore[misc]
            }
            for driver, make in makers.items():
                numbers, answers = measure(make, nodes, edges, starts, ends)
                first = answers if first is None else first
                numbers["different_answers"] = sum(
                    a != b for a, b in zip(first, answers, strict=True)
                )
                told[name]["drivers"][driver] = numbers
                numbers["refused"] = sorted({a for a in answers if isinstance(a, str)})[:3]
                if not options.json:
                    print(f"{name:18} {driver:9} {numbers}")
    print(json.dumps(told))


if __name__ == "__main__":
    main()
