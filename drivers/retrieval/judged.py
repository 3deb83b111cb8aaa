"""How good a ranking is, by judged queries: nDCG and recall."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from itertools import islice
from math import log2
from typing import TypeVar

T = TypeVar("T", bound=Hashable)


def ndcg(ranking: Iterable[T], judged: Mapping[T, float], k: int = 10) -> float:
    """Normalised discounted cumulative gain of the first k, 0 to 1, gains linear as in
    trec_eval; ``judged``: gain of what is relevant. 0 where nothing is."""
    ideal = _dcg(sorted(judged.values(), reverse=True)[:k])
    return _dcg(judged.get(item, 0.0) for item in islice(ranking, k)) / ideal if ideal else 0.0


def recall(ranking: Iterable[T], judged: Mapping[T, float], k: int = 100) -> float:
    """Share of what is relevant among the first k."""
    relevant = {item for item, gain in judged.items() if gain > 0}
    return len(relevant.intersection(islice(ranking, k))) / len(relevant) if relevant else 0.0


def _dcg(gains: Iterable[float]) -> float:
    return sum(gain / log2(rank + 1) for rank, gain in enumerate(gains, 1))


def folds(judged: Sequence[Mapping[int, float]], count: int) -> list[list[int]]:
    """Queries in ``count`` parts of like size, none of which shares a relevant passage with
    another part. The same in every run.

    Parts cut at random would: then whatever remembers passages seems to foresee answers.

    Raises:
        ValueError: fewer than two parts, or fewer queries than parts.
    """
    if count < 2 or len(judged) < count:
        raise ValueError(f"{len(judged)} queries cannot be cut into {count} parts, 2 at least")
    group = list(range(len(judged)))

    def root(query: int) -> int:
        while group[query] != query:
            group[query] = group[group[query]]
            query = group[query]
        return query

    first: dict[int, int] = {}
    for query, relevant in enumerate(judged):
        for passage in relevant:
            group[root(query)] = root(first.setdefault(passage, query))
    members: dict[int, list[int]] = {}
    for query in range(len(judged)):
        members.setdefault(root(query), []).append(query)
    parts: list[list[int]] = [[] for _ in range(count)]
    for together in sorted(members.values(), key=lambda m: (-len(m), m[0])):
        min(parts, key=len).extend(together)
    return parts
