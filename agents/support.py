"""Whether a source says what a sentence says, and if not, what speaks against it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from llmos.agents import sentences as text_of
from llmos.agents.choosing import Line

Against: TypeAlias = Literal["empty", "unlike", "words", "numbers", "turn", "denial"]
"""``empty``: the sentence has no content word; ``unlike``: its embedding is not near; ``words``:
too few of its content words are there; ``numbers``: a number or its unit is not; ``turn``: it
has a word that turns a meaning round, as "only", and the source has not; ``denial``: one of the
two denies."""

_LOOKED_AT = 6
"""Nearest lines that are compared word by word."""


@dataclass(frozen=True, slots=True)
class Support:
    """What the sources say to one sentence."""

    sentence: str
    against: tuple[Against, ...]
    """Empty: supported."""
    overlap: float
    """Share of its content words in the line and the one after it, 0 to 1."""
    alike: float
    """Cosine to the line."""
    line: Line | None
    """The line that supports it, or comes nearest to that; None: there is none at all."""

    @property
    def supported(self) -> bool:
        """Whether nothing speaks against it."""
        return not self.against

    @property
    def score(self) -> float:
        """The mean of ``overlap`` and ``alike``, 0 to 1; 0 where it is not supported: a number
        that differs is not half right."""
        return max(0.0, (self.overlap + self.alike) / 2) if self.supported else 0.0


def judge(
    sentence: str,
    near: npt.NDArray[np.float32],
    lines: Sequence[Line],
    *,
    alike: float,
    overlap: float,
) -> Support:
    """Compare a sentence with the lines that are nearest to it.

    Args:
        sentence: what is claimed.
        near: cosine of the sentence to each line.
        lines: sentences of the sources, those of a source one after the other.
        alike: least cosine of a support.
        overlap: least share of content words.
    """
    claimed = text_of.content_words(sentence)
    if not claimed or not lines:
        return Support(sentence, ("empty",) if not claimed else ("unlike",), 0.0, 0.0, None)
    numbers, critical = text_of.quantities(sentence), text_of.critical_words(sentence)
    denies = text_of.is_negative(sentence)
    made: list[Support] = []
    for n in np.argsort(-near, kind="stable")[:_LOOKED_AT].tolist():
        line = lines[n]
        both = line.text
        if n + 1 < len(lines) and lines[n + 1].source == line.source:
            both = f"{line.text} {lines[n + 1].text}"
        share = len(claimed & text_of.content_words(both)) / len(claimed)
        against: list[Against] = []
        if near[n] < alike:
            against.append("unlike")
        if share < overlap:
            against.append("words")
        if not text_of.covers(numbers, text_of.quantities(both)):
            against.append("numbers")
        if not critical <= text_of.critical_words(both):
            against.append("turn")
        if denies != text_of.is_negative(line.text):
            against.append("denial")
        made.append(Support(sentence, tuple(against), share, float(near[n]), line))
    # Of equals the nearest, which comes first.
    return max(made, key=lambda s: (s.score, -len(s.against)))
