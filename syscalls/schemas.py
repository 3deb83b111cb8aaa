"""JSON schemas for models that write: of the answer they are to give, of the tools they may call.

The answer's schema is cut down to what binds the answer. Titles and descriptions would make
the arguments of the syscall change with every comment, and turns that run again would seem to
have taken another way. The schema of a tool keeps its descriptions: the model reads them.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias, TypeVar, get_type_hints

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model

from llmos.syscalls.errors import AnswerCutOff, InvalidAnswer

ModelT = TypeVar("ModelT", bound=BaseModel)

_NOTES = {"title", "description", "default", "examples", "deprecated", "discriminator"}
"""Keywords that bind nothing."""
_MAPS = {"properties", "patternProperties", "$defs", "definitions"}
"""Keywords whose keys are names, so that one called ``title`` is no note."""
_LISTS = {"anyOf", "allOf", "oneOf", "prefixItems"}
_SINGLE = {"items", "additionalProperties", "not", "contains"}


def answer_schema(model: type[BaseModel]) -> str:
    """The JSON schema that binds an answer to be an object of this class."""
    return json.dumps(_bare(model.model_json_schema(), _NOTES))


def _bare(schema: Any, drop: set[str]) -> Any:
    """A schema without notes. Objects are closed where it does not say otherwise: a model that
    may invent fields invents them."""
    if not isinstance(schema, dict):
        return schema
    found: dict[str, Any] = {}
    for key, value in schema.items():
        if key in drop:
            continue
        if key in _MAPS and isinstance(value, dict):
            found[key] = {name: _bare(part, drop) for name, part in value.items()}
        elif key in _LISTS and isinstance(value, list):
            # Of a union's members pydantic takes any that fits; grammars cannot count them.
            found["anyOf" if key == "oneOf" else key] = [_bare(part, drop) for part in value]
        elif key in _SINGLE:
            found[key] = _bare(value, drop)
        else:
            found[key] = value
    if "properties" in found:
        found.setdefault("additionalProperties", False)
    return found


def read_answer(model: type[ModelT], text: str, *, by: str, cut_off: bool) -> ModelT:
    """What a model wrote, as an object of a class.

    Args:
        model: The class.
        text: What was written.
        by: Name of the model that wrote it.
        cut_off: Whether its tokens were used up.

    Raises:
        AnswerCutOff: it ends in the middle.
        InvalidAnswer: it does not fit.
    """
    if cut_off:
        raise AnswerCutOff(by, model.__name__, text)
    try:
        return model.model_validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        reason = f"{where}: {first['msg']}" if where else first["msg"]
        raise InvalidAnswer(by, model.__name__, reason, text) from error


# ---------------------------------------------------------------- tools


class ToolUse(BaseModel):
    """A call that a model asks for, or has asked for. Nothing was called yet."""

    model_config = ConfigDict(frozen=True)

    name: str
    arguments: dict[str, Any]
    id: str = ""
    """By which the tool's answer refers to it."""

    def parsed(self, model: type[ModelT]) -> ModelT:
        """The arguments as an object of a class.

        Raises:
            InvalidAnswer: they do not fit.
        """
        return read_answer(model, json.dumps(self.arguments), by=self.name, cut_off=False)


class ToolDescription(BaseModel):
    """A tool that a model may ask for."""

    model_config = ConfigDict(frozen=True)

    name: str = Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")
    description: str = ""
    parameters: dict[str, Any] = Field(
        default_factory=lambda: {"type": "object", "properties": {}, "additionalProperties": False}
    )
    """JSON schema of the arguments, an object."""


ToolLike: TypeAlias = ToolDescription | type[BaseModel] | Callable[..., Any]
"""A description, a pydantic model of the arguments, or a function with type hints."""


def describe(tool: ToolLike) -> ToolDescription:
    """A tool as models are told of it.

    A class gives its name, its docstring and its fields, a function its name, its docstring
    and its parameters.

    Raises:
        TypeError: a function whose parameters have no names or no types.
    """
    if isinstance(tool, ToolDescription):
        return tool
    if isinstance(tool, type) and issubclass(tool, BaseModel):
        schema, name, doc = tool.model_json_schema(), tool.__name__, tool.__doc__
    elif callable(tool):
        name, doc = str(getattr(tool, "__name__", "")), getattr(tool, "__doc__", None)
        schema = _arguments_of(tool, name).model_json_schema()
    else:
        raise TypeError(f"{tool!r} is no tool: a description, a pydantic model or a function")
    parameters: dict[str, Any] = _bare(schema, {"title", "discriminator"})
    parameters.pop("description", None)
    parameters.setdefault("properties", {})
    parameters.setdefault("additionalProperties", False)
    return ToolDescription(
        name=name, description=inspect.cleandoc(doc or ""), parameters=parameters
    )


def _arguments_of(function: Callable[..., Any], name: str) -> type[BaseModel]:
    hints: Mapping[str, Any] = get_type_hints(function, include_extras=True)
    fields: dict[str, Any] = {}
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            raise TypeError(f"{name}: a model cannot be told of *{parameter.name}")
        if parameter.name not in hints:
            raise TypeError(f"{name}: {parameter.name} has no type")
        default = ... if parameter.default is parameter.empty else parameter.default
        fields[parameter.name] = (hints[parameter.name], default)
    made: type[BaseModel] = create_model(name, **fields)
    return made


def describe_all(tools: Sequence[ToolLike]) -> tuple[ToolDescription, ...]:
    """See :func:`describe`."""
    return tuple(describe(tool) for tool in tools)
