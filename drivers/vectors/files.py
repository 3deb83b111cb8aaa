"""How an index lies on disk: a header that names its data files.

The data files are written first, under new names; renaming the header over the old
one is the single step that replaces the index. Renaming a whole folder was rejected:
no portable call replaces a folder that is not empty.
"""

from __future__ import annotations

import contextlib
import json
import os
import uuid
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from llmos.drivers.errors import IndexMismatch
from llmos.drivers.protocols import Vectors

FORMAT = 1
_HEADER = "index.json"


def write_index(
    folder: Path, tag: str, dimension: int, ids: Sequence[str], vectors: Vectors
) -> None:
    """Write an index and make it durable; a crash leaves the old one or the new one."""
    folder.mkdir(parents=True, exist_ok=True)
    token = uuid.uuid4().hex[:12]
    names = {"ids": f"ids-{token}.json", "vectors": f"vectors-{token}.npy"}
    header = {
        "format": FORMAT,
        "tag": tag,
        "dimension": dimension,
        "count": len(ids),
        **names,
    }
    temporary = folder / f"header-{token}.tmp"
    try:
        with open(folder / names["vectors"], "wb") as file:
            np.save(file, vectors, allow_pickle=False)
            _flush(file.fileno())
        for name, content in ((names["ids"], list(ids)), (temporary.name, header)):
            with open(folder / name, "w", encoding="utf-8") as text:
                json.dump(content, text)
                text.flush()
                _flush(text.fileno())
        os.replace(temporary, folder / _HEADER)
    except BaseException:
        for name in (*names.values(), temporary.name):
            with contextlib.suppress(OSError):
                (folder / name).unlink()
        raise
    handle = os.open(folder, os.O_RDONLY)
    try:
        _flush(handle)
    finally:
        os.close(handle)
    for pattern in ("ids-*.json", "vectors-*.npy", "header-*.tmp"):
        for old in folder.glob(pattern):
            if token not in old.name:
                old.unlink(missing_ok=True)


def read_index(folder: Path, tag: str, dimension: int) -> tuple[list[str], Vectors]:
    """Read what was written.

    Raises:
        FileNotFoundError: nothing was written there.
        IndexMismatch: another tag, dimension or format, or damaged files.
    """
    text = (folder / _HEADER).read_text(encoding="utf-8")
    wanted = f"{tag}, {dimension} numbers, format {FORMAT}"
    try:
        header = json.loads(text)
        found = f"{header['tag']}, {header['dimension']} numbers, format {header['format']}"
        if found != wanted:
            raise IndexMismatch(str(folder), wanted, found)
        ids = json.loads((folder / Path(header["ids"]).name).read_text(encoding="utf-8"))
        vectors = np.load(folder / Path(header["vectors"]).name, allow_pickle=False)
        whole = (
            vectors.shape == (header["count"], dimension)
            and vectors.dtype == np.float32
            and len(ids) == len(set(ids)) == header["count"]
            and bool(np.isfinite(vectors).all())
        )
    except (ValueError, KeyError, TypeError, EOFError, OSError) as error:
        raise IndexMismatch(str(folder), wanted, f"damaged files: {error}") from error
    if not whole:
        raise IndexMismatch(str(folder), wanted, "damaged files: ids and vectors do not agree")
    return ids, vectors


def _flush(handle: int) -> None:
    os.fsync(handle)
