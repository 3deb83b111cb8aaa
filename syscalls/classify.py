"""``classify``: texts into the classes of a model's own head."""

from __future__ import annotations

from typing import ClassVar

from pydantic import BaseModel, ConfigDict, Field

from llmos.syscalls.base import Caller, Request, Response, Services, handles
from llmos.syscalls.labels import Provenance


class Classification(BaseModel):
    """What the model makes of one text."""

    model_config = ConfigDict(frozen=True)

    label: str
    """The likeliest."""
    probability: float
    """Of that label."""
    probabilities: dict[str, float]
    """Of every label, likeliest first. They add up to 1, unless the model was trained to give
    several labels to a text: then each stands for itself."""


class Classified(Response):
    """The classes, in the order of the texts."""

    results: tuple[Classification, ...]

    @property
    def label(self) -> str:
        """The likeliest label of the first text, which is often the only one."""
        return self.results[0].label

    @property
    def probability(self) -> float:
        """Of that label."""
        return self.results[0].probability


class Classify(Request[Classified]):
    """Ask an encoder with a classification head."""

    syscall: ClassVar[str] = "classify"

    model: str
    texts: tuple[str, ...] = Field(min_length=1, max_length=4096)

    @property
    def resource(self) -> str:
        """The model."""
        return self.model


@handles(Classify)
async def classify(request: Classify, caller: Caller, services: Services) -> Classified:
    """Classify all texts."""
    labels, rows = await services.classify(request.model, request.texts)
    digest = await services.model_digest(request.model)
    results = []
    for row in rows:
        found = dict(zip(labels, row.tolist(), strict=True))
        ranked = dict(sorted(found.items(), key=lambda f: -f[1]))
        label, probability = next(iter(ranked.items()))
        results.append(Classification(label=label, probability=probability, probabilities=ranked))
    return Classified(
        results=tuple(results),
        provenance=(Provenance(kind="model", source=request.model, version=digest),),
        labels=caller.labels,
    )
