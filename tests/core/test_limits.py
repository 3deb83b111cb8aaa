from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

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
    accounts.charge("a", 650, 0.0)
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


@given(st.lists(st.tuples(st.floats(0, 30), st.integers(0, 500)), max_size=60))
def test_no_more_than_the_rate_and_one_burst_is_ever_used(steps: list[tuple[float, int]]) -> None:
    accounts = Accounts({"tenant bank": Quota(tokens_per_minute=600, concurrent_requests=1)})
    now_s, used = 0.0, 0
    for number, (pause_s, tokens) in enumerate(steps):
        now_s += pause_s
        if accounts.enter(str(number), BANK, now_s) is None:
            accounts.charge(str(number), tokens, now_s)
            accounts.leave(str(number))
            used += tokens
        # A minute's worth at once, the rate, and what the last request overdrew.
        assert used <= 600 + now_s * 10 + 500
        accounts.validate()
