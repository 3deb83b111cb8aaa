"""The context makes the requests that its methods say."""

from __future__ import annotations

import json
import uuid
from collections.abc import AsyncIterator
from typing import Any, assert_type

import pytest
from pydantic import BaseModel

from llmos.drivers.protocols import Grammar
from llmos.drivers.tools.memory import MemoryTool
from llmos.kernel.context import Context
from llmos.syscalls.base import HANDLERS, Request
from llmos.syscalls.deferred import NoTimer, Post, Subscription, Timer, Watch
from llmos.syscalls.effects import Call
from llmos.syscalls.errors import AnswerCutOff, InvalidRequest
from llmos.syscalls.generate import Generated
from llmos.syscalls.labels import Labels
from llmos.syscalls.messages import Message, Wire
from tests.syscalls.fakes import CALLER, FakeServices, words


class Nudge(Message):
    text: str = ""


NUDGE = Nudge(text="now")
WIRE = Wire.of(NUDGE)


class Straight:
    """A dispatcher that goes to the handlers at once."""

    agent, turn = CALLER.agent, CALLER.turn
    labels, remaining_s = Labels(), 9.0

    def __init__(self) -> None:
        self.services = FakeServices()
        self.made: list[Request[Any]] = []

    async def call(self, request: Any, deadline_s: float | None) -> Any:
        self.made.append(request)
        return await HANDLERS[type(request)](request, CALLER, self.services)

    def stream(self, request: Any, deadline_s: float | None) -> AsyncIterator[Any]:
        raise NotImplementedError

    def patched(self, name: str) -> bool:
        return name == "new"


@pytest.fixture
def straight() -> Straight:
    return Straight()


async def test_what_is_left_to_the_commit(straight: Straight) -> None:
    os = Context(straight)
    services = straight.services
    services.topics["acme/news"] = ["acme/a/1", "acme/b/2"]
    assert await os.send("acme/a/1", NUDGE, priority=3) == "turn-1/3"
    assert await os.publish("news", NUDGE, -3) == 2
    await os.subscribe("news")
    await os.unsubscribe("news")
    await os.monitor("acme/a/1")
    await os.link("acme/a/1")
    await os.demonitor("acme/a/1")
    assert await os.timer("t", NUDGE, after_s=2) == services.time() + 2
    assert await os.timer("t", NUDGE, at=5.0) == 5.0
    due = await os.schedule("c", NUDGE, "* * * * *", tz="Europe/Berlin")
    assert due == services.next_due("* * * * *", "UTC")
    await os.cancel_timer("t")
    assert services.deferred == [
        Post("acme/a/1", WIRE, "turn-1/3", 3),
        Post("acme/a/1", WIRE, "turn-1/3", -3),
        Post("acme/b/2", WIRE, "turn-1/3", -3),
        Subscription("acme/news", True),
        Subscription("acme/news", False),
        Watch("acme/a/1", True),
        Watch("acme/a/1", True, linked=True),
        Watch("acme/a/1", False),
        Timer("t", services.time() + 2, WIRE),
        Timer("t", 5.0, WIRE),
        Timer("c", due, WIRE, cron="* * * * *", tz="Europe/Berlin"),
        NoTimer("t"),
    ]


async def test_a_tool_may_have_arguments_of_any_name(straight: Straight) -> None:
    tool = straight.services.tools["acme", "booking"] = MemoryTool("booking", {})
    given = {"tool": "hammer", "self": 1, "seat": "7A"}
    made = await Context(straight).call_tool("booking", **given)
    assert made.output == given
    assert straight.made == [Call(tool="booking", arguments=given)]
    assert list(tool.calls) == ["turn-1/3"]


def test_ids_are_unique_and_the_same_when_the_turn_runs_again(straight: Straight) -> None:
    first, again = (Context(straight) for _ in range(2))
    ids = [first.uuid() for _ in range(100)]
    assert len(set(ids)) == 100
    assert [again.uuid() for _ in range(100)] == ids
    assert uuid.UUID(ids[0]).version == 5
    straight.turn = "turn-2"
    assert Context(straight).uuid() not in ids


def test_changes_of_the_code_are_the_dispatchers_to_know(straight: Straight) -> None:
    os = Context(straight)
    assert (os.patched("new"), os.patched("newer")) == (True, False)


class Person(BaseModel):
    name: str
    age: int


async def test_an_answer_with_a_schema_is_an_object(straight: Straight) -> None:
    straight.services.scripts = [words('{"name": ', '"Ada", "age": 36}')]
    os = Context(straight)
    made = await os.generate("chat", "Who?", schema=Person, seed=3)
    assert_type(made, Person)
    assert made == Person(name="Ada", age=36)
    ((_, job),) = straight.services.jobs
    assert job.params.grammar is not None
    assert job.params.grammar.kind == "json_schema"
    assert json.loads(job.params.grammar.source)["required"] == ["name", "age"]
    assert (job.params.seed, job.params.max_new_tokens) == (3, 512)


async def test_one_that_was_cut_off_says_so(straight: Straight) -> None:
    straight.services.scripts = [words('{"name": ', finish="length")]
    with pytest.raises(AnswerCutOff) as caught:
        await Context(straight).generate("chat", "Who?", schema=Person, max_new_tokens=2)
    assert (caught.value.model, caught.value.text) == ("chat", '{"name": ')


async def test_choices_and_expressions_bind_the_text(straight: Straight) -> None:
    straight.services.scripts = [words("yes")]
    os = Context(straight)
    made = await os.generate("chat", "?", choices=["yes", "nö"], logprobs=0)
    assert_type(made, Generated)
    assert made.text == "yes"
    await os.generate("chat", "?", regex="yes|no")
    await os.generate("chat", "?")
    grammars = [job.params.grammar for _, job in straight.services.jobs]
    assert grammars == [Grammar("choices", '["yes", "nö"]'), Grammar("regex", "yes|no"), None]


async def test_tools_are_described_by_classes_and_functions(straight: Straight) -> None:
    def now(zone: str) -> str:
        """The time."""
        return zone

    straight.services.scripts = [words("no")]
    await Context(straight).generate("chat", "?", tools=[Person, now])
    ((_, job),) = straight.services.jobs
    assert [t.name for t in job.tools] == ["Person", "now"]
    assert job.tools[1].description == "The time."


@pytest.mark.parametrize(
    "bound",
    [
        {"schema": Person, "regex": "a"},
        {"choices": ["a"], "regex": "a"},
        {"schema": Person, "choices": ["a"]},
        {"choices": "abc"},
    ],
    ids=str,
)
async def test_two_things_that_bind_an_answer_are_refused(straight: Straight, bound: Any) -> None:
    with pytest.raises(InvalidRequest):
        await Context(straight).generate("chat", "?", **bound)
    assert not straight.services.jobs
