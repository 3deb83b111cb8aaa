"""Small things that all work on edges shares, and its bounds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal, Protocol, TypeAlias, TypeVar

from llmos.drivers.protocols import Edge

Direction: TypeAlias = Literal["out", "in", "both"]
Key: TypeAlias = tuple[str, str, str]

_T = TypeVar("_T")

MAX_EXPANSIONS = 200_000
"""Edges that one query looks at: paths end there, patterns are refused."""

CHUNK = 64
"""Nodes whose edges are asked for at once."""

FEW = 16
"""The same where the limit may be reached with the next few: what is read beyond it is lost."""


class Edges(Protocol):
    """Where edges are asked for."""

    def _edges_of(self, ids: Sequence[str], direction: Direction, limit: int) -> list[Edge]: ...

    def _edges_named(self, relation: str | None, limit: int) -> list[Edge]: ...

    def _around(self, ids: Sequence[str], at: float | None) -> list[Edge]: ...


def key_of(edge: Edge) -> Key:
    """What makes an edge the same edge."""
    return edge.subject, edge.relation, edge.object


def holds(edge: Edge, at: float | None) -> bool:
    """Whether it holds at a time; without a time every edge does."""
    return at is None or (
        (edge.valid_from is None or edge.valid_from <= at)
        and (edge.valid_to is None or at < edge.valid_to)
    )


def chunked(ids: Sequence[_T], size: int) -> Iterator[Sequence[_T]]:
    """Slices of at most ``size``."""
    for start in range(0, len(ids), size):
        yield ids[start : start + size]
