"""A text encoder: mean of the last layer over the text's tokens, scaled to length 1."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers import AutoModel, AutoTokenizer

from llmos.drivers.devices.cpu import set_torch_threads
from llmos.drivers.engines.loading import loading
from llmos.drivers.errors import EngineFailed
from llmos.drivers.models.footprint import context_tokens
from llmos.drivers.protocols import EngineOptions, EngineStatistics, Vectors


class TransformersEncoderEngine:
    """See :class:`llmos.drivers.protocols.EncoderEngine`.

    ``dtype="auto"`` is float32 on every device: vectors made on several machines must
    agree, and these models are small.
    """

    def __init__(self, options: EngineOptions) -> None:
        """Load the model.

        Raises:
            EngineFailed: the folder cannot be loaded.
            ModelUnusable: its config names no sizes.
        """
        self._options = options
        self._device = torch.device(options.torch_device)
        # Half precision moves a cosine by some 1e-3, more than neighbours differ by.
        name = "float32" if options.dtype == "auto" else options.dtype
        dtype: torch.dtype = getattr(torch, name)
        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(
                options.path, local_files_only=True, trust_remote_code=False
            )
            with loading():
                model = AutoModel.from_pretrained(
                    options.path,
                    dtype=dtype,
                    local_files_only=True,
                    use_safetensors=True,
                    trust_remote_code=False,
                )
        except (OSError, ValueError, RuntimeError, MemoryError, KeyError, ImportError) as error:
            raise EngineFailed(
                options.model, f"loading {options.path}: {type(error).__name__}: {error}"
            ) from error
        self._model: Any = model.to(self._device).eval().requires_grad_(False)
        self._dimension = int(model.config.hidden_size)
        # What the model was trained with, not merely what its positions allow.
        self._max_tokens = context_tokens(options.path)
        # One at a time: concurrent passes would each take the slot's whole thread quota.
        self._lock = threading.Lock()
        self._finished = self._failed = self._tokens = 0

    @property
    def dimension(self) -> int:
        """Numbers per embedding."""
        return self._dimension

    @property
    def max_tokens(self) -> int:
        """Longer texts are cut here."""
        return self._max_tokens

    def embed(self, texts: Sequence[str]) -> Vectors:
        """Embed texts; see the protocol. Lone surrogates are read as question marks."""
        rows = np.zeros((len(texts), self._dimension), dtype=np.float32)
        with self._lock:
            if self._model is None:
                raise EngineFailed(self._options.model, "it is closed")
            if not texts:
                return rows
            clean = [t.encode("utf-8", "replace").decode("utf-8") for t in texts]
            try:
                tokens = self._embed_into(rows, clean)
            except (RuntimeError, MemoryError) as error:
                self._failed += len(texts)
                raise EngineFailed(
                    self._options.model, f"{type(error).__name__}: {error}"
                ) from error
            self._finished += len(texts)
            self._tokens += tokens
        return rows

    def _embed_into(self, rows: Vectors, texts: list[str]) -> int:
        """Fill the rows; returns how many tokens were read."""
        if self._device.type == "cpu":
            set_torch_threads(self._options.threads)
        ids: list[list[int]] = self._tokenizer(texts, truncation=True, max_length=self._max_tokens)[
            "input_ids"
        ]
        # Texts of like length share a pass, so that little is computed on padding.
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]), reverse=True)
        size = max(1, self._options.max_batch_texts)
        with torch.inference_mode():
            for at in range(0, len(order), size):
                chosen = order[at : at + size]
                batch = self._tokenizer.pad(
                    {"input_ids": [ids[i] for i in chosen]}, return_tensors="pt"
                ).to(self._device)
                hidden = self._model(**batch).last_hidden_state.float()
                mask = batch["attention_mask"].unsqueeze(-1).float()
                mean = (hidden * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1e-9)
                rows[chosen] = torch.nn.functional.normalize(mean, dim=1).cpu().numpy()
        return sum(map(len, ids))

    def statistics(self) -> EngineStatistics:
        """Counters now; ``finished`` and ``failed`` count texts."""
        return EngineStatistics(
            finished=self._finished, failed=self._failed, prompt_tokens=self._tokens
        )

    def close(self) -> None:
        """Free the memory, once a running pass is over."""
        with self._lock:
            self._model = None
            if self._device.type == "cuda":
                torch.cuda.empty_cache()
