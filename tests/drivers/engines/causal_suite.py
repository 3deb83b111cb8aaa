"""What every causal engine must do. Subclass and provide the fixture ``engine``.

``long_prompt`` must make the engine speak for at least 60 tokens with ``ignore_eos``.
"""

import pickle
import random
import threading
import time
from collections.abc import Callable, Sequence

import pytest

from llmos.drivers.errors import EngineBusy, EngineFailed, InvalidParams, PromptTooLong
from llmos.drivers.protocols import (
    CausalEngine,
    ChatTurn,
    GenerationChunk,
    GenerationJob,
    QueuedRequest,
    SamplingParams,
    Standing,
)

NAN = float("nan")
QUESTION = (ChatTurn("user", "Name three colours of the rainbow, please, and say why."),)


class Listener:
    """Collects the chunks of one job and checks their order."""

    def __init__(self) -> None:
        self.chunks: list[GenerationChunk] = []
        self.done = threading.Event()
        self.first = threading.Event()

    def __call__(self, chunk: GenerationChunk) -> None:
        assert not self.done.is_set(), "a chunk after the last one"
        self.chunks.append(chunk)
        self.first.set()
        if chunk.finish:
            self.done.set()

    def wait(self, timeout_s: float = 120) -> GenerationChunk:
        assert self.done.wait(timeout_s), "no last chunk"
        return self.chunks[-1]

    @property
    def text(self) -> str:
        return "".join(c.text for c in self.chunks)

    @property
    def tokens(self) -> int:
        return sum(c.tokens for c in self.chunks)


_serial = iter(range(10**9))


def job(prompt=QUESTION, job_id: str = "", prefix: str = "", **params) -> GenerationJob:
    name = job_id or f"job-{next(_serial)}"
    return GenerationJob(name, prompt, SamplingParams(**params), prefix=prefix)


def ask(engine: CausalEngine, prompt=QUESTION, **params) -> Listener:
    listener = Listener()
    engine.submit(job(prompt, **params), listener)
    listener.wait()
    return listener


def goes_on(engine: CausalEngine, whole: Listener, prompt, **params) -> int:
    """Break an answer off after each of its chunks, go on from there, and compare; how often."""
    parts = []
    text, tokens = "", 0
    for chunk in whole.chunks[:-1]:
        text, tokens = text + chunk.text, tokens + chunk.tokens
        listener = Listener()
        left = {**params, "max_new_tokens": params["max_new_tokens"] - tokens}
        engine.submit(job(prompt, prefix=text, **left), listener)
        parts.append((text, tokens, listener))
    last = whole.chunks[-1]
    for text, tokens, listener in parts:
        again = listener.wait()
        assert text + listener.text == whole.text, f"after {text!r}"
        assert not text[-1].isspace()
        assert again.finish == last.finish
        assert again.new_tokens == listener.tokens == last.new_tokens - tokens
        assert again.prompt_tokens > last.prompt_tokens
    return len(parts)


def settle(check: Callable[[], bool], timeout_s: float = 20) -> bool:
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        if check():
            return True
        time.sleep(0.01)
    return check()


class CausalSuite:
    many = 32
    cancels = 100

    @pytest.fixture(autouse=True)
    def leaves_nothing_behind(self, engine):
        yield
        assert settle(lambda: engine.statistics().kv_tokens_used == 0)
        after = engine.statistics()
        assert (after.running, after.waiting) == (0, 0)

    def test_an_answer_ends_with_one_last_chunk_that_accounts_for_it(self, engine):
        before = engine.statistics()
        got = ask(engine, max_new_tokens=6)
        last = got.chunks[-1]
        assert last.finish in ("stop", "length")
        assert last.error is None
        assert got.text.strip()
        assert last.prompt_tokens == engine.count_tokens(QUESTION)
        assert 0 < last.new_tokens == got.tokens <= 6
        assert last.queued_s >= 0
        assert last.run_s > 0
        after = engine.statistics()
        assert after.finished == before.finished + 1
        assert after.new_tokens == before.new_tokens + last.new_tokens
        read = after.prompt_tokens - before.prompt_tokens
        assert read == last.prompt_tokens - last.cached_tokens
        assert after.cached_prompt_tokens == before.cached_prompt_tokens + last.cached_tokens

    def test_what_it_keeps_is_told_by_purpose_and_stays_the_same(self, engine):
        before = engine.memory_bytes()
        assert set(before) <= {"weights", "kv", "adapters"}
        assert all(size > 0 for size in before.values())
        ask(engine, max_new_tokens=4)
        assert engine.memory_bytes() == before

    def test_length_is_honoured(self, engine):
        got = ask(engine, max_new_tokens=1)
        assert got.chunks[-1].finish == "length"
        assert got.tokens == 1

    def test_ignore_eos_generates_exactly_what_was_asked(self, engine):
        got = ask(engine, (ChatTurn("user", "Hi"),), max_new_tokens=60, ignore_eos=True)
        assert got.chunks[-1].finish == "length"
        assert got.chunks[-1].new_tokens == got.tokens == 60

    def test_greedy_is_repeatable_and_independent_of_company(self, engine):
        alone = ask(engine, max_new_tokens=8).text
        company = [Listener() for _ in range(6)]
        prompts = [QUESTION, "Once upon a time", QUESTION, "The sea is", QUESTION, "x " * 40]
        for listener, prompt in zip(company, prompts, strict=True):
            engine.submit(job(prompt, max_new_tokens=8), listener)
        for listener in company:
            listener.wait()
        assert {company[i].text for i in (0, 2, 4)} == {alone}

    def test_streaming_comes_in_pieces(self, engine):
        got = ask(engine, max_new_tokens=12, ignore_eos=True)
        assert len([c for c in got.chunks if c.text]) > 3

    def test_stop_strings_end_the_text_before_them_wherever_tokens_split(self, engine):
        whole = ask(engine, max_new_tokens=12, ignore_eos=True).text
        middle = len(whole) // 2
        for width in (1, 3, 7):
            stop = whole[middle : middle + width]
            if not stop.strip():
                continue
            got = ask(engine, max_new_tokens=12, ignore_eos=True, stop=(stop, "\x00never"))
            assert got.text == whole[: whole.find(stop)]
            assert got.chunks[-1].finish == "stop"
            assert all(stop not in c.text for c in got.chunks)

    def test_a_stop_string_that_never_comes_changes_nothing(self, engine):
        whole = ask(engine, max_new_tokens=10, ignore_eos=True).text
        near_miss = whole[-4:] + "\x00"
        got = ask(engine, max_new_tokens=10, ignore_eos=True, stop=(near_miss,))
        assert got.text == whole

    @pytest.mark.parametrize("stops", ["none", "one that nearly comes"])
    def test_a_prefix_that_ended_at_a_chunks_end_goes_on_as_the_stream_did(self, engine, stops):
        params = {"max_new_tokens": 24}
        whole = ask(engine, **params)
        if stops != "none":
            # Text is held back in the middle of words, and chunks must end at tokens all the same.
            nearly = [whole.text[i : i + 5] + "\x00" for i in range(1, len(whole.text) - 5, 9)]
            params["stop"] = tuple(nearly[:16])
            whole = ask(engine, **params)
        assert goes_on(engine, whole, QUESTION, **params) > 3

    def test_an_empty_prefix_is_none(self, engine):
        got = ask(engine, max_new_tokens=6, prefix="")
        assert got.text == ask(engine, max_new_tokens=6).text
        assert got.chunks[-1].prompt_tokens == engine.count_tokens(QUESTION)

    def test_a_prefix_goes_with_a_bare_prompt(self, engine):
        whole = ask(engine, "One two three four five six seven", max_new_tokens=8, ignore_eos=True)
        first = whole.chunks[0]
        got = ask(
            engine,
            "One two three four five six seven",
            max_new_tokens=8 - first.tokens,
            ignore_eos=True,
            prefix=first.text,
        )
        assert first.text + got.text == whole.text

    def test_a_stop_string_is_found_across_the_end_of_the_prefix(self, engine):
        whole = ask(engine, max_new_tokens=10, ignore_eos=True)
        text = ""
        for chunk in whole.chunks[:4]:
            text += chunk.text
        stop = whole.text[len(text) - 2 : len(text) + 2]
        assert stop not in text
        got = ask(engine, max_new_tokens=10, ignore_eos=True, prefix=text, stop=(stop,))
        assert (got.text, got.chunks[-1].finish) == ("", "stop")
        assert got.tokens <= 2
        almost = stop[:2] + "\x00"
        rest = whole.text[len(text) :]
        got = ask(engine, max_new_tokens=6, ignore_eos=True, prefix=text, stop=(almost,))
        assert rest.startswith(got.text) or got.text.startswith(rest)
        assert got.chunks[-1].finish == "length"

    def test_a_stop_string_within_the_prefix_is_past(self, engine):
        first = ask(engine, max_new_tokens=3, ignore_eos=True).text
        got = ask(engine, max_new_tokens=1, ignore_eos=True, prefix=first, stop=(first[:2], first))
        assert got.chunks[-1].finish == "length"

    def test_a_prefix_counts_against_the_context_alone(self, engine):
        got = ask(engine, max_new_tokens=5, ignore_eos=True, prefix="one two three four five six")
        assert got.tokens == 5
        assert got.chunks[-1].prompt_tokens >= engine.count_tokens(QUESTION) + 6
        capacity = engine.statistics().kv_tokens
        new = capacity - engine.count_tokens(QUESTION)
        with pytest.raises(PromptTooLong):
            engine.submit(job(max_new_tokens=new, prefix="one"), Listener())

    def test_a_megabyte_of_prefix_is_refused_quickly(self, engine):
        began = time.monotonic()
        with pytest.raises(PromptTooLong):
            engine.submit(job(prefix="word and word " * 80_000, max_new_tokens=4), Listener())
        assert time.monotonic() - began < 5

    @pytest.mark.parametrize("prefix", ["a\ud800b", None, b"x"])
    def test_impossible_prefixes_are_refused(self, engine, prefix):
        with pytest.raises(InvalidParams) as caught:
            engine.submit(job(prefix=prefix, max_new_tokens=4), Listener())
        assert caught.value.field == "prefix"

    def test_unicode_passes(self, engine):
        got = ask(engine, (ChatTurn("user", "Grüße 🌈 日本 \u200d e\u0301"),), max_new_tokens=10)
        got.text.encode("utf-8")
        assert got.chunks[-1].finish in ("stop", "length")

    @pytest.mark.parametrize(
        ("field", "value"),
        [
            ("max_new_tokens", 0),
            ("max_new_tokens", -3),
            ("max_new_tokens", True),
            ("max_new_tokens", 1.5),
            ("temperature", NAN),
            ("temperature", -0.1),
            ("temperature", float("inf")),
            ("top_p", 0.0),
            ("top_p", 1.01),
            ("top_p", NAN),
            ("top_k", -1),
            ("stop", tuple("abcdefghijklmnopq")),
            ("stop", ("x" * 257,)),
            ("stop", ("",)),
            ("stop", ("\ud800",)),
            ("stop", "abc"),
        ],
    )
    def test_impossible_parameters_are_refused(self, engine, field, value):
        listener = Listener()
        with pytest.raises(InvalidParams) as caught:
            engine.submit(job(**{"max_new_tokens": 4, field: value}), listener)
        assert caught.value.field == field
        assert pickle.loads(pickle.dumps(caught.value)).facts == caught.value.facts
        assert not listener.chunks

    @pytest.mark.parametrize("prompt", ["", (), "a\ud800b", (ChatTurn("user", "\udfff"),)])
    def test_impossible_prompts_are_refused(self, engine, prompt):
        with pytest.raises(InvalidParams):
            engine.submit(job(prompt, max_new_tokens=4), Listener())
        with pytest.raises(InvalidParams):
            engine.count_tokens(prompt)

    def test_an_id_that_is_inside_is_refused(self, engine):
        first = Listener()
        engine.submit(job(job_id="same", max_new_tokens=50, ignore_eos=True), first)
        with pytest.raises(InvalidParams):
            engine.submit(job(job_id="same", max_new_tokens=1), Listener())
        engine.cancel("same")
        first.wait()
        again = Listener()
        engine.submit(job(job_id="same", max_new_tokens=1), again)
        assert again.wait().finish == "length"

    def test_too_long_for_the_kv_budget(self, engine):
        capacity = engine.statistics().kv_tokens
        assert capacity < engine.context_tokens, "the suite wants a small KV budget"
        with pytest.raises(PromptTooLong) as caught:
            engine.submit(job("one two three", max_new_tokens=capacity), Listener())
        assert caught.value.limit == "KV budget"
        assert caught.value.limit_tokens == capacity

    def test_a_megabyte_of_prompt_is_refused_quickly(self, engine):
        began = time.monotonic()
        with pytest.raises(PromptTooLong):
            engine.submit(job("word and word " * 80_000, max_new_tokens=4), Listener())
        assert time.monotonic() - began < 5

    def test_cancel_ends_a_running_job(self, engine):
        before = engine.statistics()
        listener = Listener()
        engine.submit(job(job_id="c", max_new_tokens=400, ignore_eos=True), listener)
        assert listener.first.wait(60)
        assert engine.statistics().kv_tokens_used > 0
        assert engine.cancel("c")
        last = listener.wait(30)
        assert last.finish == "cancelled"
        assert last.new_tokens == listener.tokens < 400
        assert not engine.cancel("c")
        assert engine.statistics().cancelled == before.cancelled + 1

    def test_cancel_of_an_unknown_job(self, engine):
        assert not engine.cancel("nobody")

    def test_many_at_once_all_end(self, engine):
        listeners = [Listener() for _ in range(self.many)]
        for i, listener in enumerate(listeners):
            params = {"temperature": 0.9, "top_p": 0.8, "top_k": 40} if i % 2 else {}
            engine.submit(job(f"Number {i} is", max_new_tokens=4 + i % 5, **params), listener)
        for i, listener in enumerate(listeners):
            last = listener.wait()
            assert last.finish in ("stop", "length")
            assert listener.tokens == last.new_tokens <= 4 + i % 5

    def test_random_cancels_leak_nothing(self, engine):
        chance = random.Random(7)
        listeners = []
        for i in range(self.cancels):
            listener = Listener()
            listeners.append(listener)
            name = f"r{i}"
            engine.submit(job(f"Story {i}:", name, max_new_tokens=30, ignore_eos=True), listener)
            if chance.random() < 0.3:
                time.sleep(chance.random() * 0.02)
            engine.cancel(name if chance.random() < 0.7 else f"r{chance.randrange(i + 1)}")
        for i in range(self.cancels):
            engine.cancel(f"r{i}")
        ends = {listener.wait().finish for listener in listeners}
        assert ends <= {"cancelled", "length"}
        assert "cancelled" in ends
        assert settle(lambda: engine.statistics().kv_tokens_used == 0)
        assert ask(engine, max_new_tokens=2).text

    def test_a_callback_that_raises_hurts_only_its_own_job(self, engine):
        def broken(chunk):
            raise ValueError("the caller's own mistake")

        engine.submit(job(max_new_tokens=400, ignore_eos=True), broken)
        assert ask(engine, max_new_tokens=3).text
        assert settle(lambda: engine.statistics().running == 0)

    def test_a_full_engine_says_when_to_come_back(self, make_engine):
        engine = make_engine(max_waiting=2)
        try:
            listeners = [Listener(), Listener()]
            for i, listener in enumerate(listeners):
                engine.submit(job(job_id=f"b{i}", max_new_tokens=400, ignore_eos=True), listener)
            with pytest.raises(EngineBusy) as caught:
                engine.submit(job(max_new_tokens=1), Listener())
            assert caught.value.waiting == 2
            assert 0 < caught.value.retry_after_s <= 60
            engine.cancel("b0")
            listeners[0].wait()
            assert ask(engine, max_new_tokens=1).chunks[-1].finish == "length"
        finally:
            engine.close()

    def test_close_fails_what_is_inside_and_is_idempotent(self, make_engine):
        engine = make_engine()
        names = {t.name for t in threading.enumerate()}
        listeners = [Listener() for _ in range(3)]
        for listener in listeners:
            engine.submit(job(max_new_tokens=400, ignore_eos=True), listener)
        engine.close()
        for listener in listeners:
            last = listener.wait(1)
            assert last.finish == "error"
            assert isinstance(last.error, EngineFailed)
        engine.close()
        with pytest.raises(EngineFailed):
            engine.submit(job(max_new_tokens=1), Listener())
        after = engine.statistics()
        assert (after.running, after.waiting, after.kv_tokens_used) == (0, 0, 0)
        assert after.failed == 3
        assert {t.name for t in threading.enumerate()} <= names


class Backwards:
    """A policy that lets in who came last. Public, as an example: no more is needed."""

    def __init__(self) -> None:
        self.waiting: list[str] = []
        self.let_in: list[str] = []

    def add(self, request: QueuedRequest, now_s: float) -> None:
        self.waiting.append(request.key)

    def remove(self, key: str, now_s: float) -> None:
        self.waiting.remove(key)
        self.let_in.append(key)

    def first(self, now_s: float) -> str | None:
        return self.waiting[-1] if self.waiting else None

    def served(self, tenant: str, agent: str, read: int, written: int, now_s: float) -> None:
        pass

    def victim(self, running: Sequence[QueuedRequest], now_s: float) -> str | None:
        return None

    def standing(self, key: str, now_s: float) -> Standing:
        place = self.waiting.index(key)
        return Standing(tuple(reversed(self.waiting[place + 1 :])), "who came last enters first")


class QueueSuite:
    """What engines do that have a queue and steps of their own."""

    def test_it_says_where_a_job_stands(self, make_engine):
        engine = make_engine(kv_tokens=512)
        try:
            listeners = [Listener() for _ in range(3)]
            engine.submit(job(job_id="in", max_new_tokens=400, ignore_eos=True), listeners[0])
            assert listeners[0].first.wait(60)
            for name, listener in zip("ab", listeners[1:], strict=True):
                engine.submit(job(job_id=name, max_new_tokens=300, ignore_eos=True), listener)
            inside, first, second = (engine.place(name) for name in ("in", "a", "b"))
            assert (inside.state, inside.position, inside.running) == ("running", 0, 1)
            assert 0 < inside.new_tokens <= inside.max_new_tokens == 400
            assert [(p.state, p.position) for p in (first, second)] == [
                *(("waiting", 1), ("waiting", 2))
            ]
            assert "order of arrival" in second.reason
            assert first.kv_needed > first.kv_free >= 0
            assert first.new_tokens == 0
            assert first.waited_s >= second.waited_s >= 0
            assert (first.estimate_s is None) == (engine.step_time() is None)
            if first.estimate_s is not None:
                assert 0 < first.estimate_s < second.estimate_s
            engine.pause("a")
            assert engine.place("a").state == "paused"
            assert engine.place("b").position == 1
            for name in ("in", "a", "b"):
                engine.cancel(name)
            for listener in listeners:
                listener.wait()
            assert engine.place("in") is None
        finally:
            engine.close()

    def test_a_policy_decides_who_enters(self, make_engine):
        engine = make_engine(kv_tokens=512)
        try:
            listeners = [Listener() for _ in range(5)]
            ends = []

            def end(name):
                return lambda chunk: ends.append(name) if chunk.finish else None

            engine.submit(job(max_new_tokens=400, ignore_eos=True), listeners[0])
            assert listeners[0].first.wait(60)
            for name in "abc":
                params = SamplingParams(max_new_tokens=300, ignore_eos=True)
                engine.submit(GenerationJob(name, QUESTION, params), end(name))
            engine.use_policy(Backwards())
            assert settle(lambda: len(ends) == 3, 60)
            assert ends == ["c", "b", "a"]
        finally:
            engine.close()

    def test_a_paused_job_writes_nothing_until_it_is_resumed(self, engine):
        params = {"max_new_tokens": 200, "ignore_eos": True}
        whole = ask(engine, **params).text
        held = Listener()
        engine.submit(job(job_id="held", **params), held)
        assert held.first.wait(60)
        assert engine.pause("held")
        assert engine.pause("held")
        # The step that was under way is over when another job has come and gone.
        ask(engine, max_new_tokens=2)
        chunks = len(held.chunks)
        ask(engine, max_new_tokens=8, ignore_eos=True)
        assert len(held.chunks) == chunks
        assert not held.done.is_set()
        assert engine.resume("held")
        assert engine.resume("held")
        held.wait()
        assert held.text == whole
        assert not engine.pause("held")
        assert not engine.resume("held")

    def test_a_job_may_be_paused_before_it_runs_and_cancelled_while_paused(self, make_engine):
        engine = make_engine(kv_tokens=512)
        try:
            long, waits, gone = Listener(), Listener(), Listener()
            engine.submit(job(job_id="long", max_new_tokens=400, ignore_eos=True), long)
            assert long.first.wait(60)
            engine.submit(job(job_id="waits", max_new_tokens=300, ignore_eos=True), waits)
            engine.submit(job(job_id="gone", max_new_tokens=300, ignore_eos=True), gone)
            assert engine.pause("waits")
            assert engine.pause("gone")
            assert engine.cancel("gone")
            assert gone.wait(30).finish == "cancelled"
            engine.cancel("long")
            long.wait(30)
            ask(engine, max_new_tokens=2)
            assert not waits.chunks
            assert engine.resume("waits")
            assert waits.wait(60).new_tokens == 300
            assert settle(lambda: engine.statistics().kv_tokens_used == 0)
        finally:
            engine.close()
