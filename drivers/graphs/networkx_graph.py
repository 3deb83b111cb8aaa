"""A knowledge graph in networkx, for those who want its algorithms on it."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import networkx as nx

from llmos.drivers.graphs.base import BaseGraph
from llmos.drivers.graphs.edges import Direction
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

    def _get(self, ids: Sequence[str]) -> dict[str, Node]:
        nodes = self._graph.nodes
        return {i: nodes[i]["node"] for i in ids if i in nodes}

    def _put(self, nodes: Sequence[Node], edges: Sequence[Edge], known: Mapping[str, Node]) -> None:
        for node in nodes:
            self._graph.add_node(node.id, node=node)
        for edge in edges:
            self._graph.add_edge(edge.subject, edge.object, key=edge.relation, edge=edge)

    def _edges_of(self, ids: Sequence[str], direction: Direction, limit: int) -> list[Edge]:
        inside = set(ids)
        found: list[Edge] = []
        for node_id in inside:
            if direction != "in":
                for parallel in self._graph.succ.get(node_id, {}).values():
                    found.extend(data["edge"] for data in parallel.values())
            if direction != "out":
                for other, parallel in self._graph.pred.get(node_id, {}).items():
                    if direction == "in" or other not in inside:
                        found.extend(data["edge"] for data in parallel.values())
            if len(found) >= limit:
                break
        return found[:limit]

    def _edges_named(self, relation: str | None, limit: int) -> list[Edge]:
        every = (
            data["edge"]
            for _, _, key, data in self._graph.edges(keys=True, data=True)
            if relation is None or key == relation
        )
        return list(itertools.islice(every, limit))

    def _size(self) -> tuple[int, int]:
        return self._graph.number_of_nodes(), self._graph.number_of_edges()
