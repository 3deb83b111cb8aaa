"""The programs on the example system: real rules, graph and documents, hashed embeddings."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from llmos.agents.customer_service.intents import UNKNOWN, vote
from llmos.agents.finance import RiskCase
from llmos.agents.messages import Answer, Question
from llmos.syscalls.errors import CapabilityDenied
from llmos.syscalls.labels import Provenance
from llmos.syscalls.retrieve import FoundPassage
from tests.agents.conftest import EXAMPLE
from tests.agents.local import Local, questions

SERVICE, FINANCE, MEDICAL = "bank/customer-service/main", "bank/finance/main", "clinic/medical/main"


async def ask(local: Local, agent: str, text: str, **data: Any) -> Answer:
    answer = await local.tell(agent, Question(text=text, data=data))
    assert isinstance(answer, Answer)
    return answer


def neighbour(label: str, score: float) -> FoundPassage:
    return FoundPassage(
        text="",
        title="",
        score=score,
        meta={"label": label},
        provenance=Provenance(kind="document", source="i.csv"),
    )


def test_near_examples_outvote_many_far_ones() -> None:
    won = vote([neighbour("a", 0.95), *[neighbour("b", 0.6)] * 8])
    assert won.label == "a"
    assert won.margin > 0.5


def test_far_or_divided_neighbours_are_unknown() -> None:
    assert vote([neighbour("a", 0.2)]).label == UNKNOWN
    assert vote([neighbour(c, 0.8) for c in "abcd"]).label == UNKNOWN
    assert vote([]).label == UNKNOWN


async def test_small_duplicate_is_refunded(local: Local) -> None:
    answer = await ask(local, SERVICE, "I was charged twice", amount=38.2, days=5)
    assert answer.decision == "refund"
    assert "38.20" in answer.text
    assert "duplicate-small" in [r.rule for r in answer.rules]
    assert "Generate chat" not in local.turns[0].names()


async def test_large_duplicate_goes_to_a_person(local: Local) -> None:
    assert (await ask(local, SERVICE, "I was charged twice", amount=900, days=5)).decision == (
        "escalate"
    )


async def test_theft_escalates_whatever_else_is_said(local: Local) -> None:
    answer = await ask(local, SERVICE, "My card was stolen. How long does a transfer take?")
    assert answer.decision == "escalate"
    assert "block your card" in answer.text


async def test_loan_is_handed_to_finance_with_its_sources(local: Local) -> None:
    answer = await ask(
        local,
        SERVICE,
        "I want to apply for a loan of 6000 euros",
        income=3100,
        debt=450,
        **{"late-payments": 0, "account-months": 30, "country": "DE"},
    )
    assert answer.decision == "hand-over"
    assert answer.data["outcome"] == "approve"
    assert {"loan", "debt-low", "decide"} <= {r.rule for r in answer.rules}
    assert len({s.number for s in answer.sources}) == len(answer.sources)
    assert local.state(FINANCE).outcomes == {"approve": 1}


async def test_customers_are_counted(local: Local) -> None:
    await asyncio.gather(*(ask(local, SERVICE, "My card was stolen") for _ in range(20)))
    await local.settle()
    assert local.state(SERVICE).decisions == {"escalate": 20}


async def test_finance_is_not_asked_without_the_capability(local: Local) -> None:
    alone = local.launch(
        "llmos.agents.customer_service:CustomerService",
        "bank",
        "alone",
        {"corpus": "bank-help", "rules": "support", "intents": "bank-intents"},
    )
    answer = await ask(local, alone, "I want to apply for a loan of 6000 euros")
    assert answer.decision == "hand-over"
    assert local.state(FINANCE).cases == 0


async def test_another_tenants_corpus_is_refused(local: Local) -> None:
    agent = local.launch("llmos.agents.medical:Medical", "clinic", "spy", {"corpus": "bank-help"})
    with pytest.raises(Exception, match="No corpus is called 'bank-help'"):
        await ask(local, agent, "How much is the fee?")


async def test_capabilities_are_enforced(local: Local) -> None:
    held = local._agents[MEDICAL]
    held.manifest = held.manifest.model_copy(update={"capabilities": ("rules:redflags",)})
    with pytest.raises(CapabilityDenied):
        await ask(local, MEDICAL, "What are the symptoms of migraine?")


@pytest.mark.parametrize(
    ("facts", "amount", "decision"),
    [
        ({"income": 3000, "debt": 300, "late-payments": 0, "account-months": 30}, 5000, "approve"),
        ({"income": 2000, "debt": 1200, "late-payments": 4}, 15000, "decline"),
        ({"income": 3000, "debt": 300}, 15000, "review"),
        ({}, 5000, "review"),
        ({"income": 9000, "debt": 0, "late-payments": 0}, 30000, "review"),
        ({"income": 9000, "debt": 0, "late-payments": 0, "country": "US"}, 3000, "review"),
    ],
)
async def test_risk(local: Local, facts: dict[str, Any], amount: float, decision: str) -> None:
    answer = await local.tell(FINANCE, RiskCase(case="loan", amount=amount, facts=facts))
    assert answer.decision == decision
    points: Any = answer.data["points"]
    assert answer.data["score"] == sum(p["points"] for p in points)
    assert all(p["reason"].rstrip(".") in answer.text for p in points)


@pytest.mark.parametrize(
    "text",
    [
        "My father has chest pain and is short of breath",
        "I want to kill myself",
        "I don't want to live anymore",
        "Her face is drooping and her speech is slurred",
        "I have a fever and a stiff neck",
        "My son was stung and his throat is swelling",
        "I took too many tablets, took too many of them",
    ],
)
async def test_emergencies_come_before_any_model(local: Local, text: str) -> None:
    answer = await ask(local, MEDICAL, text)
    assert answer.decision == "emergency"
    assert answer.notice
    assert local.turns[-1].names() == ["Evaluate redflags"]


@pytest.mark.parametrize(
    "text",
    ["What are the symptoms of a stroke?", "I have no chest pain and no stiff neck, only a cold"],
)
async def test_questions_about_an_emergency_are_none(local: Local, text: str) -> None:
    assert (await ask(local, MEDICAL, text)).decision != "emergency"


async def test_doses_are_referred(local: Local) -> None:
    answer = await ask(local, MEDICAL, "What dose of ibuprofen should I take?")
    assert answer.decision == "refer"


async def test_the_graph_is_asked_about_what_is_named(local: Local) -> None:
    answer = await ask(local, MEDICAL, "What are the symptoms of migraine?")
    assert answer.data["named"] == ["migraine"]
    assert "FindNeighbours conditions" in local.turns[-1].names()
    assert answer.notice


async def test_what_is_denied_is_not_looked_up(local: Local) -> None:
    answer = await ask(local, MEDICAL, "I have no chest pain, only a cough")
    assert answer.data["named"] == ["cough"]


async def test_unknown_illness_is_refused(local: Local) -> None:
    answer = await ask(local, MEDICAL, "How is lupus treated?")
    assert (answer.decision, answer.grounded, answer.sources) == ("refuse", "none", ())


async def test_an_unknown_kind_of_case_is_reviewed(local: Local) -> None:
    answer = await local.tell(FINANCE, RiskCase(case="something-else", amount=1))
    assert answer.decision == "review"


@pytest.mark.models
@pytest.mark.slow
async def test_every_path_with_real_models(system: Any) -> None:
    from llmos.kernel.settings import Settings

    local = Local(system, models_dir=Settings().models_dir)
    try:
        answers = [
            await ask(local, q["agent"], q["text"], **q.get("data", {})) for q in questions(EXAMPLE)
        ]
    finally:
        local.close()
    assert [a.decision for a in answers] == [
        "answer", "answer", "refund", "escalate", "hand-over", "emergency", "answer", "refuse",
    ]  # fmt: skip
    assert "cannot be cancelled" in answers[0].text
    assert "5 working days" in answers[1].text
    assert all(a.sources for a in answers[:5])
    assert {"graph", "document"} <= {s.provenance.kind for s in answers[6].sources}
