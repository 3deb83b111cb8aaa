"""``graph``: nodes, neighbours and paths of a knowledge graph."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from llmos.drivers.protocols import Edge, Node
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
