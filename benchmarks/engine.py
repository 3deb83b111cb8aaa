"""The engines beside what else would run the same models, in one run, taking turns.

    python -m benchmarks.engine [--json] [--only decode,adapters,…] [--pairs 5] [--quick]
        [--model FOLDER] [--encoder FOLDER] [--dtype bfloat16] [--new-tokens 48] [--batches 8 32 64]

Sections, in this order:

- *decode*: generated tokens per second at 8, 32 and 64 sequences: ours, the library's
  continuous batching (*stock*), and ``generate`` on one padded batch (*static*), greedy, from
  prompts of 16 to 160 tokens. Counted while all sequences decode; ``whole_run`` has the
  reading of the prompts in it;
- *identical*: float32 tokens of ours and stock for 64 prompts of 3 to 400 tokens;
- *attention*: what attention alone takes of a step at 64 sequences, relative to 32;
- *adapters*: a batch of 64 requests with 1, 8 and 64 LoRA adapters in it, peft's mixed batch,
  and how many tokens came from the wrong adapter;
- *kernel*: 32 agents on the kernel, asked at once, relative to the bare engine;
- *encoder*: texts per second, batched, one by one, and by sentence-transformers;
- *first_token*: time to the first token when long prompts come between short questions, with
  and without chunked prefill;
- *structured*: tokens with a JSON schema on every row, relative to none.

Everybody has one thread, the same weights and the same number format. Each figure is the
median over the rounds, each ratio that of the rounds' ratios. CPU-seconds are what neighbours
on the machine disturb least: with one thread, and nobody else there, wall time is the same.
``--quick`` takes small sizes and one round: to see that it runs, not to measure.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

# Before the tokenizers are loaded: everybody has one thread.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
import transformers
from rich.console import Console
from rich.table import Table

from benchmarks.engine_adapters import measure_adapters
from benchmarks.engine_attention import measure_attention
from benchmarks.engine_decode import check_identical, measure_decode
from benchmarks.engine_encoder import measure_encoder
from benchmarks.engine_latency import measure_first_token
from benchmarks.engine_structured import measure_structured

MODEL, ENCODER = "smollm2-135m-instruct", "minilm-l6"

Section = Callable[[argparse.Namespace], dict[str, Any]]
"""Measures, and returns the keys that it adds to the report."""


def tell(line: str) -> None:
    """How far it is; the report itself goes to standard output."""
    print(line, file=sys.stderr, flush=True)


def decode(args: argparse.Namespace) -> dict[str, Any]:
    """Tokens per second of three ways."""
    found = measure_decode(
        args.model, args.dtype, args.batches, args.new_tokens, args.pairs, tell=tell
    )
    return {"decode": found}


def identical(args: argparse.Namespace) -> dict[str, Any]:
    """Whether tokens are the library's."""
    count, new_tokens = (8, 8) if args.quick else (64, 32)
    found = check_identical(args.model, count, new_tokens)
    return {"fp32_identical": found.pop("identical"), "fp32": found}


def attention(args: argparse.Namespace) -> dict[str, Any]:
    """Growth of attention's part of a step."""
    batches = (4, 8) if args.quick else (32, 64)
    found = measure_attention(args.model, args.dtype, args.pairs, batches=batches)
    return {"attention_growth_32_64": found["growth"], "attention": found}


def adapters(args: argparse.Namespace) -> dict[str, Any]:
    """Many adapters in one batch."""
    sizes: dict[str, Any] = {"batch": 64, "numbers": (1, 8, 64)}
    if args.quick:
        sizes = {"batch": 8, "numbers": (1, 4), "checked": 4, "new_tokens": 8}
    with tempfile.TemporaryDirectory() as folder:
        found = measure_adapters(
            args.model, Path(folder), args.dtype, args.pairs, **sizes, tell=tell
        )
    return {"adapters": found}


def kernel(args: argparse.Namespace) -> dict[str, Any]:
    """Through the whole kernel."""
    # Here, since it loads Ray.
    from benchmarks.engine_kernel import measure_kernel

    sizes = {"agents": 4, "new_tokens": 8} if args.quick else {"new_tokens": 64}
    found = measure_kernel(args.model, args.dtype, args.pairs, **sizes, tell=tell)
    return {"kernel_relative_throughput": found["relative_throughput"], "kernel": found}


def encoder(args: argparse.Namespace) -> dict[str, Any]:
    """Texts per second."""
    sizes: dict[str, Any] = {"texts": 16, "alone": 8} if args.quick else {}
    return {"encoder_texts_per_s": measure_encoder(args.encoder, args.pairs, **sizes, tell=tell)}


def first_token(args: argparse.Namespace) -> dict[str, Any]:
    """Latency under a mixed load."""
    sizes: dict[str, Any] = {"longs": 1, "long_tokens": 300} if args.quick else {}
    found = measure_first_token(args.model, args.dtype, args.pairs, **sizes, tell=tell)
    return {"first_token_ms": found}


def structured(args: argparse.Namespace) -> dict[str, Any]:
    """With a schema."""
    sizes: dict[str, Any] = {"batch": 4, "new_tokens": 8} if args.quick else {}
    found = measure_structured(args.model, args.dtype, args.pairs, **sizes, tell=tell)
    return {"structured_output": found}


SECTIONS: dict[str, Section] = {
    "decode": decode,
    "identical": identical,
    "attention": attention,
    "adapters": adapters,
    "kernel": kernel,
    "encoder": encoder,
    "first_token": first_token,
    "structured": structured,
}

AIMS: tuple[tuple[str, str, Callable[[dict[str, Any]], Any], Callable[[Any], bool]], ...] = (
    # What, the aim, where it is in the report, and whether it is met.
    ("decode at 32, of stock", "≥ 1.6 ×", lambda r: r["decode"]["32"]["ours_over_stock_per_cpu_s"],
     lambda v: v >= 1.6),
    ("decode at 64, of stock", "≥ 2 ×", lambda r: r["decode"]["64"]["ours_over_stock_per_cpu_s"],
     lambda v: v >= 2),
    ("decode at 32, of static", "≥ 1.3 ×",
     lambda r: r["decode"]["32"]["ours_over_static_per_cpu_s"], lambda v: v >= 1.3),
    ("float32 tokens equal stock's", "all", lambda r: r["fp32_identical"], lambda v: v is True),
    ("attention at 64, of that at 32", "≤ 2.2 ×", lambda r: r["attention_growth_32_64"],
     lambda v: v <= 2.2),
    ("8 adapters, of the time of one", "≤ 1.15 ×",
     lambda r: r["adapters"]["relative_cpu_time"]["8"], lambda v: v <= 1.15),
    ("64 adapters, of the time of one", "≤ 1.3 ×",
     lambda r: r["adapters"]["relative_cpu_time"]["64"], lambda v: v <= 1.3),
    ("mixed adapters, of peft's throughput", "≥ 2 ×",
     lambda r: r["adapters"]["peft_relative_throughput_cpu"], lambda v: v >= 2),
    ("tokens of a wrong adapter", "0", lambda r: r["adapters"]["wrong_tokens"],
     lambda v: v == 0),
    ("through the kernel, of the bare engine", "≥ 0.95 ×",
     lambda r: r["kernel_relative_throughput"], lambda v: v >= 0.95),
)  # fmt: skip


def conditions(args: argparse.Namespace) -> dict[str, Any]:
    """What has to be known to read the figures."""
    cpu = "unknown"
    if Path("/proc/cpuinfo").is_file():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((x.partition(":")[2].strip() for x in lines if x.startswith("model name")), cpu)
    return {
        "model": args.model.name,
        "dtype": args.dtype,
        "threads": 1,
        "pairs": args.pairs,
        "new_tokens": args.new_tokens,
        "quick": args.quick,
        "began": datetime.now(UTC).isoformat(timespec="seconds"),
        "load_average_before": round(os.getloadavg()[0], 2),
        "cpu": cpu,
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": sys.version.split()[0],
    }


def tables(report: dict[str, Any]) -> list[Table]:
    """For people: the aims, and the figures of each section."""
    made = []
    aims = Table("what", "aim", "measured", "", title="Aims (by CPU-seconds, but for the kernel)")
    for what, aim, find, met in AIMS:
        try:
            value = find(report)
        except KeyError:
            continue
        aims.add_row(what, aim, str(value), "met" if met(value) else "[bold]missed[/bold]")
    if aims.row_count:
        made.append(aims)
    if "decode" in report:
        rates = Table(title="Decoded tokens per second (per CPU-second)")
        for column in ("sequences", "ours", "stock", "static", "ours/stock", "ours/static"):
            rates.add_column(column, justify="right")
        for batch, row in report["decode"].items():
            rates.add_row(
                batch,
                *(f"{row[n]} ({row['per_cpu_s'][n]})" for n in ("ours", "stock", "static")),
                *(f"{row[f'ours_over_{n}_per_cpu_s']:.2f} ×" for n in ("stock", "static")),
            )
        made.append(rates)
    rest = Table("section", "figure", title="The rest", show_header=False)
    for key in ("fp32", "attention", "adapters", "kernel", "encoder_texts_per_s",
                "first_token_ms", "structured_output"):  # fmt: skip
        for name, value in report.get(key, {}).items():
            rest.add_row(f"{key}.{name}", str(value))
    if rest.row_count:
        made.append(rest)
    return made


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    about = __doc__.splitlines()[0] if __doc__ else ""
    parser = argparse.ArgumentParser(prog="benchmarks.engine", description=about)
    parser.add_argument("--json", action="store_true", help="one JSON object on the last line")
    parser.add_argument("--only", default="", help=f"of {','.join(SECTIONS)}; default: all")
    parser.add_argument("--pairs", type=int, help="rounds; default 5, with --quick 1")
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that it runs")
    parser.add_argument("--model", type=Path, help=f"folder; default: {MODEL} of the model store")
    parser.add_argument("--encoder", type=Path, help=f"folder; default: {ENCODER}")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--batches", type=int, nargs="+", help="sequences (decode); 8 32 64")
    parser.add_argument("--new-tokens", type=int, help="of each answer (decode); default 48")
    args = parser.parse_args(arguments)
    args.sections = [s for s in args.only.split(",") if s] or list(SECTIONS)
    if unknown := set(args.sections) - set(SECTIONS):
        parser.error(f"no section {', '.join(sorted(unknown))}; there are {', '.join(SECTIONS)}")
    if "kernel" in args.sections and args.model is not None:
        parser.error("the kernel takes its models from the store: leave out --model or kernel")
    args.pairs = args.pairs or (1 if args.quick else 5)
    args.batches = args.batches or ([4] if args.quick else [8, 32, 64])
    args.new_tokens = args.new_tokens or (6 if args.quick else 48)
    if args.new_tokens < 4:
        parser.error("--new-tokens must be 4 at least")
    if args.model is None or args.encoder is None:
        # Here, so that with both folders given neither store nor kernel is needed.
        from llmos.drivers.models.store import ModelStore
        from llmos.kernel.settings import Settings

        store = ModelStore(Settings().models_dir)
        if args.model is None:
            args.model = store.pull(MODEL).path
        if args.encoder is None and "encoder" in args.sections:
            args.encoder = store.pull(ENCODER).path
    return args


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point."""
    args = _arguments(arguments)
    torch.set_num_threads(1)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    transformers.utils.logging.disable_progress_bar()
    report: dict[str, Any] = {}
    about = conditions(args)
    for name in args.sections:
        tell(f"section {name}")
        report |= SECTIONS[name](args)
    report["conditions"] = about
    for table in tables(report):
        Console(width=140).print(table)
    if args.json:
        print(json.dumps(report))


if __name__ == "__main__":
    main()
