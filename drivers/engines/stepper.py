"""The one place that touches the insides of transformers' continuous batching.

A :class:`Stepper` owns the model and one persistent manager. It is built in the
caller's thread and from then on used only by the engine's generation thread, which
calls :meth:`step` itself: the manager's own thread cannot be given a thread quota,
delivers results through queues that nobody bounds, and ends cancelled requests
without a word.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.generation.configuration_utils import ContinuousBatchingConfig
from transformers.generation.continuous_batching.continuous_api import ContinuousBatchingManager
from transformers.generation.continuous_batching.model_runner import ModelRunner
from transformers.generation.continuous_batching.requests import RequestState, RequestStatus

from llmos.drivers.engines import paged_attention
from llmos.drivers.engines.blocks import BlockPool
from llmos.drivers.engines.loading import loading
from llmos.drivers.engines.packing import pack_linears
from llmos.drivers.engines.sampling import choose
from llmos.drivers.protocols import EngineOptions, SamplingParams

PAGE_TOKENS = 16
"""Tokens per KV block. Runs of blocks are read as one, so small costs nothing but waste less."""
MAX_REQUESTS = 256
"""Sequences in one step at most; each needs a row of logits."""


def torch_dtype(options: EngineOptions) -> torch.dtype:
    """The number format that options mean on their device."""
    if options.dtype != "auto":
        chosen: torch.dtype = getattr(torch, options.dtype)
        return chosen
    if options.torch_device.startswith("cuda"):
        native = torch.cuda.get_device_capability(options.torch_device) >= (8, 0)
    else:
        # Without these instructions bfloat16 is converted at every step and slower than float32.
        native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if native else torch.float32


@dataclass(frozen=True, slots=True)
class NewToken:
    """What one step gave one sequence."""

    key: str
    token: int
    ended: bool
    """By end-of-sequence or length; its blocks are free already."""
    started_s: float
    """``time.perf_counter`` of the first step with this sequence in it."""


class _Sink:
    """Takes the library's own deliveries; results are read from the states instead."""

    def deliver(self, output: object) -> None:
        pass

    def deliver_batch(self, outputs: object) -> None:
        pass


class _Runner(ModelRunner):  # type: ignore[misc]
    """Runs the model on the rows that get a token, and chooses it per row."""

    rows: int = 0
    sampled: Sequence[tuple[int, SamplingParams]] = ()
    generator: torch.Generator | None = None

    def _forward_process_and_sample(
        self, model: Any, batch_data: dict[str, Any], carry: Any, previous: Any, output: Any
    ) -> None:
        logits = model(**batch_data).logits
        if "logits_to_keep" not in batch_data:
            logits = logits[:, batch_data["logits_indices"]]
        if self.rows:
            output[0, : self.rows].copy_(choose(logits[0], self.sampled, self.generator))


class Stepper:
    """A loaded model and its KV cache, advanced one step at a time."""

    def __init__(self, options: EngineOptions) -> None:
        self.dtype = torch_dtype(options)
        self.device = torch.device(options.torch_device)
        with loading():
            model = AutoModelForCausalLM.from_pretrained(
                options.path,
                dtype=self.dtype,
                local_files_only=True,
                use_safetensors=True,
                trust_remote_code=False,
                attn_implementation="sdpa",
            )
        self.model: Any = model.to(self.device).eval().requires_grad_(False)
        config = self.model.config.get_text_config()
        self.context_tokens = int(getattr(config, "max_position_embeddings", 0) or 2048)
        self.vocabulary = int(config.vocab_size)
        blocks = max(1, options.kv_tokens // PAGE_TOKENS)
        self.max_requests = min(MAX_REQUESTS, options.max_batch_tokens)
        cuda = self.device.type == "cuda"
        manager = ContinuousBatchingManager(
            model=self.model,
            generation_config=GenerationConfig(do_sample=False, max_new_tokens=1, eos_token_id=-1),
            continuous_batching_config=ContinuousBatchingConfig(
                page_size=PAGE_TOKENS,
                num_blocks=blocks,
                max_batch_tokens=options.max_batch_tokens,
                max_requests_per_batch=self.max_requests,
                # The ledger has granted the memory; the library is not to judge it again.
                max_memory_percent=1.0,
                max_blocks_per_request=0,
                # Blocks are found again by their tokens alone, so they would cross tenants.
                allow_block_sharing=False,
                # The next tokens are chosen by Python per row, which a graph cannot replay,
                # and cancelling within a step needs the step to be over when its results come.
                use_async_batching=False,
                use_cuda_graph=False,
                safety_margin=0.0,
                auto_switch_to_flash=cuda and find_spec("flash_attn") is not None,
            ),
        )
        self._manager = manager
        own = self._own_attention(config)
        if own:
            # Only here: models with other kinds of layers may read their linear weights directly.
            pack_linears(self.model)
            self.model.set_attn_implementation(paged_attention.NAME)
        with torch.inference_mode():
            self._processor: Any = manager._create_batch_processor()
        processor = self._processor
        processor.output_router = _Sink()
        runner = _Runner(
            logit_processor=processor.logit_processor,
            cb_config=processor.cb_config,
            inputs_and_outputs=processor.inputs_and_outputs,
            cache=processor.cache,
            do_sample=False,
            return_logprobs=False,
        )
        runner.generator = torch.Generator(self.device)
        runner.generator.seed()
        processor.model_runner = self._runner = runner
        self._allocators = list(processor.cache.cache_allocators.values())
        self._layers: Any = None
        if own:
            self._layers = paged_attention.layered(self._allocators[0])
        self._claim_blocks()

    def _own_attention(self, config: Any) -> bool:
        """Whether our CPU attention computes what this model means by attention."""
        kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
        softcap = getattr(config, "attn_logit_softcapping", None)
        window = getattr(config, "sliding_window", None)
        sinks = any(hasattr(module, "sinks") for module in self.model.modules())
        plain = kinds == {"full_attention"} and not (softcap or window or sinks)
        return plain and self.device.type == "cpu"

    def _claim_blocks(self) -> None:
        """Take all blocks out of the library's hands: jobs get theirs whole, see blocks.py."""
        self.pool: BlockPool | None = None
        if len(self._allocators) != 1 or self._allocators[0].layer_type != "full_attention":
            return
        allocator, pool = self._allocators[0], self._processor.cache.pool
        first = min(pool.free_sectors) * allocator.blocks_per_sector
        count = len(pool.free_sectors) * allocator.blocks_per_sector
        pool.free_sectors.clear()
        self.pool = mine = BlockPool(first, count)

        def free_blocks(request_id: str, no_cache: bool = False) -> None:
            mine.give(allocator.block_table.pop(request_id, []))

        allocator.free_blocks = free_blocks

    # ------------------------------------------------------------ memory

    @property
    def kv_tokens(self) -> int:
        """Capacity of the cache."""
        return int(self._processor.cache.num_blocks) * PAGE_TOKENS

    @property
    def kv_tokens_used(self) -> int:
        """Tokens of the blocks that jobs hold."""
        if self.pool is not None:
            return (self.pool.capacity - self.pool.free) * PAGE_TOKENS
        return sum(
            len(blocks) * a.tokens_per_page
            for a in self._allocators
            for blocks in list(a.block_table.values())
        )

    # ------------------------------------------------------------ work

    def admit(self, key: str, prompt: list[int], max_new_tokens: int, eos: list[int]) -> bool:
        """Let a sequence in with all the memory it may need; False: not enough is free."""
        scheduler = self._processor.scheduler
        if len(scheduler.active_requests) + len(scheduler.waiting_requests) >= self.max_requests:
            return False
        if self.pool is not None:
            # The last token is never fed back, so it needs no place.
            tokens = len(prompt) + max_new_tokens - 1
            blocks = self.pool.take(-(-tokens // PAGE_TOKENS))
            if blocks is None:
                return False
            self._allocators[0].block_table[key] = blocks
        scheduler.add_waiting_request(
            RequestState(
                request_id=key,
                initial_tokens=prompt,
                max_new_tokens=max_new_tokens,
                eos_token_id=eos,
            )
        )
        return True

    def drop(self, key: str) -> None:
        """Take a sequence out between two steps and free its blocks."""
        scheduler = self._processor.scheduler
        scheduler.set_request_cancellation(key)
        scheduler.clear_cancelled_requests()

    def step(self, params: dict[str, SamplingParams]) -> list[NewToken]:
        """Advance everything inside by one step; ``params`` by key. Empty: nothing to do."""
        processor = self._processor
        with torch.inference_mode():
            if not processor.prepare_next_batch():
                return []
            batch = processor.inputs_and_outputs.requests_in_batch
            new = [f for f in batch if f.has_new_token]
            self._runner.rows = len(new)
            self._runner.sampled = [
                (row, params[f.state.request_id])
                for row, f in enumerate(new)
                if params[f.state.request_id].temperature > 0
            ]
            data = processor.inputs_and_outputs.get_model_kwargs(use_padding=False)
            data["logits_indices"] = data["logits_indices"][: len(new)]
            if self._layers is not None:
                tables = self._allocators[0].block_table
                data["llmos_layers"] = self._layers
                data["llmos_plan"] = paged_attention.Plan(
                    [(f.state.position_offset - f.query_length, f.query_length) for f in batch],
                    [tables[f.state.request_id] for f in batch],
                    PAGE_TOKENS,
                    self.dtype,
                )
            self._runner.compute_batch(self.model, data)
            processor.inputs_and_outputs.retrieve_device_outputs()
            processor.update_batch()
        return [
            NewToken(
                f.state.request_id,
                f.state.generated_tokens[-1],
                f.state.status == RequestStatus.FINISHED,
                f.state.lifespan[0],
            )
            for f in new
        ]

    def close(self) -> None:
        """Free the model and the cache."""
        self._manager.destroy()
        self._processor = self._runner = self._manager = self.model = self._layers = None  # type: ignore[assignment]
        self._allocators = []
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
