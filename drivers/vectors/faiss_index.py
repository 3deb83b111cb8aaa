"""A vector index in faiss: exact search over a flat matrix, in native code."""

from __future__ import annotations

import faiss
import numpy as np

from llmos.drivers.protocols import Vectors
from llmos.drivers.vectors.exact import ExactIndex, Labels


class FaissIndex(ExactIndex):
    """Exact inner-product search with faiss, without the GIL."""

    def __init__(self, dimension: int) -> None:
        """An empty index. Raises ValueError if ``dimension`` is less than 1."""
        super().__init__(dimension)
        self._clear()

    def _clear(self) -> None:
        self._index = faiss.IndexIDMap2(faiss.IndexFlatIP(self._dimension))

    def _add(self, labels: Labels, rows: Vectors) -> None:
        self._index.add_with_ids(rows, labels)

    def _drop(self, labels: Labels) -> None:
        self._index.remove_ids(faiss.IDSelectorBatch(labels))

    def _nearest(self, queries: Vectors, count: int) -> list[tuple[Labels, float]]:
        scores, labels = self._index.search(queries, count)
        # -1 stands for "no row": a score that is not a number.
        return [
            (row[row >= 0], float(worst)) for row, worst in zip(labels, scores[:, -1], strict=True)
        ]

    def _take(self, labels: Labels) -> Vectors:
        rows: Vectors = self._index.reconstruct_batch(labels)
        return rows

    def _everything(self) -> tuple[Labels, Vectors]:
        if not self._index.ntotal:
            return np.empty(0, dtype=np.int64), np.empty((0, self._dimension), dtype=np.float32)
        rows: Vectors = self._index.index.reconstruct_n(0, self._index.ntotal)
        return faiss.vector_to_array(self._index.id_map), rows
