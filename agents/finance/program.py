"""The finance program.

The rule base must declare the templates ``case`` (kind, amount, currency), ``known``
(name, number, text) and ``term`` (text, denied), assert ``points`` (points, reason) as it
goes, and at the end one ``outcome`` (decision, score, advice). Numbers and words of the
decision stand in that file alone; nothing here decides.
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import BaseModel, ConfigDict, Field, JsonValue

from llmos.agents.base import Agent, on
from llmos.agents.choosing import Source
from llmos.agents.finance.messages import RiskCase
from llmos.agents.grounding import Grounding, Thresholds, citation
from llmos.agents.messages import Answer, Citation, Question
from llmos.agents.reading import term_facts
from llmos.kernel.context import Context
from llmos.kernel.manifest import Manifest
from llmos.syscalls.errors import InvalidRequest
from llmos.syscalls.rules import Fact, Verdict

NOTICE = "A decision by rules. Anyone it concerns may ask for a person to look at it again."


class FinanceConfig(BaseModel):
    """What a launch sets."""

    model_config = ConfigDict(extra="forbid")

    model: str = "chat"
    """Causal model for questions; empty: the policy answers in its own words."""
    embedder: str = "embed"
    corpus: str = "risk-policy"
    rules: str = "risk"
    thresholds: Thresholds = Thresholds()


class FinanceState(BaseModel):
    """What finance remembers."""

    cases: int = 0
    outcomes: dict[str, int] = Field(default_factory=dict)
    """Decision → number of cases."""
    kinds: dict[str, int] = Field(default_factory=dict)
    """Kind of case → number of cases."""


class Finance(Agent):
    """Approves, declines or asks for a review, and says why."""

    manifest = Manifest(
        description="Weighs risk cases by rules and answers questions about the risk policy",
        models=("$model", "$embedder"),
        stores=("corpus:$corpus", "rules:$rules"),
        capabilities=(
            "generate:$model",
            "embed:$embedder",
            "retrieve:$corpus",
            "rules:$rules",
        ),
    )
    State: ClassVar[type[BaseModel]] = FinanceState
    Config: ClassVar[type[BaseModel]] = FinanceConfig
    state: FinanceState
    config: FinanceConfig

    @on(RiskCase)
    async def decide(self, case: RiskCase, os: Context) -> Answer:
        """Weigh a case. Serial, since every case is counted."""
        verdict = await os.rules(self.config.rules, _facts(case))
        outcome = verdict.first("outcome")
        if outcome is None:
            raise InvalidRequest(
                "rules", self.config.rules, f"no rule came to an outcome for a {case.case!r} case"
            )
        decision = str(outcome.get("decision"))
        text, sources = await self._explain(case, verdict, outcome, os)
        self.state.cases += 1
        self.state.outcomes[decision] = self.state.outcomes.get(decision, 0) + 1
        self.state.kinds[case.case] = self.state.kinds.get(case.case, 0) + 1
        points: list[JsonValue] = [
            {"points": _number(p.get("points")), "reason": str(p.get("reason"))}
            for p in verdict.all("points")
        ]
        return Answer(
            text=text,
            decision=decision,
            grounded="rules",
            confidence=1.0,
            sources=sources,
            rules=verdict.fired,
            notice=NOTICE,
            data={"case": case.case, "score": _number(outcome.get("score")), "points": points},
        )

    @on(Question, read_only=True)
    async def answer(self, question: Question, os: Context) -> Answer:
        """Answer a question about the policy."""
        found = await os.retrieve(self.config.corpus, question.text, k=4)
        grounded = await Grounding(
            os,
            model=self.config.model,
            embedder=self.config.embedder,
            thresholds=self.config.thresholds,
        ).answer(question.text, [Source.of(p) for p in found.passages])
        if grounded.grounded == "none":
            return Answer(
                text="The risk policy does not say anything about that.", decision="refuse"
            )
        return Answer(
            text=grounded.text,
            decision="answer",
            grounded=grounded.grounded,
            confidence=grounded.confidence,
            sources=grounded.citations,
        )

    async def _explain(
        self, case: RiskCase, verdict: Verdict, outcome: Fact, os: Context
    ) -> tuple[str, tuple[Citation, ...]]:
        """The outcome in words, each reason with the policy passage that backs it."""
        reasons = [str(p.get("reason")) for p in verdict.all("points")]
        query = ". ".join([case.case.replace("-", " "), *reasons])
        found = await os.retrieve(self.config.corpus, query, k=6)
        advice, decision = str(outcome.get("advice")), str(outcome.get("decision"))
        meaning = f"A score of {_signed(outcome.get('score'))} means {decision}"
        general = await os.retrieve(self.config.corpus, meaning, k=1)
        sources = [Source.of(p) for p in (*found.passages, *general.passages)]
        backing = await Grounding(
            os, model="", embedder=self.config.embedder, thresholds=self.config.thresholds
        ).cite([*reasons, meaning], sources)
        order = list(dict.fromkeys(i for i in backing if i is not None))
        marks = [f" [{order.index(i) + 1}]" if i is not None else "" for i in backing]
        parts = [f"{advice.rstrip('.')}{marks[-1]}."]
        if reasons:
            weighed = "; ".join(
                f"{reason.rstrip('.')} ({_signed(p.get('points'))}){mark}"
                for reason, p, mark in zip(reasons, verdict.all("points"), marks, strict=False)
            )
            parts.append(f"What was weighed: {weighed}. Score: {_signed(outcome.get('score'))}.")
        return " ".join(parts), tuple(citation(n, sources[i]) for n, i in enumerate(order, 1))


def _facts(case: RiskCase) -> list[Fact]:
    facts = [Fact.of("case", kind=case.case, amount=case.amount, currency=case.currency)]
    for name, value in case.facts.items():
        name = name.replace("_", "-")
        if isinstance(value, str):
            facts.append(Fact.of("known", name=name, text=value))
        else:
            facts.append(Fact.of("known", name=name, number=float(value)))
    return facts + term_facts(case.text)


def _number(value: object) -> float:
    return float(value) if isinstance(value, int | float) else 0.0


def _signed(value: object) -> str:
    number = _number(value)
    return "0" if number == 0 else f"{number:+g}"
