from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from llmos.drivers.errors import ToolRefused, ToolUnavailable, ToolUncertain
from llmos.drivers.protocols import Tool, ToolOutcome
from llmos.drivers.tools.http import HttpTool
from tests.drivers.tools.tools_suite import KEY, ToolsSuite
from tests.drivers.tools.web import Web, response, serving

SEAT = {"seat": "7A"}


@pytest.fixture
async def web() -> AsyncIterator[Web]:
    async with serving(Web()) as made:
        yield made


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    assert isinstance(port, int)
    return port


def tool_of(web: Web, **options: Any) -> HttpTool:
    return HttpTool("booking", {"url": web.url(), "timeout_s": 5, **options})


class TestHttpTool(ToolsSuite):
    arguments = SEAT
    refused = {"flight": 3}  # noqa: RUF012

    @pytest.fixture(params=["plain", "idempotent", "queryable"])
    def tool(self, request: pytest.FixtureRequest, web: Web) -> Tool:
        if request.param == "idempotent":
            return tool_of(web, idempotent=True)
        if request.param == "queryable":
            return tool_of(web, lookup_url=web.url("/lookup/") + "{idem_key}")
        return tool_of(web)

    @pytest.fixture
    def acted(self, web: Web) -> Callable[[], int]:
        return lambda: sum(map(len, web.booked.values()))

    @pytest.fixture
    def away(self) -> Tool:
        return HttpTool("booking", {"url": f"http://127.0.0.1:{free_port()}/"})


async def test_the_arguments_are_posted_as_json_with_key_and_headers(
    web: Web, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLMOS_TEST_TOKEN", "Bearer abc")
    # Proxies of the machine do not count.
    monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{free_port()}")
    monkeypatch.setenv("ALL_PROXY", f"http://127.0.0.1:{free_port()}")
    tool = tool_of(web, headers={"Authorization": "env:LLMOS_TEST_TOKEN", "X-Unit": "east"})
    outcome = await tool.call({"seat": "Ä"}, KEY)
    assert outcome == ToolOutcome({"id": 100, "seat": "Ä"}, "100")
    ((line, headers),) = web.requests
    assert line == "POST /book HTTP/1.1"
    assert headers["idempotency-key"] == KEY
    assert headers["content-type"] == "application/json"
    assert (headers["authorization"], headers["x-unit"]) == ("Bearer abc", "east")


@pytest.mark.parametrize(
    ("answer", "outcome"),
    [
        (response(204), ToolOutcome(None)),
        (response(200, b"[1, 2]", "application/json"), ToolOutcome([1, 2])),
        (response(200, b"done", "text/plain"), ToolOutcome("done")),
        (response(200, b"{broken", "application/json"), ToolOutcome("{broken")),
        (response(200, b"\xff\x00", "x/y"), ToolOutcome("\ufffd\x00")),
        (
            response(200, b'{"reference": "R9", "id": 1}'),
            ToolOutcome({"reference": "R9", "id": 1}, "R9"),
        ),
        (response(200, b'{"id": {}}'), ToolOutcome({"id": {}})),
        (response(201, b"", "x/y", "Location: /b/7"), ToolOutcome(None, "/b/7")),
        (b"HTTP/1.0 200 OK\r\n\r\nold", ToolOutcome("old")),
    ],
)
async def test_what_a_success_says(web: Web, answer: bytes, outcome: ToolOutcome) -> None:
    web.raw = answer
    assert await tool_of(web).call(SEAT, KEY) == outcome


HUGE = b"HTTP/1.1 200 OK\r\nContent-Type: x/y\r\nContent-Length: 2097152\r\n\r\n" + b"x" * 2097152
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + b"10000\r\n" + b"x" * 65536
DEEP = b"[" * 500_000


@pytest.mark.parametrize(
    ("answer", "error", "said"),
    [
        (response(400, b"bad seat"), ToolRefused, "400: bad seat"),
        (response(401), ToolRefused, "401"),
        (response(404), ToolRefused, "404"),
        (response(409), ToolRefused, "409"),
        (response(422, b"x" * 5000), ToolRefused, "422"),
        (response(301, b"", "x/y", "Location: http://elsewhere/"), ToolRefused, "has moved"),
        (response(307, b"", "x/y", "Location: http://elsewhere/"), ToolRefused, "has moved"),
        (response(408), ToolUnavailable, "408"),
        (response(425), ToolUnavailable, "425"),
        (response(429, b"slow down"), ToolUnavailable, "429"),
        (response(503), ToolUnavailable, "503"),
        (response(302, b"", "x/y", "Location: http://elsewhere/"), ToolUncertain, "302"),
        (response(303, b"", "x/y", "Location: /done"), ToolUncertain, "303"),
        (response(500, b"oops"), ToolUncertain, "500: oops"),
        (response(502), ToolUncertain, "502"),
        (response(504), ToolUncertain, "504"),
        (b"", ToolUncertain, "disconnected"),
        (b"SSH-2.0-OpenSSH_9.6\r\n", ToolUncertain, "ProtocolError"),
        (b"\x00\xff\xfe" * 1000, ToolUncertain, "Protocol"),
        (b"HTTP/1.1 200 OK\r\nContent-Le", ToolUncertain, "disconnected"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 50\r\n\r\n{", ToolUncertain, "without"),
        (b"HTTP/1.1 200 OK\r\n" + b"A: b\r\n" * 200_000, ToolUncertain, "rotocol"),
        (HUGE, ToolUncertain, "more than 1048576 bytes"),
        (HUGE.replace(b" 200 ", b" 400 ", 1), ToolRefused, "400"),
        (CHUNKED, ToolUncertain, "without"),
        (response(200, b'{"x": NaN}', "application/json"), ToolUncertain, "no JSON"),
    ],
    ids=lambda x: repr(x)[:24] if isinstance(x, bytes) else "",
)
async def test_what_came_of_a_call_that_was_not_answered_well(
    web: Web, answer: bytes, error: type[Exception], said: str
) -> None:
    web.raw = answer
    with pytest.raises(error) as caught:
        await tool_of(web).call(SEAT, KEY)
    assert said in str(caught.value)
    assert len(str(caught.value)) < 600


async def test_json_that_nests_too_deeply_is_text(web: Web) -> None:
    web.raw = response(200, DEEP, "application/json")
    assert (await tool_of(web).call(SEAT, KEY)).output == DEEP.decode()


async def test_a_conflict_of_an_idempotent_target_may_be_an_earlier_attempt(web: Web) -> None:
    web.raw = response(409)
    with pytest.raises(ToolUncertain):
        await tool_of(web, idempotent=True).call(SEAT, KEY)


@pytest.mark.parametrize("stall", ["read", "answer"])
async def test_a_target_that_stalls_is_uncertain_in_time(web: Web, stall: str) -> None:
    web.stall = stall
    started = time.monotonic()
    with pytest.raises(ToolUncertain, match=r"in 0\.2 s"):
        await tool_of(web, timeout_s=0.2).call(SEAT, KEY)
    assert time.monotonic() - started < 5


async def test_an_answer_that_trickles_is_uncertain_in_time() -> None:
    async def trickle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
        try:
            for _ in range(1000):
                writer.write(b"x")
                await writer.drain()
                await asyncio.sleep(0.05)
        except ConnectionError:
            pass

    server = await asyncio.start_server(trickle, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    tool = HttpTool("booking", {"url": f"http://127.0.0.1:{port}/", "timeout_s": 0.3})
    started = time.monotonic()
    with pytest.raises(ToolUncertain):
        await tool.call(SEAT, KEY)
    assert time.monotonic() - started < 5
    server.close()


async def test_a_host_that_takes_no_connection_has_done_nothing() -> None:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen(0)
        port = sock.getsockname()[1]
        fill = [socket.socket() for _ in range(4)]
        for one in fill:
            one.setblocking(False)
            one.connect_ex(("127.0.0.1", port))
        tool = HttpTool("booking", {"url": f"http://127.0.0.1:{port}/", "timeout_s": 0.3})
        try:
            with pytest.raises(ToolUnavailable):
                await tool.call(SEAT, KEY)
        finally:
            for one in fill:
                one.close()


async def test_a_server_without_tls_has_done_nothing(web: Web) -> None:
    tool = HttpTool("booking", {"url": web.url().replace("http:", "https:"), "timeout_s": 2})
    with pytest.raises(ToolUnavailable):
        await tool.call(SEAT, KEY)
    assert web.booked == {}


async def test_one_call_too_many_is_unavailable_and_places_come_back(web: Web) -> None:
    web.stall = "answer"
    tool = tool_of(web, max_calls=2)
    tasks = [asyncio.create_task(tool.call(SEAT, f"t/{n}")) for n in range(2)]
    await asyncio.wait_for(web.stalled.acquire(), 5)
    await asyncio.wait_for(web.stalled.acquire(), 5)
    with pytest.raises(ToolUnavailable, match="its limit"):
        await tool.call(SEAT, KEY)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    web.stall = ""
    assert (await tool.call(SEAT, KEY)).reference


@pytest.mark.parametrize(
    "answer", [response(500), response(429), response(302), b"", b"garbage\r\n\r\n"]
)
async def test_a_lookup_that_fails_says_nothing(web: Web, answer: bytes) -> None:
    tool = tool_of(web, lookup_url=web.url("/lookup/") + "{idem_key}")
    web.raw, web.acts = answer, False
    with pytest.raises(ToolUnavailable):
        await tool.lookup(KEY)


async def test_a_lost_answer_is_looked_up(web: Web) -> None:
    tool = tool_of(web, lookup_url=web.url("/lookup/") + "{idem_key}")
    web.raw = b"HTTP/1.1 200"
    with pytest.raises(ToolUncertain):
        await tool.call(SEAT, KEY)
    web.raw = None
    assert await tool.lookup(KEY) == ToolOutcome({"id": 100, "seat": "7A"}, "100")
    assert web.requests[-1][0] == "GET /lookup/0f3c9a%2F7 HTTP/1.1"
    assert json.dumps(web.booked) == json.dumps({KEY: [SEAT]})


async def test_arguments_that_are_no_json_are_refused(web: Web) -> None:
    with pytest.raises(ToolRefused):
        await tool_of(web).call({"seat": object()}, KEY)
    assert web.requests == []
