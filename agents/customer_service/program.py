"""The customer-service program.

The rule base must declare ``request`` (intent, confidence, margin, passage-score, amount,
days; the last two are -1 where not known), ``term`` (text, denied) and ``decision``
(action, reason, policy, case, priority). The decision of the highest priority counts:

- ``answer``: a grounded answer from the help pages;
- ``refund``, ``escalate``, ``clarify`` or any other word: ``reason`` is said to the
  customer, with the help passage that ``policy`` finds;
- ``hand-over``: finance is asked about a case of kind ``case``, and its result is passed on.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from pydantic import BaseModel, ConfigDict, Field

from llmos.agents.base import Agent, on
from llmos.agents.choosing import Source
from llmos.agents.customer_service.intents import UNKNOWN, Intent, vote
from llmos.agents.finance.messages import RiskCase
from llmos.agents.grounding import Grounding, Thresholds, citation, merge
from llmos.agents.messages import Answer, Citation, Question
from llmos.agents.reading import amount_in, days_in, number, scalars, term_facts
from llmos.kernel.context import Context
from llmos.kernel.manifest import Manifest
from llmos.syscalls.messages import Message
from llmos.syscalls.retrieve import FoundPassage
from llmos.syscalls.rules import Fact, FiredRule

NOT_FOUND = (
    "I could not find anything about that in our help pages, and I would rather not guess. "
    "A colleague can help you further."
)
_UNDERSTOOD = 0.65
"""From this confidence on, the intent says what the question is about."""
_OWN_DATA = frozenset({"amount", "currency", "days", "intent"})


class CustomerServiceConfig(BaseModel):
    """What a launch sets. Without ``intents`` or ``rules`` every question is answered."""

    model_config = ConfigDict(extra="forbid")

    model: str = "chat"
    """Causal model; empty: the help pages answer in their own words."""
    embedder: str = "embed"
    corpus: str
    """The help pages."""
    intents: str = ""
    """A corpus of example utterances with the column ``label``."""
    rules: str = ""
    finance: str = ""
    """The agent that risk cases are handed to."""
    notes_to: str = ""
    """An agent of this program, e.g. this one, that keeps count of what was decided."""
    currency: str = "EUR"
    neighbours: int = Field(default=9, ge=1, le=100)
    """Example utterances that vote."""
    passages: int = Field(default=5, ge=1, le=20)
    thresholds: Thresholds = Thresholds()


class CustomerServiceState(BaseModel):
    """What customer service remembers."""

    questions: int = 0
    decisions: dict[str, int] = Field(default_factory=dict)
    intents: dict[str, int] = Field(default_factory=dict)


class Noted(Message):
    """A question has been dealt with."""

    decision: str = Field(max_length=100)
    intent: str = Field(max_length=100)


class _Decision(BaseModel):
    action: str
    reason: str = ""
    policy: str = ""
    case: str = ""
    fired: tuple[FiredRule, ...] = ()


class CustomerService(Agent):
    """Answers customers side by side, each with sources or with a rule's decision."""

    manifest = Manifest(
        description="Answers customers from the help pages; rules decide what else happens",
        models=("$model", "$embedder"),
        stores=("corpus:$corpus", "corpus:$intents", "rules:$rules"),
        capabilities=(
            "generate:$model",
            "embed:$embedder",
            "retrieve:$corpus",
            "retrieve:$intents",
            "rules:$rules",
            "ask:$finance",
            "send:$notes_to",
        ),
    )
    State: ClassVar[type[BaseModel]] = CustomerServiceState
    Config: ClassVar[type[BaseModel]] = CustomerServiceConfig
    state: CustomerServiceState
    config: CustomerServiceConfig

    @on(Question, read_only=True)
    async def answer(self, question: Question, os: Context) -> Answer:
        """Deal with one question."""
        intent = await self._intent(question, os)
        # A wish that is understood also finds pages that use other words for it.
        topic = intent.label.replace("_", " ") if intent.confidence >= _UNDERSTOOD else ""
        query = f"{topic}: {question.text}" if topic else question.text
        found = await os.retrieve(self.config.corpus, query, k=self.config.passages)
        decision = await self._decide(question, intent, found.passages, os)
        if decision.action == "answer":
            answer = await self._answer(question, topic, found.passages, os)
        elif decision.action == "hand-over" and self.config.finance:
            answer = await self._hand_over(question, decision, os)
        else:
            answer = await self._say(decision, intent, os)
        if self.config.notes_to:
            await os.send(
                self.config.notes_to, Noted(decision=answer.decision, intent=intent.label)
            )
        data = {**answer.data, "intent": intent.label, "intent_confidence": intent.confidence}
        return answer.model_copy(update={"rules": (*decision.fired, *answer.rules), "data": data})

    @on(Noted)
    async def note(self, noted: Noted, os: Context) -> None:
        """Count it."""
        state = self.state
        state.questions += 1
        state.decisions[noted.decision] = state.decisions.get(noted.decision, 0) + 1
        state.intents[noted.intent] = state.intents.get(noted.intent, 0) + 1

    # -- steps

    async def _intent(self, question: Question, os: Context) -> Intent:
        if not self.config.intents:
            return Intent(label=UNKNOWN, confidence=0.0, margin=0.0, nearest=0.0)
        k = self.config.neighbours
        return vote((await os.retrieve(self.config.intents, question.text, k=k)).passages)

    async def _decide(
        self, question: Question, intent: Intent, passages: Sequence[FoundPassage], os: Context
    ) -> _Decision:
        if not self.config.rules:
            return _Decision(action="answer")
        amount, _ = self._amount(question)
        days = number(question.data, "days")
        if days is None:
            days = days_in(question.text)
        request = Fact.of(
            "request",
            intent=intent.label,
            confidence=intent.confidence,
            margin=intent.margin,
            passage_score=max((p.score for p in passages), default=0.0),
            amount=-1.0 if amount is None else amount,
            days=-1.0 if days is None else float(days),
        )
        verdict = await os.rules(self.config.rules, [request, *term_facts(question.text)])
        decisions = sorted(verdict.all("decision"), key=lambda d: -float(d.get("priority", 0) or 0))
        if not decisions:
            return _Decision(action="answer", fired=verdict.fired)
        best = decisions[0]
        return _Decision(
            action=str(best.get("action")),
            reason=str(best.get("reason", "")),
            policy=str(best.get("policy", "")),
            case=str(best.get("case", "")),
            fired=verdict.fired,
        )

    async def _answer(
        self, question: Question, topic: str, passages: Sequence[FoundPassage], os: Context
    ) -> Answer:
        sources = [Source.of(p) for p in passages]
        grounded = await self._grounding(os).answer(question.text, sources, topic=topic)
        if grounded.grounded == "none":
            return Answer(text=NOT_FOUND, decision="refuse")
        return Answer(
            text=grounded.text,
            decision="answer",
            grounded=grounded.grounded,
            confidence=grounded.confidence,
            sources=grounded.citations,
            data={"draft_trouble": grounded.trouble} if grounded.trouble else {},
        )

    async def _say(self, decision: _Decision, intent: Intent, os: Context) -> Answer:
        """What the rules decided, in their words, with the passage that backs it."""
        text, sources = await self._backed(decision, os)
        if decision.action == "clarify" and intent.candidates:
            topics = [c.replace("_", " ").replace("-", " ") for c in intent.candidates]
            text += f" Is it about one of these: {', '.join(topics)}?"
        return Answer(
            text=text,
            decision=decision.action,
            grounded="rules",
            confidence=intent.confidence if decision.action == "clarify" else 1.0,
            sources=sources,
        )

    async def _hand_over(self, question: Question, decision: _Decision, os: Context) -> Answer:
        """Ask finance, and pass on what it says with its sources."""
        amount, currency = self._amount(question)
        case = RiskCase(
            case=decision.case or "other",
            amount=amount or 0.0,
            currency=currency,
            facts=scalars(question.data, without=_OWN_DATA),
            text=question.text,
        )
        result = await os.ask(self.config.finance, case, Answer)
        text, own = await self._backed(decision, os)
        theirs, sources = merge(result.text, own, result.sources)
        return Answer(
            text=f"{text} {theirs}".strip(),
            decision="hand-over",
            grounded="rules",
            confidence=result.confidence,
            sources=sources,
            rules=result.rules,
            notice=result.notice,
            data={"handed_to": self.config.finance, "outcome": result.decision, **result.data},
        )

    async def _backed(self, decision: _Decision, os: Context) -> tuple[str, tuple[Citation, ...]]:
        """The reason, marked with the passage that its policy query finds."""
        reason = decision.reason.strip()
        if reason and reason[-1] not in ".!?":
            reason += "."
        if not decision.policy:
            return reason, ()
        found = await os.retrieve(
            self.config.corpus, decision.policy, k=1, min_score=self.config.thresholds.relevant
        )
        if not found.passages or not reason:
            return reason, ()
        source = Source.of(found.passages[0])
        return f"{reason.rstrip('.')} [1].", (citation(1, source),)

    def _grounding(self, os: Context) -> Grounding:
        return Grounding(
            os,
            model=self.config.model,
            embedder=self.config.embedder,
            thresholds=self.config.thresholds,
        )

    def _amount(self, question: Question) -> tuple[float | None, str]:
        """The amount in question with its currency: from the data, else from the words."""
        given = number(question.data, "amount")
        currency = question.data.get("currency")
        named = currency if isinstance(currency, str) and len(currency) == 3 else ""
        if given is not None and given >= 0:
            return given, (named or self.config.currency).upper()
        read = amount_in(question.text)
        return read if read is not None else (None, self.config.currency)
