"""``retrieve``: passages of a corpus that are near a query."""

from __future__ import annotations

from typing import ClassVar

from pydantic import BaseModel, ConfigDict, Field

from llmos.syscalls.base import Caller, Request, Response, Services, handles
from llmos.syscalls.labels import Labels, Provenance


class FoundPassage(BaseModel):
    """One passage."""

    model_config = ConfigDict(frozen=True)

    text: str
    title: str
    score: float
    """Cosine similarity to the query, -1 to 1."""
    meta: dict[str, str]
    """Other columns, where it came from a table."""
    provenance: Provenance


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

    @property
    def resource(self) -> str:
        """The corpus."""
        return self.corpus


@handles(Retrieve)
async def retrieve(request: Retrieve, caller: Caller, services: Services) -> Retrieved:
    """Search, and say for every passage where it stands."""
    hits, labels = await services.retrieve(caller.tenant, request.corpus, request.query, request.k)
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
        )
        for h in hits
        if h.score >= request.min_score
    )
    return Retrieved(
        passages=passages,
        provenance=tuple(p.provenance for p in passages),
        labels=labels if passages else Labels(),
    )
