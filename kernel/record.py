"""What the journal keeps of a syscall: short enough to keep, long enough to explain."""

from __future__ import annotations

from typing import Any

import msgpack
import numpy as np
from pydantic import BaseModel

from llmos.drivers.errors import LlmosError
from llmos.syscalls.labels import Labels, Provenance
from llmos.syscalls.messages import Wire

MAX_TEXT = 2000
"""Characters of a string that are kept."""
MAX_ITEMS = 64
"""Items of a list that are kept."""
MAX_DEPTH = 32
"""Levels of nesting that are kept: msgpack and Python both give up on deep ones."""


def shorten(value: Any, depth: int = 0) -> Any:
    """Plain data for msgpack, with long texts and lists cut and marked as cut."""
    if depth > MAX_DEPTH:
        return f"… ({type(value).__name__}, nested too deeply)"
    if isinstance(value, str):
        # Lone surrogates cannot be encoded; the record shows them escaped.
        safe = value.encode("utf-8", "backslashreplace").decode("utf-8")
        return safe if len(safe) <= MAX_TEXT else f"{safe[:MAX_TEXT]}… ({len(safe)} characters)"
    if isinstance(value, bytes) and len(value) > MAX_TEXT:
        return f"bytes({len(value)})"
    if isinstance(value, bool | int | float | bytes | type(None)):
        if isinstance(value, int) and not -(2**63) <= value < 2**64:
            return str(value)
        return value
    if isinstance(value, np.ndarray):
        return f"array{value.shape}"
    if isinstance(value, Wire):
        return {"kind": value.kind, "body": shorten(value.json(), depth + 1)}
    if isinstance(value, BaseModel):
        return {
            name: shorten(getattr(value, name), depth + 1)
            for name in type(value).model_fields
            if name not in ("provenance", "labels")
        }
    if isinstance(value, dict):
        return {shorten(str(k)): shorten(v, depth + 1) for k, v in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        items = list(value)
        kept = [shorten(v, depth + 1) for v in items[:MAX_ITEMS]]
        return kept if len(items) <= MAX_ITEMS else [*kept, f"… ({len(items)} items)"]
    return shorten(str(value))


def pack(value: Any) -> bytes:
    """Shortened msgpack of a request or response."""
    packed = msgpack.packb(shorten(value))
    assert isinstance(packed, bytes)
    return packed


def pack_error(error: BaseException) -> bytes:
    """An error as ``{error, message, …facts}``."""
    facts = error.facts if isinstance(error, LlmosError) else {}
    return pack({"error": type(error).__name__, "message": str(error), **facts})


def pack_provenance(provenance: tuple[Provenance, ...]) -> bytes:
    """The list as msgpack."""
    return bytes(msgpack.packb([p.model_dump(mode="json") for p in provenance[:MAX_ITEMS]]))


def pack_labels(labels: Labels) -> bytes:
    """The labels as msgpack."""
    return bytes(msgpack.packb(labels.model_dump(mode="json")))


def unpack(data: bytes) -> Any:
    """Back to plain data; None for nothing."""
    return msgpack.unpackb(data) if data else None
