from __future__ import annotations

import enum
from typing import Annotated, Literal

import pytest
from pydantic import BaseModel, Field, ValidationError

from llmos.drivers.errors import UnknownTemplate
from llmos.drivers.protocols import Fact
from llmos.drivers.rules.clips import ClipsRuleBase
from llmos.drivers.rules.templates import deftemplates, fact_of, instance_of, template_name


class Tier(enum.Enum):
    GOLD = "gold"
    TIN = "tin"


class RefundRequest(BaseModel):
    text: str
    intent: Literal["refund", "other"] = "other"
    tier: Tier = Tier.TIN
    amount: float = Field(default=1, ge=0, le=1000)
    days: Annotated[int, Field(ge=0)] | None = None
    card_lost: bool = False
    note: str = 'say "no"'
    tags: tuple[str, ...] = ()
    prices: list[float] = Field(default_factory=list)


class Decision(BaseModel):
    outcome: Literal["approve", "refuse"]


RULE = """
(defrule small "Small sums are paid"
  (refund-request (intent refund) (amount ?a&:(< ?a 50)) (tier gold) (days nil) (card-lost FALSE))
  =>
  (assert (decision (outcome approve))))
"""


def test_a_model_is_a_template_and_an_instance_a_fact() -> None:
    base = ClipsRuleBase("r", deftemplates(RefundRequest, Decision) + RULE)
    given = RefundRequest(text="x", intent="refund", tier=Tier.GOLD, amount=12.5, tags=("a", "b c"))
    outcome = base.evaluate([fact_of(given)])
    assert [f.rule for f in outcome.firings] == ["small"]
    decided = outcome.first(template_name(Decision))
    assert decided is not None
    assert instance_of(Decision, decided).outcome == "approve"
    back = outcome.first("refund-request")
    assert back is not None
    assert instance_of(RefundRequest, back) == given
    later = given.model_copy(update={"days": 3})
    assert base.evaluate([fact_of(later)]).firings == ()


def test_slots_bring_defaults_and_limits() -> None:
    base = ClipsRuleBase("r", deftemplates(RefundRequest))
    fact = base.evaluate([Fact("refund-request", {"text": "x"})]).first("refund-request")
    assert fact is not None
    assert instance_of(RefundRequest, fact) == RefundRequest(text="x")
    for slots in ({}, {"text": "x", "amount": 2000.0}, {"text": "x", "intent": "sue"}):
        with pytest.raises(UnknownTemplate):
            base.evaluate([Fact("refund-request", slots)])
    with pytest.raises(ValidationError):
        instance_of(Decision, Fact("decision", {"outcome": "maybe"}))


@pytest.mark.parametrize("kind", [dict[str, str], Decision, tuple[int, str], Literal["two words"]])
def test_what_no_slot_can_hold_is_named(kind: object) -> None:
    model = type("Bad", (BaseModel,), {"__annotations__": {"field": kind}})
    with pytest.raises(TypeError, match=r"Bad\.field"):
        deftemplates(model)
