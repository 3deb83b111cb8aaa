"""A knowledge graph in Ladybug: on disk, asked in Cypher.

All queries are constants of this module, and whatever comes from outside is a
parameter, so no text of a user is ever read as Cypher. Letting agents write Cypher was
rejected: it cannot be bounded, and answers would depend on the driver.

Names are indexed in memory when the graph is opened (about a second for 50,000).
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import ladybug

from llmos.drivers.errors import GraphFileError
from llmos.drivers.graphs.base import BaseGraph
from llmos.drivers.graphs.edges import Direction, chunked, key_of
from llmos.drivers.protocols import Edge, Node

BUFFER_BYTES = 2**30
"""Most memory for pages of the database: with a quarter of it, queries of Hetionet ran out."""
MAX_DB_BYTES = 64 * 2**30
"""Address space kept for the file; not what it takes."""
_ROWS = 5_000
"""Rows in one statement."""
KEPT_EDGES = 200_000
"""Edges kept in memory as they were read, by node, the latest used; an upsert drops them.
Only this process can change the file."""
TIMEOUT_S = 30.0
"""Longest time of one statement."""

_CREATE = (
    "CREATE NODE TABLE IF NOT EXISTS Node(id STRING PRIMARY KEY, name STRING, kind STRING, "
    "source STRING, version STRING, synonyms STRING)",
    "CREATE REL TABLE IF NOT EXISTS Edge(FROM Node TO Node, relation STRING, source STRING, "
    "version STRING, valid_from DOUBLE, valid_to DOUBLE)",
)
_NODE_SLOTS = "n.id, n.name, n.kind, n.source, n.version, n.synonyms"
_EDGE_SLOTS = "a.id, e.relation, b.id, e.source, e.version, e.valid_from, e.valid_to"
_NODES = f"UNWIND $ids AS i MATCH (n:Node {{id: i}}) RETURN {_NODE_SLOTS}"
_ALL_NAMES = "MATCH (n:Node) RETURN n.id, n.name, n.synonyms"
_NEW_NODES = (
    "UNWIND $rows AS r CREATE (:Node {id: r.id, name: r.name, kind: r.kind, source: r.source, "
    "version: r.version, synonyms: r.synonyms})"
)
_CHANGED_NODES = (
    "UNWIND $rows AS r MATCH (n:Node {id: r.id}) SET n.name = r.name, n.kind = r.kind, "
    "n.source = r.source, n.version = r.version, n.synonyms = r.synonyms"
)
_NEW_EDGES = (
    "UNWIND $rows AS r MATCH (a:Node {id: r.s}), (b:Node {id: r.o}) CREATE (a)-[:Edge {relation: "
    "r.r, source: r.source, version: r.version, valid_from: r.f, valid_to: r.t}]->(b)"
)
_CHANGED_EDGES = (
    "UNWIND $rows AS r MATCH (a:Node {id: r.s})-[e:Edge]->(b:Node {id: r.o}) "
    "WHERE e.relation = r.r SET e.source = r.source, e.version = r.version, "
    "e.valid_from = r.f, e.valid_to = r.t"
)
# A list of ids in WHERE is looked up one by one; an unwound list scans the whole table,
# which is better from some dozens of ids on.
_OUT = f"MATCH (a:Node)-[e:Edge]->(b:Node) WHERE a.id IN $ids RETURN {_EDGE_SLOTS} LIMIT "
_IN = f"MATCH (a:Node)-[e:Edge]->(b:Node) WHERE b.id IN $ids RETURN {_EDGE_SLOTS} LIMIT "
_OUT_MANY = (
    f"UNWIND $ids AS i MATCH (a:Node {{id: i}})-[e:Edge]->(b:Node) RETURN {_EDGE_SLOTS} LIMIT "
)
_IN_MANY = (
    f"UNWIND $ids AS i MATCH (a:Node)-[e:Edge]->(b:Node {{id: i}}) RETURN {_EDGE_SLOTS} LIMIT "
)
_FEW = 64
_EVERY = f"MATCH (a:Node)-[e:Edge]->(b:Node) RETURN {_EDGE_SLOTS} LIMIT "
_NAMED = (
    f"MATCH (a:Node)-[e:Edge]->(b:Node) WHERE e.relation = $relation RETURN {_EDGE_SLOTS} LIMIT "
)
_COUNT_NODES = "MATCH (n:Node) RETURN count(*)"
_COUNT_EDGES = "MATCH (:Node)-[e:Edge]->(:Node) RETURN count(*)"

_BETWEEN = "\x1f"
"""Stands between synonyms: the database takes no empty lists as parameters."""


class LadybugGraph(BaseGraph):
    """A graph in a file, or in memory where no file is named. One process may have it open."""

    def __init__(self, name: str = "ladybug", path: Path | None = None) -> None:
        """Open or create it.

        Raises:
            GraphFileError: the file is of something else, or another process has it open.
        """
        super().__init__(name)
        try:
            self._database = ladybug.Database(
                str(path) if path is not None else ":memory:",
                buffer_pool_size=BUFFER_BYTES,
                max_num_threads=1,
                max_db_size=MAX_DB_BYTES,
            )
            self._connection = ladybug.Connection(self._database, num_threads=1)
            self._connection.set_query_timeout(int(TIMEOUT_S * 1000))
            for statement in _CREATE:
                self._rows(statement)
        except RuntimeError as error:
            raise GraphFileError(
                str(path or name),
                str(error).partition("\n")[0],
                remedy="Name a file of this driver that no other process has open",
            ) from error
        self._closed = False
        self._near: OrderedDict[tuple[str, str], list[Edge]] = OrderedDict()
        self._near_size = 0
        for node_id, node_name, synonyms in self._rows(_ALL_NAMES):
            for each in dict.fromkeys((node_name, *_split(synonyms))):
                self._names.add(node_id, each)

    def close(self) -> None:
        """Close the file. May be called again."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self._connection.close()
                self._database.close()

    def _rows(self, statement: str, **parameters: Any) -> list[Any]:
        result = self._connection.execute(statement, parameters)
        assert not isinstance(result, list), "one statement has one result"
        try:
            return list(result.get_all())
        finally:
            result.close()

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._rows("BEGIN TRANSACTION")
        try:
            yield
        except BaseException:
            self._rows("ROLLBACK")
            raise
        self._rows("COMMIT")

    def _get(self, ids: Sequence[str]) -> dict[str, Node]:
        found: dict[str, Node] = {}
        for chunk in chunked(list(dict.fromkeys(ids)), _ROWS):
            for node_id, name, kind, source, version, synonyms in self._rows(_NODES, ids=chunk):
                found[node_id] = Node(node_id, name, kind, source, version, _split(synonyms))
        return found

    def _put(self, nodes: Sequence[Node], edges: Sequence[Edge], known: Mapping[str, Node]) -> None:
        # Only an edge between nodes that were there can be there.
        old = {e.subject for e in edges if e.subject in known and e.object in known}
        there = {key_of(e) for e in self._edges_of(sorted(old), "out", 2**40)} if old else set()
        self._near.clear()
        self._near_size = 0
        with self._transaction():
            for statement, is_new in ((_NEW_NODES, True), (_CHANGED_NODES, False)):
                rows = [_node_row(n) for n in nodes if (n.id not in known) is is_new]
                for chunk in chunked(rows, _ROWS):
                    self._rows(statement, rows=chunk)
            for statement, is_new in ((_NEW_EDGES, True), (_CHANGED_EDGES, False)):
                told = [_edge_row(e) for e in edges if (key_of(e) not in there) is is_new]
                for part in chunked(told, _ROWS):
                    self._rows(statement, rows=part)

    def _edges_of(self, ids: Sequence[str], direction: Direction, limit: int) -> list[Edge]:
        inside = set(ids)
        found: list[Edge] = []
        if direction != "in":
            found.extend(self._kept("out", inside, limit))
        if direction != "out":
            edges = self._kept("in", inside, limit)
            found.extend(e for e in edges if direction == "in" or e.subject not in inside)
        return found[:limit]

    def _kept(self, side: Literal["out", "in"], ids: set[str], limit: int) -> list[Edge]:
        """Edges at one side of nodes, from memory where they were read before."""
        found: list[Edge] = []
        missing = []
        for node_id in sorted(ids):
            edges = self._near.get((side, node_id))
            if edges is None:
                missing.append(node_id)
            else:
                self._near.move_to_end((side, node_id))
                found.extend(edges)
        for chunk in chunked(missing, _ROWS):
            if len(found) >= limit:
                break
            few, many = (_OUT, _OUT_MANY) if side == "out" else (_IN, _IN_MANY)
            statement = few if len(chunk) <= _FEW else many
            read = list(map(_edge, self._rows(f"{statement}{int(limit)}", ids=chunk)))
            found.extend(read)
            if len(read) < limit:
                self._keep(side, chunk, read)
        return found

    def _keep(self, side: Literal["out", "in"], ids: Sequence[str], edges: Sequence[Edge]) -> None:
        by_node: dict[str, list[Edge]] = {node_id: [] for node_id in ids}
        for edge in edges:
            by_node[edge.subject if side == "out" else edge.object].append(edge)
        for node_id, near in by_node.items():
            self._near[side, node_id] = near
            # A node without edges takes a place, too.
            self._near_size += len(near) + 1
        while self._near_size > KEPT_EDGES:
            _, gone = self._near.popitem(last=False)
            self._near_size -= len(gone) + 1

    def _edges_named(self, relation: str | None, limit: int) -> list[Edge]:
        if relation is None:
            return list(map(_edge, self._rows(f"{_EVERY}{int(limit)}")))
        return list(map(_edge, self._rows(f"{_NAMED}{int(limit)}", relation=relation)))

    def _size(self) -> tuple[int, int]:
        return self._rows(_COUNT_NODES)[0][0], self._rows(_COUNT_EDGES)[0][0]


def _split(synonyms: str) -> tuple[str, ...]:
    return tuple(synonyms.split(_BETWEEN)) if synonyms else ()


def _node_row(node: Node) -> dict[str, str]:
    return {
        "id": node.id,
        "name": node.name,
        "kind": node.kind,
        "source": node.source,
        "version": node.version,
        "synonyms": _BETWEEN.join(node.synonyms),
    }


def _edge_row(edge: Edge) -> dict[str, str | float]:
    # The database takes no null among the numbers of a list of rows.
    return {
        "s": edge.subject,
        "r": edge.relation,
        "o": edge.object,
        "source": edge.source,
        "version": edge.version,
        "f": -math.inf if edge.valid_from is None else float(edge.valid_from),
        "t": math.inf if edge.valid_to is None else float(edge.valid_to),
    }


def _edge(row: Sequence[Any]) -> Edge:
    subject, relation, target, source, version, valid_from, valid_to = row
    return Edge(
        subject,
        relation,
        target,
        source,
        version,
        None if valid_from == -math.inf else valid_from,
        None if valid_to == math.inf else valid_to,
    )
