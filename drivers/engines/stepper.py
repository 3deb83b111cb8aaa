"""A loaded causal model and its KV cache, advanced one step at a time.

Built in the caller's thread and from then on used only by the engine's generation
thread. What is inside was let in with all the memory it may need. Each step, every
decoding sequence writes one token, and prompts are read in the room that is left.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from llmos.drivers.engines import paged_attention
from llmos.drivers.engines.library_cache import LibraryCache
from llmos.drivers.engines.loading import loading
from llmos.drivers.engines.lora import AdapterBank
from llmos.drivers.engines.own_cache import OwnCache
from llmos.drivers.engines.packing import pack_linears
from llmos.drivers.engines.quantize import quantize
from llmos.drivers.engines.sampling import choose
from llmos.drivers.engines.sequence import Sequence
from llmos.drivers.engines.tensors import weights_bytes
from llmos.drivers.protocols import EngineOptions

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

    sequence: Sequence
    token: int
    ended: bool
    """By end-of-sequence or length; its memory is still to be freed by :meth:`Stepper.drop`."""


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one step did."""

    new: list[NewToken]
    parts: list[tuple[Sequence, int]]
    """Whose tokens were read, and how many."""
    decoding: int
    """Sequences that read the token they had written before."""
    context: int
    """Tokens in the cache of those, together."""
    seconds: float


class Stepper:
    """The model, its cache and the sequences inside."""

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
        self._max_batch_tokens = options.max_batch_tokens
        self._chunked = options.chunked_prefill
        self.max_requests = min(MAX_REQUESTS, options.max_batch_tokens)
        self.bank: AdapterBank | None = None
        if options.max_adapters:
            # Before packing, which then packs what the bank has wrapped.
            self.bank = AdapterBank(self.model, options.max_adapters, options.max_adapter_rank)
        # As packing does, it takes the layers that the bank has wrapped.
        quantize(self.model, options.weights, options.model)
        self.cache: OwnCache | LibraryCache
        if self._own_attention(config):
            # Only here: models with other kinds of layers may read their linear weights directly.
            pack_linears(self.model)
            self.model.set_attn_implementation(paged_attention.NAME)
            self.cache = OwnCache(config, self.dtype, options.kv_tokens, options.share_prefixes)
        else:
            self.cache = LibraryCache(
                self.model,
                options.kv_tokens,
                options.max_batch_tokens,
                self.max_requests,
                options.share_prefixes,
            )
        self._keeps_logits = bool(self.model._supports_logits_to_keep())
        self.inside: dict[str, Sequence] = {}
        """By key, in the order they were let in."""

    def _own_attention(self, config: Any) -> bool:
        """Whether our CPU attention computes what this model means by attention."""
        kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
        softcap = getattr(config, "attn_logit_softcapping", None)
        window = getattr(config, "sliding_window", None)
        sinks = any(hasattr(module, "sinks") for module in self.model.modules())
        plain = kinds == {"full_attention"} and not (softcap or window or sinks)
        return plain and self.device.type == "cpu"

    # ------------------------------------------------------------ who is inside

    @property
    def kv_tokens(self) -> int:
        """Capacity of the cache."""
        return self.cache.kv_tokens

    def memory_bytes(self) -> dict[str, int]:
        """What it keeps from step to step, by purpose; empty: it is closed."""
        model, bank = self.model, self.bank
        if model is None:
            return {}
        found = {"weights": weights_bytes(model), "kv": self.cache.size_bytes}
        if bank is not None:
            found["adapters"] = bank.places_bytes
        return found

    def admit(self, sequence: Sequence) -> bool:
        """Let a sequence in with all the memory it may need; False: not enough is free.

        One that was inside before reads its tokens again, the generated ones too.
        """
        if len(self.inside) >= self.max_requests or not self.cache.reserve(sequence):
            return False
        self.inside[sequence.key] = sequence
        return True

    def drop(self, sequence: Sequence, keep_until_s: float = 0.0) -> None:
        """Take a sequence out between two steps and free its memory.

        What it has read is remembered until then (``time.monotonic``), if there is room.
        """
        del self.inside[sequence.key]
        self.cache.release(sequence, keep_until_s)

    # ------------------------------------------------------------ work

    def step(self) -> StepResult | None:
        """Advance what is inside and not paused by one step; None: there is nothing."""
        parts = self._compose(s for s in self.inside.values() if not s.paused)
        if not parts:
            return None
        started, began = time.monotonic(), time.perf_counter()
        decoding = [s for s, _ in parts if s.read + 1 == len(s.tokens) > s.prompt_tokens]
        context = sum(len(s.tokens) for s in decoding)
        writing: list[Sequence] = []
        places: list[int] = []
        at = -1
        for sequence, new in parts:
            at += new
            if sequence.read + new == len(sequence.tokens):
                writing.append(sequence)
                places.append(at)
        with torch.inference_mode():
            tokens = self._forward(parts, writing, places)
        for sequence, new in parts:
            if not sequence.started_s:
                sequence.started_s = started
            sequence.read += new
            self.cache.written(sequence)
        for sequence, token in zip(writing, tokens, strict=True):
            sequence.tokens.append(token)
            sequence.row.took(token)
        seconds = time.perf_counter() - began
        news = [NewToken(s, t, s.ended) for s, t in zip(writing, tokens, strict=True)]
        return StepResult(news, parts, len(decoding), context, seconds)

    def _compose(self, sequences: Iterable[Sequence]) -> list[tuple[Sequence, int]]:
        """Who takes part in a step, and with how many tokens: decoding ones first."""
        room = self._max_batch_tokens
        reads = self.cache.read_limit
        ready: list[tuple[Sequence, int]] = []
        prompts: list[Sequence] = []
        for sequence in sequences:
            if len(sequence.tokens) - sequence.read > 1:
                prompts.append(sequence)
            else:
                ready.append((sequence, 1))
        if prompts and not self._chunked:
            # As far as the granted memory of one step goes.
            first = prompts[0]
            return [(first, min(len(first.tokens) - first.read, room))]
        room -= len(ready)
        for sequence in prompts:
            if room <= 0:
                break
            new = min(len(sequence.tokens) - sequence.read, room)
            ready.append((sequence, new))
            room -= new
        if reads is None:
            return ready
        # Shared blocks are read once by each, so all together may be more than the cache holds.
        fitting: list[tuple[Sequence, int]] = []
        for sequence, new in ready:
            if sequence.read <= reads:
                fitting.append((sequence, new))
                reads -= sequence.read
        return fitting

    def _forward(
        self, parts: list[tuple[Sequence, int]], writing: list[Sequence], places: list[int]
    ) -> list[int]:
        """Run the model on the next tokens and choose what ``writing`` write.

        ``places``: the rows of the step's tokens whose logits choose.
        """
        arguments = self.cache.inputs(parts)
        kept = torch.tensor(places, dtype=torch.long, device=self.device)
        if self._keeps_logits:
            arguments["logits_to_keep"] = kept
        if self.bank is not None:
            self.bank.set_step([(s.resident, new) for s, new in parts])
        logits = self.model(**arguments).logits[0]
        if self.bank is not None:
            self.bank.clear_step()
        if not writing:
            return []
        if not self._keeps_logits:
            logits = logits[kept]
        chosen: list[int] = choose(logits, [s.row for s in writing]).tolist()
        return chosen

    def close(self) -> None:
        """Free the model and the cache."""
        self.cache.close()
        self.inside.clear()
        self.model = self.bank = None
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
