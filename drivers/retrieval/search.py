"""From a question to passages: two legs, fused, looked at again, made diverse.

Pure but for the vectors, which the caller's index holds. Used by the kernel and by
``benchmarks/retrieval.py``, so that what is measured is what runs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from llmos.drivers.protocols import Vectors
from llmos.drivers.retrieval.bm25 import Bm25Index, best
from llmos.drivers.retrieval.diversity import diverse
from llmos.drivers.retrieval.fitted import Fitted
from llmos.drivers.retrieval.fusion import Fused, Fusion, Leg, Positions, Share, fuse
from llmos.drivers.retrieval.rerank import FEATURES, Candidates, features

Allowed: TypeAlias = npt.NDArray[np.bool_]
"""For each passage whether it may be found."""

DEPTH = 100
"""Passages that a leg hands over at least."""
LOOKED_AT = 50
"""Passages that are reranked, or chosen from where the choice is to be diverse."""
_MIDDLE = 3
"""Best fused passages whose middle is the reranker's ``feedback``."""


@dataclass(frozen=True, slots=True)
class Found:
    """A passage and how it came here."""

    position: int
    score: float
    """What it is ordered by, before diversity: the cosine, BM25, the fused score or the
    reranker's, by what was asked for."""
    shares: tuple[Share, ...]
    """What each leg gave to the fused score."""
    fused: float
    """Sum of the shares, each by its weight."""
    facts: Mapping[str, float]
    """What the reranker saw; empty: it was not asked."""


class Searcher:
    """The texts of a corpus, ready to be searched. Never changes; any number of threads."""

    def __init__(
        self,
        texts: Sequence[str],
        titles: Sequence[str],
        rows: Callable[[Sequence[int]], Vectors],
        fitted: Fitted | None = None,
    ) -> None:
        """Index the texts.

        Args:
            texts: of the passages, by position.
            titles: as many.
            rows: the vectors of some passages.
            fitted: how to search; None: as where nothing is known.
        """
        self._texts, self._titles, self._rows = texts, titles, rows
        self.fitted = fitted or Fitted()
        self.lexical_index = Bm25Index(texts, titles, self.fitted.bm25)

    def lexical(self, query: str, depth: int, allowed: Allowed | None = None) -> Leg:
        """The passages that share the most telling terms with the query."""
        scores = self.lexical_index.scores(query)
        if allowed is not None:
            scores = np.where(allowed, scores, np.float32(0))
        positions = best(scores, depth, above=0.0)
        return Leg(positions, scores[positions], complete=len(positions) < depth)

    def search(
        self,
        query: str,
        vector: npt.NDArray[np.float32] | None,
        legs: Mapping[str, Leg],
        k: int,
        *,
        rerank: bool = False,
        diversity: float = 0.0,
    ) -> list[Found]:
        """Fuse the legs and choose k passages, best first.

        Args:
            query: for the reranker.
            vector: its embedding; needed if ``rerank``.
            legs: what each leg has found; a single one is not fused.
            k: how many.
            rerank: look at the best again; without a fitted reranker that changes nothing.
            diversity: 0 to 1, see :func:`llmos.drivers.retrieval.diversity.diverse`.
        """
        fused = _alone(legs) if len(legs) == 1 else fuse(legs, self.fitted.fusion)
        positions, scores = fused.positions, fused.scores
        looked = max(LOOKED_AT, k)
        facts: npt.NDArray[np.float64] | None = None
        reranker = self.fitted.reranker
        if rerank and reranker is not None and vector is not None and len(positions):
            top = positions[:looked]
            facts = self.facts(query, vector, top)
            again = reranker.scores(facts)
            order = np.argsort(-again, kind="stable")
            positions, scores, facts = top[order], again[order], facts[order]
        if diversity > 0:
            positions, scores = positions[:looked], scores[:looked]
            rows = self._rows(positions.tolist())
            chosen = diverse(scores, rows, k, diversity)
        else:
            chosen = list(range(min(k, len(positions))))
        total = dict(zip(fused.positions.tolist(), fused.scores.tolist(), strict=True))
        return [
            Found(
                int(positions[n]),
                float(scores[n]),
                tuple(fused.shares(int(positions[n]))),
                total[int(positions[n])],
                {}
                if facts is None
                else dict(zip(FEATURES, (float(f) for f in facts[n]), strict=True)),
            )
            for n in chosen
        ]

    def facts(
        self, query: str, vector: npt.NDArray[np.float32], positions: Positions
    ) -> npt.NDArray[np.float64]:
        """What the reranker weighs, shape (positions, facts); positions best first."""
        rows = self._rows(positions.tolist())
        found = Candidates(
            [self._texts[p] for p in positions.tolist()],
            [self._titles[p] for p in positions.tolist()],
            self.lexical_index.scores(query)[positions],
            rows @ vector,
            rows @ rows[:_MIDDLE].mean(axis=0),
        )
        return features(query, found, self.lexical_index)


def _alone(legs: Mapping[str, Leg]) -> Fused:
    """A single leg, its scores as they are."""
    ((name, leg),) = legs.items()
    scores = leg.scores.astype(np.float64)
    return Fused(leg.positions, scores, legs, Fusion(weights={name: 1.0}))
