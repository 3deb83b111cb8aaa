"""Linear layers in int8 and int4, alone, in a causal engine and under adapters."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from benchmarks.gpu import make_model
from llmos.drivers.engines.quantize import (
    Int4Linear,
    Int8Linear,
    has_int4,
    int8_is_exact,
    quantize,
)
from llmos.drivers.errors import WeightsUnsupported
from llmos.drivers.models.footprint import predict_footprint
from llmos.drivers.models.narrow import is_linear, layer_bytes, layer_form
from llmos.drivers.protocols import EngineOptions, GenerationChunk, GenerationJob, SamplingParams

pytestmark = pytest.mark.skipif(
    not (int8_is_exact() and has_int4()), reason="this processor has no kernels for int8 and int4"
)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


def off(found: torch.Tensor, exact: torch.Tensor) -> float:
    """Length of the error against the length of the exact result."""
    return float((found.double() - exact.double()).norm() / exact.double().norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("narrow", "most"), [(Int8Linear, 0.015), (Int4Linear, 0.1)])
@torch.inference_mode()
def test_it_is_near_what_the_layer_computes(
    narrow: Any, most: float, bias: bool, dtype: torch.dtype
) -> None:
    linear = nn.Linear(96, 48, bias=bias).to(dtype)
    layer = narrow(linear)
    assert (layer.in_features, layer.out_features) == (96, 48)
    for shape in ((1, 96), (2, 3, 96), (600, 96), (0, 96), (1, 0, 96)):
        x = torch.randn(shape).to(dtype)
        found, exact = layer(x), linear(x)
        assert (found.shape, found.dtype) == (exact.shape, dtype)
        assert not x.numel() or off(found, exact) < most


@torch.inference_mode()
def test_int8_of_a_token_does_not_depend_on_its_neighbours() -> None:
    layer = Int8Linear(nn.Linear(64, 32))
    x = torch.randn(600, 64) * torch.logspace(-3, 3, 600).unsqueeze(1)
    together = layer(x)
    for row in (0, 255, 256, 599):
        assert torch.equal(layer(x[row : row + 1])[0], together[row])


@torch.inference_mode()
def test_large_and_small_inputs_keep_their_own_scale() -> None:
    linear = nn.Linear(64, 32, bias=False)
    x = torch.randn(3, 64) * torch.tensor([[1e-6], [1e6], [0.0]])
    for row, exact in zip(Int8Linear(linear)(x)[:2], linear(x), strict=False):
        assert off(row, exact) < 0.02
    assert not Int8Linear(linear)(x)[2].any()


@settings(deadline=None, max_examples=50)
@given(seed=st.integers(0, 2**31), scale=st.floats(1e-6, 1e6), middle=st.floats(-10, 10))
@torch.inference_mode()
def test_int4_is_within_its_step(seed: int, scale: float, middle: float) -> None:
    linear = nn.Linear(32, 16, bias=False)
    chance = torch.Generator().manual_seed(seed)
    linear.weight.copy_((torch.rand(16, 32, generator=chance) + middle) * scale)
    kept = Int4Linear(linear)(torch.eye(32)).T
    # Not more than the full range's rounding makes in all, and bfloat16's on top.
    span = linear.weight.amax(1) - linear.weight.amin(1)
    worst = span / 30 * 32**0.5 + linear.weight.abs().amax(1) * 2**-6
    assert ((kept - linear.weight).norm(dim=1) <= worst * 1.01 + 1e-6).all()


def test_layers_that_stay_as_they_are() -> None:
    assert layer_form("plain", 64, 64, False) == "plain"
    assert layer_form("int8", 3, 64, False) == "plain"  # a head
    assert layer_form("int4", 64, 64, True) == "int8"  # the output layer
    assert layer_form("int4", 64, 40, False) == "int8"  # not whole groups
    assert layer_form("int4", 64, 64, False) == "int4"
    assert layer_bytes("int4", 64, 64, 2) == 64 * 64 * 5 // 8
    assert not is_linear("model.embed_tokens.weight", (10, 4), "llama")
    assert not is_linear("h.0.attn.c_attn.weight", (4, 12), "gpt2")
    assert not is_linear("model.norm.weight", (4,), "llama")
    assert is_linear("model.layers.0.mlp.up_proj.weight", (8, 4), "llama")


def test_a_model_without_such_layers_is_refused() -> None:
    with pytest.raises(WeightsUnsupported, match="no linear layers"):
        quantize(nn.Sequential(nn.Embedding(4, 4)), "int8", "m")
    assert quantize(nn.Sequential(nn.Embedding(4, 4)), "plain", "m") == 0


def held_bytes(model: nn.Module) -> int:
    tensors = [*model.parameters(), *model.buffers()]
    return sum({t.data_ptr(): t.nbytes for t in tensors}.values())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("random"))


@pytest.mark.parametrize("weights", ["int8", "int4"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tied", [True, False])
def test_the_prediction_is_what_is_held(
    tmp_path: Path, weights: Any, dtype: Any, tied: bool
) -> None:
    config = LlamaConfig(
        vocab_size=1000,
        hidden_size=64,
        intermediate_size=176,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=getattr(torch, dtype))
    assert quantize(model.requires_grad_(False), weights, "m") == 2 * 7 + 1
    predicted = predict_footprint(
        tmp_path,
        kind="causal",
        dtype=dtype,
        weights=weights,
        kv_tokens=0,
        max_batch_tokens=8,
        max_batch_texts=1,
    )
    assert predicted.weights_bytes == pytest.approx(held_bytes(model), rel=0.03)


def answers(engine: Any, prompts: list[str], adapter: str = "") -> list[str]:
    done = threading.Event()
    texts = dict.fromkeys(map(str, range(len(prompts))), "")
    left = set(texts)

    def deliver(chunk: GenerationChunk) -> None:
        texts[chunk.job_id] += chunk.text
        if chunk.finish is not None:
            assert chunk.error is None, chunk.error
            left.discard(chunk.job_id)
            if not left:
                done.set()

    params = SamplingParams(max_new_tokens=8, ignore_eos=True)
    for number, prompt in enumerate(prompts):
        engine.submit(GenerationJob(str(number), prompt, params, adapter=adapter), deliver)
    assert done.wait(60)
    return list(texts.values())


@pytest.mark.parametrize(("weights", "dtype"), [("int8", "float32"), ("int4", "bfloat16")])
def test_the_causal_engine_runs_on_them(folder: Path, weights: Any, dtype: Any) -> None:
    from llmos.drivers.engines.causal import TransformersCausalEngine

    engine = TransformersCausalEngine(
        EngineOptions(
            "tiny", folder, weights=weights, dtype=dtype, kv_tokens=512, max_batch_tokens=64
        )
    )
    try:
        forms = {type(m).__name__ for m in engine._stepper.model.modules()}
        assert {"Int8Linear", *(["Int4Linear"] if weights == "int4" else [])} <= forms
        assert not {"Linear", "PackedLinear"} & forms
        prompts = ["the kernel lends", "memory", "to many agents"]
        assert all(answers(engine, prompts))
    finally:
        engine.close()


@torch.inference_mode()
def test_an_adapter_stands_on_narrow_weights(folder: Path) -> None:
    from llmos.drivers.engines.lora import AdapterBank

    config = LlamaConfig(
        vocab_size=100,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=1,
        num_attention_heads=4,
    )
    model: Any = LlamaForCausalLM(config).eval().requires_grad_(False)
    ids = torch.tensor([[1, 2, 3]])
    exact = model(ids).logits
    AdapterBank(model, 2, 4)
    quantize(model, "int8", "m")
    assert not [m for m in model.modules() if type(m) is nn.Linear]
    assert off(model(ids).logits, exact) < 0.05
