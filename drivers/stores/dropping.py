"""What dropping a launch does to the committed rows, in SQL."""

from __future__ import annotations

from typing import Any

from llmos.drivers.stores.changes import Tombstone

_RESET = (
    "UPDATE agents SET state = NULL, state_version = 0, changes = 0, hold = '', story = '', "
    "dropped = 1 WHERE {}"
)

_STATEMENTS = (
    (_RESET, "agent"),
    ("DELETE FROM mail WHERE {}", "receiver"),
    ("DELETE FROM timers WHERE {}", "agent"),
    ("DELETE FROM topics WHERE {}", "agent"),
    ("DELETE FROM monitors WHERE {}", "watched"),
    ("DELETE FROM monitors WHERE {}", "watcher"),
)

OF_ALL_SQLITE = (
    "{0} >= ? AND {0} < ? AND instr(substr({0}, ?), '/') = 0 "
    "AND {0} NOT IN (SELECT value FROM json_each(?))"
)
OF_ALL_POSTGRES = (
    "{0} >= ? AND {0} < ? AND strpos(substr({0}, ?::int), '/') = 0 AND {0} <> ALL(?::text[])"
)
"""Which names a pattern covers: by prefix, without a further slash, not among those spared."""


def drop(tombstone: Tombstone, of_all: str, spared: Any) -> list[tuple[str, tuple[Any, ...]]]:
    """Statements with their values. ``spared`` is the set in the form that ``of_all`` wants."""
    if not tombstone.pattern:
        return [(sql.format(f"{c} = ?"), (tombstone.agent,)) for sql, c in _STATEMENTS]
    prefix = tombstone.prefix
    # "0" is the character after "/": the range of all names with that prefix.
    values = (prefix, prefix[:-1] + "0", len(prefix) + 1, spared)
    return [(sql.format(of_all.format(c)), values) for sql, c in _STATEMENTS]
