"""Where a datum came from, and the marks that security rules read.

Every response of a syscall carries both. A turn joins the labels of everything it
has seen: what it sends or answers can be no less sensitive and no more trusted than
what went in.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable

from pydantic import BaseModel, ConfigDict


class Sensitivity(enum.IntEnum):
    """How much harm a leak would do."""

    PUBLIC = 0
    INTERNAL = 1
    CONFIDENTIAL = 2
    RESTRICTED = 3


class Labels(BaseModel):
    """The marks on a datum. ``Labels()`` is the bottom: joining it changes nothing."""

    model_config = ConfigDict(frozen=True)

    tenants: frozenset[str] = frozenset()
    """Whose data it contains. Empty: nobody's in particular."""
    sensitivity: Sensitivity = Sensitivity.PUBLIC
    trusted: bool = True
    """False for whatever a person outside or a model wrote: text that may try to instruct."""

    def join(self, *others: Labels) -> Labels:
        """The least labels that are at least each of these."""
        others = tuple(x for x in others if x is not NO_LABELS and x is not self)
        if not others:
            return self
        all_labels = (self, *others)
        return Labels(
            tenants=frozenset().union(*(x.tenants for x in all_labels)),
            sensitivity=max(x.sensitivity for x in all_labels),
            trusted=all(x.trusted for x in all_labels),
        )


NO_LABELS = Labels()
"""The default of most data: joining it is by far the most frequent case."""


def join(labels: Iterable[Labels]) -> Labels:
    """Join any number of labels."""
    return NO_LABELS.join(*labels)


class Provenance(BaseModel):
    """Where a datum came from."""

    model_config = ConfigDict(frozen=True)

    kind: str
    """``document``, ``graph``, ``rules``, ``model``, ``adapter``, ``agent``, ``tool``,
    ``person``, ``clock``."""
    source: str
    """Its name there: a document's path, ``graph:node``, a rule base, a model,
    ``model+adapter``, an agent."""
    version: str = ""
    """Digest of that source when it was read; for an agent, the turn; for a tool, the call."""
    span: tuple[int, int] | None = None
    """Characters [start, end) of the source, where it is a text."""
    corpus: str = ""
    """Corpus or graph that holds the source."""

    def __str__(self) -> str:
        where = f"{self.corpus}/{self.source}" if self.corpus else self.source
        span = f"[{self.span[0]}:{self.span[1]}]" if self.span else ""
        version = f"@{self.version[:8]}" if self.version else ""
        return f"{where}{span}{version}"
