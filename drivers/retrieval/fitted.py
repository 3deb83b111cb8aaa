"""All that was fitted to judged queries, in one file of JSON."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from llmos.drivers.errors import FusionFileError
from llmos.drivers.retrieval.bm25 import Bm25Options
from llmos.drivers.retrieval.fusion import Fusion
from llmos.drivers.retrieval.rerank import FEATURES, Reranker

VERSION = 1
MAX_FILE_BYTES = 1_000_000


@dataclass(frozen=True, slots=True)
class Fitted:
    """How a corpus is searched."""

    bm25: Bm25Options = field(default_factory=Bm25Options)
    fusion: Fusion = field(default_factory=Fusion)
    reranker: Reranker | None = None

    def save(self, path: Path) -> None:
        """Write the file."""
        data = {"version": VERSION, "features": list(FEATURES), **asdict(self)}
        path.write_text(json.dumps(data, indent=2) + "\n", "utf-8")


def load(path: Path) -> Fitted:
    """Read what :meth:`Fitted.save` has written.

    Raises:
        FusionFileError: it cannot be read, or is not that.
    """
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise ValueError(f"larger than {MAX_FILE_BYTES} bytes")
        data: dict[str, Any] = json.loads(path.read_text("utf-8"))
        if not isinstance(data, dict) or data.get("version") != VERSION:
            raise ValueError(f"not of version {VERSION}")
        fusion, reranker = data["fusion"], data["reranker"]
        weights = fusion.pop("weights")
        if weights is not None:
            weights = {str(leg): float(weight) for leg, weight in weights.items()}
        if reranker is not None:
            if tuple(data["features"]) != FEATURES:
                raise ValueError("its reranker weighs other facts")
            reranker = Reranker(**{k: tuple(map(float, v)) for k, v in reranker.items()})
        return Fitted(Bm25Options(**data["bm25"]), Fusion(**fusion, weights=weights), reranker)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise FusionFileError(str(path), f"{type(error).__name__}: {error}") from error
