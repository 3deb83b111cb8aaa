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
from llmos.drivers.models.narrow import Weights, is_linear, layer_bytes, layer_form
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
KV_BLOCK_TOKENS = 16
"""Engines keep keys and values in whole blocks of so many tokens."""
_LIBRARY_SPARE_BLOCKS = 2
"""Blocks that the cache of transformers has beside those that it is asked for."""
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
    model_type: str
    classifies: bool
    """Whether its own head gives classes, which an encoder loads."""
    plain_attention: bool
    """Whether every layer looks at the whole context, with nothing special about it."""


def predict_footprint(
    path: Path,
    *,
    kind: Literal["causal", "encoder"],
    dtype: Dtype | Literal["auto"],
    kv_tokens: int,
    max_batch_tokens: int,
    max_batch_texts: int,
    weights: Weights = "plain",
    max_adapters: int = 0,
    max_adapter_rank: int = 16,
    device: Literal["cpu", "cuda"] = "cpu",
) -> Footprint:
    """Bytes for weights, KV cache and the largest step.

    All but the largest step is what the engines' ``memory_bytes`` tells once the model is
    loaded, within some per cent.

    Args:
        path: folder of the model.
        kind: which engine will run it.
        dtype: what it will be loaded in. ``auto`` depends on the device, which is not
            known here, and counts as float32: more than needed, never less.
        kv_tokens: tokens of KV cache, all requests together; causal only.
        max_batch_tokens: tokens in one step.
        max_batch_texts: texts in one forward pass; encoder only.
        weights: how linear layers are kept.
        max_adapters: LoRA adapters that may be resident; causal only.
        max_adapter_rank: largest rank of one; each may change every linear layer.
        device: what it will run on; a causal model is kept differently on a CPU.

    Raises:
        ModelUnusable: a file is missing, broken or does not name the sizes.
        UnsafeModel: pickled weights.
    """
    shape, size = _shape(path), _BYTES["float32" if dtype == "auto" else dtype]
    ours = device == "cpu" and shape.plain_attention
    packed = ours and dtype == "bfloat16"
    weights_bytes = _weights_bytes(path, shape, size, kind, weights, packed)
    if kind == "causal":
        per_token = 2 * shape.kv_heads * shape.head_dim * size
        blocks = max(1, kv_tokens // KV_BLOCK_TOKENS) if kv_tokens else 0
        if blocks and not ours:
            blocks += _LIBRARY_SPARE_BLOCKS
        return Footprint(
            weights_bytes=weights_bytes,
            kv_bytes=shape.layers * per_token * blocks * KV_BLOCK_TOKENS,
            workspace_bytes=_causal_workspace(shape, size, kv_tokens, max_batch_tokens, ours)
            + _adapters_workspace(shape, size, max_batch_tokens, max_adapters),
            adapters_bytes=_adapter_widths(path, shape) * max_adapters * max_adapter_rank * size
            if max_adapters
            else 0,
        )
    # A text that is longer than a pass goes alone.
    longest = context_tokens(path)
    tokens = max(longest, min(max_batch_tokens, max_batch_texts * longest))
    return Footprint(
        weights_bytes=weights_bytes,
        workspace_bytes=_encoder_workspace(shape, size, tokens, longest),
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
        model_type=str(inner.get("model_type")),
        classifies=any(
            str(a).endswith("ForSequenceClassification") for a in config.get("architectures") or ()
        ),
        plain_attention=_plain_attention(inner),
    )


_TIED_UNLESS_TOLD = frozenset({"gpt2", "gemma", "gemma2", "gemma3_text", "bloom", "opt", "falcon"})
"""Architectures whose configuration leaves tying out because it is their default."""


def _tied(config: dict[str, Any], inner: dict[str, Any]) -> bool:
    told = inner.get("tie_word_embeddings", config.get("tie_word_embeddings"))
    return inner.get("model_type") in _TIED_UNLESS_TOLD if told is None else bool(told)


_WINDOW_UNLESS_TOLD = frozenset({"mistral", "gemma2", "gemma3_text"})
"""Architectures that have a sliding window by default; in Qwen's it must be switched on."""


def _plain_attention(inner: dict[str, Any]) -> bool:
    """Whether our own attention computes what the model means; the engine asks the same of the
    loaded configuration."""
    kinds = set(inner.get("layer_types") or ["full_attention"])
    window = inner.get("sliding_window", inner.get("model_type") in _WINDOW_UNLESS_TOLD)
    if not inner.get("use_sliding_window", not str(inner.get("model_type")).startswith("qwen")):
        window = None
    return kinds == {"full_attention"} and not (window or inner.get("attn_logit_softcapping"))


def _weights_bytes(
    path: Path, shape: _Shape, size: int, kind: str, weights: Weights, packed: bool
) -> int:
    """``packed``: linear layers are laid out anew, which leaves a tied embedding where it is."""
    tensors: dict[str, Any] = {}
    for file in checks.weight_files(path.name, path):
        tensors |= checks.read_header(path.name, file)
    has_embedding = any(
        name.endswith(("embed_tokens.weight", "wte.weight", "word_embeddings.weight"))
        for name in tensors
    )
    tied = shape.tied and kind == "causal" and has_embedding
    total = 0
    for name, tensor in tensors.items():
        head = name.endswith(("lm_head.weight", "embed_out.weight"))
        # A tied head is the embedding itself, even where a file holds it twice; an
        # encoder loads the body and a head that classifies, so others stay on disk.
        if name.endswith(_COMPUTED) or (head and tied):
            continue
        if kind == "encoder" and (head or name.startswith(("cls.", "lm_head."))):
            continue
        if kind == "encoder" and name.startswith("classifier.") and not shape.classifies:
            continue
        stored, sizes = str(tensor["dtype"]), tuple(int(n) for n in tensor["shape"])
        if stored not in _STORED:
            raise ModelUnusable(path.name, name, f"is stored as {stored}, which is not known here")
        each = size if stored in _CAST else _STORED[stored]
        if stored in _CAST and is_linear(name, sizes, shape.model_type):
            rows, columns = sizes
            form = layer_form(weights, rows, columns, rows == shape.vocabulary)
            total += layer_bytes(form, rows, columns, each)
        else:
            total += math.prod(sizes) * each
    if tied and (packed or weights != "plain"):
        # The embedding stays as it is, and the output gets a copy, packed or narrow.
        form = layer_form(weights, shape.vocabulary, shape.hidden, output=True)
        total += layer_bytes(form, shape.vocabulary, shape.hidden, size)
    return total


_INDEX_BYTES = 4 * 8
"""Per token of a step: its id, position, mask and place, as int64."""


def _causal_workspace(
    shape: _Shape, size: int, kv_tokens: int, step_tokens: int, ours: bool
) -> int:
    """The larger of the two peaks of one step: inside a layer, or at the logits.

    ``ours``: our attention runs it; the library's has a mask over the whole cache.
    """
    context = min(kv_tokens, shape.positions) if ours else kv_tokens + step_tokens
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


def _adapter_widths(path: Path, shape: _Shape) -> int:
    """Inputs plus outputs of all linear layers that an adapter may change: not the output layer,
    nor experts."""
    total = 0
    for file in checks.weight_files(path.name, path):
        for name, tensor in checks.read_header(path.name, file).items():
            sizes = tuple(int(n) for n in tensor["shape"])
            output = name.endswith(("lm_head.weight", "embed_out.weight"))
            if is_linear(name, sizes, shape.model_type) and not output and ".experts." not in name:
                total += sum(sizes)
    return total


def _adapters_workspace(shape: _Shape, size: int, step_tokens: int, places: int) -> int:
    """A step's tokens gathered by adapter, what is added to them, and both once more."""
    rows = 3 * step_tokens + 2 * places  # With what fills up the shorter ones.
    return 2 * rows * (shape.hidden + shape.intermediate) * size if places else 0


def _encoder_workspace(shape: _Shape, size: int, tokens: int, longest: int) -> int:
    """The peak inside a layer for a pass of so many tokens, padding included."""
    # The residual, the layer's input and its normed output; the mask where texts are padded.
    stream = tokens * (3 * shape.hidden * size + longest * size + _INDEX_BYTES)
    attention = 4 * tokens * shape.hidden * size
    mlp = 2 * tokens * shape.intermediate * size
    pooled = tokens * shape.hidden * 4  # float32 for the mean
    return stream + max(attention, mlp, pooled)
