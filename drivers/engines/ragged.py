"""Texts of different lengths in one forward pass, without padding.

The texts lie one behind the other as a single sequence, which is all that linear layers,
norms and embeddings need; only attention has to know where each begins. Texts of equal
length stand beside each other and attend in one batched call.

Against padded batches of 32 with a mask, sorted by length, this is 1.3 (192 texts) to 2.4
times (64 texts) as fast on one thread, the more the lengths within a batch differ: nothing
is computed on padding, and without a mask PyTorch takes its fast kernel. A block-diagonal
mask over the packed sequence was rejected: its cost grows with the square of the whole
pass. On CUDA texts are padded, since there each launch costs more than the wasted
arithmetic.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa
from transformers import AttentionInterface

NAME = "llmos_ragged"
"""What the library calls this attention."""

_FIRST_POSITION_AFTER_PADDING = frozenset({"roberta", "xlm-roberta", "camembert"})
"""Architectures whose positions start behind the padding token's."""
MODEL_TYPES = frozenset({"bert"}) | _FIRST_POSITION_AFTER_PADDING
"""Architectures that take positions and an attention function, and look at a text's place
nowhere else. Others are padded."""


@dataclass(frozen=True, slots=True)
class Group:
    """Texts of equal length that lie one behind the other."""

    start: int
    """Row of the first token of the first."""
    count: int
    length: int

    @property
    def rows(self) -> slice:
        """The rows of all of them."""
        return slice(self.start, self.start + self.count * self.length)


def groups_of(lengths: Sequence[int]) -> list[Group]:
    """Groups of neighbours of equal length, for texts in this order."""
    found: list[Group] = []
    start = 0
    for length, members in groupby(lengths):
        group = Group(start, sum(1 for _ in members), length)
        found.append(group)
        start += group.count * length
    return found


def positions(groups: Sequence[Group], model_type: str, padding: int | None) -> torch.Tensor:
    """Position of every token in its own text, as the architecture counts. Shape (1, tokens)."""
    first = (padding or 0) + 1 if model_type in _FIRST_POSITION_AFTER_PADDING else 0
    each = [torch.arange(first, first + g.length).repeat(g.count) for g in groups]
    return torch.cat(each).unsqueeze(0)


def means(hidden: torch.Tensor, groups: Sequence[Group]) -> torch.Tensor:
    """Mean over each text's tokens; (tokens, width) to (texts, width)."""
    return torch.cat([hidden[g.rows].view(g.count, g.length, -1).mean(dim=1) for g in groups])


def firsts(hidden: torch.Tensor, groups: Sequence[Group]) -> torch.Tensor:
    """Each text's first token; (tokens, width) to (texts, width)."""
    return torch.cat([hidden[g.rows].view(g.count, g.length, -1)[:, 0] for g in groups])


def ragged_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    llmos_groups: Sequence[Group] = (),
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Every text attends to itself alone.

    Args:
        module: the layer; not read.
        query: (1, heads, tokens, dim), as ``key`` and ``value``.
        attention_mask: None, since every text sees all of itself.
        scaling: of the scores; None: by the root of ``dim``.
        llmos_groups: how the texts lie; together they cover all tokens.
        kwargs: what the library says besides.

    Returns:
        (1, tokens, heads, dim), and no weights.
    """
    heads, dim = query.shape[1], query.shape[3]
    out = query.new_empty(1, query.shape[2], heads, dim)
    for group in llmos_groups:
        q, k, v = (
            t[0, :, group.rows].view(heads, group.count, group.length, dim).transpose(0, 1)
            for t in (query, key, value)
        )
        answer = sdpa(q, k, v, scale=scaling).transpose(1, 2)
        out[0, group.rows].view(group.count, group.length, heads, dim).copy_(answer)
    return out, None


AttentionInterface.register(NAME, ragged_attention)
