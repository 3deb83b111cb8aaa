"""CLIPS templates from pydantic models, and their instances as facts.

========================  =============================================
field                     slot
========================  =============================================
``str``                   ``STRING``
``Literal["a", "b"]``     ``SYMBOL`` with allowed values; also string enums
``bool``                  ``SYMBOL``, TRUE or FALSE
``int``, ``float``        ``INTEGER``, ``FLOAT``; ``ge`` and ``le`` are the range
``list[T]``               multislot; also ``tuple[T, ...]``
``T | None``              as T, or the symbol ``nil``, which is the default
========================  =============================================

Templates and slots are called like classes and fields, with ``-`` for ``_`` and before
capitals: ``RefundRequest.card_lost`` is ``card-lost`` of ``refund-request``. A field
without a default must be given.
"""

from __future__ import annotations

import enum
import re
import types
from collections.abc import Iterable
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import annotated_types
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from llmos.drivers.protocols import Fact, Scalar
from llmos.drivers.rules.clips_values import is_symbol

ModelT = TypeVar("ModelT", bound=BaseModel)

_TYPES: dict[Any, str] = {str: "STRING", int: "INTEGER", float: "FLOAT", bool: "SYMBOL"}


def deftemplates(*models: type[BaseModel]) -> str:
    """The templates of models, to stand before the rules that use them.

    Raises:
        TypeError: a field that no slot can hold; names it.
    """
    return "\n".join(_deftemplate(model) for model in models)


def template_name(model: type[BaseModel]) -> str:
    """What the template of a model is called."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "-", model.__name__).lower()


def fact_of(instance: BaseModel) -> Fact:
    """An instance as a fact; fields that are None are left to the slot's default."""
    slots: dict[str, Scalar | tuple[Scalar, ...]] = {}
    for name in type(instance).model_fields:
        value = getattr(instance, name)
        if isinstance(value, list | tuple):
            slots[_slot_name(name)] = tuple(_plain(item) for item in value)
        elif value is not None:
            slots[_slot_name(name)] = _plain(value)
    return Fact(template_name(type(instance)), slots)


def instance_of(model: type[ModelT], fact: Fact) -> ModelT:
    """A fact as an instance, checked by pydantic. Raises ValidationError."""
    names = {_slot_name(name): name for name in model.model_fields}
    given = {names[s]: v for s, v in fact.slots.items() if s in names and v != "nil"}
    return model.model_validate(given)


def _slot_name(field: str) -> str:
    return field.replace("_", "-")


def _plain(value: Any) -> Scalar:
    plain: Scalar = value.value if isinstance(value, enum.Enum) else value
    return plain


def _deftemplate(model: type[BaseModel]) -> str:
    slots = [_slot(model, name, info) for name, info in model.model_fields.items()]
    return "\n  ".join([f"(deftemplate {template_name(model)}", *slots]) + ")"


def _slot(model: type[BaseModel], name: str, info: FieldInfo) -> str:
    kind, optional = _without_none(info.annotation)
    multi = get_origin(kind) in (list, tuple)
    if multi:
        arguments = get_args(kind)
        if get_origin(kind) is tuple and (len(arguments) != 2 or arguments[1] is not Ellipsis):
            raise TypeError(f"{model.__name__}.{name}: a slot holds tuples of any length only")
        kind = _bare(arguments[0])
    described = _described(model, name, kind)
    if optional:
        described["type"] += " SYMBOL" if "SYMBOL" not in described["type"] else ""
        if "allowed-values" in described:
            described["allowed-values"] += " nil"
    bounds = _range(info.metadata, float if kind is float else int)
    if bounds and not optional:
        described["range"] = bounds
    if not multi:
        described["default"] = _default(info, optional)
    parts = " ".join(f"({key} {value})" for key, value in described.items())
    return f"({'multislot' if multi else 'slot'} {_slot_name(name)} {parts})"


def _without_none(kind: Any) -> tuple[Any, bool]:
    if get_origin(kind) in (Union, types.UnionType):
        rest = [a for a in get_args(kind) if a is not type(None)]
        if len(rest) == 1 and len(get_args(kind)) == 2:
            return _bare(rest[0]), True
    return _bare(kind), False


def _bare(kind: Any) -> Any:
    return get_args(kind)[0] if get_origin(kind) is Annotated else kind


def _described(model: type[BaseModel], name: str, kind: Any) -> dict[str, str]:
    if kind is bool:
        return {"type": "SYMBOL", "allowed-values": "TRUE FALSE"}
    if kind in _TYPES:
        return {"type": _TYPES[kind]}
    values: Iterable[Any] = ()
    if get_origin(kind) is Literal:
        values = get_args(kind)
    elif isinstance(kind, type) and issubclass(kind, enum.Enum):
        values = [member.value for member in kind]
    words = list(values)
    if words and all(isinstance(w, str) and is_symbol(w) for w in words):
        return {"type": "SYMBOL", "allowed-values": " ".join(words)}
    raise TypeError(
        f"{model.__name__}.{name}: a slot cannot hold {kind}; texts, numbers, truth values, "
        "choices of single words and lists of these can be held"
    )


def _range(metadata: Iterable[Any], number: type[int] | type[float]) -> str:
    low: Any = next((m.ge for m in metadata if isinstance(m, annotated_types.Ge)), None)
    high: Any = next((m.le for m in metadata if isinstance(m, annotated_types.Le)), None)
    if low is None and high is None:
        return ""
    return " ".join("?VARIABLE" if bound is None else repr(number(bound)) for bound in (low, high))


def _default(info: FieldInfo, optional: bool) -> str:
    if info.is_required():
        return "?NONE"
    # A default that is made anew for each instance is no constant of the template.
    value = info.get_default()
    if value is None:
        return "nil" if optional else "?NONE"
    value = _plain(value)
    if isinstance(value, bool):
        return "TRUE" if value else "FALSE"
    if isinstance(value, str):
        kind, _ = _without_none(info.annotation)
        if kind is not str:
            return value
        return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
    # A whole number is no FLOAT in CLIPS.
    kind, _ = _without_none(info.annotation)
    return repr(float(value) if kind is float else value)
