"""``embed``: texts into vectors."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import numpy.typing as npt
from pydantic import Field

from llmos.syscalls.base import Caller, Request, Response, Services, handles
from llmos.syscalls.labels import Provenance


class Embedded(Response):
    """The embeddings, in order. Shape (number of texts, dimension), rows of length 1."""

    vectors: npt.NDArray[np.float32]


class Embed(Request[Embedded]):
    """Ask an encoder for embeddings."""

    syscall: ClassVar[str] = "embed"

    model: str
    texts: tuple[str, ...] = Field(max_length=4096)

    @property
    def resource(self) -> str:
        """The model."""
        return self.model


@handles(Embed)
async def embed(request: Embed, caller: Caller, services: Services) -> Embedded:
    """Embed all texts."""
    vectors = await services.embed(request.model, request.texts)
    digest = await services.model_digest(request.model)
    return Embedded(
        vectors=vectors,
        provenance=(Provenance(kind="model", source=request.model, version=digest),),
        labels=caller.labels,
    )
