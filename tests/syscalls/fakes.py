"""Services that answer from what a test put into them, and note what was asked."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import numpy as np

from llmos.drivers.engines.hashing import HashEncoder
from llmos.drivers.errors import UnknownAdapter
from llmos.drivers.graphs.memory import MemoryGraph
from llmos.drivers.protocols import (
    Edge,
    EngineOptions,
    GenerationChunk,
    GenerationJob,
    Node,
    RuleBase,
    Tool,
    Vectors,
)
from llmos.drivers.rules.memory import MemoryRuleBase
from llmos.syscalls.base import Caller, Hit, Search
from llmos.syscalls.deferred import Deferred
from llmos.syscalls.errors import InvalidRequest, UnknownResource
from llmos.syscalls.labels import Labels, Sensitivity
from llmos.syscalls.messages import Envelope, Reply

SECRET = Labels(tenants=frozenset({"acme"}), sensitivity=Sensitivity.CONFIDENTIAL)
CALLER = Caller(agent="acme/desk/main", tenant="acme", turn="turn-1", seq=3)

Script = list[GenerationChunk | Exception]
"""What a generation brings: chunks, and at most one error at the end."""


class FakeServices:
    """See :class:`llmos.syscalls.base.Services`."""

    def __init__(self) -> None:
        self.scripts: list[Callable[[GenerationJob], Script]] = []
        """One per generation; the last one is used again."""
        self.jobs: list[tuple[str, GenerationJob]] = []
        self.closed: list[str] = []
        """Jobs whose iterator was closed."""
        self.hits: list[Hit] = []
        self.labels = SECRET
        self.graph = MemoryGraph("things")
        self.rules: dict[str, RuleBase] = {}
        self.asked: list[Envelope] = []
        self.deferred: list[Deferred] = []
        self.topics: dict[str, list[str]] = {}
        self.tools: dict[tuple[str, str], Tool] = {}
        """(tenant, name) → tool."""
        self.adapters: dict[tuple[str, str], Labels] = {}
        """(tenant, name) → labels."""
        self.reply: Callable[[Envelope], Reply] | None = None
        self.states: dict[str, dict[str, Any]] = {}
        self.slept: list[float] = []
        self.chance = 0.25
        self.seen: list[tuple[Any, ...]] = []

    async def generate(self, model: str, job: GenerationJob) -> AsyncIterator[GenerationChunk]:
        self.jobs.append((model, job))
        script = self.scripts.pop(0) if len(self.scripts) > 1 else self.scripts[0]
        try:
            for item in script(job):
                if isinstance(item, Exception):
                    raise item
                yield item
        finally:
            self.closed.append(job.id)

    async def embed(self, model: str, texts: Sequence[str]) -> Vectors:
        from pathlib import Path

        return np.asarray(HashEncoder(EngineOptions(model, Path())).embed(texts))

    async def classify(self, model: str, texts: Sequence[str]) -> tuple[tuple[str, ...], Vectors]:
        yes = [0.9 if "refund" in t else 0.25 for t in texts]
        return ("other", "refund"), np.array([[1 - y, y] for y in yes], dtype=np.float32)

    async def model_digest(self, model: str) -> str:
        return f"digest-of-{model}"

    async def adapter(self, tenant: str, model: str, name: str) -> Labels:
        if (tenant, name) not in self.adapters:
            raise UnknownAdapter(model, name, ())
        return self.adapters[tenant, name]

    async def retrieve(
        self, tenant: str, corpus: str, query: str, k: int, search: Search | None = None
    ) -> tuple[list[Hit], Labels]:
        self.seen.append((tenant, corpus, query, k, *([search] if search else [])))
        return self.hits[:k], self.labels

    async def neighbours(
        self, tenant: str, graph: str, node: str, relation: str | None, direction: Any, limit: int
    ) -> tuple[list[tuple[Edge, Node]], Labels]:
        found = self.graph.neighbours(node, relation=relation, direction=direction, limit=limit)
        return found, self.labels

    async def find_nodes(
        self, tenant: str, graph: str, text: str, limit: int
    ) -> tuple[list[Node], Labels]:
        return self.graph.find(text, limit), self.labels

    async def ask_graph(
        self, tenant: str, graph: str, question: str, arguments: Any
    ) -> tuple[Any, Labels]:
        return getattr(self.graph, question)(**arguments), self.labels

    async def paths(
        self, tenant: str, graph: str, start: str, end: str, max_hops: int, limit: int
    ) -> tuple[list[list[Edge]], Labels]:
        return self.graph.paths(start, end, max_hops=max_hops, limit=limit), self.labels

    async def rule_base(self, tenant: str, name: str) -> tuple[RuleBase, Labels]:
        if name not in self.rules:
            raise UnknownResource("rules", name, self.rules)
        return self.rules[name], self.labels

    def add_rules(self, name: str, source: str) -> MemoryRuleBase:
        base = MemoryRuleBase(name, source)
        self.rules[name] = base
        return base

    async def ask(self, envelope: Envelope) -> Reply:
        self.asked.append(envelope)
        assert self.reply is not None
        return self.reply(envelope)

    def defer(self, action: Deferred) -> None:
        self.deferred.append(action)

    async def subscribers(self, topic: str) -> list[str]:
        return self.topics.get(topic, [])

    async def tool(self, tenant: str, name: str) -> tuple[Tool, Labels]:
        if (tenant, name) not in self.tools:
            raise UnknownResource("tool", name, [n for t, n in self.tools if t == tenant])
        return self.tools[tenant, name], Labels(trusted=False)

    async def state_of(self, agent: str) -> dict[str, Any]:
        return self.states[agent]

    def time(self) -> float:
        return 1_700_000_000.5

    async def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)

    def next_due(self, cron: str, tz: str) -> float:
        if cron == "* * * * *" and tz in ("UTC", "Europe/Berlin"):
            return self.time() // 60 * 60 + 60
        if cron == "0 0 29 2 *":
            return self.time() + 40 * 366 * 86_400
        raise InvalidRequest("timer", "cron", f"{cron!r} in {tz} cannot be read")

    def random(self) -> float:
        return self.chance


def words(*parts: str, finish: Any = "stop") -> Callable[[GenerationJob], Script]:
    """A generation of these pieces."""

    def script(job: GenerationJob) -> Script:
        pieces: Script = [GenerationChunk(job.id, part, 1) for part in parts]
        last = GenerationChunk(
            job.id, "", 0, finish, prompt_tokens=7, new_tokens=len(parts), queued_s=0.1, run_s=0.2
        )
        return [*pieces, last]

    return script


def failing(error: Exception, *before: str) -> Callable[[GenerationJob], Script]:
    """A generation that ends in an error chunk, as engines tell of it."""

    def script(job: GenerationJob) -> Script:
        pieces: Script = [GenerationChunk(job.id, part, 1) for part in before]
        return [*pieces, GenerationChunk(job.id, finish="error", error=error)]

    return script
