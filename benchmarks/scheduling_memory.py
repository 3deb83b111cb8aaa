"""How far the ledger's predictions are from what loaded engines say they keep.

For each shape of a model, in the formats that change what is kept: a tied output layer that is
packed costs its size once more, int8 a copy of a quarter. Small random models show the rules,
since in a large one the embedding may hide everything else.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from benchmarks.gpu import make_model
from llmos.drivers.engines.causal import TransformersCausalEngine
from llmos.drivers.engines.encoder import TransformersEncoderEngine
from llmos.drivers.models.footprint import predict_footprint
from llmos.drivers.protocols import EngineOptions
from llmos.kernel.core.slots import UNMEASURED, prediction_error

KV_TOKENS = 4096


@dataclass(frozen=True, slots=True)
class Case:
    """A model and how it is kept."""

    name: str
    path: Path
    kind: Literal["causal", "encoder"]
    dtype: Literal["float32", "bfloat16"]
    options: dict[str, Any] = field(default_factory=dict)
    """Of the engine and of the prediction alike."""


def random_llama(folder: Path, *, tied: bool) -> Path:
    """A Llama of some two million parameters, a tenth of them in the embedding."""
    from transformers import LlamaConfig, LlamaForCausalLM

    make_model(folder, hidden=216, layers=4)
    config = LlamaConfig.from_pretrained(folder)
    config.vocab_size, config.tie_word_embeddings = 1024, tied
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def cases(smollm2: Path | None, minilm: Path | None, folder: Path) -> Iterator[Case]:
    """Real models where they are at hand, and random ones that are made in ``folder``."""
    if smollm2 is not None:
        yield Case("smollm2 bfloat16", smollm2, "causal", "bfloat16")
        yield Case("smollm2 float32", smollm2, "causal", "float32")
        yield Case("smollm2 int8", smollm2, "causal", "bfloat16", {"weights": "int8"})
    if minilm is not None:
        yield Case("minilm float32", minilm, "encoder", "float32")
        yield Case("minilm int8", minilm, "encoder", "float32", {"weights": "int8"})
    for tied in (True, False):
        name = f"random {'tied' if tied else 'untied'}"
        path = random_llama(folder / name.replace(" ", "-"), tied=tied)
        for dtype in ("bfloat16", "float32"):
            yield Case(f"{name} {dtype}", path, "causal", dtype)
            adapters = {"max_adapters": 4, "max_adapter_rank": 16}
            yield Case(f"{name} {dtype} adapters", path, "causal", dtype, adapters)
            yield Case(f"{name} {dtype} int8", path, "causal", dtype, {"weights": "int8"})


def measure(case: Case) -> dict[str, Any]:
    """Predicted and measured bytes by purpose, and the error."""
    predicted = predict_footprint(
        case.path,
        kind=case.kind,
        dtype=case.dtype,
        kv_tokens=KV_TOKENS,
        max_batch_tokens=256,
        max_batch_texts=8,
        **case.options,
    ).by_purpose
    options = EngineOptions(
        case.name,
        case.path,
        dtype=case.dtype,
        kv_tokens=KV_TOKENS,
        max_batch_tokens=256,
        max_batch_texts=8,
        **case.options,
    )
    engine = (
        TransformersCausalEngine(options)
        if case.kind == "causal"
        else TransformersEncoderEngine(options)
    )
    try:
        measured = engine.memory_bytes()
    finally:
        engine.close()
    error = prediction_error(predicted, measured)
    assert error is not None
    return {
        "predicted": {p: n for p, n in predicted.items() if p not in UNMEASURED},
        "measured": measured,
        "error": error,
    }


def ledger(smollm2: Path | None, minilm: Path | None) -> dict[str, Any]:
    """The largest error of all, and each."""
    with tempfile.TemporaryDirectory() as folder:
        found = {c.name: measure(c) for c in cases(smollm2, minilm, Path(folder))}
    return {
        "ledger_prediction_error": max(row["error"] for row in found.values()),
        "ledger": found,
    }
