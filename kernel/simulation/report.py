"""From an outcome to figures and plots."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llmos.kernel.simulation import svg
from llmos.kernel.simulation.world import Outcome


def percentile(values: Sequence[float], share: float) -> float:
    """The value that ``share`` of all do not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0


def figures(outcome: Outcome) -> dict[str, Any]:
    """What a run gave, in numbers. Times in seconds of the simulation."""
    completion = list(outcome.completion_s.values())
    return {
        "jobs": outcome.jobs,
        "requests": outcome.requests,
        "span_s": outcome.span_s,
        "completion_s": {
            "mean": statistics.fmean(completion) if completion else 0.0,
            **{f"p{p}": percentile(completion, p / 100) for p in (50, 95, 99)},
        },
        "longest_wait_s": max(outcome.wait_s, default=0.0),
        "gap_tokens": outcome.gap_tokens,
        "served": outcome.served,
        "preempted": outcome.preempted,
        "cached_share": outcome.hit_share,
    }


def plots(outcomes: Mapping[str, Outcome], folder: Path) -> list[Path]:
    """Write completion times, waits and memory over time as SVG; returns the files."""
    drawn = {
        "completion": svg.lines(
            "Completion times of turns",
            {n: svg.distribution(list(o.completion_s.values())) for n, o in outcomes.items()},
            x="seconds",
            y="share of the turns",
            log_x=True,
        ),
        "wait": svg.lines(
            "Waits of requests",
            {n: svg.distribution(o.wait_s) for n, o in outcomes.items()},
            x="seconds",
            y="share of the requests",
            log_x=True,
        ),
        "memory": svg.lines(
            "KV cache held by requests",
            {n: [(at, float(held)) for at, held, _ in o.memory] for n, o in outcomes.items()},
            x="seconds",
            y="tokens",
        ),
    }
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for name, text in drawn.items():
        files.append(folder / f"{name}.svg")
        files[-1].write_text(text, encoding="utf-8")
    return files
