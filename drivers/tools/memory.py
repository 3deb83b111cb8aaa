"""``memory``: a tool for tests that acts on a dictionary, and fails as it is told."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field

from llmos.drivers.errors import ToolRefused, ToolUnavailable, ToolUncertain
from llmos.drivers.protocols import ToolOutcome
from llmos.drivers.tools.options import Options, read_options
from llmos.drivers.tools.outcome import plain_outcome

MAX_RECORDS = 10_000
"""Calls that are remembered; one more is answered ToolUnavailable."""


class MemoryOptions(Options):
    """``[tools.NAME.options]``."""

    idempotent: bool = True
    queryable: bool = True
    output: Any = None
    """What every call gives back; without it, the arguments."""
    failures: tuple[Literal["", "refused", "unavailable", "uncertain", "lost"], ...] = Field(
        default=(), max_length=MAX_RECORDS
    )
    """How the attempts go, one after the other, then all well: ``uncertain`` is carried out but
    not answered, ``lost`` neither."""


class MemoryTool:
    """Remembers what it was called with."""

    def __init__(self, name: str, options: Mapping[str, Any]) -> None:
        self._name = name
        self._options = read_options(name, MemoryOptions, options)
        self._failures = list(self._options.failures)
        self.calls: dict[str, list[Mapping[str, Any]]] = {}
        """``idem_key`` → the arguments each time it was carried out."""
        self.attempts: list[str] = []
        """``idem_key`` of every attempt, whatever came of it."""

    @property
    def name(self) -> str:
        """Its name."""
        return self._name

    @property
    def idempotent(self) -> bool:
        """As the options say."""
        return self._options.idempotent

    @property
    def queryable(self) -> bool:
        """As the options say."""
        return self._options.queryable

    async def call(self, arguments: Mapping[str, Any], idem_key: str) -> ToolOutcome:
        """Remember it, or fail."""
        if len(self.attempts) >= MAX_RECORDS:
            raise ToolUnavailable(self._name, f"it remembers {MAX_RECORDS} calls, no more")
        self.attempts.append(idem_key)
        failure = self._failures.pop(0) if self._failures else ""
        if failure == "refused":
            raise ToolRefused(self._name, "it was told to refuse")
        if failure == "unavailable":
            raise ToolUnavailable(self._name, "it was told to be away")
        if failure != "lost" and not (self.idempotent and idem_key in self.calls):
            self.calls.setdefault(idem_key, []).append(dict(arguments))
        if failure:
            raise ToolUncertain(self._name, "it was told to lose the answer")
        return self._outcome(idem_key)

    def _outcome(self, idem_key: str) -> ToolOutcome:
        output = self._options.output
        if output is None:
            output = self.calls[idem_key][0]
        return plain_outcome(self._name, ToolOutcome(output, f"memory:{idem_key}"))

    async def lookup(self, idem_key: str) -> ToolOutcome | None:
        """What was remembered."""
        if not self.queryable:
            raise ToolUnavailable(self._name, "it was told not to answer questions")
        return self._outcome(idem_key) if idem_key in self.calls else None

    async def close(self) -> None:
        """Nothing to release."""
