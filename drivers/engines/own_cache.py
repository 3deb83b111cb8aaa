"""The KV cache of the CPU: one tensor, and the inputs of a step for our own attention."""

from __future__ import annotations

from collections.abc import Sequence as Parts
from typing import Any

import torch
from transformers.generation.continuous_batching.utils import (
    find_head_dim,
    find_num_key_value_heads,
)

from llmos.drivers.engines.kvmemory import PAGE_TOKENS, KvMemory
from llmos.drivers.engines.paged_attention import Plan
from llmos.drivers.engines.sequence import Sequence


class OwnCache:
    """Keys and values as (layers, 2, kv_heads, rows, head_dim), exactly ``kv_tokens`` rows."""

    read_limit: int | None = None
    """Tokens that one step may read from the cache; None: all."""

    def __init__(self, config: Any, dtype: torch.dtype, kv_tokens: int, share: bool) -> None:
        blocks = max(1, kv_tokens // PAGE_TOKENS)
        self._dtype = dtype
        self.kv_tokens = blocks * PAGE_TOKENS
        # Zeros are pages that the system has not given yet: the memory is used as tokens come.
        memory = torch.zeros(
            config.num_hidden_layers,
            2,
            find_num_key_value_heads(config),
            self.kv_tokens,
            find_head_dim(config),
            dtype=dtype,
        )
        self.size_bytes = int(memory.nbytes)
        self._layers = {i: (memory[i, 0], memory[i, 1]) for i in range(config.num_hidden_layers)}
        self.memory = KvMemory(0, blocks, share)

    @property
    def used_tokens(self) -> int:
        """Held by sequences."""
        return self.memory.used_tokens

    def reserve(self, sequence: Sequence) -> bool:
        """All the places a sequence may need; False: not enough are free."""
        return self.memory.reserve(sequence)

    def written(self, sequence: Sequence) -> None:
        """A step has moved ``read`` of a sequence on."""
        self.memory.written(sequence)

    def release(self, sequence: Sequence, keep_until_s: float) -> None:
        """Free a sequence's places."""
        self.memory.release(sequence, keep_until_s)

    def inputs(self, parts: Parts[tuple[Sequence, int]]) -> dict[str, Any]:
        """Arguments of the model for these next tokens (how many) of these sequences."""
        ids: list[int] = []
        positions: list[int] = []
        rows: list[int] = []
        for sequence, new in parts:
            read, blocks = sequence.read, sequence.blocks
            if new == 1:
                ids.append(sequence.tokens[read])
                positions.append(read)
                rows.append(blocks[read // PAGE_TOKENS] * PAGE_TOKENS + read % PAGE_TOKENS)
                continue
            ids += sequence.tokens[read : read + new]
            positions += range(read, read + new)
            rows += [
                blocks[at // PAGE_TOKENS] * PAGE_TOKENS + at % PAGE_TOKENS
                for at in range(read, read + new)
            ]
        return {
            "input_ids": torch.tensor([ids]),
            "position_ids": torch.tensor([positions]),
            "attention_mask": None,
            "use_cache": False,
            "llmos_rows": torch.tensor(rows),
            "llmos_layers": self._layers,
            "llmos_plan": Plan(
                [(s.read, new) for s, new in parts],
                [s.blocks for s, _ in parts],
                PAGE_TOKENS,
                self._dtype,
            ),
        }

    def close(self) -> None:
        """Free the memory."""
        self._layers = {}
