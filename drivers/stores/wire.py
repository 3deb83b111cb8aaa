"""Parts on their way from a host to the process that writes the store.

Plain tuples in ``marshal``: a third of the time that pickle takes for named tuples, whose
pickling calls into Python for each of them. Both ends run the same Python, since Ray asks
for that, and both are of this system: as with pickle, what comes from elsewhere must not be
read with it. msgpack was rejected: it makes lists of tuples.
"""

from __future__ import annotations

import marshal
import pickle
from collections.abc import Sequence
from typing import Any, Final, cast, get_type_hints

from llmos.drivers.stores import rows

_VERSION: Final = 2
"""Of marshal's format: the later ones look every object up, to write it once."""

_PLAIN, _PICKLED = b"m", b"p"

_WRITES: tuple[type[Any], ...] = rows.Write.__args__
_ROWS: tuple[type[Any] | None, ...] = tuple(get_type_hints(w).get("row") for w in _WRITES)
"""The class of the row that a write carries as its first value, if it carries one."""
_CODES = {write: (code, _ROWS[code] is not None) for code, write in enumerate(_WRITES)}

_new = tuple.__new__


def pack(parts: Sequence[rows.Part]) -> bytes:
    """Parts as bytes, for :func:`unpack` in another process of the same system."""
    try:
        out = []
        for part in parts:
            flat = []
            for write in part:
                code, nested = _CODES[type(write)]
                if nested:
                    row, *rest = write
                    if type(row) is not _ROWS[code]:
                        raise TypeError(type(row))
                    flat.append((code, tuple(cast(Any, row)), *rest))
                else:
                    flat.append((code, *write))
            out.append(flat)
        return _PLAIN + marshal.dumps(out, _VERSION)
    except (KeyError, TypeError, ValueError):
        # Something that no store can hold. It is to be refused there, by itself.
        return _PICKLED + pickle.dumps(list(parts), protocol=5)


def unpack(packed: bytes) -> list[rows.Part]:
    """The parts that :func:`pack` was given."""
    if packed[:1] == _PICKLED:
        return cast(list[rows.Part], pickle.loads(memoryview(packed)[1:]))
    out: list[Any] = marshal.loads(memoryview(packed)[1:])
    for part in out:
        for at, flat in enumerate(part):
            code = flat[0]
            row = _ROWS[code]
            if row is None:
                part[at] = _new(_WRITES[code], flat[1:])
            else:
                part[at] = _new(_WRITES[code], (_new(row, flat[1]), *flat[2:]))
    return out
