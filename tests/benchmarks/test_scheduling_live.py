"""The sections of the benchmark that load models, on small random ones."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import scheduling, scheduling_live, scheduling_memory
from llmos.drivers.engines import causal
from tests.drivers.engines import tiny_causal


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_causal.make(tmp_path_factory.mktemp("tiny"))


def test_the_engine_takes_what_the_simulator_gets(tiny: Path) -> None:
    found = scheduling_live.error(tiny, jobs=6, rounds=2, every_s=0.002)
    assert len(found["sim_live"]["rounds"]) == 2
    assert all(r["live_mean_s"] > 0 < r["predicted_mean_s"] for r in found["sim_live"]["rounds"])
    assert found["sim_live_error"] >= 0


def test_tenants_that_always_wait_stay_within_the_bound(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(causal, "CALIBRATION_S", 0.0)
    found = scheduling_live.gaps(tiny, jobs=12)
    gaps = found["gap_tokens"]["live"]
    assert 0 < gaps["fair"] <= found["gap_bound_tokens"]["live"]
    assert gaps["fair"] < gaps["fcfs"]


def test_every_shape_of_a_model_is_predicted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(causal, "CALIBRATION_S", 0.0)
    found = scheduling_memory.ledger(None, None)
    assert len(found["ledger"]) == 12
    assert found["ledger_prediction_error"] <= 0.03


def test_sections_share_keys() -> None:
    found = {"gap_tokens": {"simulated": {"fair": 1.0}}, "x": 1}
    scheduling.join(found, {"gap_tokens": {"live": {"fair": 2.0}}, "x": 2})
    assert found == {"gap_tokens": {"simulated": {"fair": 1.0}, "live": {"fair": 2.0}}, "x": 2}
