"""Check and measure the engines on a CUDA GPU, with torch and transformers alone.

    python -m benchmarks.gpu [--json] [--model FOLDER] [--encoder FOLDER] [--batches 8,32,64]
        [--only tokens,memory,decode,…] [--pairs 3] [--dtype bfloat16] [--device cuda:0]

The sections of :mod:`benchmarks.engine` but for the kernel, which needs Ray, and two more:
*tokens*, float32 tokens beside ``generate`` of one prompt at a time, and *memory*, the peak of
torch's allocator beside what the ledger would have granted. peft, sentence-transformers and
llguidance are used where they are installed, and their figures left out where they are not.
Without ``--model`` and ``--encoder`` small random models are made first, so that it runs on a
bare machine. ``--device cpu`` runs the same, without memory, to see that it works.
Exit code 3: no CUDA; 1: a check failed.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers

from benchmarks.engine_adapters import measure_adapters
from benchmarks.engine_attention import measure_attention
from benchmarks.engine_decode import check_identical, first_difference, measure_decode
from benchmarks.engine_encoder import measure_encoder
from benchmarks.engine_latency import measure_first_token
from benchmarks.engine_rig import (
    Ours,
    Static,
    kv_tokens,
    load_model,
    load_tokenizer,
    make_prompts,
    options,
    spread,
)
from benchmarks.engine_structured import measure_structured
from llmos.drivers.models.footprint import predict_footprint

NO_CUDA = 3
MIB = 2**20


@dataclass
class Report:
    """What the check of tokens found."""

    device: str
    model: str
    dtype: str
    new_tokens: int
    equal_fp32: int = 0
    """Prompts whose float32 tokens are those of static generate, or differ by rounding alone."""
    compared_fp32: int = 0


# ---------------------------------------------------------------- models


def _ascii_tokenizer(folder: Path) -> int:
    """Save a tokenizer whose tokens are the printable characters of ASCII, so that equal texts
    are equal tokens; returns how many there are."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = [*map(chr, range(0x21, 0x7F)), "\u0120"]  # The last stands for the space.
    vocabulary = {"<end>": 0} | {c: i + 1 for i, c in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>"
    ).save_pretrained(folder)
    return len(vocabulary)


def make_model(folder: Path, *, hidden: int = 576, layers: int = 12) -> Path:
    """Save a small random Llama."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=_ascii_tokenizer(folder),
        hidden_size=hidden,
        intermediate_size=8 * hidden // 3,
        num_hidden_layers=layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=4096,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
        tie_word_embeddings=True,
        # Wide enough for distinct logits: ties would make equal tokens a matter of luck.
        initializer_range=0.08 if hidden > 256 else 0.25,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def make_encoder(folder: Path, *, hidden: int = 384, layers: int = 6) -> Path:
    """Save a small random BERT."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=_ascii_tokenizer(folder),
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=12,
        pad_token_id=0,
    )
    BertModel(config).save_pretrained(folder)
    return folder


# ---------------------------------------------------------------- sections


def check_tokens(report: Report, path: Path, device: str, new_tokens: int) -> None:
    """Compare float32 answers to prompts in one batch with static generate, one at a time."""
    tokenizer, model = load_tokenizer(path), load_model(path, "float32", device)
    prompts = make_prompts(tokenizer, spread(8, 4, 90))
    kv = kv_tokens(prompts, new_tokens)
    with Ours(options(path, "float32", kv, device)) as ours:
        answers = ours.run([p.text for p in prompts], new_tokens)
    static = Static(model, tokenizer.pad_token_id)
    report.compared_fp32 = len(prompts)
    for prompt, answer in zip(prompts, answers, strict=True):
        (expected,) = static.run([prompt], new_tokens)
        found = first_difference(model, tokenizer, prompt, answer.text, expected.ids)
        report.equal_fp32 += found is None or found.by_rounding


def tokens(args: argparse.Namespace) -> dict[str, Any]:
    """Whether tokens are right."""
    report = Report(args.device, args.model.name, "float32", args.new_tokens)
    check_tokens(report, args.model, args.device, min(32, args.new_tokens))
    return {
        "static_equal": {"equal": report.equal_fp32, "compared": report.compared_fp32},
    }


def memory(args: argparse.Namespace) -> dict[str, Any]:
    """Peak over a full batch, beside what was there before, and the ledger's figure."""
    prompts = make_prompts(load_tokenizer(args.model), spread(max(args.batches), 16, 160))
    room = options(args.model, args.dtype, kv_tokens(prompts, args.new_tokens), args.device)
    predicted = predict_footprint(
        args.model,
        kind="causal",
        dtype=args.dtype,
        kv_tokens=room.kv_tokens,
        max_batch_tokens=room.max_batch_tokens,
        max_batch_texts=room.max_batch_texts,
        device="cuda" if args.device.startswith("cuda") else "cpu",
    )
    found: dict[str, Any] = {"predicted_bytes": predicted.total_bytes}
    if not args.device.startswith("cuda"):
        return {"memory": found}
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated(args.device)
    torch.cuda.reset_peak_memory_stats(args.device)
    with Ours(room) as ours:
        ours.run([p.text for p in prompts], args.new_tokens)
        found["peak_bytes"] = torch.cuda.max_memory_allocated(args.device) - before
    found["peak_over_predicted"] = round(found["peak_bytes"] / predicted.total_bytes, 3)
    return {"memory": found}


def decode(args: argparse.Namespace) -> dict[str, Any]:
    """Tokens per second of three ways."""
    found = measure_decode(
        args.model, args.dtype, args.batches, args.new_tokens, args.pairs, args.device, tell
    )
    return {"decode": found}


def identical(args: argparse.Namespace) -> dict[str, Any]:
    """Whether tokens are the library's own batching's."""
    count, new_tokens = (8, 8) if args.quick else (64, 32)
    found = check_identical(args.model, count, new_tokens, args.device)
    return {"fp32_identical": found.pop("identical"), "fp32": found}


def attention(args: argparse.Namespace) -> dict[str, Any]:
    """Growth of attention's part of a step."""
    batches = (4, 8) if args.quick else (32, 64)
    found = measure_attention(args.model, args.dtype, args.pairs, args.device, batches)
    return {"attention_growth_32_64": found["growth"], "attention": found}


def adapters(args: argparse.Namespace) -> dict[str, Any]:
    """Many adapters in one batch."""
    sizes: dict[str, Any] = {}
    if args.quick:
        sizes = {"batch": 8, "numbers": (1, 4), "checked": 4, "new_tokens": 8}
    with tempfile.TemporaryDirectory() as folder:
        found = measure_adapters(
            args.model,
            Path(folder),
            args.dtype,
            args.pairs,
            **sizes,
            device=args.device,
            tell=tell,
        )
    return {"adapters": found}


def encoder(args: argparse.Namespace) -> dict[str, Any]:
    """Texts per second."""
    sizes: dict[str, Any] = {"texts": 16, "alone": 8} if args.quick else {}
    found = measure_encoder(
        args.encoder, args.pairs, **sizes, device=args.device, int8=False, tell=tell
    )
    return {"encoder_texts_per_s": found}


def first_token(args: argparse.Namespace) -> dict[str, Any]:
    """Latency under a mixed load."""
    sizes: dict[str, Any] = {"longs": 1, "long_tokens": 300} if args.quick else {}
    found = measure_first_token(
        args.model, args.dtype, args.pairs, **sizes, device=args.device, tell=tell
    )
    return {"first_token_ms": found}


def structured(args: argparse.Namespace) -> dict[str, Any]:
    """With a schema on every row."""
    if find_spec("llguidance") is None:
        return {}
    sizes: dict[str, Any] = {"batch": 4, "new_tokens": 8} if args.quick else {}
    found = measure_structured(
        args.model, args.dtype, args.pairs, **sizes, device=args.device, tell=tell
    )
    return {"structured_output": found}


SECTIONS: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "tokens": tokens,
    "memory": memory,
    "decode": decode,
    "identical": identical,
    "attention": attention,
    "adapters": adapters,
    "encoder": encoder,
    "first_token": first_token,
    "structured": structured,
}


def tell(line: str) -> None:
    """How far it is."""
    print(line, file=sys.stderr, flush=True)


# ---------------------------------------------------------------- report


def failures(report: dict[str, Any]) -> list[str]:
    """The checks that failed, of the sections that ran."""
    found = []
    equal = report.get("static_equal")
    if equal and equal["equal"] != equal["compared"]:
        found.append("float32 tokens differ from static generate by more than rounding")
    if not report.get("fp32", {}).get("equal_or_rounding", True):
        found.append("float32 tokens differ from the library's batching by more than rounding")
    if report.get("memory", {}).get("peak_over_predicted", 0) > 1:
        found.append("more memory was used than predicted")
    if report.get("adapters", {}).get("wrong_tokens", 0):
        found.append("tokens came from a wrong adapter")
    return found


def render(report: dict[str, Any]) -> str:
    """One table for people."""
    about = report["conditions"]
    lines = [f"{about['model']} on {about['product']}, {about['dtype']}, torch {about['torch']}"]
    rows: list[tuple[str, str]] = []
    for batch, row in report.get("decode", {}).items():
        rates = ", ".join(f"{n} {row[n]}" for n in ("ours", "stock", "static"))
        ratios = f"{row['ours_over_stock']} × stock, {row['ours_over_static']} × static"
        rows.append((f"decode at {batch}, tokens/s", f"{rates} ({ratios})"))
    if equal := report.get("static_equal"):
        rows.append(
            ("float32 tokens as static generate's", f"{equal['equal']} of {equal['compared']}")
        )
    if same := report.get("fp32"):
        rows.append(("float32 tokens as stock's", f"{same['equal']} of {same['compared']}"))
    if used := report.get("memory"):
        peak = f"{used['peak_bytes'] / MIB:.0f} MiB" if "peak_bytes" in used else "not measured"
        rows.append(("memory", f"predicted {used['predicted_bytes'] / MIB:.0f} MiB, peak {peak}"))
    for key in ("attention", "adapters", "encoder_texts_per_s", "first_token_ms",
                "structured_output"):  # fmt: skip
        rows += [(f"{key}.{name}", str(value)) for name, value in report.get(key, {}).items()]
    width = max((len(name) for name, _ in rows), default=0)
    lines += [f"  {name:<{width}}  {value}" for name, value in rows]
    lines += [f"FAILED: {reason}" for reason in report["failures"]] or ["passed"]
    return "\n".join(lines)


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    about = __doc__.splitlines()[0] if __doc__ else ""
    parser = argparse.ArgumentParser(prog="benchmarks.gpu", description=about)
    parser.add_argument("--json", action="store_true", help="one JSON object on the last line")
    parser.add_argument("--model", type=Path, help="folder of a causal model")
    parser.add_argument("--encoder", type=Path, help="folder of an encoder")
    parser.add_argument("--only", default="", help=f"of {','.join(SECTIONS)}; default: all")
    parser.add_argument("--batches", default="8,32,64", help="sequences (decode, memory)")
    parser.add_argument("--new-tokens", type=int, default=64, help="of each answer (decode)")
    parser.add_argument("--pairs", type=int, default=5, help="rounds")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--device", default="cuda:0", help="for torch; cpu to try it out")
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that it runs")
    args = parser.parse_args(arguments)
    args.sections = [s for s in args.only.split(",") if s] or list(SECTIONS)
    if unknown := set(args.sections) - set(SECTIONS):
        parser.error(f"no section {', '.join(sorted(unknown))}; there are {', '.join(SECTIONS)}")
    args.batches = [int(b) for b in args.batches.split(",")]
    return args


def main(arguments: Sequence[str] | None = None) -> int:
    """Run; returns the exit code."""
    args = _arguments(arguments)
    cuda = args.device.startswith("cuda")
    if cuda and not torch.cuda.is_available():
        print(
            "No CUDA GPU is visible to this process (or torch was built without CUDA): "
            "nothing was checked.",
            file=sys.stderr,
        )
        return NO_CUDA
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        small: dict[str, Any] = {"layers": 2} if args.quick else {}
        if args.model is None:
            hidden = {"hidden": 72} if args.quick else {}
            args.model = make_model(Path(folder) / "random-llama", **small, **hidden)
        if args.encoder is None and "encoder" in args.sections:
            args.encoder = make_encoder(Path(folder) / "random-bert", **small)
        report: dict[str, Any] = {}
        for name in args.sections:
            tell(f"section {name}")
            report |= SECTIONS[name](args)
    report["failures"] = failures(report)
    report["passed"] = not report["failures"]
    report["conditions"] = {
        "product": torch.cuda.get_device_name(args.device) if cuda else "the CPU",
        "device": args.device,
        "model": args.model.name,
        "dtype": args.dtype,
        "new_tokens": args.new_tokens,
        "pairs": args.pairs,
        "quick": args.quick,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    print(render(report))
    if args.json:
        print(json.dumps(report))
    return 0 if report["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
