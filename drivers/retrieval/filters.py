"""How to search, and conditions on what a passage carries beside its text. Compared here, never put into a query."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

Mode: TypeAlias = Literal["vector", "lexical", "hybrid"]
"""By nearness of meaning, by shared terms, or by both, fused."""
Operator: TypeAlias = Literal["eq", "ne", "in", "lt", "le", "gt", "ge"]


@dataclass(frozen=True, slots=True)
class Condition:
    """One field compared with a value.

    Values are compared as numbers where both are written as numbers, else as texts; dates in
    ISO form are in their order as texts. A passage without the field fits nothing but ``ne``.
    """

    field: str
    operator: Operator
    values: tuple[str, ...]
    """One, but for ``in``."""

    def __post_init__(self) -> None:
        if not self.values or (self.operator != "in" and len(self.values) != 1):
            raise ValueError(f"{self.operator} has {len(self.values)} values")

    def fits(self, meta: Mapping[str, str]) -> bool:
        """Whether a passage with these fields may be found."""
        own = meta.get(self.field)
        if own is None:
            return self.operator == "ne"
        if self.operator == "in":
            return any(_compare(own, value) == 0 for value in self.values)
        order = _compare(own, self.values[0])
        match self.operator:
            case "eq":
                return order == 0
            case "ne":
                return order != 0
            case "lt":
                return order < 0
            case "le":
                return order <= 0
            case "gt":
                return order > 0
            case _:
                return order >= 0


def fits_all(conditions: Sequence[Condition], meta: Mapping[str, str]) -> bool:
    """Whether all conditions hold."""
    return all(condition.fits(meta) for condition in conditions)


def _compare(own: str, value: str) -> int:
    """-1, 0 or 1."""
    a, b = _number(own), _number(value)
    if a is not None and b is not None:
        return (a > b) - (a < b)
    return (own > value) - (own < value)


def _number(text: str) -> float | None:
    # float() also reads "1_000", "nan" and "infinity", which nobody means here.
    if "_" in text or len(text) > 40:
        return None
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None
