"""What may enter the store, and whether it makes a model. Reads headers only; no torch.

A file enters because it is on the list below, never because it is not on a list of
bad ones: a new kind of executable file is then refused without anyone knowing it.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

from llmos.drivers.errors import ModelUnusable, UnsafeModel

CONFIG_PATTERNS = (
    "config.json",
    "generation_config.json",
    "modules.json",
    "sentence_bert_config.json",
    "config_sentence_transformers.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "sentencepiece.bpe.model",
    "spiece.model",
    "LICENSE*",
    "NOTICE*",
    "1_Pooling/config.json",
)
"""Beside the weights; glob patterns relative to the model's folder."""
WEIGHT_PATTERNS = ("model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json")
PICKLE_SUFFIXES = frozenset({".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"})
INDEX = "model.safetensors.index.json"
MAX_HEADER_BYTES = 100_000_000
"""The limit of the safetensors format itself."""
MAX_JSON_BYTES = 256_000_000

_SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
Header = dict[str, dict[str, Any]]


def read_json(model: str, path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        ModelUnusable: missing, too large, not JSON or not an object.
    """
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise ModelUnusable(model, path.name, f"larger than {MAX_JSON_BYTES} bytes")
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise ModelUnusable(model, path.name, f"cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise ModelUnusable(model, path.name, f"is not JSON ({error})") from error
    if not isinstance(value, dict):
        raise ModelUnusable(model, path.name, "is not a JSON object")
    return value


def read_header(model: str, path: Path) -> Header:
    """Read the header of a safetensors file: tensor name → dtype, shape, data_offsets.

    Raises:
        UnsafeModel: the file is a pickle or a zip under a false name.
        ModelUnusable: not safetensors, or shorter than its header says.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(8)
        if head[:2] in (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"):
            raise UnsafeModel(model, f"{path.name} holds pickled weights under another name")
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
        if not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
            raise ModelUnusable(model, path.name, "is not a safetensors file")
        try:
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            ends = [int(t["data_offsets"][1]) for t in header.values()]
        except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
            raise ModelUnusable(model, path.name, "has a broken safetensors header") from error
    if not ends or 8 + length + max(ends) != size:
        raise ModelUnusable(model, path.name, "is shorter or longer than its header says")
    return dict(header)


def weight_files(model: str, folder: Path) -> list[Path]:
    """The safetensors files that transformers would load, shards in order.

    Raises:
        UnsafeModel: only pickled weights are there.
        ModelUnusable: no weights, or a shard is missing.
    """
    index = folder / INDEX
    single = folder / "model.safetensors"
    if single.is_file():
        return [single]
    if index.is_file():
        mapping = read_json(model, index).get("weight_map")
        shards = sorted({str(v) for v in mapping.values()}) if isinstance(mapping, dict) else []
        for shard in shards:
            # A name such as ../../x would be read from outside the folder.
            if not _SHARD.fullmatch(shard) or not (folder / shard).is_file():
                raise ModelUnusable(model, INDEX, f"names the shard {shard!r}, which is not there")
        if shards:
            return [folder / shard for shard in shards]
    pickled = sorted(p.name for p in folder.iterdir() if p.suffix in PICKLE_SUFFIXES)
    if pickled:
        raise UnsafeModel(model, f"it has pickled weights only ({', '.join(pickled[:3])})")
    raise ModelUnusable(model, "model.safetensors", "is missing")


def check_folder(model: str, folder: Path) -> Literal["causal", "encoder"]:
    """Check that a folder is a model that loads without running foreign code; returns its kind.

    Raises:
        UnsafeModel: pickled weights, or a configuration that names remote code.
        ModelUnusable: something is missing, broken or of a kind no engine runs.
    """
    config = read_json(model, folder / "config.json")
    for path in sorted(folder.glob("*.json")):
        if path.name in (INDEX, "tokenizer.json", "vocab.json", "modules.json"):
            continue
        if _names_code(read_json(model, path)):
            raise UnsafeModel(model, f"{path.name} names remote code (auto_map)")
    _check_modules(model, folder)
    for path in weight_files(model, folder):
        read_header(model, path)
    if not any((folder / name).is_file() for name in _VOCABULARIES):
        raise ModelUnusable(model, "tokenizer.json", "is missing, and so is every older form of it")
    return kind_of(model, folder, config)


_VOCABULARIES = (
    "tokenizer.json",
    "vocab.json",
    "vocab.txt",
    "tokenizer.model",
    "sentencepiece.bpe.model",
    "spiece.model",
)


def kind_of(model: str, folder: Path, config: dict[str, Any]) -> Literal["causal", "encoder"]:
    """Causal or encoder, from the configuration.

    Raises:
        ModelUnusable: neither (an encoder-decoder, for instance).
    """
    if (folder / "modules.json").is_file():
        # Sentence embedders may stand on a causal architecture; this file tells them apart.
        return "encoder"
    architectures = [str(a) for a in config.get("architectures") or []]
    if config.get("is_encoder_decoder"):
        raise ModelUnusable(model, "config.json", "is an encoder-decoder; no engine runs those")
    if any(a.endswith(("ForCausalLM", "LMHeadModel")) for a in architectures):
        return "causal"
    if any(a.endswith(_ENCODER_HEADS) for a in architectures):
        return "encoder"
    shown = ", ".join(architectures) or "no architecture"
    raise ModelUnusable(model, "config.json", f"names {shown}; no engine runs that")


_ENCODER_HEADS = ("Model", "ForMaskedLM", "ForPreTraining", "ForSequenceClassification")


def _check_modules(model: str, folder: Path) -> None:
    """Refuse sentence-transformers pipelines with classes of their own."""
    path = folder / "modules.json"
    if not path.is_file():
        return
    try:
        modules = json.loads(path.read_bytes())
        types = [str(m["type"]) for m in modules]
    except (ValueError, TypeError, KeyError) as error:
        raise ModelUnusable(model, path.name, "is not a list of modules") from error
    for name in types:
        if not name.startswith("sentence_transformers."):
            raise UnsafeModel(model, f"modules.json names the class {name!r}")
    odd = [t for t in types if t.rsplit(".", 1)[-1] not in ("Transformer", "Pooling", "Normalize")]
    if odd:
        raise ModelUnusable(model, path.name, f"has the module {odd[0]}, which no engine runs")


def _names_code(value: object) -> bool:
    if isinstance(value, dict):
        return any(k in ("auto_map", "custom_pipelines") and v for k, v in value.items()) or any(
            _names_code(v) for v in value.values()
        )
    if isinstance(value, list):
        return any(_names_code(v) for v in value)
    return False


def wanted(names: Iterable[str]) -> list[str]:
    """Of relative file names, those that may enter the store."""
    patterns = CONFIG_PATTERNS + WEIGHT_PATTERNS
    # A * of fnmatch crosses folders, hence the count of slashes.
    return sorted(
        n
        for n in names
        if any(fnmatchcase(n, p) and n.count("/") == p.count("/") for p in patterns)
    )
