"""Reads the text of a graph file."""

from __future__ import annotations

import hashlib
from pathlib import Path

from llmos.drivers.errors import GraphFileError

MAX_BYTES = 512 * 2**20
"""A larger file is refused: the graph would not fit the memory of a host."""


def read_text(file: Path) -> tuple[str, str]:
    """Text and version (first 16 hex digits of the sha256).

    Raises:
        GraphFileError: not there, too large, or not UTF-8, with the line.
    """
    try:
        size = file.stat().st_size
        if size > MAX_BYTES:
            raise GraphFileError(str(file), f"{size} bytes, at most {MAX_BYTES} are read")
        raw = file.read_bytes()
        return raw.decode("utf-8-sig"), hashlib.sha256(raw).hexdigest()[:16]
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise GraphFileError(str(file), f"not UTF-8 at byte {error.start}", line) from error
    except OSError as error:
        raise GraphFileError(str(file), error.strerror or str(error)) from error
