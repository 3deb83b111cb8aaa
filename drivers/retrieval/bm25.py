"""BM25 over passages in memory.

A passage's text and title are one field, the title counted several times. The weight of a
term in a passage is computed when the index is built, so a query adds up a few columns.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from llmos.drivers.retrieval.words import terms

Scores: TypeAlias = npt.NDArray[np.float32]
"""A number for each passage, in the order of the index."""

MAX_QUERY_TERMS = 256
"""Distinct terms of a query that are looked up, the first ones; bounds what a query costs."""


@dataclass(frozen=True, slots=True)
class Bm25Options:
    """Constants of BM25 (S. Robertson, H. Zaragoza, *The Probabilistic Relevance Framework*)."""

    k1: float = 1.2
    """How soon more of the same term counts no more."""
    b: float = 0.75
    """How much a long passage is held against it, 0 to 1."""
    title: int = 1
    """How many times the title is counted; 0: not at all."""

    def __post_init__(self) -> None:
        if not (0 <= self.k1 < 100 and 0 <= self.b <= 1 and 0 <= self.title < 100):
            raise ValueError(f"k1, b and title are out of range: {self}")


class Bm25Index:
    """Passages by position. Never changes, so any number of threads may search it."""

    def __init__(
        self,
        texts: Sequence[str],
        titles: Sequence[str] = (),
        options: Bm25Options = Bm25Options(),
    ) -> None:
        """Index the texts; ``titles`` is empty or as long as ``texts``.

        Raises:
            ValueError: the two differ in number.
        """
        if titles and len(titles) != len(texts):
            raise ValueError(f"{len(titles)} titles for {len(texts)} texts")
        self._count = len(texts)
        vocabulary: dict[str, int] = {}
        rows: list[int] = []
        columns: list[int] = []
        counts: list[int] = []
        lengths = np.zeros(len(texts), dtype=np.float32)
        for n, text in enumerate(texts):
            found = Counter(terms(text))
            if titles and options.title:
                for term, count in Counter(terms(titles[n])).items():
                    found[term] += options.title * count
            lengths[n] = found.total()
            for term, count in found.items():
                rows.append(n)
                columns.append(vocabulary.setdefault(term, len(vocabulary)))
                counts.append(count)
        self._vocabulary = vocabulary
        column = np.asarray(columns, dtype=np.int64)
        order = np.argsort(column, kind="stable")
        row = np.asarray(rows, dtype=np.int32)[order]
        tf = np.asarray(counts, dtype=np.float32)[order]
        having = np.bincount(column, minlength=len(vocabulary)).astype(np.float64)
        self._idf = np.log1p((self._count - having + 0.5) / (having + 0.5)).astype(np.float32)
        self._starts = np.concatenate(([0], np.cumsum(having))).astype(np.int64)
        mean = float(lengths.mean()) if len(texts) else 1.0
        norm = options.k1 * (1 - options.b + options.b * lengths / max(mean, 1e-9))
        idf = np.repeat(self._idf, np.diff(self._starts))
        self._rows = row
        self._weights = (idf * tf * (options.k1 + 1) / (tf + norm[row])).astype(np.float32)

    def __len__(self) -> int:
        return self._count

    def idf(self, term: str) -> float:
        """How much a term tells; a term of no passage tells as much as one of none would."""
        found = self._vocabulary.get(term)
        if found is None:
            return float(np.log1p((self._count + 0.5) / 0.5))
        return float(self._idf[found])

    def scores(self, query: str) -> Scores:
        """The score of every passage, 0 where no term is shared. Shape (len(self),)."""
        out = np.zeros(self._count, dtype=np.float32)
        for n, (term, count) in enumerate(Counter(terms(query)).items()):
            if n == MAX_QUERY_TERMS:
                break
            found = self._vocabulary.get(term)
            if found is not None:
                part = slice(self._starts[found], self._starts[found + 1])
                # A passage is in a term's list once, so no addition is lost.
                out[self._rows[part]] += count * self._weights[part]
        return out


def best(scores: Scores, k: int, *, above: float = -np.inf) -> npt.NDArray[np.intp]:
    """Positions of the k highest scores above a bound, best first, ties by position."""
    wanted = min(k, len(scores))
    if wanted <= 0:
        return np.empty(0, dtype=np.intp)
    if wanted < len(scores):
        # All that tie with the k-th are looked at: which one is taken is then no chance.
        least = np.partition(scores, len(scores) - wanted)[len(scores) - wanted]
        chosen = np.flatnonzero(scores >= least)
    else:
        chosen = np.arange(len(scores))
    chosen = chosen[np.argsort(-scores[chosen], kind="stable")][:wanted]
    return chosen[scores[chosen] > above]
