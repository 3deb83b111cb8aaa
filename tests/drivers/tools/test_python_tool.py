from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import pytest
from pydantic import BaseModel

from llmos.drivers.errors import ToolRefused, ToolUnavailable, ToolUncertain
from llmos.drivers.protocols import Tool, ToolOutcome
from llmos.drivers.tools.options import ToolMisconfigured
from llmos.drivers.tools.python_tool import PythonTool
from tests.drivers.tools.tools_suite import KEY, ToolsSuite

DONE: dict[str, list[Any]] = {}
GATE = threading.Event()


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    DONE.clear()
    GATE.clear()
    yield
    GATE.set()


# The functions that are called.


def book(seat: str, idem_key: str) -> dict[str, str]:
    if idem_key not in DONE:
        DONE[idem_key] = [seat]
    return {"booked": seat}


async def book_async(*, seat: str, idem_key: str) -> ToolOutcome:
    await asyncio.sleep(0)
    book(seat, idem_key)
    return ToolOutcome({"booked": seat}, f"no-{seat}")


def plain(seat: str) -> str:
    DONE.setdefault(seat, []).append(threading.current_thread().name)
    return seat


def away(**anything: Any) -> NoReturn:
    raise ToolUnavailable("booking", "closed today")


def breaks(seat: str) -> NoReturn:
    DONE["broke"] = [seat]
    raise ValueError("after the effect")


def leaves(seat: str) -> NoReturn:
    raise SystemExit(3)


def stops(seat: str) -> NoReturn:
    raise StopIteration


def stalls(seat: str) -> None:
    GATE.wait(20)


async def stalls_async(seat: str) -> None:
    await asyncio.sleep(60)


def times_out(seat: str) -> NoReturn:
    raise TimeoutError("of its own")


class Receipt(BaseModel):
    seat: str


def receipt(seat: str) -> Receipt:
    return Receipt(seat=seat)


def no_json(seat: str) -> object:
    return object()


def huge(seat: str) -> str:
    return "x" * (2 << 20)


def tool_of(function: str, **options: Any) -> PythonTool:
    return PythonTool("booking", {"target": f"{__name__}:{function}", **options})


class TestPythonTool(ToolsSuite):
    arguments = {"seat": "7A"}  # noqa: RUF012
    refused = {"seats": "7A"}  # noqa: RUF012

    @pytest.fixture(params=["book", "book_async"])
    def tool(self, request: pytest.FixtureRequest) -> Tool:
        return tool_of(request.param, idempotent=True)

    @pytest.fixture
    def acted(self, tool: Tool) -> Callable[[], int]:
        return lambda: len(DONE)

    @pytest.fixture
    def away(self) -> Tool:
        return tool_of("away")


async def test_sync_functions_run_beside_the_event_loop() -> None:
    outcome = await tool_of("plain").call({"seat": "7A"}, KEY)
    assert outcome == ToolOutcome("7A")
    assert DONE["7A"] == ["tool booking"]


async def test_a_reference_of_the_target_is_kept() -> None:
    assert (await tool_of("book_async").call({"seat": "7A"}, KEY)).reference == "no-7A"


async def test_models_become_plain_data() -> None:
    assert (await tool_of("receipt").call({"seat": "7A"}, KEY)).output == {"seat": "7A"}


@pytest.mark.parametrize("arguments", [{}, {"seat": 1, "more": 2}, {"seat": 1, "idem_key": "x"}])
async def test_arguments_that_do_not_fit_are_refused_before_the_call(
    arguments: dict[str, Any],
) -> None:
    for function in ("book", "plain"):
        with pytest.raises(ToolRefused):
            await tool_of(function).call(arguments, KEY)
    assert DONE == {}


@pytest.mark.parametrize(
    ("function", "said"),
    [
        ("breaks", "ValueError('after the effect')"),
        ("leaves", "SystemExit(3)"),
        ("stops", "StopIteration"),
        ("times_out", "of its own"),
        ("no_json", "no JSON"),
        ("huge", "2097154 bytes"),
    ],
)
async def test_what_breaks_may_have_acted(function: str, said: str) -> None:
    with pytest.raises(ToolUncertain) as caught:
        await tool_of(function).call({"seat": "7A"}, KEY)
    assert said in str(caught.value)


@pytest.mark.parametrize("function", ["stalls", "stalls_async"])
async def test_a_function_that_takes_too_long_is_not_waited_for(function: str) -> None:
    started = time.monotonic()
    with pytest.raises(ToolUncertain, match=r"no answer after 0\.05 s"):
        await tool_of(function, timeout_s=0.05).call({"seat": "7A"}, KEY)
    assert time.monotonic() - started < 5


async def test_functions_that_do_not_end_hold_a_bounded_number_of_places() -> None:
    tool = tool_of("stalls", timeout_s=0.05, max_calls=2)
    calls = [tool.call({"seat": "7A"}, f"t/{n}") for n in range(3)]
    results = await asyncio.gather(*calls, return_exceptions=True)
    assert sorted(type(r).__name__ for r in results) == [
        "ToolUnavailable",
        "ToolUncertain",
        "ToolUncertain",
    ]
    GATE.set()
    for _ in range(100):
        if tool._threads.running == 0:
            break
        await asyncio.sleep(0.02)
    assert (await tool.call({"seat": "7A"}, KEY)).output is None


async def test_async_calls_are_bounded_and_a_cancelled_one_gives_its_place_back() -> None:
    tool = tool_of("stalls_async", max_calls=1)
    first = asyncio.create_task(tool.call({"seat": "7A"}, "t/1"))
    await asyncio.sleep(0.01)
    with pytest.raises(ToolUnavailable, match="its limit"):
        await tool.call({"seat": "7A"}, "t/2")
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    assert tool._running == 0


def test_a_module_that_breaks_is_told(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "llmos_broken_tool.py").write_text("raise RuntimeError('at once')")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ToolMisconfigured, match="at once"):
        PythonTool("booking", {"target": "llmos_broken_tool:f"})
