"""Predictions against arithmetic done by hand on small files; real weights further below."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from llmos.drivers.errors import ModelUnusable
from llmos.drivers.models.footprint import context_tokens, predict_footprint
from llmos.drivers.protocols import Footprint
from tests.drivers.models import tiny

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 40,
    "vocab_size": 100,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
}


def causal(folder: Path, *, head: bool, **config: Any) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(LLAMA | config))
    table = np.zeros((100, 16), np.float16)
    tensors = {"model.embed_tokens.weight": table, "model.norm.weight": np.ones(16, np.float16)}
    if head:
        tensors["lm_head.weight"] = table.copy()
    save_file(tensors, folder / "model.safetensors")
    return folder


def predict(folder: Path, kind: Any, **changes: Any) -> Footprint:
    limits: dict[str, Any] = {
        "dtype": "float32",
        "kv_tokens": 128,
        "max_batch_tokens": 32,
        "max_batch_texts": 4,
    }
    return predict_footprint(folder, kind=kind, **(limits | changes))


def test_a_tied_head_counts_once(tmp_path: Path) -> None:
    body = (100 * 16 + 16) * 4
    assert predict(causal(tmp_path / "a", head=False), "causal").weights_bytes == body
    assert predict(causal(tmp_path / "b", head=True), "causal").weights_bytes == body
    untied = causal(tmp_path / "c", head=True, tie_word_embeddings=False)
    assert predict(untied, "causal").weights_bytes == body + 100 * 16 * 4


def test_weights_count_in_the_type_they_are_loaded_in(tmp_path: Path) -> None:
    folder = causal(tmp_path / "a", head=False)
    wide, narrow = predict(folder, "causal"), predict(folder, "causal", dtype="float16")
    assert wide.weights_bytes == 2 * narrow.weights_bytes
    assert predict(folder, "causal", dtype="auto") == wide


@pytest.mark.parametrize(
    ("config", "device", "copies"),
    [
        ({}, "cpu", 2),
        ({}, "cuda", 1),
        ({"tie_word_embeddings": False}, "cpu", 1),
        # Layers that our attention does not compute leave the model as the library has it.
        ({"sliding_window": 32}, "cpu", 1),
        ({"model_type": "mistral"}, "cpu", 1),
        ({"model_type": "mistral", "sliding_window": None}, "cpu", 2),
        ({"model_type": "qwen2", "sliding_window": 32}, "cpu", 2),
        ({"model_type": "qwen2", "sliding_window": 32, "use_sliding_window": True}, "cpu", 1),
        ({"layer_types": ["sliding_attention", "full_attention"]}, "cpu", 1),
        ({"attn_logit_softcapping": 30.0}, "cpu", 1),
    ],
)
def test_a_tied_head_that_is_packed_counts_once_more(
    tmp_path: Path, config: dict[str, Any], device: str, copies: int
) -> None:
    folder = causal(tmp_path / "a", head=False, **config)
    found = predict(folder, "causal", dtype="bfloat16", device=device)
    assert found.weights_bytes == (copies * 100 * 16 + 16) * 2


def test_kv_is_in_whole_blocks_and_the_library_keeps_two_more(tmp_path: Path) -> None:
    folder = causal(tmp_path / "a", head=False)
    block = 16 * 3 * 2 * 2 * 8 * 4
    for tokens, blocks in ((1, 1), (31, 1), (32, 2), (100, 6)):
        assert predict(folder, "causal", kv_tokens=tokens).kv_bytes == blocks * block
        on_gpu = predict(folder, "causal", kv_tokens=tokens, device="cuda")
        assert on_gpu.kv_bytes == (blocks + 2) * block


def test_purposes_are_told_apart(tmp_path: Path) -> None:
    folder = causal(tmp_path / "a", head=False)
    found = predict(folder, "causal")
    assert set(found.by_purpose) == {"weights", "kv", "workspace"}
    assert sum(found.by_purpose.values()) == found.total_bytes


def test_kv_is_layers_heads_and_tokens(tmp_path: Path) -> None:
    folder = causal(tmp_path / "a", head=False)
    assert predict(folder, "causal", dtype="float16").kv_bytes == 3 * 2 * 2 * 8 * 2 * 128
    assert predict(folder, "causal", kv_tokens=0).kv_bytes == 0


def test_the_workspace_grows_with_the_step_and_holds_the_logits(tmp_path: Path) -> None:
    folder = causal(tmp_path / "a", head=False)
    small, large = (predict(folder, "causal", max_batch_tokens=n).workspace_bytes for n in (8, 32))
    assert small < large
    assert large >= 32 * 100 * 4


def test_shards_are_summed(tmp_path: Path) -> None:
    folder = causal(tmp_path / "a", head=False)
    whole = predict(folder, "causal")
    (folder / "model.safetensors").unlink()
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    table, norm = np.zeros((100, 16), np.float16), np.ones(16, np.float16)
    save_file({"model.embed_tokens.weight": table}, folder / names[0])
    save_file({"model.norm.weight": norm}, folder / names[1])
    index = {"weight_map": dict(zip("ab", names, strict=True))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert predict(folder, "causal") == whole


def test_an_encoder_has_no_kv_and_grows_with_its_batch(tmp_path: Path) -> None:
    folder = tiny.encoder(tmp_path / "e")
    few, many = (predict(folder, "encoder", max_batch_tokens=32 * n) for n in (1, 4))
    assert few.kv_bytes == 0
    assert few.weights_bytes == tiny.VOCABULARY * tiny.HIDDEN * 4
    assert many.workspace_bytes == 4 * few.workspace_bytes
    # Texts bound a pass as well; one text is let through however long it is.
    assert predict(folder, "encoder", max_batch_texts=2, max_batch_tokens=10**6) == predict(
        folder, "encoder", max_batch_tokens=64
    )
    assert predict(folder, "encoder", max_batch_tokens=8) == few
    assert few.total_bytes == few.weights_bytes + few.workspace_bytes


def test_context_is_the_smallest_limit_that_is_one(tmp_path: Path) -> None:
    folder = tiny.encoder(tmp_path / "e")
    assert context_tokens(folder) == 32  # the tokenizer says 10 ** 30
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 24}')
    assert context_tokens(folder) == 24
    roberta = tiny.encoder(
        tmp_path / "r",
        config={"model_type": "xlm-roberta", "max_position_embeddings": 514, "pad_token_id": 1},
    )
    assert context_tokens(roberta) == 512


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    folder = causal(tmp_path / "a", head=False)
    config = {k: v for k, v in LLAMA.items() if k != "num_hidden_layers"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelUnusable, match="num_hidden_layers"):
        predict(folder, "causal")
    (folder / "config.json").unlink()
    with pytest.raises(ModelUnusable, match=r"config\.json"):
        context_tokens(folder)
