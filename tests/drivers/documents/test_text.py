from __future__ import annotations

import itertools
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmos.drivers.documents.markdown import read_markdown
from llmos.drivers.documents.plain import read_plain
from tests.drivers.documents.documents_suite import DOCUMENTS, check_pieces


@settings(max_examples=300, deadline=None)
@given(DOCUMENTS, st.integers(1, 400), st.floats(0, 0.5))
def test_spans_are_exact_and_cover_the_document(
    document: str, max_chars: int, share: float
) -> None:
    overlap = int(max_chars * share)
    for read in (read_plain, read_markdown):
        pieces = read(document, max_chars=max_chars, overlap=overlap)
        check_pieces(document, pieces, max_chars, overlap)


def test_paragraphs_are_packed_and_kept_whole() -> None:
    paragraphs = [f"Paragraph {i}. " + "word " * 18 + "end." for i in range(6)]
    pieces = read_plain("\n\n".join(paragraphs), max_chars=250, overlap=0)
    assert [p.text for p in pieces] == ["\n\n".join(paragraphs[i : i + 2]) for i in range(0, 6, 2)]


def test_a_long_paragraph_is_cut_after_a_sentence_then_a_word() -> None:
    text = "The first sentence is here. The second one follows it. And the third ends."
    assert [p.text for p in read_plain(text, max_chars=60, overlap=0)] == [
        "The first sentence is here. The second one follows it.",
        "And the third ends.",
    ]
    assert [p.text for p in read_plain("aaa bbb ccc", max_chars=8, overlap=0)] == ["aaa bbb", "ccc"]
    assert [p.text for p in read_plain("x" * 10, max_chars=4, overlap=0)] == ["xxxx", "xxxx", "xx"]
    assert [p.text for p in read_plain("今日は。明日は。", max_chars=5, overlap=0)] == [
        "今日は。",
        "明日は。",
    ]


def test_overlap_repeats_whole_words() -> None:
    text = " ".join(f"word{i:02}" for i in range(40))
    pieces = read_plain(text, max_chars=70, overlap=20)
    assert len(pieces) > 4
    for before, after in itertools.pairwise(pieces):
        shared = text[after.start : before.end]
        assert 7 <= len(shared) <= 20
        assert shared.split()[0] in before.text.split()


MANUAL = """---
title: x
---
Intro text.

# Guide to *things*

## Install

Run this:

```sh
# not a heading

pip install x
```

Under it
========

| a | b |
|---|---|
| 1 | 2 |

### Deep [link](http://x) ###
deep text
## Back
back text
"""


def test_titles_are_the_headings_above() -> None:
    pieces = read_markdown(MANUAL, max_chars=900, overlap=0)
    assert [(p.title, p.text.splitlines()[0], p.text.splitlines()[-1]) for p in pieces] == [
        ("", "---", "Intro text."),
        ("Guide to things > Install", "# Guide to *things*", "```"),
        ("Under it", "Under it", "| 1 | 2 |"),
        ("Under it > Deep link", "### Deep [link](http://x) ###", "deep text"),
        ("Under it > Back", "## Back", "back text"),
    ]


@pytest.mark.parametrize("fence", ["```", "~~~~"])
def test_code_and_tables_are_not_cut_unless_too_large(fence: str) -> None:
    code = f"{fence}\nfirst line\n\nsecond line\n{fence}"
    table = "| name | value |\n|---|---|\n| a | 1 |\n| b | 2 |"
    text = f"{'Some words here. ' * 4}\n\n{code}\n\n{'More words here. ' * 4}\n{table}\n"
    pieces = read_markdown(text, max_chars=80, overlap=0)
    assert sum(code in p.text for p in pieces) == 1
    assert sum(table in p.text for p in pieces) == 1
    small = read_markdown(code, max_chars=25, overlap=0)
    assert next(p.text for p in small).endswith("first line")
    check_pieces(code, small, 25, 0)


def test_an_open_fence_goes_to_the_end() -> None:
    pieces = read_markdown("```\n# a\n\n# b\n", max_chars=900, overlap=0)
    assert [p.title for p in pieces] == [""]


@pytest.mark.parametrize(
    "document",
    [
        "x" * 3_000_000,
        "# " + " " * 300_000 + "x",
        "| " * 200_000 + "\n" + "-|" * 200_000,
        "[" * 200_000,
        "a. " * 300_000,
        "```\n" * 60_001,
        "# h\n" * 60_000,
    ],
    ids=["one word", "spaces", "bars", "brackets", "sentences", "fences", "headings"],
)
def test_time_grows_with_the_text_only(document: str) -> None:
    started = time.perf_counter()
    for read in (read_plain, read_markdown):
        check_pieces(document, read(document, max_chars=900, overlap=0), 900, 0)
    assert time.perf_counter() - started < 10


def test_a_heading_keeps_company_with_its_text() -> None:
    sentence = "A sentence of some words. "
    pieces = read_markdown("## Refunds\n\n" + sentence * 7, max_chars=190, overlap=0)
    assert [p.title for p in pieces] == ["Refunds", "Refunds"]
    assert pieces[0].text.startswith("## Refunds\n\nA sentence")
    assert pieces[1].text.startswith("A sentence")
