"""Markdown: sections, paragraphs, code and tables.

A scanner of lines, not a Markdown parser: only what decides where a text may be cut is
recognised. A parser was rejected because it gives no exact offsets.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from llmos.drivers.documents.pieces import Block, Piece, lines, pack, trimmed

_HEADING = re.compile(r" {0,3}(#{1,6})(?=[ \t]|$)")
_UNDERLINE = re.compile(r" {0,3}(=+|-+)[ \t]*$")
_FENCE = re.compile(r" {0,3}(`{3,}|~{3,})(.*)$")
_RULE_CELL = re.compile(r":?-+:?")
_MARKS = re.compile(r"[*_`]+|!?\[([^\]]*)\]\([^)]*\)")

_HEADING_CHARS = 200
"""What of a heading goes into the title; it is repeated in every passage below it."""


def read_markdown(document: str, *, max_chars: int, overlap: int) -> list[Piece]:
    """Pieces of a Markdown text, each titled with the headings above it.

    A heading stands both in the title and in the text of the first piece under it. Code
    and tables are cut only where they alone are too long.
    """
    blocks = _Scanner(document).blocks()
    return list(pack(document, blocks, max_chars=max_chars, overlap=overlap))


class _Scanner:
    def __init__(self, document: str) -> None:
        self.document = document
        self.spans = list(lines(document))
        self.texts = [document[a:b].rstrip("\r\n") for a, b in self.spans]
        self.headings: list[tuple[int, str]] = []

    @property
    def title(self) -> str:
        return " > ".join(text for _, text in self.headings if text)

    def blocks(self) -> Iterator[Block]:
        at = self.front_matter()
        if at:
            yield self.block(0, at, whole=True)
        while at < len(self.texts):
            text = self.texts[at]
            if not text.strip():
                at += 1
            elif heading := _HEADING.match(text):
                self.enter(len(heading.group(1)), _closed(text[heading.end() :]))
                yield self.block(at, at + 1, opens=True)
                at += 1
            elif end := self.code(at) or self.table(at):
                yield self.block(at, end, whole=True)
                at = end
            else:
                end, level = self.paragraph(at)
                if level:
                    self.enter(level, " ".join(t.strip() for t in self.texts[at : end - 1]))
                yield self.block(at, end, opens=bool(level))
                at = end

    def block(self, first: int, end: int, *, whole: bool = False, opens: bool = False) -> Block:
        start, stop = trimmed(self.document, self.spans[first][0], self.spans[end - 1][1])
        return Block(start, stop, self.title, whole, opens)

    def enter(self, level: int, text: str) -> None:
        """Go under a heading."""
        while self.headings and self.headings[-1][0] >= level:
            self.headings.pop()
        self.headings.append((level, _MARKS.sub(r"\1", text[:_HEADING_CHARS]).strip()))

    def front_matter(self) -> int:
        """Lines of a metadata block at the top; without this its end looks like a heading."""
        if self.texts[:1] == ["---"]:
            for at in range(1, len(self.texts)):
                if self.texts[at] in ("---", "..."):
                    return at + 1
        return 0

    def code(self, at: int) -> int:
        """The line after a fenced block, or 0. Without a closing fence it goes to the end."""
        opening = _FENCE.match(self.texts[at])
        if not opening or (opening.group(1)[0] == "`" and "`" in opening.group(2)):
            return 0
        fence = opening.group(1)
        for end in range(at + 1, len(self.texts)):
            closing = _FENCE.match(self.texts[end])
            if closing and closing.group(1).startswith(fence) and not closing.group(2).strip():
                return end + 1
        return len(self.texts)

    def table(self, at: int) -> int:
        """The line after a table, or 0."""
        below = self.texts[at + 1] if at + 1 < len(self.texts) else ""
        if "|" not in self.texts[at] or "|" not in below:
            return 0
        cells = below.strip().strip("|").split("|")
        if not all(_RULE_CELL.fullmatch(cell.strip()) for cell in cells):
            return 0
        end = at + 2
        while end < len(self.texts) and "|" in self.texts[end]:
            end += 1
        return end

    def paragraph(self, at: int) -> tuple[int, int]:
        """The line after a paragraph, and its level if it is an underlined heading."""
        end = at + 1
        while end < len(self.texts):
            text = self.texts[end]
            underline = _UNDERLINE.match(text)
            if underline:
                return end + 1, 1 if "=" in text else 2
            if not text.strip() or _HEADING.match(text) or self.code(end) or self.table(end):
                break
            end += 1
        return end, 0


def _closed(text: str) -> str:
    """A heading's text without the number signs that may close it."""
    text = text.strip()
    shorter = text.rstrip("#")
    return shorter.strip() if not shorter or shorter[-1] in " \t" else text
