"""``generate``: text from a causal model."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from llmos.drivers.errors import EngineFailed
from llmos.drivers.protocols import ChatTurn, GenerationChunk, GenerationJob, SamplingParams
from llmos.syscalls.base import Caller, Request, Response, Services, handles
from llmos.syscalls.errors import ServiceUnavailable
from llmos.syscalls.labels import Labels, Provenance


class ChatMessage(BaseModel):
    """One turn of a conversation with a model."""

    model_config = ConfigDict(frozen=True)

    role: Literal["system", "user", "assistant"]
    content: str


class Generated(Response):
    """What the model wrote."""

    text: str
    finish: Literal["stop", "length"]
    """``stop``: the model ended or a stop string came; ``length``: max_new_tokens."""
    prompt_tokens: int
    new_tokens: int
    queued_s: float
    """Seconds before the first step with this request in it."""
    run_s: float


class Generate(Request[Generated]):
    """Ask a causal model to go on."""

    syscall: ClassVar[str] = "generate"

    model: str
    prompt: str | tuple[ChatMessage, ...]
    """A string is one user message; for anything else hand over the conversation."""
    max_new_tokens: int = Field(default=128, ge=1)
    temperature: float = Field(default=0.0, ge=0.0, allow_inf_nan=False)
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    top_k: int = Field(default=0, ge=0)
    stop: tuple[str, ...] = Field(default=(), max_length=16)
    raw: bool = False
    """Continue the string as it is, without the chat template."""
    ignore_eos: bool = False
    """Write exactly max_new_tokens; for benchmarks."""
    prefix: str = Field(default="", max_length=200_000)
    """What the answer is made to begin with; ``text`` of the response is what follows it."""

    @property
    def resource(self) -> str:
        """The model."""
        return self.model

    def job(self, tenant: str) -> GenerationJob:
        """The engine's form of this request."""
        prompt: str | tuple[ChatTurn, ...]
        if isinstance(self.prompt, str):
            prompt = self.prompt if self.raw else (ChatTurn("user", self.prompt),)
        else:
            prompt = tuple(ChatTurn(m.role, m.content) for m in self.prompt)
        return GenerationJob(
            id=uuid.uuid4().hex,
            prompt=prompt,
            params=SamplingParams(
                max_new_tokens=self.max_new_tokens,
                temperature=self.temperature,
                top_p=self.top_p,
                top_k=self.top_k,
                stop=self.stop,
                ignore_eos=self.ignore_eos,
            ),
            tenant=tenant,
            prefix=self.prefix,
        )


async def stream(
    request: Generate, caller: Caller, services: Services
) -> AsyncIterator[GenerationChunk]:
    """The chunks of a request; the last one has ``finish`` set. Raises what the engine raised."""
    async with aclosing(services.generate(request.model, request.job(caller.tenant))) as chunks:  # type: ignore[type-var]
        async for chunk in chunks:
            if chunk.error is not None:
                raise chunk.error
            if chunk.finish == "cancelled":
                raise EngineFailed(request.model, "the request was cancelled in the engine")
            yield chunk


def collect(
    request: Generate, caller: Caller, chunks: list[GenerationChunk], digest: str
) -> Generated:
    """Put the chunks of a finished request together."""
    last = chunks[-1]
    return Generated(
        text="".join(c.text for c in chunks),
        finish="stop" if last.finish == "stop" else "length",
        prompt_tokens=last.prompt_tokens,
        new_tokens=last.new_tokens,
        queued_s=last.queued_s,
        run_s=last.run_s,
        provenance=(Provenance(kind="model", source=request.model, version=digest),),
        # What a model writes is never trusted: it may repeat instructions found in its input.
        labels=caller.labels.join(Labels(trusted=False)),
    )


@handles(Generate)
async def generate(request: Generate, caller: Caller, services: Services) -> Generated:
    """Run the request to its end.

    A device that is lost meanwhile has shown nobody what it wrote, so the request starts
    again where the model is loaded next; the deadline ends the trying.
    """
    while True:
        try:
            chunks = [chunk async for chunk in stream(request, caller, services)]
        except ServiceUnavailable as gone:
            await services.sleep(min(gone.retry_after_s, 0.2))
        else:
            break
    return collect(request, caller, chunks, await services.model_digest(request.model))
