"""Fusion, reranking, diversity, and the file that keeps what was fitted."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmos.drivers.errors import FusionFileError
from llmos.drivers.retrieval import fusion, rerank
from llmos.drivers.retrieval.bm25 import Bm25Options
from llmos.drivers.retrieval.diversity import diverse
from llmos.drivers.retrieval.filters import Condition, fits_all
from llmos.drivers.retrieval.fitted import Fitted, load
from llmos.drivers.retrieval.fusion import Fusion, Leg, fuse
from llmos.drivers.retrieval.judged import folds, ndcg, recall
from llmos.drivers.retrieval.rerank import FEATURES, Reranker


def leg(*pairs: tuple[int, float], complete: bool = False) -> Leg:
    return Leg(
        np.array([p for p, _ in pairs], dtype=np.intp),
        np.array([s for _, s in pairs], dtype=np.float32),
        complete,
    )


LEGS = {
    "lexical": leg((3, 8.0), (1, 4.0), complete=True),
    "vector": leg((1, 0.9), (2, 0.6), (3, 0.5)),
}


# ------------------------------------------------------------------ fusion


def test_ranks_are_fused_where_nothing_is_known() -> None:
    found = fuse(LEGS, Fusion(k=10))
    assert found.positions.tolist() == [1, 3, 2]
    np.testing.assert_allclose(found.scores, [1 / 11 + 1 / 12, 1 / 11 + 1 / 13, 1 / 12])


@pytest.mark.parametrize(
    ("scaling", "expected"),
    [
        # What the lexical leg has not found has no term of the query, and scores 0.
        ("max", {1: 0.25 + 0.5, 2: 0 + 0.5 * 0.6 / 0.9, 3: 0.5 + 0.5 * 0.5 / 0.9}),
        ("minmax", {1: 0.25 + 0.5, 2: 0 + 0.125, 3: 0.5 + 0}),
    ],
)
def test_scores_are_scaled_and_mixed(scaling: Any, expected: dict[int, float]) -> None:
    found = fuse(LEGS, Fusion("linear", scaling=scaling, weights={"lexical": 0.5, "vector": 0.5}))
    made = dict(zip(found.positions.tolist(), found.scores.tolist(), strict=True))
    assert made == pytest.approx(expected)


@pytest.mark.parametrize("method", ["rrf", "linear"])
@pytest.mark.parametrize("scaling", ["max", "minmax", "z"])
def test_a_score_is_the_sum_of_its_shares(method: Any, scaling: Any) -> None:
    how = Fusion(method, scaling=scaling, weights={"lexical": 0.3, "vector": 0.7})
    found = fuse(LEGS, how)
    for position, score in zip(found.positions.tolist(), found.scores, strict=True):
        shares = found.shares(position)
        assert sum(s.scaled * s.weight for s in shares) == pytest.approx(score)
    (lexical,) = (s for s in found.shares(2) if s.leg == "lexical")
    assert (lexical.rank, lexical.score) == (None, None)


def test_legs_that_found_nothing() -> None:
    assert fuse({}, Fusion()).positions.tolist() == []
    assert fuse({"a": leg(), "b": leg()}, Fusion()).positions.tolist() == []
    assert fuse({"a": leg(), "b": leg((7, 1.0))}, Fusion()).positions.tolist() == [7]
    assert fuse(LEGS, Fusion("linear", weights={"vector": 1})).positions.tolist() == [1, 2, 3]


@given(
    st.lists(st.floats(-5, 5, width=32), min_size=1, max_size=9),
    st.sampled_from(["max", "minmax", "z"]),
)
def test_any_scores_fuse_to_numbers(scores: list[float], scaling: Any) -> None:
    ordered = sorted(scores, reverse=True)
    how = Fusion("linear", scaling=scaling, weights={"a": 1, "b": 1})
    found = fuse({"a": leg(*enumerate(ordered)), "b": leg((100, 0.0))}, how)
    assert np.isfinite(found.scores).all()
    assert len(found.positions) == len(scores) + 1


@pytest.mark.parametrize("wrong", [{"k": 0}, {"weights": {"a": -1.0}}, {"scaling": "sum"}])
def test_a_fusion_that_makes_no_sense_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"must be|no such"):
        Fusion(**wrong)


def test_fitting_finds_the_leg_that_is_right() -> None:
    good, bad = leg((0, 1.0), (1, 0.5), (2, 0.1)), leg((2, 1.0), (1, 0.5), (0, 0.1))
    made = fusion.fit([({"good": good, "bad": bad}, {0: 1.0})] * 3)
    assert made.weight("good") > made.weight("bad")
    with pytest.raises(ValueError, match="here are 0"):
        fusion.fit([])


# ------------------------------------------------------------------ judged


def test_measures() -> None:
    assert ndcg([7, 8, 9], {7: 1.0}) == 1
    assert ndcg([8, 7], {7: 1.0}) == pytest.approx(1 / np.log2(3))
    assert ndcg([1, 2], {2: 2.0, 1: 1.0}) == pytest.approx(
        (1 + 2 / np.log2(3)) / (2 + 1 / np.log2(3))
    )
    assert ndcg([1], {}) == ndcg([], {1: 1.0}) == 0
    assert recall([1, 2, 3], {3: 1.0, 4: 1.0}) == 0.5
    assert recall([1, 2, 3], {3: 1.0}, k=2) == 0


def test_parts_share_no_relevant_passage() -> None:
    judged = [{n // 3: 1.0, 100 + n: 1.0} for n in range(30)]
    parts = folds(judged, 5)
    assert sorted(q for part in parts for q in part) == list(range(30))
    owners: dict[int, int] = {}
    for number, part in enumerate(parts):
        for query in part:
            for passage in judged[query]:
                assert owners.setdefault(passage, number) == number
    with pytest.raises(ValueError, match="cannot be cut"):
        folds(judged[:2], 3)


# ------------------------------------------------------------------ rerank


def _lists(seed: int, queries: int = 40) -> list[tuple[Any, Any]]:
    """Lists in which what has most of fact 5 and least of fact 8 is relevant."""
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(queries):
        facts = rng.normal(size=(12, len(FEATURES)))
        gains = np.zeros(12)
        gains[np.argmax(facts[:, 5] - facts[:, 8])] = 1
        made.append((facts, gains))
    return made


def test_a_reranker_learns_what_tells() -> None:
    made = rerank.fit(_lists(1))
    assert made.weights[5] > 0.3
    assert made.weights[8] < -0.3
    hits = [np.argmax(made.scores(facts)) == np.argmax(gains) for facts, gains in _lists(2)]
    assert sum(hits) >= 32


def test_fitting_is_the_same_every_time_and_passes_over_lists_without_gain() -> None:
    lists = _lists(1)
    empty = (lists[0][0], np.zeros(12))
    assert rerank.fit(lists) == rerank.fit([empty, *lists, empty])
    with pytest.raises(ValueError, match="no candidate"):
        rerank.fit([empty])


@pytest.mark.parametrize("l2", [1e-4, 1e-2, 1.0, 10.0])
def test_the_end_is_the_lowest_point(l2: float) -> None:
    lists = _lists(3)
    made = rerank.fit(lists, l2=l2)
    mean, scale = np.asarray(made.mean), np.asarray(made.scale)

    def loss(weights: Any) -> float:
        total = l2 * float(weights @ weights)
        for facts, gains in lists:
            z = ((facts - mean) / scale) @ weights
            total += (np.log(np.exp(z).sum()) - float(gains @ z)) / len(lists)
        return total

    rng = np.random.default_rng(0)
    weights = np.asarray(made.weights)
    for _ in range(20):
        assert loss(weights) <= loss(weights + rng.normal(size=len(weights)) * 1e-3)


# ------------------------------------------------------------------ diversity


def test_a_copy_gives_way_to_something_else() -> None:
    vectors = np.array([[1, 0], [1, 0], [0, 1]], dtype=np.float32)
    scores = np.array([1.0, 0.99, 0.8])
    assert diverse(scores, vectors, 2, 0.0) == [0, 1]
    assert diverse(scores, vectors, 2, 0.5) == [0, 2]
    assert diverse(scores, vectors, 9, 1.0) == [0, 2, 1]
    assert diverse(scores[:0], vectors[:0], 2, 0.5) == []
    with pytest.raises(ValueError, match="not between"):
        diverse(scores, vectors, 2, 1.5)
    with pytest.raises(ValueError, match="3 scores for 2"):
        diverse(scores, vectors[:2], 2, 0.5)


# ------------------------------------------------------------------ filters


@pytest.mark.parametrize(
    ("operator", "values", "meta", "expected"),
    [
        ("eq", ("5",), {"a": "5.0"}, True),
        ("eq", ("five",), {"a": "5"}, False),
        ("ne", ("5",), {}, True),
        ("eq", ("",), {}, False),
        ("lt", ("10",), {"a": "9"}, True),
        ("lt", ("2024-01-01",), {"a": "2023-12-31"}, True),
        ("ge", ("10",), {"a": "10"}, True),
        ("gt", ("10",), {"a": "10"}, False),
        ("le", ("10",), {"a": "11"}, False),
        ("in", ("x", "y"), {"a": "y"}, True),
        ("in", ("x", "y"), {"a": "z"}, False),
        ("eq", ("nan",), {"a": "nan"}, True),
        ("eq", ("1' OR '1'='1",), {"a": "1"}, False),
    ],
)
def test_conditions(operator: Any, values: Any, meta: dict[str, str], expected: bool) -> None:
    assert Condition("a", operator, values).fits(meta) is expected


def test_all_conditions_must_hold() -> None:
    both = (Condition("a", "eq", ("1",)), Condition("b", "eq", ("2",)))
    assert fits_all(both, {"a": "1", "b": "2"})
    assert not fits_all(both, {"a": "1", "b": "3"})
    assert fits_all((), {})
    with pytest.raises(ValueError, match="2 values"):
        Condition("a", "eq", ("1", "2"))


# ------------------------------------------------------------------ file


def test_what_was_fitted_is_kept(tmp_path: Path) -> None:
    made = Fitted(
        Bm25Options(0.9, 0.4, 2),
        Fusion("linear", scaling="z", weights={"lexical": 0.4, "vector": 0.6}),
        rerank.fit(_lists(1)),
    )
    made.save(tmp_path / "f.json")
    assert load(tmp_path / "f.json") == made
    Fitted().save(tmp_path / "f.json")
    assert load(tmp_path / "f.json") == Fitted()


@pytest.mark.parametrize(
    "change",
    [
        {"version": 9},
        {"features": ["other"]},
        {"bm25": {"k1": "much"}},
        {"bm25": {"k2": 1}},
        {"fusion": {"method": "sum", "k": 1, "scaling": "max", "weights": None}},
        {"fusion": {"method": "rrf", "k": 1, "scaling": "max", "weights": {"a": -1}}},
        {"reranker": {"mean": [1], "scale": [1], "weights": [1]}},
        {"reranker": None, "fusion": None},
    ],
)
def test_a_file_that_was_tampered_with_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    path = tmp_path / "f.json"
    Fitted(reranker=rerank.fit(_lists(1))).save(path)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(FusionFileError) as caught:
        load(path)
    again = pickle.loads(pickle.dumps(caught.value))
    assert (again.path, str(again)) == (str(path), str(caught.value))


@pytest.mark.parametrize("text", ["", "[]", "{", "[" * 100_000, "\x00"])
def test_a_file_that_is_none_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "f.json").write_text(text)
    with pytest.raises(FusionFileError, match="no fitted fusion"):
        load(tmp_path / "f.json")
    with pytest.raises(FusionFileError, match="No such file"):
        load(tmp_path / "none.json")


def test_weights_that_are_no_numbers_are_refused() -> None:
    row = (1.0,) * len(FEATURES)
    with pytest.raises(ValueError, match="finite"):
        Reranker(row, row, (float("nan"),) * len(FEATURES))
    with pytest.raises(ValueError, match="finite"):
        Reranker(row, (0.0,) * len(FEATURES), row)
