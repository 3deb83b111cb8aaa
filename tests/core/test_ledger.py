from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmos.kernel.core.ledger import Ledger, LedgerError, OverCapacity, UnknownReservation


def test_reserve_commit_release() -> None:
    ledger = Ledger()
    ledger.open("cpu:0", 100)
    ledger.reserve("cpu:0", "chat", 60)
    assert ledger.free_bytes("cpu:0") == 40
    assert ledger.commit("cpu:0", "chat", 50) == -10
    # The prediction stays reserved: its peak is still to come.
    assert ledger.free_bytes("cpu:0") == 40
    assert ledger.release("cpu:0", "chat") == 60
    assert ledger.free_bytes("cpu:0") == 100
    ledger.validate()


def test_over_capacity_changes_nothing_and_tells_the_numbers() -> None:
    ledger = Ledger()
    ledger.open("cpu:0", 100)
    ledger.reserve("cpu:0", "a", 70)
    with pytest.raises(OverCapacity) as error:
        ledger.reserve("cpu:0", "b", 31)
    assert (error.value.asked_bytes, error.value.free_bytes) == (31, 30)
    assert ledger.free_bytes("cpu:0") == 30
    ledger.validate()


def test_an_overrun_is_recorded_not_hidden() -> None:
    ledger = Ledger()
    ledger.open("cpu:0", 100)
    ledger.reserve("cpu:0", "a", 90)
    assert ledger.commit("cpu:0", "a", 120) == 30
    assert ledger.free_bytes("cpu:0") == 0
    assert ledger.overruns == [("cpu:0", "a", 20)]
    with pytest.raises(OverCapacity):
        ledger.reserve("cpu:0", "b", 1)


def test_wrong_use_is_refused() -> None:
    ledger = Ledger()
    ledger.open("cpu:0", 100)
    ledger.reserve("cpu:0", "a", 10)
    with pytest.raises(LedgerError):
        ledger.reserve("cpu:0", "a", 10)
    with pytest.raises(LedgerError):
        ledger.reserve("cuda:0", "a", 10)
    with pytest.raises(LedgerError):
        ledger.reserve("cpu:0", "c", -1)
    with pytest.raises(UnknownReservation):
        ledger.release("cpu:0", "b")
    with pytest.raises(UnknownReservation):
        ledger.commit("cpu:0", "b", 1)


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["reserve", "commit", "release"]),
            st.sampled_from(["d0", "d1"]),
            st.sampled_from("abcd"),
            st.integers(0, 120),
        ),
        max_size=60,
    )
)
def test_reserved_never_exceeds_capacity(steps: list[tuple[str, str, str, int]]) -> None:
    ledger = Ledger()
    ledger.open("d0", 100)
    ledger.open("d1", 150)
    for what, device, owner, size in steps:
        before = ledger.free_bytes(device)
        try:
            if what == "reserve":
                ledger.reserve(device, owner, size)
                assert size <= before
            elif what == "commit":
                ledger.commit(device, owner, size)
            else:
                ledger.release(device, owner)
        except LedgerError:
            assert ledger.free_bytes(device) == before
        ledger.validate()
    for device in ("d0", "d1"):
        for owner in list(ledger.accounts[device].reservations):
            ledger.release(device, owner)
        assert ledger.free_bytes(device) == ledger.accounts[device].capacity_bytes
