"""Many adapters in one batch: what they cost, peft's mixed batch beside it, and whose tokens come."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from benchmarks.engine_decode import first_difference
from benchmarks.engine_rig import (
    Dtype,
    Ours,
    Prompt,
    Static,
    Took,
    alternate,
    kv_tokens,
    load_model,
    load_tokenizer,
    make_prompts,
    median_ratio,
    options,
    spread,
    took,
)

RANK, ALPHA = 8, 8
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")
STRENGTH = 0.15
"""Standard deviation of B's numbers: answers differ between adapters and are still made of words."""
SHORTEST, LONGEST = 8, 40
"""Tokens of the prompts."""


def make_adapters(model: Any, folder: Path, count: int) -> dict[str, Path]:
    """Random adapters as peft saves them, all different, by name.

    Written without peft, so that a machine without it can measure ours, and read by peft
    where it is installed.
    """
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name.rpartition(".")[2] in TARGETS
    }
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": RANK,
        "lora_alpha": ALPHA,
        "target_modules": list(TARGETS),
        "bias": "none",
        "inference_mode": True,
    }
    paths = {}
    for i in range(count):
        chance = torch.Generator().manual_seed(i)
        tensors = {}
        for name, layer in layers.items():
            a = torch.randn(RANK, layer.in_features, generator=chance) * layer.in_features**-0.5
            b = torch.randn(layer.out_features, RANK, generator=chance) * STRENGTH
            tensors[f"base_model.model.{name}.lora_A.weight"] = a
            tensors[f"base_model.model.{name}.lora_B.weight"] = b
        path = paths[f"a{i}"] = folder / f"a{i}"
        path.mkdir()
        (path / "adapter_config.json").write_text(json.dumps(config))
        save_file(tensors, path / "adapter_model.safetensors")
    return paths


def with_peft(model: Any, paths: dict[str, Path]) -> Any:
    """peft around the model, all adapters loaded, in the model's number format."""
    from peft import PeftModel

    wrapped: Any = None
    for name, path in paths.items():
        if wrapped is None:
            # Kept in float32 by default, which in a bfloat16 model is slower.
            wrapped = PeftModel.from_pretrained(
                model, path, adapter_name=name, autocast_adapter_dtype=False
            )
        else:
            wrapped.load_adapter(path, adapter_name=name, autocast_adapter_dtype=False)
    return wrapped.eval()


def measure_adapters(
    path: Path,
    folder: Path,
    dtype: Dtype,
    pairs: int,
    *,
    batch: int = 64,
    numbers: Sequence[int] = (1, 8, 64),
    new_tokens: int = 24,
    checked: int = 16,
    device: str = "cpu",
    tell: Callable[[str], object] = print,
) -> dict[str, Any]:
    """Time of one batch by how many adapters are in it, relative to one; peft; wrong tokens.

    Args:
        path: the base model.
        folder: where adapters may be written.
        dtype: for the times; tokens are compared in float32.
        pairs: rounds.
        batch: requests.
        numbers: of distinct adapters among them; the first is what others are relative to.
        new_tokens: of each request.
        checked: requests of the most mixed batch whose tokens are compared.
        device: for torch.
        tell: is told how far it is.
    """
    tokenizer = load_tokenizer(path)
    model = load_model(path, dtype, device)
    prompts = make_prompts(tokenizer, spread(batch, SHORTEST, LONGEST))
    paths = make_adapters(model, folder, max(numbers))
    texts, kv = [p.text for p in prompts], kv_tokens(prompts, new_tokens)
    names = {n: [f"a{i % n}" for i in range(batch)] for n in numbers}
    mixed = [n for n in numbers if n > 1]
    has_peft = find_spec("peft") is not None
    works: dict[str, Callable[[int], object]] = {}
    with Ours(options(path, dtype, kv, device, **_room(paths))) as ours:
        for name, at in paths.items():
            ours.engine.load_adapter(name, at)
        works["none"] = partial(ours.run, texts)
        for n in numbers:
            works[str(n)] = partial(ours.run, texts, adapters=names[n])
        if has_peft:
            static = Static(with_peft(model, paths), tokenizer.pad_token_id)
            for n in mixed:
                works[f"peft {n}"] = partial(static.run, prompts, adapter_names=names[n])
        for work in works.values():
            work(2)
        rounds = alternate(
            pairs,
            {name: partial(took, partial(work, new_tokens)) for name, work in works.items()},
        )
    out = _relative(rounds, numbers, mixed if has_peft else [])
    tell(f"adapters: {out}")
    if has_peft:
        out |= _wrong_tokens(path, prompts, paths, new_tokens, checked, device)
    return out


def _room(paths: dict[str, Path]) -> dict[str, int]:
    return {"max_adapters": len(paths), "max_adapter_rank": RANK}


def _relative(
    rounds: dict[str, list[Took]], numbers: Sequence[int], mixed: Sequence[int]
) -> dict[str, Any]:
    kinds: dict[str, Callable[[Took], float]] = {
        "": lambda t: t.wall_s,
        "_cpu": lambda t: t.cpu_s,
    }
    out: dict[str, Any] = {}
    for kind, of in kinds.items():
        one = [of(t) for t in rounds[str(numbers[0])]]
        relative = {
            str(n): round(median_ratio(map(of, rounds[str(n)]), one), 3) for n in numbers
        } | {"none": round(median_ratio(map(of, rounds["none"]), one), 3)}
        if kind:
            out["relative_cpu_time"] = relative
        else:
            out |= relative
        if mixed:
            peft = {
                str(n): round(
                    median_ratio(map(of, rounds[f"peft {n}"]), map(of, rounds[str(n)])), 3
                )
                for n in mixed
            }
            # The least favourable of the mixes.
            out[f"peft_relative_throughput{kind}"] = min(peft.values())
            out[f"peft_relative_throughput_by_number{kind}"] = peft
    out["cpu_s"] = {n: round(statistics.median(t.cpu_s for t in r), 2) for n, r in rounds.items()}
    return out


def _wrong_tokens(
    path: Path,
    prompts: Sequence[Prompt],
    paths: dict[str, Path],
    new_tokens: int,
    checked: int,
    device: str,
) -> dict[str, Any]:
    """Float32 tokens of a batch in which everybody has another adapter, compared with peft's
    answer to the same prompt with that adapter alone. Tokens after a wrong one are wrong too."""
    tokenizer = load_tokenizer(path)
    kv = kv_tokens(prompts, new_tokens)
    names = [f"a{i % len(paths)}" for i in range(len(prompts))]
    with Ours(options(path, "float32", kv, device, **_room(paths))) as ours:
        for name, at in paths.items():
            ours.engine.load_adapter(name, at)
        texts = [p.text for p in prompts]
        got = [a.text for a in ours.run(texts, new_tokens, adapters=names)]
        plain = [a.text for a in ours.run(texts, new_tokens)]
    peft = with_peft(load_model(path, "float32", device), paths)
    static = Static(peft, tokenizer.pad_token_id)
    wrong = compared = rounded = 0
    for i in range(0, len(prompts), max(1, len(prompts) // checked)):
        peft.set_adapter(names[i])
        (expected,) = static.run([prompts[i]], new_tokens)
        compared += 1
        found = first_difference(peft, tokenizer, prompts[i], got[i], expected.ids)
        if found is not None and found.by_rounding:
            rounded += 1
        elif found is not None:
            wrong += new_tokens - found.at_token
    return {
        "wrong_tokens": wrong,
        "checked_requests": compared,
        "differ_by_rounding": rounded,
        # If this were small, equal tokens would say little.
        "answers_changed_by_adapters": sum(a != b for a, b in zip(got, plain, strict=True)),
    }
