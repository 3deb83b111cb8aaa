"""Which token is chosen, by whose chance, and how likely it was."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llmos.drivers.engines.sampling import Row, _pick, choose, uniforms
from llmos.drivers.errors import InvalidGrammar
from llmos.drivers.protocols import Grammar, SamplingParams
from tests.drivers.engines import tiny_causal
from tests.drivers.engines.causal_suite import QUESTION, Listener, ask, job

torch.set_num_threads(1)
KINDS = [
    {},
    {"temperature": 0.7},
    {"temperature": 1.3, "top_p": 0.8},
    {"temperature": 1.0, "top_k": 5},
    {"temperature": 1.0, "top_k": 2000, "top_p": 0.99},
]


def rows(count, **params):
    return [Row(SamplingParams(**params)) for _ in range(count)]


def logits_of(count, values):
    return torch.tensor([values] * count, dtype=torch.float32)


class TestChoose:
    def test_frequencies_follow_temperature(self):
        tokens = choose(logits_of(4000, [0.0, 2.0, 4.0]), rows(4000, temperature=2.0))
        expected = torch.softmax(torch.tensor([0.0, 1.0, 2.0]), 0)
        found = tokens.bincount(minlength=3) / 4000
        assert torch.allclose(found, expected, atol=0.05)

    def test_frequencies_of_one_seed_follow_the_distribution_too(self):
        row = Row(SamplingParams(temperature=1.0, seed=11))
        logits = logits_of(1, [0.0, 1.0, 2.0])
        found = torch.zeros(3)
        for _ in range(4000):
            token = int(choose(logits, [row]))
            row.took(token)
            found[token] += 1
        assert torch.allclose(found / 4000, torch.softmax(logits[0], 0), atol=0.05)

    def test_top_k_then_top_p_of_the_rest(self):
        # Of the two best, 0.73 and 0.27, top_p=0.7 leaves the first alone.
        logits = logits_of(200, [1.0, 2.0, 0.9, 0.8])
        cut = rows(200, temperature=1.0, top_k=2, top_p=0.7)
        assert set(choose(logits, cut).tolist()) == {1}
        loose = rows(200, temperature=1.0, top_k=2)
        assert set(choose(logits, loose).tolist()) == {0, 1}

    def test_top_p_beyond_the_first_candidates(self):
        tokens = choose(torch.zeros(300, 5000), rows(300, temperature=1.0, top_p=0.9))
        assert len(set(tokens.tolist())) > 200

    def test_rows_keep_their_own_parameters(self):
        logits = torch.randn(6, 100)
        made = rows(6)
        made[1] = Row(SamplingParams(temperature=50.0))
        made[4] = Row(SamplingParams(temperature=1.0, top_k=1))
        tokens = choose(logits, made)
        greedy = logits.argmax(-1)
        assert [bool(tokens[r] == greedy[r]) for r in (0, 2, 3, 4, 5)] == [True] * 5

    @pytest.mark.parametrize("temperature", [1e-45, 1e-9, 1e30])
    def test_extreme_temperatures_stay_finite(self, temperature):
        logits = torch.randn(3, 50, dtype=torch.bfloat16) * 100
        tokens = choose(logits, rows(3, temperature=temperature, top_p=0.5))
        assert ((tokens >= 0) & (tokens < 50)).all()

    @pytest.mark.parametrize("params", KINDS[1:])
    def test_a_seed_does_not_depend_on_company(self, params):
        logits = torch.randn(40, 1500) * 3
        seeded = {at: Row(SamplingParams(seed=at % 5, **params)) for at in (0, 17, 39)}
        alone = {at: int(choose(logits[at : at + 1], [row])) for at, row in seeded.items()}
        for kind in KINDS:
            made = [seeded.get(at) or Row(SamplingParams(**kind)) for at in range(40)]
            tokens = choose(logits, made)
            assert {at: int(tokens[at]) for at in seeded} == alone

    def test_logits_are_left_as_they_are(self):
        logits = torch.randn(3, 40)
        before = logits.clone()
        choose(logits, [Row(SamplingParams(temperature=1.0, logprobs=2), binding=Evens())] * 3)
        assert torch.equal(logits, before)


@given(
    st.lists(st.sampled_from([0.0, 1e-30, 0.5, 1.0, 3.0]), min_size=1, max_size=700),
    st.floats(0, 1, exclude_max=True),
)
def test_what_has_no_weight_is_never_picked(weights, chance):
    if not any(weights):
        weights[-1] = 1.0
    found = int(_pick(torch.tensor([weights]), torch.tensor([chance], dtype=torch.float64)))
    assert weights[found] > 0
    whole = np.cumsum(np.array(weights, dtype=np.float64))
    share = whole / whole[-1]
    assert share[found] >= chance - 1e-6
    assert share[found] - weights[found] / whole[-1] <= chance + 1e-6


def test_chance_is_even_and_every_place_has_its_own():
    made = [
        Row(SamplingParams(seed=seed), place=place) for seed in range(60) for place in range(60)
    ]
    found = uniforms(made)
    assert len(set(found)) == 3600
    assert (found >= 0).all()
    assert (found < 1).all()
    counts, _ = np.histogram(found, bins=20, range=(0, 1))
    assert counts.min() > 120
    assert abs(np.corrcoef(found[:-1], found[1:])[0, 1]) < 0.05
    assert (uniforms(made) == found).all()


class Evens:
    """A grammar of even tokens, that may be lost."""

    done = False
    lost = False

    def allowed(self, bits):
        if self.lost:
            raise InvalidGrammar("lark", "it is lost")
        bits[:] = 0x55555555

    def took(self, token):
        if token % 2:
            raise InvalidGrammar("lark", "odd")


class TestBound:
    @pytest.mark.parametrize("params", KINDS)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_only_what_is_allowed_is_chosen(self, params, dtype):
        logits = (torch.randn(60, 333) * 20).to(dtype)
        made = [Row(SamplingParams(**params), binding=Evens()) for _ in range(60)]
        assert not (choose(logits, made) % 2).any()

    def test_it_binds_no_other_row(self):
        logits = torch.randn(8, 100)
        logits[:, 1] = 9.0
        made = rows(8)
        made[3] = Row(SamplingParams(), binding=Evens())
        tokens = choose(logits, made).tolist()
        assert tokens[:3] + tokens[4:] == [1] * 7
        assert tokens[3] == int(logits[3, ::2].argmax()) * 2

    def test_a_grammar_that_fails_hurts_only_its_own_row(self):
        binding = Evens()
        made = [Row(SamplingParams(), binding=binding), *rows(2)]
        binding.lost = True
        logits = torch.randn(3, 50)
        assert torch.equal(choose(logits, made), logits.argmax(-1))
        assert isinstance(made[0].failed, InvalidGrammar)
        assert made[1].failed is None
        made[0].took(1)
        row = Row(SamplingParams(), binding=Evens())
        row.took(1)
        assert isinstance(row.failed, InvalidGrammar)


class TestLogprobs:
    @pytest.mark.parametrize("params", KINDS)
    def test_they_are_the_models_own(self, params):
        logits = torch.randn(4, 200)
        asked = Row(SamplingParams(logprobs=3, **params), binding=Evens())
        none = Row(SamplingParams(logprobs=0, **params))
        tokens = choose(logits, [*rows(2), asked, none]).tolist()
        expected = logits.log_softmax(-1)
        for at, row in ((2, asked), (3, none)):
            assert row.chances is not None
            assert row.chances.token == tokens[at]
            assert row.chances.logprob == pytest.approx(float(expected[at, tokens[at]]), abs=1e-5)
        best = expected[2].topk(3)
        assert [t for t, _ in asked.chances.likeliest] == best.indices.tolist()
        assert [p for _, p in asked.chances.likeliest] == pytest.approx(best.values.tolist())
        assert none.chances.likeliest == ()

    def test_more_than_there_are_tokens(self):
        row = Row(SamplingParams(logprobs=20))
        choose(torch.randn(1, 7), [row])
        assert len(row.chances.likeliest) == 7


# ------------------------------------------------------------------ in the engine


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return tiny_causal.make(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def engine(tiny):
    made = tiny_causal.engine(tiny)
    yield made
    made.close()


HOT = {"temperature": 1.2, "seed": 5, "max_new_tokens": 24, "ignore_eos": True}


@pytest.mark.parametrize("cut", [{}, {"top_p": 0.9}, {"top_k": 50}])
def test_a_seed_gives_the_same_answer_in_any_company(engine, cut):
    alone = ask(engine, **HOT, **cut).text
    assert ask(engine, **{**HOT, "seed": 6}, **cut).text != alone
    listeners = []
    for i in range(12):
        params = {**HOT, **cut} if i % 3 == 0 else {**HOT, "seed": None, **KINDS[i % 5]}
        listeners.append(Listener())
        engine.submit(job(f"Number {i}" if i % 3 else QUESTION, **params), listeners[-1])
    texts = [listener.wait() and listener.text for listener in listeners]
    assert {texts[i] for i in (0, 3, 6, 9)} == {alone}


def test_without_a_seed_answers_differ(engine):
    params = {**HOT, "seed": None}
    assert len({ask(engine, **params).text for _ in range(4)}) > 1


def test_a_seeded_stream_that_broke_off_goes_on_the_same_way(engine):
    # Letters that are in no word of the vocabulary: the tokens of a text are then certain.
    params = {**HOT, "ignore_eos": False, "grammar": Grammar("regex", "[qQxXZ]{24}")}
    whole = ask(engine, **params)
    assert len(whole.text) == 24
    text = ""
    for chunk in whole.chunks[:-1]:
        text += chunk.text
        listener = Listener()
        left = {**params, "max_new_tokens": 24 - len(text)}
        engine.submit(job(prefix=text, **left), listener)
        listener.wait()
        assert text + listener.text == whole.text


def test_log_probabilities_come_with_the_tokens_of_each_chunk(engine):
    got = ask(engine, max_new_tokens=16, logprobs=2, ignore_eos=True, stop=("never\x00",))
    plain = ask(engine, max_new_tokens=16, ignore_eos=True)
    assert got.text == plain.text
    assert all(len(c.logprobs) == c.tokens for c in got.chunks)
    told = [p for c in got.chunks for p in c.logprobs]
    assert len(told) == 16
    for p in told:
        # Greedy: the token written is the likeliest.
        assert p.likeliest[0] == (p.token, p.logprob)
        assert p.likeliest[1][1] <= p.logprob <= 0
    assert not any(c.logprobs for c in plain.chunks)


def test_a_job_that_was_put_back_goes_on_with_its_own_chance(tiny):
    engine = tiny_causal.engine(tiny, kv_tokens=160)
    try:
        params = {**HOT, "max_new_tokens": 60}
        alone = ask(engine, "Once", **params).text
        slow, other = Listener(), Listener()
        engine.submit(job("Once", job_id="slow", **params), slow)
        assert slow.first.wait(30)
        engine.pause("slow")
        engine.submit(job("Twice", max_new_tokens=120, ignore_eos=True), other)
        other.wait()
        assert engine.statistics().preempted == 1 or slow.done.is_set()
        engine.resume("slow")
        slow.wait()
        assert slow.text == alone
    finally:
        engine.close()
