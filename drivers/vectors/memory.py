"""A vector index in one NumPy matrix; needs no package."""

from __future__ import annotations

import numpy as np

from llmos.drivers.protocols import Vectors
from llmos.drivers.vectors.exact import ExactIndex, Labels


class MemoryIndex(ExactIndex):
    """Exact search by one matrix product. For tests and for some ten thousand vectors."""

    def __init__(self, dimension: int) -> None:
        """An empty index. Raises ValueError if ``dimension`` is less than 1."""
        super().__init__(dimension)
        self._clear()

    def _clear(self) -> None:
        self._rows: Vectors = np.empty((0, self._dimension), dtype=np.float32)
        self._labels: Labels = np.empty(0, dtype=np.int64)

    def _add(self, labels: Labels, rows: Vectors) -> None:
        self._rows, self._labels = (
            np.concatenate([self._rows, rows]),
            np.concatenate([self._labels, labels]),
        )

    def _drop(self, labels: Labels) -> None:
        keep = ~np.isin(self._labels, labels)
        self._rows, self._labels = self._rows[keep], self._labels[keep]

    def _nearest(self, queries: Vectors, count: int) -> list[tuple[Labels, float]]:
        with np.errstate(over="ignore", invalid="ignore"):
            scores = queries @ self._rows.T
        best = np.argpartition(-scores, count - 1, axis=1)[:, :count]
        worst = np.take_along_axis(scores, best, axis=1).min(axis=1)
        return [(self._labels[b], float(w)) for b, w in zip(best, worst, strict=True)]

    def _take(self, labels: Labels) -> Vectors:
        # Labels only grow and rows keep their order, so the labels are sorted.
        return self._rows[np.searchsorted(self._labels, labels)]

    def _everything(self) -> tuple[Labels, Vectors]:
        return self._labels, self._rows
