"""What all syscalls share: Request, Response, and the table of families.

A family is a module with Request classes, their Response classes and one handler per
request. A handler takes the request and the :class:`Services` that the kernel gives
it; capability check, deadline, provenance join and record are the dispatcher's
business (:mod:`llmos.kernel.dispatch`), the same for all.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Literal, Protocol, TypeAlias, TypeVar

from pydantic import BaseModel, ConfigDict

from llmos.syscalls.labels import NO_LABELS, Labels, Provenance

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from llmos.drivers.protocols import (
        Edge,
        GenerationChunk,
        GenerationJob,
        Node,
        Passage,
        RuleBase,
        Tool,
        Vectors,
    )
    from llmos.drivers.retrieval.filters import Condition, Mode
    from llmos.drivers.retrieval.search import Found
    from llmos.syscalls.deferred import Deferred
    from llmos.syscalls.messages import Envelope, Reply

ResponseT = TypeVar("ResponseT", bound="Response")


class Request(BaseModel, Generic[ResponseT]):
    """A request to the kernel. Immutable."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        arbitrary_types_allowed=True,
        ser_json_bytes="base64",
        val_json_bytes="base64",
        ser_json_inf_nan="constants",
    )

    syscall: ClassVar[str]
    """Its name in capabilities, records and metrics."""

    reach: ClassVar[Literal["read", "visible", "deferred", "outside"]] = "read"
    """What it touches, which decides what must be durable before.

    ``read``: nothing. ``visible``: another agent sees it at once, so all that the turn has
    read must be durable first. ``deferred``: it happens when the turn commits. ``outside``:
    a target that the kernel cannot roll back; an intent must be durable first.
    """

    immediate: ClassVar[bool] = False
    """Whether its handler never waits, so that it needs no deadline."""

    @property
    def resource(self) -> str:
        """What the capability is checked against; empty where the syscall has no resource."""
        return ""


class Response(BaseModel):
    """A result. Immutable, with where it came from and the labels it carries."""

    model_config = ConfigDict(
        frozen=True,
        arbitrary_types_allowed=True,
        ser_json_bytes="base64",
        val_json_bytes="base64",
        ser_json_inf_nan="constants",
    )

    provenance: tuple[Provenance, ...] = ()
    labels: Labels = NO_LABELS


@dataclass(slots=True)
class Caller:
    """Who makes the syscall. Made for each, and not frozen, which takes three times as long."""

    agent: str
    """``tenant/program/key``."""
    tenant: str
    turn: str
    chain: tuple[str, ...] = ()
    """Agents that wait for this turn, outermost first."""
    labels: Labels = NO_LABELS
    """What the turn has seen so far."""
    seq: int = 0
    """Number of this syscall in its turn: with the turn it names the syscall for ever."""
    idem_key: str = ""
    """Of a call outside: the same for every attempt at it, also when its message is handled
    again in another turn."""
    again: bool = False
    """Whether an earlier run of this turn was cut off, and may have made this syscall."""
    deadline_s: float | None = None
    """``time.monotonic`` of this machine by which it is wanted; None: not said."""


@dataclass(frozen=True, slots=True)
class Search:
    """How a corpus is searched, where it is not by vectors alone."""

    mode: Mode = "vector"
    conditions: tuple[Condition, ...] = ()
    """All must hold."""
    rerank: bool = False
    diversity: float = 0.0
    """0: by score alone, 1: by unlikeness alone."""


@dataclass(frozen=True, slots=True)
class Hit:
    """A passage that was found."""

    passage: Passage
    score: float
    """Cosine similarity of query and passage, -1 to 1; with a :class:`Search` what its mode
    orders by."""
    found: Found | None = None
    """How it came here; with a :class:`Search` alone."""


GraphQuestion: TypeAlias = Literal["link", "subgraph", "match", "pagerank"]
"""Methods of :class:`~llmos.drivers.protocols.Graph`."""


class Services(Protocol):
    """What the kernel offers to handlers. Each call may raise a typed error."""

    def generate(self, model: str, job: GenerationJob) -> AsyncIterator[GenerationChunk]:
        """Run a job; closing the iterator cancels it."""
        ...

    async def embed(self, model: str, texts: Sequence[str]) -> Vectors:
        """Embed texts with an encoder."""
        ...

    async def classify(self, model: str, texts: Sequence[str]) -> tuple[tuple[str, ...], Vectors]:
        """The labels of an encoder's head, and their probabilities for each text.

        Raises:
            NoHead: the model has none.
        """
        ...

    async def adapter(self, tenant: str, model: str, name: str) -> Labels:
        """What answers by an adapter of a model carry.

        Raises:
            UnknownAdapter: there is none, or not for this tenant.
        """
        ...

    async def model_digest(self, model: str) -> str:
        """Digest of a model's files."""
        ...

    async def retrieve(
        self, tenant: str, corpus: str, query: str, k: int, search: Search | None = None
    ) -> tuple[list[Hit], Labels]:
        """The k passages nearest to the query, best first, and the corpus's labels."""
        ...

    async def neighbours(
        self, tenant: str, graph: str, node: str, relation: str | None, direction: str, limit: int
    ) -> tuple[list[tuple[Edge, Node]], Labels]:
        """Edges at a node."""
        ...

    async def find_nodes(
        self, tenant: str, graph: str, text: str, limit: int
    ) -> tuple[list[Node], Labels]:
        """Nodes named in a text."""
        ...

    async def paths(
        self, tenant: str, graph: str, start: str, end: str, max_hops: int, limit: int
    ) -> tuple[list[list[Edge]], Labels]:
        """Paths between two nodes."""
        ...

    async def ask_graph(
        self, tenant: str, graph: str, question: GraphQuestion, arguments: Mapping[str, Any]
    ) -> tuple[Any, Labels]:
        """The answer of the graph's method of that name."""
        ...

    async def rule_base(self, tenant: str, name: str) -> tuple[RuleBase, Labels]:
        """A rule base."""
        ...

    async def ask(self, envelope: Envelope) -> Reply:
        """Deliver a message and wait for the reply."""
        ...

    def defer(self, action: Deferred) -> None:
        """Do something when the turn commits."""
        ...

    def show(self, turn: str, seq: int, text: str) -> None:
        """Show a piece of text to whoever waits for the turn; the same ``seq`` again is left
        out."""
        ...

    async def subscribers(self, topic: str) -> list[str]:
        """Agents that want a topic (``tenant/name``)."""
        ...

    async def tool(self, tenant: str, name: str) -> tuple[Tool, Labels]:
        """A tool of the system, and what its answers carry.

        Raises:
            UnknownResource: there is none, or not for this tenant.
        """
        ...

    async def state_of(self, agent: str) -> dict[str, Any]:
        """Last committed state of an agent."""
        ...

    def time(self) -> float:
        """Wall-clock time in seconds since the epoch."""
        ...

    async def sleep(self, seconds: float) -> None:
        """Wait."""
        ...

    def next_due(self, cron: str, tz: str) -> float:
        """When a cron expression is due next, in seconds since 1970.

        Raises:
            InvalidRequest: the expression or the time zone cannot be read.
        """
        ...

    def random(self) -> float:
        """A number in [0, 1)."""
        ...


Handler = Callable[[Any, Caller, Services], Awaitable[Response]]

HANDLERS: dict[type[Request[Any]], Handler] = {}
"""Request class → its handler; filled by the family modules."""


def handles(request: type[Request[ResponseT]]) -> Callable[[Handler], Handler]:
    """Register the handler of a request class."""

    def register(handler: Handler) -> Handler:
        HANDLERS[request] = handler
        return handler

    return register
