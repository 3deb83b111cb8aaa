"""Personalised PageRank by local pushes.

Only nodes that still hold enough of the walk are expanded, so the work depends on the
seeds' surroundings and not on the graph (Andersen, Chung and Lang, 2006). A power
iteration over the whole graph was rejected: on disk it would read every edge per query.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from llmos.drivers.graphs.edges import CHUNK, MAX_EXPANSIONS, Edges, chunked

RESIDUAL = 1e-5
"""Probability per edge that a node may hold back; the error of a score is its degree times this."""


def personalised(
    graph: Edges, seeds: Mapping[str, float], damping: float, at: float | None
) -> dict[str, float]:
    """Scores by node id. Raises ValueError: no seeds, bad weights or damping."""
    total = sum(seeds.values())
    if not seeds or not all(0 < w < math.inf for w in seeds.values()):
        raise ValueError("seeds need weights above 0")
    if not 0 < damping < 1:
        raise ValueError(f"damping is {damping}, between 0 and 1 is needed")
    residual = {node_id: weight / total for node_id, weight in seeds.items()}
    around: dict[str, list[str]] = {}
    scores: dict[str, float] = {}
    left = MAX_EXPANSIONS
    while True:
        # In rounds and in the order of ids, so that every driver adds the same numbers
        # in the same order.
        full = sorted(
            i for i, r in residual.items() if r > RESIDUAL * max(1, len(around.get(i, "x")))
        )
        for chunk in chunked([i for i in full if i not in around], CHUNK):
            inside = {i: around.setdefault(i, []) for i in chunk}
            edges = graph._around(chunk, at)
            left -= len(edges)
            for edge in edges:
                if edge.subject in inside:
                    inside[edge.subject].append(edge.object)
                if edge.object in inside and edge.object != edge.subject:
                    inside[edge.object].append(edge.subject)
        full = [i for i in full if residual[i] > RESIDUAL * max(1, len(around[i]))]
        if not full or left < 0:
            return scores
        moved: dict[str, float] = {}
        for node_id in full:
            mass = residual.pop(node_id)
            scores[node_id] = scores.get(node_id, 0.0) + (1 - damping) * mass
            others = around[node_id] or [node_id]
            share = damping * mass / len(others)
            for other in others:
                moved[other] = moved.get(other, 0.0) + share
        for node_id, mass in moved.items():
            residual[node_id] = residual.get(node_id, 0.0) + mass
