"""The context makes the requests that its methods say."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator
from typing import Any

import pytest

from llmos.drivers.tools.memory import MemoryTool
from llmos.kernel.context import Context
from llmos.syscalls.base import HANDLERS, Request
from llmos.syscalls.deferred import NoTimer, Post, Subscription, Timer, Watch
from llmos.syscalls.effects import Call
from llmos.syscalls.labels import Labels
from llmos.syscalls.messages import Message, Wire
from tests.syscalls.fakes import CALLER, FakeServices


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
