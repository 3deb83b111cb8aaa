"""What every reader of running text must do, and samples of text."""

from __future__ import annotations

from hypothesis import strategies as st

from llmos.drivers.documents.pieces import Piece

_LINE = st.sampled_from(
    [
        "",
        " ",
        "# One",
        "## Two ##",
        "### ",
        "#nospace",
        "Under",
        "===",
        "---",
        "```python",
        "```",
        "~~~~",
        "| a | b |",
        "|---|:-:|",
        "| 1 | 2 |",
        "A sentence. Another one! And 漢字。もう一つ。 End?",
        "- item with some words in it",
        "    indented",
        "word " * 30,
        "x" * 150,
        "\u2028odd\x0bspaces\x85",
        "> quoted",
    ]
)
DOCUMENTS = st.one_of(
    st.lists(st.tuples(_LINE, st.sampled_from(["\n", "\r\n", "\n\n", "\r"])), max_size=25).map(
        lambda parts: "".join(line + end for line, end in parts)
    ),
    st.text(max_size=200),
)


def check_pieces(document: str, pieces: list[Piece], max_chars: int, overlap: int) -> None:
    """Spans are exact, ordered and bounded, and nothing but white space is outside them."""
    covered = 0
    for piece in pieces:
        assert piece.text == document[piece.start : piece.end]
        assert piece.text == piece.text.strip() != ""
        assert piece.end - piece.start <= max_chars
        assert piece.start >= covered - overlap
        assert piece.end > covered
        assert not document[covered : piece.start].strip()
        covered = piece.end
    assert not document[covered:].strip()
    starts = [piece.start for piece in pieces]
    assert starts == sorted(set(starts))
