"""What knowledge graphs have in common, whatever holds their nodes and edges.

Every method takes one lock: the work under it is short and bounded, and a caller
always sees whole upserts.
"""

from __future__ import annotations

import abc
import heapq
import threading
from collections.abc import Mapping, Sequence

from llmos.drivers.errors import UnknownNode
from llmos.drivers.graphs.edges import (
    CHUNK,
    FEW,
    MAX_EXPANSIONS,
    Direction,
    Key,
    chunked,
    holds,
    key_of,
)
from llmos.drivers.graphs.matching import Matching
from llmos.drivers.graphs.names import NameIndex
from llmos.drivers.graphs.ranking import personalised
from llmos.drivers.protocols import Edge, Mention, Node, Triple


class BaseGraph(abc.ABC):
    """A graph over nodes and edges that a subclass keeps.

    The subclass answers for many nodes at once, so that one that asks a database needs
    one query a step. All order and all limits are made here, so drivers agree.
    """

    def __init__(self, name: str) -> None:
        """An empty graph; ``name`` is what errors call it."""
        self._name = name
        self._lock = threading.RLock()
        self._names = NameIndex()

    def upsert(self, nodes: Sequence[Node], edges: Sequence[Edge]) -> None:
        """Add or replace; an edge end that is unknown becomes a node of that id and name.

        Edges are a set: the same (subject, relation, object) is kept once, as given last.
        """
        with self._lock:
            new = {node.id: node for node in nodes}
            told = {(e.subject, e.relation, e.object): e for e in edges}
            ends = {end: e for e in reversed(told.values()) for end in (e.object, e.subject)}
            known = self._get([*new, *ends])
            for end, edge in ends.items():
                if end not in known and end not in new:
                    new[end] = Node(end, end, "", edge.source, edge.version)
            self._put(list(new.values()), list(told.values()), known)
            for node in new.values():
                if (old := known.get(node.id)) is not None:
                    for name in dict.fromkeys((old.name, *old.synonyms)):
                        self._names.remove(old.id, name)
                for name in dict.fromkeys((node.name, *node.synonyms)):
                    self._names.add(node.id, name)

    def node(self, node_id: str) -> Node:
        """The node. Raises UnknownNode."""
        with self._lock:
            return self._known([node_id])[node_id]

    def find(self, text: str, limit: int = 10) -> list[Node]:
        """Nodes whose name or synonym occurs in the text as whole words, any case.

        Longest names first. Punctuation between the words and a plural ``s`` make no
        difference.
        """
        with self._lock:
            nodes = self._known(sorted(self._names.find(text))).values()
        return heapq.nsmallest(limit, nodes, key=lambda n: (-len(n.name), n.name, n.id))

    def link(self, text: str, limit: int = 10) -> list[Mention]:
        """Where the text names nodes: the longest names, from left to right, none in another.

        A name that several nodes have is a mention of each of them, by id.
        """
        with self._lock:
            spans = self._names.spans(text)
            nodes = self._known(sorted({i for _, _, ids in spans for i in ids}))
        found = [
            Mention(start, end, text[start:end], nodes[i])
            for start, end, ids in spans
            for i in sorted(ids)
        ]
        return found[:limit]

    def neighbours(
        self,
        node_id: str,
        *,
        relation: str | None = None,
        direction: Direction = "both",
        limit: int = 100,
        at: float | None = None,
    ) -> list[tuple[Edge, Node]]:
        """Edges at a node with the node at the other end, ordered by (relation, name, id).

        ``at``: only edges that hold at this time. Raises UnknownNode.
        """
        with self._lock:
            self._known([node_id])
            edges = [
                edge
                for edge in self._edges_of([node_id], direction, MAX_EXPANSIONS)
                if (relation is None or edge.relation == relation) and holds(edge, at)
            ]
            others = self._known([_other(edge, node_id) for edge in edges])
            found = ((edge, others[_other(edge, node_id)]) for edge in edges)
            return heapq.nsmallest(limit, found, key=_order)

    def paths(
        self,
        start: str,
        end: str,
        *,
        max_hops: int = 3,
        limit: int = 10,
        at: float | None = None,
    ) -> list[list[Edge]]:
        """Simple paths, edges taken in either direction, shortest first. Raises UnknownNode.

        From a node to itself there is none. In a dense graph the search ends after
        ``MAX_EXPANSIONS`` edges and returns the paths found so far.
        """
        with self._lock:
            self._known([start, end])
            if start == end or max_hops < 1 or limit < 1:
                return []
            return _PathSearch(self, start, end, max_hops, limit, at).run()

    def subgraph(
        self, ids: Sequence[str], *, hops: int = 2, limit: int = 500, at: float | None = None
    ) -> tuple[list[Node], list[Edge]]:
        """What lies around some nodes: edges up to ``hops`` away, at most ``limit``.

        Near edges come first; nodes are expanded, and edges of a step ordered, by id.
        Raises UnknownNode.
        """
        with self._lock:
            self._known(ids)
            edges: dict[Key, Edge] = {}
            seen = dict.fromkeys(ids)
            frontier = sorted(seen)
            for _ in range(hops):
                reached: dict[str, None] = {}
                for chunk in chunked(frontier, FEW):
                    for edge in self._around(chunk, at):
                        if len(edges) < limit and key_of(edge) not in edges:
                            edges[key_of(edge)] = edge
                            for end in (edge.subject, edge.object):
                                if end not in seen:
                                    seen[end] = reached[end] = None
                    if len(edges) >= limit:
                        break
                frontier = sorted(reached)
            nodes = self._known(list(seen))
            return [nodes[i] for i in seen], list(edges.values())

    def match(
        self, patterns: Sequence[Triple], *, limit: int = 100, at: float | None = None
    ) -> list[dict[str, str]]:
        """What the variables of patterns stand for, so that every pattern is an edge.

        A term that begins with ``?`` is a variable. Bindings come ordered by their
        values, in the order in which the variables are first named, each once.

        Raises:
            GraphLimitExceeded: more than ``MAX_EXPANSIONS`` edges or ``MAX_ROWS``
                bindings were needed on the way.
            ValueError: no pattern, or more than ``MAX_PATTERNS``.
        """
        with self._lock:
            return Matching(self, self._name, at).run(patterns, limit)

    def pagerank(
        self,
        seeds: Mapping[str, float],
        *,
        limit: int = 20,
        damping: float = 0.85,
        at: float | None = None,
    ) -> list[tuple[Node, float]]:
        """Nodes by how often a walk that returns to the seeds comes by, edges either way.

        ``seeds``: node ids with weights above 0. Scores sum to 1 at most, and are kept up
        to ``RESIDUAL``. Raises UnknownNode, ValueError.
        """
        with self._lock:
            self._known(list(seeds))
            scores = personalised(self, seeds, damping, at)
            best = heapq.nsmallest(limit, scores.items(), key=lambda item: (-item[1], item[0]))
            nodes = self._known([node_id for node_id, _ in best])
            return [(nodes[node_id], score) for node_id, score in best]

    def size(self) -> tuple[int, int]:
        """Numbers of nodes and edges."""
        with self._lock:
            return self._size()

    def close(self) -> None:  # noqa: B027 - what is in memory has nothing to let go of
        """Let go of files. May be called again."""

    def _known(self, ids: Sequence[str]) -> dict[str, Node]:
        nodes = self._get(ids)
        for node_id in ids:
            if node_id not in nodes:
                raise UnknownNode(node_id, self._name)
        return nodes

    def _around(self, ids: Sequence[str], at: float | None) -> list[Edge]:
        """Edges at nodes that hold, ordered by their ids."""
        found = self._edges_of(ids, "both", MAX_EXPANSIONS)
        return sorted((edge for edge in found if holds(edge, at)), key=key_of)

    @abc.abstractmethod
    def _get(self, ids: Sequence[str]) -> dict[str, Node]:
        """Those of the nodes that are there."""

    @abc.abstractmethod
    def _put(self, nodes: Sequence[Node], edges: Sequence[Edge], known: Mapping[str, Node]) -> None:
        """Add or replace, all or nothing. Ends of edges are there or among the nodes;
        ``known`` are those of all these nodes that are there."""

    @abc.abstractmethod
    def _edges_of(self, ids: Sequence[str], direction: Direction, limit: int) -> list[Edge]:
        """Edges at any of the nodes, each once, in any order, at most ``limit``."""

    @abc.abstractmethod
    def _edges_named(self, relation: str | None, limit: int) -> list[Edge]:
        """Edges of a relation, or all, at most ``limit``."""

    @abc.abstractmethod
    def _size(self) -> tuple[int, int]:
        """Numbers of nodes and edges."""


class _PathSearch:
    """Enumerates simple paths by length, never leaving the nodes that can still reach the end.

    Distances to the end come first, so that the walk from the start does not fan out
    into hubs that lead nowhere; a plain breadth-first enumeration did, and needed
    millions of steps where this needs hundreds.
    """

    def __init__(
        self,
        graph: BaseGraph,
        start: str,
        end: str,
        max_hops: int,
        limit: int,
        at: float | None,
    ) -> None:
        self.graph, self.start, self.end, self.at = graph, start, end, at
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
        frontier = [self.end]
        for hops in range(1, self.max_hops + 1):
            reached: dict[str, None] = {}
            for chunk in chunked(frontier, CHUNK):
                edges = self.graph._around(chunk, self.at)
                # Half the budget is kept for the walk.
                self.left -= len(edges)
                if self.left < MAX_EXPANSIONS // 2:
                    return
                for edge in edges:
                    for end in (edge.subject, edge.object):
                        if end not in self.distance:
                            self.distance[end] = hops
                            reached[end] = None
            frontier = sorted(reached)

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
            around = [(e, _other(e, node_id)) for e in self.graph._around([node_id], self.at)]
            near = [(edge, other) for edge, other in around if other in self.distance]
            nodes = self.graph._known([other for _, other in near])
            near.sort(key=lambda item: _order((item[0], nodes[item[1]])))
            self.ordered[node_id] = near
        return self.ordered[node_id]


def _other(edge: Edge, node_id: str) -> str:
    return edge.object if edge.subject == node_id else edge.subject


def _order(item: tuple[Edge, Node]) -> tuple[str, str, str, str]:
    edge, node = item
    # The subject decides between two edges of opposite direction.
    return edge.relation, node.name, node.id, edge.subject
