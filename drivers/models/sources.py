"""Where a model can come from, as text and as a value.

``pypi:NAME==VERSION``, ``hf:ORG/NAME[@REVISION]``, ``path:/folder`` or
``path:./file.gguf``. Parsing touches no network and no file.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from llmos.drivers.errors import SourceUnavailable

SCHEMES = ("pypi", "hf", "path")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_PYPI = re.compile(r"([A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?)==([A-Za-z0-9][A-Za-z0-9.!+_-]*)")
_HF = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@([A-Za-z0-9][\w./-]*))?")
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True, slots=True)
class Source:
    """A parsed source."""

    scheme: Literal["pypi", "hf", "path"]
    target: str
    """Package, ``ORG/NAME`` or absolute path."""
    version: str = ""
    """Version (``pypi:``) or revision (``hf:``, empty: the main branch)."""

    def __str__(self) -> str:
        """The canonical text of it; a path is absolute."""
        mark = {"pypi": "==", "hf": "@", "path": ""}[self.scheme]
        return f"{self.scheme}:{self.target}" + (mark + self.version if self.version else "")

    @property
    def default_name(self) -> str:
        """What the store calls the model unless told otherwise."""
        last = self.target.rstrip("/").rsplit("/", 1)[-1]
        return re.sub(r"[^a-z0-9._-]+", "-", last.lower().removesuffix(".gguf")).strip("-._")

    @property
    def pinned(self) -> bool:
        """The text alone fixes the bytes (a full commit)."""
        return self.scheme == "hf" and _COMMIT.fullmatch(self.version) is not None


def is_source(text: str) -> bool:
    """Whether the text names a source rather than a model."""
    return text.partition(":")[0] in SCHEMES and ":" in text


def is_name(text: str) -> bool:
    """Whether the text can be the name of a model: one plain path component."""
    return _NAME.fullmatch(text) is not None


def parse_source(text: str, *, model: str = "") -> Source:
    """Read a source.

    Raises:
        SourceUnavailable: not written as one of the three forms.
    """
    scheme, _, rest = text.partition(":")
    if scheme == "pypi" and (found := _PYPI.fullmatch(rest)):
        return Source("pypi", found[1], found[2])
    if scheme == "hf" and (found := _HF.fullmatch(rest)):
        return Source("hf", found[1], found[2] or "")
    if scheme == "path" and rest:
        return Source("path", str(Path(rest).expanduser().absolute()))
    raise SourceUnavailable(
        model or text,
        text,
        "it is not written as a source",
        remedy="Write pypi:NAME==VERSION, hf:ORG/NAME[@REVISION] or path:/folder",
    )
