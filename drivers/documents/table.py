"""CSV and JSON lines: a passage per row."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping

from llmos.drivers.documents.pieces import Piece, lines, trimmed

MAX_PROBLEMS = 20
"""Rows of one file that are named when they cannot be read; the others are counted."""


class Problems:
    """What is wrong with rows of a file."""

    def __init__(self) -> None:
        self._named: list[str] = []
        self._more = 0

    def add(self, line: int, reason: str) -> None:
        """Note a row."""
        if len(self._named) < MAX_PROBLEMS:
            self._named.append(f"line {line}: {reason}")
        else:
            self._more += 1

    def reasons(self) -> list[str]:
        """One sentence per row, and one for those beyond the bound."""
        more = [f"{self._more} more rows cannot be read"] if self._more else []
        return [*self._named, *more]


def read_csv(document: str) -> tuple[list[Piece], list[str]]:
    """A piece per row, and what is wrong with the others.

    With the columns ``question`` and ``answer`` the text is both, one below the other;
    with ``text`` it is that column; else it is all cells, as ``column: cell``. A column
    ``title`` becomes the title; the rest is in ``meta``. The span is the row's.
    """
    problems = Problems()
    pieces: list[Piece] = []
    header: list[str] | None = None
    for line, start, end, cells in _csv_rows(document, problems):
        if header is None:
            header = [cell.strip().lower() for cell in cells]
            if len(set(header)) != len(header):
                problems.add(line, "a column occurs twice; nothing of the file was read")
                break
            continue
        if len(cells) != len(header):
            problems.add(line, f"{len(cells)} cells, the header has {len(header)}")
            continue
        row = dict(zip(header, cells, strict=True))
        piece = _piece(start, end, row, spell_out=True)
        if piece is None:
            problems.add(line, "no text in it")
        else:
            pieces.append(piece)
    return pieces, problems.reasons()


def read_jsonl(document: str) -> tuple[list[Piece], list[str]]:
    """A piece per line, and what is wrong with the others.

    Each line is an object with ``question`` and ``answer``, or with ``text``. A ``title``
    becomes the title; other values are in ``meta``, as JSON where they are no texts.
    """
    problems = Problems()
    pieces: list[Piece] = []
    position = 0
    for number, text in enumerate(document.split("\n"), 1):
        start, end = trimmed(document, position, position + len(text))
        position += len(text) + 1
        if start == end:
            continue
        try:
            row = json.loads(document[start:end])
        except json.JSONDecodeError as error:
            problems.add(number, f"not JSON: {error.msg} at column {error.colno}")
            continue
        except (ValueError, RecursionError) as error:
            problems.add(number, f"not JSON: {error}")
            continue
        if not isinstance(row, dict):
            problems.add(number, "not an object")
            continue
        cells = {k: _as_text(v) for k, v in row.items() if v is not None}
        if not _encodable(cells):
            problems.add(number, "it holds half of a surrogate pair")
            continue
        piece = _piece(start, end, cells, spell_out=False)
        if piece is None:
            problems.add(number, "neither question and answer nor text in it")
        else:
            pieces.append(piece)
    return pieces, problems.reasons()


def _csv_rows(document: str, problems: Problems) -> Iterator[tuple[int, int, int, list[str]]]:
    """Line number, span and cells of each row."""
    position, number = 0, 0

    def feed() -> Iterator[str]:
        # The reader takes just the lines of one row, so that after it the position is known.
        nonlocal position, number
        for start, end in lines(document):
            position, number = end, number + 1
            yield document[start:end]

    reader = csv.reader(feed(), strict=True)
    while True:
        start, first = position, number + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            problems.add(first, f"not CSV: {error}")
            continue
        if any(cell.strip() for cell in cells):
            yield first, *trimmed(document, start, position), cells


def _piece(start: int, end: int, row: Mapping[str, str], *, spell_out: bool) -> Piece | None:
    if "question" in row and "answer" in row:
        used, text = {"question", "answer"}, f"{row['question']}\n{row['answer']}"
    elif "text" in row:
        used, text = {"text"}, row["text"]
    elif spell_out:
        used = set(row)
        text = "\n".join(f"{name}: {cell}" for name, cell in row.items() if cell.strip())
    else:
        return None
    if not text.strip():
        return None
    meta = {name: cell for name, cell in row.items() if name not in used | {"title"}}
    return Piece(start, end, text, "" if "title" in used else row.get("title", ""), meta)


def _as_text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _encodable(cells: Mapping[str, str]) -> bool:
    try:
        for name, cell in cells.items():
            name.encode()
            cell.encode()
    except UnicodeEncodeError:
        return False
    return True
