"""Answers with a schema in a turn that runs again: the record is read the same way again."""

from __future__ import annotations

import pytest
from pydantic import BaseModel, Field

from llmos.drivers.protocols import GenerationChunk, ToolCall
from llmos.kernel.context import Context
from llmos.kernel.dispatch import TurnDispatcher
from llmos.kernel.manifest import Manifest
from llmos.syscalls.errors import AnswerCutOff, InvalidAnswer
from llmos.syscalls.labels import Labels
from tests.kernel.local import RowLog
from tests.kernel.test_dispatch import Bench, HandClock
from tests.syscalls.fakes import FakeServices, words


class Order(BaseModel):
    """What somebody wants."""

    item: str
    count: int = Field(ge=1, description="How many.")


def again(bench: Bench) -> tuple[Context, FakeServices]:
    """The same turn in another host, with what is recorded of it."""
    services = FakeServices()
    dispatcher = TurnDispatcher(
        agent="acme/desk/main",
        turn="turn-1",
        chain=(),
        manifest=Manifest(capabilities=("generate:chat",)),
        services=services,
        clock=HandClock(),
        deadline_s=60.0,
        labels=Labels(),
        log=RowLog(),
        epoch=4,
        recorded=bench.rows,
    )
    return Context(dispatcher), services


async def test_an_object_is_handed_back_without_a_call() -> None:
    bench = Bench("generate:chat")
    bench.services.scripts = [words('{"item": "pen", ', '"count": 3}')]
    first = await bench.os.generate("chat", "What?", schema=Order, seed=4)
    os, services = again(bench)
    assert await os.generate("chat", "What?", schema=Order, seed=4) == first
    assert first == Order(item="pen", count=3)
    assert not services.jobs


@pytest.mark.parametrize(
    ("text", "finish", "error"),
    [('{"item": "pen"', "length", AnswerCutOff), ('{"item": 3}', "stop", InvalidAnswer)],
)
async def test_one_that_was_refused_is_refused_again(
    text: str, finish: str, error: type[InvalidAnswer]
) -> None:
    bench = Bench("generate:chat")
    bench.services.scripts = [words(text, finish=finish)]
    facts = []
    for os in (bench.os, None):
        os = os or again(bench)[0]
        with pytest.raises(error) as caught:
            await os.generate("chat", "What?", schema=Order)
        facts.append(caught.value.facts)
    assert facts[0] == facts[1]
    # The model did its part: what is recorded is its answer.
    assert bench.statuses() == ["ok"]


async def test_calls_of_tools_come_back_with_their_ids() -> None:
    bench = Bench("generate:chat")
    call = ToolCall("Order", '{"item": "pen", "count": 2}', "abc123def")
    bench.services.scripts = [
        lambda job: [GenerationChunk(job.id, "", 9, "stop", new_tokens=9, tool_calls=(call,))]
    ]
    first = await bench.os.generate("chat", "Order!", tools=[Order], tool_choice="required")
    os, services = again(bench)
    second = await os.generate("chat", "Order!", tools=[Order], tool_choice="required")
    assert second == first
    assert second.tool_calls[0].parsed(Order) == Order(item="pen", count=2)
    assert second.tool_calls[0].id == "abc123def"
    assert not services.jobs
