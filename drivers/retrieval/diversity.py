"""A choice of passages that do not say the same again (maximal marginal relevance,
J. Carbonell, J. Goldstein, 1998)."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


def diverse(
    scores: npt.NDArray[np.floating],
    vectors: npt.NDArray[np.floating],
    k: int,
    diversity: float,
) -> list[int]:
    """Indices of k candidates, in the order of choice.

    Each next one has the highest ``(1 - diversity) × relevance - diversity × likeness``, where
    relevance is the score scaled to 0…1 among the candidates and likeness the highest cosine
    to one that is chosen already. The cost grows with k × candidates.

    Args:
        scores: shape (n,).
        vectors: rows of length 1, shape (n, dimension).
        k: how many at most.
        diversity: 0: by score alone, 1: by unlikeness alone (after the first).

    Raises:
        ValueError: ``diversity`` is not in 0…1, or the two differ in number.
    """
    if not 0 <= diversity <= 1:
        raise ValueError(f"diversity is {diversity}, not between 0 and 1")
    if len(scores) != len(vectors):
        raise ValueError(f"{len(scores)} scores for {len(vectors)} vectors")
    count = len(scores)
    if not count or k <= 0:
        return []
    low, high = float(scores.min()), float(scores.max())
    relevance = (scores - low) / (high - low) if high > low else np.ones(count)
    likeness = np.full(count, -np.inf)
    open_ = np.ones(count, dtype=bool)
    chosen: list[int] = []
    while len(chosen) < min(k, count):
        if chosen:
            likeness = np.maximum(likeness, vectors @ vectors[chosen[-1]])
            worth = (1 - diversity) * relevance - diversity * likeness
        else:
            worth = np.asarray(relevance, dtype=np.float64)
        nxt = int(np.argmax(np.where(open_, worth, -np.inf)))
        open_[nxt] = False
        chosen.append(nxt)
    return chosen
