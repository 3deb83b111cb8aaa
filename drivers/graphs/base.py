"""What knowledge graphs in memory have in common, whatever holds their nodes and edges.

Every method takes one lock: the work under it is short and bounded, and a caller
always sees whole upserts.
"""

from __future__ import annotations

import abc
import heapq
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Literal, TypeAlias

from llmos.drivers.errors import UnknownNode
from llmos.drivers.graphs.names import NameIndex
from llmos.drivers.protocols import Edge, Node

Direction: TypeAlias = Literal["out", "in", "both"]

MAX_EXPANSIONS = 200_000
"""Edges that one :meth:`BaseGraph.paths` looks at before it returns what it has found."""


class BaseGraph(abc.ABC):
    """A graph over an adjacency that a subclass keeps."""

    def __init__(self, name: str) -> None:
        """An empty graph; ``name`` is what errors call it."""
        self._name = name
        self._lock = threading.Lock()
        self._names = NameIndex()

    def upsert(self, nodes: Sequence[Node], edges: Sequence[Edge]) -> None:
        """Add or replace; an edge end that is unknown becomes a node of that id and name.

        Edges are a set: the same (subject, relation, object) is kept once, as given last.
        """
        with self._lock:
            for node in nodes:
                self._replace(node)
            for edge in edges:
                for end in (edge.subject, edge.object):
                    if self._get(end) is None:
                        self._replace(Node(end, end, "", edge.source, edge.version))
                self._put_edge(edge)

    def node(self, node_id: str) -> Node:
        """The node. Raises UnknownNode."""
        with self._lock:
            return self._known(node_id)

    def find(self, text: str, limit: int = 10) -> list[Node]:
        """Nodes whose name occurs in the text as whole words, any case; longest names first.

        Punctuation between the words and a plural ``s`` make no difference.
        """
        with self._lock:
            nodes = [self._known(i) for i in self._names.find(text)]
        return heapq.nsmallest(limit, nodes, key=lambda n: (-len(n.name), n.name, n.id))

    def neighbours(
        self,
        node_id: str,
        *,
        relation: str | None = None,
        direction: Direction = "both",
        limit: int = 100,
    ) -> list[tuple[Edge, Node]]:
        """Edges at a node with the node at the other end, ordered by (relation, name, id).

        Raises UnknownNode.
        """
        with self._lock:
            self._known(node_id)
            found = (
                (edge, self._known(other))
                for edge, other in self._edges_at(node_id, direction)
                if relation is None or edge.relation == relation
            )
            return heapq.nsmallest(limit, found, key=_order)

    def paths(
        self, start: str, end: str, *, max_hops: int = 3, limit: int = 10
    ) -> list[list[Edge]]:
        """Simple paths, edges taken in either direction, shortest first. Raises UnknownNode.

        From a node to itself there is none. In a dense graph the search ends after
        ``MAX_EXPANSIONS`` edges and returns the paths found so far.
        """
        with self._lock:
            self._known(start)
            self._known(end)
            if start == end or max_hops < 1 or limit < 1:
                return []
            return _PathSearch(self, start, end, max_hops, limit).run()

    def size(self) -> tuple[int, int]:
        """Numbers of nodes and edges."""
        with self._lock:
            return self._size()

    def _known(self, node_id: str) -> Node:
        node = self._get(node_id)
        if node is None:
            raise UnknownNode(node_id, self._name)
        return node

    def _replace(self, node: Node) -> None:
        old = self._get(node.id)
        if old is None or old.name != node.name:
            if old is not None:
                self._names.remove(old.id, old.name)
            self._names.add(node.id, node.name)
        self._put_node(node)

    @abc.abstractmethod
    def _get(self, node_id: str) -> Node | None:
        """The node, if it is there."""

    @abc.abstractmethod
    def _put_node(self, node: Node) -> None:
        """Add or replace a node."""

    @abc.abstractmethod
    def _put_edge(self, edge: Edge) -> None:
        """Add or replace an edge whose ends are there."""

    @abc.abstractmethod
    def _edges_at(self, node_id: str, direction: Direction) -> Iterator[tuple[Edge, str]]:
        """Edges at a node with the id at the other end, in any order; a loop once."""

    @abc.abstractmethod
    def _size(self) -> tuple[int, int]:
        """Numbers of nodes and edges."""


class _PathSearch:
    """Enumerates simple paths by length, never leaving the nodes that can still reach the end.

    Distances to the end come first, so that the walk from the start does not fan out
    into hubs that lead nowhere; a plain breadth-first enumeration did, and needed
    millions of steps where this needs hundreds.
    """

    def __init__(self, graph: BaseGraph, start: str, end: str, max_hops: int, limit: int) -> None:
        self.graph, self.start, self.end = graph, start, end
        self.max_hops, self.limit = max_hops, limit
        self.left = MAX_EXPANSIONS
        self.distance = {end: 0}
        self.ordered: dict[str, list[tuple[Edge, str]]] = {}
        self.found: list[list[Edge]] = []

    def run(self) -> list[list[Edge]]:
        self.measure()
        nearest = self.distance.get(self.start)
        if nearest is None:
            return []
        for hops in range(nearest, self.max_hops + 1):
            self.walk(hops)
            if len(self.found) >= self.limit or self.left <= 0:
                break
        return self.found[: self.limit]

    def measure(self) -> None:
        """Distances to the end, out to the nodes from which ``max_hops`` suffice."""
        waiting = deque([self.end])
        while waiting:
            here = waiting.popleft()
            if self.distance[here] == self.max_hops:
                continue
            for _, other in self.graph._edges_at(here, "both"):
                # Half the budget is kept for the walk.
                self.left -= 1
                if self.left < MAX_EXPANSIONS // 2:
                    return
                if other not in self.distance:
                    self.distance[other] = self.distance[here] + 1
                    waiting.append(other)

    def walk(self, hops: int) -> None:
        """All simple paths of exactly this length, depth first without recursion."""
        path: list[Edge] = []
        visited = [self.start]
        stack = [iter(self.edges(self.start))]
        while stack:
            step = next(stack[-1], None)
            if step is None:
                stack.pop()
                visited.pop()
                if path:
                    path.pop()
                continue
            self.left -= 1
            if self.left <= 0:
                return
            edge, other = step
            remaining = hops - len(path) - 1
            if other in visited or self.distance.get(other, hops) > remaining:
                continue
            if other == self.end:
                if not remaining:
                    self.found.append([*path, edge])
                    if len(self.found) >= self.limit:
                        return
                continue
            path.append(edge)
            visited.append(other)
            stack.append(iter(self.edges(other)))

    def edges(self, node_id: str) -> list[tuple[Edge, str]]:
        if node_id not in self.ordered:
            reachable = (
                (edge, self.graph._known(other))
                for edge, other in self.graph._edges_at(node_id, "both")
                if other in self.distance
            )
            self.ordered[node_id] = [(e, n.id) for e, n in sorted(reachable, key=_order)]
        return self.ordered[node_id]


def _order(item: tuple[Edge, Node]) -> tuple[str, str, str, str]:
    edge, node = item
    # The subject decides between two edges of opposite direction.
    return edge.relation, node.name, node.id, edge.subject
