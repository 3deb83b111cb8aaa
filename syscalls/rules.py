"""``rules``: let an expert system decide."""

from __future__ import annotations

import asyncio
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field

from llmos.drivers import protocols
from llmos.syscalls.base import Caller, Request, Response, Services, handles
from llmos.syscalls.labels import Provenance

Scalar = bool | int | float | str


class Fact(BaseModel):
    """A statement: a template of the rule base and its slots."""

    model_config = ConfigDict(frozen=True)

    template: str
    slots: dict[str, Scalar | tuple[Scalar, ...]] = Field(default_factory=dict)

    @classmethod
    def of(cls, template: str, /, **slots: Any) -> Fact:
        """``Fact.of("request", intent="refund", amount=12.5)``; ``_`` in slot names becomes ``-``."""
        return cls(template=template, slots={k.replace("_", "-"): v for k, v in slots.items()})

    def get(self, slot: str, default: Any = None) -> Any:
        """The value of a slot."""
        return self.slots.get(slot, default)


class FiredRule(BaseModel):
    """A rule that fired, and the facts that made it."""

    model_config = ConfigDict(frozen=True)

    rule: str
    because: tuple[str, ...]
    comment: str = ""


class Verdict(Response):
    """What the rules made of the facts."""

    facts: tuple[Fact, ...]
    """All facts at the end, the given ones included."""
    fired: tuple[FiredRule, ...]
    """In the order they fired."""

    def first(self, template: str) -> Fact | None:
        """The first fact of that template, or None."""
        return next((f for f in self.facts if f.template == template), None)

    def all(self, template: str) -> tuple[Fact, ...]:
        """All facts of that template."""
        return tuple(f for f in self.facts if f.template == template)


class Evaluate(Request[Verdict]):
    """Assert facts and run the rules to rest. Nothing is kept between evaluations."""

    syscall: ClassVar[str] = "rules"

    rules: str
    facts: tuple[Fact, ...] = Field(max_length=10_000)
    max_firings: int = Field(default=1000, ge=1, le=1_000_000)

    @property
    def resource(self) -> str:
        """The rule base."""
        return self.rules


@handles(Evaluate)
async def evaluate(request: Evaluate, caller: Caller, services: Services) -> Verdict:
    """Run the rules off the event loop: a rule base may take its time."""
    base, labels = await services.rule_base(caller.tenant, request.rules)
    given = [protocols.Fact(f.template, f.slots) for f in request.facts]
    outcome = await asyncio.to_thread(base.evaluate, given, max_firings=request.max_firings)
    return Verdict(
        facts=tuple(Fact(template=f.template, slots=dict(f.slots)) for f in outcome.facts),
        fired=tuple(
            FiredRule(rule=f.rule, because=f.because, comment=f.comment) for f in outcome.firings
        ),
        provenance=(Provenance(kind="rules", source=request.rules, version=base.version),),
        labels=labels.join(caller.labels),
    )
