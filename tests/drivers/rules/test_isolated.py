"""Rules that never stop are stopped, and the next evaluation is as good as the first."""

from __future__ import annotations

import os
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from llmos.drivers.errors import RuleFailed, RuleTimeout
from llmos.drivers.protocols import Fact
from llmos.drivers.rules import isolated
from llmos.drivers.rules.clips import ClipsRuleBase

COUNT = "(defrule count (n ?x) => (assert (m (+ ?x 1))))"
LOOP = COUNT + "(defrule loop (forever) => (loop-for-count (?i 1 99999999999) (+ ?i 1)))"
MATCH = COUNT + "(defrule cross (n ?a) (n ?b) (n ?c) (n ?d) (test (< (+ ?a ?b ?c ?d) 0)) => )"
MEMORY = COUNT + (
    "(defrule eat (forever) => (bind ?x (create$ a b c d e f g h))"
    " (loop-for-count 40 (bind ?x (create$ ?x ?x))))"
)


def n(x: int) -> Fact:
    return Fact("n", {"values": (x,)})


FOREVER = Fact("forever", {"values": ()})


@pytest.mark.parametrize(
    ("source", "facts"),
    [(LOOP, [FOREVER]), (MATCH, [n(i) for i in range(2000)])],
    ids=["loop in an action", "match without an end"],
)
def test_what_does_not_end_is_stopped(source: str, facts: list[Fact]) -> None:
    base = ClipsRuleBase("r", source)
    assert len(base.evaluate([n(1)]).firings) == 1
    begun = time.monotonic()
    with pytest.raises(RuleTimeout) as caught:
        base.evaluate(facts, timeout_s=0.3)
    assert time.monotonic() - begun < 5
    assert caught.value.timeout_s == 0.3
    assert len(base.evaluate([n(1)]).firings) == 1


def test_memory_is_bounded() -> None:
    base = ClipsRuleBase("r", MEMORY)
    with pytest.raises((RuleFailed, RuleTimeout)):
        base.evaluate([FOREVER], timeout_s=20)
    assert len(base.evaluate([n(1)]).firings) == 1


def test_a_child_that_was_killed_is_replaced() -> None:
    base = ClipsRuleBase("r", COUNT)
    for child in isolated._POOL._idle:
        child.process.kill()
        child.process.wait()
    assert len(base.evaluate([n(1)]).firings) == 1


def test_no_more_children_are_kept_than_needed() -> None:
    base = ClipsRuleBase("r", COUNT)
    with ThreadPoolExecutor(6) as pool:
        list(pool.map(lambda i: base.evaluate([n(i)]), range(60)))
    assert 1 <= len(isolated._POOL._idle) <= isolated._IDLE


def test_times_are_above_0() -> None:
    with pytest.raises(ValueError, match="timeout_s"):
        ClipsRuleBase("r", COUNT).evaluate([], timeout_s=0)


def test_a_forked_process_has_children_of_its_own() -> None:
    base = ClipsRuleBase("r", COUNT)
    pid = os.fork()
    if pid == 0:
        fired = len(base.evaluate([n(1)]).firings)
        isolated._POOL.close()
        os._exit(0 if fired == 1 else 1)
    assert os.waitpid(pid, 0)[1] == 0
    assert len(base.evaluate([n(1)]).firings) == 1
