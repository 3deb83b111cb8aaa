"""What every exact vector index must do."""

from __future__ import annotations

import json
import os
import pickle
import threading
from pathlib import Path

import numpy as np
import pytest

from llmos.drivers.errors import DimensionMismatch, IndexMismatch, NotFinite
from llmos.drivers.protocols import VectorIndex, Vectors


def unit(count: int, dimension: int, seed: int = 0) -> Vectors:
    rows = np.random.default_rng(seed).normal(size=(count, dimension)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def names(count: int) -> list[str]:
    return [f"p{i:04}" for i in range(count)]


class VectorsSuite:
    def make(self, dimension: int) -> VectorIndex:
        raise NotImplementedError

    def filled(self, count: int = 200, dimension: int = 8) -> VectorIndex:
        index = self.make(dimension)
        index.upsert(names(count), unit(count, dimension))
        return index

    def test_nearest_first_with_true_scores(self) -> None:
        index, rows = self.filled(), unit(200, 8)
        queries = unit(5, 8, seed=1)
        for query, hits in zip(queries, index.search(queries, 7), strict=True):
            expected = rows.astype(np.float64) @ query.astype(np.float64)
            order = np.argsort(-expected)[:7]
            assert [h.id for h in hits] == [names(200)[i] for i in order]
            assert [h.score for h in hits] == pytest.approx(expected[order])
        assert len(index) == 200
        assert index.dimension == 8

    def test_rows_come_back_in_the_order_asked_for(self) -> None:
        index, rows = self.filled(), unit(200, 8)
        index.upsert(["p0007"], -rows[7:8])
        index.remove(["p0001"])
        np.testing.assert_array_equal(
            index.rows(["p0199", "p0007", "p0000", "p0199"]),
            np.stack([rows[199], -rows[7], rows[0], rows[199]]),
        )
        assert index.rows([]).shape == (0, 8)
        with pytest.raises(KeyError):
            index.rows(["p0000", "p0001"])

    def test_ties_go_by_id_at_any_k(self) -> None:
        index = self.make(24)
        rows = np.repeat(unit(1, 24), 300, axis=0)
        index.upsert(names(300)[::-1], rows)
        index.upsert(["far"], -rows[:1])
        for k in (1, 17, 100, 300):
            assert [h.id for h in index.search(rows[:1], k)[0]] == names(300)[:k]
        assert index.search(rows[:1], 999)[0][-1].id == "far"

    def test_upsert_replaces(self) -> None:
        index = self.filled()
        index.upsert(["p0003", "new"], -unit(2, 8))
        assert len(index) == 201
        assert index.search(-unit(1, 8), 1)[0][0].id == "p0003"
        assert index.search(unit(4, 8)[3:], 1)[0][0].id != "p0003"

    def test_remove(self) -> None:
        index = self.filled()
        assert index.remove(["p0000", "p0000", "nobody", "p0007"]) == 2
        assert len(index) == 198
        assert index.remove(["p0000"]) == 0
        found = {h.id for h in index.search(unit(1, 8), 500)[0]}
        assert found == set(names(200)) - {"p0000", "p0007"}
        index.upsert(["p0000"], unit(1, 8))
        assert index.search(unit(1, 8), 1)[0][0].id == "p0000"

    def test_empty_index_no_queries_no_ids_k_zero(self) -> None:
        index = self.make(4)
        nothing = np.zeros((0, 4), dtype=np.float32)
        assert index.search(unit(2, 4), 3) == [[], []]
        index.upsert([], nothing)
        assert len(index) == 0
        index.upsert(["a"], unit(1, 4))
        assert index.search(nothing, 3) == []
        assert index.search(unit(1, 4), 0) == [[]]
        assert len(index.search(unit(1, 4), 10)[0]) == 1
        with pytest.raises(ValueError, match="k is"):
            index.search(unit(1, 4), -1)
        index.remove(["a"])
        assert index.search(unit(1, 4), 3) == [[]]

    @pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e39])
    def test_not_finite_is_refused_before_anything_changes(self, bad: float) -> None:
        index = self.filled(3)
        before = index.search(unit(1, 8), 3)
        rows = unit(2, 8, seed=5).astype(np.float64)
        rows[1, 2] = bad
        with pytest.raises(NotFinite) as caught:
            index.upsert(["p0000", "bad"], rows)  # type: ignore[arg-type]
        assert caught.value.ids == ("bad",)
        with pytest.raises(NotFinite):
            index.search(rows, 1)  # type: ignore[arg-type]
        assert index.search(unit(1, 8), 3) == before
        assert len(index) == 3

    def test_wrong_shapes_are_refused_before_anything_changes(self) -> None:
        index = self.filled(3)
        with pytest.raises(DimensionMismatch) as caught:
            index.upsert(["a"], unit(1, 9))
        assert (caught.value.expected, caught.value.found) == (8, 9)
        assert pickle.loads(pickle.dumps(caught.value)).found == 9
        with pytest.raises(DimensionMismatch):
            index.search(unit(1, 7), 1)
        with pytest.raises(ValueError, match="2 ids for 1"):
            index.upsert(["a", "b"], unit(1, 8))
        with pytest.raises(ValueError, match="twice"):
            index.upsert(["a", "a"], unit(2, 8))
        assert len(index) == 3

    def test_extreme_values_are_ranked(self) -> None:
        index = self.make(2)
        rows = np.array([[1e30, 0], [1e25, 0], [0, 1e-30]] * 20, dtype=np.float32)
        index.upsert(names(60), rows)
        hits = index.search(np.array([[1e30, 0]], dtype=np.float32), 25)[0]
        assert [h.id for h in hits[:20]] == names(60)[::3]
        assert [h.id for h in hits[20:]] == names(60)[1::3][:5]

    def test_save_and_load(self, tmp_path: Path) -> None:
        index, other = self.filled(), self.make(8)
        folder = tmp_path / "deep" / "index"
        index.save(folder, "minilm")
        other.upsert(["gone"], unit(1, 8))
        other.load(folder, "minilm")
        assert len(other) == 200
        assert other.search(unit(9, 8, seed=2), 20) == index.search(unit(9, 8, seed=2), 20)
        other.upsert(["more"], unit(1, 8, seed=3))
        other.save(folder, "minilm")
        index.load(folder, "minilm")
        assert len(index) == 201
        header = json.loads((folder / "index.json").read_text())
        assert header["tag"] == "minilm"
        assert (header["dimension"], header["count"], header["format"]) == (8, 201, 1)
        assert len(list(folder.iterdir())) == 3

    def test_an_empty_index_is_saved_too(self, tmp_path: Path) -> None:
        self.make(8).save(tmp_path, "t")
        index = self.filled()
        index.load(tmp_path, "t")
        assert len(index) == 0

    def test_load_refuses_what_does_not_belong(self, tmp_path: Path) -> None:
        index = self.filled()
        with pytest.raises(FileNotFoundError):
            index.load(tmp_path / "none", "t")
        index.save(tmp_path, "t")
        with pytest.raises(IndexMismatch, match="other"):
            index.load(tmp_path, "other")
        with pytest.raises(IndexMismatch):
            self.make(9).load(tmp_path, "t")
        data = next(tmp_path.glob("vectors-*"))
        data.write_bytes(data.read_bytes()[:-40])
        with pytest.raises(IndexMismatch, match="damaged"):
            index.load(tmp_path, "t")
        data.unlink()
        with pytest.raises(IndexMismatch, match="damaged"):
            index.load(tmp_path, "t")
        (tmp_path / "index.json").write_text("{")
        with pytest.raises(IndexMismatch, match="damaged"):
            index.load(tmp_path, "t")
        assert len(index) == 200

    def test_a_failed_save_leaves_the_old_one(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        index = self.filled(5)
        index.save(tmp_path, "t")
        index.upsert(["x"], unit(1, 8))

        def full(*_: object) -> None:
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", full)
            with pytest.raises(OSError, match="No space"):
                index.save(tmp_path, "t")
        index.load(tmp_path, "t")
        assert len(index) == 5
        assert len(list(tmp_path.iterdir())) == 3

    def test_readers_see_whole_changes_while_one_writes(self) -> None:
        index, dimension = self.make(16), 16
        pair = np.repeat(unit(1, dimension), 2, axis=0)
        index.upsert(["a", "b"], pair)
        stop, wrong = threading.Event(), []

        def read() -> None:
            while not stop.is_set():
                hits = index.search(pair[:1], 2)[0]
                if [h.id for h in hits] != ["a", "b"] or hits[0].score != hits[1].score:
                    wrong.append(hits)

        readers = [threading.Thread(target=read) for _ in range(3)]
        for reader in readers:
            reader.start()
        for i in range(300):
            index.upsert(["a", "b"], pair * np.float32(1 + i % 7))
            index.upsert([f"c{i}"], -pair[:1])
            index.remove([f"c{i}"])
        stop.set()
        for reader in readers:
            reader.join(10)
        assert wrong == []
        assert len(index) == 2
