"""Predicted and measured memory of a slot, by purpose."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from llmos.kernel.core import actions as act
from llmos.kernel.core import events as ev
from llmos.kernel.core.slots import SlotState, prediction_error
from llmos.kernel.core.state import Actions, KernelCore
from llmos.kernel.core.types import DeviceSpec, ModelSpec, ProcessKind

Feed = Callable[[ev.AnyEvent], Actions]

PREDICTED = {"weights": 600, "kv": 200, "workspace": 150, "adapters": 50}


@pytest.fixture
def loading(core: KernelCore, feed: Feed) -> KernelCore:
    """A core with one model that is being loaded."""
    spec = ModelSpec("chat", "causal", 1000, pinned=True, predicted=PREDICTED)
    device = DeviceSpec("cpu:0", "cpu", 2000, 4)
    out = feed(ev.Booted(now=0.0, cause="boot", devices=(device,), models=(spec,), hosts=1))
    for start in [a for a in out if isinstance(a, act.StartProcess)]:
        if start.kind is ProcessKind.DEVICE:
            feed(
                ev.ProcessUp(
                    now=0.1, cause="up", process=start.process, incarnation=start.incarnation
                )
            )
    assert core.slots["chat"].state is SlotState.LOADING
    return core


def loaded(feed: Feed, **measured: int) -> list[act.Note]:
    out = feed(ev.SlotLoaded(now=1.0, cause="device", slot="chat", measured=measured))
    return [a for a in out if isinstance(a, act.Note)]


def test_a_good_prediction_is_kept_and_not_noted(loading: KernelCore, feed: Feed) -> None:
    assert not loaded(feed, weights=610, kv=200, adapters=50)
    slot = loading.slots["chat"]
    assert slot.predicted == PREDICTED
    assert slot.measured == {"weights": 610, "kv": 200, "adapters": 50}
    assert slot.measured_bytes == 860
    assert slot.prediction_error == pytest.approx(10 / 860)
    # Its steps need their workspace still.
    assert loading.ledger.accounts["cpu:0"].reservations["chat"].committed_bytes == 1010
    assert loading.ledger.free_bytes("cpu:0") == 990


@pytest.mark.parametrize("weights", [640, 560])
def test_more_than_three_per_cent_is_noted(loading: KernelCore, feed: Feed, weights: int) -> None:
    (note,) = loaded(feed, weights=weights, kv=200, adapters=50)
    assert note.level == "warning"
    assert "chat" in note.text
    assert f"'weights': {weights}" in note.text
    # What was granted for the largest step is not given away.
    held = loading.ledger.accounts["cpu:0"].held_bytes
    assert held == max(1000, 1000 + weights - 600)


def test_a_slot_that_told_nothing_keeps_its_reservation(loading: KernelCore, feed: Feed) -> None:
    assert not loaded(feed)
    assert loading.slots["chat"].prediction_error is None
    assert loading.ledger.free_bytes("cpu:0") == 1000


def test_errors_of_purposes_do_not_cancel() -> None:
    measured = {"weights": 500, "kv": 300, "adapters": 50}
    assert prediction_error(PREDICTED, measured) == pytest.approx(200 / 850)
    assert prediction_error(PREDICTED, {}) is None
    assert prediction_error({}, measured) is None
    assert prediction_error({"weights": 100}, {"weights": 100, "kv": 100}) == 0.5
