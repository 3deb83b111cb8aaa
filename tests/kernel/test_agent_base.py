"""How a program's handlers are found: the base class, as the kernel sees it."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from llmos import Agent, Context, Message, on
from llmos.agents.base import Empty


class Hi(Message):
    pass


class Bye(Message):
    pass


class Desk(Agent):
    @on(Hi, read_only=True)
    async def hi(self, message: Hi, os: Context) -> Hi:
        return message

    @on(Bye)
    async def bye(self, message: Bye, os: Context) -> None:
        return None


def test_handlers_are_found_by_the_kind_of_message() -> None:
    assert set(Desk.handlers) == {"Hi", "Bye"}
    assert (Desk.handlers["Hi"].method, Desk.handlers["Hi"].read_only) == ("hi", True)
    assert (Desk.handlers["Bye"].message, Desk.handlers["Bye"].read_only) == (Bye, False)
    assert Agent.handlers == {}


def test_a_derived_program_replaces_and_adds_and_leaves_its_base_alone() -> None:
    class Polite(Desk):
        @on(Hi)
        async def greet(self, message: Hi, os: Context) -> None:
            return None

    assert Polite.handlers["Hi"].method == "greet"
    assert not Polite.handlers["Hi"].read_only
    assert Polite.handlers["Bye"] == Desk.handlers["Bye"]
    assert Desk.handlers["Hi"].method == "hi"


def test_one_method_may_handle_several_kinds() -> None:
    class Both(Agent):
        @on(Hi)
        @on(Bye, read_only=True)
        async def any(self, message: Message, os: Context) -> None:
            return None

    assert {k: (h.method, h.read_only) for k, h in Both.handlers.items()} == {
        "Hi": ("any", False),
        "Bye": ("any", True),
    }


def test_two_handlers_for_one_kind_are_refused_where_they_are_written() -> None:
    with pytest.raises(TypeError, match="both one and two handle Hi"):

        class Torn(Agent):
            @on(Hi)
            async def one(self, message: Hi, os: Context) -> None:
                return None

            @on(Hi)
            async def two(self, message: Hi, os: Context) -> None:
                return None


def test_without_a_state_there_is_nothing_to_set() -> None:
    assert Agent.State is Agent.Config is Empty
    with pytest.raises(ValidationError):
        Empty(anything=1)  # type: ignore[call-arg]
