"""A knowledge graph in dictionaries; needs no package."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

from llmos.drivers.graphs.base import BaseGraph
from llmos.drivers.graphs.edges import Direction
from llmos.drivers.protocols import Edge, Node


class MemoryGraph(BaseGraph):
    """Nodes and edges in dictionaries of this process."""

    def __init__(self, name: str = "memory") -> None:
        """An empty graph; ``name`` is what errors call it."""
        super().__init__(name)
        self._nodes: dict[str, Node] = {}
        self._out: dict[str, dict[tuple[str, str], Edge]] = {}
        self._in: dict[str, dict[tuple[str, str], Edge]] = {}
        self._relations: dict[str, dict[tuple[str, str], Edge]] = {}
        self._edge_count = 0

    def _get(self, ids: Sequence[str]) -> dict[str, Node]:
        return {i: self._nodes[i] for i in ids if i in self._nodes}

    def _put(self, nodes: Sequence[Node], edges: Sequence[Edge], known: Mapping[str, Node]) -> None:
        self._nodes.update((node.id, node) for node in nodes)
        for edge in edges:
            out = self._out.setdefault(edge.subject, {})
            self._edge_count += (edge.relation, edge.object) not in out
            out[edge.relation, edge.object] = edge
            self._in.setdefault(edge.object, {})[edge.relation, edge.subject] = edge
            self._relations.setdefault(edge.relation, {})[edge.subject, edge.object] = edge

    def _edges_of(self, ids: Sequence[str], direction: Direction, limit: int) -> list[Edge]:
        inside = set(ids)
        found: list[Edge] = []
        for node_id in inside:
            if direction != "in":
                found.extend(self._out.get(node_id, {}).values())
            if direction != "out":
                found.extend(
                    edge
                    for edge in self._in.get(node_id, {}).values()
                    if direction == "in" or edge.subject not in inside
                )
            if len(found) >= limit:
                break
        return found[:limit]

    def _edges_named(self, relation: str | None, limit: int) -> list[Edge]:
        wanted = self._relations if relation is None else {relation}
        every = (e for r in wanted for e in self._relations.get(r, {}).values())
        return list(itertools.islice(every, limit))

    def _size(self) -> tuple[int, int]:
        return len(self._nodes), self._edge_count
