"""``retrieve``: passages of a corpus that are near a query."""

from __future__ import annotations

import math
from typing import Any, ClassVar, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, model_validator

from llmos.drivers.retrieval.filters import Condition, Mode, Operator
from llmos.syscalls.base import Caller, Hit, Request, Response, Search, Services, handles
from llmos.syscalls.labels import Labels, Provenance


def _unset(value: Any) -> bool:
    """Whether a field is left out of the record of a request: journals of the time before it
    was there hold the same request without it, and must be known again."""
    return not value


Value: TypeAlias = str | int | float


class Filter(BaseModel):
    """A condition on a field of ``meta``; see :class:`llmos.drivers.retrieval.filters.Condition`
    for what is compared how."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    field: str = Field(min_length=1, max_length=200)
    op: Operator = "eq"
    value: Value | tuple[Value, ...]
    """Several for ``in``, one else."""

    @model_validator(mode="after")
    def _fits_together(self) -> Filter:
        several = isinstance(self.value, tuple)
        if several != (self.op == "in"):
            raise ValueError(f"{self.op} takes {'several values' if not several else 'one value'}")
        values = self.value if isinstance(self.value, tuple) else (self.value,)
        if not 0 < len(values) <= 1000:
            raise ValueError("between 1 and 1000 values")
        if any(isinstance(v, float) and not math.isfinite(v) for v in values):
            raise ValueError("a value is not finite")
        if any(isinstance(v, str) and len(v) > 10_000 for v in values):
            raise ValueError("a value is longer than 10,000 characters")
        return self

    def condition(self) -> Condition:
        """The driver's form."""
        values = self.value if isinstance(self.value, tuple) else (self.value,)
        return Condition(self.field, self.op, tuple(str(v) for v in values))


class LegScore(BaseModel):
    """What one leg gave to a passage's score."""

    model_config = ConfigDict(frozen=True)

    leg: str
    """``lexical`` or ``vector``."""
    rank: int | None
    """From 1; None: this leg has not found it."""
    score: float | None
    """BM25, or the cosine."""
    scaled: float
    weight: float
    """The fused score is the sum of ``scaled × weight``."""


class Explanation(BaseModel):
    """How a passage came to its place."""

    model_config = ConfigDict(frozen=True)

    legs: tuple[LegScore, ...]
    fused: float
    facts: dict[str, float]
    """What the reranker saw; empty: it was not asked."""


class FoundPassage(BaseModel):
    """One passage."""

    model_config = ConfigDict(frozen=True)

    text: str
    title: str
    score: float
    """What it was ordered by: the cosine to the query, -1 to 1 (``vector``), BM25
    (``lexical``), the fused score (``hybrid``), or the reranker's. Compare within one answer."""
    meta: dict[str, str]
    """Other columns, where it came from a table."""
    provenance: Provenance
    explanation: Explanation | None = Field(default=None, exclude_if=_unset)
    """Where asked for."""


class Retrieved(Response):
    """The passages, best first."""

    passages: tuple[FoundPassage, ...]


class Retrieve(Request[Retrieved]):
    """Look something up."""

    syscall: ClassVar[str] = "retrieve"

    corpus: str
    query: str
    k: int = Field(default=5, ge=1, le=100)
    min_score: float = Field(default=-1.0, ge=-1.0, le=1.0)
    """A cosine; for searches by vector without a reranker."""
    mode: Mode | None = Field(default=None, exclude_if=_unset)
    """``vector``, ``lexical`` (BM25) or ``hybrid``, both fused; not given: ``vector``."""
    filters: tuple[Filter, ...] = Field(default=(), max_length=32, exclude_if=_unset)
    """All must hold."""
    rerank: bool = Field(default=False, exclude_if=_unset)
    """Look at the best again; the corpus's fusion file must hold a reranker."""
    diversity: float = Field(default=0.0, ge=0.0, le=1.0, exclude_if=_unset)
    """Above 0: passages that say the same as a better one give way to others."""
    explain: bool = Field(default=False, exclude_if=_unset)
    """Say how each passage came to its place."""

    @model_validator(mode="after")
    def _fits_together(self) -> Retrieve:
        by_cosine = self.mode in (None, "vector") and not self.rerank
        if self.min_score > -1.0 and not by_cosine:
            raise ValueError("min_score: only a search by vector has cosines as scores")
        return self

    def search(self) -> Search | None:
        """The kernel's form; None: by vector, as ever."""
        if not (self.mode or self.filters or self.rerank or self.diversity or self.explain):
            return None
        conditions = tuple(f.condition() for f in self.filters)
        return Search(self.mode or "vector", conditions, self.rerank, self.diversity)

    @property
    def resource(self) -> str:
        """The corpus."""
        return self.corpus


def _explained(hit: Hit) -> Explanation | None:
    if hit.found is None:
        return None
    return Explanation(
        legs=tuple(
            LegScore(leg=s.leg, rank=s.rank, score=s.score, scaled=s.scaled, weight=s.weight)
            for s in hit.found.shares
        ),
        fused=hit.found.fused,
        facts=dict(hit.found.facts),
    )


@handles(Retrieve)
async def retrieve(request: Retrieve, caller: Caller, services: Services) -> Retrieved:
    """Search, and say for every passage where it stands."""
    asked = (caller.tenant, request.corpus, request.query, request.k)
    search = request.search()
    if search is None:
        hits, labels = await services.retrieve(*asked)
    else:
        hits, labels = await services.retrieve(*asked, search)
    passages = tuple(
        FoundPassage(
            text=h.passage.text,
            title=h.passage.title,
            score=h.score,
            meta=dict(h.passage.meta),
            provenance=Provenance(
                kind="document",
                source=h.passage.source,
                version=h.passage.version,
                span=h.passage.span,
                corpus=request.corpus,
            ),
            explanation=_explained(h) if request.explain else None,
        )
        for h in hits
        if h.score >= request.min_score
    )
    return Retrieved(
        passages=passages,
        provenance=tuple(p.provenance for p in passages),
        labels=labels if passages else Labels(),
    )
