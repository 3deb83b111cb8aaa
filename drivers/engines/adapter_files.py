"""Reading a LoRA adapter from a folder as peft saves it.

Two files are read, ``adapter_config.json`` and ``adapter_model.safetensors``. What the
folder says of its base model is not believed: every shape is checked against the model
that is loaded. What peft can do beyond plain LoRA is refused by name, since an adapter
that is applied in part answers wrongly without a sign.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as load_tensors

from llmos.drivers.errors import AdapterUnusable, ModelUnusable, UnsafeModel
from llmos.drivers.models import checks
from llmos.drivers.models.manifest import digest_of

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
MAX_CONFIG_BYTES = 1_000_000
MAX_PATTERN_CHARS = 1000
"""Of one regular expression; peft allows them in target_modules and in both patterns."""
HEADER_BYTES = 16_000_000
"""More than the header of an adapter's file takes."""
_PREFIX = "base_model.model."
_USED = frozenset(
    {
        "r",
        "lora_alpha",
        "use_rslora",
        "rank_pattern",
        "alpha_pattern",
        "target_modules",
        "exclude_modules",
        "layers_to_transform",
        "layers_pattern",
        "peft_type",
        "bias",
        "init_lora_weights",
    }
)
_WITHOUT_EFFECT = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "inference_mode",
        "loftq_config",
        "lora_dropout",
        "megatron_core",
        "peft_version",
        "qalora_group_size",
        "revision",
        "task_type",
    }
)
"""What says something about training or origin, and nothing about the answer. ``loftq_config``
acts through ``init_lora_weights`` alone, ``qalora_group_size`` through ``use_qalora``."""
_BASE_AS_IT_IS = (True, False, None, "gaussian", "eva", "orthogonal")
"""Values of ``init_lora_weights`` that leave the base model's own weights alone; PiSSA, OLoRA,
CorDA and LoftQ change them, so the adapter fits a base that nobody has."""


@dataclass(frozen=True, slots=True)
class AdapterWeights:
    """An adapter in host memory."""

    digest: str
    """sha256 over both files, as of a model in the store."""
    rank: int
    """Largest of its layers."""
    layers: Mapping[str, tuple[torch.Tensor, torch.Tensor]]
    """Layer → A of shape (rank, in) and B of shape (rank, out), float32. The scaling is in B:
    the output of the layer changes by ``(x · Aᵀ) · B``."""


def read_adapter(
    model: str, adapter: str, path: Path, layers: Mapping[str, tuple[int, int]], max_rank: int
) -> AdapterWeights:
    """Read and check an adapter.

    Args:
        model: name of the model, for errors.
        adapter: name of the adapter, for errors.
        path: folder with both files.
        layers: the model's linear layers that an adapter may change, with (in, out).
        max_rank: largest rank there is room for.

    Raises:
        AdapterUnusable: with the reason.
    """
    try:
        if not path.is_dir():
            raise AdapterUnusable(model, adapter, f"{path} is not a folder")
        config = checks.read_json(adapter, path / CONFIG)
        if (path / CONFIG).stat().st_size > MAX_CONFIG_BYTES:
            raise AdapterUnusable(
                model, adapter, f"{CONFIG} is larger than {MAX_CONFIG_BYTES} bytes"
            )
        raw = _read_weights(adapter, path, layers, max_rank)
    except (ModelUnusable, UnsafeModel, OSError) as error:
        raise AdapterUnusable(model, adapter, str(error)) from error
    try:
        found = _Reader(config, layers, max_rank).read(load_tensors(raw))
    except _Unfit as error:
        raise AdapterUnusable(model, adapter, str(error)) from error
    digest = digest_of(
        {
            CONFIG: hashlib.sha256((path / CONFIG).read_bytes()).hexdigest(),
            WEIGHTS: hashlib.sha256(raw).hexdigest(),
        }
    )
    return AdapterWeights(digest, max(len(a) for a, _ in found.values()), found)


def _read_weights(
    adapter: str, path: Path, layers: Mapping[str, tuple[int, int]], max_rank: int
) -> bytes:
    """The whole file, so that what is hashed is what is loaded."""
    file = path / WEIGHTS
    if not file.is_file():
        pickled = sorted(p.name for p in path.iterdir() if p.suffix in checks.PICKLE_SUFFIXES)
        if pickled:
            raise UnsafeModel(adapter, f"it has pickled weights only ({', '.join(pickled[:3])})")
        raise ModelUnusable(adapter, WEIGHTS, "is missing")
    checks.read_header(adapter, file)
    most = 4 * max_rank * sum(i + o for i, o in layers.values()) + HEADER_BYTES
    if file.stat().st_size > most:
        raise ModelUnusable(
            adapter, WEIGHTS, f"is larger than any adapter of rank {max_rank} on this model"
        )
    return file.read_bytes()


class _Unfit(ValueError):
    """Why an adapter cannot be used."""


class _Reader:
    """One adapter's configuration, applied to its tensors."""

    def __init__(
        self, config: dict[str, Any], layers: Mapping[str, tuple[int, int]], max_rank: int
    ) -> None:
        self._layers, self._max_rank = layers, max_rank
        self._check_plain(config)
        self._rank = _positive(config, "r")
        self._alpha = _number("lora_alpha", config.get("lora_alpha"))
        self._ranks = _mapping(config, "rank_pattern")
        self._alphas = _mapping(config, "alpha_pattern")
        self._root = bool(config.get("use_rslora"))
        self._config = config

    @staticmethod
    def _check_plain(config: dict[str, Any]) -> None:
        if config.get("peft_type") != "LORA":
            raise _Unfit(f"it is {config.get('peft_type')!r}, and only LORA is supported")
        if config.get("bias", "none") != "none":
            raise _Unfit("it changes biases")
        init = config.get("init_lora_weights", True)
        if not any(init is known or init == known for known in _BASE_AS_IT_IS):
            raise _Unfit(
                f"its training changed the base model's weights (init_lora_weights {init!r}); "
                "have peft convert it to plain LoRA when saving"
            )
        for key in sorted(config.keys() - _USED - _WITHOUT_EFFECT):
            if config[key]:
                raise _Unfit(f"it uses {key}, which is not supported")

    def read(
        self, tensors: dict[str, torch.Tensor]
    ) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        halves: dict[str, dict[str, torch.Tensor]] = {}
        for key, tensor in tensors.items():
            match = re.fullmatch(r"(.+)\.lora_([AB])\.weight", key.removeprefix(_PREFIX))
            if not key.startswith(_PREFIX) or match is None:
                raise _Unfit(f"its file holds {key!r}, which is no part of plain LoRA")
            halves.setdefault(match.group(1), {})[match.group(2)] = tensor
        meant = {name for name in self._layers if self._targets(name)}
        for name in sorted(halves.keys() | meant):
            if name not in self._layers:
                raise _Unfit(
                    f"it changes {name!r}, which is no linear layer of the model "
                    "that adapters may change"
                )
            if name not in meant:
                raise _Unfit(f"its file changes {name!r}, and its target_modules do not")
            if len(halves.get(name, {})) != 2:
                raise _Unfit(f"its file lacks weights for {name!r}")
        if not halves:
            raise _Unfit("it changes no layer at all")
        return {name: self._layer(name, half["A"], half["B"]) for name, half in halves.items()}

    def _layer(
        self, name: str, a: torch.Tensor, b: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        inside, outside = self._layers[name]
        rank = int(_number("rank_pattern", _look_up(self._ranks, name, self._rank)))
        if not 1 <= rank <= self._max_rank:
            raise _Unfit(f"its rank in {name!r} is {rank}, and 1 to {self._max_rank} are allowed")
        for half, tensor, shape in (("A", a, (rank, inside)), ("B", b, (outside, rank))):
            if tuple(tensor.shape) != shape:
                raise _Unfit(
                    f"{half} of {name!r} has the shape {tuple(tensor.shape)}, "
                    f"and the model needs {shape}"
                )
            if not tensor.is_floating_point() or not bool(torch.isfinite(tensor).all()):
                raise _Unfit(f"{half} of {name!r} holds what is no finite number")
        alpha = _number("alpha_pattern", _look_up(self._alphas, name, self._alpha))
        scaling = alpha / (math.sqrt(rank) if self._root else rank)
        return a.float().contiguous(), (b.float() * scaling).t().contiguous()

    def _targets(self, name: str) -> bool:
        """Whether the configuration means this layer, by peft's rules."""
        config = self._config
        excluded = config.get("exclude_modules")
        if excluded and _named(excluded, name):
            return False
        targets = config.get("target_modules")
        if isinstance(targets, str) and targets.lower() == "all-linear":
            return True
        if not targets or not _named(targets, name):
            return False
        numbers = config.get("layers_to_transform")
        if isinstance(targets, str) or numbers in (None, []):
            return True
        patterns = config.get("layers_pattern") or r"[^.]*"
        for pattern in [patterns] if isinstance(patterns, str) else patterns:
            match = _match(rf"(?:.*?\.)?(?:{_pattern(pattern)})\.(\d+)\..*", name)
            if match is not None:
                return int(match.group(1)) in (numbers if isinstance(numbers, list) else [numbers])
        return False


def _named(wanted: Any, name: str) -> bool:
    """A string is an expression for the whole name, a list holds ends of names."""
    if isinstance(wanted, str):
        return _match(_pattern(wanted), name) is not None
    if not isinstance(wanted, list):
        raise _Unfit("target_modules and exclude_modules are a list or a string")
    return any(name == str(end) or name.endswith(f".{end}") for end in wanted)


def _look_up(patterns: dict[str, Any], name: str, otherwise: float) -> Any:
    """The value of the first expression that fits the end of the name."""
    for pattern, value in patterns.items():
        if _match(rf"(?:.*\.)?(?:{_pattern(pattern)})", name):
            return value
    return otherwise


def _pattern(value: Any) -> str:
    if not isinstance(value, str) or len(value) > MAX_PATTERN_CHARS:
        raise _Unfit(f"an expression has more than {MAX_PATTERN_CHARS} characters, or is no text")
    return value


def _match(pattern: str, name: str) -> re.Match[str] | None:
    try:
        return re.fullmatch(pattern, name)
    except (re.error, RecursionError) as error:
        raise _Unfit(f"the expression {pattern!r} is broken ({error})") from error


def _mapping(config: dict[str, Any], key: str) -> dict[str, Any]:
    value = config.get(key) or {}
    if not isinstance(value, dict):
        raise _Unfit(f"{key} is not an object")
    return value


def _number(key: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise _Unfit(f"{key} is {value!r}, which is no number")
    return float(value)


def _positive(config: dict[str, Any], key: str) -> int:
    value = config.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise _Unfit(f"{key} is {value!r}, which is no positive number")
    return value
