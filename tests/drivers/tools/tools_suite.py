"""What every tool must do."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import pytest

from llmos.drivers.errors import ToolRefused, ToolUnavailable
from llmos.drivers.protocols import Tool, ToolOutcome

KEY = "0f3c9a/7"


class ToolsSuite:
    """Subclasses give ``tool``, what it takes, and how often its target acted."""

    arguments: dict[str, Any]
    """A call that the target carries out."""
    refused: dict[str, Any]
    """A call that it refuses."""

    @pytest.fixture
    def tool(self) -> Tool:
        raise NotImplementedError

    @pytest.fixture
    def acted(self, tool: Tool) -> Callable[[], int]:
        """How often the target has done something."""
        raise NotImplementedError

    @pytest.fixture
    def away(self) -> Tool:
        """The same tool, whose target is not there."""
        raise NotImplementedError

    async def test_a_call_is_carried_out_once(self, tool: Tool, acted: Callable[[], int]) -> None:
        outcome = await tool.call(self.arguments, KEY)
        assert isinstance(outcome, ToolOutcome)
        assert isinstance(outcome.reference, str)
        assert json.loads(json.dumps(outcome.output)) == outcome.output
        assert acted() == 1

    async def test_it_has_the_name_it_was_given(self, tool: Tool) -> None:
        assert tool.name == "booking"

    async def test_a_refusal_leaves_nothing(self, tool: Tool, acted: Callable[[], int]) -> None:
        with pytest.raises(ToolRefused) as caught:
            await tool.call(self.refused, KEY)
        assert caught.value.tool == "booking"
        assert acted() == 0

    async def test_a_target_that_is_not_there_has_done_nothing(self, away: Tool) -> None:
        with pytest.raises(ToolUnavailable):
            await away.call(self.arguments, KEY)

    async def test_one_key_acts_once_where_that_is_promised(
        self, tool: Tool, acted: Callable[[], int]
    ) -> None:
        if not tool.idempotent:
            pytest.skip("it promises nothing")
        first = await tool.call(self.arguments, KEY)
        assert await tool.call(self.arguments, KEY) == first
        assert acted() == 1
        await tool.call(self.arguments, KEY + "1")
        assert acted() == 2

    async def test_it_tells_what_became_of_a_call_or_that_it_cannot(self, tool: Tool) -> None:
        if not tool.queryable:
            with pytest.raises(ToolUnavailable):
                await tool.lookup(KEY)
            return
        assert await tool.lookup(KEY) is None
        outcome = await tool.call(self.arguments, KEY)
        assert await tool.lookup(KEY) == outcome
        assert await tool.lookup(KEY + "1") is None

    async def test_calls_do_not_get_in_each_others_way(
        self, tool: Tool, acted: Callable[[], int]
    ) -> None:
        calls = [tool.call(self.arguments, f"turn/{n}") for n in range(8)]
        outcomes = await asyncio.gather(*calls)
        assert len(outcomes) == acted() == 8

    async def test_the_arguments_are_left_alone(self, tool: Tool) -> None:
        given = json.loads(json.dumps(self.arguments))
        await tool.call(given, KEY)
        assert given == json.loads(json.dumps(self.arguments))

    async def test_closing_twice_is_closing(self, tool: Tool) -> None:
        await tool.call(self.arguments, KEY)
        await tool.close()
        await tool.close()
