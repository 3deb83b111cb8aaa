"""Generated tokens per second of concurrent agents, beside plain transformers.

    python -m benchmarks.throughput [--json] [--pairs 5] [--agents 1 8 32] [--new-tokens 64]

Three ways to answer the same prompts with the same weights, number format and threads,
greedy, exactly ``--new-tokens`` tokens each:

- ours: N agents on the kernel, each asked once, all at the same time;
- serial: ``model.generate``, one prompt after the other;
- static: ``model.generate`` on all N prompts in one padded batch.

They take turns (ours, serial, static, ours, …), and each figure is the median over the
rounds. Serial does not get faster with more prompts, so a round of it answers at most
four of them. CPU-seconds are those of all processes taking part.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.programs import Write, Writer, Written
from llmos.drivers.devices.discover import discover
from llmos.drivers.devices.precision import resolve_precision
from llmos.drivers.models.store import ModelStore
from llmos.kernel.client import Kernel
from llmos.kernel.settings import Settings
from llmos.kernel.system import SystemConfig

PROMPTS = (
    "My card has not arrived yet, what should I do?",
    "Why was I charged a fee for a transfer inside the country?",
    "How do I change the PIN of my debit card?",
    "I see a payment that I did not make. Please explain what happens next.",
    "Can I get cash in another currency at any machine?",
    "My account was closed and I do not know why. Whom can I ask?",
    "What does an exchange rate on a weekend depend on?",
    "How long does a refund from a shop usually take?",
    "I lost my phone. Is my money safe?",
    "Which documents do you need to check my identity?",
    "A friend sent me money yesterday and it is still pending.",
    "What is the difference between a debit card and a credit card?",
    "Please explain what a chargeback is, in two sentences.",
    "Can my child have a card of their own?",
    "The machine kept my card. What now?",
    "How do I see all subscriptions that are paid from my account?",
    "Is there a limit on how much I can top up in a month?",
    "Why was my transfer declined although I have enough money?",
    "How can I export my statements for the tax office?",
    "What happens to a standing order when I close my account?",
    "My name changed after the wedding. How do I tell you?",
    "Do you lend money to people who work for themselves?",
    "How is the interest on a savings account worked out?",
    "Somebody called me and asked for my code. Was that you?",
    "Can I pay with my watch in a shop abroad?",
    "I typed the wrong account number. Can the transfer be stopped?",
    "What does it cost to hold several currencies?",
    "How do I add a second person to my account?",
    "Where do I find the number that other banks need to pay me?",
    "My card works in shops but not on the internet.",
    "How do I complain, and how long does an answer take?",
    "Which of your cards is best for somebody who travels a lot?",
)


@dataclass
class Figures:
    """Tokens per second of wall time and per CPU-second, one entry per round."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)

    def add(self, tokens: int, wall_s: float, cpu_s: float) -> None:
        """One round."""
        self.wall.append(tokens / wall_s)
        self.cpu.append(tokens / cpu_s)


def cpu_seconds() -> float:
    """CPU time of this process, its descendants, and all that Ray has started for us."""
    me = psutil.Process()
    total = 0.0
    for process in [me, *me.children(recursive=True)]:
        try:
            times = process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += times.user + times.system
    return total


def measured(work: Callable[[], int], figures: Figures) -> None:
    """Time one round of work that returns how many tokens it made."""
    cpu, wall = cpu_seconds(), time.perf_counter()
    tokens = work()
    figures.add(tokens, time.perf_counter() - wall, cpu_seconds() - cpu)


class Plain:
    """The model in this process, as a script would use it."""

    def __init__(self, path: Path, dtype: str, threads: int, new_tokens: int) -> None:
        torch.set_num_threads(threads)
        self._tokenizer = AutoTokenizer.from_pretrained(path, padding_side="left")
        self._model = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype))
        self._model.eval()
        self._new = new_tokens

    @torch.inference_mode()
    def generate(self, prompts: Sequence[str]) -> int:
        """Answer all in one batch; returns the tokens made."""
        texts = [
            self._tokenizer.apply_chat_template(
                [{"role": "user", "content": p}], tokenize=False, add_generation_prompt=True
            )
            for p in prompts
        ]
        batch = self._tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
        out = self._model.generate(
            **batch,
            do_sample=False,
            max_new_tokens=self._new,
            min_new_tokens=self._new,
            pad_token_id=self._tokenizer.eos_token_id,
        )
        return int((out.shape[1] - batch["input_ids"].shape[1]) * out.shape[0])

    def serial(self, prompts: Sequence[str]) -> int:
        """Answer one after the other."""
        return sum(self.generate([p]) for p in prompts)


def ours(kernel: Kernel, agents: Sequence[str], new_tokens: int) -> int:
    """Ask every agent once, all at the same time; returns the tokens made."""

    def one(index: int) -> int:
        written = kernel.ask(
            agents[index],
            Write(text=PROMPTS[index], new_tokens=new_tokens),
            Written,
            deadline_s=600,
        )
        assert written.new_tokens == new_tokens, written
        return written.new_tokens

    with ThreadPoolExecutor(len(agents)) as pool:
        return sum(pool.map(one, range(len(agents))))


def run(pairs: int, counts: Sequence[int], new_tokens: int, threads: int) -> dict[str, Any]:
    """All rounds; returns the object that ``--json`` prints."""
    settings = Settings()
    store = ModelStore(settings.models_dir)
    path = store.pull("smollm2-135m-instruct").path
    cpu = discover()[0]
    dtype = resolve_precision("auto", "causal", cpu)
    plain = Plain(path, dtype, threads, new_tokens)
    results: dict[int, dict[str, Figures]] = {
        n: {"ours": Figures(), "serial": Figures(), "static": Figures()} for n in counts
    }
    with tempfile.TemporaryDirectory() as home:
        system = SystemConfig.model_validate(
            {
                "system": {"name": "throughput"},
                "devices": [{"driver": "cpu", "threads": threads}],
                "models": {
                    "chat": {
                        "source": "smollm2-135m-instruct",
                        "engine": "causal",
                        "dtype": dtype,
                        "threads": threads,
                        "device": "cpu:0",
                    }
                },
                "base": Path(__file__).parent.parent,
            }
        )
        local = Settings(home=Path(home), models=settings.models_dir, ray_address=None)
        with Kernel.boot(system, settings=local) as kernel:
            agents = [kernel.launch(Writer, f"w{n}") for n in range(max(counts))]
            ours(kernel, agents[:1], 8)
            plain.generate(PROMPTS[:1])
            for n in counts:
                for _ in range(pairs):
                    r = results[n]
                    measured(lambda n=n: ours(kernel, agents[:n], new_tokens), r["ours"])
                    measured(lambda n=n: plain.serial(PROMPTS[: min(n, 4)]), r["serial"])
                    measured(lambda n=n: plain.generate(PROMPTS[:n]), r["static"])
            copies = [s for s in kernel.status()["slots"] if s["state"] == "ready"]
    out: dict[str, Any] = {"agents": {}}
    for n, figures in results.items():
        row = {f"{k}_tok_s": round(statistics.median(f.wall), 2) for k, f in figures.items()}
        row |= {f"{k}_tok_cpu_s": round(statistics.median(f.cpu), 2) for k, f in figures.items()}
        for peer in ("serial", "static"):
            ratios = [a / b for a, b in zip(figures["ours"].wall, figures[peer].wall, strict=True)]
            row[f"ours_over_{peer}"] = round(statistics.median(ratios), 3)
        out["agents"][str(n)] = row
    out["conditions"] = {
        "model": "smollm2-135m-instruct",
        "dtype": dtype,
        "threads": threads,
        "new_tokens": new_tokens,
        "pairs": pairs,
        "model_copies_resident": len(copies),
        "torch": torch.__version__,
        "python": sys.version.split()[0],
    }
    return out


def table(result: dict[str, Any]) -> Table:
    """For people."""
    made = Table(title="Generated tokens per second (per CPU-second), median")
    for column in ("agents", "ours", "serial", "static", "ours/serial", "ours/static"):
        made.add_column(column, justify="right")
    for n, row in result["agents"].items():
        made.add_row(
            n,
            *(
                f"{row[f'{k}_tok_s']} ({row[f'{k}_tok_cpu_s']})"
                for k in ("ours", "serial", "static")
            ),
            f"{row['ours_over_serial']:.2f} ×",
            f"{row['ours_over_static']:.2f} ×",
        )
    return made


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--json", action="store_true", help="one JSON object on the last line")
    parser.add_argument("--pairs", type=int, default=5, help="rounds per number of agents")
    parser.add_argument("--agents", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1, help="of the engine and of both peers")
    args = parser.parse_args()
    if max(args.agents) > len(PROMPTS) or min(args.agents) < 1:
        parser.error(f"--agents takes numbers from 1 to {len(PROMPTS)}")
    result = run(args.pairs, args.agents, args.new_tokens, args.threads)
    Console(width=110).print(table(result))
    if args.json:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
