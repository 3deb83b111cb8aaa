from __future__ import annotations

import random

import pytest

from llmos.kernel.core import history as module
from llmos.kernel.core.history import Histogram, History, program_of
from tests.core.policies.suite import request


def test_the_mean_rest_is_that_of_the_sizes_seen() -> None:
    chance = random.Random(1)
    sizes = [chance.paretovariate(1.5) * 100 for _ in range(2000)]
    seen = Histogram()
    for size in sizes:
        seen.add(size)
    seen.validate()
    for attained in (0.0, 150.0, 400.0, 2000.0):
        rest = [s - attained for s in sizes if s > attained]
        assert seen.remaining(attained) == pytest.approx(sum(rest) / len(rest), rel=0.2)
    assert seen.remaining(1e9) == 1e9, "longer than all before it"


def test_old_turns_are_forgotten() -> None:
    seen = Histogram()
    for _ in range(3000):
        seen.add(100.0)
    for _ in range(6000):
        seen.add(10_000.0)
    assert len(seen) <= module.KEPT
    assert seen.remaining(0.0) > 9000
    seen.validate()


def test_a_turn_ends_when_its_agent_goes_on_or_is_silent() -> None:
    history = History()
    for number in range(10):
        asked = request(f"r{number}", agent="t/p/a", turn=str(number))
        history.queued(asked, float(number))
        history.left(asked, float(number))
        history.served("t/p/a", 10, 20, float(number))
    assert history.remaining(request("x", agent="t/p/b", prompt_tokens=0), 0.0) == pytest.approx(50)
    lonely = request("l", agent="t/q/a", turn="1")
    history.queued(lonely, 10.0)
    history.left(lonely, 10.0)
    history.served("t/q/a", 0, 500, 10.0)
    for number in range(4):
        history.queued(request(f"o{number}", agent=f"t/o/{number}"), 1000.0)
    assert "t/q" in history._programs
    history.validate()


def test_a_turn_that_waits_long_has_not_ended() -> None:
    history = History()
    history.queued(request("r", agent="t/p/a", turn="1"), 0.0)
    for number in range(4):
        history.queued(request(f"o{number}", agent=f"t/o/{number}"), 1e6)
    assert ("t/p/a", "1") in history._open
    history.validate()


def test_what_never_ran_teaches_nothing() -> None:
    history = History()
    for number in range(10):
        asked = request(f"r{number}", agent="t/p/a", turn=str(number))
        history.queued(asked, 0.0)
        history.left(asked, 0.0)
    assert not history._programs


def test_open_turns_and_programs_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_OPEN", 20)
    monkeypatch.setattr(module, "MAX_PROGRAMS", 5)
    history = History()
    for number in range(100):
        asked = request(f"r{number}", agent=f"t/p{number}/a", turn="1")
        history.queued(asked, 0.0)
        history.served(asked.agent, 1, 1, 0.0)
        history.left(asked, 0.0)
    history.validate()
    assert len(history._open) == 20
    assert len(history._programs) == 5


def test_the_program_is_the_name_without_its_key() -> None:
    assert program_of("bank/help/main") == "bank/help"
    assert program_of("alone") == "alone"
