"""What a model will need on a device, read from its files before anything is loaded.

Only ``config.json`` and the headers of the safetensors files are read, so the kernel
can ask for any model in well under a millisecond per shard and never loads torch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from llmos.drivers.errors import ModelUnusable
from llmos.drivers.models import checks
from llmos.drivers.protocols import Footprint

Dtype = Literal["float32", "bfloat16", "float16"]

_BYTES: dict[str, int] = {"float32": 4, "bfloat16": 2, "float16": 2}
_STORED: dict[str, int] = {
    **dict.fromkeys(("F64", "I64", "U64"), 8),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 2),
    **dict.fromkeys(("F8_E4M3", "F8_E5M2", "I8", "U8", "BOOL"), 1),
}
_CAST = frozenset({"F64", "F32", "F16", "BF16"})
"""Stored types that loading turns into the wanted one; packed integers and float8 stay."""
_COMPUTED = ("position_ids", "rotary_emb.inv_freq", "attn.masked_bias")
"""Buffers in old files that current code computes instead of loading."""


@dataclass(frozen=True, slots=True)
class _Shape:
    """The sizes that matter, whatever the configuration calls them."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int
    positions: int
    tied: bool


def predict_footprint(
    path: Path,
    *,
    kind: Literal["causal", "encoder"],
    dtype: Dtype | Literal["auto"],
    kv_tokens: int,
    max_batch_tokens: int,
    max_batch_texts: int,
) -> Footprint:
    """Bytes for weights, KV cache and the largest step.

    Args:
        path: folder of the model.
        kind: which engine will run it.
        dtype: what it will be loaded in. ``auto`` depends on the device, which is not
            known here, and counts as float32: more than needed, never less.
        kv_tokens: tokens of KV cache, all requests together; causal only.
        max_batch_tokens: tokens in one step; causal only.
        max_batch_texts: texts in one forward pass; encoder only.

    Raises:
        ModelUnusable: a file is missing, broken or does not name the sizes.
        UnsafeModel: pickled weights.
    """
    shape, size = _shape(path), _BYTES["float32" if dtype == "auto" else dtype]
    weights = _weights_bytes(path, size, shape.tied and kind == "causal", kind)
    if kind == "causal":
        per_token = 2 * shape.kv_heads * shape.head_dim * size
        return Footprint(
            weights_bytes=weights,
            kv_bytes=shape.layers * per_token * kv_tokens,
            workspace_bytes=_causal_workspace(shape, size, kv_tokens, max_batch_tokens),
        )
    texts_tokens = context_tokens(path)
    return Footprint(
        weights_bytes=weights,
        workspace_bytes=_encoder_workspace(shape, size, texts_tokens, max_batch_texts),
    )


def context_tokens(path: Path) -> int:
    """Tokens the model can look at: prompt plus answer, or the length of a text.

    Raises:
        ModelUnusable: as :func:`predict_footprint`.
    """
    shape = _shape(path)
    limits = [shape.positions]
    for name, key in (
        ("sentence_bert_config.json", "max_seq_length"),
        ("tokenizer_config.json", "model_max_length"),
    ):
        if (path / name).is_file():
            value = checks.read_json(path.name, path / name).get(key)
            # Tokenizers without a limit say 10 ** 30.
            if isinstance(value, int | float) and value > 0:
                limits.append(int(min(value, shape.positions)))
    return min(limits)


def _shape(path: Path) -> _Shape:
    config = checks.read_json(path.name, path / "config.json")
    text = config.get("text_config")
    inner: dict[str, Any] = text if isinstance(text, dict) else config

    def number(*keys: str, default: int | None = None) -> int:
        for key in keys:
            value = inner.get(key)
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                return value
        if default is None:
            raise ModelUnusable(path.name, "config.json", f"names no {keys[0]}")
        return default

    hidden = number("hidden_size", "n_embd", "d_model", "dim")
    heads = number("num_attention_heads", "n_head", "n_heads")
    positions = number("max_position_embeddings", "n_positions", "n_ctx")
    if inner.get("model_type") in ("roberta", "xlm-roberta", "camembert", "mpnet"):
        # Their positions start behind the padding token's.
        positions -= int(inner.get("pad_token_id") or 1) + 1
    return _Shape(
        layers=number("num_hidden_layers", "n_layer", "n_layers"),
        hidden=hidden,
        heads=heads,
        kv_heads=number("num_key_value_heads", default=heads),
        head_dim=number("head_dim", default=hidden // heads),
        intermediate=number("intermediate_size", "n_inner", "hidden_dim", default=4 * hidden),
        vocabulary=number("vocab_size"),
        positions=positions,
        tied=_tied(config, inner),
    )


_TIED_UNLESS_TOLD = frozenset({"gpt2", "gemma", "gemma2", "gemma3_text", "bloom", "opt", "falcon"})
"""Architectures whose configuration leaves tying out because it is their default."""


def _tied(config: dict[str, Any], inner: dict[str, Any]) -> bool:
    told = inner.get("tie_word_embeddings", config.get("tie_word_embeddings"))
    return inner.get("model_type") in _TIED_UNLESS_TOLD if told is None else bool(told)


def _weights_bytes(path: Path, size: int, tied: bool, kind: str) -> int:
    tensors: dict[str, Any] = {}
    for file in checks.weight_files(path.name, path):
        tensors |= checks.read_header(path.name, file)
    has_embedding = any(
        name.endswith(("embed_tokens.weight", "wte.weight", "word_embeddings.weight"))
        for name in tensors
    )
    total = 0
    for name, tensor in tensors.items():
        head = name.endswith(("lm_head.weight", "embed_out.weight"))
        # A tied head is the embedding itself, even where a file holds it twice; an
        # encoder loads the body alone, so heads of any kind stay on disk.
        if name.endswith(_COMPUTED) or (head and tied and has_embedding):
            continue
        if kind == "encoder" and (head or name.startswith(("cls.", "lm_head.", "classifier."))):
            continue
        stored = str(tensor["dtype"])
        if stored not in _STORED:
            raise ModelUnusable(path.name, name, f"is stored as {stored}, which is not known here")
        each = size if stored in _CAST else _STORED[stored]
        total += math.prod(int(n) for n in tensor["shape"]) * each
    return total


_INDEX_BYTES = 4 * 8
"""Per token of a step: its id, position, mask and place, as int64."""


def _causal_workspace(shape: _Shape, size: int, kv_tokens: int, step_tokens: int) -> int:
    """The larger of the two peaks of one step: inside a layer, or at the logits."""
    context = min(kv_tokens, shape.positions)
    wide = shape.heads * shape.head_dim
    # Residual and its normed copy, which is computed in float32; the mask lives as long.
    # Attention itself never holds the whole matrix of scores.
    stream = step_tokens * (shape.hidden * (2 * size + 4) + context * size + _INDEX_BYTES)
    attention = (
        step_tokens * (2 * wide + 2 * shape.kv_heads * shape.head_dim) * size
        # Keys and values of one layer gathered from their blocks and repeated per head.
        + 2 * context * wide * size
    )
    mlp = 3 * step_tokens * shape.intermediate * size
    # Logits in the model's type and their float32 copy for sampling.
    logits = step_tokens * shape.vocabulary * (size + 4)
    return stream + max(attention, mlp, logits)


def _encoder_workspace(shape: _Shape, size: int, text_tokens: int, texts: int) -> int:
    """The peak inside a layer for a batch of the longest texts."""
    tokens = texts * text_tokens
    # The residual, the layer's input and its normed output; the mask where texts are padded.
    stream = tokens * (3 * shape.hidden * size + text_tokens * size + _INDEX_BYTES)
    attention = 4 * tokens * shape.hidden * size
    mlp = 2 * tokens * shape.intermediate * size
    pooled = tokens * shape.hidden * 4  # float32 for the mean
    return stream + max(attention, mlp, pooled)
