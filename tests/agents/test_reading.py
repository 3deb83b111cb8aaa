from __future__ import annotations

import pytest

from llmos.agents.reading import MAX_TERMS, amount_in, days_in, term_facts, terms


def test_a_denial_reaches_to_the_end_of_the_clause() -> None:
    said = terms("I have no fever, but a stiff neck.")
    assert said["fever"] is True
    assert said["stiff-neck"] is False


def test_said_once_without_denial_counts() -> None:
    assert terms("No pain yesterday. Now pain.")["pain"] is False


def test_terms_are_bounded() -> None:
    text = " ".join(f"w{n}" for n in range(4000))
    assert len(term_facts(text)) == MAX_TERMS


@pytest.mark.parametrize(
    ("text", "amount"),
    [
        ("I paid €38.20 twice", (38.20, "EUR")),
        ("1.250,50 euros", (1250.5, "EUR")),
        ("$1,200 for a sofa", (1200.0, "USD")),
        ("a loan of 6000 euros", (6000.0, "EUR")),
        ("20 pounds", (20.0, "GBP")),
        ("in 5 days", None),
    ],
)
def test_amounts(text: str, amount: tuple[float, str] | None) -> None:
    assert amount_in(text) == amount


@pytest.mark.parametrize(
    ("text", "days"),
    [("5 days ago", 5), ("two weeks ago", 14), ("yesterday", 1), ("it takes 5 days", None)],
)
def test_days(text: str, days: int | None) -> None:
    assert days_in(text) == days
