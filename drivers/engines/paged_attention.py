"""Attention for continuous batching on the CPU, over each sequence's own cache alone.

The library packs all sequences of a step into one and separates them by a
block-diagonal mask, so attention costs (batch x total length) where
(sum of lengths) is needed. Here sequences that decode are put into groups of similar
length, each one batched matrix product over gathered keys; prompts, and sequences too
few for a group, attend one by one. Keys and values are kept by layer and head, so that
the blocks of a job that follow one another are one view and are read in place.

Why gather at all: PyTorch's fused kernel spends most of its time on each call's and
each head's preparation when there is one query; copying rows and two plain products
take a quarter to a half of that time (measured in bfloat16 and float32).

On CUDA the library's own kernels are used instead: there launches cost more than
the wasted arithmetic, and flash kernels know ragged batches.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa
from transformers import AttentionInterface

from llmos.drivers.engines.blocks import run_start

NAME = "llmos_paged"
"""What the library calls this attention."""


GROUP_LEAST = 3
"""Fewer decoding sequences of similar length than this attend one by one."""
GROUP_TOKENS = 4096
"""Keys of one group at most, padding included, so that the copy stays in the processor's cache:
with 8192, 64 sequences took three times as long."""
PADDING_TOKENS = 800
"""Keys of padding for which a group of its own would cost as much: some ten calls per layer.
Grouping by a quarter of the longest, whatever that is, took a tenth longer at 32."""


@dataclass(frozen=True, slots=True)
class DecodeGroup:
    """Decoding sequences of similar length; the same for all layers."""

    queries: torch.Tensor | None
    """Their rows among the step's query tokens; None: exactly all rows, in order."""
    count: int
    longest: int
    rows: torch.Tensor
    """Cache rows, (count * longest,). Padding repeats the sequence's own last row: other
    rows may hold anything, even NaN, and belong to other jobs."""
    mask: torch.Tensor | None
    """Shape (count, longest), added to the scores. None: all are equally long."""


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
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Lengths are (past, query) tokens of each sequence, tables their blocks.

        ``dtype`` is the queries' number format.
        """
        self.sequences: list[StepSequence] = []
        """Those that attend one by one."""
        self.groups: list[DecodeGroup] = []
        starts = list(accumulate((query for _, query in lengths), initial=0))
        self.query_tokens = starts.pop()
        grouped: set[int] = set()
        for members in _similar([(p + 1, i) for i, (p, q) in enumerate(lengths) if q == 1]):
            places = [(starts[i], lengths[i][0] + 1, tables[i]) for i in members]
            self.groups.append(_group(places, page_tokens, dtype, self.query_tokens))
            grouped.update(members)
        for i, ((past, query), table) in enumerate(zip(lengths, tables, strict=True)):
            if i in grouped:
                continue
            keys = past + query
            first = run_start(table[: -(-keys // page_tokens)])
            rows = mask = None
            if first is None:
                rows = _rows(table, keys, page_tokens)
            if query > 1 and past:
                mask = torch.ones(query, keys, dtype=torch.bool).tril(past)
            cache_start = -1 if first is None else first * page_tokens
            self.sequences.append(StepSequence(starts[i], query, keys, cache_start, rows, mask))


def _rows(table: list[int], keys: int, page_tokens: int) -> torch.Tensor:
    """Cache rows of the first ``keys`` tokens."""
    pages = torch.tensor(table[: -(-keys // page_tokens)]).unsqueeze(1) * page_tokens
    return (pages + torch.arange(page_tokens)).flatten()[:keys]


def _similar(decoding: list[tuple[int, int]]) -> list[list[int]]:
    """Groups of (keys, sequence) with little padding, as indices of sequences."""
    found: list[list[int]] = []
    longest = padding = 0
    for keys, i in sorted(decoding, key=lambda d: (-d[0], d[1])):
        # Two long ones at least may share a group, or none of them ever could.
        room = max(GROUP_TOKENS // longest, GROUP_LEAST) if longest else 0
        padding += longest - keys
        if found and padding <= PADDING_TOKENS and len(found[-1]) < room:
            found[-1].append(i)
        else:
            found.append([i])
            longest, padding = keys, 0
    return [sorted(members) for members in found if len(members) >= GROUP_LEAST]


def _group(
    places: list[tuple[int, int, list[int]]],
    page_tokens: int,
    dtype: torch.dtype,
    query_tokens: int,
) -> DecodeGroup:
    """The group of sequences given as (query row, keys, blocks)."""
    count = len(places)
    keys = torch.tensor([k for _, k, _ in places]).unsqueeze(1)
    longest = int(keys.max())
    at = torch.arange(longest).unsqueeze(0)
    own = at.minimum(keys - 1)
    pages = -(-longest // page_tokens)
    blocks = torch.tensor([(t + t[-1:] * pages)[:pages] for _, _, t in places])
    rows = blocks.gather(1, own // page_tokens) * page_tokens + own % page_tokens
    hidden = at >= keys
    mask = None
    if bool(hidden.any()):
        mask = torch.zeros(count, longest, dtype=dtype).masked_fill_(hidden, -torch.inf)
    queries = None if count == query_tokens else torch.tensor([q for q, _, _ in places])
    return DecodeGroup(queries, count, longest, rows.flatten(), mask)


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
    llmos_rows: torch.Tensor | None = None,
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
        llmos_rows: cache row of each token.

    Returns:
        Output of shape (1, tokens, heads, head_dim), and no weights.
    """
    if llmos_plan is None or llmos_layers is None or llmos_rows is None:
        raise RuntimeError(f"{NAME} attention runs only inside the engine's own steps")
    keys, values = llmos_layers[int(module.layer_idx)]  # type: ignore[arg-type]
    keys.index_copy_(1, llmos_rows, key[0])
    values.index_copy_(1, llmos_rows, value[0])
    scale = query.shape[3] ** -0.5 if scaling is None else scaling
    out = query.new_empty(query.shape[2], query.shape[1], value.shape[3])
    for group in llmos_plan.groups:
        _decode_group(group, query, keys, values, scale, out)
    for s in llmos_plan.sequences:
        _one(s, query, key, value, keys, values, scale, out)
    return out.unsqueeze(0), None


def _decode_group(
    group: DecodeGroup,
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scale: float,
    out: torch.Tensor,
) -> None:
    """All sequences of the group and all their heads in two batched products."""
    kv_heads, _, dim = keys.shape
    per_kv = query.shape[1] // kv_heads
    batch = kv_heads * group.count
    asking = query[0] if group.queries is None else query[0].index_select(1, group.queries)
    # A token's heads that share keys become rows of one product: nothing is repeated.
    asking = asking.view(kv_heads, per_kv, group.count, dim).transpose(1, 2)
    # Scaled here, where there is less of it than of scores.
    asking = asking.reshape(batch, per_kv, dim) * scale
    k = keys.index_select(1, group.rows).view(batch, group.longest, dim)
    scores = torch.bmm(asking, k.transpose(1, 2))
    if group.mask is not None:
        # In place through a view, so that one mask serves all heads.
        scores.view(kv_heads, group.count, per_kv, -1).add_(group.mask.unsqueeze(1))
    v = values.index_select(1, group.rows).view(batch, group.longest, -1)
    answer = torch.bmm(scores.softmax(-1), v).view(kv_heads, group.count, -1)
    answer = answer.transpose(0, 1).reshape(group.count, *out.shape[1:])
    if group.queries is None:
        out.copy_(answer)
    else:
        out.index_copy_(0, group.queries, answer)


def _one(
    s: StepSequence,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scale: float,
    out: torch.Tensor,
) -> None:
    """A sequence by itself: a prompt or a piece of one, or a decoding token."""
    heads, dim = query.shape[1], query.shape[3]
    kv_heads = keys.shape[0]
    begin, end = s.query_start, s.query_start + s.query_tokens
    if s.query_tokens == s.key_tokens and s.query_tokens > 1:
        k, v = key[:, :, begin:end], value[:, :, begin:end]
    elif s.rows is None:
        span = slice(s.cache_start, s.cache_start + s.key_tokens)
        k, v = keys[:, span].unsqueeze(0), values[:, span].unsqueeze(0)
    else:
        k = keys.index_select(1, s.rows).unsqueeze(0)
        v = values.index_select(1, s.rows).unsqueeze(0)
    if s.query_tokens == 1:
        # No mask is needed: the heads, as rows of one product, all see the whole sequence.
        rows_first = query[:, :, begin].reshape(1, kv_heads, heads // kv_heads, dim)
        out[begin] = sdpa(rows_first, k, v, scale=scale).reshape(heads, -1)
    else:
        answer = sdpa(
            query[:, :, begin:end],
            k,
            v,
            attn_mask=s.mask,
            is_causal=s.mask is None,
            scale=scale,
            enable_gqa=heads > kv_heads,
        )
        out[begin:end] = answer[0].transpose(0, 1)


AttentionInterface.register(NAME, paged_attention)
