"""An encoder without a model: hashed words and word pieces, so that like texts are near."""

from __future__ import annotations

import re
import threading
import zlib
from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from llmos.drivers.errors import EngineFailed, NoHead
from llmos.drivers.protocols import EngineOptions, EngineStatistics, Vectors

DIMENSION = 256
MAX_TOKENS = 256
_WORD = re.compile(r"\w+")
_SHORT_WEIGHT = 0.25
"""Of words of up to three letters: most are articles and pronouns, which every text has."""
_PIECE_WEIGHT = 0.5
"""Of a three-letter piece against its word: 'refund' and 'refunds' are to be near."""


class HashEncoder:
    """See :class:`llmos.drivers.protocols.EncoderEngine`. The same in every process."""

    def __init__(self, options: EngineOptions) -> None:
        """``options.path`` is not read."""
        self._options = options
        self._lock = threading.Lock()
        self._closed = False
        self._finished = self._tokens = 0

    @property
    def dimension(self) -> int:
        """Numbers per embedding."""
        return DIMENSION

    @property
    def max_tokens(self) -> int:
        """Words after these are not read."""
        return MAX_TOKENS

    @property
    def labels(self) -> tuple[str, ...]:
        """None: it has no head."""
        return ()

    def classify(self, texts: Sequence[str]) -> Vectors:
        """Always raises NoHead."""
        raise NoHead(self._options.model)

    def embed(self, texts: Sequence[str]) -> Vectors:
        """Embed texts; see the protocol."""
        if self._closed:
            raise EngineFailed(self._options.model, "it is closed")
        rows = np.zeros((len(texts), DIMENSION), dtype=np.float32)
        tokens = 0
        for row, text in zip(rows, texts, strict=True):
            words = _WORD.findall(text.lower())[:MAX_TOKENS]
            tokens += len(words)
            features: dict[str, float] = defaultdict(float)
            for word in words:
                weight = 1.0 if len(word) > 3 else _SHORT_WEIGHT
                features[word] += weight
                framed = f"<{word}>"
                for i in range(len(framed) - 2):
                    features["#" + framed[i : i + 3]] += weight * _PIECE_WEIGHT
            for feature, weight in features.items():
                # crc32 and not hash(): the latter differs from process to process.
                digest = zlib.crc32(feature.encode("utf-8", "replace"))
                row[digest % DIMENSION] += weight if digest & 0x80000000 else -weight
            length = float(np.linalg.norm(row))
            if length:
                row /= length
            else:
                row[0] = 1.0  # An empty text has a direction too.
        with self._lock:
            self._finished += len(texts)
            self._tokens += tokens
        return rows

    def memory_bytes(self) -> dict[str, int]:
        """Nothing: it has no tensors."""
        return {}

    def statistics(self) -> EngineStatistics:
        """Counters now; ``finished`` counts texts."""
        with self._lock:
            return EngineStatistics(finished=self._finished, prompt_tokens=self._tokens)

    def close(self) -> None:
        """Refuse from now on."""
        self._closed = True
