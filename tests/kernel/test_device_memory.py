"""A device answers the bytes of the engine it loaded, and of nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmos.drivers.engines import causal
from llmos.drivers.models.footprint import predict_footprint
from llmos.drivers.protocols import EngineOptions
from llmos.kernel.core.slots import prediction_error
from llmos.kernel.device import DeviceServer
from tests.drivers.engines import tiny_causal


async def test_what_else_grows_meanwhile_is_not_the_models(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(causal, "CALIBRATION_S", 0.0)
    path = tiny_causal.make(tmp_path / "tiny")
    grown: list[bytes] = []
    real = causal.TransformersCausalEngine.__init__

    def greedy(self: causal.TransformersCausalEngine, options: EngineOptions) -> None:
        grown.append(b"x" * (1 << 26))
        real(self, options)

    monkeypatch.setattr(causal.TransformersCausalEngine, "__init__", greedy)
    options = EngineOptions("chat", path, dtype="float32", kv_tokens=512)
    device = DeviceServer("cpu:0", "cpu", 0, 1 << 32, 1, str(tmp_path / "logs"), "INFO")
    try:
        measured = await device.load("causal", "causal", options)
    finally:
        await device.close()
    predicted = predict_footprint(
        path,
        kind="causal",
        dtype="float32",
        kv_tokens=512,
        max_batch_tokens=options.max_batch_tokens,
        max_batch_texts=1,
    ).by_purpose
    error = prediction_error(predicted, measured)
    assert error is not None
    assert error < 0.03
    assert grown
