"""Python values into CLIPS slots and back."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import clips

from llmos.drivers.errors import UnknownTemplate
from llmos.drivers.protocols import Fact, Scalar

ORDERED_SLOT = "values"
"""The one slot of a fact that has no template."""

_SYMBOL = re.compile(r"""[^\s()&|~;"<?$][^\s()&|~;"<]*""")
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")


@dataclass(frozen=True, slots=True)
class Slot:
    """What a slot takes."""

    name: str
    multi: bool
    types: frozenset[str]
    allowed: tuple[object, ...] | None
    required: bool

    @classmethod
    def read(cls, slot: Any) -> Slot:
        """From clipspy."""
        allowed = slot.allowed_values
        return cls(
            name=slot.name,
            multi=slot.multifield,
            types=frozenset(slot.types),
            allowed=allowed if isinstance(allowed, tuple) else None,
            required=slot.default_type == clips.TemplateSlotDefaultType.NO_DEFAULT,
        )

    def convert(self, value: object) -> object:
        """A value as clipspy takes it. Raises ValueError with the reason."""
        if self.multi:
            if not isinstance(value, tuple | list):
                raise ValueError(f"slot {self.name} is a multislot and takes a tuple")
            return tuple(self._scalar(item) for item in value)
        if isinstance(value, tuple | list):
            raise ValueError(f"slot {self.name} takes one value, not several")
        return self._scalar(value)

    def _scalar(self, value: object) -> object:
        converted = self._typed(value)
        if self.allowed is not None and not any(
            type(a) is type(converted) and a == converted for a in self.allowed
        ):
            choices = ", ".join(map(str, self.allowed))
            raise ValueError(f"slot {self.name} takes one of {choices}, got {value!r}")
        return converted

    def _typed(self, value: object) -> object:
        if isinstance(value, bool):
            if "SYMBOL" in self.types:
                return clips.Symbol("TRUE" if value else "FALSE")
        elif isinstance(value, int):
            if not -(2**63) <= value < 2**63:
                raise ValueError(f"slot {self.name}: {value} does not fit 64 bits")
            if "INTEGER" in self.types:
                return value
            if "FLOAT" in self.types:
                return float(value)
        elif isinstance(value, float):
            if "FLOAT" in self.types:
                return value
        elif isinstance(value, str) and not value.isascii() and not _encodable(value):
            raise ValueError(f"slot {self.name}: the text is not valid Unicode")
        elif isinstance(value, str) and "\0" in value:
            raise ValueError(f"slot {self.name}: CLIPS texts end at a NUL character")
        elif isinstance(value, str):
            symbol = "SYMBOL" in self.types
            if symbol and self.allowed is not None:
                symbol = any(isinstance(a, clips.Symbol) and a == value for a in self.allowed)
                if not symbol and "STRING" not in self.types:
                    symbol = True
            elif symbol and "STRING" in self.types:
                symbol = is_symbol(value)
            if symbol:
                return clips.Symbol(value)
            if "STRING" in self.types:
                return str(value)
        expected = " or ".join(sorted(t for t in self.types if "ADDRESS" not in t))
        raise ValueError(f"slot {self.name} takes {expected}, got {value!r}")


_ANY_ORDERED = Slot(
    ORDERED_SLOT, True, frozenset({"SYMBOL", "STRING", "INTEGER", "FLOAT"}), None, False
)


@dataclass(frozen=True, slots=True)
class Template:
    """A template that facts are checked against before CLIPS sees them."""

    name: str
    qualified: str
    """As CLIPS finds it: ``module::name`` outside MAIN."""
    ordered: bool
    slots: Mapping[str, Slot]

    @classmethod
    def read(cls, template: Any, qualified: str) -> Template:
        """From clipspy."""
        if template.implied:
            return cls(template.name, qualified, True, {ORDERED_SLOT: _ANY_ORDERED})
        slots = {slot.name: Slot.read(slot) for slot in template.slots}
        return cls(template.name, qualified, False, slots)

    def convert(self, base: str, fact: Fact) -> dict[str, object]:
        """The slots as clipspy takes them.

        Raises:
            UnknownTemplate: a slot that is not declared, is missing, or takes no such value.
        """
        values: dict[str, object] = {}
        for name, value in fact.slots.items():
            slot = self.slots.get(name)
            if slot is None:
                raise UnknownTemplate(base, self.name, f"it has no slot {name!r}", self.slots)
            try:
                values[name] = slot.convert(value)
            except ValueError as error:
                raise UnknownTemplate(base, self.name, str(error), self.slots) from error
        for slot in self.slots.values():
            if slot.required and slot.name not in values:
                raise UnknownTemplate(
                    base, self.name, f"slot {slot.name} has no default and no value", self.slots
                )
        if self.ordered:
            values.setdefault(ORDERED_SLOT, ())
        return values


def is_symbol(text: str) -> bool:
    """Whether CLIPS would read the text back as this symbol."""
    return bool(_SYMBOL.fullmatch(text)) and not _NUMBER.fullmatch(text) and text != "=>"


def ordered_text(template: str, values: object) -> str:
    """An ordered fact as source; values are converted ones."""
    assert isinstance(values, tuple)
    return f"({' '.join([template, *(_literal(value) for value in values)])})"


def _literal(value: object) -> str:
    if isinstance(value, clips.Symbol):
        return str(value)
    if isinstance(value, str):
        return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
    return repr(value)


def _encodable(text: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in text)


def read_fact(fact: Any) -> Fact:
    """A CLIPS fact in our words."""
    if isinstance(fact, clips.ImpliedFact):
        return Fact(fact.template.name, {ORDERED_SLOT: _many(fact)})
    return Fact(fact.template.name, {name: _back(value) for name, value in fact})


def _many(values: Iterable[Any]) -> tuple[Scalar, ...]:
    return tuple(_back_scalar(value) for value in values)


def _back(value: Any) -> Scalar | tuple[Scalar, ...]:
    return _many(value) if isinstance(value, tuple) else _back_scalar(value)


def _back_scalar(value: Any) -> Scalar:
    if isinstance(value, clips.Symbol):
        return {"TRUE": True, "FALSE": False}.get(value, str(value))
    if isinstance(value, int | float | str):
        return value
    return str(value)
