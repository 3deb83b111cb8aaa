"""The medical program.

Rules come first: where they raise an ``emergency``, their text is the whole answer and
no model is asked. The rule base must declare ``term`` (text, denied) and ``flag`` (name,
level, text, priority), where level is ``emergency`` (said alone), ``refer`` (said alone,
for what no document may answer, such as a dose) or ``urgent`` (said before the answer).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from pydantic import BaseModel, ConfigDict, Field

from llmos.agents.base import Agent, on
from llmos.agents.choosing import Source
from llmos.agents.grounding import Grounded, Grounding, Thresholds, rescored
from llmos.agents.medical.statements import asked_for, sentences
from llmos.agents.messages import Answer, Question
from llmos.agents.reading import term_facts, terms
from llmos.kernel.context import Context
from llmos.kernel.manifest import Manifest
from llmos.syscalls.graph import GraphNode
from llmos.syscalls.labels import Provenance
from llmos.syscalls.rules import Fact, Verdict

NOTICE = (
    "General information, not a diagnosis. If you are worried or it gets worse, see a doctor; "
    "in an emergency call the emergency number."
)
NOT_FOUND = (
    "I have no reliable source on that, so I will not answer it. "
    "Please ask a doctor or a pharmacist."
)


class MedicalConfig(BaseModel):
    """What a launch sets. Without ``graph`` or ``rules`` these steps are left out."""

    model_config = ConfigDict(extra="forbid")

    model: str = "chat"
    """Causal model; empty: the documents answer in their own words."""
    embedder: str = "embed"
    corpus: str
    graph: str = ""
    rules: str = ""
    passages: int = Field(default=5, ge=1, le=20)
    nodes: int = Field(default=3, ge=1, le=10)
    """Things named in a question that the graph is asked about."""
    thresholds: Thresholds = Thresholds(certain=0.85, named=0.6)
    """Stricter than elsewhere: another illness of the same kind must not answer."""


class Medical(Agent):
    """Answers questions about health from sources, or not at all."""

    manifest = Manifest(
        description="General health information with sources; red flags first",
        models=("$model", "$embedder"),
        stores=("corpus:$corpus", "graph:$graph", "rules:$rules"),
        capabilities=(
            "generate:$model",
            "embed:$embedder",
            "retrieve:$corpus",
            "graph:$graph",
            "rules:$rules",
        ),
    )
    Config: ClassVar[type[BaseModel]] = MedicalConfig
    config: MedicalConfig

    @on(Question, read_only=True)
    async def answer(self, question: Question, os: Context) -> Answer:
        """Red flags, then graph and documents, then a grounded answer or none."""
        verdict = await self._red_flags(question, os)
        flags = sorted(
            verdict.all("flag") if verdict else (),
            key=lambda f: -float(f.get("priority", 0) or 0),
        )
        alone = next((f for f in flags if f.get("level") in ("emergency", "refer")), None)
        fired = verdict.fired if verdict else ()
        if alone is not None:
            return Answer(
                text=str(alone.get("text")),
                decision=str(alone.get("level")),
                grounded="rules",
                confidence=1.0,
                rules=fired,
                notice=NOTICE,
                data={"flags": [str(f.get("name")) for f in flags]},
            )
        grounded, nodes = await self._look_up(question.text, os)
        urgent = next((f for f in flags if f.get("level") == "urgent"), None)
        answer = _shaped(grounded, urgent)
        return answer.model_copy(
            update={
                "rules": fired,
                "notice": NOTICE,
                "data": {
                    "named": [n.name for n in nodes],
                    "flags": [str(f.get("name")) for f in flags],
                    **({"draft_trouble": grounded.trouble} if grounded.trouble else {}),
                },
            }
        )

    async def _red_flags(self, question: Question, os: Context) -> Verdict | None:
        if not self.config.rules:
            return None
        return await os.rules(self.config.rules, term_facts(question.text))

    async def _look_up(self, text: str, os: Context) -> tuple[Grounded, Sequence[GraphNode]]:
        found = await os.retrieve(self.config.corpus, text, k=self.config.passages)
        documents = [Source.of(p) for p in found.passages]
        nodes: Sequence[GraphNode] = ()
        statements: list[Source] = []
        if self.config.graph:
            named = await os.find_nodes(self.config.graph, text, limit=self.config.nodes)
            said = terms(text)
            # "No chest pain" names chest pain and is not about it.
            nodes = [n for n in named.nodes if not said.get("-".join(n.name.lower().split()))]
            for node in nodes:
                statements += await self._statements(text, node, os)
        if statements:
            texts = [text, *(s.text for s in statements)]
            vectors = (await os.embed(self.config.embedder, texts)).vectors
            statements = rescored(statements, (vectors[1:] @ vectors[0]).tolist())
        sources = sorted([*statements[:6], *documents], key=lambda s: -s.score)
        grounded = await Grounding(
            os,
            model=self.config.model,
            embedder=self.config.embedder,
            thresholds=self.config.thresholds,
        ).answer(text, sources)
        return grounded, nodes

    async def _statements(self, text: str, node: GraphNode, os: Context) -> list[Source]:
        """What the graph says about a node and the question asks for, one source a sentence."""
        found = await os.neighbours(self.config.graph, node.id, limit=60)
        version = next((p.version for p in found.provenance), "")
        return [
            Source(
                sentence,
                Provenance(kind="graph", source=node.id, version=version, corpus=self.config.graph),
                title=node.name,
                by_name=True,
                sentences=(sentence,),
            )
            for sentence in sentences(node, asked_for(text, node, found.neighbours))
        ]


def _shaped(grounded: Grounded, urgent: Fact | None) -> Answer:
    """The answer in words: what is urgent first."""
    first = str(urgent.get("text")) if urgent is not None else ""
    if grounded.grounded == "none":
        return Answer(
            text=first or NOT_FOUND,
            decision="urgent" if first else "refuse",
            grounded="rules" if first else "none",
            confidence=1.0 if first else 0.0,
        )
    return Answer(
        text=f"{first}\n\n{grounded.text}".strip(),
        decision="urgent" if first else "answer",
        grounded=grounded.grounded,
        confidence=grounded.confidence,
        sources=grounded.citations,
    )
