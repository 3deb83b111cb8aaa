"""Answers bound by a grammar: whatever the model would write, it writes what is allowed."""

import json
import re
import threading
from enum import Enum
from typing import Annotated, Literal

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, Field

from llmos.drivers.engines import structured
from llmos.drivers.engines.structured import Bound, Grammars
from llmos.drivers.errors import InvalidGrammar, InvalidParams
from llmos.drivers.protocols import ChatTurn, Grammar
from llmos.syscalls.schemas import answer_schema
from tests.drivers.engines import tiny_causal
from tests.drivers.engines.causal_suite import Listener, ask, job

LIMIT = 400


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    made = tiny_causal.engine(tiny_causal.make(tmp_path_factory.mktemp("tiny")))
    yield made
    made.close()


def schema_of(model) -> Grammar:
    return Grammar("json_schema", answer_schema(model))


class Colour(Enum):
    RED = "red"
    DEEP_BLUE = "deep blue"


class Point(BaseModel):
    """With a note that binds nothing."""

    x: int = Field(ge=-9, le=99, description="To the right.")
    y: Annotated[float, Field(ge=0, le=1)]


class Thing(BaseModel):
    title: Annotated[str, Field(max_length=8)]
    colour: Colour
    size: Literal["small", "large"] | None
    points: Annotated[list[Point], Field(min_length=1, max_length=2)]
    done: bool


class Round(BaseModel):
    kind: Literal["round"]
    radius: Annotated[int, Field(ge=1, le=20)]


class Square(BaseModel):
    kind: Literal["square"]
    code: Annotated[str, Field(pattern=r"^[A-Z]{2}\d{3}$")]


class Shape(BaseModel):
    shape: Annotated[Round | Square, Field(discriminator="kind")]


HOT = {"temperature": 1.3, "max_new_tokens": LIMIT}


@pytest.mark.parametrize("model", [Point, Thing, Shape])
def test_a_random_model_writes_what_the_schema_says(engine, model):
    listeners = [Listener() for _ in range(8)]
    for seed, listener in enumerate(listeners):
        params = {**HOT, "seed": seed} if seed else {"max_new_tokens": LIMIT}
        engine.submit(job(grammar=schema_of(model), **params), listener)
    texts = set()
    for listener in listeners:
        assert listener.wait().finish == "stop"
        made = model.model_validate_json(listener.text)
        assert json.loads(listener.text)
        assert made
        texts.add(listener.text)
    assert len(texts) > 2


LETTERS = st.text('ab{}.\\ |é日"/#&', min_size=1, max_size=5)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(LETTERS, min_size=1, max_size=6), st.integers(0, 2**63 - 1))
def test_a_random_model_writes_one_of_the_choices(engine, choices, seed):
    grammar = Grammar("choices", json.dumps(choices))
    got = ask(engine, grammar=grammar, seed=seed, **HOT)
    assert got.text in choices
    assert got.chunks[-1].finish == "stop"


EXPRESSIONS = [
    r"\d{4}-\d{2}-\d{2}",
    r"(yes|no)( [a-z]+){0,3}",
    r"[^\n]{3,9}",
    r"a/b[/.]c",
    r"x?",
]


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_a_random_model_writes_what_the_expression_matches(engine, expression):
    for seed in range(4):
        got = ask(engine, grammar=Grammar("regex", expression), seed=seed, **HOT)
        # Of a loop without an end only a beginning may have been written.
        if got.chunks[-1].finish == "stop":
            assert re.fullmatch(expression, got.text), got.text
        else:
            assert "+" in expression


def test_a_grammar_of_ones_own(engine):
    lark = 'start: greeting " " name\ngreeting: "Hello" | "Dear"\nname: /[A-Z][a-z]{1,6}/'
    got = ask(engine, grammar=Grammar("lark", lark), seed=1, **HOT)
    assert re.fullmatch(r"(Hello|Dear) [A-Z][a-z]{1,6}", got.text)


def test_json_is_on_one_line_as_python_writes_it(engine):
    got = ask(engine, grammar=schema_of(Point), seed=3, **HOT)
    assert re.fullmatch(r'\{"x": -?\d+, "y": [0-9.eE+-]+\}', got.text)


def test_an_answer_that_is_cut_off_says_so(engine):
    grammar = Grammar("json_schema", '{"type": "string"}')
    got = ask(engine, grammar=grammar, max_new_tokens=3, seed=1, temperature=1.0)
    assert got.chunks[-1].finish == "length"
    exact = ask(engine, grammar=Grammar("regex", "[QX]{6}"), max_new_tokens=6)
    assert (exact.chunks[-1].finish, len(exact.text)) == ("stop", 6)


def test_neighbours_in_the_batch_are_not_changed(engine):
    prompts = [f"Neighbour {i}" for i in range(6)]
    plain = {"max_new_tokens": 16, "ignore_eos": True}
    alone = [ask(engine, p, **plain).text for p in prompts]
    bound_alone = ask(engine, grammar=schema_of(Thing), max_new_tokens=LIMIT).text
    listeners = []
    for prompt in prompts:
        listeners.append((Listener(), Listener()))
        engine.submit(job(prompt, **plain), listeners[-1][0])
        engine.submit(job(grammar=schema_of(Thing), max_new_tokens=LIMIT), listeners[-1][1])
    for (free, bound), expected in zip(listeners, alone, strict=True):
        free.wait()
        bound.wait()
        assert free.text == expected
        assert bound.text == bound_alone


@pytest.mark.parametrize(
    ("kind", "source"),
    [
        ("json_schema", "{"),
        ("json_schema", "[]"),
        ("json_schema", "[" * 50_000),
        ("json_schema", '{"type": "wizard"}'),
        ("json_schema", '{"type": "array", "uniqueItems": true}'),
        ("json_schema", '{"type": "string", "minLength": 5, "maxLength": 2}'),
        ("json_schema", '{"$ref": "http://example.com/schema"}'),
        ("json_schema", '{"type": "array", "items": ' * 300 + "{}" + "}" * 300),
        ("json_schema", '{"$ref": "#"}'),
        ("json_schema", '{"type": "string", "x": "' + "y" * 100_000 + '"}'),
        ("regex", "a("),
        ("regex", "(?=a)b"),
        ("regex", r"(a)\1"),
        ("regex", "  "),
        ("choices", "[]"),
        ("choices", '["a", 1]'),
        ("choices", '["a", ""]'),
        ("choices", '"abc"'),
        ("choices", json.dumps([str(i) for i in range(1025)])),
        ("lark", "start: nobody"),
        ("lark", ""),
    ],
)
def test_what_cannot_be_followed_is_refused_at_once(engine, kind, source):
    listener = Listener()
    with pytest.raises(InvalidGrammar) as caught:
        engine.submit(job(grammar=Grammar(kind, source), max_new_tokens=4), listener)
    assert caught.value.kind == kind
    assert caught.value.reason
    assert "<state>" not in str(caught.value)
    assert not listener.chunks


@pytest.mark.parametrize(
    ("field", "params"),
    [
        ("seed", {"seed": -1}),
        ("seed", {"seed": 2**63}),
        ("seed", {"seed": 1.0}),
        ("seed", {"seed": True}),
        ("logprobs", {"logprobs": -1}),
        ("logprobs", {"logprobs": 21}),
        ("logprobs", {"logprobs": 10**9}),
        ("logprobs", {"logprobs": "5"}),
        ("grammar", {"grammar": Grammar("wizard", "x")}),  # type: ignore[arg-type]
        ("grammar", {"grammar": "yes|no"}),
        ("grammar", {"grammar": Grammar("regex", "\ud800")}),
        ("stop", {"grammar": Grammar("regex", "a"), "stop": ("x",)}),
        ("ignore_eos", {"grammar": Grammar("regex", "a"), "ignore_eos": True}),
    ],
)
def test_nonsense_is_refused(engine, field, params):
    with pytest.raises(InvalidParams) as caught:
        engine.submit(job(**{"max_new_tokens": 4, **params}), Listener())
    assert caught.value.field == field


class TestPrefix:
    def test_the_grammar_goes_on_after_it(self, engine):
        prefix = '{"x": 7, '
        got = ask(engine, grammar=schema_of(Point), prefix=prefix, seed=2, **HOT)
        assert Point.model_validate_json(prefix + got.text).x == 7

    @pytest.mark.parametrize("cut", range(1, 12))
    def test_wherever_it_ends(self, engine, cut):
        prefix = '{"x": 12, "y": 0.25}'[:cut]
        got = ask(engine, grammar=schema_of(Point), prefix=prefix, **HOT)
        assert Point.model_validate_json(prefix + got.text)

    def test_one_that_contradicts_it_is_refused(self, engine):
        with pytest.raises(InvalidParams) as caught:
            ask(engine, grammar=schema_of(Point), prefix='{"z', max_new_tokens=9)
        assert caught.value.field == "prefix"

    def test_one_that_is_the_whole_answer_leaves_nothing(self, engine):
        got = ask(engine, grammar=Grammar("regex", "abc"), prefix="abc", max_new_tokens=9)
        assert (got.text, got.chunks[-1].finish) == ("", "stop")
        assert got.chunks[-1].new_tokens == 1

    def test_special_tokens_in_it_are_text(self, engine):
        prefix = "<|stop|>"
        got = ask(engine, grammar=Grammar("regex", r"<\|stop\|>[QX]{3}"), prefix=prefix, **HOT)
        assert re.fullmatch("[QX]{3}", got.text)


def test_special_tokens_cannot_be_written_into_a_string(engine):
    grammar = Grammar("json_schema", '{"type": "string", "minLength": 30, "maxLength": 40}')
    for seed in range(6):
        got = ask(engine, grammar=grammar, seed=seed, **{**HOT, "temperature": 3.0})
        assert len(json.loads(got.text)) >= 30


def test_a_job_that_was_put_back_goes_on_in_its_grammar(tmp_path):
    engine = tiny_causal.engine(tiny_causal.make(tmp_path), kv_tokens=160)
    try:
        params = {"grammar": Grammar("regex", "[QXZq]{60}"), "max_new_tokens": 70, "seed": 1}
        params["temperature"] = 1.0
        alone = ask(engine, "Once", **params).text
        slow, other = Listener(), Listener()
        engine.submit(job("Once", job_id="slow", **params), slow)
        assert slow.first.wait(30)
        engine.pause("slow")
        engine.submit(job("Twice", max_new_tokens=120, ignore_eos=True), other)
        other.wait()
        engine.resume("slow")
        slow.wait()
        assert slow.text == alone
        assert len(alone) == 60
    finally:
        engine.close()


def test_a_grammar_that_fails_on_the_way_ends_only_its_own_job(engine, monkeypatch):
    whole = Bound.allowed
    seen = []

    def fails(self, bits):
        seen.append(self)
        if len(seen) == 3:
            raise InvalidGrammar("regex", "it became too complex")
        whole(self, bits)

    monkeypatch.setattr(Bound, "allowed", fails)
    bound, free = Listener(), Listener()
    engine.submit(job(grammar=Grammar("regex", "[QX]{20}"), max_new_tokens=30), bound)
    engine.submit(job(max_new_tokens=12, ignore_eos=True), free)
    last = bound.wait()
    assert last.finish == "error"
    assert isinstance(last.error, InvalidGrammar)
    assert free.wait().finish == "length"
    assert free.tokens == 12


class TestGrammars:
    @pytest.fixture
    def grammars(self, engine):
        return Grammars(engine._encoder.backend, engine._stepper.vocabulary, sorted(engine._eos))

    def test_as_many_are_remembered_as_may_be(self, grammars, monkeypatch):
        monkeypatch.setattr(structured, "MAX_COMPILED", 3)
        made = [Grammar("regex", f"a{{{i}}}") for i in range(1, 6)]
        for grammar in made:
            grammars.bind(grammar)
            grammars.bind(made[0])
        assert list(grammars._compiled) == [made[3], made[4], made[0]]

    def test_answers_of_one_grammar_do_not_see_each_other(self, grammars, engine):
        grammar = Grammar("regex", "[QX]{2}")
        first, second = grammars.bind(grammar), grammars.bind(grammar)
        (token,) = engine._encoder.encode_text("Q")
        first.took(token)
        first.took(token)
        assert first.done
        assert not second.done
        assert not grammars.bind(grammar).done
        with pytest.raises(InvalidGrammar):
            first.took(token)

    def test_many_threads_may_ask(self, grammars):
        made: list[Bound] = []
        threads = [
            threading.Thread(
                target=lambda i=i: made.append(grammars.bind(Grammar("regex", f"a{i % 3}")))
            )
            for i in range(12)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert len(made) == 12

    def test_nothing_is_built_before_it_is_needed(self, grammars):
        assert grammars._tokenizer is None


# ------------------------------------------------------------------ a real model


@pytest.fixture(scope="module")
def smol(smollm2):
    from llmos.drivers.engines.causal import TransformersCausalEngine
    from llmos.drivers.protocols import EngineOptions

    made = TransformersCausalEngine(
        EngineOptions("smol", path=smollm2, dtype="float32", threads=1, kv_tokens=2048)
    )
    yield made
    made.close()


class Person(BaseModel):
    name: Annotated[str, Field(max_length=30)]
    age: Annotated[int, Field(ge=0, le=120)]
    married: bool


@pytest.mark.models
def test_a_real_model_fills_in_a_schema(smol):
    prompt = (ChatTurn("user", "Tom Baker is 31 years old and married. Describe him as JSON."),)
    got = ask(smol, prompt, grammar=schema_of(Person), max_new_tokens=60)
    person = Person.model_validate_json(got.text)
    assert person == Person(name="Tom Baker", age=31, married=person.married)
    assert got.chunks[-1].finish == "stop"


@pytest.mark.models
def test_a_real_model_chooses_and_keeps_to_a_form(smol):
    prompt = (ChatTurn("user", "Is Paris the capital of France? Answer yes or no."),)
    choices = Grammar("choices", '["no", "yes", "unknown"]')
    date = (ChatTurn("user", "When did men first walk on the moon?"),)
    first, second = Listener(), Listener()
    smol.submit(job(prompt, grammar=choices, max_new_tokens=9, logprobs=3), first)
    regex = Grammar("regex", r"(19|20)\d{2}-(0[1-9]|1[0-2])-([0-2]\d|3[01])")
    smol.submit(job(date, grammar=regex, max_new_tokens=20), second)
    assert first.wait().finish == second.wait().finish == "stop"
    assert first.text in ("no", "yes", "unknown")
    assert second.text.startswith("1969-")
