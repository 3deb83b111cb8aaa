"""Rule files: reading one, and which driver it is for."""

from __future__ import annotations

import json
from pathlib import Path

from llmos.drivers.errors import RuleSyntaxError

MAX_BYTES = 16 * 2**20
"""A longer rule file is refused."""


def read_source(path: Path) -> str:
    """The text of a rule file. Raises RuleSyntaxError: missing, too long, not UTF-8."""
    try:
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise RuleSyntaxError(str(path), f"{size} bytes, at most {MAX_BYTES} are read")
        return path.read_text("utf-8")
    except OSError as error:
        raise RuleSyntaxError(str(path), error.strerror or str(error)) from error
    except UnicodeDecodeError as error:
        raise RuleSyntaxError(str(path), f"not UTF-8 at byte {error.start}") from error


def driver_of(path: Path, source: str) -> str:
    """``zen`` for a decision model, ``memory`` for other JSON, else ``clips``."""
    if path.suffix.lower() != ".json":
        return "clips"
    try:
        known = json.loads(source)
    except (json.JSONDecodeError, RecursionError):
        return "zen"
    return "zen" if isinstance(known, dict) and "nodes" in known else "memory"
