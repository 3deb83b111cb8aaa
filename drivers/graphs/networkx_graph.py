"""A knowledge graph in networkx, for those who want its algorithms on it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import networkx as nx

from llmos.drivers.graphs.base import BaseGraph, Direction
from llmos.drivers.protocols import Edge, Node


class NetworkxGraph(BaseGraph):
    """A MultiDiGraph: parallel edges are keyed by their relation."""

    def __init__(self, name: str = "networkx") -> None:
        """An empty graph; ``name`` is what errors call it."""
        super().__init__(name)
        self._graph: nx.MultiDiGraph[str] = nx.MultiDiGraph(name=name)

    def networkx(self) -> nx.MultiDiGraph[str]:
        """A copy for networkx's own algorithms.

        Nodes carry their ``name`` and ``kind``, edges are keyed by relation.
        """
        copy: nx.MultiDiGraph[str] = nx.MultiDiGraph(name=self._name)
        with self._lock:
            for node_id, data in self._graph.nodes(data=True):
                node: Node = data["node"]
                copy.add_node(node_id, name=node.name, kind=node.kind)
            for subject, target, relation in self._graph.edges(keys=True):
                copy.add_edge(subject, target, key=relation)
        return copy

    def _get(self, node_id: str) -> Node | None:
        data: dict[str, Any] | None = self._graph.nodes.get(node_id)
        return data["node"] if data is not None else None

    def _put_node(self, node: Node) -> None:
        self._graph.add_node(node.id, node=node)

    def _put_edge(self, edge: Edge) -> None:
        self._graph.add_edge(edge.subject, edge.object, key=edge.relation, edge=edge)

    def _edges_at(self, node_id: str, direction: Direction) -> Iterator[tuple[Edge, str]]:
        if direction != "in":
            for other, parallel in self._graph.succ[node_id].items():
                for data in parallel.values():
                    yield data["edge"], other
        if direction != "out":
            for other, parallel in self._graph.pred[node_id].items():
                if direction == "in" or other != node_id:
                    for data in parallel.values():
                        yield data["edge"], other

    def _size(self) -> tuple[int, int]:
        return self._graph.number_of_nodes(), self._graph.number_of_edges()
