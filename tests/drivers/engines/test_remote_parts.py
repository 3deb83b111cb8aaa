"""The parts of the remote engine that need no server."""

import json
import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmos.drivers.engines.breaker import CircuitBreaker, backoff_s
from llmos.drivers.engines.budget import TokenBudget
from llmos.drivers.engines.remote_answer import Answer, BadEvent, ServerSaid
from llmos.drivers.engines.remote_faults import fault_of
from llmos.drivers.engines.remote_servers import ABILITIES, check_abilities, mismatch, request_of
from llmos.drivers.engines.sse import EventReader, LineTooLong
from llmos.drivers.errors import (
    InvalidGrammar,
    InvalidParams,
    PromptTooLong,
    RemoteRefused,
    RemoteUnreachable,
    ServerBusy,
)
from llmos.drivers.protocols import (
    ChatTurn,
    GenerationJob,
    Grammar,
    RemoteOptions,
    SamplingParams,
    ToolCall,
    ToolSpec,
)

# ---------------------------------------------------------------- events


def read(*pieces: bytes, max_bytes=1000) -> list[bytes]:
    reader = EventReader(max_bytes)
    events = [e for piece in pieces for e in reader.push(piece)]
    return events + reader.flush()


STREAM = (
    "\ufeff: hello\r\ndata: Grüße 🌈\r\n\r\nevent: x\rid: 3\rdata:a\rdata: b\r\rdata\n\n\ndata: end"
)
EVENTS = ["Grüße 🌈".encode(), b"a\nb", b"", b"end"]


def test_events_are_read_as_the_standard_says():
    assert read(STREAM.encode()) == EVENTS


@given(st.lists(st.integers(0, len(STREAM.encode())), max_size=12))
def test_events_do_not_depend_on_how_the_bytes_are_cut(cuts):
    data, at = STREAM.encode(), [0, *sorted(cuts), None]
    pieces = [data[a:b] for a, b in pairwise(at)]
    assert read(*pieces) == EVENTS


def test_each_event_comes_as_soon_as_it_is_whole():
    reader = EventReader(100)
    assert reader.push(b"data: a\r\n\r") == [b"a"]
    assert reader.push(b"\ndata: b\n\n") == [b"b"]
    assert reader.push(b"") == []


@pytest.mark.parametrize("filler", [b"data: " + b"x" * 200, b"data: x\n" * 40, b":" + b"y" * 200])
def test_an_endless_event_is_refused(filler):
    with pytest.raises(LineTooLong):
        read(filler, filler, max_bytes=150)


# ---------------------------------------------------------------- breaker and backoff


def test_a_breaker_opens_probes_and_closes():
    breaker = CircuitBreaker(failures=2, pause_s=1, longest_s=4)
    for now in (0.0, 0.1):
        breaker.failed(breaker.begin(now), now)
    assert breaker.state(0.2) == "open"
    assert breaker.begin(0.2) is None
    assert breaker.retry_after_s(0.2) == pytest.approx(0.9)
    assert breaker.state(1.1) == "half-open"
    for pause, now in ((2, 1.2), (4, 3.3), (4, 7.4)):
        probe = breaker.begin(now)
        assert probe is not None
        assert breaker.begin(now) is None, "one probe at a time"
        breaker.failed(probe, now)
        assert breaker.retry_after_s(now) == pytest.approx(pause)
    assert breaker.begin(12) is not None
    breaker.succeeded()
    assert breaker.state(12) == "closed"
    assert breaker.retry_after_s(12) == 0
    breaker.failed(breaker.begin(12), 12)
    assert breaker.state(12) == "closed", "failures are counted anew"


def test_a_probe_that_was_given_up_lets_the_next_one_through():
    breaker = CircuitBreaker(failures=1, pause_s=1)
    breaker.failed(breaker.begin(0), 0)
    breaker.gave_up(breaker.begin(1))
    assert breaker.begin(1) is not None


@given(
    st.integers(1, 4),
    st.lists(
        st.tuples(st.sampled_from(["begin", "ok", "bad", "quit"]), st.floats(0, 3), st.integers(0)),
        max_size=60,
    ),
)
def test_a_breaker_keeps_its_promises(limit, steps):
    breaker = CircuitBreaker(limit, pause_s=1, longest_s=8)
    now, running, probes = 0.0, [], []
    for what, later, choice in steps:
        now += later
        state = breaker.state(now)
        if what == "begin":
            attempt = breaker.begin(now)
            if state == "open":
                assert attempt is None
                assert 0 < breaker.retry_after_s(now) <= 8
            if state == "closed":
                assert attempt is not None
            if attempt is not None:
                assert state == "closed" or not probes, "one probe at a time"
                running.append(attempt)
                if state == "half-open":
                    probes.append(attempt)
        elif running:
            attempt = running.pop(choice % len(running))
            stale = attempt != breaker._round
            before = breaker.state(now), breaker.failures
            if what == "ok":
                breaker.succeeded()
                assert breaker.state(now) == "closed"
                probes.clear()
            elif what == "bad":
                breaker.failed(attempt, now)
                if stale:
                    assert (breaker.state(now), breaker.failures) == before
                else:
                    probes = [p for p in probes if p != attempt]
                    assert breaker.state(now) == (
                        "open" if before[0] != "closed" or breaker.failures >= limit else "closed"
                    )
            else:
                breaker.gave_up(attempt)
                probes = [p for p in probes if p != attempt]
        breaker.validate()
    # However long it was down: some time later it is asked again.
    if not probes:
        assert breaker.state(now + 8.1) != "open"


@given(st.integers(1, 200), st.floats(0, 1, exclude_max=True))
def test_backoff_is_spread_over_a_bound_that_doubles(attempt, chance):
    bound = min(20.0, 0.25 * 2.0 ** min(attempt - 1, 60))
    assert backoff_s(attempt, chance) == chance * bound


@pytest.mark.parametrize(("attempt", "chance"), [(0, 0.5), (1, 1.0), (1, -0.1), (1, math.nan)])
def test_impossible_backoffs_are_refused(attempt, chance):
    with pytest.raises(ValueError, match="attempt"):
        backoff_s(attempt, chance)


# ---------------------------------------------------------------- budget


@given(
    st.integers(1, 10_000),
    st.lists(st.tuples(st.integers(1, 12_000), st.floats(0, 5), st.floats(0, 1.5)), max_size=40),
)
def test_no_minute_has_more_tokens_than_two_buckets(limit, asks):
    budget, now, taken = TokenBudget(limit, 0.0), 0.0, []
    for tokens, later, used in asks:
        now += later
        wait = budget.wait_s(tokens, now)
        if tokens > limit:
            assert wait == math.inf
            continue
        now += wait + 1e-9
        assert budget.wait_s(tokens, now) <= 1e-3
        budget.take(tokens, now)
        really = int(tokens * min(used, 1.0))
        budget.take(really - tokens, now)
        taken.append((now, really))
        assert budget.level(now) <= limit
    for at, _ in taken:
        # A full bucket and what flows in: the classic bound.
        assert sum(n for t, n in taken if at <= t <= at + 60) <= 2 * limit + len(taken)


def test_a_debt_is_waited_for_and_no_limit_is_none():
    budget = TokenBudget(60, 0.0)
    budget.take(50, 0.0)
    budget.take(40, 0.0)
    assert budget.level(0.0) == -30
    assert budget.wait_s(10, 0.0) == pytest.approx(40)
    assert budget.level(-5.0) == -30, "a clock that goes back fills nothing"
    free = TokenBudget(0, 0.0)
    free.take(10**9, 0.0)
    assert free.wait_s(10**9, 0.0) == 0


# ---------------------------------------------------------------- answers


def event(**choice) -> bytes:
    return json.dumps({"choices": [{"index": 0, **choice}]}).encode()


def test_an_answer_of_each_endpoint():
    for key in ("delta", "text"):
        answer = Answer(wants_logprobs=False)
        said = "Hi" if key == "text" else {"content": "Hi"}
        assert answer.take(event(**{key: said})).text == "Hi"
        answer.take(event(**{key: "" if key == "text" else {}}, finish_reason="length"))
        assert answer.finish == "length"
        counts = {"prompt_tokens": 5, "completion_tokens": 2}
        counts["prompt_tokens_details"] = {"cached_tokens": 3}
        answer.take(json.dumps({"choices": [], "usage": counts}).encode())
        assert (answer.prompt_tokens, answer.new_tokens, answer.cached_tokens) == (5, 2, 3)
        answer.take(b"[DONE]")
        assert answer.done


def test_tool_calls_come_in_pieces():
    answer = Answer(wants_logprobs=False)
    parts = [
        {"index": 0, "id": "a", "function": {"name": "add", "arguments": ""}},
        {"index": 0, "function": {"arguments": '{"x":'}},
        {"index": 1, "id": "b", "function": {"name": "now", "arguments": None}},
        {"index": 0, "function": {"arguments": " 1}"}},
    ]
    for part in parts:
        assert answer.take(event(delta={"tool_calls": [part]})).tokens == 1
    answer.take(event(delta={}, finish_reason="tool_calls"))
    assert answer.finish == "stop"
    assert answer.tool_calls == (ToolCall("add", '{"x": 1}', "a"), ToolCall("now", "{}", "b"))


@pytest.mark.parametrize("arguments", ["{", "[1]", "null"])
def test_arguments_that_are_no_object(arguments):
    answer = Answer(wants_logprobs=False)
    answer.take(event(delta={"tool_calls": [{"function": {"name": "f", "arguments": arguments}}]}))
    with pytest.raises(BadEvent, match="'f'"):
        _ = answer.tool_calls


def test_log_probabilities_of_both_endpoints():
    chat = {
        "content": [
            {"token": "a", "logprob": -0.5, "top_logprobs": [{"token": "b", "logprob": -0.7}]},
            {"token": "c", "logprob": -1},
        ]
    }
    plain = {"tokens": ["a"], "token_logprobs": [-0.5], "top_logprobs": [{"b": -2, "a": -0.5}]}
    answer = Answer(wants_logprobs=True)
    piece = answer.take(event(delta={"content": "ac"}, logprobs=chat))
    assert piece.tokens == 2
    assert [(t.token, t.logprob, t.likeliest) for t in piece.logprobs] == [
        ("a", -0.5, (("b", -0.7),)),
        ("c", -1.0, ()),
    ]
    piece = answer.take(event(text="a", logprobs=plain))
    assert piece.logprobs[0].likeliest == (("a", -0.5), ("b", -2.0))
    with pytest.raises(BadEvent, match="asked for"):
        answer.take(event(delta={"content": "x"}))
    with pytest.raises(BadEvent):
        answer.take(event(delta={"content": "x"}, logprobs={"content": [{"token": "x"}]}))


@pytest.mark.parametrize(
    "data",
    [
        b"{",
        b"[]",
        b"3",
        b"\xff\xfe",
        b"{}",
        b"[" * 100_000,
        b'{"choices": 3}',
        event(delta={"content": 3}),
        event(delta={"tool_calls": 3}),
        event(delta={"tool_calls": [3]}),
    ],
)
def test_garbage_is_told_as_such(data):
    with pytest.raises(BadEvent):
        Answer(wants_logprobs=False).take(data)


def test_errors_empty_choices_other_choices_and_repeated_ends():
    answer = Answer(wants_logprobs=False)
    with pytest.raises(ServerSaid, match="out of memory"):
        answer.take(b'{"error": {"message": "out of memory"}}')
    assert answer.take(b'{"choices": []}').text == ""
    assert answer.take(event(index=1, delta={"content": "other"})).text == ""
    assert answer.take(event(delta={"reasoning_content": "hm"})).tokens == 1
    answer.take(event(delta={"content": "x"}, finish_reason="stop"))
    assert answer.take(event(delta={"content": "x"}, finish_reason="length")).text == ""
    assert answer.finish == "stop"


def test_halves_of_characters_become_whole_text():
    answer = Answer(wants_logprobs=False)
    found = answer.take(b'{"choices": [{"text": "a\\ud83cb \\ud83c\\udf08"}]}').text
    assert found == "a\ufffdb 🌈"
    found.encode()


# ---------------------------------------------------------------- what servers can do


HI = (ChatTurn("user", "Hi"),)


def a_job(prompt=HI, prefix="", tools=(), **params) -> GenerationJob:
    return GenerationJob("j", prompt, SamplingParams(**params), prefix=prefix, tools=tools)


SCHEMA = Grammar("json_schema", '{"type": "object", "required": ["a"]}')
TOOL = ToolSpec("f", "does it", '{"type": "object"}')


@pytest.mark.parametrize(
    ("server", "job", "field"),
    [
        ("openai", a_job(top_k=3), "top_k"),
        ("openai", a_job(ignore_eos=True), "ignore_eos"),
        ("openai", a_job(prefix="Well"), "prefix"),
        ("ollama", a_job(top_k=3), "top_k"),
        ("llama.cpp", a_job(prefix="Well"), "prefix"),
        ("transformers", a_job(seed=1), "seed"),
        ("transformers", a_job(logprobs=0), "logprobs"),
        ("transformers", a_job(grammar=SCHEMA), "grammar"),
        ("sglang", a_job(seed=1), "seed"),
        ("openai", a_job(grammar=Grammar("regex", "a+")), "grammar"),
        ("vllm", a_job(grammar=Grammar("lark", "start: x")), "grammar"),
        ("vllm", a_job(grammar=SCHEMA, prefix="{"), "prefix"),
        ("vllm", a_job(tools=(TOOL,), prefix="{"), "prefix"),
    ],
)
def test_what_a_server_would_leave_out_is_refused(server, job, field):
    with pytest.raises(InvalidParams) as caught:
        check_abilities(server, job, renders=False)
    assert caught.value.field == field


@pytest.mark.parametrize(
    "grammar",
    [
        Grammar("json_schema", "{"),
        Grammar("json_schema", '{"type": "thing"}'),
        Grammar("regex", "("),
        Grammar("choices", "[]"),
        Grammar("choices", '{"a": 1}'),
    ],
)
def test_a_grammar_that_cannot_be_read(grammar):
    with pytest.raises(InvalidGrammar):
        check_abilities("vllm", a_job(grammar=grammar), renders=False)


@pytest.mark.parametrize("server", ABILITIES)
def test_every_server_is_told_the_whole_sampling(server):
    path, body = request_of(server, "m", a_job(temperature=0.5), rendered=None, salt="s")
    assert path == "/chat/completions"
    assert (body["model"], body["temperature"], body["top_p"]) == ("m", 0.5, 1.0)
    assert body["stream"] is True
    config = json.loads(body.get("generation_config", "{}"))
    told = {**body, **config}
    if ABILITIES[server].top_k:
        assert told["top_k"] in (0, -1)
    if server == "transformers":
        assert config["do_sample"] is True
        assert "stream_options" not in body
    assert ("cache_salt" in body) == (server in ("vllm", "sglang"))


def test_bodies_say_what_was_asked_for():
    stops = tuple("abcdef")
    job = a_job("Once", prefix=" upon", stop=stops, seed=4, logprobs=2)
    path, body = request_of("openai", "m", job, rendered=None, salt="")
    assert (path, body["prompt"], body["seed"], body["logprobs"]) == (
        "/completions",
        "Once upon",
        4,
        2,
    )
    assert body["stop"] == list("abcd"), "the API takes four"
    turns = (
        ChatTurn("user", "1+1?"),
        ChatTurn("assistant", "", (ToolCall("f", '{"x": 1}', "c1"),)),
        ChatTurn("tool", "2", tool_call_id="c1"),
    )
    job = a_job(turns, tools=(TOOL,), grammar=SCHEMA, logprobs=0, top_k=7, ignore_eos=True)
    path, body = request_of("vllm", "m", job, rendered=None, salt="")
    assert body["messages"][1]["tool_calls"][0]["function"] == {
        "name": "f",
        "arguments": '{"x": 1}',
    }
    assert body["messages"][2]["tool_call_id"] == "c1"
    assert body["tools"][0]["function"]["parameters"] == {"type": "object"}
    assert body["response_format"]["json_schema"]["schema"]["required"] == ["a"]
    assert body["logprobs"] is True
    assert "top_logprobs" not in body
    assert (body["top_k"], body["ignore_eos"]) == (7, True)
    path, body = request_of("vllm", "m", a_job(prefix="Well"), rendered=None, salt="")
    assert body["messages"][-1] == {"role": "assistant", "content": "Well"}
    assert (body["continue_final_message"], body["add_generation_prompt"]) == (True, False)
    path, body = request_of("openai", "m", a_job(prefix="W"), rendered="<u>Hi<a>W", salt="")
    assert (path, body["prompt"]) == ("/completions", "<u>Hi<a>W")
    for kind, source, field in (("choices", '["a", "b"]', "choice"), ("regex", "a+", "regex")):
        job = a_job(grammar=Grammar(kind, source))
        assert (
            field in request_of("vllm", "m", job, rendered=None, salt="")[1]["structured_outputs"]
        )
    job = a_job(grammar=Grammar("regex", "a+"))
    assert request_of("sglang", "m", job, rendered=None, salt="")[1]["regex"] == "a+"


@pytest.mark.parametrize(
    ("grammar", "text", "fits"),
    [
        (SCHEMA, '{"a": 1}', True),
        (SCHEMA, "{}", False),
        (SCHEMA, "Sure! Here is your JSON: {}", False),
        (Grammar("json_schema", '{"$ref": "http://localhost:1/x"}'), "{}", False),
        (Grammar("choices", '["yes", "no"]'), "no", True),
        (Grammar("choices", '["yes", "no"]'), "no.", False),
        (Grammar("regex", "[0-9]+"), "12", True),
        (Grammar("regex", "[0-9]+"), "12 apples", False),
    ],
)
def test_an_answer_is_held_against_its_grammar(grammar, text, fits):
    assert (mismatch(grammar, text) == "") == fits


# ---------------------------------------------------------------- refusals

OPTIONS = RemoteOptions("http://localhost:1/v1", "m", api_key="sk-secret", context_tokens=100)


def refusal(status, content="", options=OPTIONS, **headers):
    headers = {k.replace("_", "-"): v for k, v in headers.items()}
    return fault_of("chat", options, status, headers, content, (50, 10))


def test_refusals_say_what_to_do():
    fault = refusal(
        401, {"error": {"message": "bad key sk-secret"}}, RemoteOptions("http://x/v1", "m")
    )
    assert type(fault.error) is RemoteRefused
    assert "api_key_env of [models.chat.remote]" in fault.error.remedy
    fault = refusal(403, {"error": {"message": "Incorrect key sk-secret"}})
    assert "sk-secret" not in str(fault.error)
    fault = refusal(404, {"message": "The model `m` does not exist"})
    assert "http://localhost:1/v1/models" in fault.error.remedy
    assert "does not exist" in fault.error.reason
    fault = refusal(307)
    assert "redirects" in fault.error.remedy
    for quiet in (refusal(401), refusal(404), refusal(400, "no"), refusal(422)):
        assert not quiet.again
        assert not quiet.servers


@pytest.mark.parametrize(
    ("status", "content", "numbers"),
    [
        (
            400,
            {
                "message": "This model's maximum context length is 64 tokens. However, you requested 70"
            },
            (50, 64),
        ),
        (400, {"error": {"code": "context_length_exceeded", "message": "too much"}}, (50, 100)),
        (
            500,
            {"error": {"type": "exceed_context_size_error", "n_prompt_tokens": 70, "n_ctx": 64}},
            (70, 64),
        ),
        (
            400,
            "The input (70 tokens) is longer than the model's context length (64 tokens).",
            (50, 64),
        ),
    ],
)
def test_a_prompt_that_is_too_long_there(status, content, numbers):
    fault = refusal(status, content)
    assert isinstance(fault.error, PromptTooLong)
    assert (fault.error.prompt_tokens, fault.error.limit_tokens) == numbers
    assert not fault.again
    assert not fault.servers


def test_which_refusals_may_pass():
    for status in (408, 425, 500, 502, 504):
        assert type(refusal(status).error) is RemoteUnreachable
        assert refusal(status).again
    for status in (429, 503, 529):
        fault = refusal(status, retry_after="2")
        assert isinstance(fault.error, ServerBusy)
        assert (fault.again, fault.pause_s, fault.error.retry_after_s) == (True, 2, 2)
    assert not refusal(429, retry_after="3600").again
    assert refusal(429, retry_after="Wed, 21 Oct 2015 07:28:00 GMT").pause_s == 0
    assert refusal(429, retry_after="soon").pause_s == 0
    assert refusal(429, retry_after="nan").pause_s == 0
    assert not refusal(429).servers
    assert not refusal(501).again
