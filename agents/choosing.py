# ruff: noqa: SIM905 - word lists are easier to read and to change as text
"""Which sentences of which sources answer a question."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from llmos.agents import sentences as text_of
from llmos.syscalls.labels import Provenance
from llmos.syscalls.retrieve import FoundPassage


@dataclass(frozen=True, slots=True)
class Source:
    """Something that can be cited."""

    text: str
    provenance: Provenance
    title: str = ""
    score: float = 0.0
    """Nearness to the question as the retrieval found it."""
    by_name: bool = False
    """Found because the question names it: surely about what is asked."""
    sentences: tuple[str, ...] = ()
    """Left empty, they are split off ``text``."""

    def __post_init__(self) -> None:
        if not self.sentences:
            split = [
                s
                for s in text_of.split_sentences(self.text)
                if not s.endswith("?") and not text_of.is_pointer(s)
            ]
            object.__setattr__(self, "sentences", tuple(split))

    @classmethod
    def of(cls, passage: FoundPassage) -> Source:
        """A retrieved passage as a source."""
        return cls(passage.text, passage.provenance, passage.title, passage.score)


class Line(NamedTuple):
    """A sentence that may be part of an answer."""

    text: str
    source: int
    """Position of the source."""
    score: float
    """Nearness to the question."""
    at: int = -1
    """Position among the evidence lines; -1 for a line of the draft."""


def question_parts(question: str) -> list[str]:
    """The question, and its parts where it asks several things."""
    pieces = [
        piece.strip(" ,")
        for sentence in text_of.split_sentences(question)
        for piece in _SEVERAL.split(sentence)
    ]
    asking = [p for p in pieces if len(text_of.content_words(p)) >= 1]
    return [question, *asking[:4]] if len(asking) > 1 else [question]


_SEVERAL = re.compile(
    r"\band\s+(?=(?:what|how|when|where|which|who|why|can|do|does|is|are|should)\b)", re.IGNORECASE
)


def choose_lines(
    lines: Sequence[Line],
    vectors: npt.NDArray[np.float32],
    fits: npt.NDArray[np.float32],
    most: int = 3,
) -> list[Line]:
    """The sentences nearest to the question that do not repeat each other, in reading order.

    Args:
        lines: Evidence lines to choose from, in order.
        vectors: Embeddings of all evidence lines.
        fits: For all evidence lines, how near they are to each part of the question; the
            best line of every part comes first.
        most: How many sentences.
    """
    chosen: list[Line] = []
    ranked = sorted(lines, key=lambda line: (-line.score, line.at))
    best = ranked[0].score
    by_position = {line.at: line for line in lines}
    firsts = [max(lines, key=lambda line: column[line.at]) for column in fits.T]
    for line in dict.fromkeys([*firsts, *ranked]):
        if len(chosen) >= most:
            break
        if line.score < best - (0.25 if line in firsts else 0.15):
            continue
        if line in chosen:
            continue
        run = _run_up(line, by_position)
        if run is None or len({*chosen, *run}) + 1 > most:
            continue
        chosen += [before for before in run if before not in chosen]
        if all(float(vectors[line.at] @ vectors[c.at]) < 0.92 for c in chosen):
            chosen.append(line)
    chosen = chosen or [ranked[0]]
    first = {line.source: n for n, line in reversed(list(enumerate(chosen)))}
    return sorted(chosen, key=lambda line: (first[line.source], line.at))


def _run_up(line: Line, by_position: dict[int, Line]) -> list[Line] | None:
    """The sentences before a line that it cannot do without; None if they are not there.

    "It takes 5 days" means nothing without the sentence before it.
    """
    run: list[Line] = []
    first = line
    while leans_back(first.text):
        before = by_position.get(first.at - 1)
        if before is None or before.source != line.source:
            return None
        run.insert(0, before)
        first = before
    return run


def in_context(sentence: str, title: str) -> str:
    """A sentence with what its page is about: "It lasts two days" alone is near to nothing."""
    said = text_of.content_words(sentence)
    return sentence if not title or text_of.content_words(title) <= said else f"{title}: {sentence}"


def about(
    question: str, sources: Sequence[Source], *, relevant: float, certain: float, named: float
) -> list[Source]:
    """The sources that are about what is asked.

    "How is lupus treated?" is near to every text on a treatment, so nearness alone will
    not do. Below ``certain`` a source must itself name a share ``named`` of what the question
    is about; where it names all of it, it may be a little less near than ``relevant``.
    """
    focus = text_of.focus_words(question)
    kept = []
    for source in sources:
        held = len(focus & text_of.content_words(f"{source.title} {source.text}"))
        least = 0.7 * relevant if len(focus) >= 2 and held == len(focus) else relevant
        if (
            source.by_name
            or source.score >= certain
            or (source.score >= least and held >= named * len(focus))
        ):
            kept.append(source)
    return kept


def first_lines(question: str, evidence: Sequence[tuple[int, str]]) -> npt.NDArray[np.float32]:
    """A bonus for the first sentence of each source, where it is asked what something is."""
    defining = _WHAT_IS.match(question.strip()) is not None
    firsts = [n == 0 or evidence[n - 1][0] != i for n, (i, _) in enumerate(evidence)]
    return np.array([0.1 if defining and first else 0.0 for first in firsts], dtype=np.float32)


_WHAT_IS = re.compile(r"^what(?:'s| is| are| does)\s+(?!the\b)[^?]{1,60}\??$", re.IGNORECASE)


def near_lines(lines: Sequence[Line], sources: Sequence[Source]) -> list[Line]:
    """Lines of the sources that are about as near as the nearest: others mix up subjects."""
    best = max(sources[line.source].score for line in lines)
    return [line for line in lines if sources[line.source].score >= best - 0.2]


def shared_words(question: str, evidence: Sequence[tuple[int, str]]) -> npt.NDArray[np.float32]:
    """For each evidence line, the share of the question's content words it contains."""
    named = text_of.content_words(question)
    if not named:
        return np.zeros(len(evidence), dtype=np.float32)
    return np.array(
        [len(named & text_of.content_words(s)) / len(named) for _, s in evidence], dtype=np.float32
    )


def coverage(question: str, lines: Sequence[Line], sources: Sequence[Source]) -> int:
    """How many content words of the question an answer takes up."""
    said = " ".join(f"{sources[line.source].title} {line.text}" for line in lines)
    return len(text_of.content_words(question) & text_of.content_words(said))


def leans_back(sentence: str) -> bool:
    """Whether a sentence cannot be understood without the one before."""
    first = (text_of.words(sentence) or [""])[0]
    return first in _LEANING


_LEANING = frozenset(
    "it its they them their this that these those he she his her then otherwise however also "
    "instead afterwards therefore so but and both such here there".split()
)
