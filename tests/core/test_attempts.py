from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from llmos.kernel.core.attempts import (
    Answer,
    Bury,
    MailPolicy,
    Retry,
    after_death,
    after_failure,
)

POLICY = MailPolicy()


def test_waits_grow_and_end() -> None:
    delays = []
    for attempts in range(1, 5):
        outcome = after_failure(POLICY, attempts, asked=False, retryable=True, chance=0.5)
        assert isinstance(outcome, Retry)
        delays.append(outcome.delay_s)
    assert delays == [0.5, 1.0, 2.0, 4.0]
    outcome = after_failure(POLICY, 5, asked=False, retryable=True, chance=0.5)
    assert outcome == Bury("5 of 5 attempts failed")


def test_whoever_asked_gets_the_error_at_once() -> None:
    for retryable in (True, False):
        assert after_failure(POLICY, 1, True, retryable, 0.5) == Answer()


def test_what_will_fail_again_is_not_tried_again() -> None:
    assert isinstance(after_failure(POLICY, 1, False, False, 0.5), Bury)


def test_a_message_under_which_hosts_die_is_buried() -> None:
    for asked in (True, False):
        assert after_death(POLICY, 1, asked) == Retry(0.0)
        assert isinstance(after_death(POLICY, 2, asked), Bury)


@given(
    st.integers(1, 5000),
    st.floats(0, 1, exclude_max=True),
    st.floats(0.0, 1.0),
    st.floats(1.0, 100.0),
)
def test_delays_stay_within_their_bounds(
    attempts: int, chance: float, jitter: float, factor: float
) -> None:
    policy = MailPolicy(attempts=10_000, jitter=jitter, factor=factor)
    outcome = after_failure(policy, attempts, False, True, chance)
    assert isinstance(outcome, Retry)
    assert 0.0 <= outcome.delay_s <= policy.max_delay_s * (1 + jitter)
