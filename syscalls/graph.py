"""``graph``: nodes, neighbours, paths and patterns of a knowledge graph."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from llmos.drivers.protocols import Edge, Mention, Node, Triple
from llmos.syscalls.base import Caller, Request, Response, Services, handles
from llmos.syscalls.labels import Provenance


class GraphNode(BaseModel):
    """A node."""

    model_config = ConfigDict(frozen=True)

    id: str
    name: str
    kind: str = ""


class Statement(BaseModel):
    """An edge, read as a sentence: subject, relation, object (node ids)."""

    model_config = ConfigDict(frozen=True)

    subject: str
    relation: str
    object: str


class Neighbour(BaseModel):
    """A statement about a node, and the node at its other end."""

    model_config = ConfigDict(frozen=True)

    statement: Statement
    node: GraphNode


class Nodes(Response):
    """Nodes named in a text, longest name first."""

    nodes: tuple[GraphNode, ...]


class Neighbours(Response):
    """Statements about a node."""

    neighbours: tuple[Neighbour, ...]


class Paths(Response):
    """Paths between two nodes, shortest first."""

    paths: tuple[tuple[Statement, ...], ...]


class FindNodes(Request[Nodes]):
    """Which nodes does this text name?"""

    syscall: ClassVar[str] = "graph"

    graph: str
    text: str
    limit: int = Field(default=10, ge=1, le=1000)

    @property
    def resource(self) -> str:
        """The graph."""
        return self.graph


class FindNeighbours(Request[Neighbours]):
    """What does the graph say about this node?"""

    syscall: ClassVar[str] = "graph"

    graph: str
    node: str
    relation: str | None = None
    direction: Literal["out", "in", "both"] = "both"
    limit: int = Field(default=100, ge=1, le=10_000)

    @property
    def resource(self) -> str:
        """The graph."""
        return self.graph


class FindPaths(Request[Paths]):
    """How are these two nodes connected?"""

    syscall: ClassVar[str] = "graph"

    graph: str
    start: str
    end: str
    max_hops: int = Field(default=3, ge=1, le=6)
    limit: int = Field(default=10, ge=1, le=100)

    @property
    def resource(self) -> str:
        """The graph."""
        return self.graph


class LinkedName(BaseModel):
    """A place in a text that names a node: characters [start, end)."""

    model_config = ConfigDict(frozen=True)

    start: int
    end: int
    text: str
    node: GraphNode


class Linked(Response):
    """Names in a text, from left to right."""

    names: tuple[LinkedName, ...]


class Surroundings(Response):
    """Nodes and statements around some nodes, near ones first."""

    nodes: tuple[GraphNode, ...]
    statements: tuple[Statement, ...]


class Bindings(Response):
    """What the variables of patterns stand for; ordered, each once."""

    rows: tuple[dict[str, str], ...]


class RankedNode(BaseModel):
    """A node and how often the walk came by, 0 to 1."""

    model_config = ConfigDict(frozen=True)

    node: GraphNode
    score: float


class Ranked(Response):
    """Nodes, best first."""

    nodes: tuple[RankedNode, ...]


class _OfGraph(BaseModel):
    graph: str

    @property
    def resource(self) -> str:
        """The graph."""
        return self.graph


class LinkText(_OfGraph, Request[Linked]):
    """Where does this text name nodes? The longest names, none inside another."""

    syscall: ClassVar[str] = "graph"

    text: str = Field(max_length=1_000_000)
    limit: int = Field(default=50, ge=1, le=1000)


class FindAround(_OfGraph, Request[Surroundings]):
    """What lies around these nodes?"""

    syscall: ClassVar[str] = "graph"

    nodes: tuple[str, ...] = Field(min_length=1, max_length=100)
    hops: int = Field(default=2, ge=1, le=4)
    limit: int = Field(default=500, ge=1, le=10_000)
    """Statements."""
    at: float | None = None
    """Unix time: only what holds then."""


class MatchPatterns(_OfGraph, Request[Bindings]):
    """For which values of the variables are all patterns statements of the graph?

    A pattern is (subject, relation, object); a term that begins with ``?`` is a variable.
    """

    syscall: ClassVar[str] = "graph"

    patterns: tuple[tuple[str, str, str], ...] = Field(min_length=1, max_length=16)
    limit: int = Field(default=100, ge=1, le=10_000)
    at: float | None = None


class RankNodes(_OfGraph, Request[Ranked]):
    """Which nodes are closest to these, by personalised PageRank?"""

    syscall: ClassVar[str] = "graph"

    seeds: dict[str, Annotated[float, Field(gt=0, allow_inf_nan=False)]] = Field(
        min_length=1, max_length=100
    )
    limit: int = Field(default=20, ge=1, le=1000)
    at: float | None = None


def _node(node: Node) -> GraphNode:
    return GraphNode(id=node.id, name=node.name, kind=node.kind)


def _statement(edge: Edge) -> Statement:
    return Statement(subject=edge.subject, relation=edge.relation, object=edge.object)


def _provenance(graph: str, things: list[Node] | list[Edge]) -> tuple[Provenance, ...]:
    files = dict.fromkeys((t.source, t.version) for t in things)
    return tuple(
        Provenance(kind="graph", source=source or graph, version=version, corpus=graph)
        for source, version in files
    )


@handles(FindNodes)
async def find_nodes(request: FindNodes, caller: Caller, services: Services) -> Nodes:
    """Link a text to nodes."""
    nodes, labels = await services.find_nodes(
        caller.tenant, request.graph, request.text, request.limit
    )
    return Nodes(
        nodes=tuple(_node(n) for n in nodes),
        provenance=_provenance(request.graph, nodes),
        labels=labels,
    )


@handles(FindNeighbours)
async def find_neighbours(
    request: FindNeighbours, caller: Caller, services: Services
) -> Neighbours:
    """Edges at a node."""
    pairs, labels = await services.neighbours(
        caller.tenant,
        request.graph,
        request.node,
        request.relation,
        request.direction,
        request.limit,
    )
    return Neighbours(
        neighbours=tuple(Neighbour(statement=_statement(e), node=_node(n)) for e, n in pairs),
        provenance=_provenance(request.graph, [e for e, _ in pairs]),
        labels=labels,
    )


@handles(FindPaths)
async def find_paths(request: FindPaths, caller: Caller, services: Services) -> Paths:
    """Connections of two nodes."""
    paths, labels = await services.paths(
        caller.tenant, request.graph, request.start, request.end, request.max_hops, request.limit
    )
    return Paths(
        paths=tuple(tuple(_statement(e) for e in path) for path in paths),
        provenance=_provenance(request.graph, [e for path in paths for e in path]),
        labels=labels,
    )


@handles(LinkText)
async def link_text(request: LinkText, caller: Caller, services: Services) -> Linked:
    """Names in a text."""
    found, labels = await services.ask_graph(
        caller.tenant, request.graph, "link", {"text": request.text, "limit": request.limit}
    )
    mentions: list[Mention] = found
    return Linked(
        names=tuple(
            LinkedName(start=m.start, end=m.end, text=m.text, node=_node(m.node)) for m in mentions
        ),
        provenance=_provenance(request.graph, [m.node for m in mentions]),
        labels=labels,
    )


@handles(FindAround)
async def find_around(request: FindAround, caller: Caller, services: Services) -> Surroundings:
    """The surroundings of nodes."""
    asked = {"ids": request.nodes, "hops": request.hops, "limit": request.limit, "at": request.at}
    found, labels = await services.ask_graph(caller.tenant, request.graph, "subgraph", asked)
    nodes: list[Node] = found[0]
    edges: list[Edge] = found[1]
    return Surroundings(
        nodes=tuple(map(_node, nodes)),
        statements=tuple(map(_statement, edges)),
        provenance=_provenance(request.graph, edges),
        labels=labels,
    )


@handles(MatchPatterns)
async def match_patterns(request: MatchPatterns, caller: Caller, services: Services) -> Bindings:
    """Values of variables."""
    asked = {
        "patterns": [Triple(*pattern) for pattern in request.patterns],
        "limit": request.limit,
        "at": request.at,
    }
    rows, labels = await services.ask_graph(caller.tenant, request.graph, "match", asked)
    return Bindings(
        rows=tuple(rows),
        provenance=(
            Provenance(kind="graph", source=request.graph, version="", corpus=request.graph),
        ),
        labels=labels,
    )


@handles(RankNodes)
async def rank_nodes(request: RankNodes, caller: Caller, services: Services) -> Ranked:
    """Nodes near others."""
    asked = {"seeds": request.seeds, "limit": request.limit, "at": request.at}
    found, labels = await services.ask_graph(caller.tenant, request.graph, "pagerank", asked)
    return Ranked(
        nodes=tuple(RankedNode(node=_node(node), score=score) for node, score in found),
        provenance=_provenance(request.graph, [node for node, _ in found]),
        labels=labels,
    )
