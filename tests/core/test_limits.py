from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmos.kernel.core import limits as module
from llmos.kernel.core.admission import Admission, Delayed, Granted, Refused, Wanted
from llmos.kernel.core.guard import MAX_TURNS, WINDOW, LoopGuard
from llmos.kernel.core.limits import Accounts, Bucket, Over, Quota

BANK = ("tenant bank",)


def test_a_bucket_fills_up_to_its_size_and_may_be_overdrawn() -> None:
    bucket = Bucket(10.0, 100.0, 0.0)
    bucket.take(150, 0.0)
    assert bucket.level(0.0) == -50
    assert bucket.wait_s(1, 0.0) == pytest.approx(5.1)
    assert bucket.level(1000.0) == 100
    assert bucket.level(999.0) == 100, "time does not go back"
    with pytest.raises(ValueError, match="fills at 0"):
        Bucket(0.0, 1.0, 0.0)


def test_who_has_used_its_minute_waits_as_long_as_told() -> None:
    accounts = Accounts({"tenant bank": Quota(tokens_per_minute=600)})
    assert accounts.enter("a", BANK, 0.0) is None
    accounts.charge("a", 650, 0.0, 0.0)
    accounts.leave("a")
    over = accounts.enter("b", BANK, 0.0)
    assert over == Over("tenant bank", "tokens_per_minute", 600, 650, pytest.approx(5.1))
    assert "tokens_per_minute is 600, used are 650" in over.what
    assert accounts.enter("b", BANK, over.retry_after_s) is None
    accounts.validate()


def test_what_runs_at_the_same_time_is_bounded_for_all_owners_or_none() -> None:
    accounts = Accounts({"tenant bank": Quota(), "agent a": Quota(concurrent_requests=1)})
    both = ("tenant bank", "agent a", "agent nobody knows")
    assert accounts.enter("1", both, 0.0) is None
    over = accounts.enter("2", both, 0.0)
    assert over is not None
    assert (over.owner, over.limit, over.allowed) == ("agent a", "concurrent_requests", 1)
    with pytest.raises(ValueError, match="under way"):
        accounts.enter("1", both, 0.0)
    accounts.leave("1")
    accounts.leave("1")
    assert accounts.enter("2", both, 0.0) is None
    accounts.validate()


def test_messages_and_depth() -> None:
    accounts = Accounts({"tenant bank": Quota(messages_per_minute=2, call_depth=3)})
    assert accounts.message(BANK, 0.0) is None
    assert accounts.message(BANK, 0.0) is None
    over = accounts.message(BANK, 0.0)
    assert over is not None
    assert over.retry_after_s == pytest.approx(30)
    assert accounts.depth(BANK, 3) is None
    assert accounts.depth(BANK, 4) == Over("tenant bank", "call_depth", 3, 4, 0.0)


@given(st.lists(st.tuples(st.floats(0, 30), st.integers(0, 500)), max_size=60))
def test_no_more_than_the_rate_and_one_burst_is_ever_used(steps: list[tuple[float, int]]) -> None:
    accounts = Accounts({"tenant bank": Quota(tokens_per_minute=600, concurrent_requests=1)})
    now_s, used = 0.0, 0
    for number, (pause_s, tokens) in enumerate(steps):
        now_s += pause_s
        if accounts.enter(str(number), BANK, now_s) is None:
            accounts.charge(str(number), tokens, 0.0, now_s)
            accounts.leave(str(number))
            used += tokens
        # A minute's worth at once, the rate, and what the last request overdrew.
        assert used <= 600 + now_s * 10 + 500
        accounts.validate()


def test_accounts_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_OWNERS", 10)
    accounts = Accounts({f"agent {n}": Quota(tokens_per_minute=60) for n in range(100)})
    for number in range(100):
        accounts.enter(str(number), (f"agent {number}",), float(number))
        accounts.leave(str(number))
    assert len(accounts._accounts) <= 11


# ---------------------------------------------------------------- loops


def test_the_same_call_is_stopped_and_another_is_not() -> None:
    guard = LoopGuard(3)
    for _ in range(3):
        assert guard.called("t", "call", "refund", '{"id":1}') is None
    again = guard.called("t", "call", "refund", '{"id":1}')
    assert again is not None
    assert again.times == 3
    assert guard.called("t", "call", "refund", '{"id":2}') is None
    assert guard.called("other turn", "call", "refund", '{"id":1}') is None
    guard.ended("t")
    assert guard.called("t", "call", "refund", '{"id":1}') is None
    guard.validate()


def test_the_guard_remembers_a_bounded_window() -> None:
    guard = LoopGuard(2)
    for number in range(10_000):
        assert guard.called("t", "generate", "m", f"{number}\ud800") is None
    assert len(guard._turns["t"][0]) == WINDOW
    for number in range(MAX_TURNS + 10):
        guard.called(f"turn{number}", "generate", "m", "")
    assert len(guard._turns) == MAX_TURNS
    guard.validate()


# ---------------------------------------------------------------- admission


def wanted(owner: str, fixed: int, kv: int, least: int) -> Wanted:
    return Wanted(owner, fixed, kv, least)


def test_what_never_fits_is_refused_with_the_numbers() -> None:
    admission = Admission(100)
    assert admission.ask(wanted("m", 90, 40, 20), 100, 0, 0.0) == Refused("m", 110, 100)
    assert admission.ask(wanted("m", 60, 40, 20), 70, 30, 0.0) == Refused("m", 80, 70)
    admission.validate()


def test_kv_shrinks_before_anybody_waits() -> None:
    admission = Admission(100)
    assert admission.ask(wanted("m", 50, 40, 10), 70, 0, 0.0) == Granted("m", 20)
    assert admission.ask(wanted("n", 50, 40, 10), 55, 0, 0.0) == Delayed("n", 1, None)


def test_who_waits_comes_in_order_and_is_told_how_long() -> None:
    admission = Admission(100)
    admission.ask(wanted("large", 80, 10, 10), 20, 0, 0.0)
    assert isinstance(admission.ask(wanted("small", 10, 5, 5), 20, 0, 1.0), Delayed), (
        "the small one fits, but would overtake"
    )
    assert admission.room(10, 30, 10.0) == []
    assert admission.delay("small", 30, 10.0) == Delayed("small", 2, 75.0)
    assert admission.room(70, 100, 20.0) == [Granted("large", 10)]
    assert admission.room(0, 10, 20.0) == []
    assert admission.withdraw("small")
    assert not admission.withdraw("small")
    with pytest.raises(KeyError):
        admission.delay("small", 0, 21.0)
    admission.validate()


def test_admission_never_grants_what_is_not_there() -> None:
    chance = random.Random(3)
    admission, free, held = Admission(1000), 1000, {}
    for number in range(3000):
        if chance.random() < 0.5:
            least = chance.randint(0, 200)
            asked = wanted(f"m{number}", chance.randint(1, 900), least + 300, least)
            decision = admission.ask(asked, free, 0, float(number))
            grants = [decision] if isinstance(decision, Granted) else []
            sizes = {asked.owner: asked}
        elif held:
            owner = chance.choice(sorted(held))
            size = held.pop(owner)
            free += size
            waiting = dict(admission._waiting)
            grants = admission.room(size, free, float(number))
            sizes = waiting
        else:
            continue
        for grant in grants:
            asked = sizes[grant.owner]
            assert asked.least_kv_bytes <= grant.kv_bytes <= asked.kv_bytes
            held[grant.owner] = asked.fixed_bytes + grant.kv_bytes
            free -= held[grant.owner]
            assert free >= 0
        admission.validate()
