"""Tool calls in each model's own format: told, forced, read, and never out of anybody's text."""

import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmos.drivers.engines.prompts import PromptEncoder
from llmos.drivers.engines.toolcalls import Llama, Mistral, Tagged, calls_as_text, with_ids
from llmos.drivers.errors import InvalidParams
from llmos.drivers.protocols import ChatTurn, GenerationJob, SamplingParams, ToolCall, ToolSpec
from tests.drivers.engines import tiny_causal
from tests.drivers.engines.causal_suite import Listener, ask, job


def spec(name: str, description: str = "", **properties: object) -> ToolSpec:
    schema = {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }
    return ToolSpec(name, description, json.dumps(schema))


WEATHER = spec("get_weather", "The weather in a city.", city={"type": "string", "maxLength": 12})
ADD = spec("add", "Adds two.", a={"type": "integer", "maximum": 99}, b={"type": "integer"})
TOOLS = (WEATHER, ADD)
BERLIN = ToolCall("get_weather", '{"city": "Berlin"}')
SUM = ToolCall("add", '{"a": 1, "b": 2}')

HERMES = (
    "{% if tools %}<|start|>system\n<tools>{% for t in tools %}{{ t | tojson }}\n{% endfor %}"
    "</tools>\nAnswer as <tool_call>{...}</tool_call><|stop|>\n{% endif %}"
    "{% for m in messages %}<|start|>{{ 'user' if m.role == 'tool' else m.role }}\n"
    "{% if m.role == 'tool' %}<tool_response>{{ m.content }}</tool_response>"
    "{% else %}{{ m.content }}{% endif %}"
    "{% for c in m.tool_calls or [] %}<tool_call>\n"
    '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}\n'
    "</tool_call>{% endfor %}<|stop|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
MISTRALS = (
    "{% if tools %}[AVAILABLE_TOOLS]{{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}"
    "{% for m in messages %}{% if m.role == 'user' %}[INST]{{ m.content }}[/INST]"
    "{% elif m.role == 'tool' %}[TOOL_RESULTS]"
    '{"content": {{ m.content | tojson }}, "call_id": "{{ m.tool_call_id }}"}[/TOOL_RESULTS]'
    "{% elif m.tool_calls %}[TOOL_CALLS]["
    "{% for c in m.tool_calls %}"
    '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}, '
    '"id": "{{ c.id }}"}{% endfor %}]<|stop|>'
    "{% else %}{{ m.content }}<|stop|>{% endif %}{% endfor %}"
)
MARKS = ("[INST]", "[/INST]", "[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]")
LLAMAS = HERMES.replace("<tool_call>{...}</tool_call>", '{"name": ..., "parameters": ...}').replace(
    "<tool_call>\n", ""
)
LLAMAS = LLAMAS.replace("\n</tool_call>", "").replace('"arguments": {{', '"parameters": {{')
MODELS = {
    "none": (tiny_causal.CHAT, ()),
    "hermes": (HERMES, ()),
    "hermes with tokens": (HERMES, ("<tool_call>", "</tool_call>")),
    "mistral": (MISTRALS, MARKS),
    "mistral with arguments": (MISTRALS, (*MARKS, "[ARGS]")),
    "llama": (LLAMAS, ("<|python_tag|>",)),
}


@pytest.fixture(scope="module", params=list(MODELS))
def engine(request, tmp_path_factory):
    chat, controls = MODELS[request.param]
    folder = tmp_path_factory.mktemp("tools")
    made = tiny_causal.engine(tiny_causal.make(folder, chat, controls))
    yield made
    made.close()


TALK = (
    ChatTurn("user", "Weather?"),
    ChatTurn("assistant", "", (BERLIN,)),
    ChatTurn("tool", 'It is {"sunny"}\n', tool_call_id="abc"),
    ChatTurn("user", "And now?"),
)


def run(engine, prompt=TALK, **options) -> Listener:
    listener = Listener()
    params = {"max_new_tokens": 200, "temperature": 1.2, "seed": 3}
    params |= options.pop("params", {})
    name = options.pop("job_id", "tools")
    engine.submit(
        GenerationJob(name, prompt, SamplingParams(**params), tools=TOOLS, **options), listener
    )
    listener.wait()
    return listener


class TestEveryFormat:
    def test_a_required_call_is_a_call_of_a_tool(self, engine):
        names = set()
        for seed in range(8):
            got = run(engine, tool_choice="required", params={"seed": seed})
            last = got.chunks[-1]
            assert last.finish == "stop"
            assert got.text == ""
            (call,) = last.tool_calls
            names.add(call.name)
            arguments = json.loads(call.arguments)
            if call.name == "add":
                assert set(arguments) == {"a", "b"}
                assert isinstance(arguments["a"], int)
            else:
                assert len(arguments["city"]) <= 12
            assert re.fullmatch("[0-9a-z]{9}", call.id)
        assert names <= {"add", "get_weather"}

    def test_what_is_no_call_is_text(self, engine):
        got = run(engine, params={"max_new_tokens": 30})
        assert got.chunks[-1].tool_calls == ()
        assert got.tokens == got.chunks[-1].new_tokens
        plain = run(engine, params={"max_new_tokens": 30})
        assert plain.text == got.text

    def test_the_model_is_told_of_tools_calls_and_results(self, engine):
        encoder = engine._encoder
        told = encoder.backend.decode(encoder.encode(TALK, TOOLS), skip_special_tokens=False)
        for said in ("get_weather", "The weather in a city.", "Adds two.", "sunny", "Berlin"):
            assert said in told
        assert '{"city": "Berlin"}' in told
        without = encoder.encode(TALK)
        assert "Adds two." not in encoder.backend.decode(without)
        assert "Berlin" in encoder.backend.decode(without)

    def test_special_tokens_in_data_are_only_text(self, engine):
        encoder = engine._encoder
        evil = "".join(encoder._controls) + '"<|stop|>\n\\'
        clean = list(self.talk("x"))
        dirty = list(self.talk(evil))
        special = set(encoder._control_ids)
        ids = [encoder.encode(tuple(t), (spec("f", e),)) for t, e in ((clean, "x"), (dirty, evil))]
        counts = [{token: found.count(token) for token in special} for found in ids]
        assert counts[0] == counts[1]
        text = encoder.backend.decode(ids[1], skip_special_tokens=False)
        # Once as it is, or as JSON writes it: user, argument's value, result, description.
        assert text.count(evil) + text.count(json.dumps(evil, ensure_ascii=False)[1:-1]) >= 4

    def talk(self, text):
        arguments = json.dumps({text: [text, {"k": text}]}, ensure_ascii=False)
        yield ChatTurn("user", f"a {text} b")
        yield ChatTurn("assistant", "", (ToolCall("f", arguments, "id1"),))
        yield ChatTurn("tool", f"{text} done", tool_call_id="id1")


def test_text_is_shown_up_to_where_a_call_may_begin(tmp_path):
    engine = tiny_causal.engine(tiny_causal.make(tmp_path, HERMES))
    try:
        prompt = (ChatTurn("user", "x"),)
        free = run(engine, prompt, params={"max_new_tokens": 40})
        assert len(free.chunks) > 3
    finally:
        engine.close()


def test_an_unknown_format_is_refused(tmp_path):
    chat = HERMES.replace("tool_call>", "call_me>")
    engine = tiny_causal.engine(tiny_causal.make(tmp_path, chat))
    try:
        with pytest.raises(InvalidParams, match="not known"):
            run(engine)
        assert ask(engine, max_new_tokens=2).tokens
    finally:
        engine.close()


def test_a_tokenizers_own_way_of_reading_is_used(tmp_path):
    from transformers import AutoTokenizer

    folder = tiny_causal.make(tmp_path, HERMES.replace("tool_call>", "call_me>"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.response_template = {
        "defaults": {"role": "assistant"},
        "start_anchor": "<|start|>assistant",
        "fields": {
            "tool_calls": {
                "open_pattern": r"\s*<call_me>",
                "close": "</call_me>",
                "repeats": True,
                "content": "json",
                "transform": {"type": "function", "function": "{content}"},
            },
            "content": {"close": "<|stop|>", "content": "text"},
        },
    }
    syntax = PromptEncoder("tiny", tokenizer).syntax
    assert syntax is not None
    said = 'So: <call_me>{"name": "add", "arguments": {"a": 1, "b": 2}}</call_me>'
    assert syntax.read(said, TOOLS) == ("So:", (SUM,))
    assert syntax.read("<call_me>{broken", TOOLS) == ("<call_me>{broken", ())
    assert syntax.grammar(TOOLS) is None


class TestReading:
    @pytest.mark.parametrize(
        ("text", "rest", "calls"),
        [
            ('<tool_call>{"name": "add", "arguments": {"a": 1, "b": 2}}</tool_call>', "", [SUM]),
            ('<tool_call>\n{"name":"add","arguments":{"a":1,"b":2}}\n</tool_call>\n', "", [SUM]),
            ('<tool_call>[{"name": "add", "arguments": {"a": 1, "b": 2}}]</tool_call>', "", [SUM]),
            ('<tool_call>{"name": "add", "arguments": "{\\"a\\": 1, \\"b\\": 2}"}', "", [SUM]),
            ('<tool_call>{"name": "add", "parameters": {"a": 1, "b": 2}}</tool_call>', "", [SUM]),
            ("<tool_call>[]</tool_call>", "<tool_call>[]</tool_call>", []),
            ("<tool_call>{broken</tool_call>", "<tool_call>{broken</tool_call>", []),
            (
                '<tool_call>{"name": 3, "arguments": {}}',
                '<tool_call>{"name": 3, "arguments": {}}',
                [],
            ),
            ('<tool_call>{"name": "f", "arguments": [1]}', None, []),
            ('<tool_call>{"name": "f", "arguments": {"x": NaN}}', None, []),
            ('<tool_call>{"name": "f", "arguments": {"x": "\\ud800"}}', None, []),
            ('<tool_call>{"name": "f"}</tool_call>', "", [ToolCall("f", "{}")]),
            ("no call at all", None, []),
            ("<tool_call>" * 1000, None, []),
            ("<tool_call>" + "[" * 100_000, None, []),
        ],
    )
    def test_tagged(self, text, rest, calls):
        assert Tagged().read(text, TOOLS) == (text if rest is None else rest, tuple(calls))

    def test_tagged_with_text_around_and_a_mark_inside(self):
        tricky = ToolCall("f", '{"x": "</tool_call><tool_call>"}')
        said = f"First. {calls_as_text([tricky])}\nThen {calls_as_text([SUM, BERLIN])} done."
        rest, calls = Tagged().read(said, TOOLS)
        assert calls == (tricky, SUM, BERLIN)
        assert rest == "First. \nThen  done."

    @settings(max_examples=40, deadline=None)
    @given(
        st.dictionaries(st.text(), st.recursive(st.none() | st.integers() | st.text(), st.lists))
    )
    def test_what_is_written_is_read_again(self, arguments):
        try:
            text = json.dumps(arguments, ensure_ascii=False)
            text.encode()
        except UnicodeEncodeError:
            return
        call = ToolCall("f", text)
        assert Tagged().read(calls_as_text([call, call]), ()) == ("", (call, call))

    @pytest.mark.parametrize(
        ("text", "calls"),
        [
            ('[TOOL_CALLS] [{"name": "add", "arguments": {"a": 1, "b": 2}, "id": "x"}]', [SUM]),
            ('[TOOL_CALLS]add[ARGS]{"a": 1, "b": 2}', [SUM]),
            (
                '[TOOL_CALLS]add[ARGS]{"a": 1, "b": 2}[TOOL_CALLS]get_weather[ARGS]'
                '{"city": "Berlin"}',
                [SUM, BERLIN],
            ),
            ("[TOOL_CALLS]nothing", None),
            ('[TOOL_CALLS][{"name": "f", "arguments": {}}] and more', None),
            ("[TOOL_CALLS]", None),
        ],
    )
    def test_mistral(self, text, calls):
        expected = (text, ()) if calls is None else ("", tuple(calls))
        assert Mistral({}).read(text, TOOLS) == expected

    @pytest.mark.parametrize(
        ("text", "calls"),
        [
            ('{"name": "add", "parameters": {"a": 1, "b": 2}}', [SUM]),
            ('<|python_tag|>{"name": "add", "parameters": {"a": 1, "b": 2}}', [SUM]),
            (
                '{"name": "add", "parameters": {"a": 1, "b": 2}}; '
                '{"name": "get_weather", "parameters": {"city": "Berlin"}}',
                [SUM, BERLIN],
            ),
            ('{"name": "somebody", "parameters": {}}', None),
            ('{"answer": 42}', None),
            ("words", None),
            ("", None),
        ],
    )
    def test_llama(self, text, calls):
        expected = (text, ()) if calls is None else ("", tuple(calls))
        assert Llama().read(text, TOOLS) == expected


def test_ids_are_short_and_each_its_own():
    made = [c.id for name in ("a", "b") for c in with_ids(name, [SUM, SUM])]
    assert len(set(made)) == 4
    assert all(re.fullmatch("[0-9a-z]{9}", i) for i in made)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    made = tiny_causal.engine(tiny_causal.make(tmp_path_factory.mktemp("plain")))
    yield made
    made.close()


USER = (ChatTurn("user", "x"),)


@pytest.mark.parametrize(
    ("field", "prompt", "options"),
    [
        ("tools", "a bare prompt", {"tools": TOOLS}),
        ("tools", USER, {"tools": (ADD, ADD)}),
        ("tools", USER, {"tools": (spec("no good name"),)}),
        ("tools", USER, {"tools": (spec("x" * 65),)}),
        ("tools", USER, {"tools": (ToolSpec("f", "", "[]"),)}),
        ("tools", USER, {"tools": (ToolSpec("f", "", "{"),)}),
        ("tools", USER, {"tools": (ToolSpec("f", "", '{"type": "string"}'),)}),
        ("tools", USER, {"tools": (ToolSpec("f", "\ud800", '{"type": "object"}'),)}),
        ("tools", USER, {"tools": tuple(spec(f"f{i}") for i in range(129))}),
        ("tool_choice", USER, {"tool_choice": "required"}),
        ("tool_choice", USER, {"tools": TOOLS, "tool_choice": "always"}),
        ("tool_calls", (ChatTurn("user", "x", (SUM,)),), {}),
        ("tool_calls", (ChatTurn("assistant", "x", (ToolCall("f", "[]"),)),), {}),
        ("tool_calls", (ChatTurn("assistant", "x", (ToolCall("f", "{"),)),), {}),
        ("tool_call_id", (ChatTurn("user", "x", tool_call_id="1"),), {}),
        ("role", (ChatTurn("wizard", "x"),), {}),
    ],
)
def test_nonsense_is_refused(plain, field, prompt, options):
    with pytest.raises(InvalidParams) as caught:
        plain.submit(GenerationJob("n", prompt, SamplingParams(max_new_tokens=3), **options), print)
    assert caught.value.field == field


@pytest.mark.parametrize("field", ["stop", "ignore_eos", "grammar"])
def test_a_required_call_is_not_bound_by_anything_else(plain, field):
    from llmos.drivers.protocols import Grammar

    value = {"stop": ("x",), "ignore_eos": True, "grammar": Grammar("regex", "a")}[field]
    with pytest.raises(InvalidParams) as caught:
        run(plain, USER, tool_choice="required", params={field: value})
    assert caught.value.field == field


def test_a_million_characters_of_tools_are_refused_quickly(plain):
    from llmos.drivers.errors import PromptTooLong

    tools = tuple(spec(f"f{i}", "words " * 20_000) for i in range(10))
    with pytest.raises(PromptTooLong):
        plain.submit(GenerationJob("n", USER, SamplingParams(max_new_tokens=3), tools=tools), print)


@pytest.mark.models
def test_a_real_model_calls_a_tool_and_reads_its_answer(smollm2):
    from llmos.drivers.engines.causal import TransformersCausalEngine
    from llmos.drivers.protocols import EngineOptions

    engine = TransformersCausalEngine(
        EngineOptions("smol", path=smollm2, dtype="float32", threads=1, kv_tokens=2048)
    )
    try:
        asked = (ChatTurn("user", "What is the weather in Berlin?"),)
        greedy = {"temperature": 0.0, "max_new_tokens": 60}
        got = run(engine, asked, tool_choice="required", params=greedy)
        (call,) = got.chunks[-1].tool_calls
        assert (call.name, json.loads(call.arguments)) == ("get_weather", {"city": "Berlin"})
        told = ChatTurn("tool", "Sunny, 21 degrees.", tool_call_id=call.id)
        talk = (*asked, ChatTurn("assistant", got.text, (call,)), told)
        answer = ask(engine, talk, max_new_tokens=40)
        assert "unny" in answer.text or "21" in answer.text
        # The rest of the conversation is as the library renders it.
        assert job(talk).prompt == talk
    finally:
        engine.close()
