"""What a tool gave back, made plain JSON data."""

from __future__ import annotations

import json
from typing import Any

from pydantic import BaseModel

from llmos.drivers.errors import ToolUncertain
from llmos.drivers.protocols import ToolOutcome

MAX_OUTPUT_BYTES = 1 << 20
"""Largest output of a call, as JSON."""


def plain_outcome(tool: str, value: Any) -> ToolOutcome:
    """The outcome of a call that was carried out; ``value`` may be one already.

    Raises:
        ToolUncertain: it has no form in JSON, or is larger than :data:`MAX_OUTPUT_BYTES`. The
            call was carried out, but nobody will know what it said.
    """
    outcome = value if isinstance(value, ToolOutcome) else ToolOutcome(value)
    output = outcome.output
    if isinstance(output, BaseModel):
        output = output.model_dump()
    try:
        text = json.dumps(output, allow_nan=False, ensure_ascii=False)
        size = len(text.encode("utf-8"))
    except (TypeError, ValueError, RecursionError) as error:
        raise ToolUncertain(
            tool,
            f"it was carried out, but what it gave back is no JSON: {error}",
            remedy="Let it give back plain data",
        ) from None
    if size > MAX_OUTPUT_BYTES:
        raise ToolUncertain(
            tool,
            f"it was carried out, but gave back {size} bytes; the limit is {MAX_OUTPUT_BYTES}",
            remedy="Let it give back a reference to the data",
        )
    return ToolOutcome(json.loads(text), str(outcome.reference))
