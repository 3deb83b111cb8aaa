"""Several rankings of the same passages made one.

Where nothing is known about the legs, their ranks are fused (reciprocal rank fusion,
G. Cormack et al., 2009): it needs no scale. Where judged queries are at hand, scores are
scaled and mixed with weights fitted to them, which uses how sure a leg is, and is better.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from llmos.drivers.retrieval.judged import ndcg

Positions: TypeAlias = npt.NDArray[np.intp]
Floats: TypeAlias = npt.NDArray[np.float64]
Scaling: TypeAlias = Literal["max", "minmax", "z"]

SCALINGS: tuple[Scaling, ...] = ("max", "minmax", "z")


@dataclass(frozen=True, slots=True)
class Leg:
    """What one way of searching has found."""

    positions: Positions
    """Passages by their place in the corpus, best first, each once."""
    scores: npt.NDArray[np.floating]
    """In the same order, not rising."""
    complete: bool = False
    """All that the leg would ever find is in it: what is not listed scores 0, as a passage
    without any term of the query does. Else what is not listed scores as the last one."""


@dataclass(frozen=True, slots=True)
class Fusion:
    """How legs are fused."""

    method: Literal["rrf", "linear"] = "rrf"
    k: float = 10.0
    """Of ``rrf``: how flat. 60 is usual for many long rankings; two short ones want less."""
    scaling: Scaling = "max"
    """Of ``linear``: by the highest score; to 0…1; to mean 0 and deviation 1."""
    weights: Mapping[str, float] | None = None
    """By leg; a leg that is not named weighs 1 (``rrf``) or nothing (``linear``)."""

    def __post_init__(self) -> None:
        numbers = [self.k, *(self.weights or {}).values()]
        if not all(np.isfinite(n) and 0 <= n < 1e6 for n in numbers) or self.k == 0:
            raise ValueError(f"k and weights must be finite and not negative: {self}")
        if self.method not in ("rrf", "linear") or self.scaling not in SCALINGS:
            raise ValueError(f"no such method or scaling: {self.method}, {self.scaling}")

    def weight(self, leg: str) -> float:
        """What a leg weighs."""
        return float((self.weights or {}).get(leg, 1.0 if self.method == "rrf" else 0.0))


@dataclass(frozen=True, slots=True)
class Share:
    """What one leg gave to a passage's score."""

    leg: str
    rank: int | None
    """From 1; None: the leg has not found it."""
    score: float | None
    """The leg's own."""
    scaled: float
    """1 / (k + rank), or the scaled score."""
    weight: float


@dataclass(frozen=True, slots=True)
class Fused:
    """Passages of all legs, best first."""

    positions: Positions
    scores: Floats
    legs: Mapping[str, Leg]
    fusion: Fusion

    def shares(self, position: int) -> list[Share]:
        """The derivation of one passage's score: it is the sum of scaled × weight."""
        found = []
        for name, leg in self.legs.items():
            at = np.flatnonzero(leg.positions == position)
            rank = int(at[0]) + 1 if len(at) else None
            scaled = _column(leg, np.asarray([position], dtype=np.intp), self.fusion)
            score = float(leg.scores[rank - 1]) if rank else None
            found.append(Share(name, rank, score, float(scaled[0]), self.fusion.weight(name)))
        return found


def fuse(legs: Mapping[str, Leg], fusion: Fusion) -> Fused:
    """Fuse; ties go by position, so that the same question is always answered the same way."""
    present = {name: leg for name, leg in legs.items() if fusion.weight(name) > 0}
    if not any(len(leg.positions) for leg in present.values()):
        empty = np.empty(0, dtype=np.intp)
        return Fused(empty, np.empty(0), legs, fusion)
    union = np.unique(np.concatenate([leg.positions for leg in present.values()]))
    total = np.zeros(len(union))
    for name, leg in present.items():
        total += fusion.weight(name) * _column(leg, union, fusion)
    order = np.argsort(-total, kind="stable")
    return Fused(union[order], total[order], legs, fusion)


def fit(
    queries: Sequence[tuple[Mapping[str, Leg], Mapping[int, float]]],
    *,
    steps: int = 20,
    k: int = 10,
) -> Fusion:
    """The linear fusion with the best mean nDCG@k on judged queries.

    Weights are tried on a grid of ``steps`` parts; for two or three legs all of it. What lies
    in the middle of the best region is taken rather than its peak, which is chance.

    Args:
        queries: the legs of each query, with the gain of each relevant passage.
        steps: how fine.
        k: depth of the measure.

    Raises:
        ValueError: no queries, or more than three legs.
    """
    names = sorted({name for legs, _ in queries for name in legs})
    if not names or len(names) > 3:
        raise ValueError(f"one to three legs can be fitted, here are {len(names)}")
    grid = [
        tuple(part / steps for part in parts)
        for parts in product(range(steps + 1), repeat=len(names))
        if sum(parts) == steps
    ]
    tried: list[tuple[float, Fusion]] = []
    for scaling in SCALINGS:
        bare = Fusion("linear", scaling=scaling)
        columns = [_columns(legs, names, bare) for legs, _ in queries]
        means = np.zeros(len(grid))
        for (union, scaled), (_, judged) in zip(columns, queries, strict=True):
            for n, parts in enumerate(grid):
                top = np.argsort(-(scaled @ np.asarray(parts)), kind="stable")[:k]
                means[n] += ndcg(union[top].tolist(), judged, k)
        means /= len(queries)
        near = np.flatnonzero(means >= means.max() - 0.002)
        middle = np.mean([grid[n] for n in near], axis=0)
        weights = dict(zip(names, (round(float(w), 4) for w in middle), strict=True))
        tried.append((float(means.max()), Fusion("linear", scaling=scaling, weights=weights)))
    return max(tried, key=lambda pair: pair[0])[1]


def _columns(
    legs: Mapping[str, Leg], names: Sequence[str], fusion: Fusion
) -> tuple[Positions, Floats]:
    """Passages of all legs and their scaled scores, shape (passages, legs)."""
    found = [legs[name].positions for name in names if name in legs]
    union = np.unique(np.concatenate(found))
    scaled = np.zeros((len(union), len(names)))
    for n, name in enumerate(names):
        if name in legs:
            scaled[:, n] = _column(legs[name], union, fusion)
    return union, scaled


def _column(leg: Leg, union: Positions, fusion: Fusion) -> Floats:
    """The scaled scores of some passages in one leg."""
    if not len(leg.positions):
        return np.zeros(len(union))
    order = np.argsort(leg.positions, kind="stable")
    at = np.searchsorted(leg.positions, union, sorter=order)
    index = order[np.minimum(at, len(order) - 1)]
    listed = leg.positions[index] == union
    if fusion.method == "rrf":
        return np.where(listed, 1.0 / (fusion.k + 1.0 + index), 0.0)
    scores = leg.scores.astype(np.float64)
    floor = 0.0 if leg.complete else float(scores[-1])
    low, high = min(floor, float(scores[-1])), float(scores[0])
    raw = np.where(listed, scores[index], floor)
    if fusion.scaling == "max":
        return raw / high if high > 0 else np.zeros(len(union))
    if fusion.scaling == "minmax":
        return (raw - low) / (high - low) if high > low else np.where(listed, 1.0, 0.0)
    deviation = float(scores.std())
    return (raw - float(scores.mean())) / deviation if deviation > 0 else np.zeros(len(union))
