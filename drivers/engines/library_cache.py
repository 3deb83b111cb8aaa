"""The KV cache of transformers' continuous batching: for CUDA, and for models whose
attention ours does not compute. The one place that touches the library's insides.

Its cache tensors, block tables, masks and kernels are used; its scheduler, its queues
and its thread are not: they cannot be given a thread quota, deliver through queues that
nobody bounds, end cancelled requests without a word, and take memory block by block.
"""

from __future__ import annotations

from collections.abc import Sequence as Parts
from importlib.util import find_spec
from typing import Any

import torch
from transformers import GenerationConfig
from transformers.generation.configuration_utils import ContinuousBatchingConfig
from transformers.generation.continuous_batching.continuous_api import ContinuousBatchingManager
from transformers.generation.continuous_batching.requests import FutureRequestState, RequestState

from llmos.drivers.engines.kvmemory import PAGE_TOKENS, KvMemory
from llmos.drivers.engines.sequence import Sequence


class LibraryCache:
    """As :class:`llmos.drivers.engines.own_cache.OwnCache`."""

    def __init__(
        self, model: Any, kv_tokens: int, max_batch_tokens: int, max_requests: int, share: bool
    ) -> None:
        cuda = model.device.type == "cuda"
        blocks = max(1, kv_tokens // PAGE_TOKENS)
        self._manager = ContinuousBatchingManager(
            model=model,
            generation_config=GenerationConfig(do_sample=False, max_new_tokens=1, eos_token_id=-1),
            continuous_batching_config=ContinuousBatchingConfig(
                page_size=PAGE_TOKENS,
                num_blocks=blocks,
                max_batch_tokens=max_batch_tokens,
                max_requests_per_batch=max_requests,
                # The ledger has granted the memory; the library is not to judge it again.
                max_memory_percent=1.0,
                max_blocks_per_request=0,
                # It finds blocks by their tokens alone, across tenants; ours are in prefixes.py.
                allow_block_sharing=False,
                # The next tokens are chosen by Python per row, which a graph cannot replay,
                # and cancelling within a step needs the step to be over when its results come.
                use_async_batching=False,
                use_cuda_graph=False,
                safety_margin=0.0,
                auto_switch_to_flash=cuda and find_spec("flash_attn") is not None,
            ),
        )
        with torch.inference_mode():
            self._processor: Any = self._manager._create_batch_processor()
        self._cache = cache = self._processor.cache
        self._allocators = list(cache.cache_allocators.values())
        self.read_limit: int | None = int(cache.max_tokens_read)
        self.size_bytes = int(cache.cache_tensor.nbytes)
        self.memory: KvMemory | None = None
        self.kv_tokens = int(cache.num_blocks) * PAGE_TOKENS
        if len(self._allocators) == 1 and self._allocators[0].layer_type == "full_attention":
            # All blocks are taken out of the library's hands. It may have rounded up to
            # whole sectors; what was not granted is left alone.
            each, free = self._allocators[0].blocks_per_sector, cache.pool.free_sectors
            count = min(blocks, len(free) * each)
            self.memory = KvMemory(min(free) * each, count, share)
            self.kv_tokens = count * PAGE_TOKENS
            free.clear()

    @property
    def used_tokens(self) -> int:
        """Held by sequences."""
        if self.memory is not None:
            return self.memory.used_tokens
        return sum(
            len(blocks) * a.tokens_per_page
            for a in self._allocators
            for blocks in list(a.block_table.values())
        )

    def reserve(self, sequence: Sequence) -> bool:
        """All the places a sequence may need; False: not enough are free."""
        if self.memory is not None:
            if not self.memory.reserve(sequence):
                return False
            self._allocators[0].block_table[sequence.key] = sequence.blocks
            return True
        # Several kinds of layers: the library knows what each needs for so many tokens.
        whole = RequestState(request_id=sequence.key, initial_tokens=[])
        return bool(self._cache.can_store_request_tokens(whole, sequence.cache_tokens))

    def written(self, sequence: Sequence) -> None:
        """A step has moved ``read`` of a sequence on."""
        if self.memory is not None:
            self.memory.written(sequence)

    def release(self, sequence: Sequence, keep_until_s: float) -> None:
        """Free a sequence's places."""
        if self.memory is not None:
            self._allocators[0].block_table.pop(sequence.key, None)
            self.memory.release(sequence, keep_until_s)
            return
        self._cache.free_blocks(sequence.key)
        self._cache.pool.try_to_free_sectors()
        sequence.read = 0

    def inputs(self, parts: Parts[tuple[Sequence, int]]) -> dict[str, Any]:
        """Arguments of the model for these next tokens (how many) of these sequences."""
        states = []
        for sequence, new in parts:
            state = RequestState(request_id=sequence.key, initial_tokens=[])
            state.position_offset = sequence.read
            state.tokens_to_process = sequence.tokens[sequence.read : sequence.read + new]
            last = sequence.read + new == len(sequence.tokens)
            states.append(FutureRequestState(state, last, {}, new))
        limit = self._cache.read_cache_limit
        reads = [s.read if limit is None else min(s.read, limit) for s, _ in parts]
        batch = self._processor.inputs_and_outputs
        batch.prepare_batch_tensors(
            requests_in_batch=states,
            logits_processors=self._processor.logit_processor,
            use_decode_fast_path=False,
            num_q_tokens=sum(new for _, new in parts),
            max_kv_read=sum(reads),
            use_padding=False,
        )
        arguments: dict[str, Any] = batch.get_model_kwargs(use_padding=False)
        for unused in ("logits_indices", "logits_processor_args"):
            arguments.pop(unused)
        return arguments

    def close(self) -> None:
        """Free the memory."""
        self._manager.destroy()
        self._processor = self._manager = self._cache = None
        self._allocators = []
