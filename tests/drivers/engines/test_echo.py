from pathlib import Path

import pytest

from llmos.drivers.engines.echo import EchoEngine
from llmos.drivers.protocols import ChatTurn, EngineOptions
from tests.drivers.engines.causal_suite import CausalSuite, Listener, QueueSuite, ask, job


@pytest.fixture(scope="module")
def engine():
    engine = EchoEngine(EngineOptions("echo", Path(), kv_tokens=2048))
    yield engine
    engine.close()


@pytest.fixture
def make_engine():
    return lambda **o: EchoEngine(EngineOptions("echo", Path(), **{"kv_tokens": 2048, **o}))


class TestEchoEngine(CausalSuite, QueueSuite):
    def test_it_says_the_last_user_turn(self, engine):
        turns = (
            ChatTurn("user", "first"),
            ChatTurn("assistant", "yes"),
            ChatTurn("user", " the  second\none "),
        )
        got = ask(engine, turns, max_new_tokens=9)
        assert got.text == "the  second\none"
        assert got.chunks[-1].finish == "stop"
        assert got.tokens == 3

    @pytest.mark.parametrize("endless", [False, True])
    def test_a_prefix_may_end_anywhere(self, engine, endless):
        said = "Grüße,  dear\nreader of\ttests: 日本 🌈."
        params = {"max_new_tokens": 20, "ignore_eos": endless}
        whole = ask(engine, said, **params).text
        assert len(whole) > 30
        listeners = []
        for end in range(len(whole) + 1):
            listeners.append(Listener())
            engine.submit(job(said, prefix=whole[:end], **params), listeners[-1])
        for end, listener in enumerate(listeners):
            last = listener.wait()
            # The limit is of new tokens, so an endless answer comes further.
            assert (whole[:end] + listener.text).startswith(whole)
            assert (whole[:end] + listener.text == whole) or endless
            assert last.finish == ("length" if endless else "stop")

    def test_after_another_prefix_the_answer_comes_whole(self, engine):
        assert ask(engine, "one two", max_new_tokens=9, prefix="Well: ").text == "one two"
        assert ask(engine, "one two", max_new_tokens=9, prefix="one two three").text == "one two"
