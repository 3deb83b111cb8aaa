"""The knowledge process: by words, by vectors, by both; conditions, diversity, reranking."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmos.drivers.errors import FusionFileError
from llmos.drivers.protocols import EngineOptions
from llmos.drivers.retrieval.bm25 import Bm25Options
from llmos.drivers.retrieval.filters import Condition
from llmos.drivers.retrieval.fitted import Fitted
from llmos.drivers.retrieval.fusion import Fusion
from llmos.drivers.retrieval.rerank import FEATURES, Reranker
from llmos.kernel.device import DeviceServer
from llmos.kernel.directory import Directory, SlotRoute
from llmos.kernel.knowledge import KnowledgeServer
from llmos.kernel.remote import call
from llmos.kernel.system import SystemConfig
from llmos.syscalls.base import Hit, Search
from llmos.syscalls.errors import InvalidRequest, UnknownResource
from tests.kernel.machine import LocalHandle

ROWS = """title,text,price,day
Refunds,A refund of the whole fare is paid within five days.,10,2024-01-05
Refunds again,A refund of the whole fare is paid within five days.,11,2024-02-05
Lost cards,Report a lost card at once and it is blocked.,5,2024-03-01
Pets,Small dogs travel free in a closed basket.,0,2023-12-31
Bicycles,Bicycles need a ticket of their own in every train.,9,2024-01-01
"""
SYSTEM = """
[models.embed]
source = "hash"
engine = "hash"

[corpora.plain]
path = "rows.csv"
embedder = "embed"
driver = "memory"

[corpora.fitted]
path = "rows.csv"
embedder = "embed"
driver = "memory"
fusion = "fusion.json"

[corpora.wrong]
path = "rows.csv"
embedder = "embed"
driver = "memory"
fusion = "none.json"

[corpora.theirs]
path = "rows.csv"
embedder = "embed"
driver = "memory"
tenant = "globex"
"""
ONLY_MISSING = Reranker(
    mean=(0.0,) * len(FEATURES),
    scale=(1.0,) * len(FEATURES),
    weights=tuple(1.0 if name == "missing" else 0.0 for name in FEATURES),
)
"""Puts first what lacks the query's words: an order that no leg would give."""


@pytest.fixture
async def ask(tmp_path: Path) -> AsyncIterator[Any]:
    (tmp_path / "rows.csv").write_text(ROWS)
    Fitted(
        Bm25Options(title=0),
        Fusion("linear", weights={"lexical": 1.0, "vector": 0.0}),
        ONLY_MISSING,
    ).save(tmp_path / "fusion.json")
    logs = (str(tmp_path / "logs"), "INFO")
    system = SystemConfig.parse(SYSTEM, "system.toml", tmp_path)
    device = DeviceServer("device:cpu:0", "memory", 0, 1 << 30, 1, *logs)
    await device.load("hash", "encoder", EngineOptions("embed", Path()))
    knowledge = KnowledgeServer("knowledge", system, str(tmp_path / "cache"), *logs)
    route = SlotRoute("encoder", "cpu:0", "d-embed", incarnation=1)
    await knowledge.directory(
        Directory(1, devices={"device:cpu:0": LocalHandle(device)}, slots={"embed": route})
    )
    await knowledge.ready()
    handle = LocalHandle(knowledge)

    async def found(query: str, corpus: str = "plain", k: int = 3, **how: Any) -> list[Hit]:
        args = ("acme", corpus, query, k, *([Search(**how)] if how else []))
        hits, _ = await call(handle.retrieve.remote(*args), "retrieve")
        assert isinstance(hits, list)
        return hits

    yield found
    await knowledge.close()
    await device.close()


def titles(hits: list[Hit]) -> list[str]:
    return [hit.passage.title for hit in hits]


async def test_by_words(ask: Any) -> None:
    hits = await ask("which dog may travel", mode="lexical")
    assert titles(hits) == ["Pets"]
    (share,) = hits[0].found.shares
    assert (share.leg, share.rank, share.score) == ("lexical", 1, hits[0].score)


async def test_by_vectors_as_without_a_search(ask: Any) -> None:
    query = "a lost card"
    before, now = await ask(query), await ask(query, mode="vector")
    assert titles(before) == titles(now)
    np.testing.assert_allclose([h.score for h in before], [h.score for h in now], rtol=1e-6)
    assert before[0].found is None
    assert now[0].found.shares[0].leg == "vector"


async def test_by_both(ask: Any) -> None:
    hits = await ask("lost card", mode="hybrid")
    assert titles(hits)[0] == "Lost cards"
    shares = {s.leg: s for s in hits[0].found.shares}
    assert (shares["lexical"].rank, shares["vector"].rank) == (1, 1)
    # Nothing is known of this corpus, so ranks are fused.
    assert hits[0].score == pytest.approx(2 / 11)
    assert sum(s.scaled * s.weight for s in shares.values()) == pytest.approx(hits[0].found.fused)


@pytest.mark.parametrize("mode", ["vector", "lexical", "hybrid"])
async def test_only_what_fits_the_conditions(ask: Any, mode: str) -> None:
    dear = (Condition("price", "ge", ("9",)), Condition("day", "lt", ("2024-02-01",)))
    hits = await ask("a refund of the ticket", mode=mode, k=10, conditions=dear)
    assert set(titles(hits)) == {"Refunds", "Bicycles"}
    assert await ask("refund", mode=mode, conditions=(Condition("nothing", "eq", ("1",)),)) == []


async def test_what_says_the_same_gives_way(ask: Any) -> None:
    query = "refund of the fare within days"
    assert titles(await ask(query, mode="vector", k=2)) == ["Refunds", "Refunds again"]
    hits = await ask(query, mode="vector", k=2, diversity=0.7)
    assert titles(hits)[0] == "Refunds"
    assert titles(hits)[1] != "Refunds again"


async def test_what_was_fitted_is_used(ask: Any) -> None:
    hits = await ask("refund card", "fitted", k=5, mode="hybrid")
    # Its vectors weigh nothing, and titles are not read.
    assert titles(hits)[0] == "Lost cards"
    assert {s.leg: s.weight for s in hits[0].found.shares} == {"lexical": 1.0, "vector": 0.0}
    again = await ask("refund card", "fitted", k=5, mode="hybrid", rerank=True)
    assert [h.score for h in again] == sorted((h.score for h in again), reverse=True)
    facts = [dict(h.found.facts) for h in again]
    assert [f["missing"] for f in facts] == pytest.approx([h.score for h in again])
    assert again[0].score > again[-1].score


async def test_what_is_refused(ask: Any) -> None:
    with pytest.raises(InvalidRequest, match="no reranker has been fitted"):
        await ask("q", mode="hybrid", rerank=True)
    with pytest.raises(FusionFileError, match="No such file"):
        await ask("q", "wrong", mode="hybrid")
    with pytest.raises(UnknownResource):
        await ask("q", "theirs", mode="lexical")
