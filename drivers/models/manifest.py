"""The manifest of a stored model: what it is, where it came from, what its bytes are."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from llmos.drivers.errors import ModelDamaged
from llmos.drivers.protocols import ModelFiles

MANIFEST = "llmos-model.json"
FORMAT = 1
CHUNK_BYTES = 4 << 20


@dataclass(frozen=True, slots=True)
class FileEntry:
    """One file of a model."""

    sha256: str
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Manifest:
    """What ``llmos-model.json`` holds."""

    name: str
    source: str
    kind: Literal["causal", "encoder"]
    source_sha256: str
    """Of what was fetched, before any conversion: of the wheel, or over the files."""
    revision: str = ""
    """Commit that a ``hf:`` source stood for."""
    converter: str = ""
    """What converted it, e.g. ``transformers 5.23.0``; empty: the files are as fetched."""
    licence: str = ""
    files: dict[str, FileEntry] = field(default_factory=dict)
    """Path relative to the folder, with ``/`` → sha256 and size; without the manifest."""

    @property
    def size_bytes(self) -> int:
        """Of all files."""
        return sum(entry.size_bytes for entry in self.files.values())

    @property
    def digest(self) -> str:
        """sha256 over the sorted names and sha256 of the files."""
        return digest_of({name: entry.sha256 for name, entry in self.files.items()})

    def model_files(self, path: Path) -> ModelFiles:
        """The same for a caller of the store."""
        return ModelFiles(self.name, path, self.source, self.digest, self.size_bytes, self.kind)


def digest_of(hashes: Mapping[str, str]) -> str:
    """sha256 over the lines ``NAME<tab>SHA256<newline>`` in the order of the names."""
    whole = hashlib.sha256()
    for name in sorted(hashes):
        whole.update(f"{name}\t{hashes[name]}\n".encode())
    return whole.hexdigest()


def hash_file(path: Path, seen: Callable[[int], None] | None = None) -> FileEntry:
    """Hash one file; ``seen`` gets the bytes of each piece."""
    whole, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            whole.update(chunk)
            size += len(chunk)
            if seen is not None:
                seen(len(chunk))
    return FileEntry(whole.hexdigest(), size)


def list_files(folder: Path) -> list[str]:
    """Files below a folder, relative, with ``/``, sorted; without the manifest."""
    found = (p.relative_to(folder).as_posix() for p in folder.rglob("*") if not p.is_dir())
    return sorted(name for name in found if name != MANIFEST)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write it; the last file that goes into a folder."""
    content: dict[str, Any] = {"format": FORMAT, **asdict(manifest)}
    content["files"] = {name: asdict(e) for name, e in sorted(manifest.files.items())}
    content |= {"size_bytes": manifest.size_bytes, "digest": manifest.digest}
    write_durably(folder / MANIFEST, json.dumps(content, indent=2, sort_keys=True) + "\n")


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest of a folder; None where there is none.

    Raises:
        ModelDamaged: it cannot be read, or does not agree with its own digest.
    """
    path = folder / MANIFEST
    try:
        content = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError as error:
        raise ModelDamaged(folder.name, MANIFEST, "JSON", f"not JSON ({error})") from error
    try:
        if content["format"] != FORMAT:
            raise ModelDamaged(folder.name, MANIFEST, f"format {FORMAT}", str(content["format"]))
        manifest = Manifest(
            name=content["name"],
            source=content["source"],
            kind=content["kind"],
            source_sha256=content["source_sha256"],
            revision=content["revision"],
            converter=content["converter"],
            licence=content["licence"],
            files={n: FileEntry(e["sha256"], e["size_bytes"]) for n, e in content["files"].items()},
        )
        digest = content["digest"]
    except (KeyError, TypeError, AttributeError) as error:
        raise ModelDamaged(folder.name, MANIFEST, "a manifest", f"no {error}") from error
    if manifest.digest != digest:
        raise ModelDamaged(folder.name, MANIFEST, digest, manifest.digest)
    return manifest


def check_sizes(folder: Path, manifest: Manifest) -> None:
    """Compare the files with the manifest by name and size: microseconds, no reading.

    Raises:
        ModelDamaged: a file is gone or of another size.
    """
    for name, entry in manifest.files.items():
        try:
            size = (folder / name).stat().st_size
        except FileNotFoundError:
            raise ModelDamaged(manifest.name, name, f"{entry.size_bytes} bytes", "gone") from None
        if size != entry.size_bytes:
            raise ModelDamaged(manifest.name, name, f"{entry.size_bytes} bytes", f"{size} bytes")


def check_hashes(folder: Path, manifest: Manifest, seen: Callable[[int], None]) -> None:
    """Read every file and compare it.

    Raises:
        ModelDamaged: a file is gone, changed, or was added.
    """
    check_sizes(folder, manifest)
    for name, entry in manifest.files.items():
        found = hash_file(folder / name, seen)
        if found != entry:
            raise ModelDamaged(manifest.name, name, f"sha256 {entry.sha256}", found.sha256)
    added = [name for name in list_files(folder) if name not in manifest.files]
    if added:
        raise ModelDamaged(manifest.name, added[0], "absent", "there")


def write_durably(path: Path, text: str) -> None:
    """Replace a file in one step, through a neighbour, and flush it to disk."""
    neighbour = path.with_name(f".{path.name}.{os.getpid()}.new")
    with neighbour.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    neighbour.replace(path)


def flush_folder(folder: Path) -> None:
    """Flush a finished folder: every file, then the folders that name them."""
    folders = [folder, *(p for p in folder.rglob("*") if p.is_dir())]
    for path in [p for p in folder.rglob("*") if p.is_file()] + folders:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
