"""What a customer wants: a vote of the example utterances nearest to the question."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict

from llmos.syscalls.retrieve import FoundPassage

UNKNOWN = "unknown"

SHARPNESS = 12.0
"""Exponent on the similarity: a vote at 0.9 counts as much as four at 0.8."""


class Intent(BaseModel):
    """What was understood."""

    model_config = ConfigDict(frozen=True)

    label: str
    """``unknown`` where nothing is near enough or the neighbours do not agree."""
    confidence: float
    """0 to 1: the winner's share of the votes, times how near its best example is."""
    margin: float
    """The winner's share less the second's, 0 to 1."""
    nearest: float
    """Cosine of the nearest example."""
    candidates: tuple[str, ...] = ()
    """Labels by their votes, best first; at most three."""


def vote(
    neighbours: Sequence[FoundPassage],
    *,
    label_field: str = "label",
    least_similarity: float = 0.4,
    least_share: float = 0.35,
) -> Intent:
    """The label that similarity-weighted neighbours agree on.

    A classifier trained on the examples would be more exact; the vote needs no training,
    takes a new example at once, and its reasons are the examples themselves.
    """
    votes: dict[str, float] = defaultdict(float)
    nearest: dict[str, float] = defaultdict(float)
    for found in neighbours:
        label = found.meta.get(label_field, "")
        if label and found.score > 0:
            votes[label] += found.score**SHARPNESS
            nearest[label] = max(nearest[label], found.score)
    total = sum(votes.values())
    if total <= 0:
        return Intent(label=UNKNOWN, confidence=0.0, margin=0.0, nearest=0.0)
    ranked = sorted(votes, key=lambda label: (-votes[label], label))
    best = ranked[0]
    share = votes[best] / total
    second = votes[ranked[1]] / total if len(ranked) > 1 else 0.0
    known = nearest[best] >= least_similarity and share >= least_share
    return Intent(
        label=best if known else UNKNOWN,
        confidence=round(share * min(1.0, nearest[best] / 0.8), 3),
        margin=round(share - second, 3),
        nearest=round(max(nearest.values()), 3),
        candidates=tuple(ranked[:3]),
    )
