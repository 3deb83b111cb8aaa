"""Messages that the bundled programs share; ``llmos ask`` sends a Question."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue

from llmos.syscalls.labels import Provenance
from llmos.syscalls.messages import Message
from llmos.syscalls.rules import FiredRule


class Question(Message):
    """A question in a person's words."""

    text: str = Field(min_length=1, max_length=20_000)
    data: dict[str, JsonValue] = Field(default_factory=dict)
    """Facts known beside the text, e.g. an amount or an age."""


class Citation(BaseModel):
    """A source an answer rests on."""

    model_config = ConfigDict(frozen=True)

    number: int
    """As cited in the text: [1]."""
    provenance: Provenance
    quote: str
    """The beginning of what it says."""
    score: float = 0.0


class Answer(Message):
    """What the asker gets, with all it rests on."""

    text: str
    decision: str = ""
    """What the rules decided: answer, refund, escalate, …"""
    grounded: Literal["draft", "extract", "rules", "none"] = "none"
    """``draft``: the model's words, supported by the passages; ``extract``: the passages'
    own words, since the draft was not supported; ``rules``: a decision of the rules alone;
    ``none``: nothing was found and nothing is claimed."""
    confidence: float = 0.0
    """0 to 1: how much of the text the sources support."""
    sources: tuple[Citation, ...] = ()
    rules: tuple[FiredRule, ...] = ()
    notice: str = ""
    """What the reader must know, e.g. that this is not a diagnosis."""
    data: dict[str, JsonValue] = Field(default_factory=dict)
