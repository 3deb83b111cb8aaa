"""A system in one process: real drivers, the kernel's real dispatcher, no Ray.

Agent programs run here as in the kernel, syscall by syscall, with their capabilities
checked; only placement, durability and scheduling are missing. What a turn leaves to its
end happens when it has ended well; timers are kept, not fired. Useful for tests, and for
trying a program by hand::

    python -m tests.agents.local examples/clinic-and-bank/system.toml
"""

from __future__ import annotations

import asyncio
import copy
import itertools
import os
import tomllib
import uuid
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from llmos.drivers.documents.reader import read_folder
from llmos.drivers.errors import UnknownAdapter
from llmos.drivers.graphs.load import load_graph
from llmos.drivers.protocols import (
    EngineOptions,
    GenerationChunk,
    GenerationJob,
    Passage,
    Vectors,
)
from llmos.drivers.registry import driver
from llmos.drivers.stores.rows import JournalRow
from llmos.kernel.clock import SystemClock, next_due
from llmos.kernel.context import Context
from llmos.kernel.dispatch import TurnDispatcher
from llmos.kernel.manifest import Manifest
from llmos.kernel.program import HandlerSpec, load_program, make_config
from llmos.kernel.system import SystemConfig
from llmos.syscalls.base import Hit, Search
from llmos.syscalls.deferred import Deferred, NoTimer, Post, Subscription, Timer, Watch
from llmos.syscalls.errors import UnhandledMessage, UnknownAgent, UnknownResource
from llmos.syscalls.labels import Labels
from llmos.syscalls.messages import Envelope, Message, Reply, Wire
from tests.kernel.local import RowLog

Writer = Callable[[str], str]
"""A causal model for unit tests: the prompt's text → the answer."""


@dataclass
class _Corpus:
    passages: dict[str, Passage]
    index: Any
    embedder: str
    labels: Labels


@dataclass
class _Agent:
    program: Any
    config: BaseModel
    state: BaseModel
    manifest: Manifest
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)


@dataclass
class Turn:
    """What a turn did, for assertions."""

    agent: str
    log: RowLog = field(default_factory=RowLog)

    @property
    def calls(self) -> list[JournalRow]:
        """How its syscalls ended, in that order."""
        return [row for row in self.log.rows if row.phase in ("result", "failed", "unknown")]

    def names(self) -> list[str]:
        """Requests, in order: ``Retrieve bank-help``."""
        return [f"{row.kind} {row.name}".strip() for row in self.calls]


class Local:
    """Services and message delivery for the agents of one system file."""

    def __init__(
        self,
        system: SystemConfig,
        *,
        engines: Mapping[str, str] | None = None,
        writers: Mapping[str, Writer] | None = None,
        models_dir: Path | None = None,
        read: Callable[..., Any] = read_folder,
    ) -> None:
        """Load everything.

        Args:
            system: The system.
            engines: Model → engine driver, in place of the file's (``hash``, ``echo``).
            writers: Model → function in place of a causal model.
            models_dir: The model store.
            read: Reads documents.
        """
        self.system = system
        self.turns: list[Turn] = []
        self.prompts: list[str] = []
        self._clock = SystemClock()
        self._writers = dict(writers or {})
        self._engines: dict[str, Any] = {}
        for name, table in system.models.items():
            if name in self._writers:
                continue
            kind = (engines or {}).get(name, table.engine)
            options = EngineOptions(
                model=name,
                path=(models_dir or Path()) / table.source,
                threads=int(os.environ.get("LLMOS_TEST_THREADS", "1")),
                kv_tokens=8192,
                max_batch_tokens=table.max_batch_tokens,
            )
            self._engines[name] = driver("engine", kind)(options)
        self._corpora: dict[str, _Corpus] = {}
        for name, corpus in system.corpora.items():
            passages, _ = read(system.at(corpus.path), max_chars=corpus.max_chars)
            self.corpus(name, list(passages), corpus.embedder, corpus.labels)
        self._graphs: dict[str, tuple[Any, Labels]] = {}
        for name, graph in system.graphs.items():
            made = driver("graph", "memory")(name)
            made.upsert(*load_graph(system.at(graph.path)))
            self._graphs[name] = (made, graph.labels)
        self._rules = {
            name: (
                driver("rules", rules.driver)(name, system.at(rules.path).read_text("utf-8")),
                rules.labels,
            )
            for name, rules in system.rules.items()
        }
        self.timers: dict[tuple[str, str], Timer] = {}
        """By agent and name; a test delivers what they hold."""
        self.watched: set[tuple[str, str]] = set()
        """(watched, watcher)."""
        self.shown: list[str] = []
        """What agents have shown to whoever waits."""
        self._topics: dict[str, list[str]] = {}
        self._tools: dict[str, Any] = {}
        self._outbox: list[Deferred] | None = None
        self._numbers = itertools.count(1)
        self._agents: dict[str, _Agent] = {}
        for agent in system.agents:
            self.launch(agent.program, agent.tenant, agent.key, agent.config)
        self._posted: set[asyncio.Task[Any]] = set()

    def corpus(self, name: str, passages: list[Passage], embedder: str, labels: Labels) -> None:
        """Index passages under a name."""
        engine = self._engines[embedder]
        index = driver("vector", "memory")(engine.dimension)
        for at in range(0, len(passages), 64):
            part = passages[at : at + 64]
            texts = [f"{p.title}\n{p.text}" if p.title else p.text for p in part]
            index.upsert([p.id for p in part], engine.embed(texts))
        self._corpora[name] = _Corpus({p.id: p for p in passages}, index, embedder, labels)

    def launch(self, program: str, tenant: str, key: str, config: Mapping[str, Any]) -> str:
        """Launch an agent and return its id."""
        loaded = load_program(program)
        checked = make_config(program, loaded, config)
        kebab = "".join(
            f"-{c.lower()}" if c.isupper() and n else c.lower()
            for n, c in enumerate(loaded.__name__)
        )
        agent = f"{tenant}/{kebab}/{key}"
        manifest = loaded.manifest.resolve(checked)
        self._agents[agent] = _Agent(loaded, checked, loaded.State(), manifest)
        return agent

    async def tell(self, agent: str, message: Message, sender: str = "client:test") -> Any:
        """Deliver a message, wait, and return the reply's message."""
        envelope = Envelope(
            agent, sender, Wire.of(message), sender, next(self._numbers), asked=True
        )
        reply = await self.ask(envelope)
        return reply.message()

    async def settle(self) -> None:
        """Wait for all messages that turns have sent."""
        while self._posted:
            await asyncio.gather(*list(self._posted))

    def state(self, agent: str) -> Any:
        """The state of an agent."""
        return self._agents[agent].state

    def close(self) -> None:
        """Close the engines."""
        for engine in self._engines.values():
            engine.close()

    # -- Services

    async def generate(self, model: str, job: GenerationJob) -> AsyncIterator[GenerationChunk]:
        prompt = job.prompt
        text = prompt if isinstance(prompt, str) else "\n".join(t.content for t in prompt)
        self.prompts.append(text)
        if model in self._writers:
            yield GenerationChunk(job.id, text=self._writers[model](text), tokens=1, finish="stop")
            return
        engine = self._model(model)
        queue: asyncio.Queue[GenerationChunk] = asyncio.Queue()
        loop = asyncio.get_running_loop()
        engine.submit(job, lambda c: loop.call_soon_threadsafe(queue.put_nowait, c))
        try:
            while True:
                chunk = await queue.get()
                yield chunk
                if chunk.finish is not None:
                    break
        finally:
            engine.cancel(job.id)

    async def embed(self, model: str, texts: Sequence[str]) -> Vectors:
        vectors: Vectors = await asyncio.to_thread(self._model(model).embed, list(texts))
        return vectors

    async def classify(self, model: str, texts: Sequence[str]) -> tuple[tuple[str, ...], Vectors]:
        engine = self._model(model)
        rows: Vectors = await asyncio.to_thread(engine.classify, list(texts))
        return engine.labels, rows

    async def model_digest(self, model: str) -> str:
        return f"local-{model}"

    async def adapter(self, tenant: str, model: str, name: str) -> Labels:
        table = self.system.adapters.get(name)
        if table is None or table.model != model or table.tenant not in (None, tenant):
            raise UnknownAdapter(model, name, ())
        return table.labels

    async def retrieve(
        self, tenant: str, corpus: str, query: str, k: int, search: Search | None = None
    ) -> tuple[list[Hit], Labels]:
        assert search is None, "no program of ours searches otherwise yet"
        self._visible("corpus", self.system.corpora, corpus, tenant)
        held = self._corpora[corpus]
        hits = held.index.search(await self.embed(held.embedder, [query]), k)[0]
        return [Hit(held.passages[h.id], h.score) for h in hits], held.labels

    async def neighbours(
        self, tenant: str, graph: str, node: str, relation: str | None, direction: str, limit: int
    ) -> tuple[list[Any], Labels]:
        made, labels = self._graph(tenant, graph)
        return made.neighbours(node, relation=relation, direction=direction, limit=limit), labels

    async def find_nodes(
        self, tenant: str, graph: str, text: str, limit: int
    ) -> tuple[list[Any], Labels]:
        made, labels = self._graph(tenant, graph)
        return made.find(text, limit), labels

    async def paths(
        self, tenant: str, graph: str, start: str, end: str, max_hops: int, limit: int
    ) -> tuple[list[Any], Labels]:
        made, labels = self._graph(tenant, graph)
        return made.paths(start, end, max_hops=max_hops, limit=limit), labels

    async def rule_base(self, tenant: str, name: str) -> tuple[Any, Labels]:
        self._visible("rules", self.system.rules, name, tenant)
        return self._rules[name]

    async def ask(self, envelope: Envelope) -> Reply:
        held = self._agents.get(envelope.receiver)
        if held is None:
            raise UnknownAgent(envelope.receiver, self._agents)
        spec: HandlerSpec | None = held.program.handlers.get(envelope.wire.kind)
        if spec is None:
            raise UnhandledMessage(envelope.receiver, envelope.wire.kind, held.program.handlers)
        message = envelope.wire.decode(spec.message, envelope.receiver)
        if spec.read_only:
            return await self._turn(held, spec, message, envelope)
        async with held.lock:
            return await self._turn(held, spec, message, envelope)

    def defer(self, action: Deferred) -> None:
        assert self._outbox is not None, "defer outside a turn"
        self._outbox.append(action)

    def show(self, turn: str, seq: int, text: str) -> None:
        self.shown.append(text)

    async def subscribers(self, topic: str) -> list[str]:
        return list(self._topics.get(topic, ()))

    async def tool(self, tenant: str, name: str) -> tuple[Any, Labels]:
        self._visible("tool", self.system.tools, name, tenant)
        table = self.system.tools[name]
        if name not in self._tools:
            self._tools[name] = driver("tool", table.driver)(name, table.options)
        return self._tools[name], table.labels

    async def state_of(self, agent: str) -> dict[str, Any]:
        return self._agents[agent].state.model_dump(mode="json")

    def time(self) -> float:
        return self._clock.time()

    async def sleep(self, seconds: float) -> None:
        await self._clock.sleep(seconds)

    def random(self) -> float:
        return self._clock.random()

    def next_due(self, cron: str, tz: str) -> float:
        return next_due(cron, tz, self.time())

    # -- parts

    async def _turn(
        self, held: _Agent, spec: HandlerSpec, message: Message, envelope: Envelope
    ) -> Reply:
        turn = Turn(envelope.receiver)
        self.turns.append(turn)
        outbox: list[Deferred] = []
        services = copy.copy(self)
        services._outbox = outbox
        dispatcher = TurnDispatcher(
            agent=envelope.receiver,
            turn=uuid.uuid4().hex,
            chain=envelope.chain,
            manifest=held.manifest,
            services=services,
            clock=self._clock,
            deadline_s=min(envelope.deadline_s, held.manifest.limits.turn_deadline_s),
            labels=envelope.labels,
            log=turn.log,
        )
        before = held.state
        state = before.model_copy(deep=True)
        agent = held.program(state, held.config)
        result = await getattr(agent, spec.method)(message, Context(dispatcher))
        dispatcher.finish()
        if spec.read_only:
            assert state == before, f"read-only {spec.method} changed the state"
        else:
            held.state = state
        for action in outbox:
            self._settle_action(envelope.receiver, action)
        return Reply(
            turn=dispatcher.turn,
            agent=envelope.receiver,
            wire=Wire.of(result) if result is not None else None,
            labels=dispatcher.labels,
            provenance=tuple(dispatcher.provenance),
        )

    def _settle_action(self, agent: str, action: Deferred) -> None:
        """What a turn has left to its end."""
        match action:
            case Post():
                envelope = Envelope(
                    *(action.receiver, agent, action.wire, agent, next(self._numbers)),
                    labels=action.labels,
                    cause=action.cause,
                )
                task = asyncio.ensure_future(self.ask(envelope))
                self._posted.add(task)
                task.add_done_callback(self._posted.discard)
            case Timer():
                self.timers[agent, action.name] = action
            case NoTimer():
                self.timers.pop((agent, action.name), None)
            case Subscription():
                wanted = self._topics.setdefault(action.topic, [])
                if agent in wanted:
                    wanted.remove(agent)
                if action.on:
                    wanted.append(agent)
            case Watch():
                change = self.watched.add if action.on else self.watched.discard
                change((action.agent, agent))

    def _model(self, name: str) -> Any:
        if name not in self._engines:
            raise UnknownResource("model", name, self._engines)
        return self._engines[name]

    def _graph(self, tenant: str, name: str) -> tuple[Any, Labels]:
        self._visible("graph", self.system.graphs, name, tenant)
        return self._graphs[name]

    def _visible(self, kind: str, tables: Mapping[str, Any], name: str, tenant: str) -> None:
        table = tables.get(name)
        if table is None or table.tenant not in (None, tenant):
            raise UnknownResource(kind, name, tables)


def first_passage(prompt: str) -> str:
    """A writer that repeats the first sentence of the first passage: always supported."""
    start = prompt.index("[1]") + 3
    return prompt[start:].split(". ", 1)[0].strip().split("\n", 1)[0] + "."


def questions(system_file: Path) -> list[dict[str, Any]]:
    """The questions that stand beside a system file."""
    data = tomllib.loads((system_file.parent / "questions.toml").read_text("utf-8"))
    found: list[dict[str, Any]] = data["questions"]
    return found


async def _by_hand(system_file: Path) -> None:
    from llmos.agents.messages import Question
    from llmos.kernel.settings import Settings

    local = Local(SystemConfig.read(system_file), models_dir=Settings().models_dir)
    try:
        for asked in questions(system_file):
            began = local.time()
            question = Question(text=asked["text"], data=asked.get("data", {}))
            answer = await local.tell(asked["agent"], question)
            print(f"\n> {asked['agent']}: {asked['text']}")
            print(f"  [{answer.decision} / {answer.grounded} / {answer.confidence}] {answer.text}")
            for source in answer.sources:
                print(f"    [{source.number}] {source.provenance} {source.quote[:80]}")
            for rule in answer.rules:
                print(f"    rule {rule.rule}: {rule.comment}")
            print(f"  {answer.data} {local.time() - began:.1f} s")
    finally:
        local.close()


if __name__ == "__main__":
    import sys

    asyncio.run(_by_hand(Path(sys.argv[1])))
