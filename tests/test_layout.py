"""The guards of the layout: links, imports, public names, and the trees of errors."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import json
import os
import pickle
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import llmos
from llmos.drivers import registry
from llmos.drivers.errors import LlmosError

ROOT = Path(__file__).resolve().parent.parent
LINKS = sorted(p for p in (ROOT / "llmos").iterdir() if p.is_symlink())
TREES = ("llmos.drivers.errors", "llmos.syscalls.errors", "llmos.kernel.core.errors")
ALONE = (
    "llmos.kernel.program",
    "llmos.kernel.system",
    "llmos.kernel.remote",
    "llmos.kernel.cluster",
)


def python(code: str) -> Any:
    """What a fresh interpreter prints as JSON."""
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60
    )
    assert out.returncode == 0, out.stderr
    return json.loads(out.stdout)


def loaded(imports: str) -> set[str]:
    """Top-level modules that an import brings in, in a fresh interpreter."""
    return set(
        python(
            "import json, sys; before = set(sys.modules)\n"
            f"{imports}\n"
            "print(json.dumps(sorted(set(sys.modules) - before)))"
        )
    )


# ------------------------------------------------------------------ links


@pytest.mark.parametrize("link", LINKS, ids=lambda p: p.name)
def test_a_link_is_relative_and_leads_to_its_folder(link: Path) -> None:
    assert os.readlink(link) == f"../{link.name}"
    assert link.resolve() == ROOT / link.name
    assert (link / "__init__.py").is_file()


def test_every_package_at_the_top_has_its_link_and_llmos_holds_no_code() -> None:
    packages = {p.parent.name for p in ROOT.glob("*/__init__.py")} - {"llmos", "tests"}
    # Benchmarks are run from a checkout and are not installed.
    assert packages - {"benchmarks"} == {p.name for p in LINKS} - {"benchmarks"}
    rest = {p.name for p in (ROOT / "llmos").iterdir() if not p.is_symlink()}
    assert rest - {"__pycache__"} == {"__init__.py", "py.typed"}


# ------------------------------------------------------------------ imports


def test_importing_llmos_is_quick_and_loads_nothing_heavy() -> None:
    # Twice: the first run may have to compile the byte code.
    took = []
    for _ in range(2):
        started = time.perf_counter()
        modules = loaded("import llmos")
        took.append(time.perf_counter() - started)
    assert not modules & {"ray", "torch", "transformers", "pydantic", "numpy"}
    assert min(took) < 1.5


def test_the_core_is_pure() -> None:
    names = sorted(p.stem for p in (ROOT / "kernel" / "core").glob("*.py") if p.stem != "__init__")
    modules = loaded("\n".join(f"import llmos.kernel.core.{n}" for n in names))
    assert "llmos.kernel.core.state" in modules
    assert not modules & {"ray", "torch", "transformers"}
    used = {
        line
        for path in (ROOT / "kernel" / "core").glob("*.py")
        for line in path.read_text().splitlines()
        if re.match(r"\s*(import|from) (asyncio|ray|torch|time|random|threading|os)\b", line)
    }
    assert not used


def test_the_registry_imports_no_driver() -> None:
    modules = loaded("import llmos.drivers.registry")
    targets = {entry.target.split(":")[0] for entry in registry.TABLE.values()}
    assert not modules & targets
    assert not modules & {"torch", "faiss", "clips", "networkx", "ray"}


@pytest.mark.parametrize("key", sorted(registry.TABLE), ids="-".join)
def test_every_driver_of_the_table_has_its_module(key: tuple[str, str]) -> None:
    module, _, attribute = registry.TABLE[key].target.partition(":")
    file = ROOT.joinpath(*module.split(".")[1:]).with_suffix(".py")
    assert file.is_file()
    assert re.search(rf"^(class|def) {attribute}\b", file.read_text(), re.MULTILINE)


def test_the_table_is_sorted_and_unknown_drivers_are_named() -> None:
    assert list(registry.TABLE) == sorted(registry.TABLE)
    with pytest.raises(LlmosError, match="memory, postgres, sqlite"):
        registry.driver("store", "papyrus")


def test_a_missing_package_is_told_with_its_install(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = registry.Entry("no_such_package_here.module:Thing", "pip install 'llmos[thing]'")
    monkeypatch.setitem(registry.TABLE, ("store", "thing"), entry)
    with pytest.raises(LlmosError, match="no_such_package_here") as caught:
        registry.driver("store", "thing")
    assert "pip install 'llmos[thing]'" in str(caught.value)


# ------------------------------------------------------------------ public names


@pytest.mark.parametrize("package", ["llmos", "llmos.kernel"])
def test_every_public_name_resolves(package: str) -> None:
    module = importlib.import_module(package)
    assert sorted(module.__all__) == list(module.__all__)
    for name in module.__all__:
        assert getattr(module, name) is not None
    with pytest.raises(AttributeError, match="no_such_name"):
        module.no_such_name  # noqa: B018


def test_dir_lists_the_public_names() -> None:
    assert dir(llmos) == sorted(llmos.__all__)


# ------------------------------------------------------------------ errors


def errors_of(module: str) -> list[type[LlmosError]]:
    found = importlib.import_module(module)
    return [
        c
        for c in vars(found).values()
        if isinstance(c, type) and issubclass(c, LlmosError) and c.__module__ == module
    ]


EVERY = [error for module in (*TREES, *ALONE) for error in errors_of(module)]


def value(parameter: inspect.Parameter) -> Any:
    """A value for a parameter, by its annotation."""
    text = str(parameter.annotation).replace(" | None", "")
    known: dict[str, Any] = {
        "str": f"some {parameter.name}",
        "int": 7,
        "float": 1.5,
        "bool": True,
        "object": {"any": "thing"},
        "Iterable[str]": ["b", "a"],
        "Sequence[str]": ["b", "a"],
        "Mapping[str, str]": {"any": "thing"},
        "tuple[str, str, str]": ("some kind", "some name", "{}"),
        "Iterable[tuple[int, str, str]]": [(7, "some kind", "some name")],
    }
    return known[text]


def made(cls: type[LlmosError]) -> LlmosError:
    parameters = list(inspect.signature(cls.__init__).parameters.values())[1:]
    positional = [value(p) for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    named = {p.name: value(p) for p in parameters if p.kind is p.KEYWORD_ONLY}
    return cls(*positional, **named)


@pytest.mark.parametrize("cls", EVERY, ids=lambda c: c.__name__)
def test_an_error_survives_pickling_with_its_facts(cls: type[LlmosError]) -> None:
    error = made(cls)
    for protocol in (2, pickle.HIGHEST_PROTOCOL):
        back = pickle.loads(pickle.dumps(error, protocol))
        assert type(back) is cls
        assert str(back) == str(error)
        assert back.facts == error.facts
        assert back.remedy == error.remedy
        assert back.code == cls.__name__
    assert str(error)
    assert str(error).endswith(error.remedy)
    assert cls.__doc__


def drawn(text: str) -> Iterator[tuple[str, str]]:
    """(class, parent) of a tree drawn in a docstring."""
    above: list[tuple[int, str]] = []
    for line in text.splitlines():
        entry = re.match(r"( +(?:[│├└─ ]*))([A-Z]\w+)(?:\s{2,}.*)?$", line)
        if entry is None:
            continue
        depth, name = len(entry.group(1)), entry.group(2)
        if not above and name != "LlmosError":
            continue
        while above and above[-1][0] >= depth:
            above.pop()
        yield name, above[-1][1] if above else ""
        above.append((depth, name))


@pytest.mark.parametrize("module", TREES)
def test_the_tree_in_the_docstring_is_the_tree_of_the_classes(module: str) -> None:
    doc = importlib.import_module(module).__doc__ or ""
    tree = dict(drawn(doc))
    own = {c.__name__: c.__bases__[0].__name__ for c in errors_of(module)}
    own.pop("LlmosError", None)
    tree.pop("LlmosError")
    assert tree == own


# ------------------------------------------------------------------ tools


def test_ruff_refuses_the_bare_names() -> None:
    bad = "import kernel.core.state\nfrom agents.base import Agent\n"
    out = subprocess.run(
        [
            *(sys.executable, "-m", "ruff", "check", "--select", "TID"),
            *("--stdin-filename", "scratch_layout.py", "-"),
        ],
        input=bad,
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=60,
    )
    assert out.returncode == 1, out.stdout + out.stderr
    assert "import llmos.kernel" in out.stdout
    assert "import llmos.agents" in out.stdout


@pytest.mark.slow
def test_the_import_contracts_hold() -> None:
    if importlib.util.find_spec("importlinter") is None:
        pytest.skip("import-linter is not installed")
    out = subprocess.run(
        [str(Path(sys.executable).parent / "lint-imports"), "--no-cache"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=120,
    )
    assert out.returncode == 0, out.stdout + out.stderr
