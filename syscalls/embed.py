"""``embed``: texts into vectors."""

from __future__ import annotations

import base64
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
from pydantic import Field, field_serializer, field_validator

from llmos.syscalls.base import Caller, Request, Response, Services, handles
from llmos.syscalls.labels import Provenance


class Embedded(Response):
    """The embeddings, in order. Shape (number of texts, dimension), rows of length 1."""

    vectors: npt.NDArray[np.float32]

    @field_serializer("vectors", when_used="json")
    def _as_json(self, vectors: npt.NDArray[np.float32]) -> dict[str, Any]:
        # Base64 of the little-endian floats: exact, and a third of their length as digits.
        data = base64.b64encode(np.ascontiguousarray(vectors, dtype="<f4").tobytes()).decode()
        return {"shape": vectors.shape, "float32": data}

    @field_validator("vectors", mode="before")
    @classmethod
    def _of_json(cls, value: Any) -> Any:
        if isinstance(value, dict):
            flat = np.frombuffer(base64.b64decode(value["float32"]), dtype="<f4")
            return flat.reshape(value["shape"]).copy()
        return value


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
