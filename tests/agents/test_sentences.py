from __future__ import annotations

import pytest

from llmos.agents import sentences as text_of

PAGE = """# Refunds

We refund **card payments** in 5 working days. See [fees](x.md), e.g. for cash.
You need:

- your card;
- the receipt

| Service | Fee | Time |
|---|---|---|
| New card | €6 | 5 days |

```
not a sentence
```
It costs 1.5 % abroad. Dr. Smith said so! A line that is
wrapped."""


def test_markdown_becomes_sentences() -> None:
    assert text_of.split_sentences(PAGE) == [
        "We refund card payments in 5 working days.",
        "See fees, e.g. for cash.",
        "You need: your card; the receipt.",
        "New card: fee €6, time 5 days.",
        "It costs 1.5 % abroad.",
        "Dr. Smith said so!",
        "A line that is wrapped.",
    ]


def test_a_cut_off_sentence_is_left_out_of_a_draft() -> None:
    assert text_of.split_sentences("It is free. You must also", whole=True) == ["It is free."]


@pytest.mark.parametrize("text", ["€5", "5 euros", "five euro", "EUR 5".replace("EUR ", "€ ")])
def test_amounts_have_one_spelling(text: str) -> None:
    assert text_of.quantities(text) == {text_of.Quantity("5", "eur")}


def test_units_tell_numbers_apart() -> None:
    stated = text_of.quantities("Refunds take 5 working days and cost €10.")
    assert text_of.covers(text_of.quantities("5 working days"), stated)
    assert not text_of.covers(text_of.quantities("10 working days"), stated)
    assert not text_of.covers(text_of.quantities("€5"), stated)


def test_forms_of_a_word_are_one() -> None:
    assert text_of.stem("cancelled") == text_of.stem("cancel") == text_of.stem("cancelling")
    assert text_of.stem("policies") == text_of.stem("policy")


@pytest.mark.parametrize("text", ["You cannot cancel it.", "It isn't free.", "Never share it."])
def test_denials_are_seen(text: str) -> None:
    assert text_of.is_negative(text)
    assert not text_of.is_negative("You can cancel it. Nothing is said of notes."[:18])


@pytest.mark.parametrize("text", ["", "   ", "###", "| a |", "\x00", "。。", "```", "- \n- "])
def test_odd_texts_do_not_fail(text: str) -> None:
    assert all(s.strip() for s in text_of.split_sentences(text))
