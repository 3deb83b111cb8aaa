"""Time to the first token when long prompts come in between short questions.

The same arrivals with chunked prefill and without. Times are multiples of what one long
prompt takes alone on this machine, so that a slow machine is not loaded more than a fast
one: a long prompt every three of these, a short question every quarter.
"""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks.engine_rig import (
    WAIT_S,
    Answer,
    Dtype,
    Ours,
    Prompt,
    alternate,
    load_tokenizer,
    make_prompts,
    options,
    percentile,
    spread,
)
from llmos.drivers.protocols import SamplingParams

LONG_TOKENS = 1500
LONG_EVERY, SHORT_EVERY = 3.0, 0.25
"""In times that one long prompt takes alone."""
CHUNK_TOKENS = 256
"""Tokens of a step with chunked prefill."""
WHOLE_TOKENS = 2048
"""Without: enough for the longest prompt in one step."""
NEW_TOKENS = 24


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request of the schedule."""

    at: float
    """In times that one long prompt takes."""
    prompt: Prompt
    long: bool


def arrivals(tokenizer: Any, longs: int, long_tokens: int = LONG_TOKENS) -> list[Arrival]:
    """The schedule, the same in every run: so many long prompts, and the questions meanwhile."""
    shorts = int(longs * LONG_EVERY / SHORT_EVERY)
    long = make_prompts(tokenizer, [long_tokens - 7 * i for i in range(longs)])
    short = make_prompts(tokenizer, spread(shorts, 12, 48))
    found = [Arrival(LONG_EVERY * i + 0.6, p, True) for i, p in enumerate(long)]
    found += [Arrival(SHORT_EVERY * i, p, False) for i, p in enumerate(short)]
    return sorted(found, key=lambda a: a.at)


@dataclass(frozen=True, slots=True)
class Waits:
    """Of one run, in milliseconds."""

    short: list[float]
    long: list[float]
    gaps: list[float]
    """Between two pieces of text of one short answer."""


def play(ours: Ours, schedule: Sequence[Arrival], unit_s: float) -> Waits:
    """Hand in each request when it is due; the time to its first token counts from then."""
    left = threading.Semaphore(0)
    params = SamplingParams(max_new_tokens=NEW_TOKENS, ignore_eos=True)
    began = time.perf_counter() + 0.05
    answers: list[tuple[float, bool, Answer]] = []
    for arrival in schedule:
        due = began + arrival.at * unit_s
        time.sleep(max(0.0, due - time.perf_counter()))
        answer = ours.submit(arrival.prompt.text, params, left.release)
        answers.append((due, arrival.long, answer))
    for _ in answers:
        if not left.acquire(timeout=WAIT_S):
            raise TimeoutError(f"not all requests ended within {WAIT_S} s")
    waits = Waits([], [], [])
    for due, long, answer in answers:
        if answer.error is not None:
            raise answer.error
        times = [s.wall_s for s in answer.stamps]
        (waits.long if long else waits.short).append((times[0] - due) * 1000)
        if not long:
            waits.gaps.extend((b - a) * 1000 for a, b in pairwise(times))
    return waits


def measure_first_token(
    path: Path,
    dtype: Dtype,
    pairs: int,
    *,
    longs: int = 4,
    long_tokens: int = LONG_TOKENS,
    device: str = "cpu",
    tell: Callable[[str], object] = print,
) -> dict[str, Any]:
    """Percentiles over all requests, and by kind, with chunked prefill and without."""
    schedule = arrivals(load_tokenizer(path), longs, long_tokens)
    # Nobody is to wait for memory: what is measured is the order of the work.
    kv = sum(len(a.prompt.ids) + 2 * NEW_TOKENS for a in schedule)
    make = partial(options, path, dtype, kv, device)
    with (
        Ours(make(max_batch_tokens=CHUNK_TOKENS)) as chunked,
        Ours(make(max_batch_tokens=WHOLE_TOKENS, chunked_prefill=False)) as whole,
    ):
        unit = min(_alone_s(whole, next(a for a in schedule if a.long)) for _ in range(2))
        _alone_s(chunked, schedule[0])
        ways = {"chunked": chunked, "whole": whole}
        rounds = alternate(
            pairs, {name: partial(play, ours, schedule, unit) for name, ours in ways.items()}
        )
    out: dict[str, Any] = {name: _row(waits) for name, waits in rounds.items()}
    tell(f"first token: {out}")
    return out | {
        "long_prompt_alone_ms": round(unit * 1000, 1),
        "requests": {"short": sum(not a.long for a in schedule), "long": longs},
        "long_tokens": long_tokens,
        "step_tokens": {"chunked": CHUNK_TOKENS, "whole": WHOLE_TOKENS},
    }


def _alone_s(ours: Ours, arrival: Arrival) -> float:
    began = time.perf_counter()
    (answer,) = ours.run([arrival.prompt.text], 1)
    return answer.ended_s - began


def _row(rounds: Sequence[Waits]) -> dict[str, Any]:
    """Medians over the rounds of each round's percentiles."""

    def both(of: Callable[[Waits], list[float]]) -> dict[str, float]:
        return {
            f"p{share}": round(statistics.median(percentile(of(w), share / 100) for w in rounds), 1)
            for share in (50, 95)
        }

    return {
        **both(lambda w: w.short + w.long),
        "short": both(lambda w: w.short),
        "long": both(lambda w: w.long),
        "between_tokens_of_short": both(lambda w: w.gaps),
    }
