"""Attention for continuous batching on the CPU, one sequence at a time.

The library packs all sequences of a step into one and separates them by a
block-diagonal mask, so attention costs (batch x total length) where
(sum of lengths) is needed. Here each sequence attends to its own cache alone and no
mask is built while it decodes. Keys and values are kept layer by layer, so that the
blocks of a job that follow one another are one view and are read in place.

On CUDA the library's own kernels are used instead: there launches cost more than
the wasted arithmetic, and flash kernels know ragged batches.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa
from transformers import AttentionInterface

from llmos.drivers.engines.blocks import run_start

NAME = "llmos_paged"
"""What the library calls this attention."""


@dataclass(frozen=True, slots=True)
class StepSequence:
    """One sequence in one step; the same for all layers."""

    query_start: int
    """First row of this sequence among the step's query tokens."""
    query_tokens: int
    key_tokens: int
    """Tokens in the cache after this step, the query's included."""
    cache_start: int
    """First cache row, if the rows follow one another; else -1."""
    rows: torch.Tensor | None
    """Cache rows, if they do not. Shape (key_tokens,)."""
    mask: torch.Tensor | None
    """Which key each query may see, for a prompt's later pieces. Shape (query, key)."""


class Plan:
    """How the sequences of one step lie in the batch and in the cache."""

    def __init__(
        self,
        lengths: Sequence[tuple[int, int]],
        tables: Sequence[list[int]],
        page_tokens: int,
    ) -> None:
        """Lengths are (past, query) tokens of each sequence, tables their blocks."""
        self.sequences: list[StepSequence] = []
        start = 0
        for (past, query), table in zip(lengths, tables, strict=True):
            keys = past + query
            blocks = table[: -(-keys // page_tokens)]
            first = run_start(blocks)
            rows = mask = None
            if first is None:
                pages = torch.tensor(blocks).unsqueeze(1) * page_tokens
                rows = (pages + torch.arange(page_tokens)).flatten()[:keys]
            if query > 1 and past:
                mask = torch.ones(query, keys, dtype=torch.bool).tril(past)
            self.sequences.append(
                StepSequence(
                    start, query, keys, -1 if first is None else first * page_tokens, rows, mask
                )
            )
            start += query
        self.query_tokens = start


def layered(allocator: Any) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
    """The library's cache memory, seen as (layers, 2, rows, kv_heads, head_dim).

    The same bytes in another order, so it must be done before the first step. Row
    numbers that the library computes for writing then count within one layer.

    Args:
        allocator: its full-attention allocator.

    Returns:
        Keys and values by layer index, each of shape (rows, kv_heads, head_dim).
    """
    layers = len(allocator.layer_indices)
    shape = (allocator.num_key_value_heads, allocator.head_dim)
    flat = allocator.cache_tensor.view(-1)
    rows = flat.numel() // (layers * 2 * shape[0] * shape[1])
    view = flat[: rows * layers * 2 * shape[0] * shape[1]].view(layers, 2, rows, *shape)
    by_layer = {layer: (view[i, 0], view[i, 1]) for i, layer in enumerate(allocator.layer_indices)}
    allocator.block_physical_stride = allocator.tokens_per_page
    allocator._kv_token_views = by_layer
    return by_layer


def paged_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    llmos_plan: Plan | None = None,
    llmos_layers: Mapping[int, tuple[torch.Tensor, torch.Tensor]] | None = None,
    write_index: Sequence[torch.Tensor] = (),
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Write the step's keys and values, then let each sequence attend to its own.

    Args:
        module: the attention layer; ``layer_idx`` is read.
        query: (1, heads, tokens, head_dim), all sequences one after another.
        key: (1, kv_heads, tokens, head_dim).
        value: as key.
        attention_mask: unused; sequences are separate by construction.
        scaling: factor of the scores.
        llmos_plan: this step's sequences.
        llmos_layers: keys and values of each layer.
        write_index: cache row of each token.

    Returns:
        Output of shape (1, tokens, heads, head_dim), and no weights.
    """
    if llmos_plan is None or llmos_layers is None:
        raise RuntimeError(f"{NAME} attention runs only inside the engine's own steps")
    keys, values = llmos_layers[int(module.layer_idx)]  # type: ignore[arg-type]
    new_keys, new_values = key[0].transpose(0, 1), value[0].transpose(0, 1)
    keys.index_copy_(0, write_index[0], new_keys)
    values.index_copy_(0, write_index[0], new_values)

    heads, dim = query.shape[1], query.shape[3]
    kv_heads = key.shape[1]
    group = heads // kv_heads
    out = query.new_empty(query.shape[2], heads, value.shape[3])
    # A decoding token's heads that share keys become rows of one small product: nothing is
    # repeated, and no mask is needed since they all see the whole sequence.
    rows_first = query[0].transpose(0, 1).reshape(-1, kv_heads, group, dim)
    for s in llmos_plan.sequences:
        begin, end = s.query_start, s.query_start + s.query_tokens
        if s.query_tokens == s.key_tokens and s.query_tokens > 1:
            k, v = key[:, :, begin:end], value[:, :, begin:end]
        elif s.rows is None:
            k = keys[s.cache_start : s.cache_start + s.key_tokens].transpose(0, 1).unsqueeze(0)
            v = values[s.cache_start : s.cache_start + s.key_tokens].transpose(0, 1).unsqueeze(0)
        else:
            k = keys.index_select(0, s.rows).transpose(0, 1).unsqueeze(0)
            v = values.index_select(0, s.rows).transpose(0, 1).unsqueeze(0)
        if s.query_tokens == 1:
            answer = sdpa(rows_first[begin:end], k, v, scale=scaling)
            out[begin] = answer.reshape(heads, -1)
        else:
            answer = sdpa(
                query[:, :, begin:end],
                k,
                v,
                attn_mask=s.mask,
                is_causal=s.mask is None,
                scale=scaling,
                enable_gqa=group > 1,
            )
            out[begin:end] = answer[0].transpose(0, 1)
    return out.unsqueeze(0), None


AttentionInterface.register(NAME, paged_attention)
