"""What attention alone costs per step, and how that grows with the number of sequences."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from benchmarks.engine_rig import (
    Dtype,
    Ours,
    alternate,
    kv_tokens,
    load_tokenizer,
    make_prompts,
    median_ratio,
    options,
    spread,
)

SMALL, LARGE = 32, 64
SHORTEST, LONGEST = 200, 280
"""Prompt tokens; with the answer's they make about 256 tokens of context."""
NEW_TOKENS = 24
STEP_TOKENS = 4096
"""So many that all prompts are read before the first answers end."""


def _event() -> Any:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


class _Calls:
    """Times of the calls of one attention function that had one query token per sequence."""

    def __init__(self, batch: int, cuda: bool) -> None:
        self._batch, self._cuda = batch, cuda
        self._cpu_s: list[float] = []
        self._events: list[tuple[Any, Any]] = []

    def timed(self, attention: Callable[..., Any]) -> Callable[..., Any]:
        """The same function, timed. Steps that read prompts are not counted."""

        def call(module: Any, query: Any, *args: Any, **more: Any) -> Any:
            if query.shape[2] != self._batch:
                return attention(module, query, *args, **more)
            if self._cuda:
                begin, end = _event(), _event()
                begin.record()
                result = attention(module, query, *args, **more)
                end.record()
                self._events.append((begin, end))
                return result
            # The thread's own time: neighbours on the machine do not count.
            began = time.thread_time()
            result = attention(module, query, *args, **more)
            self._cpu_s.append(time.thread_time() - began)
            return result

        return call

    def per_step_s(self, layers: int) -> float:
        """Seconds of attention in one step, all layers."""
        if self._cuda:
            torch.cuda.synchronize()
            seconds = [begin.elapsed_time(end) / 1000 for begin, end in self._events]
        else:
            seconds = self._cpu_s
        if not seconds:
            raise RuntimeError("there was no step in which all sequences decoded")
        return float(sum(seconds)) * layers / len(seconds)


@contextmanager
def _watched(name: str, calls: _Calls) -> Iterator[None]:
    """Meanwhile the library's models that use this attention are timed."""
    before = ALL_ATTENTION_FUNCTIONS[name]
    AttentionInterface.register(name, calls.timed(before))
    try:
        yield
    finally:
        AttentionInterface.register(name, before)


def measure_attention(
    path: Path,
    dtype: Dtype,
    pairs: int,
    device: str = "cpu",
    batches: tuple[int, int] = (SMALL, LARGE),
) -> dict[str, Any]:
    """Milliseconds of attention per decode step by batch, and the quotient.

    On the CPU it is the engine thread's own CPU time, with one thread.
    """
    tokenizer = load_tokenizer(path)
    prompts = make_prompts(tokenizer, spread(batches[1], SHORTEST, LONGEST))
    kv = kv_tokens(prompts, NEW_TOKENS)
    with Ours(options(path, dtype, kv, device, max_batch_tokens=STEP_TOKENS)) as ours:
        config = ours.engine._stepper.model.config
        layers = int(config.get_text_config().num_hidden_layers)

        def one(batch: int) -> float:
            calls = _Calls(batch, device.startswith("cuda"))
            with _watched(config._attn_implementation, calls):
                # Every other one, so that both batches have the same mix of lengths.
                chosen = prompts[:: len(prompts) // batch][:batch]
                ours.run([p.text for p in chosen], NEW_TOKENS)
            return calls.per_step_s(layers)

        rounds = alternate(pairs, {str(b): partial(one, b) for b in batches})
    small, large = (rounds[str(b)] for b in batches)
    return {
        "growth": round(median_ratio(large, small), 3),
        "ms_per_step": {b: round(statistics.median(r) * 1000, 3) for b, r in rounds.items()},
        "context_tokens": (SHORTEST + LONGEST + NEW_TOKENS) // 2,
    }
