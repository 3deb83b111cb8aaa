"""Tokens per second through the whole kernel beside the bare engine, with the same prompts.

The kernel: agents on hosts, each asked once, all at the same time; turn, capability,
device process, journal. Bare: the same engine in this process, the same jobs handed in at
once. Both generate with one thread, so what the kernel adds runs on other cores if there
are any, and besides in the time before the first token and after the last.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.engine_rig import STEP_TOKENS, Dtype, Ours, alternate, median_ratio, options
from benchmarks.programs import Write, Writer, Written
from benchmarks.throughput import PROMPTS, cpu_seconds
from llmos.drivers.protocols import ChatTurn
from llmos.kernel.client import Kernel
from llmos.kernel.settings import Settings
from llmos.kernel.system import SystemConfig

KV_TOKENS = 16384


@dataclass(frozen=True, slots=True)
class Rates:
    """Of one round."""

    per_s: float
    per_cpu_s: float
    """Of all processes that take part."""


def _system(path: Path, dtype: Dtype) -> SystemConfig:
    return SystemConfig.model_validate(
        {
            "system": {"name": "engine"},
            "devices": [{"driver": "cpu", "threads": 1}],
            "models": {
                "chat": {
                    "source": path.name,
                    "engine": "causal",
                    "dtype": dtype,
                    "threads": 1,
                    "kv_tokens": KV_TOKENS,
                    "max_batch_tokens": STEP_TOKENS,
                    "device": "cpu:0",
                }
            },
            "base": Path(__file__).parent.parent,
        }
    )


class _Rounds:
    """Prompts that no round has seen before: prefixes found in a cache would flatter both."""

    def __init__(self, agents: list[str], new_tokens: int) -> None:
        self.agents, self.new_tokens = agents, new_tokens
        self._round = 0

    def prompts(self) -> list[str]:
        """Of the next round."""
        self._round += 1
        return [f"Case {self._round}. {PROMPTS[i % len(PROMPTS)]}" for i in range(len(self.agents))]

    def rates(self, work: Callable[[list[str]], object]) -> Rates:
        """Of one round of work."""
        prompts = self.prompts()
        cpu, wall = cpu_seconds(), time.perf_counter()
        work(prompts)
        wall_s, tokens = time.perf_counter() - wall, len(prompts) * self.new_tokens
        return Rates(tokens / wall_s, tokens / (cpu_seconds() - cpu))


def measure_kernel(
    path: Path,
    dtype: Dtype,
    pairs: int,
    *,
    agents: int = 32,
    new_tokens: int = 64,
    tell: Callable[[str], object] = print,
) -> dict[str, Any]:
    """Quotient of tokens per second, kernel over bare engine. The model is one of the store's."""
    settings = Settings()
    with tempfile.TemporaryDirectory() as home:
        local = Settings(home=Path(home), models=settings.models_dir, ray_address=None)
        with (
            Kernel.boot(_system(path, dtype), settings=local) as kernel,
            Ours(
                options(path, dtype, KV_TOKENS, max_batch_tokens=STEP_TOKENS, share_prefixes=True)
            ) as bare,
        ):
            names = [kernel.launch(Writer, f"w{n}") for n in range(agents)]
            rounds = _Rounds(names, new_tokens)

            def through_kernel(prompts: list[str]) -> None:
                def one(name: str, text: str) -> None:
                    message = Write(text=text, new_tokens=new_tokens)
                    written = kernel.ask(name, message, Written, deadline_s=600)
                    if written.new_tokens != new_tokens:
                        raise RuntimeError(f"{written.new_tokens} tokens came")

                with ThreadPoolExecutor(len(names)) as pool:
                    list(pool.map(one, names, prompts))

            def through_engine(prompts: list[str]) -> None:
                bare.run([(ChatTurn("user", p),) for p in prompts], new_tokens, agents=names)

            works = {"kernel": through_kernel, "bare": through_engine}
            for work in works.values():
                work(rounds.prompts())
            found = alternate(pairs, {n: partial(rounds.rates, w) for n, w in works.items()})
    out = {
        "relative_throughput": round(
            median_ratio((r.per_s for r in found["kernel"]), (r.per_s for r in found["bare"])), 3
        ),
        "relative_per_cpu_s": round(
            median_ratio(
                (r.per_cpu_s for r in found["kernel"]), (r.per_cpu_s for r in found["bare"])
            ),
            3,
        ),
        "agents": agents,
        "new_tokens": new_tokens,
    }
    for name, rates in found.items():
        out[f"{name}_tok_s"] = round(statistics.median(r.per_s for r in rates), 1)
        out[f"{name}_tok_cpu_s"] = round(statistics.median(r.per_cpu_s for r in rates), 1)
    tell(f"kernel: {out}")
    return out
