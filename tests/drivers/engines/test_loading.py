"""Models of two number formats that are loaded at the same time keep their own."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

from llmos.drivers.engines.loading import loading


def _save(folder: Path) -> tuple[Path, Path]:
    bert = BertModel(
        BertConfig(
            hidden_size=32, num_hidden_layers=24, num_attention_heads=2, intermediate_size=64
        )
    )
    llama = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=32, num_hidden_layers=24, num_attention_heads=2, intermediate_size=64
        )
    )
    bert.save_pretrained(folder / "bert")
    llama.save_pretrained(folder / "llama")
    return folder / "bert", folder / "llama"


def test_loading_at_once_keeps_the_formats_apart(tmp_path: Path) -> None:
    bert, llama = _save(tmp_path)

    def load(number: int) -> set[torch.dtype]:
        with loading():
            if number % 2:
                model = BertModel.from_pretrained(bert, dtype=torch.float32)
            else:
                model = LlamaForCausalLM.from_pretrained(llama, dtype=torch.bfloat16)
        return {p.dtype for p in model.parameters()}

    with ThreadPoolExecutor(4) as pool:
        formats = list(pool.map(load, range(12)))
    assert formats == [{torch.bfloat16}, {torch.float32}] * 6
    assert torch.get_default_dtype() is torch.float32
