"""Patterns of triples with variables, matched pattern by pattern over a table of bindings."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from llmos.drivers.errors import GraphLimitExceeded
from llmos.drivers.graphs.edges import CHUNK, MAX_EXPANSIONS, Edges, chunked, holds
from llmos.drivers.protocols import Edge, Triple

MAX_PATTERNS = 16
MAX_ROWS = 50_000
"""Bindings on the way."""

Row = dict[str, str]


class Matching:
    """One query."""

    def __init__(self, graph: Edges, name: str, at: float | None) -> None:
        self._graph, self._name, self._at = graph, name, at
        self._left = MAX_EXPANSIONS

    def run(self, patterns: Sequence[Triple], limit: int) -> list[Row]:
        """The bindings. Raises GraphLimitExceeded, ValueError."""
        if not 1 <= len(patterns) <= MAX_PATTERNS:
            raise ValueError(f"{len(patterns)} patterns; 1 to {MAX_PATTERNS} are matched")
        variables = list(dict.fromkeys(t for p in patterns for t in p if t.startswith("?")))
        rows: list[Row] = [{}]
        waiting = list(patterns)
        bound: set[str] = set()
        while waiting and rows:
            # The pattern with the fewest open ends next; a relation alone narrows little.
            pattern = min(waiting, key=lambda p: self._open(p, bound))
            waiting.remove(pattern)
            rows = self._join(rows, pattern, bound)
            bound.update(t for t in pattern if t.startswith("?"))
        unique = {tuple(row[v] for v in variables): row for row in rows}
        return [{v: unique[key][v] for v in variables} for key in sorted(unique)[: max(0, limit)]]

    @staticmethod
    def _open(pattern: Triple, bound: set[str]) -> tuple[int, int]:
        def is_open(term: str) -> int:
            return term.startswith("?") and term not in bound

        ends = is_open(pattern.subject) + is_open(pattern.object)
        return ends, is_open(pattern.relation)

    def _join(self, rows: list[Row], pattern: Triple, bound: set[str]) -> list[Row]:
        by_subject = pattern.subject in bound or not pattern.subject.startswith("?")
        by_object = pattern.object in bound or not pattern.object.startswith("?")
        end = "subject" if by_subject else "object" if by_object else ""
        joined: list[Row] = []
        index: dict[str, list[Edge]] = {}
        if end:
            ids = sorted({_value(getattr(pattern, end), row) for row in rows})
            direction = "out" if end == "subject" else "in"
            for chunk in chunked(ids, CHUNK):
                # One more than is left tells that there is more.
                for edge in self._take(
                    self._graph._edges_of(chunk, direction, self._left + 1)  # type: ignore[arg-type]
                ):
                    index.setdefault(getattr(edge, end), []).append(edge)
        else:
            fixed = None if pattern.relation.startswith("?") else pattern.relation
            index[""] = list(self._take(self._graph._edges_named(fixed, self._left + 1)))
        for row in rows:
            for edge in index.get(_value(getattr(pattern, end), row) if end else "", ()):
                extended = _unified(pattern, edge, row)
                if extended is not None:
                    joined.append(extended)
                    if len(joined) > MAX_ROWS:
                        raise GraphLimitExceeded(self._name, f"{MAX_ROWS} bindings on the way")
        return joined

    def _take(self, edges: list[Edge]) -> Iterator[Edge]:
        self._left -= len(edges)
        if self._left < 0:
            raise GraphLimitExceeded(self._name, f"{MAX_EXPANSIONS} edges")
        return (edge for edge in edges if holds(edge, self._at))


def _value(term: str, row: Row) -> str:
    return row[term] if term.startswith("?") else term


def _unified(pattern: Triple, edge: Edge, row: Row) -> Row | None:
    extended = dict(row)
    for term, value in zip(pattern, (edge.subject, edge.relation, edge.object), strict=True):
        known = extended.setdefault(term, value) if term.startswith("?") else term
        if known != value:
            return None
    return extended
