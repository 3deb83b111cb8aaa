"""call: tools, tried again and recovered."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from typing import Any

import pytest

from llmos.drivers.errors import ToolRefused, ToolUnavailable, ToolUncertain
from llmos.drivers.tools.memory import MemoryTool
from llmos.syscalls.effects import MAX_ARGUMENTS_BYTES, Call, CallResult, call, recover
from llmos.syscalls.errors import EffectUnknown, InvalidRequest, Quarantined, UnknownResource
from llmos.syscalls.labels import Labels, Provenance
from tests.syscalls.fakes import CALLER, SECRET, FakeServices

KEY = "turn-1/3"
BOOK = Call(tool="booking", arguments={"seat": "7A", "bags": [1, 2]})


def with_tool(**options: Any) -> tuple[FakeServices, MemoryTool]:
    services, tool = FakeServices(), MemoryTool("booking", options)
    services.tools["acme", "booking"] = tool
    return services, tool


async def test_a_call_is_made_once_with_the_key_of_its_syscall() -> None:
    services, tool = with_tool()
    made = await call(BOOK, replace(CALLER, labels=SECRET), services)
    assert isinstance(made, CallResult)
    assert (made.output, made.reference) == (dict(BOOK.arguments), f"memory:{KEY}")
    assert made.idem_key == KEY
    assert tool.calls == {KEY: [dict(BOOK.arguments)]}
    assert made.labels == SECRET.join(Labels(trusted=False))
    assert made.provenance == (Provenance(kind="tool", source="booking", version=KEY),)
    assert (BOOK.syscall, BOOK.resource, BOOK.reach) == ("call", "booking", "outside")
    # It is recorded as JSON and comes back the same.
    assert CallResult.model_validate_json(made.model_dump_json()) == made
    assert Call.model_validate_json(BOOK.model_dump_json()) == BOOK


async def test_what_a_tool_says_is_the_callers_tenants_and_not_trusted() -> None:
    services, _ = with_tool()
    made = await call(BOOK, CALLER, services)
    assert made.labels == Labels(tenants=frozenset({"acme"}), trusted=False)


async def test_a_tool_of_another_tenant_is_not_there() -> None:
    services, tool = with_tool()
    with pytest.raises(UnknownResource):
        await call(BOOK, replace(CALLER, tenant="globex"), services)
    assert tool.attempts == []


async def test_what_was_not_reached_is_tried_again_with_the_same_key() -> None:
    services, tool = with_tool(failures=["unavailable"] * 4)
    services.chance = 1.0
    await call(BOOK, CALLER, services)
    assert tool.attempts == [KEY] * 5
    assert services.slept == pytest.approx([0.1, 0.2, 0.4, 0.8])
    assert len(tool.calls[KEY]) == 1


async def test_the_waits_are_spread_by_chance() -> None:
    services, _ = with_tool(failures=["unavailable"])
    services.chance = 0.0
    await call(BOOK, CALLER, services)
    assert services.slept == pytest.approx([0.05])


async def test_five_attempts_are_all() -> None:
    services, tool = with_tool(failures=["unavailable"] * 5)
    with pytest.raises(ToolUnavailable):
        await call(BOOK, CALLER, services)
    assert len(tool.attempts) == 5
    assert tool.calls == {}


@pytest.mark.parametrize(
    ("failure", "error"),
    [("refused", ToolRefused), ("uncertain", ToolUncertain), ("lost", ToolUncertain)],
)
async def test_a_no_and_an_unknown_go_up_at_once(failure: str, error: type[Exception]) -> None:
    services, tool = with_tool(failures=[failure])
    with pytest.raises(error):
        await call(BOOK, CALLER, services)
    assert len(tool.attempts) == 1
    assert services.slept == []


async def test_a_call_that_is_cancelled_while_it_waits_is_not_made_again() -> None:
    services, tool = with_tool(failures=["unavailable"])

    async def never(seconds: float) -> None:
        await asyncio.Event().wait()

    services.sleep = never  # type: ignore[method-assign]
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            await call(BOOK, CALLER, services)
    assert (len(tool.attempts), tool.calls) == (1, {})


# ------------------------------------------------------------------ arguments


def nested(levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = [value]
    return value


@pytest.mark.parametrize(
    "value",
    [object(), {1, 2}, b"x", float("nan"), float("inf"), "\ud800", nested(100_000)],
    ids=["object", "set", "bytes", "nan", "inf", "surrogate", "deep"],
)
def test_arguments_are_plain_data(value: Any) -> None:
    with pytest.raises(InvalidRequest) as caught:
        Call(tool="t", arguments={"x": value})
    assert (caught.value.syscall, caught.value.field) == ("call", "arguments")


def test_arguments_have_a_bound() -> None:
    fits = MAX_ARGUMENTS_BYTES - len(json.dumps({"x": ""}))
    Call(tool="t", arguments={"x": "x" * fits})
    with pytest.raises(InvalidRequest, match="limit"):
        Call(tool="t", arguments={"x": "x" * (fits + 1)})


def test_every_attempt_gets_what_the_journal_gives_back() -> None:
    made = Call(tool="t", arguments={"pair": (1, 2), "by": {3: None}})
    assert made.arguments == {"pair": [1, 2], "by": {"3": None}}


# ------------------------------------------------------------------ recovery


async def crashed(failure: str, **options: Any) -> tuple[FakeServices, MemoryTool]:
    """A call left, and nobody recorded what came of it."""
    services, tool = with_tool(failures=[failure], **options)
    with pytest.raises((ToolUncertain, ToolRefused)):
        await call(BOOK, CALLER, services)
    return services, tool


@pytest.mark.parametrize("failure", ["uncertain", "lost"])
async def test_an_idempotent_target_is_called_again(failure: str) -> None:
    services, tool = await crashed(failure, idempotent=True, queryable=False)
    made = await recover(BOOK, CALLER, services)
    assert made is not None
    assert made.reference == f"memory:{KEY}"
    assert tool.attempts == [KEY, KEY]
    assert len(tool.calls[KEY]) == 1


@pytest.mark.parametrize(("failure", "attempts"), [("uncertain", 1), ("lost", 2)])
async def test_a_target_that_can_be_asked_is_called_only_if_it_was_not(
    failure: str, attempts: int
) -> None:
    services, tool = await crashed(failure, idempotent=False, queryable=True)
    made = await recover(BOOK, CALLER, services)
    assert made is not None
    assert (made.output, made.idem_key) == (dict(BOOK.arguments), KEY)
    assert len(tool.attempts) == attempts
    assert len(tool.calls[KEY]) == 1


@pytest.mark.parametrize("failure", ["uncertain", "lost"])
async def test_a_target_that_can_do_neither_is_left_alone(failure: str) -> None:
    services, tool = await crashed(failure, idempotent=False, queryable=False)
    assert await recover(BOOK, CALLER, services) is None
    assert len(tool.attempts) == 1


async def test_recovery_waits_for_a_target_that_is_away() -> None:
    services, tool = await crashed("uncertain", idempotent=True)
    tool._failures = ["unavailable"] * 8
    assert await recover(BOOK, CALLER, services) is not None
    assert len(services.slept) == 8
    assert sum(services.slept) < 30
    assert len(tool.calls[KEY]) == 1


@pytest.mark.parametrize("again", [["unavailable"] * 9, ["uncertain"], ["lost"]])
async def test_what_is_still_not_known_is_no_failure(again: list[Any]) -> None:
    # An error would tell the agent that nothing was done.
    services, tool = await crashed("uncertain", idempotent=True)
    tool._failures = list(again)
    assert await recover(BOOK, CALLER, services) is None
    assert len(tool.calls[KEY]) == 1


async def test_a_target_that_cannot_be_asked_now_leaves_it_unknown() -> None:
    services, tool = await crashed("uncertain", idempotent=False, queryable=True)

    async def away(idem_key: str) -> None:
        raise ToolUnavailable("booking", "closed")

    tool.lookup = away  # type: ignore[method-assign]
    assert await recover(BOOK, CALLER, services) is None
    assert len(tool.attempts) == 1


async def test_what_certainly_was_not_done_is_told_as_such() -> None:
    services, tool = await crashed("lost", idempotent=False, queryable=True)
    for failure, error in (("unavailable", ToolUnavailable), ("refused", ToolRefused)):
        tool._failures = [failure] * 5  # type: ignore[list-item]
        with pytest.raises(error):
            await recover(BOOK, CALLER, services)
        tool._failures = []
    assert tool.calls == {}


async def test_a_tool_that_is_gone_leaves_it_unknown() -> None:
    services, _ = await crashed("uncertain")
    services.tools.clear()
    assert await recover(BOOK, CALLER, services) is None


# ------------------------------------------------------------------ errors


def test_the_errors_say_what_to_do() -> None:
    unknown = EffectUnknown("acme/desk/main", "turn-1", 3, "booking", KEY)
    assert unknown.facts["seq"] == 3
    assert "llmos effects resolve turn-1/3" in str(unknown)
    held = Quarantined("acme/desk/main", "two hosts were lost")
    assert held.story in str(held)
    assert "llmos release acme/desk/main" in held.remedy
