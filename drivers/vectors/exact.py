"""What exact vector indexes have in common: ids, checks, order, locking, files.

**Order.** Engines add up a dot product in different orders, so the last bits of a
score depend on the engine and even on the row's position. Ties would then fall by
chance. So an engine only proposes candidates; their scores are computed again here,
in one way for all, and the search widens until no row outside the candidates could
still belong to the result. All exact drivers therefore give identical answers.

**Locking.** Readers share, a writer is alone (:class:`ReadWriteLock`). Copy-on-write
was rejected: it would copy the whole matrix, gigabytes perhaps, for one new vector.
"""

from __future__ import annotations

import abc
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from llmos.drivers.errors import DimensionMismatch, NotFinite
from llmos.drivers.protocols import VectorHit, Vectors
from llmos.drivers.vectors.files import read_index, write_index
from llmos.drivers.vectors.locks import ReadWriteLock

Labels = npt.NDArray[np.int64]

_SLACK = 16
"""Candidates beyond k that are fetched at first."""

_ROUNDING = 4 * float(np.finfo(np.float32).eps)


class ExactIndex(abc.ABC):
    """A vector index over an engine that finds the nearest rows without approximation."""

    def __init__(self, dimension: int) -> None:
        """An empty index. Raises ValueError if ``dimension`` is less than 1."""
        if dimension < 1:
            raise ValueError(f"dimension is {dimension}, at least 1 is needed")
        self._dimension = dimension
        self._lock = ReadWriteLock()
        self._label_of: dict[str, int] = {}
        self._id_of: dict[int, str] = {}
        self._next_label = 0
        self._longest = 0.0

    @property
    def dimension(self) -> int:
        """Numbers per vector."""
        return self._dimension

    def __len__(self) -> int:
        return len(self._label_of)

    def upsert(self, ids: Sequence[str], vectors: Vectors) -> None:
        """Add vectors or replace those with the same id; all or none.

        Raises:
            DimensionMismatch, NotFinite: nothing was changed.
            ValueError: ids and vectors differ in number, or an id occurs twice.
        """
        rows = self._checked(vectors, empty_ok=not ids)
        if len(rows) != len(ids):
            raise ValueError(f"{len(ids)} ids for {len(rows)} vectors")
        if len(set(ids)) != len(ids):
            raise ValueError("an id occurs twice")
        if (bad := ~np.isfinite(rows).all(axis=1)).any():
            raise NotFinite(ids[i] for i in np.flatnonzero(bad).tolist())
        if not ids:
            return
        with self._lock.write():
            labels = np.arange(self._next_label, self._next_label + len(ids), dtype=np.int64)
            # The new rows go in before the old ones go out: if memory ends here,
            # the index is as it was.
            self._add(labels, rows)
            self._next_label += len(ids)
            old = [self._label_of[i] for i in ids if i in self._label_of]
            for item, label in zip(ids, labels.tolist(), strict=True):
                self._label_of[item] = label
                self._id_of[label] = item
            self._longest = max(self._longest, _longest(rows))
            self._forget(old)

    def remove(self, ids: Sequence[str]) -> int:
        """Remove those that are there; returns how many were."""
        with self._lock.write():
            labels = [self._label_of.pop(i) for i in set(ids) if i in self._label_of]
            self._forget(labels)
            return len(labels)

    def search(self, queries: Vectors, k: int) -> list[list[VectorHit]]:
        """The k nearest of each query, best first, ties by id; fewer if the index holds fewer.

        Raises:
            DimensionMismatch, NotFinite
            ValueError: ``k`` is negative.
        """
        if k < 0:
            raise ValueError(f"k is {k}")
        rows = self._checked(queries, empty_ok=True)
        if not np.isfinite(rows).all():
            raise NotFinite(())
        with self._lock.read():
            size = len(self._label_of)
            wanted = min(k, size)
            if not wanted:
                return [[] for _ in rows]
            return self._search(rows, wanted, min(wanted + _SLACK, size), size)

    def rows(self, ids: Sequence[str]) -> Vectors:
        """The vectors of these ids, in their order. Shape (len(ids), dimension).

        Raises:
            KeyError: one of them is not there.
        """
        if not ids:
            return np.empty((0, self._dimension), dtype=np.float32)
        with self._lock.read():
            labels = np.array([self._label_of[i] for i in ids], dtype=np.int64)
            return self._take(labels)

    def save(self, folder: Path, tag: str) -> None:
        """Write the index, replacing an older one in one step; ``tag`` says what it belongs to."""
        with self._lock.read():
            labels, rows = self._everything()
            ids = [self._id_of[label] for label in labels.tolist()]
            write_index(folder, tag, self._dimension, ids, rows)

    def load(self, folder: Path, tag: str) -> None:
        """Replace the content by what was saved, by this driver or another exact one.

        Raises:
            IndexMismatch: saved with another tag or dimension, or damaged.
            FileNotFoundError: nothing was saved there.
        """
        ids, rows = read_index(folder, tag, self._dimension)
        with self._lock.write():
            self._clear()
            labels = np.arange(len(ids), dtype=np.int64)
            self._add(labels, rows)
            self._label_of = dict(zip(ids, labels.tolist(), strict=True))
            self._id_of = {label: item for item, label in self._label_of.items()}
            self._next_label = len(ids)
            self._longest = _longest(rows)

    def _search(
        self, queries: Vectors, wanted: int, fetch: int, size: int
    ) -> list[list[VectorHit]]:
        if fetch == size:
            labels, rows = self._everything()
            return [self._rank(query, labels, rows, wanted) for query in queries]
        found: list[list[VectorHit]] = []
        unsure: list[int] = []
        for position, (labels, worst) in enumerate(self._nearest(queries, fetch)):
            query = queries[position]
            hits = self._rank(query, labels, self._take(labels), wanted)
            margin = (
                _ROUNDING * self._dimension * self._longest * float(np.linalg.norm(_wide(query)))
            )
            if len(labels) < fetch or not hits[-1].score - worst > 2 * margin:
                unsure.append(position)
            found.append(hits)
        if unsure:
            again = self._search(queries[unsure], wanted, min(fetch * 4, size), size)
            for position, hits in zip(unsure, again, strict=True):
                found[position] = hits
        return found

    def _rank(
        self, query: npt.NDArray[np.float32], labels: Labels, rows: Vectors, wanted: int
    ) -> list[VectorHit]:
        # A product and a sum per row, not a matrix product: equal rows get equal
        # scores wherever they stand.
        scores = (_wide(rows) * _wide(query)).sum(axis=1)
        names = [self._id_of[label] for label in labels.tolist()]
        order = sorted(range(len(names)), key=lambda i: (-scores[i], names[i]))
        return [VectorHit(names[i], float(scores[i])) for i in order[:wanted]]

    def _checked(self, vectors: Vectors, *, empty_ok: bool) -> Vectors:
        with np.errstate(over="ignore"):
            rows = np.ascontiguousarray(vectors, dtype=np.float32)
        if empty_ok and rows.size == 0:
            return rows.reshape(0, self._dimension)
        if rows.ndim != 2:
            raise ValueError(f"vectors must be a matrix, got shape {rows.shape}")
        if rows.shape[1] != self._dimension:
            raise DimensionMismatch(self._dimension, rows.shape[1])
        return rows

    def _forget(self, labels: list[int]) -> None:
        for label in labels:
            del self._id_of[label]
        if labels:
            self._drop(np.array(labels, dtype=np.int64))

    @abc.abstractmethod
    def _add(self, labels: Labels, rows: Vectors) -> None:
        """Add rows under new labels; all or none."""

    @abc.abstractmethod
    def _drop(self, labels: Labels) -> None:
        """Remove rows that are there."""

    @abc.abstractmethod
    def _clear(self) -> None:
        """Remove all rows."""

    @abc.abstractmethod
    def _nearest(self, queries: Vectors, count: int) -> list[tuple[Labels, float]]:
        """Per query the labels of the ``count`` best rows, and the score of the worst of them."""

    @abc.abstractmethod
    def _take(self, labels: Labels) -> Vectors:
        """The rows of these labels."""

    @abc.abstractmethod
    def _everything(self) -> tuple[Labels, Vectors]:
        """All labels and rows."""


def _wide(values: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    return values.astype(np.float64)


def _longest(rows: Vectors) -> float:
    return float(np.sqrt(np.square(rows, dtype=np.float64).sum(axis=1)).max(initial=0.0))
