from pathlib import Path

import pytest

from llmos.drivers.engines.echo import EchoEngine
from llmos.drivers.protocols import ChatTurn, EngineOptions
from tests.drivers.engines.causal_suite import CausalSuite, ask


@pytest.fixture(scope="module")
def engine():
    engine = EchoEngine(EngineOptions("echo", Path(), kv_tokens=2048))
    yield engine
    engine.close()


@pytest.fixture
def make_engine():
    return lambda **o: EchoEngine(EngineOptions("echo", Path(), **{"kv_tokens": 2048, **o}))


class TestEchoEngine(CausalSuite):
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
