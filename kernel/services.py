"""What syscalls reach from a host: devices, knowledge, other agents.

Implements :class:`llmos.syscalls.base.Services`. Calls that only read are tried again
on the process that replaces a lost one; the dispatcher's deadline ends the trying.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import logging
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

from llmos.drivers.errors import EngineFailed, LlmosError
from llmos.drivers.protocols import (
    Edge,
    GenerationChunk,
    GenerationJob,
    Node,
    RuleBase,
    Tool,
    Vectors,
)
from llmos.drivers.registry import driver
from llmos.drivers.stores.rows import AgentRow, LaunchRow
from llmos.kernel.clock import Clock, next_due
from llmos.kernel.directory import DirectoryHolder
from llmos.kernel.remote import Handle, ProcessGone, call
from llmos.kernel.router import Router
from llmos.kernel.rulebases import RuleBases, Source
from llmos.kernel.shown import Shown
from llmos.kernel.system import ToolTable
from llmos.syscalls.base import GraphQuestion, Hit, Search
from llmos.syscalls.deferred import Deferred
from llmos.syscalls.errors import (
    DeadlineExceeded,
    ServiceUnavailable,
    UnknownAgent,
    UnknownResource,
)
from llmos.syscalls.labels import Labels
from llmos.syscalls.messages import Envelope, Reply

log = logging.getLogger("llmos.services")

READ_S = 30.0
"""Longest wait for the store to be read: a journal that was lost is back much sooner."""
POLL_S = 10.0
"""Longest wait of one long poll."""


class DeviceLink:
    """The jobs of this host on one device: batched submits, one long poll for all."""

    def __init__(self, client: str, name: str, handle: Handle) -> None:
        self.handle = handle
        self._client = client
        self._name = name
        self._jobs: dict[str, asyncio.Queue[GenerationChunk]] = {}
        self._pending: list[tuple[str, GenerationJob]] = []
        self._flushing: asyncio.Task[None] | None = None
        self._polling: asyncio.Task[None] | None = None

    async def run(self, slot: str, job: GenerationJob) -> AsyncIterator[GenerationChunk]:
        """Chunks of a job; closing the iterator early cancels it."""
        # Bounded by the tokens the job may generate: a chunk carries at least one.
        queue: asyncio.Queue[GenerationChunk] = asyncio.Queue()
        self._jobs[job.id] = queue
        self._pending.append((slot, job))
        if self._flushing is None or self._flushing.done():
            self._flushing = asyncio.create_task(self._flush())
        finished = False
        try:
            while not finished:
                chunk = await queue.get()
                finished = chunk.finish is not None
                yield chunk
        finally:
            self._jobs.pop(job.id, None)
            if not finished:
                if (slot, job) in self._pending:
                    self._pending.remove((slot, job))
                else:
                    self.handle.cancel.remote(self._client, [job.id])

    async def _flush(self) -> None:
        """Hand in whatever has gathered, until nothing has."""
        while self._pending:
            batch, self._pending = self._pending, []
            try:
                results = await call(self.handle.submit.remote(self._client, batch), self._name)
            except LlmosError as error:
                self._lost(error)
                return
            for (_, job), refused in zip(batch, results, strict=True):
                if refused is not None:
                    self._put(GenerationChunk(job.id, finish="error", error=refused))
            if self._jobs and (self._polling is None or self._polling.done()):
                self._polling = asyncio.create_task(self._poll())

    async def _poll(self) -> None:
        while self._jobs:
            try:
                chunks = await call(self.handle.poll.remote(self._client, POLL_S), self._name)
            except LlmosError as error:
                self._lost(error)
                return
            for chunk in chunks:
                self._put(chunk)

    def _put(self, chunk: GenerationChunk) -> None:
        queue = self._jobs.get(chunk.job_id)
        if queue is not None:
            queue.put_nowait(chunk)

    def _lost(self, error: LlmosError) -> None:
        """Every waiter hears that the device is gone."""
        self._pending.clear()
        for job_id in list(self._jobs):
            gone = ServiceUnavailable(self._name, str(error))
            self._put(GenerationChunk(job_id, finish="error", error=gone))


class RemoteServices:
    """The services of one host."""

    def __init__(
        self,
        client: str,
        directory: DirectoryHolder,
        clock: Clock,
        router: Router,
        tools: Mapping[str, ToolTable] | None = None,
    ) -> None:
        self._client = client
        self._directory = directory
        self._clock = clock
        self._router = router
        self._tables = tools or {}
        self._links: dict[str, tuple[int, DeviceLink]] = {}
        """By device, with the incarnation of its process. One link each: two polls of one
        client would share its chunks between them."""
        self._rules = RuleBases(self._rules_source)
        self._tools: dict[str, Tool] = {}
        self.shown = Shown()
        self._outbox: list[Deferred] | None = None

    def for_turn(self, outbox: list[Deferred]) -> RemoteServices:
        """The same services with an outbox of their own."""
        turn = object.__new__(RemoteServices)
        turn.__dict__.update(self.__dict__)
        turn._outbox = outbox
        return turn

    # -- models

    async def generate(self, model: str, job: GenerationJob) -> AsyncIterator[GenerationChunk]:
        """Run a job on whichever device has the model."""
        handle, route = await self._directory.slot(model, "causal")
        if job.adapter:
            adapter = await self._directory.adapter(job.tenant, model, job.adapter)
            job = dataclasses.replace(job, adapter=adapter.resident)
        if job.deadline_s is not None:
            # As seconds left: the clocks of two machines have nothing in common.
            left_s = max(0.0, job.deadline_s - self._clock.monotonic())
            job = dataclasses.replace(job, deadline_s=left_s)
        device = route.device or ""
        incarnation, link = self._links.get(device, (0, None))
        if link is None or incarnation != route.incarnation:
            link = DeviceLink(self._client, f"device {device}", handle)
            self._links[device] = (route.incarnation, link)
        chunks = link.run(model, job)
        try:
            async for chunk in chunks:
                yield chunk
        finally:
            await chunks.aclose()  # type: ignore[attr-defined]

    async def embed(self, model: str, texts: Sequence[str]) -> Vectors:
        """Embed on whichever device has the model."""
        vectors: Vectors = await self._encode("embed", model, texts)
        return vectors

    async def classify(self, model: str, texts: Sequence[str]) -> tuple[tuple[str, ...], Vectors]:
        """Classify on whichever device has the model."""
        found: tuple[tuple[str, ...], Vectors] = await self._encode("classify", model, texts)
        return found

    async def _encode(self, method: str, model: str, texts: Sequence[str]) -> Any:
        while True:
            version = self._directory.current.version
            handle, _ = await self._directory.slot(model, "encoder")
            try:
                return await call(getattr(handle, method).remote(model, list(texts)), method)
            except ProcessGone:
                await self._directory.newer(version)

    async def adapter(self, tenant: str, model: str, name: str) -> Labels:
        """What answers by an adapter carry."""
        return (await self._directory.adapter(tenant, model, name)).labels

    async def model_digest(self, model: str) -> str:
        """Digest of a model's files."""
        route = self._directory.current.slots.get(model)
        if route is None:
            raise EngineFailed(model, "it is not in the directory")
        return route.digest

    # -- knowledge

    async def _knowledge(self, method: str, *args: Any) -> Any:
        return await self._service("knowledge", method, *args)

    async def _service(self, name: str, method: str, *args: Any) -> Any:
        """Call a service; one that is lost is asked again when it is back."""
        while True:
            version = self._directory.current.version
            handle = await self._directory.service(name)
            try:
                return await call(getattr(handle, method).remote(*args), f"{name} ({method})")
            except ProcessGone:
                await self._directory.newer(version)

    async def retrieve(
        self, tenant: str, corpus: str, query: str, k: int, search: Search | None = None
    ) -> tuple[list[Hit], Labels]:
        """The k nearest passages."""
        args = (tenant, corpus, query, k) if search is None else (tenant, corpus, query, k, search)
        found: tuple[list[Hit], Labels] = await self._knowledge("retrieve", *args)
        return found

    async def find_nodes(
        self, tenant: str, graph: str, text: str, limit: int
    ) -> tuple[list[Node], Labels]:
        """Nodes named in a text."""
        found: tuple[list[Node], Labels] = await self._knowledge(
            "find_nodes", tenant, graph, text, limit
        )
        return found

    async def neighbours(
        self, tenant: str, graph: str, node: str, relation: str | None, direction: str, limit: int
    ) -> tuple[list[tuple[Edge, Node]], Labels]:
        """Edges at a node."""
        found: tuple[list[tuple[Edge, Node]], Labels] = await self._knowledge(
            "neighbours", tenant, graph, node, relation, direction, limit
        )
        return found

    async def paths(
        self, tenant: str, graph: str, start: str, end: str, max_hops: int, limit: int
    ) -> tuple[list[list[Edge]], Labels]:
        """Paths between two nodes."""
        found: tuple[list[list[Edge]], Labels] = await self._knowledge(
            "paths", tenant, graph, start, end, max_hops, limit
        )
        return found

    async def ask_graph(
        self, tenant: str, graph: str, question: GraphQuestion, arguments: Mapping[str, Any]
    ) -> tuple[Any, Labels]:
        """The answer of the graph's method of that name."""
        answer: tuple[Any, Labels] = await self._knowledge(
            "ask_graph", tenant, graph, question, dict(arguments)
        )
        return answer

    async def check_stores(self, tenant: str, stores: Sequence[str]) -> None:
        """Whether a program's stores are there; rule bases are read at once."""
        await self._knowledge("check", tenant, [s for s in stores if not s.startswith("tool:")])
        for store in stores:
            kind, _, name = store.partition(":")
            if kind == "rules":
                await self.rule_base(tenant, name)
            elif kind == "tool":
                await self.tool(tenant, name)

    async def rule_base(self, tenant: str, name: str) -> tuple[RuleBase, Labels]:
        """A rule base as its file is now: rules are evaluated where the turn runs."""
        return await self._rules.get(tenant, name)

    async def _rules_source(self, tenant: str, name: str) -> Source:
        source: Source = await self._knowledge("rules_source", tenant, name)
        return source

    # -- agents

    async def ask(self, envelope: Envelope) -> Reply:
        """Deliver a message and wait for the reply."""
        return await self._router.ask(envelope)

    def defer(self, action: Deferred) -> None:
        """Leave something to the commit of the turn."""
        assert self._outbox is not None, "defer outside a turn"
        self._outbox.append(action)

    def show(self, turn: str, seq: int, text: str) -> None:
        """Show a piece of text to whoever waits for the turn."""
        self.shown.put(turn, seq, text)

    async def subscribers(self, topic: str) -> list[str]:
        """Agents that want a topic."""
        found: list[str] = await self.read_store("subscribers", topic)
        return found

    async def state_of(self, agent: str) -> dict[str, Any]:
        """Last committed state of an agent."""
        ((launch, row),) = await self.stored([agent])
        if launch is None:
            raise UnknownAgent(agent)
        state: dict[str, Any] = json.loads(row.state) if row is not None and row.state else {}
        return state

    async def stored(self, agents: list[str]) -> list[tuple[LaunchRow | None, AgentRow | None]]:
        """Launch and row of each agent."""
        found: list[tuple[LaunchRow | None, AgentRow | None]] = await self._service(
            "journal", "activate", agents
        )
        return found

    async def read_store(self, method: str, *args: Any, **options: Any) -> Any:
        """Call a reading method of the store, in the journal's process.

        Raises:
            StoreUnavailable, and DeadlineExceeded if the journal does not come back.
        """
        try:
            async with asyncio.timeout(READ_S):
                while True:
                    version = self._directory.current.version
                    journal = await self._directory.service("journal")
                    try:
                        return await call(
                            journal.read.remote(method, *args, **options), f"journal ({method})"
                        )
                    except ProcessGone:
                        await self._directory.newer(version)
        except TimeoutError:
            raise DeadlineExceeded(f"reading the store ({method})", READ_S) from None

    # -- tools

    async def tool(self, tenant: str, name: str) -> tuple[Tool, Labels]:
        """A tool of the system, made once per host, and what its answers carry."""
        table = self._tables.get(name)
        if table is None or table.tenant not in (None, tenant):
            known = [n for n, t in self._tables.items() if t.tenant in (None, tenant)]
            raise UnknownResource("tool", name, known)
        made = self._tools.get(name)
        if made is None:
            # In a thread: it may import the user's code, or read certificates.
            make = driver("tool", table.driver)
            fresh: Tool = await asyncio.to_thread(make, name, table.options)
            made = self._tools.setdefault(name, fresh)
            if made is not fresh:
                await fresh.close()
        return made, table.labels

    async def close(self) -> None:
        """Release the tools' connections."""
        for tool in self._tools.values():
            await tool.close()

    # -- time and chance

    def time(self) -> float:
        """Wall-clock time."""
        return self._clock.time()

    async def sleep(self, seconds: float) -> None:
        """Wait."""
        await self._clock.sleep(seconds)

    def random(self) -> float:
        """A number in [0, 1)."""
        return self._clock.random()

    def next_due(self, expression: str, tz: str) -> float:
        """When a cron expression is due next."""
        return next_due(expression, tz, self._clock.time())
