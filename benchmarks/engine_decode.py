"""Tokens per second of our engine beside the library's two ways, and whether they are the same."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.engine_rig import (
    Answer,
    Dtype,
    Ours,
    Prompt,
    Static,
    Stock,
    Tokens,
    Took,
    alternate,
    decode_rates,
    kv_tokens,
    load_model,
    load_tokenizer,
    make_prompts,
    median_ratio,
    options,
    spread,
    timed,
)

SHORTEST, LONGEST = 16, 160
"""Tokens of the prompts whose answers are timed."""
WAYS = ("ours", "stock", "static")


@dataclass(frozen=True, slots=True)
class Round:
    """One way, one round."""

    whole: Took
    """From handing in the prompts to the last token of all."""
    per_s: float
    """Tokens per second while all sequences decode; see :func:`decode_rates`."""
    per_cpu_s: float


def measure_decode(
    path: Path,
    dtype: Dtype,
    batches: Sequence[int],
    new_tokens: int,
    pairs: int,
    device: str = "cpu",
    tell: Callable[[str], object] = print,
) -> dict[str, Any]:
    """By batch: decode tokens/s and per CPU-second of the three ways, ratios, whole runs."""
    tokenizer = load_tokenizer(path)
    model = load_model(path, dtype, device)
    static = Static(model, tokenizer.pad_token_id)
    out: dict[str, Any] = {}
    for batch in batches:
        prompts = make_prompts(tokenizer, spread(batch, SHORTEST, LONGEST))
        kv = kv_tokens(prompts, new_tokens)
        with (
            Ours(options(path, dtype, kv, device)) as ours,
            Stock(model, kv, batch) as stock,
        ):
            works: dict[str, Callable[[int], Sequence[Tokens | Answer]]] = {
                "ours": partial(ours.run, [p.text for p in prompts]),
                "stock": partial(stock.run, prompts),
                "static": partial(static.run, prompts),
            }
            for work in works.values():
                work(2)
            ways = {name: partial(_round, work, new_tokens) for name, work in works.items()}
            rounds = alternate(pairs, ways)
        out[str(batch)] = _row(rounds, batch * new_tokens)
        tell(f"decode at {batch}: {out[str(batch)]}")
    return out


def _round(work: Callable[[int], Sequence[Tokens | Answer]], new_tokens: int) -> Round:
    answers, took = timed(lambda: work(new_tokens))
    return Round(took, *decode_rates([a.stamps for a in answers]))


def _row(rounds: dict[str, list[Round]], tokens: int) -> dict[str, Any]:
    def medians(of: Callable[[Round], float]) -> dict[str, float]:
        return {n: round(statistics.median(map(of, rounds[n])), 1) for n in WAYS}

    row: dict[str, Any] = medians(lambda r: r.per_s)
    row["per_cpu_s"] = medians(lambda r: r.per_cpu_s)
    row["whole_run"] = medians(lambda r: tokens / r.whole.wall_s)
    row["whole_run_per_cpu_s"] = medians(lambda r: tokens / r.whole.cpu_s)
    kinds: dict[str, Callable[[Round], float]] = {
        "": lambda r: r.per_s,
        "_per_cpu_s": lambda r: r.per_cpu_s,
        "_whole_run_per_cpu_s": lambda r: tokens / r.whole.cpu_s,
    }
    for peer in ("stock", "static"):
        for kind, of in kinds.items():
            ratio = median_ratio(map(of, rounds["ours"]), map(of, rounds[peer]))
            row[f"ours_over_{peer}{kind}"] = round(ratio, 3)
    return row


# ---------------------------------------------------------------- the same tokens

IDENTICAL_SHORTEST, IDENTICAL_LONGEST = 3, 400


def check_identical(
    path: Path, count: int = 64, new_tokens: int = 32, device: str = "cpu"
) -> dict[str, Any]:
    """Greedy float32 tokens of ours and of stock; bfloat16 would differ by rounding alone.

    Our engine tells text and the number of tokens, so these are compared with stock's
    tokens, decoded. For the first prompts that differ, the logits are told that the model
    gives the two likeliest tokens at that place: a small gap means rounding, a large one a
    wrong token.
    """
    tokenizer = load_tokenizer(path)
    model = load_model(path, "float32", device)
    prompts = make_prompts(tokenizer, spread(count, IDENTICAL_SHORTEST, IDENTICAL_LONGEST))
    kv = kv_tokens(prompts, new_tokens)
    with Stock(model, kv, count) as stock:
        expected = [t.ids for t in stock.run(prompts, new_tokens)]
    with Ours(options(path, "float32", kv, device)) as ours:
        got = [a.text for a in ours.run([p.text for p in prompts], new_tokens)]
    differences = [
        found
        for prompt, text, tokens in zip(prompts, got, expected, strict=True)
        if (found := first_difference(model, tokenizer, prompt, text, tokens)) is not None
    ]
    return {
        "identical": not differences,
        "equal": count - len(differences),
        "equal_or_rounding": all(d.by_rounding for d in differences),
        "compared": count,
        "new_tokens": new_tokens,
        "prompt_tokens": [min(len(p.ids) for p in prompts), max(len(p.ids) for p in prompts)],
        "first_differences": [asdict(d) for d in differences[:4]],
    }


ROUNDING = 1e-3
"""Logits nearer to each other than this may change places by rounding in float32."""


@dataclass(frozen=True, slots=True)
class Difference:
    """Where a text leaves the expected tokens."""

    prompt_tokens: int
    at_token: int
    likeliest: tuple[str, ...]
    """The two likeliest tokens at that place."""
    logit_gap: float
    """Between the two."""

    @property
    def by_rounding(self) -> bool:
        """Whether the two could change places."""
        return self.logit_gap < ROUNDING


def decoded(tokenizer: Any, tokens: Sequence[int]) -> str:
    """The text that our engine hands out for these tokens."""
    # Half a character at the end is never handed out.
    return str(tokenizer.decode(tokens, skip_special_tokens=True)).rstrip("\ufffd")


def first_difference(
    model: Any, tokenizer: Any, prompt: Prompt, text: str, tokens: Sequence[int]
) -> Difference | None:
    """Compare our text with the expected tokens of ``model`` in float32; None: they are equal."""
    if text == decoded(tokenizer, tokens):
        return None
    at = 0
    while at + 1 < len(tokens) and text.startswith(decoded(tokenizer, tokens[: at + 1])):
        at += 1
    ids = torch.tensor([[*prompt.ids, *tokens[:at]]], device=model.device)
    with torch.inference_mode():
        best = model(ids, logits_to_keep=1).logits[0, -1].float().topk(2)
    return Difference(
        len(prompt.ids),
        at,
        tuple(tokenizer.convert_ids_to_tokens(best.indices.tolist())),
        float(best.values[0] - best.values[1]),
    )
