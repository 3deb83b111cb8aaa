"""Who runs when, with which memory, and that nothing of it changes a token. A tiny random model."""

import random
import threading
import time
from collections import Counter

import pytest

from llmos.drivers.engines import causal
from llmos.drivers.engines.kvmemory import PAGE_TOKENS
from llmos.drivers.engines.queue import Fifo
from llmos.drivers.errors import EngineFailed, InvalidParams, PromptTooLong
from llmos.drivers.protocols import GenerationJob, SamplingParams
from tests.drivers.engines import tiny_causal
from tests.drivers.engines.causal_suite import CausalSuite, Listener, QueueSuite, settle

STORY = "the kernel lends memory to the agents that ask for it, and they wait. "
OTHER = "2024-05-17 yes no maybe yes no maybe yes. "


@pytest.fixture(scope="module", autouse=True)
def no_calibration():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(causal, "CALIBRATION_S", 0.0)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_causal.make(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def make_engine(folder):
    made = []

    def make(**options):
        made.append(tiny_causal.engine(folder, **options))
        return made[-1]

    yield make
    for engine in made:
        memory = engine._stepper.cache.memory
        if not engine._broken:
            assert settle(lambda e=engine: not e._inside)
            memory.validate()
            assert memory.used_tokens == 0
        engine.close()


_serial = iter(range(10**9))


def start(engine, prompt, new=24, *, tenant="t", agent="a", priority=0, **params):
    listener = Listener()
    listener.id = f"job-{next(_serial)}"
    chosen = SamplingParams(max_new_tokens=new, **{"ignore_eos": True, **params})
    made = GenerationJob(listener.id, prompt, chosen, tenant=tenant, agent=agent, priority=priority)
    engine.submit(made, listener)
    return listener


def answer(engine, prompt, new=24, **more):
    listener = start(engine, prompt, new, **more)
    listener.wait(30)
    return listener


@pytest.fixture(scope="module")
def alone(folder):
    """The answer of an engine that shares nothing and has nothing else to do, remembered."""
    engine = tiny_causal.engine(folder, share_prefixes=False)
    known = {}

    def ask(prompt, new=24, **params):
        key = (prompt, new, *params.items())
        if key not in known:
            known[key] = answer(engine, prompt, new, **params).text
        return known[key]

    yield ask
    engine.close()


@pytest.fixture(scope="module")
def suite_engine(folder):
    engine = tiny_causal.engine(folder, kv_tokens=1008)
    yield engine
    engine.close()


class TestTinyEngine(QueueSuite):
    """Not the whole suite: what a random model writes is no text that could be gone on from."""

    cancels = 200
    test_random_cancels_leak_nothing = CausalSuite.test_random_cancels_leak_nothing

    @pytest.fixture
    def engine(self, suite_engine):
        return suite_engine

    @pytest.fixture
    def make_engine(self, folder):
        return lambda **o: tiny_causal.engine(folder, **{"kv_tokens": 1008, **o})


# ---------------------------------------------------------------- shared prefixes


class TestSharing:
    def test_the_second_turn_reads_only_what_is_new(self, make_engine, alone):
        engine = make_engine()
        first = answer(engine, STORY * 3)
        assert first.chunks[-1].cached_tokens == 0
        # The next prompt holds the answer too.
        told = STORY * 3 + first.text
        again = answer(engine, told + OTHER)
        last = again.chunks[-1]
        shared = engine.count_tokens(STORY * 3)
        assert shared - PAGE_TOKENS <= last.cached_tokens < last.prompt_tokens
        assert last.cached_tokens % PAGE_TOKENS == 0
        assert again.text == alone(told + OTHER)
        after = engine.statistics()
        assert after.cached_prompt_tokens == last.cached_tokens
        assert after.prompt_tokens + after.cached_prompt_tokens == (
            first.chunks[-1].prompt_tokens + last.prompt_tokens
        )
        assert after.kv_tokens_cached > 0
        assert after.kv_tokens_used == 0

    def test_tenants_share_nothing(self, make_engine, alone):
        engine = make_engine()
        for tenant in ("one", "two"):
            got = answer(engine, STORY * 3, tenant=tenant)
            assert got.chunks[-1].cached_tokens == 0
            assert got.text == alone(STORY * 3)
        # Not at the same time either, and each has its own.
        both = [start(engine, STORY * 3, tenant=t) for t in ("one", "two", "three")]
        cached = [b.wait().cached_tokens for b in both]
        assert cached[0] == cached[1] > 0
        assert cached[2] == 0

    def test_a_running_job_shares_what_it_has_read(self, make_engine, alone):
        engine = make_engine()
        first = start(engine, STORY * 3, 300)
        assert first.first.wait(20)
        second = answer(engine, STORY * 3 + OTHER)
        assert not first.done.is_set()
        assert second.chunks[-1].cached_tokens > 0
        assert second.text == alone(STORY * 3 + OTHER)
        # It ends, and what the other uses of it stays.
        engine.cancel(first.id)
        first.wait()
        assert answer(engine, STORY * 3 + OTHER).text == second.text

    def test_sharing_can_be_switched_off(self, make_engine):
        engine = make_engine(share_prefixes=False)
        for _ in range(2):
            assert answer(engine, STORY * 3).chunks[-1].cached_tokens == 0
        assert engine.statistics().kv_tokens_cached == 0

    def test_many_with_equal_beginnings_in_little_memory(self, make_engine, alone):
        engine = make_engine(kv_tokens=640)
        chance = random.Random(5)
        prompts = [
            STORY * chance.randrange(1, 4) + OTHER * chance.randrange(3) + f"{chance.random()}"
            for _ in range(40)
        ]
        got = [
            start(engine, prompt, 12, tenant=chance.choice(["a", "b"]), agent=f"{i % 5}")
            for i, prompt in enumerate(prompts)
        ]
        for prompt, listener in zip(prompts, got, strict=True):
            listener.wait(60)
            assert listener.text == alone(prompt, 12)
        after = engine.statistics()
        assert after.cached_prompt_tokens > 0
        assert after.kv_tokens_used + after.kv_tokens_cached <= 640

    def test_a_full_cache_gives_way_to_jobs(self, make_engine, alone):
        engine = make_engine(kv_tokens=512)
        for number in range(12):
            prompt = f"{number} {STORY * 3}"
            assert answer(engine, prompt).text == alone(prompt)
            engine._stepper.cache.memory.validate()

    def test_the_librarys_cache_shares_as_well(self, make_engine, alone, monkeypatch):
        # What a GPU runs, but for the kernels.
        from llmos.drivers.engines.stepper import Stepper

        monkeypatch.setattr(Stepper, "_own_attention", lambda self, config: False)
        engine = make_engine(kv_tokens=640)
        assert answer(engine, STORY * 3).text == alone(STORY * 3)
        # Together they read more than the cache holds.
        many = [start(engine, STORY * 3, new=16) for _ in range(8)]
        for listener in many:
            assert listener.wait().cached_tokens > 0
            assert listener.text == alone(STORY * 3, 16)
        assert engine.statistics().kv_tokens == 640


# ---------------------------------------------------------------- giving way


class Urgent(Fifo):
    """The highest priority enters first, and the lowest that runs gives way to a higher one."""

    def __init__(self):
        super().__init__()
        self.waiting = {}

    def add(self, request, now_s):
        super().add(request, now_s)
        self.waiting[request.key] = request

    def remove(self, key, now_s):
        super().remove(key, now_s)
        del self.waiting[key]

    def first(self, now_s):
        if not self.waiting:
            return None
        return max(self.waiting.values(), key=lambda r: (r.priority, -r.submitted_s)).key

    def victim(self, running, now_s):
        first = self.waiting[self.first(now_s)]
        lowest = min(running, key=lambda r: r.priority)
        return lowest.key if lowest.priority < first.priority else None


class Restless(Fifo):
    """Somebody gives way at every other question."""

    def __init__(self):
        super().__init__()
        self.chance = random.Random(11)
        self.owed = Counter()

    def served(self, tenant, agent, read, written, now_s):
        self.owed["read"] += read
        self.owed["written"] += written

    def victim(self, running, now_s):
        return self.chance.choice(running).key if self.chance.random() < 0.2 else None


@pytest.mark.parametrize("chance", [{}, {"temperature": 1.2, "seed": 7, "top_p": 0.9}])
def test_who_gives_way_goes_on_with_the_same_tokens(make_engine, alone, chance):
    engine = make_engine(kv_tokens=512)
    engine.use_policy(Urgent())
    slow = start(engine, STORY, 400, **chance)
    assert slow.first.wait(20)
    quick = start(engine, OTHER, 200, priority=1, **chance)
    quick.wait(30)
    assert not slow.done.is_set()
    last = slow.wait(60)
    assert engine.statistics().preempted == 1
    assert quick.text == alone(OTHER, 200, **chance)
    assert slow.text == alone(STORY, 400, **chance)
    assert last.new_tokens == slow.tokens == 400


@pytest.mark.parametrize("share", [True, False])
def test_any_number_of_changes_leaves_every_answer_as_it_was(make_engine, alone, share):
    engine = make_engine(kv_tokens=512, share_prefixes=share, max_batch_tokens=64)
    policy = Restless()
    engine.use_policy(policy)
    jobs = []
    for i in range(14):
        params = {"temperature": 1.0, "seed": i} if i % 2 else {}
        prompt = f"{i} {STORY * (i % 3)}{OTHER}"
        jobs.append((prompt, 60 + i, params, start(engine, prompt, 60 + i, **params)))
    for prompt, new, params, listener in jobs:
        assert listener.wait(60).new_tokens == listener.tokens == new
        assert listener.text == alone(prompt, new, **params)
    after = engine.statistics()
    assert after.preempted > 5
    # Nobody pays for reading again, and what was found is no debt.
    assert settle(lambda: policy.owed["written"] == sum(new for _, new, _, _ in jobs))
    assert policy.owed["read"] == after.prompt_tokens
    assert after.prompt_tokens + after.cached_prompt_tokens == sum(
        engine.count_tokens(prompt) for prompt, *_ in jobs
    )


def test_a_paused_job_gives_its_memory_to_who_waits(make_engine, alone):
    engine = make_engine(kv_tokens=512)
    held = start(engine, STORY, 400)
    assert held.first.wait(20)
    assert engine.pause(held.id)
    assert answer(engine, OTHER, 300).text == alone(OTHER, 300)
    assert not held.done.is_set()
    stats = engine.statistics()
    assert (stats.preempted, stats.waiting, stats.running) == (1, 1, 0)
    assert engine.resume(held.id)
    held.wait(30)
    assert held.text == alone(STORY, 400)


def test_a_paused_job_keeps_its_memory_while_nobody_needs_it(make_engine, alone):
    engine = make_engine()
    held = start(engine, STORY, 100)
    assert held.first.wait(20)
    engine.pause(held.id)
    assert answer(engine, OTHER).text == alone(OTHER)
    assert engine.statistics().preempted == 0
    assert engine.statistics().kv_tokens_used >= 100
    engine.resume(held.id)
    held.wait(30)
    assert held.text == alone(STORY, 100)


# ---------------------------------------------------------------- steps


def watch(engine):
    """What each step did: (decoding, tokens of each part)."""
    seen = []
    whole = engine._stepper.step

    def step():
        ready = [s.key for s in engine._stepper.inside.values() if s.new_tokens and not s.paused]
        result = whole()
        if result is not None:
            seen.append((ready, [(s.key, new) for s, new in result.parts], result.decoding))
        return result

    engine._stepper.step = step
    return seen


def test_prompts_are_read_beside_decoding_within_the_granted_tokens(make_engine, alone):
    engine = make_engine(max_batch_tokens=32)
    seen = watch(engine)
    jobs = [start(engine, STORY, 60), start(engine, STORY * 2 + OTHER, 20), start(engine, OTHER)]
    for listener in jobs:
        listener.wait(30)
    assert jobs[1].text == alone(STORY * 2 + OTHER, 20)
    for ready, parts, decoding in seen:
        assert sum(new for _, new in parts) <= 32
        # Who writes takes part in every step.
        assert set(ready) <= {key for key, _ in parts}
        assert decoding == len(ready)
    assert any(len(ready) >= 1 and len(parts) > len(ready) for ready, parts, _ in seen)


def test_without_chunks_a_prompt_is_read_by_itself(make_engine, alone):
    engine = make_engine(chunked_prefill=False, max_batch_tokens=256)
    seen = watch(engine)
    jobs = [start(engine, STORY, 40), start(engine, STORY * 2 + OTHER, 20), start(engine, OTHER)]
    for listener in jobs:
        listener.wait(30)
    assert jobs[0].text == alone(STORY, 40)
    assert jobs[1].text == alone(STORY * 2 + OTHER, 20)
    reading = [parts for _, parts, _ in seen if any(new > 1 for _, new in parts)]
    assert [len(parts) for parts in reading] == [1, 1, 1]


def test_prompts_as_long_as_the_context_allows(make_engine, alone):
    engine = make_engine(kv_tokens=2048)
    assert engine.context_tokens == 1024
    word = " yes"
    room = engine.context_tokens - 1
    while engine.count_tokens(word * room) > room:
        word += "!"
        room = engine.context_tokens - 1
    text = "1" * room
    assert engine.count_tokens(text) == room
    got = answer(engine, text, 1)
    assert (got.chunks[-1].prompt_tokens, got.tokens) == (room, 1)
    for prompt, new in ((text + "1", 1), (text, 2)):
        with pytest.raises(PromptTooLong) as caught:
            start(engine, prompt, new)
        assert caught.value.limit == "context"
        assert caught.value.prompt_tokens + caught.value.max_new_tokens == room + 2


def test_the_cache_is_as_large_as_was_granted(make_engine):
    engine = make_engine(kv_tokens=100)
    assert engine.statistics().kv_tokens == 96
    layers = engine._stepper.cache._layers
    assert {keys.shape[1] for keys, _ in layers.values()} == {96}
    held = sum(t.numel() * t.element_size() for pair in layers.values() for t in pair)
    config = engine._stepper.model.config
    row = config.num_key_value_heads * config.head_dim * 4
    assert held == 2 * config.num_hidden_layers * 96 * row


# ---------------------------------------------------------------- what goes wrong


def test_a_broken_step_fails_everybody_and_leaks_nothing(make_engine):
    engine = make_engine()
    threads = {t.name for t in threading.enumerate()}
    running = [start(engine, STORY, 600) for _ in range(3)]
    for listener in running:
        assert listener.first.wait(20)
    engine.pause(running[0].id)

    def broken(**arguments):
        raise RuntimeError("the weights are gone")

    engine._stepper.model.forward = broken
    began = time.monotonic()
    for listener in running:
        last = listener.wait(5)
        assert last.finish == "error"
        assert "weights are gone" in last.error.reason
    assert time.monotonic() - began < 5
    with pytest.raises(EngineFailed, match="weights are gone"):
        start(engine, STORY)
    engine.close()
    stats = engine.statistics()
    assert (stats.running, stats.waiting, stats.kv_tokens_used) == (0, 0, 0)
    assert stats.failed == 3
    assert "llmos-engine-tiny" not in {t.name for t in threading.enumerate()} - threads
    assert not engine._stepper.inside


def test_a_policy_that_fails_fails_the_engine_and_not_the_caller_in_silence(make_engine):
    class Broken(Fifo):
        def served(self, tenant, agent, read, written, now_s):
            raise ZeroDivisionError("no weight")

    engine = make_engine()
    engine.use_policy(Broken())
    last = start(engine, STORY).wait(10)
    assert last.finish == "error"
    assert "no weight" in last.error.reason


def test_a_million_stop_strings_are_refused_at_once(make_engine):
    engine = make_engine()
    stops = tuple(map(str, range(10**6)))
    began = time.monotonic()
    with pytest.raises(InvalidParams):
        start(engine, STORY, stop=stops)
    assert time.monotonic() - began < 0.5


# ---------------------------------------------------------------- step times


def test_steps_are_measured_before_the_first_job(folder, monkeypatch):
    monkeypatch.setattr(causal, "CALIBRATION_S", 2.0)
    engine = tiny_causal.engine(folder)
    try:
        assert settle(lambda: engine.step_time() is not None)
        found = engine.step_time()
        assert 0 < found.predict_s(8, 800, 64) < 5
        # Nobody asked for these steps.
        stats = engine.statistics()
        assert (stats.steps, stats.new_tokens, stats.prompt_tokens) == (0, 0, 0)
        answer(engine, STORY)
        assert settle(lambda: engine.statistics().kv_tokens_used == 0)
        assert engine.statistics().steps >= 24
    finally:
        engine.close()


def test_steps_of_jobs_are_measured(make_engine):
    engine = make_engine()
    assert engine.step_time() is None
    answer(engine, STORY)
    assert engine.step_time() is not None
