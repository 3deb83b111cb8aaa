"""Texts per second through the encoder: batched, one by one, and through sentence-transformers."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np
from transformers import AutoTokenizer

from benchmarks.engine_rig import Took, alternate, make_prompts, median_ratio, spread, took
from llmos.drivers.engines.encoder import TransformersEncoderEngine
from llmos.drivers.protocols import EngineOptions, Vectors

SHORTEST, LONGEST = 3, 200
"""Tokens of the texts."""
PEER_BATCH = 32
"""Texts of a batch of sentence-transformers: its own default."""


def _options(path: Path, device: str, weights: Literal["plain", "int8"]) -> EngineOptions:
    return EngineOptions(
        path.name, path, torch_device=device, threads=1, max_batch_texts=64, weights=weights
    )


def measure_encoder(
    path: Path,
    pairs: int,
    *,
    texts: int = 512,
    alone: int = 64,
    device: str = "cpu",
    int8: bool = True,
    tell: Callable[[str], object] = print,
) -> dict[str, Any]:
    """Texts per second and per CPU-second of each way, and whether their vectors agree.

    Args:
        path: the model.
        pairs: rounds.
        texts: how many, of mixed lengths.
        alone: how many of them go through the engine one by one; it does not depend on it.
        device: for torch.
        int8: also with weights in eight bits.
        tell: is told how far it is.
    """
    tokenizer = AutoTokenizer.from_pretrained(path)
    chosen = [p.text for p in make_prompts(tokenizer, spread(texts, SHORTEST, LONGEST))]
    few = chosen[:: max(1, texts // alone)]
    engines = {"ours": TransformersEncoderEngine(_options(path, device, "plain"))}
    if int8:
        engines["ours_int8"] = TransformersEncoderEngine(_options(path, device, "int8"))
    ours = engines["ours"]
    ways: dict[str, tuple[int, Callable[[], Vectors]]] = {
        name: (len(chosen), partial(engine.embed, chosen)) for name, engine in engines.items()
    }
    ways["one_at_a_time"] = len(few), lambda: np.concatenate([ours.embed([t]) for t in few])
    if find_spec("sentence_transformers") is not None and (path / "modules.json").is_file():
        from sentence_transformers import SentenceTransformer

        peer: Any = SentenceTransformer(str(path), device=device, local_files_only=True)
        ways["sentence_transformers"] = (
            len(chosen),
            lambda: peer.encode(chosen, batch_size=PEER_BATCH, normalize_embeddings=True),
        )
    try:
        rows = {name: embed() for name, (_, embed) in ways.items()}
        rounds = alternate(
            pairs,
            {name: partial(took, embed) for name, (_, embed) in ways.items()},
        )
    finally:
        for engine in engines.values():
            engine.close()
    out = _row(rounds, {name: count for name, (count, _) in ways.items()})
    base = rows["ours"]
    rows["one_at_a_time"] = _spread_out(rows["one_at_a_time"], base, max(1, texts // alone))
    out["least_cosine_with_ours"] = {
        name: round(float((row * base).sum(axis=1).min()), 6)
        for name, row in rows.items()
        if name != "ours"
    }
    out["texts"] = texts
    tell(f"encoder: {out}")
    return out


def _spread_out(few: Vectors, base: Vectors, every: int) -> Vectors:
    """Rows of some texts in their places among all; where there is none, ``base``'s."""
    rows = base.copy()
    rows[::every] = few
    return rows


def _row(rounds: dict[str, list[Took]], counts: dict[str, int]) -> dict[str, Any]:
    def medians(of: Callable[[Took], float]) -> dict[str, float]:
        return {
            n: round(statistics.median(counts[n] / of(t) for t in each), 1)
            for n, each in rounds.items()
        }

    out: dict[str, Any] = medians(lambda t: t.wall_s)
    out["per_cpu_s"] = medians(lambda t: t.cpu_s)
    out["ours_over"] = {
        n: round(
            median_ratio(
                (counts["ours"] / t.cpu_s for t in rounds["ours"]),
                (counts[n] / t.cpu_s for t in each),
            ),
            3,
        )
        for n, each in rounds.items()
        if n != "ours"
    }
    return out
