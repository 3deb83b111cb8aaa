"""Small random models with a classification head and a tokenizer of letters, made here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

LABELS = ("billing", "delivery", "other")


def make_classifier(folder: Path, model_type: str = "bert", **changes: Any) -> Path:
    """A folder of a random ``bert``, ``roberta`` or ``distilbert`` with a head of three classes."""
    import torch
    from transformers import (
        AutoConfig,
        AutoModelForSequenceClassification,
        BertTokenizer,
    )

    folder.mkdir(parents=True, exist_ok=True)
    letters = "abcdefghijklmnopqrstuvwxyz"
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters]
    vocabulary += [f"##{c}" for c in letters]
    (folder / "vocab.txt").write_text("\n".join(vocabulary))
    BertTokenizer(str(folder / "vocab.txt"), model_max_length=64).save_pretrained(folder)
    sizes: dict[str, Any] = {
        "vocab_size": len(vocabulary),
        "hidden_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "intermediate_size": 96,
        "max_position_embeddings": 70,
        "pad_token_id": 0,
        "id2label": dict(enumerate(LABELS)),
        "label2id": {label: i for i, label in enumerate(LABELS)},
    }
    if model_type == "distilbert":
        sizes |= {"dim": 64, "hidden_dim": 96, "n_heads": 4, "n_layers": 3}
    torch.manual_seed(0)
    # Wide enough for probabilities that differ between texts.
    config = AutoConfig.for_model(model_type, **(sizes | {"initializer_range": 0.15} | changes))
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    return folder


def without_head(folder: Path) -> Path:
    """Take the head's weights out of the files, and leave its name in the configuration."""
    from safetensors.torch import load_file, save_file

    file = folder / "model.safetensors"
    kept = {k: v for k, v in load_file(file).items() if not k.startswith("classifier")}
    save_file(kept, file, metadata={"format": "pt"})
    assert (
        "ForSequenceClassification"
        in json.loads((folder / "config.json").read_text())["architectures"][0]
    )
    return folder
