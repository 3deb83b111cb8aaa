"""Cutting a text into pieces whose places in it are known.

A reader finds the blocks of a document (paragraphs, code, tables); here they are
packed into pieces, and a block that is too large for a piece is cut. Everything works
on offsets, so a piece's text is ``document[start:end]`` and nothing gets lost between.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace

_LINE = re.compile(r"[^\r\n]*(?:\r\n|\n|\r)|[^\r\n]+$")
# The point after a number begins a list item or a decimal, it ends no sentence.
_SENTENCE_END = re.compile(r"(?<!\d)[.!?…][\"'”’)\]]*(?=\s)|[。！？]|\n")
_SPACE = re.compile(r"\s")
_TEXT = re.compile(r"\S")


@dataclass(frozen=True, slots=True)
class Block:
    """A stretch of a document that belongs together; no white space at its ends."""

    start: int
    end: int
    title: str = ""
    """The path of headings it stands under."""
    whole: bool = False
    """Code or a table: cut only if too large for a piece, and then between lines."""
    opens: bool = False
    """A heading: begins a new piece, unless only headings stand before it in the piece."""


@dataclass(frozen=True, slots=True)
class Piece:
    """What becomes a passage."""

    start: int
    end: int
    text: str
    title: str = ""
    meta: Mapping[str, str] = field(default_factory=dict)


def lines(document: str) -> Iterator[tuple[int, int]]:
    """Offsets of each line, its line end included.

    ``str.splitlines`` was rejected: it also cuts at form feeds and U+2028, which people
    do not see as line ends.
    """
    for match in _LINE.finditer(document):
        yield match.span()


def trimmed(document: str, start: int, end: int) -> tuple[int, int]:
    """The span without white space at its ends; empty where there is nothing else."""
    # No slice of the rest of the document: in a text of one huge paragraph that would be
    # copied once per piece.
    first = _TEXT.search(document, start, end)
    if first is None:
        return end, end
    while document[end - 1].isspace():
        end -= 1
    return first.start(), end


def pack(
    document: str, blocks: Iterable[Block], *, max_chars: int, overlap: int
) -> Iterator[Piece]:
    """Pack blocks, in order, into pieces of at most ``max_chars`` characters.

    A piece holds blocks under one path of headings. With ``overlap``, a piece that goes
    on in running text begins up to that many characters earlier, at a word.
    """
    budget = max_chars - overlap
    current: list[Block] = []
    before: Block | None = None
    for block in _cut(document, blocks, budget):
        fits = current and block.end - current[0].start <= budget
        bare = all(b.opens for b in current)
        if fits and (block.title == current[-1].title or bare) and (bare or not block.opens):
            current.append(block)
            continue
        if current and bare and not fits and not block.opens:
            # A piece of headings alone would be found for its words and say nothing.
            first, block = _split(document, block, current[0].start + budget)
            current.extend(first)
        if current:
            yield _piece(document, current, before, overlap)
            before = current[-1]
        current = [block]
    if current:
        yield _piece(document, current, before, overlap)


def _piece(document: str, blocks: list[Block], before: Block | None, overlap: int) -> Piece:
    start, end, title = blocks[0].start, blocks[-1].end, blocks[-1].title
    if (
        overlap
        and before is not None
        and before.title == title
        and not (before.whole or before.opens or blocks[0].whole or blocks[0].opens)
    ):
        # Never back to where the piece before began: it would be repeated as a whole.
        space = _SPACE.search(document, max(before.start, start - overlap - 1), start)
        earliest = space.end() if space else start
        start = min(trimmed(document, earliest, start)[0], start)
    return Piece(start, end, document[start:end], title)


def _split(document: str, block: Block, limit: int) -> tuple[list[Block], Block]:
    """What of a paragraph can stay before ``limit``, if that is a fair part, and the rest."""
    if block.whole or limit - block.start < min(block.end - block.start, 120) // 2:
        return [], block
    cut = _cut_at(document, block.start, limit, False)
    first, rest = trimmed(document, block.start, cut), trimmed(document, cut, block.end)
    if first[0] == first[1] or rest[0] == rest[1]:
        return [], block
    return [replace(block, start=first[0], end=first[1])], replace(
        block, start=rest[0], end=rest[1]
    )


def _cut(document: str, blocks: Iterable[Block], bound: int) -> Iterator[Block]:
    for block in blocks:
        start = block.start
        while block.end - start > bound:
            cut = _cut_at(document, start, start + bound, block.whole)
            begin, end = trimmed(document, start, cut)
            if begin < end:
                yield Block(begin, end, block.title, block.whole, block.opens)
            start = trimmed(document, cut, block.end)[0] if not block.whole else cut
        begin, end = trimmed(document, start, block.end)
        if begin < end:
            yield Block(begin, end, block.title, block.whole, block.opens)


def _cut_at(document: str, start: int, end: int, whole: bool) -> int:
    """The best place in (start, end] to cut: after a line, a sentence, a word, or at the end."""
    if whole:
        newline = document.rfind("\n", start, end)
        if newline > start:
            return newline + 1
    else:
        newline = document.rfind("\n", start + (end - start) * 2 // 3, end)
        if newline >= 0:
            return newline + 1
        least = start + (end - start) // 3
        ends = [m.end() for m in _SENTENCE_END.finditer(document, least, end)]
        if ends:
            return ends[-1]
    for position in range(end, start, -1):
        if document[position - 1].isspace():
            return position
    return end
