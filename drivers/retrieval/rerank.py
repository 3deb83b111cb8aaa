"""A second look at the best passages: facts about query and passage, weighed.

The weights come from judged queries: those that make the judged passages the likeliest among
the candidates (a softmax over each query's list, Z. Cao et al., *Learning to Rank*, 2007).
The objective is convex and small, so Newton's method ends in the one best point in a dozen
steps, the same on every machine.

No fact names a passage, so what is learnt of some passages holds for others. A learnt
projection of the embeddings was tried and rejected: it remembers which passages have answered
before, and helps with no others (see ``docs/decisions/0026-fusion-and-reranking.md``).
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt

from llmos.drivers.retrieval.bm25 import Bm25Index
from llmos.drivers.retrieval.words import terms

T = TypeVar("T", bound=Hashable)
Matrix: TypeAlias = npt.NDArray[np.float64]

FEATURES = (
    "lexical",
    "vector",
    "lexical_rank",
    "vector_rank",
    "title",
    "coverage",
    "sentence",
    "pairs",
    "missing",
    "feedback",
    "length",
)
"""``lexical``, ``vector``: the score of the leg over the best one; ``_rank``: 1 / rank;
``title``, ``coverage``, ``sentence``: the share of the query's terms, by how much they tell, in
the title, in all, in the best sentence; ``pairs``: of its neighbouring terms; ``missing``: how
much the most telling absent term tells; ``feedback``: cosine to the middle of the three best
fused passages; ``length``: terms, logarithm."""

_SENTENCE = re.compile(r"(?<=[.!?])\s+|(?<=[。！？])|\n+")
MAX_STEPS = 30
_RARE = 10.0
"""About the idf of a term of one passage in ten thousand; brings ``missing`` near 0…1."""


class Candidates(NamedTuple):
    """What the legs say about some passages; arrays of one length."""

    texts: Sequence[str]
    titles: Sequence[str]
    lexical: npt.NDArray[np.floating]
    """BM25, 0 where nothing is shared."""
    vector: npt.NDArray[np.floating]
    """Cosine to the query."""
    feedback: npt.NDArray[np.floating]
    """Cosine to the middle of the best fused passages' vectors."""


class _Terms(NamedTuple):
    all: frozenset[str]
    title: frozenset[str]
    sentences: tuple[frozenset[str], ...]
    pairs: frozenset[tuple[str, str]]
    length: int


def features(query: str, found: Candidates, index: Bm25Index) -> Matrix:
    """The facts, shape (passages, len(FEATURES)); ``index`` tells how much each term tells."""
    asked = terms(query)
    told = {term: index.idf(term) for term in asked}
    together = {pair: told[pair[0]] + told[pair[1]] for pair in pairwise(asked)}
    out = np.zeros((len(found.texts), len(FEATURES)))
    if not len(out):
        return out
    out[:, 0] = found.lexical / max(float(found.lexical.max()), 1e-9)
    out[:, 1] = found.vector / max(float(found.vector.max()), 1e-9)
    out[:, 2] = 1.0 / _ranks(found.lexical)
    out[:, 3] = 1.0 / _ranks(found.vector)
    for n, (text, title) in enumerate(zip(found.texts, found.titles, strict=True)):
        has = _terms(text, title)
        out[n, 4] = _share(told, has.title)
        out[n, 5] = _share(told, has.all)
        out[n, 6] = max((_share(told, sentence) for sentence in has.sentences), default=0.0)
        out[n, 7] = _share(together, has.pairs)
        out[n, 8] = max((told[t] for t in told if t not in has.all), default=0.0) / _RARE
        out[n, 10] = np.log1p(has.length)
    out[:, 9] = found.feedback
    return out


@dataclass(frozen=True, slots=True)
class Reranker:
    """Weights of the facts."""

    mean: tuple[float, ...]
    scale: tuple[float, ...]
    weights: tuple[float, ...]
    """Of each fact less its mean and over its scale."""

    def __post_init__(self) -> None:
        rows = (self.mean, self.scale, self.weights)
        if any(len(row) != len(FEATURES) for row in rows):
            raise ValueError(f"a reranker has {len(FEATURES)} facts")
        if not all(np.isfinite(row).all() for row in rows) or min(self.scale) <= 0:
            raise ValueError("weights must be finite and scales above 0")

    def scores(self, facts: Matrix) -> Matrix:
        """Higher is better; only differences within one query mean something. Shape (n,)."""
        found: Matrix = ((facts - np.asarray(self.mean)) / np.asarray(self.scale)) @ np.asarray(
            self.weights
        )
        return found


def fit(lists: Sequence[tuple[Matrix, npt.NDArray[np.floating]]], *, l2: float = 0.01) -> Reranker:
    """The weights that make judged passages likeliest.

    Args:
        lists: for each query its candidates' facts and gains; those without a gain are passed
            over, as nothing can be learnt from them.
        l2: how much weights are held back, so that facts which say the same share a weight.

    Raises:
        ValueError: no candidate has a gain.
    """
    useful = [(facts, gains / gains.sum()) for facts, gains in lists if gains.sum() > 0]
    if not useful:
        raise ValueError("no candidate of any query is judged relevant")
    everything = np.concatenate([facts for facts, _ in useful])
    mean = everything.mean(axis=0)
    scale = np.maximum(everything.std(axis=0), 1e-6)
    rows = [((facts - mean) / scale, target) for facts, target in useful]
    weights = np.zeros(len(FEATURES))
    loss, gradient, hessian = _objective(rows, weights, l2)
    for _ in range(MAX_STEPS):
        step = np.linalg.solve(hessian, gradient)
        slope, size = float(gradient @ step), 1.0
        # A whole step may lead uphill far from the lowest point.
        while (there := _objective(rows, weights - size * step, l2))[0] > loss - slope * size / 4:
            size /= 2
            if size < 1e-6:
                break
        weights = weights - size * step
        loss, gradient, hessian = there
        if slope < 1e-10 or size < 1e-6:
            break
    return Reranker(_plain(mean), _plain(scale), _plain(weights))


def _objective(
    rows: Sequence[tuple[Matrix, npt.NDArray[np.floating]]], weights: Matrix, l2: float
) -> tuple[float, Matrix, Matrix]:
    """Mean cross-entropy with the penalty, its gradient and its second derivatives."""
    loss = l2 * float(weights @ weights)
    gradient = 2 * l2 * weights
    hessian: Matrix = 2 * l2 * np.eye(len(weights))
    for facts, target in rows:
        logits = facts @ weights
        logits -= logits.max()
        likely = np.exp(logits)
        total = float(likely.sum())
        likely /= total
        expected = likely @ facts
        loss += (float(np.log(total)) - float(target @ logits)) / len(rows)
        gradient = gradient + (expected - target @ facts) / len(rows)
        spread = (facts * likely[:, None]).T @ facts - np.outer(expected, expected)
        hessian = hessian + spread / len(rows)
    return loss, gradient, hessian


def _plain(row: Matrix) -> tuple[float, ...]:
    return tuple(float(number) for number in row)


def _share(told: Mapping[T, float], has: frozenset[T]) -> float:
    total = sum(told.values())
    return sum(worth for item, worth in told.items() if item in has) / total if total else 0.0


def _ranks(scores: npt.NDArray[np.floating]) -> npt.NDArray[np.intp]:
    ranks = np.empty(len(scores), dtype=np.intp)
    ranks[np.argsort(-scores, kind="stable")] = np.arange(1, len(scores) + 1)
    return ranks


@lru_cache(maxsize=8192)
def _terms(text: str, title: str) -> _Terms:
    inner = [terms(sentence) for sentence in _SENTENCE.split(text)]
    heading = terms(title)
    flat = [*heading, *(term for sentence in inner for term in sentence)]
    return _Terms(
        frozenset(flat),
        frozenset(heading),
        tuple(frozenset(s) for s in (heading, *inner)),
        frozenset(pairwise(flat)),
        len(flat),
    )
