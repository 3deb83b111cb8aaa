"""Options of a tool: how they are read from the system file, and what is wrong with them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from llmos.drivers.errors import ToolError, known_names

OptionsT = TypeVar("OptionsT", bound="Options")


class ToolMisconfigured(ToolError):
    """An option of a tool is missing, unknown or has no possible value."""

    def __init__(self, tool: str, option: str, reason: str, known: Iterable[str]) -> None:
        self.option, self.known = option, tuple(sorted(known))
        super().__init__(
            tool, f"option {option!r}: {reason}", remedy=f"Options: {known_names(self.known)}"
        )
        self.reason = reason


class Options(BaseModel):
    """What all tools have in common."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    timeout_s: float = Field(default=30.0, gt=0, le=3600, allow_inf_nan=False)
    """How long one call may take."""
    max_calls: int = Field(default=32, ge=1, le=1024)
    """Calls under way at the same time; one more is answered ToolUnavailable."""


def from_environment(value: str) -> str:
    """``env:NAME`` stands for an environment variable, so that no secret stands in a file."""
    if not value.startswith("env:"):
        return value
    name = value.removeprefix("env:")
    if name not in os.environ:
        raise ValueError(f"the environment variable {name} is not set")
    return os.environ[name]


Secret = Annotated[str, AfterValidator(from_environment)]
"""Text, or ``env:NAME`` to read it from the environment."""


def read_options(tool: str, model: type[OptionsT], options: Mapping[str, Any]) -> OptionsT:
    """Check the options of a tool.

    Raises:
        ToolMisconfigured: naming the first option that is wrong, and all there are.
    """
    known = [f.alias or name for name, f in model.model_fields.items()]
    try:
        return model.model_validate(dict(options))
    except ValidationError as error:
        # A misspelt option makes another one missing: name the misspelling.
        first = min(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
        reason = first["msg"].removeprefix("Value error, ")
        if first["type"] == "extra_forbidden":
            reason = "unknown"
        elif first["type"] == "missing":
            reason = "is missing"
        # The value stays out of the message: it may be a secret.
        option = ".".join(map(str, first["loc"])) or "options"
        raise ToolMisconfigured(tool, option, reason, known) from None
