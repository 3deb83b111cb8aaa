"""A knowledge graph in dictionaries; needs no package."""

from __future__ import annotations

from collections.abc import Iterator

from llmos.drivers.graphs.base import BaseGraph, Direction
from llmos.drivers.protocols import Edge, Node


class MemoryGraph(BaseGraph):
    """Nodes and edges in dictionaries of this process."""

    def __init__(self, name: str = "memory") -> None:
        """An empty graph; ``name`` is what errors call it."""
        super().__init__(name)
        self._nodes: dict[str, Node] = {}
        self._out: dict[str, dict[tuple[str, str], Edge]] = {}
        self._in: dict[str, dict[tuple[str, str], Edge]] = {}
        self._edge_count = 0

    def _get(self, node_id: str) -> Node | None:
        return self._nodes.get(node_id)

    def _put_node(self, node: Node) -> None:
        self._nodes[node.id] = node

    def _put_edge(self, edge: Edge) -> None:
        out = self._out.setdefault(edge.subject, {})
        self._edge_count += (edge.relation, edge.object) not in out
        out[edge.relation, edge.object] = edge
        self._in.setdefault(edge.object, {})[edge.relation, edge.subject] = edge

    def _edges_at(self, node_id: str, direction: Direction) -> Iterator[tuple[Edge, str]]:
        if direction != "in":
            for edge in self._out.get(node_id, {}).values():
                yield edge, edge.object
        if direction != "out":
            for edge in self._in.get(node_id, {}).values():
                if direction == "in" or edge.subject != node_id:
                    yield edge, edge.subject

    def _size(self) -> tuple[int, int]:
        return len(self._nodes), self._edge_count
