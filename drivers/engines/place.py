"""When a waiting job enters the batch, by what is known of those before it and those inside."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heappush

from llmos.drivers.protocols import StepTime


@dataclass(frozen=True, slots=True)
class Need:
    """What a job holds, or will."""

    kv_tokens: int
    prompt_tokens: int
    """Still to be read."""
    steps: int
    """Tokens it may still write: one a step."""


def entry_s(
    free_tokens: int,
    queue: Sequence[Need],
    running: Sequence[Need],
    step: StepTime | None,
    context_tokens: int,
) -> float | None:
    """Seconds until the last of ``queue`` enters, all before it first; None: not known.

    At most so long, as far as steps stay as they are: jobs may write less than they may, and
    are taken to write all.

    Args:
        free_tokens: KV cache that nobody holds.
        queue: those that wait, the next one first.
        running: those in the batch.
        step: how long steps take.
        context_tokens: held by the batch now.
    """
    if step is None:
        return None
    decode_s = step.predict_s(max(len(running), 1), context_tokens, 0)
    inside = [(need.steps * decode_s, need.kv_tokens) for need in running]
    heapify(inside)
    now_s = 0.0
    for need in queue:
        while free_tokens < need.kv_tokens:
            if not inside:
                return None  # It never fits.
            ends_s, tokens = heappop(inside)
            now_s = max(now_s, ends_s)
            free_tokens += tokens
        free_tokens -= need.kv_tokens
        reading_s = step.prompt_s * need.prompt_tokens
        heappush(inside, (now_s + reading_s + need.steps * decode_s, need.kv_tokens))
    return now_s
