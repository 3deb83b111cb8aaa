"""A text encoder: embeddings, and the classes of the model's own head where it has one.

An embedding is the mean of the last layer over the text's tokens, scaled to length 1.
Texts are cut into passes by their tokens, those of like length together. Each pass waits
for its turn by itself, so a caller with few texts gets in between the passes of one with
thousands; texts are tokenized outside, while somebody else's pass computes.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from llmos.drivers.devices.cpu import set_torch_threads
from llmos.drivers.engines import ragged
from llmos.drivers.engines.fairlock import FairLock
from llmos.drivers.engines.loading import loading
from llmos.drivers.engines.packing import PackedLinear, can_pack
from llmos.drivers.engines.quantize import quantize
from llmos.drivers.engines.tensors import weights_bytes
from llmos.drivers.errors import EngineFailed, NoHead
from llmos.drivers.models.footprint import context_tokens
from llmos.drivers.protocols import EngineOptions, EngineStatistics, Vectors

_Pass: TypeAlias = Callable[[list[list[int]]], torch.Tensor]
"""From the tokens of some texts, longest first, to a row for each."""

_HEAD = "ForSequenceClassification"
_BROKEN = (OSError, ValueError, RuntimeError, MemoryError, KeyError, ImportError, AttributeError)
"""What loading files that are wrong ends in."""


class TransformersEncoderEngine:
    """See :class:`llmos.drivers.protocols.EncoderEngine`.

    ``dtype="auto"`` is float32 on every device: vectors made on several machines must
    agree, and these models are small.
    """

    def __init__(self, options: EngineOptions) -> None:
        """Load the model.

        Raises:
            EngineFailed: the folder cannot be loaded, or the model cannot compute.
            ModelUnusable: its config names no sizes.
            WeightsUnsupported: its weights cannot be kept as asked for.
        """
        self._options = options
        self._device = torch.device(options.torch_device)
        # What the model was trained with, not merely what its positions allow.
        self._max_tokens = context_tokens(options.path)
        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(
                options.path, local_files_only=True, trust_remote_code=False
            )
            model, self._labels, self._many = _load(options)
            self._model: Any = model.to(self._device).eval().requires_grad_(False)
        except _BROKEN as error:
            raise EngineFailed(
                options.model, f"loading {options.path}: {type(error).__name__}: {error}"
            ) from error
        self._body: Any = self._model.base_model
        config = self._model.config
        self._dimension = int(config.hidden_size)
        self._model_type, self._padding = str(config.model_type), config.pad_token_id
        self._ragged = (
            self._device.type == "cpu"
            and self._model_type in ragged.MODEL_TYPES
            and not getattr(config, "is_decoder", False)
        )
        quantize(self._model, options.weights, options.model)
        if self._ragged:
            self._model.set_attn_implementation(ragged.NAME)
            _pack(self._body)
        # The tokenizer is set up anew by each call, and breaks if two do so at a time.
        self._tokenizing = threading.Lock()
        # One pass at a time: at once, each would take the slot's whole thread quota.
        self._turn = FairLock()
        self._counting = threading.Lock()
        self._finished = self._failed = self._tokens = self._passes = 0
        self._try_out()

    @property
    def dimension(self) -> int:
        """Numbers per embedding."""
        return self._dimension

    @property
    def max_tokens(self) -> int:
        """Longer texts are cut here."""
        return self._max_tokens

    @property
    def labels(self) -> tuple[str, ...]:
        """Classes of the model's own head; empty: it has none."""
        return self._labels

    def embed(self, texts: Sequence[str]) -> Vectors:
        """Embed texts; see the protocol. Lone surrogates are read as question marks."""
        return self._run(texts, self._dimension, self._embed)

    def classify(self, texts: Sequence[str]) -> Vectors:
        """Probabilities of each label; see the protocol. They add up to 1, unless the model
        was trained to give several labels to a text: then each stands for itself."""
        if not self._labels:
            raise NoHead(self._options.model)
        return self._run(texts, len(self._labels), self._classify)

    def memory_bytes(self) -> dict[str, int]:
        """The weights, with the head if there is one; see the protocol."""
        model = self._model
        return {} if model is None else {"weights": weights_bytes(model)}

    def statistics(self) -> EngineStatistics:
        """Counters now; ``finished`` and ``failed`` count texts, ``steps`` passes."""
        with self._counting:
            return EngineStatistics(
                finished=self._finished,
                failed=self._failed,
                prompt_tokens=self._tokens,
                steps=self._passes,
            )

    def close(self) -> None:
        """Free the memory, once a running pass is over."""
        with self._turn:
            self._model = self._body = None
            if self._device.type == "cuda":
                torch.cuda.empty_cache()

    # ------------------------------------------------------------ texts

    def _run(self, texts: Sequence[str], width: int, compute: _Pass) -> Vectors:
        rows = np.zeros((len(texts), width), dtype=np.float32)
        if self._model is None:
            raise EngineFailed(self._options.model, "it is closed")
        if not texts:
            return rows
        clean = [t.encode("utf-8", "replace").decode("utf-8") for t in texts]
        done = 0
        try:
            with self._tokenizing:
                ids: list[list[int]] = self._tokenizer(
                    clean, truncation=True, max_length=self._max_tokens
                )["input_ids"]
            for chosen in self._passes_of([len(i) for i in ids]):
                rows[chosen] = self._pass([ids[i] for i in chosen], compute)
                done += len(chosen)
                with self._counting:
                    self._finished += len(chosen)
                    self._tokens += sum(len(ids[i]) for i in chosen)
                    self._passes += 1
        except (RuntimeError, MemoryError) as error:
            with self._counting:
                self._failed += len(texts) - done
            raise EngineFailed(self._options.model, f"{type(error).__name__}: {error}") from error
        return rows

    def _passes_of(self, lengths: list[int]) -> list[list[int]]:
        """Texts by index, in passes of at most ``max_batch_tokens`` tokens, padding included,
        and ``max_batch_texts`` texts. A text that is longer goes alone."""
        budget, most = self._options.max_batch_tokens, self._options.max_batch_texts
        passes: list[list[int]] = []
        longest = tokens = 0
        for i in sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True):
            padded = lengths[i] if self._ragged else longest
            if passes and len(passes[-1]) < most and tokens + padded <= budget:
                passes[-1].append(i)
                tokens += padded
            else:
                passes.append([i])
                longest = tokens = lengths[i]
        return passes

    def _pass(self, ids: list[list[int]], compute: _Pass) -> Vectors:
        with self._turn:
            if self._model is None:
                raise EngineFailed(self._options.model, "it is closed")
            if self._device.type == "cpu":
                set_torch_threads(self._options.threads)
            with torch.inference_mode():
                made: Vectors = compute(ids).cpu().numpy()
        return made

    # ------------------------------------------------------------ one pass

    def _embed(self, ids: list[list[int]]) -> torch.Tensor:
        if self._ragged:
            hidden, groups = self._hidden(ids)
            mean = ragged.means(hidden.float(), groups)
        else:
            batch = self._padded(ids)
            hidden = self._body(**batch).last_hidden_state.float()
            mask = batch["attention_mask"].unsqueeze(-1).float()
            mean = (hidden * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1e-9)
        return nn.functional.normalize(mean, dim=1)

    def _classify(self, ids: list[list[int]]) -> torch.Tensor:
        if self._ragged:
            hidden, groups = self._hidden(ids)
            first = ragged.firsts(hidden, groups).unsqueeze(1)
            pooler = getattr(self._body, "pooler", None)
            # With or without a pooler, the head looks at the first token alone.
            logits = self._model.classifier(first if pooler is None else pooler(first))
        else:
            logits = self._model(**self._padded(ids)).logits
        scores: torch.Tensor = logits.float()
        return scores.sigmoid() if self._many else scores.softmax(dim=-1)

    def _hidden(self, ids: list[list[int]]) -> tuple[torch.Tensor, list[ragged.Group]]:
        """The last layer, (tokens, width), and how the texts lie in it."""
        groups = ragged.groups_of([len(i) for i in ids])
        hidden: torch.Tensor = self._body(
            input_ids=torch.tensor([[token for text in ids for token in text]]),
            position_ids=ragged.positions(groups, self._model_type, self._padding),
            llmos_groups=groups,
        ).last_hidden_state[0]
        return hidden, groups

    def _padded(self, ids: list[list[int]]) -> Any:
        return self._tokenizer.pad({"input_ids": ids}, return_tensors="pt").to(self._device)

    def _try_out(self) -> None:
        """Two texts of two lengths, so that a model whose layers cannot be packed, narrowed or
        run without padding fails now, and not under the first caller."""
        try:
            for compute in (self._embed, self._classify) if self._labels else (self._embed,):
                self._pass(self._tokenizer(["one two", "one"])["input_ids"], compute)
        except (*_BROKEN, TypeError) as error:
            raise EngineFailed(
                self._options.model, f"its first pass: {type(error).__name__}: {error}"
            ) from error


def _load(options: EngineOptions) -> tuple[Any, tuple[str, ...], bool]:
    """The model, its labels, and whether a text may have several of them.

    A head with a single output, which gives a score and no classes, counts as none.
    """
    config = AutoConfig.from_pretrained(
        options.path, local_files_only=True, trust_remote_code=False
    )
    has_head = any(str(a).endswith(_HEAD) for a in config.architectures or ())
    many = config.problem_type == "multi_label_classification"
    if config.problem_type == "regression" or (config.num_labels < 2 and not many):
        has_head = False
    # Half precision moves a cosine by some 1e-3, more than neighbours differ by.
    name = "float32" if options.dtype == "auto" else options.dtype
    with loading():
        model, told = (
            AutoModelForSequenceClassification if has_head else AutoModel
        ).from_pretrained(
            options.path,
            config=config,
            dtype=getattr(torch, name),
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    if not has_head:
        return model, (), False
    if told["missing_keys"]:
        # The library would make them up.
        raise ValueError(f"the files lack {', '.join(sorted(told['missing_keys']))}")
    return model, tuple(str(config.id2label[i]) for i in range(config.num_labels)), many


def _pack(body: nn.Module) -> None:
    """Lay plain weights out for the matrix kernels: a tenth faster in float32, which decides
    nothing for a causal model's few rows, and twice as fast in bfloat16."""
    if not can_pack():
        return
    for parent in list(body.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear and child.weight.dtype in (torch.float32, torch.bfloat16):
                setattr(parent, name, PackedLinear(child))
