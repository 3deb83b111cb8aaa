"""Grounding through a turn's real syscalls, with hashed embeddings and a written draft."""

from __future__ import annotations

from typing import Any

import pytest

from llmos.agents.base import Agent, on
from llmos.agents.choosing import Source
from llmos.agents.grounding import Grounding, Thresholds, merge
from llmos.agents.messages import Answer, Citation, Question
from llmos.drivers.errors import EngineBusy
from llmos.kernel.context import Context
from llmos.kernel.manifest import Manifest
from llmos.kernel.system import SystemConfig
from llmos.syscalls.labels import Provenance
from tests.agents.local import Local

PAGE = (
    "A refund takes 5 working days. Refunds over €100 are checked by a person. "
    "An instant transfer cannot be cancelled."
)


class Grounder(Agent):
    """Answers from one page."""

    manifest = Manifest(capabilities=("generate:chat", "embed:embed"))

    @on(Question, read_only=True)
    async def answer(self, question: Question, os: Context) -> Answer:
        source = Source(PAGE, Provenance(kind="document", source="page.md"), "Refunds", 0.9)
        sources = [source] if question.data.get("sources", True) else []
        if question.data.get("check"):
            limits = Thresholds(alike=0.3)
            grounding = Grounding(os, model="", embedder="embed", thresholds=limits)
            supports = await grounding.check(question.text, sources)
            return Answer(
                text=" / ".join(s.sentence for s in supports),
                data={
                    "against": [list(s.against) for s in supports],
                    "scores": [s.score for s in supports],
                    "sources": [None if s.line is None else s.line.source for s in supports],
                },
            )
        made = await Grounding(
            os, model="chat", embedder="embed", thresholds=Thresholds(relevant=0.2, alike=0.3)
        ).answer(question.text, sources)
        return Answer(
            text=made.text,
            grounded=made.grounded,
            sources=made.citations,
            data={"dropped": list(made.dropped), "trouble": made.trouble},
        )


async def ask(text: str, draft: Any, **data: Any) -> Answer:
    system = SystemConfig.model_validate(
        {
            "models": {
                "chat": {"source": "x", "engine": "echo"},
                "embed": {"source": "x", "engine": "hash"},
            }
        }
    )
    local = Local(system, writers={"chat": draft if callable(draft) else lambda _: draft})
    try:
        agent = local.launch("tests.agents.test_grounding:Grounder", "t", "main", {})
        answer = await local.tell(agent, Question(text=text, data=data))
    finally:
        local.close()
    assert isinstance(answer, Answer)
    return answer


async def test_a_supported_draft_is_kept_and_cited() -> None:
    answer = await ask("How long does a refund take?", "A refund takes 5 working days.")
    assert answer.grounded == "draft"
    assert answer.text == "A refund takes 5 working days [1]."
    assert answer.sources[0].provenance.source == "page.md"


@pytest.mark.parametrize(
    "lie",
    [
        "A refund takes 10 working days.",
        "A refund takes 5 weeks.",
        "A refund never takes 5 working days.",
        "A refund takes 5 working days without checks.",
        "Refunds are paid in gold coins by our friendly staff.",
    ],
)
async def test_what_no_source_says_is_not_said(lie: str) -> None:
    answer = await ask("How long does a refund take?", lie)
    assert answer.grounded == "extract"
    assert "A refund takes 5 working days" in answer.text
    assert lie in answer.data["dropped"]  # type: ignore[operator]


async def test_a_lost_denial_is_not_said() -> None:
    answer = await ask(
        "Can an instant transfer be cancelled?", "An instant transfer can be cancelled."
    )
    assert "cannot be cancelled" in answer.text


async def test_echoes_and_cut_off_sentences_are_dropped() -> None:
    draft = "Question: How long does a refund take?\nAnswer: A refund takes 5 working days."
    answer = await ask("How long does a refund take?", draft)
    assert answer.text == "A refund takes 5 working days [1]."


async def test_without_sources_nothing_is_claimed() -> None:
    answer = await ask("How long does a refund take?", "Five days.", sources=False)
    assert (answer.grounded, answer.text) == ("none", "")


async def test_another_subject_is_not_answered() -> None:
    answer = await ask("Which planet has the most moons?", "Saturn has the most moons.")
    assert "Saturn" not in answer.text


async def test_a_busy_model_does_not_stop_the_answer() -> None:
    def busy(_: str) -> str:
        raise EngineBusy("chat", 9, 1.0)

    answer = await ask("How long does a refund take?", busy)
    assert answer.grounded == "extract"
    assert "EngineBusy" in str(answer.data["trouble"])


async def test_each_sentence_of_a_text_is_checked() -> None:
    checked = await ask(
        "A refund takes 5 working days [1]. A refund takes 10 working days. "
        "An instant transfer can be cancelled. Parrots live in Brazil.",
        "",
        check=True,
    )
    against: Any = checked.data["against"]
    scores: Any = checked.data["scores"]
    assert checked.text.startswith("A refund takes 5 working days. / A refund")
    assert against[0] == []
    assert "numbers" in against[1]
    assert "denial" in against[2]
    assert {"unlike", "words"} <= set(against[3])
    assert scores[0] > 0.9
    assert scores[1:] == [0, 0, 0]
    assert checked.data["sources"] == [0, 0, 0, 0]


async def test_without_sources_nothing_is_supported() -> None:
    checked = await ask("A refund takes 5 days. And so on.", "", check=True, sources=False)
    assert checked.data["against"] == [["unlike"], ["empty"]]
    assert checked.data["sources"] == [None, None]


def test_merged_citations_are_renumbered_once() -> None:
    def cited(number: int, source: str) -> Citation:
        return Citation(
            number=number, provenance=Provenance(kind="document", source=source), quote=source
        )

    text, sources = merge("X [1]. Y [2].", [cited(1, "b")], [cited(1, "a"), cited(2, "b")])
    assert text == "X [2]. Y [1]."
    assert [s.number for s in sources] == [1, 2]
