"""Reads a folder of documents into passages."""

from __future__ import annotations

import fnmatch
import hashlib
import os
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path

from llmos.drivers.documents.markdown import read_markdown
from llmos.drivers.documents.pieces import Piece
from llmos.drivers.documents.plain import read_plain
from llmos.drivers.documents.table import read_csv, read_jsonl
from llmos.drivers.errors import DocumentError
from llmos.drivers.protocols import Passage, Skipped

MAX_BYTES = 64 * 2**20
"""A larger file is left out: its passages would not fit beside an index of them."""

INCLUDE = ("*.md", "*.txt", "*.csv", "*.jsonl")


class _LeftOut(Exception):
    """The reason why a file is skipped, on its way to the result."""


def read_folder(
    path: Path,
    *,
    max_chars: int = 900,
    overlap: int = 0,
    include: Sequence[str] = INCLUDE,
) -> tuple[list[Passage], list[Skipped]]:
    """Read all documents below a folder, or one file.

    Files come in the order of their paths. Markdown and text are cut into passages of at
    most ``max_chars`` characters, of which ``overlap`` may repeat the end of the passage
    before; CSV and JSON lines give a passage per row, however long. ``include`` are
    patterns for file names; a file that is named by ``path`` itself is read in any case.
    Hidden files and folders are passed over. Spans count the characters of the decoded
    text, without a byte order mark.

    Returns:
        The passages, and the files and rows that were left out, each with the reason.

    Raises:
        DocumentError: ``path`` does not exist or cannot be listed.
        ValueError: ``max_chars`` is less than 1, or ``overlap`` is not below half of it.
    """
    if max_chars < 1 or not 0 <= overlap <= max_chars // 2:
        raise ValueError(f"max_chars is {max_chars} and overlap {overlap}")
    passages: list[Passage] = []
    skipped: list[Skipped] = []
    if path.is_file():
        found = iter([(path.name, path)])
        root = path.parent
    elif path.is_dir():
        root = path
        found = _files(path, include, skipped)
    else:
        raise DocumentError(str(path), "there is no such file or folder", remedy="Check the path")
    for source, file in found:
        try:
            raw = _bytes(file, root if path.is_dir() else None)
            document = _decoded(raw)
        except _LeftOut as reason:
            skipped.append(Skipped(_shown(source), str(reason)))
            continue
        pieces, problems = _pieces(file, document, max_chars, overlap)
        version = hashlib.sha256(raw).hexdigest()[:16]
        passages.extend(
            Passage(
                id=f"{source}#{ordinal}",
                source=source,
                version=version,
                span=(piece.start, piece.end),
                text=piece.text,
                title=piece.title,
                meta=piece.meta,
            )
            for ordinal, piece in enumerate(pieces)
        )
        skipped.extend(Skipped(source, problem) for problem in problems)
    return passages, skipped


def _pieces(
    file: Path, document: str, max_chars: int, overlap: int
) -> tuple[list[Piece], list[str]]:
    suffix = file.suffix.lower()
    if suffix == ".csv":
        return read_csv(document)
    if suffix in (".jsonl", ".ndjson"):
        return read_jsonl(document)
    if suffix in (".md", ".markdown"):
        return read_markdown(document, max_chars=max_chars, overlap=overlap), []
    return read_plain(document, max_chars=max_chars, overlap=overlap), []


def _files(
    root: Path, include: Sequence[str], skipped: list[Skipped]
) -> Iterator[tuple[str, Path]]:
    """Source and path of each file, in the order of the sources."""

    def failed(error: OSError) -> None:
        where = os.path.relpath(error.filename, root)
        if where == os.curdir:
            raise DocumentError(str(root), error.strerror or str(error)) from error
        skipped.append(Skipped(_shown(where), error.strerror or str(error)))

    found: list[tuple[str, Path]] = []
    for folder, folders, files in os.walk(root, onerror=failed):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in folders:
            linked = Path(folder, name)
            if linked.is_symlink():
                skipped.append(
                    Skipped(_shown(_source(root, linked)), "a link to a folder is not followed")
                )
        for name in files:
            wanted = any(fnmatch.fnmatch(name.lower(), pattern.lower()) for pattern in include)
            if wanted and not name.startswith("."):
                file = Path(folder, name)
                found.append((_source(root, file), file))
    yield from sorted(found)


def _source(root: Path, file: Path) -> str:
    return file.relative_to(root).as_posix()


def _bytes(file: Path, root: Path | None) -> bytes:
    if not _valid(str(file)):
        raise _LeftOut("its name is not UTF-8")
    try:
        linked = root is not None and file.is_symlink()
        if root and linked and not file.resolve(strict=True).is_relative_to(root.resolve()):
            raise _LeftOut("a link out of the folder")
        # Without O_NONBLOCK, opening a named pipe would wait for a writer.
        handle = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(handle, "rb") as stream:
            if not stat.S_ISREG(os.fstat(handle).st_mode):
                raise _LeftOut("not a regular file")
            raw = stream.read(MAX_BYTES + 1)
    except OSError as error:
        raise _LeftOut(error.strerror or str(error)) from error
    if len(raw) > MAX_BYTES:
        raise _LeftOut(f"larger than {MAX_BYTES} bytes")
    return raw


def _decoded(raw: bytes) -> str:
    if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise _LeftOut("UTF-16, not UTF-8 (byte 0)")
    if (nul := raw.find(b"\0")) >= 0:
        raise _LeftOut(f"binary: a zero at byte {nul}")
    try:
        return raw.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise _LeftOut(f"not UTF-8 at byte {error.start}") from error


def _valid(text: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in text)


def _shown(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode()
