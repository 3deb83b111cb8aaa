"""``generate``: text from a causal model."""

from __future__ import annotations

import json
import uuid
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from llmos.drivers.errors import EngineFailed
from llmos.drivers.protocols import (
    ChatTurn,
    GenerationChunk,
    GenerationJob,
    Grammar,
    SamplingParams,
    ToolCall,
    ToolSpec,
)
from llmos.syscalls.base import Caller, Request, Response, Services, handles
from llmos.syscalls.errors import ServiceUnavailable
from llmos.syscalls.labels import NO_LABELS, Labels, Provenance
from llmos.syscalls.schemas import ModelT, ToolDescription, ToolUse, read_answer


def _unset(value: Any) -> bool:
    """Whether a field is left out of the record of a request: journals of the time before it
    was there hold the same request without it, and must be known again."""
    return value is None or value == () or value == ""


def _auto(value: str) -> bool:
    """As :func:`_unset`."""
    return value == "auto"


class ChatMessage(BaseModel):
    """One turn of a conversation with a model."""

    model_config = ConfigDict(frozen=True)

    role: Literal["system", "user", "assistant", "tool"]
    content: str
    tool_calls: tuple[ToolUse, ...] = Field(default=(), exclude_if=_unset)
    """What the assistant has called."""
    tool_call_id: str = Field(default="", exclude_if=_unset)
    """Of a tool's turn: which call it answers."""

    def turn(self) -> ChatTurn:
        """The engine's form of this turn."""
        calls = tuple(
            ToolCall(c.name, json.dumps(c.arguments, ensure_ascii=False), c.id)
            for c in self.tool_calls
        )
        return ChatTurn(self.role, self.content, calls, self.tool_call_id)


class AnswerGrammar(BaseModel):
    """What an answer must look like. The model can write nothing else."""

    model_config = ConfigDict(frozen=True)

    kind: Literal["json_schema", "regex", "choices", "lark"]
    source: str
    """The schema as JSON, the expression, the choices as a JSON list, or the grammar."""


class Logprob(BaseModel):
    """A written token, its log-probability, and what else was likely in its place."""

    model_config = ConfigDict(frozen=True)

    token: str
    logprob: float
    """Natural logarithm, before temperature, top-k, top-p and grammar."""
    likeliest: tuple[tuple[str, float], ...] = ()


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
    tool_calls: tuple[ToolUse, ...] = Field(default=(), exclude_if=_unset)
    """What the model asks for; the calls are not in ``text``."""
    logprobs: tuple[Logprob, ...] = Field(default=(), exclude_if=_unset)
    """Of each token, where asked for."""

    def parsed(self, schema: type[ModelT], *, prefix: str = "") -> ModelT:
        """The text as an object of a class; ``prefix`` is what stands before it.

        Raises:
            AnswerCutOff: max_new_tokens were used up before the end.
            InvalidAnswer: it does not fit.
        """
        by = next((p.source for p in self.provenance if p.kind == "model"), "the model")
        cut_off = self.finish == "length"
        return read_answer(schema, prefix + self.text, by=by, cut_off=cut_off)


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
    adapter: str = Field(default="", max_length=63, exclude_if=_unset)
    """An adapter of the model; empty: the model as it is."""
    seed: int | None = Field(default=None, ge=0, lt=2**63, exclude_if=_unset)
    """The same seed gives the same answer, whatever else the model does meanwhile."""
    logprobs: int | None = Field(default=None, ge=0, le=20, exclude_if=_unset)
    """0: log-probabilities of the tokens written; n: and of the n likeliest in their places."""
    grammar: AnswerGrammar | None = Field(default=None, exclude_if=_unset)
    tools: tuple[ToolDescription, ...] = Field(default=(), max_length=128, exclude_if=_unset)
    """What the model may ask for. Nothing is called: the answer says what it wants."""
    tool_choice: Literal["auto", "required"] = Field(default="auto", exclude_if=_auto)
    """``required``: the answer is a call of one of the tools."""

    @model_validator(mode="after")
    def _fits_together(self) -> Generate:
        bound = self.grammar is not None or self.tool_choice == "required"
        if bound and (self.stop or self.ignore_eos):
            raise ValueError("stop and ignore_eos: the grammar says where the answer ends")
        if self.tool_choice == "required" and not self.tools:
            raise ValueError("tool_choice: there are no tools")
        if self.tool_choice == "required" and self.grammar is not None:
            raise ValueError("tool_choice: a grammar binds the answer already")
        if self.tools and self.raw:
            raise ValueError("tools: a raw prompt has no place for them")
        names = [tool.name for tool in self.tools]
        if len(set(names)) < len(names):
            raise ValueError("tools: two of them have the same name")
        return self

    @property
    def resource(self) -> str:
        """The model, or ``model+adapter``."""
        return f"{self.model}+{self.adapter}" if self.adapter else self.model

    def job(self, caller: Caller) -> GenerationJob:
        """The engine's form of this request."""
        prompt: str | tuple[ChatTurn, ...]
        if isinstance(self.prompt, str):
            prompt = self.prompt if self.raw else (ChatTurn("user", self.prompt),)
        else:
            prompt = tuple(message.turn() for message in self.prompt)
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
                seed=self.seed,
                logprobs=self.logprobs,
                grammar=Grammar(self.grammar.kind, self.grammar.source) if self.grammar else None,
            ),
            tenant=caller.tenant,
            agent=caller.agent,
            turn=caller.turn,
            deadline_s=caller.deadline_s,
            tools=tuple(
                ToolSpec(t.name, t.description, json.dumps(t.parameters, ensure_ascii=False))
                for t in self.tools
            ),
            tool_choice=self.tool_choice,
            prefix=self.prefix,
            adapter=self.adapter,
        )


async def stream(
    request: Generate, caller: Caller, services: Services
) -> AsyncIterator[GenerationChunk]:
    """The chunks of a request; the last one has ``finish`` set. Raises what the engine raised."""
    async with aclosing(services.generate(request.model, request.job(caller))) as chunks:  # type: ignore[type-var]
        async for chunk in chunks:
            if chunk.error is not None:
                raise chunk.error
            if chunk.finish == "cancelled":
                raise EngineFailed(request.model, "the request was cancelled in the engine")
            yield chunk


async def adapter_labels(request: Generate, caller: Caller, services: Services) -> Labels:
    """What the request's adapter adds to the answer's labels.

    Raises:
        UnknownAdapter: it has one that is not there, or not for this tenant.
    """
    if not request.adapter:
        return NO_LABELS
    return await services.adapter(caller.tenant, request.model, request.adapter)


def collect(
    request: Generate,
    caller: Caller,
    chunks: list[GenerationChunk],
    digest: str,
    adapter: Labels = NO_LABELS,
) -> Generated:
    """Put the chunks of a finished request together; ``adapter``: the labels of its adapter."""
    last = chunks[-1]
    sources = [Provenance(kind="model", source=request.model, version=digest)]
    if request.adapter:
        sources.append(
            Provenance(kind="adapter", source=request.resource, version=last.adapter_digest)
        )
    return Generated(
        text="".join(c.text for c in chunks),
        finish="stop" if last.finish == "stop" else "length",
        prompt_tokens=last.prompt_tokens,
        new_tokens=last.new_tokens,
        queued_s=last.queued_s,
        run_s=last.run_s,
        tool_calls=tuple(
            ToolUse(name=c.name, arguments=json.loads(c.arguments), id=c.id)
            for c in last.tool_calls
        ),
        logprobs=tuple(
            Logprob(token=p.token, logprob=p.logprob, likeliest=p.likeliest)
            for chunk in chunks
            for p in chunk.logprobs
        ),
        provenance=tuple(sources),
        # What a model writes is never trusted: it may repeat instructions found in its input.
        labels=caller.labels.join(adapter).join(Labels(trusted=False)),
    )


@handles(Generate)
async def generate(request: Generate, caller: Caller, services: Services) -> Generated:
    """Run the request to its end.

    A device that is lost meanwhile has shown nobody what it wrote, so the request starts
    again where the model is loaded next; the deadline ends the trying.
    """
    adapter = await adapter_labels(request, caller, services)
    while True:
        try:
            chunks = [chunk async for chunk in stream(request, caller, services)]
        except ServiceUnavailable as gone:
            await services.sleep(min(gone.retry_after_s, 0.2))
        else:
            break
    digest = await services.model_digest(request.model)
    return collect(request, caller, chunks, digest, adapter)
