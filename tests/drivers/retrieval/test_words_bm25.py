"""Words and BM25."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmos.drivers.retrieval.bm25 import Bm25Index, Bm25Options, best
from llmos.drivers.retrieval.words import stem, terms


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        # From the paper.
        ("caresses", "caress"), ("ponies", "poni"), ("caress", "caress"), ("cats", "cat"),
        ("feed", "feed"), ("agreed", "agre"), ("plastered", "plaster"), ("bled", "bled"),
        ("motoring", "motor"), ("sing", "sing"), ("conflated", "conflat"), ("hopping", "hop"),
        ("falling", "fall"), ("hissing", "hiss"), ("filing", "file"), ("happy", "happi"),
        ("sky", "sky"), ("relational", "relat"), ("conditional", "condit"),
        ("vietnamization", "vietnam"), ("triplicate", "triplic"), ("hopefulness", "hope"),
        ("revival", "reviv"), ("adoption", "adopt"), ("probate", "probat"), ("rate", "rate"),
        ("controll", "control"), ("roll", "roll"), ("generalizations", "gener"),
        # What is no English word stays.
        ("covid19", "covid19"), ("naïves", "naïves"), ("is", "is"),
    ],
)  # fmt: skip
def test_stems(word: str, expected: str) -> None:
    assert stem(word) == expected


def test_terms_of_several_scripts() -> None:
    assert terms("The refunds, in 5 days!") == ["refund", "5", "dai"]
    assert terms("the", stopwords=True) == ["the"]
    assert terms("感冒发烧 and 茶") == ["感冒", "冒发", "发烧", "茶"]
    assert terms("") == []


@given(st.text(max_size=200))
def test_any_text_has_terms(text: str) -> None:
    assert all(term and len(term) <= 64 for term in terms(text))


def test_scores_are_those_of_the_formula() -> None:
    texts = ["cat cat dog", "dog bird", "fish", "cat fish bird bird tree"]
    index = Bm25Index(texts, options=Bm25Options(k1=1.2, b=0.75))
    lengths = [len(t.split()) for t in texts]
    mean = sum(lengths) / 4
    expected = []
    for text, length in zip(texts, lengths, strict=True):
        counts, score = Counter(text.split()), 0.0
        for term, df in (("cat", 2), ("bird", 2)):
            tf = counts[term]
            idf = math.log(1 + (4 - df + 0.5) / (df + 0.5))
            score += idf * tf * 2.2 / (tf + 1.2 * (0.25 + 0.75 * length / mean))
        expected.append(score)
    np.testing.assert_allclose(index.scores("cats and a bird"), expected, rtol=1e-5)


def test_a_title_counts_as_often_as_said() -> None:
    texts, titles = ["about cats", "about dogs"], ["dogs", ""]
    once = Bm25Index(texts, titles, Bm25Options(title=0, b=0)).scores("dog")
    thrice = Bm25Index(texts, titles, Bm25Options(title=3, b=0)).scores("dog")
    assert once[0] == 0 < once[1]
    assert thrice[0] > thrice[1] > 0
    with pytest.raises(ValueError, match="1 titles for 2 texts"):
        Bm25Index(texts, ["one"])


def test_nothing_is_found_by_unknown_words_or_in_nothing() -> None:
    assert not Bm25Index(["cat"]).scores("zebra").any()
    assert not Bm25Index(["cat"]).scores("").any()
    assert len(Bm25Index([]).scores("cat")) == 0


def test_an_endless_query_costs_no_more() -> None:
    index = Bm25Index(["needle"])
    assert not index.scores(" ".join(f"w{n}" for n in range(5000)) + " needle").any()


def test_the_best_are_in_order_and_ties_by_position() -> None:
    scores = np.array([1, 3, 2, 3, 0, 2], dtype=np.float32)
    assert best(scores, 3).tolist() == [1, 3, 2]
    assert best(scores, 99, above=0).tolist() == [1, 3, 2, 5, 0]
    assert best(scores, 0).tolist() == []
    assert best(np.empty(0, dtype=np.float32), 3).tolist() == []


@pytest.mark.parametrize("wrong", [{"k1": -1}, {"b": 2}, {"title": -1}, {"k1": float("nan")}])
def test_options_out_of_range_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="out of range"):
        Bm25Options(**wrong)  # type: ignore[arg-type]
