"""What it costs when every answer of the batch is bound by a JSON schema."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.engine_rig import (
    Answer,
    Dtype,
    Ours,
    Took,
    alternate,
    kv_tokens,
    load_tokenizer,
    make_prompts,
    median_ratio,
    options,
    spread,
    timed,
)
from llmos.drivers.protocols import Grammar

BATCH = 32
SCHEMA = {
    "type": "array",
    # More than fit into the answer, so that every row goes on to the last token.
    "minItems": 200,
    "items": {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 24},
            "kind": {"enum": ["ship", "crate", "letter", "fee"]},
            "amount": {"type": "integer"},
        },
        "required": ["name", "kind", "amount"],
        "additionalProperties": False,
    },
}


def measure_structured(
    path: Path,
    dtype: Dtype,
    pairs: int,
    *,
    batch: int = BATCH,
    new_tokens: int = 48,
    device: str = "cpu",
    tell: Callable[[str], object] = print,
) -> dict[str, Any]:
    """Tokens per CPU-second with a schema on every row, relative to the same batch without."""
    prompts = make_prompts(load_tokenizer(path), spread(batch, 16, 96))
    texts = [f"{p.text} The ledger as JSON:" for p in prompts]
    grammar = Grammar("json_schema", json.dumps(SCHEMA))
    kv = kv_tokens(prompts, new_tokens + 32)
    with Ours(options(path, dtype, kv, device)) as ours:

        def one(bound: Grammar | None) -> tuple[list[Answer], Took]:
            return timed(lambda: ours.run(texts, new_tokens, grammar=bound))

        one(grammar)
        one(None)
        rounds = alternate(pairs, {"bound": lambda: one(grammar), "free": lambda: one(None)})
    rates = {
        name: [sum(a.tokens for a in answers) / took.cpu_s for answers, took in found]
        for name, found in rounds.items()
    }
    out = {
        "relative_throughput": round(median_ratio(rates["bound"], rates["free"]), 3),
        "per_cpu_s": {n: round(statistics.median(r), 1) for n, r in rates.items()},
        "batch": batch,
        "example": rounds["bound"][0][0][0].text[:80],
    }
    tell(f"structured output: {out}")
    return out
