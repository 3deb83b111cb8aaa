from __future__ import annotations

import pickle

import pytest

from llmos.kernel.core.labels import refusal
from llmos.kernel.core.restarts import RestartPolicy, Restarts
from llmos.kernel.core.slots import InvalidTransition, Slot, SlotState
from llmos.syscalls.labels import Labels, Sensitivity, join


def test_an_illegal_transition_tells_the_whole_story() -> None:
    slot = Slot("chat", 100)
    slot.device = "cpu:0"
    slot.move(SlotState.LOADING, 1.0, "launch:a")
    slot.move(SlotState.READY, 2.5, "device:cpu:0")
    with pytest.raises(InvalidTransition) as error:
        slot.move(SlotState.LOADING, 3.0, "launch:b")
    text = str(error.value)
    assert "from ready to loading for launch:b" in text
    assert "1.000  cold → loading  (launch:a)" in text
    assert "2.500  loading → ready  (device:cpu:0)" in text
    slot.validate()
    assert pickle.loads(pickle.dumps(error.value)).story == error.value.story


def test_restarts_slow_down_and_end() -> None:
    restarts = Restarts(RestartPolicy(intensity=3, window_s=60, step_s=0.5))
    assert restarts.crashed(0.0) == 0.0
    assert restarts.crashed(1.0) == 0.5
    assert restarts.crashed(2.0) == 1.0
    assert restarts.crashed(3.0) is None


def test_old_crashes_are_forgotten() -> None:
    restarts = Restarts(RestartPolicy(intensity=1, window_s=60))
    assert restarts.crashed(0.0) == 0.0
    assert restarts.crashed(61.0) == 0.0
    assert restarts.crashed(62.0) is None


def test_labels_join_upwards_only() -> None:
    a = Labels(tenants=frozenset({"bank"}), sensitivity=Sensitivity.INTERNAL)
    b = Labels(tenants=frozenset({"clinic"}), trusted=False)
    both = join([a, b])
    assert both.tenants == {"bank", "clinic"}
    assert both.sensitivity is Sensitivity.INTERNAL
    assert not both.trusted
    assert Labels().join(a) == a
    assert a.join() is a


def test_data_of_a_tenant_stays_with_it() -> None:
    seen = Labels(tenants=frozenset({"clinic"}))
    assert refusal(seen, "clinic", "clinic") is None
    assert refusal(Labels(), "clinic", "bank") is None
    assert "clinic" in (refusal(seen, "clinic", "bank") or "")
