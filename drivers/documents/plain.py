"""Plain text: paragraphs, packed."""

from __future__ import annotations

from collections.abc import Iterator

from llmos.drivers.documents.pieces import Block, Piece, lines, pack, trimmed


def read_plain(document: str, *, max_chars: int, overlap: int) -> list[Piece]:
    """Pieces of a text; a paragraph is cut only where it is too long."""
    return list(pack(document, _paragraphs(document), max_chars=max_chars, overlap=overlap))


def _paragraphs(document: str) -> Iterator[Block]:
    begin = end = 0
    for start, stop in lines(document):
        if document[start:stop].isspace():
            if begin < end:
                yield Block(*trimmed(document, begin, end))
            begin = end = stop
        else:
            end = stop
    if begin < end:
        yield Block(*trimmed(document, begin, end))
