"""Answers that rest on sources.

A model drafts an answer from numbered passages; each sentence of the draft is kept only
if a passage says the same, and gets that passage's number. Where too little is kept, the
passages answer in their own words. Where they do not fit the question, nothing is said.

What "says the same" means, all of it needed: the same numbers with the same units, the
same words that turn a meaning round, a denial only where the source denies, most of the
content words, and a near embedding. Embeddings alone were rejected: "we refund in 5 days"
and "we refund in 10 days" are as near to each other as a sentence gets to itself.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field

from llmos.agents import sentences as text_of
from llmos.agents.choosing import (
    Line,
    Source,
    about,
    choose_lines,
    coverage,
    first_lines,
    in_context,
    near_lines,
    question_parts,
    shared_words,
)
from llmos.agents.messages import Citation
from llmos.agents.support import Support, judge
from llmos.drivers.errors import EngineError
from llmos.kernel.context import Context
from llmos.syscalls.errors import Busy, DeadlineExceeded, ServiceUnavailable
from llmos.syscalls.generate import ChatMessage

CHARS_PER_TOKEN = 4
"""Rough, on the safe side for English; the engine counts exactly and refuses what is too long."""


class Thresholds(BaseModel):
    """What counts as found and as supported. Cosines of the embedder, 0 to 1."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    relevant: float = Field(default=0.4, ge=0, le=1)
    """Best source for a question below this: nothing is claimed."""
    certain: float = Field(default=0.6, ge=0, le=1)
    """From here on a source counts even if it contains none of the question's own words."""
    named: float = Field(default=0.5, ge=0, le=1)
    """Below ``certain``, the share of the question's own words that a source contains."""
    alike: float = Field(default=0.5, ge=0, le=1)
    """A draft sentence is this near to the sentence that supports it."""
    overlap: float = Field(default=0.7, ge=0, le=1)
    """Share of a draft sentence's content words that its support contains."""
    kept: float = Field(default=0.5, ge=0, le=1)
    """Less than this share of a draft supported: the passages answer in their own words."""


@dataclass(frozen=True, slots=True)
class Grounded:
    """An answer and what it rests on."""

    text: str
    """Sentences, each with the number of its source; empty where ``grounded`` is none."""
    grounded: Literal["draft", "extract", "none"]
    confidence: float
    """0 to 1: how near the sentences are to their sources and these to the question."""
    citations: tuple[Citation, ...] = ()
    dropped: tuple[str, ...] = field(default=())
    """Sentences of the draft that no source supports, for the record."""
    trouble: str = ""
    """Why the model gave no draft, where it could not."""


class Grounding:
    """Grounded answers through one turn's context."""

    def __init__(
        self,
        context: Context,
        *,
        model: str,
        embedder: str,
        thresholds: Thresholds | None = None,
        passage_tokens: int = 350,
        max_new_tokens: int = 80,
    ) -> None:
        """Prepare; nothing is called yet.

        Args:
            context: The turn's context.
            model: A causal model, or empty: the passages answer in their own words.
            embedder: An encoder.
            thresholds: What counts as found and as supported.
            passage_tokens: About how much of the prompt the passages may fill.
            max_new_tokens: Length of a draft.
        """
        self._os = context
        self._model = model
        self._embedder = embedder
        self._limits = thresholds or Thresholds()
        self._passage_tokens = passage_tokens
        self._max_new_tokens = max_new_tokens

    async def answer(
        self, question: str, sources: Sequence[Source], *, topic: str = ""
    ) -> Grounded:
        """Answer from the sources, or say that they do not fit.

        Args:
            question: In a person's words.
            sources: What may be cited, best first.
            topic: What the question is about, where that is known by other means; sources
                then need not use the question's own words.

        Raises:
            SyscallError: as embed raises it. A model that is busy, broken or too slow is no
                error here: the sources then answer in their own words, and ``trouble`` says so.
        """
        limits = self._limits
        certain = 0.7 * limits.relevant if topic else limits.certain
        sources = [
            s
            for s in about(
                question, sources, relevant=limits.relevant, certain=certain, named=limits.named
            )
            if s.sentences
        ]
        if not sources:
            return Grounded("", "none", 0.0)
        draft, trouble = "", ""
        if self._model:
            draft, trouble = await self.draft(question, sources)
        claims = clean_draft(draft, question)
        evidence = [(i, s) for i, source in enumerate(sources) for s in source.sentences]
        parts = question_parts(question)
        if topic:
            parts.append(topic)
        embedded = await self._os.embed(
            self._embedder,
            [*parts, *claims, *(in_context(s, sources[i].title) for i, s in evidence)],
        )
        asked, vectors = embedded.vectors[: len(parts)], embedded.vectors[len(parts) :]
        claimed, stated = vectors[: len(claims)], vectors[len(claims) :]
        bonus = 0.1 * shared_words(question, evidence) + first_lines(question, evidence)
        fits = 0.75 * (stated @ asked.T) + bonus[:, None]
        lines = [
            Line(s, i, float(fits[n].max()) + 0.25 * sources[i].score, n)
            for n, (i, s) in enumerate(evidence)
        ]
        best = max(line.score for line in lines)
        if best < self._limits.relevant * 0.7:
            return Grounded("", "none", 0.0, trouble=trouble)
        kept, dropped, support = [], [], []
        for n, claim in enumerate(claims):
            found = self._judge(claim, claimed[n] @ stated.T, lines)
            # How near the support is to the question counts, not the claim: a model likes
            # to repeat the question's words in front of something else.
            if not found.supported or found.line is None or found.line.score < best - 0.2:
                dropped.append(claim)
            else:
                kept.append(found.line._replace(text=claim))
                support.append(found.score)
        chosen = choose_lines(near_lines(lines, sources), stated, fits)
        covered = coverage(question, kept, sources)
        enough = kept and len(kept) >= self._limits.kept * len(claims)
        if (
            enough
            and max(line.score for line in kept) >= best - 0.12
            and covered >= coverage(question, chosen, sources)
        ):
            mean = sum(support) / len(support) * len(kept) / len(claims)
            return self._compose(
                kept, sources, question, "draft", mean, dropped=tuple(dropped), trouble=trouble
            )
        return self._compose(
            chosen, sources, question, "extract", best, dropped=tuple(claims), trouble=trouble
        )

    async def draft(self, question: str, sources: Sequence[Source]) -> tuple[str, str]:
        """What the model makes of the passages: (its text, why there is none)."""
        prompt = build_prompt(question, sources, self._passage_tokens)
        # A slow draft must leave time for an answer in the passages' own words.
        patience_s = self._os.remaining_s * 0.8
        try:
            generated = await self._os.generate(
                self._model, prompt, max_new_tokens=self._max_new_tokens, deadline_s=patience_s
            )
        except (Busy, DeadlineExceeded, EngineError, ServiceUnavailable) as error:
            self._os.log.warning("no draft from %s: %s", self._model, error)
            return "", f"{type(error).__name__}: {error}"
        text = generated.text
        return (_up_to_sentence(text) if generated.finish == "length" else text), ""

    async def check(self, text: str, sources: Sequence[Source]) -> list[Support]:
        """What the sources say to each sentence of a text that somebody else has written.

        Numbers of sources in the text (``[1]``) are not read as part of it. ``line.source`` of
        a support is the position of its source.

        Raises:
            SyscallError: as embed raises it.
        """
        split = [_without_numbers(s) for s in text_of.split_sentences(text)]
        claims = [s for s in split if s]
        evidence = [(i, s) for i, source in enumerate(sources) for s in source.sentences]
        if not claims or not evidence:
            return [self._judge(c, np.empty(0, dtype=np.float32), []) for c in claims]
        texts = [*claims, *(in_context(s, sources[i].title) for i, s in evidence)]
        vectors = (await self._os.embed(self._embedder, texts)).vectors
        near = vectors[: len(claims)] @ vectors[len(claims) :].T
        lines = [Line(s, i, 0.0, n) for n, (i, s) in enumerate(evidence)]
        return [self._judge(claim, near[n], lines) for n, claim in enumerate(claims)]

    def _judge(self, claim: str, near: npt.NDArray[np.float32], lines: Sequence[Line]) -> Support:
        limits = self._limits
        return judge(claim, near, lines, alike=limits.alike, overlap=limits.overlap)

    async def cite(self, statements: Sequence[str], sources: Sequence[Source]) -> list[int | None]:
        """For each statement the position of the source nearest to it, or None if none is near."""
        evidence = [(i, s) for i, source in enumerate(sources) for s in source.sentences]
        if not statements or not evidence:
            return [None] * len(statements)
        texts = [*statements, *(in_context(s, sources[i].title) for i, s in evidence)]
        vectors = (await self._os.embed(self._embedder, texts)).vectors
        near = vectors[: len(statements)] @ vectors[len(statements) :].T
        return [
            evidence[int(row.argmax())][0] if float(row.max()) >= self._limits.relevant else None
            for row in near
        ]

    def _compose(
        self,
        lines: Sequence[Line],
        sources: Sequence[Source],
        question: str,
        grounded: Literal["draft", "extract"],
        confidence: float,
        *,
        dropped: tuple[str, ...],
        trouble: str,
    ) -> Grounded:
        order = list(dict.fromkeys(line.source for line in lines))
        numbers = {position: n for n, position in enumerate(order, 1)}
        return Grounded(
            text=with_numbers(
                [
                    (_without_yes(line.text, question, n), numbers[line.source])
                    for n, line in enumerate(lines)
                ]
            ),
            grounded=grounded,
            confidence=round(min(1.0, max(0.0, confidence)), 3),
            citations=tuple(citation(numbers[i], sources[i]) for i in order),
            dropped=dropped,
            trouble=trouble,
        )


def build_prompt(
    question: str, sources: Sequence[Source], passage_tokens: int
) -> list[ChatMessage]:
    """Passages first, then one short instruction and the question.

    Small models follow what stands last, and repeat what they are told to avoid; so there
    is one positive instruction. Passages are cut at sentences, the best one first.
    """
    room = passage_tokens * CHARS_PER_TOKEN
    blocks = []
    for number, source in enumerate(sources, 1):
        taken: list[str] = []
        for sentence in source.sentences:
            if len(sentence) + 1 > room:
                break
            taken.append(sentence)
            room -= len(sentence) + 1
        if taken:
            blocks.append(f"[{number}] {' '.join(taken)}")
        if room < 40:
            break
    asked = " ".join(question.split())[:1000]
    return [
        ChatMessage(
            role="user",
            content="\n\n".join(blocks)
            + "\n\nAnswer the question in one or two sentences, with the words of the text above."
            + f"\nQuestion: {asked}",
        )
    ]


def clean_draft(draft: str, question: str) -> list[str]:
    """Sentences of a draft without echoes, numbers of passages, repetitions and questions."""
    asked = text_of.content_words(question)
    kept: list[str] = []
    seen: set[str] = set()
    # A list keeps its introduction in a page; in a draft that is the question said again.
    unlisted = "\n\n".join(line for line in draft.splitlines() if not line.rstrip().endswith(":"))
    for sentence in text_of.split_sentences(unlisted):
        for prefix in ("Answer:", "A:", "Question:", "Q:"):
            sentence = sentence.removeprefix(prefix).strip()
        sentence = _without_numbers(sentence)
        key = " ".join(text_of.words(sentence))
        named = text_of.content_words(sentence)
        echo = named <= asked and not text_of.quantities(sentence)
        if not key or key in seen or sentence.endswith("?") or echo or len(named) < 2:
            continue
        seen.add(key)
        kept.append(sentence[0].upper() + sentence[1:])
    return kept[:4]


_YES = re.compile(r"^(?:Yes|No)[.,]\s+(?=\S)")
_YES_ASKED = re.compile(
    r"^(?:is|are|can|could|do|does|did|will|would|may|must|should|has|have)\b", re.IGNORECASE
)


def _without_yes(line: str, question: str, position: int) -> str:
    """A "No." that answered another question is taken off."""
    if position == 0 and _YES_ASKED.match(question.strip()):
        return line
    rest = _YES.sub("", line)
    return rest[0].upper() + rest[1:]


def with_numbers(lines: Iterable[tuple[str, int]]) -> str:
    """Put [n] before the end mark of each sentence; of a run from one source, the last alone."""
    pairs = list(lines)
    parts = []
    for n, (line, number) in enumerate(pairs):
        if n + 1 < len(pairs) and pairs[n + 1][1] == number:
            parts.append(line)
        else:
            end = line[-1] if line[-1] in ".!?…。！？" else "."
            parts.append(f"{line.rstrip('.!?…。！？')} [{number}]{end}")
    return " ".join(parts)


def citation(number: int, source: Source) -> Citation:
    """A source as the answer shows it."""
    quote = " ".join(source.sentences)
    if len(quote) > 200:
        quote = quote[:200].rsplit(" ", 1)[0] + " …"
    return Citation(
        number=number, provenance=source.provenance, quote=quote, score=round(source.score, 3)
    )


def merge(
    text: str, own: Sequence[Citation], more: Sequence[Citation]
) -> tuple[str, tuple[Citation, ...]]:
    """Renumber the citations of a second answer's text so that they follow ``own``.

    The same source in both keeps its first number. Returns the text and all citations.
    """
    known = {str(c.provenance): c.number for c in own}
    all_citations = list(own)
    numbers: dict[int, int] = {}
    for c in more:
        if str(c.provenance) in known:
            numbers[c.number] = known[str(c.provenance)]
            continue
        numbers[c.number] = known[str(c.provenance)] = len(all_citations) + 1
        all_citations.append(c.model_copy(update={"number": len(all_citations) + 1}))
    return _renumber(text, numbers), tuple(all_citations)


def rescored(sources: Sequence[Source], scores: Sequence[float]) -> list[Source]:
    """Sources with other scores, best first."""
    changed = [replace(s, score=float(x)) for s, x in zip(sources, scores, strict=True)]
    return sorted(changed, key=lambda s: -s.score)


def _renumber(text: str, numbers: dict[int, int]) -> str:
    return text_of.CITED.sub(lambda m: m[0].replace(m[1], str(numbers.get(int(m[1]), m[1]))), text)


def _without_numbers(sentence: str) -> str:
    plain = " ".join(text_of.CITED.sub("", sentence).split())
    for end in ".,;:!?":
        plain = plain.replace(f" {end}", end)
    return plain


def _up_to_sentence(text: str) -> str:
    return " ".join(text_of.split_sentences(text, whole=True))
