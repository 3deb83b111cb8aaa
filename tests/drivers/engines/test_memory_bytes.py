"""What engines say they keep, against what was predicted and what their tensors are."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from llmos.drivers.engines import causal
from llmos.drivers.engines.encoder import TransformersEncoderEngine
from llmos.drivers.engines.kvmemory import PAGE_TOKENS
from llmos.drivers.engines.packing import PackedLinear, can_pack
from llmos.drivers.engines.quantize import int8_is_exact
from llmos.drivers.engines.tensors import held_bytes, weights_bytes
from llmos.drivers.models.footprint import predict_footprint
from llmos.drivers.protocols import EngineOptions
from tests.drivers.engines import tiny_causal
from tests.drivers.engines.lora_files import make_adapter

LIMITS: dict[str, Any] = {"kv_tokens": 1000, "max_batch_tokens": 128, "max_batch_texts": 8}
packs = pytest.mark.skipif(not can_pack(), reason="this processor packs no bfloat16")
narrows = pytest.mark.skipif(not int8_is_exact(), reason="this processor has no exact int8")


@pytest.fixture(autouse=True)
def no_calibration(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(causal, "CALIBRATION_S", 0.0)


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_causal.make(tmp_path_factory.mktemp("tied"))


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return changed(tmp_path_factory.mktemp("untied"), tie_word_embeddings=False)


def changed(folder: Path, **config: Any) -> Path:
    """The tiny model with another configuration."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tiny_causal.make(folder)
    settings = LlamaConfig.from_pretrained(folder)
    settings.update(config)
    LlamaForCausalLM(settings).save_pretrained(folder)
    return folder


def both(path: Path, dtype: Any, **options: Any) -> tuple[dict[str, int], dict[str, int]]:
    """Predicted, without what shows in a step alone, and measured."""
    predicted = predict_footprint(path, kind="causal", dtype=dtype, **LIMITS, **options)
    engine = causal.TransformersCausalEngine(
        EngineOptions("m", path, dtype=dtype, **LIMITS, **options)
    )
    try:
        measured = engine.memory_bytes()
    finally:
        engine.close()
    assert engine.memory_bytes() == {}
    kept = {p: n for p, n in predicted.by_purpose.items() if p != "workspace"}
    assert sum(predicted.by_purpose.values()) == predicted.total_bytes
    return kept, measured


def agree(predicted: dict[str, int], measured: dict[str, int]) -> None:
    assert set(predicted) == set(measured)
    for purpose, size in measured.items():
        assert predicted[purpose] == pytest.approx(size, rel=0.03), purpose


@pytest.mark.parametrize("adapters", [0, 3])
@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=packs)])
@pytest.mark.parametrize("model", ["tied", "untied"])
def test_a_tiny_model_keeps_what_was_predicted(
    request: pytest.FixtureRequest, model: str, dtype: str, adapters: int
) -> None:
    options = {"max_adapters": adapters, "max_adapter_rank": 8} if adapters else {}
    agree(*both(request.getfixturevalue(model), dtype, **options))


@narrows
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("model", ["tied", "untied"])
def test_a_narrow_model_keeps_what_was_predicted(
    request: pytest.FixtureRequest, model: str, dtype: str
) -> None:
    agree(*both(request.getfixturevalue(model), dtype, weights="int8"))


@packs
def test_a_packed_tied_output_layer_costs_its_size_once_more(tied: Path) -> None:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(tied)
    _, wide = both(tied, "float32")
    _, packed = both(tied, "bfloat16")
    again = config.vocab_size * config.hidden_size * 2
    assert packed["weights"] == pytest.approx(wide["weights"] / 2 + again, rel=0.01)


def test_the_librarys_cache_has_blocks_of_its_own(tmp_path: Path) -> None:
    """Models with a sliding window take transformers' cache on the CPU, too."""
    from transformers import MistralConfig, MistralForCausalLM

    tiny_causal.make(tmp_path)
    vocabulary = 512
    config = MistralConfig(
        vocab_size=vocabulary,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        sliding_window=64,
        tie_word_embeddings=True,
    )
    MistralForCausalLM(config).save_pretrained(tmp_path)
    agree(*both(tmp_path, "bfloat16"))


def test_kv_is_in_whole_blocks(tied: Path) -> None:
    predicted, measured = both(tied, "float32")
    assert predicted["kv"] == measured["kv"]
    assert predicted["kv"] % PAGE_TOKENS == 0
    assert LIMITS["kv_tokens"] % PAGE_TOKENS  # So that rounding shows.


def test_places_of_adapters_count_before_they_are_taken(tied: Path, tmp_path: Path) -> None:
    layers = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    adapter = make_adapter(tied, tmp_path / "a", 1, target_modules=layers)
    engine = tiny_causal.engine(tied, max_adapters=2, max_adapter_rank=8)
    try:
        before = engine.memory_bytes()
        engine.load_adapter("a", adapter)
        assert engine.memory_bytes() == before
        assert engine._stepper.bank is not None
        made = [m for layer in engine._stepper.bank._layers.values() for m in layer._memory or ()]
        # An adapter that changes all layers has all of them made.
        assert held_bytes(made) == before["adapters"]
    finally:
        engine.close()


# ---------------------------------------------------------------- tensors


def test_what_is_shared_counts_once() -> None:
    table = nn.Embedding(10, 4)
    head = nn.Linear(4, 10, bias=False)
    head.weight = table.weight
    both_of_them = nn.ModuleList([table, head])
    both_of_them.register_buffer("view", table.weight.detach()[2:4])
    assert weights_bytes(both_of_them) == 10 * 4 * 4
    assert held_bytes([torch.zeros(3), torch.zeros(3)]) == 2 * 3 * 4


@packs
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_packed_weight_counts_by_its_shape(dtype: torch.dtype) -> None:
    packed = PackedLinear(nn.Linear(64, 32, dtype=dtype))
    assert weights_bytes(nn.ModuleList([packed, packed])) == (64 * 32 + 32) * dtype.itemsize


def test_tensors_made_of_tensors_count_by_those() -> None:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    linear = nn.Linear(64, 32, bias=False, dtype=torch.bfloat16)
    holder = nn.Sequential(linear)
    quantize_(holder, Int8WeightOnlyConfig(version=2))
    assert 64 * 32 + 32 * 2 <= weights_bytes(holder) <= 64 * 32 + 32 * 4 + 64


_GROWTH = """
import sys, torch
from torch import nn
from llmos.drivers.engines.packing import PackedLinear
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096
layers = [nn.Linear(2048, 4096, dtype=torch.bfloat16) for _ in range(6)]
PackedLinear(layers[0])
before = resident()
kept = [PackedLinear(layer) for layer in layers]
print((resident() - before) / (6 * 2048 * 4096 * 2))
"""


@packs
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_packed_weight_really_takes_its_shape() -> None:
    """oneDNN does not tell, so a process that does nothing else is looked at."""
    done = subprocess.run(
        [sys.executable, "-c", _GROWTH],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert float(done.stdout) == pytest.approx(1.0, abs=0.1)


# ---------------------------------------------------------------- real models


@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        ("float32", {}),
        pytest.param("bfloat16", {}, marks=packs),
        pytest.param("bfloat16", {"weights": "int8"}, marks=narrows),
    ],
)
def test_smollm2_keeps_what_was_predicted(
    smollm2: Path, dtype: str, options: dict[str, Any]
) -> None:
    agree(*both(smollm2, dtype, **options))


@pytest.mark.parametrize("options", [{}, pytest.param({"weights": "int8"}, marks=narrows)])
def test_minilm_keeps_what_was_predicted(minilm: Path, options: dict[str, Any]) -> None:
    predicted = predict_footprint(minilm, kind="encoder", dtype="float32", **LIMITS, **options)
    engine = TransformersEncoderEngine(
        EngineOptions("m", minilm, dtype="float32", **LIMITS, **options)
    )
    try:
        agree({"weights": predicted.weights_bytes}, engine.memory_bytes())
    finally:
        engine.close()
