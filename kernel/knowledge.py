"""The knowledge process: corpora, graphs and rule sources of the system.

A corpus is read, cut into passages, embedded by a slot and indexed; index and passages
are kept in a cache by the digest of all that went in, so a second start reads them back.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from llmos.drivers.documents import reader
from llmos.drivers.errors import LlmosError
from llmos.drivers.graphs.load import load_graph
from llmos.drivers.protocols import Edge, Graph, Node, Passage, Skipped, VectorIndex, Vectors
from llmos.drivers.registry import driver
from llmos.drivers.retrieval import fitted
from llmos.drivers.retrieval.bm25 import best
from llmos.drivers.retrieval.filters import fits_all
from llmos.drivers.retrieval.fitted import Fitted
from llmos.drivers.retrieval.fusion import Leg
from llmos.drivers.retrieval.search import DEPTH, Searcher
from llmos.kernel import logs
from llmos.kernel.directory import Directory, DirectoryHolder
from llmos.kernel.metrics import Exported, export
from llmos.kernel.remote import ProcessGone, answers, call
from llmos.kernel.system import CorpusTable, GraphTable, RulesTable, SystemConfig
from llmos.syscalls.base import GraphQuestion, Hit, Search
from llmos.syscalls.errors import EmptyCorpus, InvalidRequest, UnknownResource
from llmos.syscalls.labels import Labels

log = logging.getLogger("llmos.knowledge")

EMBED_BATCH = 64
"""Texts per call while a corpus is being built: small, so that queries get in between."""


@dataclass(slots=True)
class _Corpus:
    table: CorpusTable
    passages: dict[str, Passage] = field(default_factory=dict)
    skipped: list[Skipped] = field(default_factory=list)
    index: VectorIndex | None = None
    order: list[Passage] = field(default_factory=list)
    """The passages by position, as the searcher names them."""
    places: dict[str, int] = field(default_factory=dict)
    """Position of each by id."""
    searcher: Searcher | None = None
    fitted: Fitted | None = None
    error: LlmosError | None = None
    read: asyncio.Event = field(default_factory=asyncio.Event)
    """The documents have been read, or cannot be."""
    done: asyncio.Event = field(default_factory=asyncio.Event)
    """The index is complete, or will never be."""
    embedded: int = 0
    """Passages embedded so far."""
    seconds: float = 0.0
    cached: bool = False


@dataclass(slots=True)
class _Graph:
    table: GraphTable
    graph: Graph | None = None
    error: LlmosError | None = None
    done: asyncio.Event = field(default_factory=asyncio.Event)


def _search(
    corpus: _Corpus, query: str, vector: Vectors | None, k: int, search: Search
) -> list[Hit]:
    """The passages that a search finds; ``vector`` is one row, if the mode needs it."""
    searcher, index = corpus.searcher, corpus.index
    assert searcher is not None
    assert index is not None
    depth = max(DEPTH, 4 * k)
    allowed = None
    if search.conditions:
        allowed = np.fromiter(
            (fits_all(search.conditions, p.meta) for p in corpus.order), bool, len(corpus.order)
        )
    legs: dict[str, Leg] = {}
    if search.mode != "vector":
        legs["lexical"] = searcher.lexical(query, depth, allowed)
    if search.mode != "lexical":
        assert vector is not None
        if allowed is None:
            place = corpus.places
            (near,) = index.search(vector, depth)
            positions = np.array([place[h.id] for h in near], dtype=np.intp)
            scores = np.array([h.score for h in near], dtype=np.float32)
        else:
            # All that may be found are compared, and not the nearest sifted: a condition that
            # few passages fit would leave nothing of those.
            positions = np.flatnonzero(allowed)
            scores = index.rows([corpus.order[p].id for p in positions.tolist()]) @ vector[0]
            chosen = best(scores, depth)
            positions, scores = positions[chosen], scores[chosen]
        legs["vector"] = Leg(positions, scores)
    found = searcher.search(
        query,
        None if vector is None else vector[0],
        legs,
        k,
        rerank=search.rerank,
        diversity=search.diversity,
    )
    return [Hit(corpus.order[f.position], f.score, f) for f in found]


class KnowledgeServer:
    """Owns the indexes. Runs as a Ray actor."""

    def __init__(
        self, name: str, system: SystemConfig, cache: str, log_dir: str, log_level: str
    ) -> None:
        logs.configure(Path(log_dir), name, log_level)
        self._name = name
        self._system = system
        self._cache = Path(cache)
        self._directory = DirectoryHolder()
        self._corpora = {n: _Corpus(t) for n, t in system.corpora.items()}
        self._graphs = {n: _Graph(t) for n, t in system.graphs.items()}
        self._tasks: list[asyncio.Task[None]] = []
        self._ended = asyncio.Event()

    async def ready(self) -> bool:
        """Start building."""
        if not self._tasks:
            self._tasks = [asyncio.create_task(self._build_all())]
        return True

    async def lifeline(self) -> None:
        """Returns when the process is closed; fails when it is lost, which is how that is seen."""
        await self._ended.wait()

    async def ping(self) -> bool:
        """Answer."""
        return True

    async def directory(self, directory: Directory) -> None:
        """Take the newest directory."""
        await self._directory.set(directory)

    # -- building

    async def _build_all(self) -> None:
        for name, graph in self._graphs.items():
            try:
                graph.graph = await asyncio.to_thread(self._load_graph, name, graph.table)
            except LlmosError as error:
                graph.error = error
                log.error("graph %s: %s", name, error)
            graph.done.set()
        # All are read before the first is embedded, which may take long: what cannot be
        # read is then known at once.
        for name, corpus in self._corpora.items():
            try:
                await self._read_corpus(name, corpus)
            except LlmosError as error:
                self._give_up(name, corpus, error)
            corpus.read.set()
        for name, corpus in self._corpora.items():
            if corpus.error is None and corpus.passages:
                try:
                    await self._build_corpus(name, corpus)
                except LlmosError as error:
                    self._give_up(name, corpus, error)
            corpus.done.set()

    @staticmethod
    def _give_up(name: str, corpus: _Corpus, error: LlmosError) -> None:
        corpus.error = error
        log.error("corpus %s: %s", name, error)

    def _load_graph(self, name: str, table: GraphTable) -> Graph:
        graph: Graph = driver("graph", table.driver)(name)
        nodes, edges = load_graph(self._system.at(table.path))
        graph.upsert(nodes, edges)
        log.info("graph %s: %d nodes, %d edges", name, *graph.size())
        return graph

    async def _read_corpus(self, name: str, corpus: _Corpus) -> None:
        table = corpus.table
        path = self._system.at(table.path)
        passages, corpus.skipped = await asyncio.to_thread(
            reader.read_folder, path, max_chars=table.max_chars
        )
        for skipped in corpus.skipped:
            log.warning("corpus %s: %s is left out: %s", name, skipped.path, skipped.reason)
        corpus.passages = {p.id: p for p in passages}
        if table.fusion is not None:
            corpus.fitted = await asyncio.to_thread(fitted.load, self._system.at(table.fusion))
        if not passages:
            log.warning("corpus %s is empty", name)

    async def _build_corpus(self, name: str, corpus: _Corpus) -> None:
        loop = asyncio.get_running_loop()
        started = loop.time()
        table = corpus.table
        passages = list(corpus.passages.values())
        _, route = await self._directory.slot(table.embedder, "encoder")
        digest = hashlib.sha256(
            json.dumps(
                [route.digest, table.driver, sorted((p.id, p.version, *p.span) for p in passages)]
            ).encode()
        ).hexdigest()
        folder = self._cache / table.driver / digest[:24]
        probe = await self._embed(table.embedder, [passages[0].text])
        index: VectorIndex = driver("vector", table.driver)(int(probe.shape[1]))
        try:
            await asyncio.to_thread(index.load, folder, digest)
            corpus.cached = True
        except (FileNotFoundError, LlmosError):
            for at in range(0, len(passages), EMBED_BATCH):
                part = passages[at : at + EMBED_BATCH]
                vectors = await self._embed(
                    table.embedder, [f"{p.title}\n{p.text}" if p.title else p.text for p in part]
                )
                await asyncio.to_thread(index.upsert, [p.id for p in part], vectors)
                corpus.embedded = at + len(part)
            await asyncio.to_thread(index.save, folder, digest)
        corpus.order = passages
        corpus.places = {p.id: n for n, p in enumerate(passages)}
        corpus.searcher = await asyncio.to_thread(
            Searcher,
            [p.text for p in passages],
            [p.title for p in passages],
            lambda positions: index.rows([passages[p].id for p in positions]),
            corpus.fitted,
        )
        corpus.index = index
        corpus.embedded = len(passages)
        corpus.seconds = loop.time() - started
        log.info(
            "corpus %s: %d passages in %.2f s%s",
            name,
            len(passages),
            corpus.seconds,
            " (from the cache)" if corpus.cached else "",
        )

    async def _embed(self, model: str, texts: Sequence[str]) -> Vectors:
        """Embed on whichever device has the model; waits while that is being restarted."""
        while True:
            version = self._directory.current.version
            device, _ = await self._directory.slot(model, "encoder")
            try:
                vectors: Vectors = await call(device.embed.remote(model, list(texts)), "embed")
            except ProcessGone:
                await self._directory.newer(version)
            else:
                return vectors

    # -- questions

    def _visible(self, kind: str, name: str, tenant: str) -> Any:
        by_kind: dict[str, dict[str, Any]] = {
            "corpus": dict(self._system.corpora),
            "graph": dict(self._system.graphs),
            "rules": dict(self._system.rules),
        }
        tables = by_kind.get(kind, {})
        table = tables.get(name)
        # Another tenant's resource is not there: its name is no more told than its content.
        if table is None or table.tenant not in (None, tenant):
            known = [n for n, t in tables.items() if t.tenant in (None, tenant)]
            raise UnknownResource(kind, name, known)
        return table

    @answers
    async def check(self, tenant: str, stores: Sequence[str]) -> None:
        """Whether ``kind:name`` exist for this tenant and could be read.

        Raises:
            UnknownResource: there is none.
            DocumentError, GraphError: it could not be read.
        """
        for store in stores:
            kind, _, name = store.partition(":")
            self._visible(kind, name, tenant)
            holder: _Corpus | _Graph | None = None
            if kind == "corpus":
                holder = self._corpora[name]
            elif kind == "graph":
                holder = self._graphs[name]
            if holder is not None:
                # Not until it is embedded: a large corpus takes minutes, and retrieve waits.
                await (holder.read if isinstance(holder, _Corpus) else holder.done).wait()
                if holder.error is not None:
                    raise holder.error

    @answers
    async def retrieve(
        self, tenant: str, corpus: str, query: str, k: int, search: Search | None = None
    ) -> tuple[list[Hit], Labels]:
        """The k best passages, best first; nearest by vector where nothing else is asked for.

        Raises:
            UnknownResource, EmptyCorpus; DocumentError if the corpus could not be read.
            InvalidRequest: a reranker is asked for, and none has been fitted.
        """
        table: CorpusTable = self._visible("corpus", corpus, tenant)
        holder = self._corpora[corpus]
        await holder.done.wait()
        if holder.error is not None:
            raise holder.error
        if holder.index is None:
            skipped = [f"{s.path}: {s.reason}" for s in holder.skipped]
            raise EmptyCorpus(corpus, str(self._system.at(table.path)), skipped)
        if search is None:
            vector = await self._embed(table.embedder, [query])
            (hits,) = await asyncio.to_thread(holder.index.search, vector, k)
            return [Hit(holder.passages[h.id], h.score) for h in hits], table.labels
        if search.rerank and (holder.fitted is None or holder.fitted.reranker is None):
            raise InvalidRequest(
                "retrieve", "rerank", f"no reranker has been fitted for the corpus {corpus!r}"
            )
        # The words alone need no model: they are found while it is being restarted.
        asked: Vectors | None = None
        if search.mode != "lexical" or search.rerank:
            asked = await self._embed(table.embedder, [query])
        return await asyncio.to_thread(_search, holder, query, asked, k, search), table.labels

    async def _graph(self, tenant: str, name: str) -> tuple[Graph, Labels]:
        table: GraphTable = self._visible("graph", name, tenant)
        holder = self._graphs[name]
        await holder.done.wait()
        if holder.graph is None:
            assert holder.error is not None
            raise holder.error
        return holder.graph, table.labels

    @answers
    async def find_nodes(
        self, tenant: str, graph: str, text: str, limit: int
    ) -> tuple[list[Node], Labels]:
        """Nodes named in the text."""
        opened, labels = await self._graph(tenant, graph)
        return await asyncio.to_thread(opened.find, text, limit), labels

    @answers
    async def neighbours(
        self,
        tenant: str,
        graph: str,
        node: str,
        relation: str | None,
        direction: Literal["out", "in", "both"],
        limit: int,
    ) -> tuple[list[tuple[Edge, Node]], Labels]:
        """Edges at a node."""
        opened, labels = await self._graph(tenant, graph)

        def read() -> list[tuple[Edge, Node]]:
            return opened.neighbours(node, relation=relation, direction=direction, limit=limit)

        return await asyncio.to_thread(read), labels

    @answers
    async def paths(
        self, tenant: str, graph: str, start: str, end: str, max_hops: int, limit: int
    ) -> tuple[list[list[Edge]], Labels]:
        """Paths between two nodes."""
        opened, labels = await self._graph(tenant, graph)

        def read() -> list[list[Edge]]:
            return opened.paths(start, end, max_hops=max_hops, limit=limit)

        return await asyncio.to_thread(read), labels

    @answers
    async def ask_graph(
        self, tenant: str, graph: str, question: GraphQuestion, arguments: dict[str, Any]
    ) -> tuple[Any, Labels]:
        """The answer of the graph's method of that name."""
        opened, labels = await self._graph(tenant, graph)
        # Named one by one: what may be asked is decided here, not by the caller's text.
        methods: dict[str, Callable[..., Any]] = {
            "link": opened.link,
            "subgraph": opened.subgraph,
            "match": opened.match,
            "pagerank": opened.pagerank,
        }
        return await asyncio.to_thread(methods[question], **arguments), labels

    @answers
    async def rules_source(self, tenant: str, name: str) -> tuple[str, str, str, Labels]:
        """Driver, file name, source and labels of a rule base."""
        table: RulesTable = self._visible("rules", name, tenant)
        path = self._system.at(table.path)
        try:
            source = await asyncio.to_thread(path.read_text, "utf-8")
        except (OSError, UnicodeDecodeError) as error:
            from llmos.drivers.errors import DocumentError

            raise DocumentError(
                str(path), f"rules cannot be read: {error}", remedy=f"See [rules.{name}]"
            ) from None
        return table.driver, path.name, source, table.labels

    async def status(self) -> dict[str, Any]:
        """What is there and how big."""
        return {
            "corpora": {
                name: {
                    "ready": c.done.is_set(),
                    "passages": len(c.passages),
                    "embedded": c.embedded,
                    "skipped": [asdict(s) for s in c.skipped],
                    "seconds": round(c.seconds, 3),
                    "cached": c.cached,
                    "error": str(c.error) if c.error else None,
                }
                for name, c in self._corpora.items()
            },
            "graphs": {
                name: {
                    "ready": g.done.is_set(),
                    "nodes": g.graph.size()[0] if g.graph else 0,
                    "edges": g.graph.size()[1] if g.graph else 0,
                    "error": str(g.error) if g.error else None,
                }
                for name, g in self._graphs.items()
            },
        }

    async def metrics(self) -> Exported:
        """This process's metrics."""
        return export(self._name)

    async def close(self) -> None:
        """Stop building."""
        for task in self._tasks:
            task.cancel()
        self._ended.set()
