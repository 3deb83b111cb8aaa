"""What narrow weights cost and bring: bytes, tokens per second, and perplexity.

    python -m benchmarks.perplexity [--model FOLDER] [--json]

The text is ``benchmarks/data/procedures.txt``, written for this project, so that no model
has seen it. Every way of keeping the weights is measured in turn (A, B, C, A, B, C, …) on
one thread; tokens are counted per CPU-second while all sequences decode, since a busy
neighbour changes wall time most.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.engine_rig import (
    Dtype,
    Ours,
    Prompt,
    alternate,
    decode_rates,
    kv_tokens,
    make_prompts,
    options,
    spread,
)
from llmos.drivers.engines.packing import pack_linears
from llmos.drivers.engines.quantize import quantize
from llmos.drivers.models.footprint import predict_footprint

TEXT = Path(__file__).parent / "data" / "procedures.txt"
WINDOW = 512
"""Tokens that are read together; each window begins without what came before."""
Weights = Literal["plain", "int8", "int4"]
WAYS: tuple[tuple[Weights, Dtype], ...] = (
    ("plain", "bfloat16"),
    ("plain", "float32"),
    ("int8", "bfloat16"),
    ("int8", "float32"),
    ("int4", "bfloat16"),
)
BATCHES = (1, 32)


def perplexity(model_path: Path, text: str, weights: Weights, dtype: Dtype) -> float:
    """Of the tokens of a text, all but the first of each window; lower is better.

    Computed with the layers that the engine would run on the CPU.
    """
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    model: Any = AutoModelForCausalLM.from_pretrained(model_path, dtype=getattr(torch, dtype))
    model = model.eval().requires_grad_(False)
    quantize(model, weights, model_path.name)
    pack_linears(model)
    ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"])
    loss, count = 0.0, 0
    with torch.inference_mode():
        for window in ids.split(WINDOW):
            if len(window) < 2:
                continue
            logits = model(window.unsqueeze(0), use_cache=False).logits[0, :-1].float()
            loss += float(torch.nn.functional.cross_entropy(logits, window[1:], reduction="sum"))
            count += len(window) - 1
    return math.exp(loss / count)


def _bytes(model_path: Path, weights: Weights, dtype: Dtype) -> int:
    return predict_footprint(
        model_path,
        kind="causal",
        dtype=dtype,
        weights=weights,
        kv_tokens=0,
        max_batch_tokens=1,
        max_batch_texts=1,
    ).weights_bytes


def _rate(ours: Ours, prompts: Sequence[Prompt], new_tokens: int) -> float:
    answers = ours.run([p.text for p in prompts], new_tokens)
    return decode_rates([a.stamps for a in answers])[1]


def measure(
    model_path: Path, *, pairs: int = 5, new_tokens: int = 48, text: str = ""
) -> list[dict[str, Any]]:
    """A row for each way: bytes, perplexity, tokens per CPU-second, and the quotients with
    plain bfloat16 round by round."""
    text = text or TEXT.read_text(encoding="utf-8")
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    prompts = {batch: make_prompts(tokenizer, spread(batch, 16, 64)) for batch in BATCHES}
    kv = max(kv_tokens(some, new_tokens) for some in prompts.values())
    rates: dict[int, dict[str, list[float]]] = {}
    with ExitStack() as loaded:
        engines = {
            f"{weights}/{dtype}": loaded.enter_context(
                Ours(options(model_path, dtype, kv, weights=weights))
            )
            for weights, dtype in WAYS
        }
        for ours in engines.values():
            # An engine measures its own steps at first, until somebody waits for it.
            ours.run([some.text for some in prompts[min(prompts)]], 2)
        for batch, some in prompts.items():
            ways = {key: partial(_rate, ours, some, new_tokens) for key, ours in engines.items()}
            rates[batch] = alternate(pairs, ways)
            print(f"batch {batch}: {rates[batch]}", file=sys.stderr, flush=True)
    rows = []
    for weights, dtype in WAYS:
        key = f"{weights}/{dtype}"
        row: dict[str, Any] = {
            "weights": weights,
            "dtype": dtype,
            "bytes": _bytes(model_path, weights, dtype),
            "perplexity": round(perplexity(model_path, text, weights, dtype), 3),
        }
        for batch, found in rates.items():
            row[f"tokens_per_cpu_s_{batch}"] = round(statistics.median(found[key]), 1)
            over = (a / b for a, b in zip(found[key], found["plain/bfloat16"], strict=True))
            row[f"over_plain_bfloat16_{batch}"] = round(statistics.median(over), 2)
        rows.append(row)
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.perplexity", description=__doc__)
    parser.add_argument("--model", type=Path, help="folder; default: SmolLM2 of the model store")
    parser.add_argument("--text", type=Path, default=TEXT)
    parser.add_argument("--pairs", type=int, default=5, help="rounds of each way")
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--json", action="store_true", help="the last line is one JSON object")
    chosen = parser.parse_args(arguments)
    if chosen.model is None:
        from llmos.kernel.settings import Settings

        chosen.model = Path(Settings().models_dir) / "smollm2-135m-instruct"
    if not (chosen.model / "config.json").is_file():
        print(f"{chosen.model} is no model; pull it with: llmos models pull", file=sys.stderr)
        return 2
    rows = measure(
        chosen.model,
        pairs=chosen.pairs,
        new_tokens=chosen.new_tokens,
        text=chosen.text.read_text(encoding="utf-8"),
    )
    heads = list(rows[0])
    table = [heads, *([str(row[head]) for head in heads] for row in rows)]
    widths = [max(len(line[i]) for line in table) for i in range(len(heads))]
    for line in table:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))
    if chosen.json:
        print(json.dumps({"model": chosen.model.name, "text": chosen.text.name, "ways": rows}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
