"""Which values every store can hold: looked at before a part is let into a transaction.

A database refuses a bad value in the middle of a transaction, and with it the parts of
everybody else in the group. So the part with the bad value is picked out first, by the
limits of the narrowest store.
"""

from __future__ import annotations

from collections.abc import Callable
from operator import itemgetter
from typing import Any, NamedTuple, get_type_hints

from llmos.drivers.stores import rows

MAX_KEY_BYTES = 1024
"""Longest name or key in UTF-8. PostgreSQL's indexes hold 2,700 bytes, and two keys share one."""

MAX_VALUE_BYTES = 256 << 20
"""Longest value of one write. PostgreSQL's messages end at 1 GiB, SQLite's rows a little below."""

_INT64 = 1 << 63

_KEYS = frozenset(
    [
        "agent",
        "turn",
        "phase",
        "receiver",
        "stream",
        "topic",
        "watched",
        "watcher",
        "sha256",
        "idem_key",
    ]
)
"""Texts that some index holds. ``name`` is one of a timer only."""

_NO_FIELDS: tuple[Any, ...] = ()


def _getter(indexes: list[int]) -> Callable[[Any], tuple[Any, ...]]:
    if not indexes:
        return lambda row: _NO_FIELDS
    if len(indexes) == 1:
        only = indexes[0]
        return lambda row: (row[only],)
    return itemgetter(*indexes)


class _Spec(NamedTuple):
    """Where in a write, or in its row, the values of each kind are."""

    row: type[Any] | None
    """Class of the row that the write carries; None: its values are its own."""
    shape: list[Any]
    """The types that its values nearly always have."""
    texts: Callable[[Any], tuple[Any, ...]]
    blobs: Callable[[Any], tuple[Any, ...]]
    ints: Callable[[Any], tuple[Any, ...]]
    floats: Callable[[Any], tuple[Any, ...]]
    keys: Callable[[Any], tuple[Any, ...]]


_KINDS: dict[Any, str] = {
    str: "text",
    bytes: "blob",
    bytes | None: "blob",
    int: "int",
    float: "float",
    float | None: "float",
}


def _spec(write: type[Any]) -> _Spec:
    nested = get_type_hints(write).get("row")
    row = nested or write
    hints = get_type_hints(row)
    kinds: dict[str, list[int]] = {"text": [], "blob": [], "int": [], "float": []}
    keys = []
    shape = []
    for index, name in enumerate(row._fields):
        kind = _KINDS.get(hints[name])
        if kind is not None:
            kinds[kind].append(index)
            shape.append({"text": str, "blob": bytes, "int": int, "float": float}[kind])
            if name in _KEYS or (row is rows.TimerRow and name == "name"):
                keys.append(index)
        elif hints[name] in (bool, tuple[int, ...]):
            shape.append(hints[name])
        else:
            raise TypeError(f"{row.__name__}.{name}: no store holds {hints[name]}")
    return _Spec(nested, shape, *map(_getter, (*kinds.values(), keys)))


_SPECS = {write: _spec(write) for write in rows.Write.__args__}


def unfit(write: rows.Write) -> str:
    """Why no store could hold a write; empty: every one can."""
    kind = type(write)
    if kind is rows.Own:
        return ""  # Compared with what is known, never written.
    spec = _SPECS.get(kind)
    if spec is None:
        return f"{kind.__name__} is no write"
    row: Any = write
    if spec.row is not None:
        row = write.row  # type: ignore[union-attr]
        if type(row) is not spec.row:
            return f"a {type(row).__name__} in {kind.__name__}"
    # One comparison for what is nearly always right: this is done for every write.
    if [*map(type, row)] != spec.shape and (fault := _wrong_type(row, spec)):
        return fault
    text = "".join(spec.texts(row))
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            return f"text in {type(row).__name__} has half of a surrogate pair"
    if "\0" in text:
        return f"text in {type(row).__name__} has a NUL character"
    size = len(text)
    if size > MAX_KEY_BYTES // 4:
        for key in spec.keys(row):
            if len(key.encode()) > MAX_KEY_BYTES:
                return f"a key in {type(row).__name__} is longer than {MAX_KEY_BYTES} bytes"
    ints = spec.ints(row)
    if ints and not -_INT64 <= min(ints) <= max(ints) < _INT64:
        return f"an integer in {type(row).__name__} needs more than 64 bits"
    for number in spec.floats(row):
        if number != number:
            return f"a number in {type(row).__name__} is none"
    for blob in spec.blobs(row):
        size += len(blob or b"")
    if size > MAX_VALUE_BYTES:
        return f"{type(row).__name__} is longer than {MAX_VALUE_BYTES} bytes"
    if kind is rows.TakeShards:
        for shard in write.shards:  # type: ignore[union-attr]
            if type(shard) is not int or not 0 <= shard < rows.SHARDS:
                return f"there is no shard {shard!r}"
    return ""


def _wrong_type(row: Any, spec: _Spec) -> str:
    """Which value has a type that it must not have.

    Exact types: a str that is also an enum would be written by its name, and True is another
    number than 1 in a hash.
    """
    hints = get_type_hints(type(row))
    for name, value, right in zip(row._fields, row, spec.shape, strict=True):
        if type(value) is right or right not in (str, bytes, int, float):
            continue
        if (value is None and hints[name] in (bytes | None, float | None)) or (
            right is float and type(value) is int
        ):
            continue
        return f"{name} of {type(row).__name__} is a {type(value).__name__}, not a {right.__name__}"
    return ""
