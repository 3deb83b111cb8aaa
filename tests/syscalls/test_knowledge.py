"""embed, retrieve, graph and rules."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from llmos.drivers.errors import RuleLimitExceeded, UnknownNode, UnknownTemplate
from llmos.drivers.protocols import Edge, Node, Passage
from llmos.drivers.retrieval.filters import Condition
from llmos.drivers.retrieval.fusion import Share
from llmos.drivers.retrieval.search import Found
from llmos.syscalls.base import HANDLERS, Hit, Request, Response, Search
from llmos.syscalls.embed import Embed
from llmos.syscalls.errors import UnknownResource
from llmos.syscalls.graph import (
    FindAround,
    FindNeighbours,
    FindNodes,
    FindPaths,
    LinkText,
    MatchPatterns,
    RankNodes,
)
from llmos.syscalls.labels import Labels, Provenance
from llmos.syscalls.retrieve import Filter, Retrieve
from llmos.syscalls.rules import Evaluate, Fact
from tests.syscalls.fakes import CALLER, SECRET, FakeServices

UNTRUSTED = Labels(tenants=frozenset({"globex"}), trusted=False)


async def call(request: Request[Any], services: FakeServices, caller: Any = CALLER) -> Any:
    response = await HANDLERS[type(request)](request, caller, services)
    assert isinstance(response, Response)
    return response


@pytest.fixture
def services() -> FakeServices:
    made = FakeServices()
    made.hits = [
        Hit(
            Passage(f"{name}#0", name, f"v-{name}", (3, 9), f"text of {name}", "Top > Low", meta),
            score,
        )
        for name, score, meta in (("a.md", 0.9, {}), ("b.csv", 0.5, {"price": "3"}), ("c", 0.1, {}))
    ]
    made.graph.upsert(
        [Node("flu", "influenza", "disease", "d.csv", "1"), Node("fever", "fever", "symptom")],
        [
            Edge("flu", "has", "fever", "e.csv", "2"),
            Edge("flu", "has", "cough", "e.csv", "2"),
            Edge("cold", "has", "cough", "f.csv", "3"),
        ],
    )
    return made


# ------------------------------------------------------------------ embed


async def test_embeddings_keep_order_and_labels(services: FakeServices) -> None:
    texts = ("lost card", "free transfer", "lost card")
    made = await call(Embed(model="m", texts=texts), services, replace(CALLER, labels=UNTRUSTED))
    assert made.vectors.shape[0] == 3
    np.testing.assert_allclose(np.linalg.norm(made.vectors, axis=1), 1.0, rtol=1e-5)
    np.testing.assert_array_equal(made.vectors[0], made.vectors[2])
    assert made.labels == UNTRUSTED
    assert made.provenance == (Provenance(kind="model", source="m", version="digest-of-m"),)


def test_embed_has_a_bound() -> None:
    with pytest.raises(ValidationError):
        Embed(model="m", texts=("x",) * 4097)


# ------------------------------------------------------------------ retrieve


async def test_passages_say_where_they_stand(services: FakeServices) -> None:
    found = await call(Retrieve(corpus="help", query="q", k=2), services)
    assert services.seen == [("acme", "help", "q", 2)]
    first, second = found.passages
    assert (first.text, first.title, first.score) == ("text of a.md", "Top > Low", 0.9)
    assert second.meta == {"price": "3"}
    assert first.provenance == Provenance(
        kind="document", source="a.md", version="v-a.md", span=(3, 9), corpus="help"
    )
    assert str(first.provenance) == "help/a.md[3:9]@v-a.md"
    assert found.provenance == (first.provenance, second.provenance)
    assert found.labels == SECRET


def test_a_request_of_old_is_recorded_as_of_old() -> None:
    assert Retrieve(corpus="c", query="q").model_dump() == {
        "corpus": "c",
        "query": "q",
        "k": 5,
        "min_score": -1.0,
    }
    assert Retrieve(corpus="c", query="q").search() is None


async def test_a_search_of_another_kind(services: FakeServices) -> None:
    shares = (Share("lexical", 1, 7.5, 1.0, 0.4), Share("vector", None, None, 0.5, 0.6))
    services.hits[0] = replace(services.hits[0], found=Found(0, 0.7, shares, 0.7, {"pairs": 1.0}))
    request = Retrieve(
        corpus="help",
        query="q",
        k=1,
        mode="hybrid",
        filters=(
            Filter(field="price", op="ge", value=3),
            Filter(field="kind", op="in", value=("a", "b")),
        ),
        diversity=0.3,
        explain=True,
    )
    assert Retrieve.model_validate_json(request.model_dump_json()) == request
    found = await call(request, services)
    (seen,) = services.seen
    assert seen[:4] == ("acme", "help", "q", 1)
    assert seen[4] == Search(
        "hybrid",
        (Condition("price", "ge", ("3",)), Condition("kind", "in", ("a", "b"))),
        False,
        0.3,
    )
    explained = found.passages[0].explanation
    assert explained.fused == 0.7
    assert [(leg.leg, leg.rank, leg.weight) for leg in explained.legs] == [
        ("lexical", 1, 0.4),
        ("vector", None, 0.6),
    ]
    assert explained.facts == {"pairs": 1.0}
    assert type(found).model_validate_json(found.model_dump_json()) == found
    unexplained = await call(request.model_copy(update={"explain": False}), services)
    assert "explanation" not in unexplained.model_dump()["passages"][0]


@pytest.mark.parametrize(
    "fields",
    [
        {"mode": "magic"},
        {"mode": "hybrid", "min_score": 0.2},
        {"rerank": True, "min_score": 0.2},
        {"diversity": 1.1},
        {"filters": [{"field": "", "value": "x"}]},
        {"filters": [{"field": "a", "op": "like", "value": "x"}]},
        {"filters": [{"field": "a", "op": "in", "value": "x"}]},
        {"filters": [{"field": "a", "op": "in", "value": []}]},
        {"filters": [{"field": "a", "value": ["x"]}]},
        {"filters": [{"field": "a", "value": float("inf")}]},
        {"filters": [{"field": "a", "value": "x" * 10_001}]},
        {"filters": [{"field": "a", "value": "x"}] * 33},
    ],
)
def test_a_search_that_makes_no_sense(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Retrieve.model_validate({"corpus": "c", "query": "q", **fields})


async def test_what_is_not_near_enough_leaves_no_trace(services: FakeServices) -> None:
    assert [
        p.score
        for p in (await call(Retrieve(corpus="c", query="q", min_score=0.5), services)).passages
    ] == [0.9, 0.5]
    nothing = await call(Retrieve(corpus="c", query="q", min_score=0.95), services)
    assert (nothing.passages, nothing.provenance, nothing.labels) == ((), (), Labels())


@pytest.mark.parametrize(
    "fields", [{"k": 0}, {"k": 101}, {"min_score": 1.5}, {"min_score": float("nan")}]
)
def test_retrieve_is_checked(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Retrieve(corpus="c", query="q", **fields)


# ------------------------------------------------------------------ graph


async def test_nodes_named_in_a_text(services: FakeServices) -> None:
    found = await call(FindNodes(graph="g", text="Is it Influenza or just fever?"), services)
    assert [(n.id, n.kind) for n in found.nodes] == [("flu", "disease"), ("fever", "symptom")]
    assert found.provenance == (
        Provenance(kind="graph", source="d.csv", version="1", corpus="g"),
        Provenance(kind="graph", source="g", version="", corpus="g"),
    )
    assert found.labels == SECRET


async def test_neighbours_are_statements_with_the_node_at_the_other_end(
    services: FakeServices,
) -> None:
    found = await call(FindNeighbours(graph="g", node="flu"), services)
    assert [(n.statement.relation, n.node.id) for n in found.neighbours] == [
        ("has", "cough"),
        ("has", "fever"),
    ]
    # Two edges of one file are one source.
    assert [p.source for p in found.provenance] == ["e.csv"]
    incoming = await call(FindNeighbours(graph="g", node="cough", direction="in"), services)
    assert {n.statement.subject for n in incoming.neighbours} == {"flu", "cold"}
    assert (await call(FindNeighbours(graph="g", node="flu", limit=1), services)).neighbours == (
        found.neighbours[0],
    )
    with pytest.raises(UnknownNode):
        await call(FindNeighbours(graph="g", node="plague"), services)


async def test_paths_carry_the_files_of_all_their_edges(services: FakeServices) -> None:
    found = await call(FindPaths(graph="g", start="fever", end="cold"), services)
    (path,) = found.paths
    assert [(s.subject, s.object) for s in path] == [
        ("flu", "fever"),
        ("flu", "cough"),
        ("cold", "cough"),
    ]
    assert {(p.source, p.version) for p in found.provenance} == {("e.csv", "2"), ("f.csv", "3")}
    nothing = await call(FindPaths(graph="g", start="fever", end="cold", max_hops=1), services)
    assert (nothing.paths, nothing.provenance) == ((), ())


async def test_a_text_is_linked_to_nodes_where_it_names_them(services: FakeServices) -> None:
    found = await call(LinkText(graph="g", text="Is it influenza?"), services)
    assert [(n.start, n.end, n.text, n.node.id) for n in found.names] == [
        (6, 15, "influenza", "flu")
    ]
    assert found.provenance == (Provenance(kind="graph", source="d.csv", version="1", corpus="g"),)
    assert found.labels == SECRET


async def test_surroundings_patterns_and_ranks(services: FakeServices) -> None:
    around = await call(FindAround(graph="g", nodes=("flu",), hops=1), services)
    assert {n.id for n in around.nodes} == {"flu", "cough", "fever"}
    assert len(around.statements) == 2
    assert around.labels == SECRET
    with pytest.raises(UnknownNode):
        await call(FindAround(graph="g", nodes=("plague",)), services)
    both = MatchPatterns(graph="g", patterns=(("?d", "has", "cough"), ("?d", "has", "fever")))
    assert (await call(both, services)).rows == ({"?d": "flu"},)
    ranked = await call(RankNodes(graph="g", seeds={"fever": 1.0}, limit=2), services)
    assert {n.node.id for n in ranked.nodes} == {"fever", "flu"}
    for seeds in ({}, {"flu": 0.0}, {"flu": float("nan")}):
        with pytest.raises(ValidationError):
            RankNodes(graph="g", seeds=seeds)


# ------------------------------------------------------------------ rules

PROGRAM = {
    "templates": {"request": {"amount": "integer", "is-new": "boolean"}, "decision": {"to": "any"}},
    "rules": [
        {
            "name": "same",
            "comment": "What is asked is done",
            "when": {"request": {"amount": "?a", "is-new": True}},
            "then": {"decision": {"to": "?a"}},
        }
    ],
}


async def test_a_verdict_has_facts_firings_and_the_version_of_the_rules(
    services: FakeServices,
) -> None:
    base = services.add_rules("desk", json.dumps(PROGRAM))
    given = Fact.of("request", amount=12, is_new=True)
    assert given.slots == {"amount": 12, "is-new": True}
    verdict = await call(
        Evaluate(rules="desk", facts=(given,)), services, replace(CALLER, labels=UNTRUSTED)
    )
    decision = verdict.first("decision")
    assert decision.get("to") == 12
    assert decision.get("no-such", "x") == "x"
    assert verdict.all("request") == (given,)
    assert verdict.first("nothing") is None
    (fired,) = verdict.fired
    assert (fired.rule, fired.comment) == ("same", "What is asked is done")
    assert '"amount": 12' in fired.because[0]
    assert verdict.provenance == (Provenance(kind="rules", source="desk", version=base.version),)
    assert verdict.labels == SECRET.join(UNTRUSTED)


def test_booleans_stay_booleans_and_numbers_numbers() -> None:
    slots = Fact.of("x", a=True, b=1, c=1.0, d="1", e=(True, 1)).slots
    assert [type(v) for v in slots.values()] == [bool, int, float, str, tuple]
    assert [type(v) for v in slots["e"]] == [bool, int]  # type: ignore[union-attr]


async def test_errors_of_the_rules_reach_the_agent_as_they_are(services: FakeServices) -> None:
    services.add_rules("desk", json.dumps(PROGRAM))
    with pytest.raises(UnknownTemplate) as caught:
        await call(Evaluate(rules="desk", facts=(Fact.of("wish"),)), services)
    assert caught.value.known == ("decision", "request")
    with pytest.raises(UnknownResource):
        await call(Evaluate(rules="none", facts=()), services)
    both = tuple(Fact.of("request", amount=n, is_new=True) for n in range(3))
    with pytest.raises(RuleLimitExceeded):
        await call(Evaluate(rules="desk", facts=both, max_firings=2), services)
