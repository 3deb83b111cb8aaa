"""The remote engine against a server that misbehaves on purpose, over real sockets."""

import asyncio
import dataclasses
import json
import pickle
import socket
import threading
import time
from pathlib import Path

import pytest

from llmos.drivers.engines.remote import RemoteEngine
from llmos.drivers.errors import (
    AdaptersFull,
    AdapterUnusable,
    EngineBusy,
    EngineError,
    EngineFailed,
    GrammarIgnored,
    InvalidParams,
    PromptTooLong,
    RemoteBroken,
    RemoteRefused,
    RemoteUnreachable,
    ServerBusy,
    ServerDown,
    UnknownAdapter,
)
from llmos.drivers.protocols import (
    ChatTurn,
    EngineOptions,
    GenerationJob,
    Grammar,
    RemoteOptions,
    SamplingParams,
    ToolCall,
    ToolSpec,
)
from llmos.drivers.registry import driver
from tests.drivers.engines.causal_suite import Listener, ask, job, settle
from tests.drivers.engines.faulty_server import FaultyServer, answer

QUICK = RemoteOptions(
    "",
    "m",
    connect_timeout_s=0.5,
    first_token_timeout_s=0.4,
    stall_timeout_s=0.3,
    retries=2,
)


class Impatient(RemoteEngine):
    """Times of tests."""

    BACKOFF_S = 0.01
    BREAKER_PAUSE_S = 0.2


@pytest.fixture
def make():
    """An engine for a server; each is closed, and must be empty then."""
    engines = []

    def make_engine(target, /, *, options=None, kind=Impatient, **remote):
        url = target if isinstance(target, str) else target.url
        engine = kind(
            EngineOptions(
                "chat",
                Path(),
                remote=dataclasses.replace(QUICK, url=url, **remote),
                **(options or {}),
            )
        )
        engines.append(engine)
        return engine

    yield make_engine
    for engine in engines:
        engine.close()
        assert not engine._thread.is_alive()
        after = engine.statistics()
        assert (after.running, after.waiting) == (0, 0)
        engine._breaker.validate()


def fails(engine, kind, prompt="Hi", **params):
    got = ask(engine, prompt, **{"max_new_tokens": 8, **params})
    last = got.chunks[-1]
    assert last.finish == "error"
    assert type(last.error) is kind, last.error
    assert isinstance(last.error, EngineError)
    assert pickle.loads(pickle.dumps(last.error)).facts == last.error.facts
    assert last.new_tokens == got.tokens
    return got


def test_the_registry_knows_it():
    assert driver("engine", "remote") is RemoteEngine


# ---------------------------------------------------------------- good answers


def test_a_good_answer_and_its_counts(make):
    with FaultyServer() as server:
        engine = make(server, api_key="sk-1")
        got = ask(engine, max_new_tokens=8)
        assert (got.text, got.chunks[-1].finish) == ("Hello there.", "stop")
        last = got.chunks[-1]
        assert (last.prompt_tokens, last.new_tokens, got.tokens) == (7, 3, 3)
        request = server.requests[0]
        assert request.path == "/v1/chat/completions"
        assert request.headers["authorization"] == "Bearer sk-1"
        assert request.body["max_tokens"] == 8
        stats = engine.statistics()
        assert (stats.finished, stats.prompt_tokens, stats.new_tokens) == (1, 7, 3)
        assert ask(engine, "Bare", max_new_tokens=8).text == "Hello there."
        assert server.requests[1].path == "/v1/completions"


def test_without_usage_events_are_counted_and_the_prompt_is_estimated(make):
    async def no_usage(exchange):
        await answer(exchange, "a", "b c", usage=False)

    with FaultyServer(no_usage) as server:
        engine = make(server)
        got = ask(engine, "x" * 40, max_new_tokens=8)
        assert got.tokens == got.chunks[-1].new_tokens == 2
        assert got.chunks[-1].prompt_tokens == engine.count_tokens("x" * 40) == 10


def test_usage_beside_the_last_piece_and_no_done(make):
    """As transformers' own server ends its streams."""

    async def plain(exchange):
        await exchange.head()
        await exchange.say("one")
        choice = {"delta": {}, "finish_reason": "length"}
        usage = {"prompt_tokens": 3, "completion_tokens": 5}
        await exchange.event({"choices": [choice], "usage": usage})

    with FaultyServer(plain) as server:
        got = ask(make(server), max_new_tokens=5)
        assert (got.text, got.chunks[-1].finish, got.tokens) == ("one", "length", 5)


def test_characters_split_over_packets_and_odd_line_ends(make):
    async def split(exchange):
        await exchange.head()
        data = json.dumps({"choices": [{"text": "日本 🌈 é"}]}, ensure_ascii=False).encode()
        for byte in b": ping\r\n\r\nevent: message\r\ndata:" + data + b"\r\n\r\n":
            await exchange.raw(bytes([byte]))
            await asyncio.sleep(0)
        await exchange.say("!", "stop")

    with FaultyServer(split) as server:
        assert ask(make(server), "Hi", max_new_tokens=8).text == "日本 🌈 é!"


def test_stop_strings_are_found_here_and_the_server_is_left(make):
    async def deaf(exchange):
        await exchange.head()
        for word in ("one ", "two ", "th", "ree", " four", " five"):
            await exchange.say(word)
        await exchange.hold()

    with FaultyServer(deaf) as server:
        got = ask(make(server), "Count", max_new_tokens=50, stop=("never", "three"))
        assert (got.text, got.chunks[-1].finish) == ("one two ", "stop")
        assert got.tokens == got.chunks[-1].new_tokens == 4
        assert server.left.acquire(timeout=5)


def test_tool_calls_are_on_the_last_chunk(make):
    async def calls(exchange):
        await exchange.head()
        for part in ({"index": 0, "id": "c", "function": {"name": "f", "arguments": "{"}},):
            await exchange.event({"choices": [{"delta": {"tool_calls": [part]}}]})
        more = {"index": 0, "function": {"arguments": "}"}}
        choice = {"delta": {"tool_calls": [more]}, "finish_reason": "tool_calls"}
        await exchange.event({"choices": [choice]})
        await exchange.usage(3, 9)

    tools = (ToolSpec("f", "", '{"type": "object"}'),)
    with FaultyServer(calls, answer) as server:
        engine = make(server)
        listener = Listener()
        turns = (ChatTurn("user", "Hi"),)
        engine.submit(GenerationJob("t", turns, tools=tools), listener)
        last = listener.wait(10)
        assert (last.finish, last.tool_calls) == ("stop", (ToolCall("f", "{}", "c"),))
        assert listener.text == ""
        listener = Listener()
        engine.submit(GenerationJob("t", turns, tools=tools, tool_choice="required"), listener)
        assert isinstance(listener.wait(10).error, GrammarIgnored)


def test_log_probabilities_go_with_their_tokens(make):
    async def told(exchange):
        await exchange.head()
        for word in ("He", "llo", " you"):
            found = {"content": [{"token": word, "logprob": -1.0}]}
            await exchange.say(word, logprobs=found)
        await exchange.say("", "stop")

    async def untold(exchange):
        await exchange.head()
        await exchange.say("He", "stop")

    with FaultyServer(told, answer, untold) as server:
        engine = make(server)
        got = ask(engine, (ChatTurn("user", "Hi"),), max_new_tokens=8, logprobs=0, stop=("lloX",))
        assert [t.token for c in got.chunks for t in c.logprobs] == ["He", "llo", " you"]
        assert all(len(c.logprobs) == c.tokens for c in got.chunks)
        fails(engine, RemoteBroken, logprobs=0)
        fails(engine, RemoteBroken, logprobs=0)


@pytest.mark.parametrize(
    ("grammar", "server_kind", "words"),
    [
        (Grammar("json_schema", '{"type": "object", "required": ["a"]}'), "openai", ("{}",)),
        (Grammar("json_schema", '{"type": "object"}'), "openai", ("Sure: ", "{}")),
        (Grammar("choices", '["yes", "no"]'), "vllm", ("may", "be")),
    ],
)
def test_a_server_that_ignores_the_grammar_is_found_out(make, grammar, server_kind, words):
    async def deaf(exchange):
        await answer(exchange, *words)

    async def good(exchange):
        await answer(exchange, *(("no",) if grammar.kind == "choices" else ('{"a"', ": 1}")))

    with FaultyServer(deaf, good) as server:
        engine = make(server, server=server_kind)
        fails(engine, GrammarIgnored, grammar=grammar)
        got = ask(engine, "Hi", max_new_tokens=8, grammar=grammar)
        assert got.chunks[-1].finish == "stop"


def test_tenants_have_salts_of_their_own(make):
    with FaultyServer() as server:
        engine = make(server, server="vllm")
        for number, tenant in enumerate("aba"):
            listener = Listener()
            engine.submit(GenerationJob(str(number), "Hi", tenant=tenant), listener)
            listener.wait(10)
        salts = [r.body["cache_salt"] for r in server.requests]
        assert salts[0] == salts[2] != salts[1]


# ---------------------------------------------------------------- faults before the first token


async def rude(exchange):
    """Hang up without a word."""


async def overloaded(exchange):
    await exchange.json(500, {"error": {"message": "boom"}})


@pytest.mark.parametrize("fault", [rude, overloaded])
def test_what_may_pass_is_tried_again(make, fault):
    with FaultyServer(fault, fault, answer) as server:
        engine = make(server)
        got = ask(engine, max_new_tokens=8)
        assert got.text == "Hello there."
        assert len(server.requests) == 3
        assert engine.statistics().finished == 1


@pytest.mark.parametrize("fault", [rude, overloaded])
def test_but_not_for_ever(make, fault):
    with FaultyServer(fault) as server:
        got = fails(make(server), RemoteUnreachable)
        assert len(server.requests) == 3
        assert got.text == ""


def test_a_text_that_was_not_delivered_may_come_again(make):
    async def breaks(exchange):
        await exchange.head()
        await exchange.say("He")

    with FaultyServer(breaks, answer) as server:
        got = ask(make(server), max_new_tokens=8, stop=("Hey",))
        assert got.text == "Hello there."
        assert got.tokens == 3


def test_retry_after_is_honoured(make):
    async def later(exchange):
        await exchange.json(429, {"error": "slow down"}, Retry_After="0.3")

    with FaultyServer(later, answer) as server:
        began = time.monotonic()
        assert ask(make(server), max_new_tokens=8).text == "Hello there."
        assert time.monotonic() - began >= 0.3


def test_a_pause_that_is_too_long_or_never_ends_is_told(make):
    async def much_later(exchange):
        await exchange.json(429, {"error": "quota"}, Retry_After="600")

    async def busy(exchange):
        await exchange.json(503, "no room")

    with FaultyServer(much_later) as server:
        got = fails(make(server), ServerBusy)
        assert got.chunks[-1].error.retry_after_s == 600
        assert len(server.requests) == 1
    with FaultyServer(busy) as server:
        got = fails(make(server), ServerBusy)
        assert isinstance(got.chunks[-1].error, EngineBusy)
        assert len(server.requests) == 3


def test_a_deadline_is_not_slept_over(make):
    async def later(exchange):
        await exchange.json(429, {"error": "slow down"}, Retry_After="5")

    with FaultyServer(later) as server:
        engine, listener = make(server), Listener()
        began = time.monotonic()
        engine.submit(
            GenerationJob("d", "Hi", SamplingParams(), deadline_s=time.monotonic() + 1), listener
        )
        assert isinstance(listener.wait(4).error, ServerBusy)
        assert time.monotonic() - began < 4


def test_nobody_listens(make):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        engine = make(f"http://127.0.0.1:{taken.getsockname()[1]}/v1")
        error = fails(engine, RemoteUnreachable).chunks[-1].error
        assert "Start the server" in error.remedy


@pytest.mark.parametrize(
    ("status", "kind", "word"),
    [
        (401, RemoteRefused, "api_key_env"),
        (403, RemoteRefused, "api_key_env"),
        (404, RemoteRefused, "/models"),
        (422, RemoteRefused, "correct the request"),
        (302, RemoteRefused, "redirects"),
    ],
)
def test_refusals_are_not_repeated(make, status, kind, word):
    async def refuses(exchange):
        await exchange.json(status, {"error": {"message": "no"}}, Location="http://127.0.0.1:1/")

    with FaultyServer(refuses) as server:
        engine = make(server)
        error = fails(engine, kind).chunks[-1].error
        assert word in error.remedy
        assert error.status == status
        assert len(server.requests) == 1
        for _ in range(6):
            fails(engine, kind)
        assert engine._breaker.state(time.monotonic()) == "closed", "the server is there"


def test_a_prompt_that_is_too_long_there(make):
    async def refuses(exchange):
        await exchange.json(400, {"message": "This model's maximum context length is 64 tokens"})

    with FaultyServer(refuses) as server:
        error = fails(make(server), PromptTooLong).chunks[-1].error
        assert error.limit_tokens == 64


# ---------------------------------------------------------------- faults of streams


async def silent(exchange):
    await exchange.hold()


async def silent_after_the_head(exchange):
    await exchange.head()
    await exchange.event({"choices": [{"delta": {"role": "assistant"}}]})
    await exchange.hold()


async def pings(exchange):
    await exchange.head()
    while not exchange.gone.is_set():
        await exchange.raw(b": still here\n\n")
        await asyncio.sleep(0.02)


@pytest.mark.parametrize("fault", [silent, silent_after_the_head, pings])
def test_a_first_token_that_does_not_come(make, fault):
    with FaultyServer(fault) as server:
        began = time.monotonic()
        got = fails(make(server), RemoteBroken)
        assert 0.4 <= time.monotonic() - began < 3
        assert "first_token_timeout_s" in got.chunks[-1].error.remedy
        assert len(server.requests) == 1
        assert server.left.acquire(timeout=5), "the server was told"


async def stalls(exchange):
    await exchange.head()
    await exchange.say("Hello")
    await exchange.hold()


async def drips(exchange):
    """Bytes come, and never a whole event."""
    await exchange.head()
    await exchange.say("Hello")
    while not exchange.gone.is_set():
        await exchange.raw(b"x")
        await asyncio.sleep(0.02)


@pytest.mark.parametrize("fault", [stalls, drips])
def test_a_stream_that_falls_silent(make, fault):
    with FaultyServer(fault) as server:
        got = fails(make(server), RemoteBroken)
        assert got.text == "Hello"
        assert "stall_timeout_s" in got.chunks[-1].error.remedy
        assert server.left.acquire(timeout=5)


def test_a_slow_stream_is_not_a_silent_one(make):
    async def slow(exchange):
        await exchange.head()
        for word in ("one", "two", "three", "four", "five"):
            await asyncio.sleep(0.12)
            await exchange.say(word + ".")
        await exchange.say("", "stop")

    with FaultyServer(slow) as server:
        assert ask(make(server), max_new_tokens=8).text == "one.two.three.four.five."


async def cut(exchange):
    await exchange.head()
    await exchange.say("Hello")


async def cut_within_an_event(exchange):
    await exchange.head()
    await exchange.say("Hello")
    await exchange.raw(b'data: {"choices": [{"te')


async def done_without_an_end(exchange):
    await exchange.head()
    await exchange.say("Hello")
    await exchange.event("[DONE]")


async def chunked_and_cut(exchange):
    await exchange.raw(
        b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
    )
    event = b'data: {"choices": [{"text": "Hello", "delta": {"content": "Hello"}}]}\n\n'
    await exchange.raw(b"%x\r\n%s\r\n5\r\nda" % (len(event), event))


async def garbage(exchange):
    await exchange.head()
    await exchange.say("Hello")
    await exchange.event('{"choices": [{"text": }]}')


async def error_in_the_stream(exchange):
    await exchange.head()
    await exchange.say("Hello")
    await exchange.event({"error": {"message": "CUDA out of memory", "code": 500}})


@pytest.mark.parametrize(
    "fault", [cut, cut_within_an_event, done_without_an_end, chunked_and_cut, garbage]
)
def test_half_an_answer_is_never_taken_for_a_whole_one(make, fault):
    with FaultyServer(fault) as server:
        engine = make(server)
        got = fails(engine, RemoteBroken)
        assert got.text == "Hello"
        assert len(server.requests) == 1, "what was delivered cannot be taken back"
        assert engine.statistics().failed == 1


def test_an_error_in_the_stream_is_told_in_the_servers_words(make):
    with FaultyServer(error_in_the_stream) as server:
        got = fails(make(server), RemoteUnreachable)
        assert "CUDA out of memory" in str(got.chunks[-1].error)


async def garbage_with_the_end(exchange):
    """What is wrong with the last event is not overlooked because it is the last."""
    await exchange.head()
    await exchange.say("x" * 5000, "stop")


async def half_a_call(exchange):
    await exchange.head()
    call = {"index": 0, "function": {"name": "f", "arguments": "{"}}
    await exchange.event({"choices": [{"delta": {"tool_calls": [call]}, "finish_reason": "stop"}]})


async def html(exchange):
    await exchange.head(200, "text/html")
    await exchange.raw(b"<html>Welcome to the proxy</html>")


async def not_a_stream(exchange):
    await exchange.json(200, {"choices": [{"message": {"content": "Hello"}}]})


async def zipped(exchange):
    await exchange.head(200, "text/event-stream", Content_Encoding="gzip")
    await exchange.raw(b"\x1f\x8b")


async def huge_line(exchange):
    await exchange.head()
    for _ in range(40):
        await exchange.raw(b"x" * (1 << 16))
    await exchange.hold()


async def only_empty_choices(exchange):
    await exchange.head()
    for _ in range(3):
        await exchange.event({"choices": []})


async def odd_end(exchange):
    await exchange.head()
    await exchange.say("Hello", "abort")


async def no_http(exchange):
    await exchange.raw(b"SSH-2.0-OpenSSH_9.6\r\n")


@pytest.mark.parametrize(
    ("fault", "kind"),
    [
        (garbage_with_the_end, RemoteBroken),
        (half_a_call, RemoteBroken),
        (html, RemoteBroken),
        (not_a_stream, RemoteBroken),
        (zipped, RemoteBroken),
        (huge_line, RemoteBroken),
        (only_empty_choices, RemoteBroken),
        (odd_end, RemoteBroken),
        (no_http, RemoteUnreachable),
    ],
)
def test_what_is_no_answer(make, fault, kind):
    with FaultyServer(fault) as server:
        got = fails(make(server, retries=0), kind)
        assert len(server.requests) == 1
        assert got.chunks[-1].error.url == server.url


def test_a_withheld_answer(make):
    async def filtered(exchange):
        await exchange.head()
        await exchange.say("", "content_filter")

    with FaultyServer(filtered) as server:
        assert "content filter" in str(fails(make(server), RemoteRefused).chunks[-1].error)


def test_a_server_that_goes_on_and_on_is_stopped(make):
    async def endless(exchange):
        await exchange.head()
        while not exchange.gone.is_set():
            await exchange.say("on and ")
            await asyncio.sleep(0)

    with FaultyServer(endless) as server:
        got = fails(make(server), RemoteBroken, max_new_tokens=4)
        assert got.tokens <= 4
        assert len(got.text) < 2000
        assert server.left.acquire(timeout=5)


def test_repeated_pieces_after_the_end_change_nothing(make):
    async def twice(exchange):
        await exchange.head()
        for _ in range(2):
            await exchange.say("Hello", "stop")
            await exchange.usage(3, 1)
            await exchange.event("[DONE]")

    with FaultyServer(twice) as server:
        got = ask(make(server), max_new_tokens=8)
        assert (got.text, got.tokens) == ("Hello", 1)


# ---------------------------------------------------------------- breaker, limits, budget


def test_a_failing_server_is_left_alone_and_found_again(make):
    with FaultyServer(*[overloaded] * 5, answer) as server:
        engine = make(server, retries=0)
        for _ in range(5):
            fails(engine, RemoteUnreachable)
        with pytest.raises(ServerDown) as caught:
            engine.submit(job("Hi"), Listener())
        assert isinstance(caught.value, EngineBusy)
        assert 0 < caught.value.retry_after_s <= 0.2
        assert len(server.requests) == 5
        assert settle(lambda: engine._breaker.state(time.monotonic()) == "half-open")
        assert ask(engine, max_new_tokens=8).text == "Hello there."
        assert ask(engine, max_new_tokens=8).text == "Hello there."


def test_those_that_wait_when_it_opens_are_told(make):
    with FaultyServer(overloaded) as server:
        engine = make(server, retries=0, max_concurrent=1, kind=RemoteEngine)
        listeners = [Listener() for _ in range(12)]
        for listener in listeners:
            engine.submit(job("Hi"), listener)
        errors = [type(listener.wait(10).error) for listener in listeners]
        assert errors == [RemoteUnreachable] * 5 + [ServerDown] * 7
        assert len(server.requests) == 5


def test_no_more_at_a_time_than_allowed_and_connections_are_used_again(make):
    async def keeps(exchange):
        """Answers on a connection that stays open, as real servers do."""
        await exchange.raw(
            b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n"
        )
        await exchange.say("a")
        await asyncio.sleep(0.02)
        await exchange.say("b", "stop")

    with FaultyServer(keeps) as server:
        engine = make(server, max_concurrent=3)
        listeners = [Listener() for _ in range(20)]
        for listener in listeners:
            engine.submit(job("Hi"), listener)
        for listener in listeners:
            assert listener.wait(10).finish == "stop"
            assert listener.text == "ab"
        assert 1 < server.most_at_once <= 3


def test_tokens_per_minute(make):
    async def one(exchange):
        await answer(exchange, "a", usage=False)

    with FaultyServer(one) as server:
        # 1,200 a minute are 20 a second. Each of these is estimated at 1 + 99; two fit at once.
        engine = make(server, tokens_per_minute=1200)
        engine._budget.take(1000, time.monotonic())
        listeners = [Listener() for _ in range(3)]
        for listener in listeners:
            engine.submit(job("Hey", max_new_tokens=99), listener)
        # What they did not use comes back, or the third would wait for five seconds.
        assert all(listener.wait(10).queued_s < 4 for listener in listeners)
        with pytest.raises(PromptTooLong) as caught:
            engine.submit(job("Hey", max_new_tokens=1300), Listener())
        assert "tokens_per_minute" in caught.value.limit


def test_who_finds_the_budget_spent_waits_for_it(make):
    with FaultyServer() as server:
        engine = make(server, tokens_per_minute=6000)
        engine._budget.take(6000, time.monotonic())
        listener = Listener()
        engine.submit(job("Hey", max_new_tokens=49), listener)
        assert engine.statistics().waiting == 1
        # 50 tokens at 100 a second.
        assert 0.3 < listener.wait(10).queued_s < 5


def test_the_policy_decides_who_is_sent(make):
    class Backwards:
        """Last in, first out."""

        def __init__(self):
            self.keys, self.told, self.gone = [], [], []

        def add(self, request, now_s):
            self.keys.append(request.key)

        def remove(self, key, now_s):
            self.keys.remove(key)

        def first(self, now_s):
            return self.keys[-1] if self.keys else None

        def served(self, tenant, agent, read, written, now_s):
            self.told.append((tenant, read, written))

        def victim(self, running, now_s):
            raise AssertionError("a server cannot put a request back")

    async def opens(exchange):
        await server.gate.wait()
        await answer(exchange)

    with FaultyServer(opens) as server:
        engine = make(server, max_concurrent=1, first_token_timeout_s=5)
        ends = []
        listeners = {}
        for name in ("first", "a", "b", "c"):
            listeners[name] = Listener()

            def deliver(chunk, name=name):
                listeners[name](chunk)
                if chunk.finish:
                    ends.append(name)

            engine.submit(GenerationJob(name, "Hi", tenant="t"), deliver)
            if name == "first":
                assert settle(lambda: engine.statistics().running == 1)
        policy = Backwards()
        engine.use_policy(policy)
        assert engine.cancel("b")
        assert listeners["b"].wait(5).finish == "cancelled"
        server.open()
        for listener in listeners.values():
            listener.wait(10)
        assert ends == ["b", "first", "c", "a"]
        assert not policy.keys
        assert sum(w for _, _, w in policy.told) == 9
        assert sum(r > 0 for _, r, _ in policy.told) == 3


# ---------------------------------------------------------------- cancel, pause, close


def test_cancel_reaches_the_server(make):
    for behaviour in (stalls, silent):
        with FaultyServer(behaviour) as server:
            engine, listener = (
                make(server, stall_timeout_s=30, first_token_timeout_s=30),
                Listener(),
            )
            engine.submit(job("Hi", job_id="c"), listener)
            assert settle(lambda: len(server.requests) == 1)
            if behaviour is stalls:
                assert listener.first.wait(5)
            assert engine.cancel("c")
            assert listener.wait(5).finish == "cancelled"
            assert server.left.acquire(timeout=5), "the server saw it"
            assert not engine.cancel("c")
            assert engine.statistics().cancelled == 1


def test_cancel_during_a_pause_between_attempts(make):
    async def later(exchange):
        await exchange.json(429, {"error": "slow down"}, Retry_After="30")

    with FaultyServer(later) as server:
        engine, listener = make(server), Listener()
        engine.submit(job("Hi", job_id="c"), listener)
        assert settle(lambda: len(server.requests) == 1)
        assert engine.cancel("c")
        assert listener.wait(5).finish == "cancelled"


def test_pause_stops_reading_until_the_server_has_to_wait(make):
    sent = []

    async def pours(exchange):
        await exchange.head()
        for number in range(600):
            await exchange.say(f"{number} ", padding="x" * 60_000)
            sent.append(number)
        await exchange.say("end", "stop")

    with FaultyServer(pours) as server:
        engine, listener = make(server, stall_timeout_s=0.5), Listener()
        engine.submit(job("Hi", job_id="p", max_new_tokens=1000), listener)
        assert listener.first.wait(5)
        assert engine.pause("p")
        assert not engine.pause("nobody")

        def still():
            before = (len(listener.chunks), len(sent))
            time.sleep(0.1)
            return (len(listener.chunks), len(sent)) == before

        assert settle(still)
        assert len(sent) < 590, "its buffers are full, and it waits"
        # Longer than the limit of a stream that falls silent: it was this side that was silent.
        time.sleep(0.8)
        assert not listener.done.is_set()
        assert engine.resume("p")
        assert listener.wait(20).finish == "stop"
        assert listener.text == "".join(f"{n} " for n in range(600)) + "end"


def test_a_server_that_is_silent_after_a_pause_is_found_out(make):
    async def silent_later(exchange):
        await exchange.head()
        await exchange.say("a")
        await server.gate.wait()
        await exchange.say("b")
        await exchange.hold()

    with FaultyServer(silent_later) as server:
        engine, listener = make(server, stall_timeout_s=1), Listener()
        engine.submit(job("Hi", job_id="p", max_new_tokens=8), listener)
        assert listener.first.wait(5)
        assert engine.pause("p")
        server.open()
        assert engine.resume("p")
        assert isinstance(listener.wait(10).error, RemoteBroken)
        assert listener.text == "ab"


def test_a_paused_job_can_be_cancelled_and_closed(make):
    with FaultyServer(stalls) as server:
        engine = make(server, stall_timeout_s=30)
        listeners = [Listener(), Listener()]
        for number, listener in enumerate(listeners):
            engine.submit(job("Hi", job_id=str(number)), listener)
            assert listener.first.wait(5)
            assert engine.pause(str(number))
        assert engine.cancel("0")
        assert listeners[0].wait(5).finish == "cancelled"
        engine.close()
        assert isinstance(listeners[1].wait(1).error, EngineFailed)
        assert server.left.acquire(timeout=5)
        assert server.left.acquire(timeout=5)


def test_close_ends_everything(make):
    with FaultyServer(silent) as server:
        names = {t.name for t in threading.enumerate()}
        engine = make(server, max_concurrent=2, first_token_timeout_s=30)
        listeners = [Listener() for _ in range(5)]
        for listener in listeners:
            engine.submit(job("Hi"), listener)
        assert settle(lambda: len(server.requests) == 2)
        began = time.monotonic()
        engine.close()
        assert time.monotonic() - began < 5
        for listener in listeners:
            last = listener.wait(1)
            assert last.finish == "error"
            assert type(last.error) is EngineFailed
        engine.close()
        assert {t.name for t in threading.enumerate()} <= names
        with pytest.raises(EngineFailed):
            engine.submit(job("Hi"), Listener())
        assert not engine.cancel("x")
        assert server.left.acquire(timeout=5)
        assert server.left.acquire(timeout=5)


def test_close_from_within_deliver(make):
    with FaultyServer() as server:
        engine = make(server)
        ended = threading.Event()

        def deliver(chunk):
            engine.close()
            if chunk.finish:
                ended.set()

        engine.submit(job("Hi"), deliver)
        assert ended.wait(5)


# ---------------------------------------------------------------- refused at once


@pytest.mark.parametrize("url", ["", "localhost:8000", "ftp://x/v1", "http://u:p@x/v1", "http://"])
def test_impossible_addresses(make, url):
    with pytest.raises(EngineFailed, match="url"):
        make(url)


def test_no_server_is_named():
    with pytest.raises(EngineFailed):
        RemoteEngine(EngineOptions("chat", Path()))


@pytest.mark.parametrize("text", ["a <|im_end|> b", "<|start_header_id|>", "<｜User｜>"])
def test_control_tokens_in_texts_are_refused(make, text):
    engine = make("http://127.0.0.1:1/v1")
    for prompt in (text, (ChatTurn("user", text),)):
        with pytest.raises(InvalidParams, match="control token"):
            engine.submit(job(prompt), Listener())
    for harmless in ("a <b> c | d", "<|", "x <- y |> z", "<p>a|b</p>"):
        engine._prompts.refuse_controls(job(harmless))


def test_limits_are_known_before_anything_is_sent(make):
    engine = make("http://127.0.0.1:1/v1", options={"max_waiting": 1}, context_tokens=100)
    assert engine.context_tokens == 100
    assert engine.step_time() is None
    with pytest.raises(PromptTooLong):
        engine.submit(job("Hi", max_new_tokens=101), Listener())
    with pytest.raises(PromptTooLong):
        engine.submit(job("word " * 1000), Listener())
    with pytest.raises(InvalidParams):
        engine.submit(job("Hi", top_k=4), Listener())


def test_a_full_engine_says_when_to_come_back(make):
    with FaultyServer(silent) as server:
        engine = make(server, options={"max_waiting": 1}, first_token_timeout_s=30)
        engine.submit(job("Hi", job_id="a"), Listener())
        with pytest.raises(EngineBusy):
            engine.submit(job("Hi"), Listener())


# ---------------------------------------------------------------- adapters


def test_adapters_are_those_that_the_server_lists_for_this_model(make):
    async def serves(exchange):
        if exchange.path.endswith("/models"):
            cards = [
                {"id": "m"},
                {"id": "law", "parent": "m"},
                {"id": "poems", "parent": "another"},
            ]
            await exchange.json(200, {"data": cards})
        else:
            await answer(exchange)

    with FaultyServer(serves) as server:
        engine = make(server, options={"max_adapters": 1})
        with pytest.raises(UnknownAdapter):
            engine.submit(GenerationJob("a", "Hi", adapter="law"), Listener())
        for name in ("poems", "m", "nobody"):
            with pytest.raises(AdapterUnusable):
                engine.load_adapter(name, Path())
        assert engine.load_adapter("law", Path()) == 0
        assert engine.load_adapter("law", Path()) == 0
        assert engine.statistics().adapters == ("law",)
        with pytest.raises(AdaptersFull):
            engine.load_adapter("other", Path())
        listener = Listener()
        engine.submit(GenerationJob("a", "Hi", adapter="law"), listener)
        assert listener.wait(10).finish == "stop"
        assert server.requests[-1].body["model"] == "law"
        engine.unload_adapter("law")
        with pytest.raises(UnknownAdapter):
            engine.unload_adapter("law")
        with pytest.raises(UnknownAdapter):
            engine.submit(GenerationJob("b", "Hi", adapter="law"), Listener())


def test_adapters_of_a_server_that_does_not_list_them(make):
    async def refuses(exchange):
        await exchange.json(404, {"detail": "Not Found"})

    with FaultyServer(refuses) as server:
        engine = make(server, options={"max_adapters": 1})
        with pytest.raises(RemoteRefused):
            engine.load_adapter("law", Path())
