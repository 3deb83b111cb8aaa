from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from llmos.drivers import registry
from llmos.drivers.errors import ToolError, ToolUncertain
from llmos.drivers.protocols import Tool
from llmos.drivers.tools.memory import MemoryTool
from llmos.drivers.tools.options import ToolMisconfigured
from tests.drivers.tools.tools_suite import KEY, ToolsSuite


class TestMemoryTool(ToolsSuite):
    arguments = {"seat": "7A"}  # noqa: RUF012
    refused = arguments

    @pytest.fixture(params=[(True, True), (False, True), (False, False)])
    def tool(self, request: pytest.FixtureRequest) -> Tool:
        idempotent, queryable = request.param
        return MemoryTool("booking", {"idempotent": idempotent, "queryable": queryable})

    @pytest.fixture
    def acted(self, tool: MemoryTool) -> Callable[[], int]:
        return lambda: sum(map(len, tool.calls.values()))

    @pytest.fixture
    def away(self) -> Tool:
        return MemoryTool("booking", {"failures": ["unavailable"]})

    async def test_a_refusal_leaves_nothing(self, tool: Tool, acted: Callable[[], int]) -> None:
        tool = MemoryTool("booking", {"failures": ["refused"]})
        await super().test_a_refusal_leaves_nothing(tool, lambda: len(tool.calls))


async def test_an_answer_is_lost_before_or_after_the_effect() -> None:
    tool = MemoryTool("t", {"failures": ["uncertain", "lost"]})
    for key in ("a", "b"):
        with pytest.raises(ToolUncertain):
            await tool.call({}, key)
    assert (list(tool.calls), tool.attempts) == (["a"], ["a", "b"])


async def test_without_the_promise_a_key_acts_twice() -> None:
    tool = MemoryTool("t", {"idempotent": False, "output": {"n": 1}})
    for _ in range(2):
        assert (await tool.call({"x": 1}, KEY)).output == {"n": 1}
    assert tool.calls == {KEY: [{"x": 1}, {"x": 1}]}


@pytest.mark.parametrize(
    ("driver", "options", "option", "said"),
    [
        ("memory", {"idenpotent": True}, "idenpotent", "unknown"),
        ("memory", {"failures": ["sometimes"]}, "failures.0", "'refused'"),
        ("memory", {"timeout_s": 0}, "timeout_s", "greater than 0"),
        ("memory", {"timeout_s": float("nan")}, "timeout_s", "finite"),
        ("memory", {"max_calls": 0}, "max_calls", "greater"),
        ("http", {}, "url", "is missing"),
        ("http", {"ulr": "http://x"}, "ulr", "unknown"),
        ("http", {"url": "ftp://x/y"}, "url", "http://"),
        ("http", {"url": "http://"}, "url", "host"),
        ("http", {"url": "http://me:secret@x/"}, "url", "user or password"),
        ("http", {"url": "http://x", "lookup_url": "http://x/y"}, "lookup_url", "{idem_key}"),
        ("http", {"url": "http://x", "lookup_url": "gopher://{idem_key}"}, "lookup_url", "http"),
        ("http", {"url": "http://x", "headers": {"A": "b\nc"}}, "headers.A", "printable"),
        ("http", {"url": "http://x", "headers": {"A b": "c"}}, "headers.A b.[key]", "pattern"),
        ("http", {"url": "http://x", "headers": {"A": "env:LLMOS_NONE"}}, "headers.A", "not set"),
        ("python", {}, "target", "is missing"),
        ("python", {"target": "json"}, "target", "is not module:function"),
        ("python", {"target": "no_such_module:f"}, "target", "no module 'no_such_module'"),
        ("python", {"target": "json:dmups"}, "target", "is not there"),
        ("python", {"target": "json:__name__"}, "target", "is no function"),
        ("python", {"target": "json:dumps", "idempotent": True}, "idempotent", "to tell"),
        ("smtp", {"host": "x"}, "from", "is missing"),
        ("smtp", {"host": "x", "sender": "a@b.c"}, "sender", "unknown"),
        ("smtp", {"host": "x", "from": "nobody"}, "from", "mail address"),
        ("smtp", {"host": "x", "from": "a@b.c\nBcc: d@e.f"}, "from", "mail address"),
        ("smtp", {"from": "a@b.c", "host": ""}, "host", "1 character"),
        ("smtp", {"from": "a@b.c", "host": "x", "port": 0}, "port", "greater"),
    ],
)
def test_options_are_checked(driver: str, options: dict[str, Any], option: str, said: str) -> None:
    with pytest.raises(ToolMisconfigured) as caught:
        registry.driver("tool", driver)("booking", options)
    error = caught.value
    assert isinstance(error, ToolError)
    assert (error.tool, error.option) == ("booking", option)
    assert said in str(error)
    assert "secret" not in str(error)
    assert {"timeout_s", "max_calls"} <= set(error.known)


def test_all_tools_are_in_the_registry() -> None:
    assert registry.names("tool") == ("http", "memory", "python", "smtp")
