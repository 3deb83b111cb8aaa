"""The documentation says what the code does: links, fields, commands, errors, the first agent."""

from __future__ import annotations

import ast
import inspect
import re
import tomllib
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import typer.main
from pydantic import BaseModel

from llmos.drivers.errors import LlmosError
from llmos.kernel import system
from llmos.kernel.manifest import Limits, Manifest
from llmos.kernel.settings import Settings
from llmos.kernel.system import SystemConfig
from llmos.shell.main import app

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(
    [*ROOT.glob("*.md"), *DOCS.rglob("*.md")], key=lambda page: page.relative_to(ROOT).as_posix()
)
LINK = re.compile(r"\]\(([^)\s]+)\)")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
OUTSIDE = re.compile(r"[a-z]+:")


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def prose(page: Path) -> str:
    """The page without its code blocks."""
    return FENCE.sub("", page.read_text(encoding="utf-8"))


def anchors(page: Path) -> set[str]:
    """The fragments that a page's headings make, as Git hosts form them."""
    found = set()
    for heading in re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE):
        kept = re.sub(r"[^\w\- ]", "", heading.strip().lower())
        found.add(kept.replace(" ", "-"))
    return found


def blocks(page: str, language: str) -> list[str]:
    return [code for found, code in FENCE.findall(text_of(page)) if found == language]


def section(page: str, heading: str) -> str:
    """What stands under a heading, down to the next of any level."""
    text = text_of(page)
    start = text.index(f"\n{heading}\n")
    after = re.search(r"^#+ ", text[start + len(heading) + 2 :], re.MULTILINE)
    return text[start : start + len(heading) + 2 + after.start()] if after else text[start:]


# ------------------------------------------------------------------ links


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_relative_links_lead_somewhere(page: Path) -> None:
    broken = []
    for target in LINK.findall(prose(page)):
        if OUTSIDE.match(target):
            continue
        path, _, fragment = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        if not there.exists() or (
            fragment and there.suffix == ".md" and fragment not in anchors(there)
        ):
            broken.append(target)
    assert not broken


def test_the_index_leads_to_every_page() -> None:
    index = DOCS / "README.md"
    linked = {(DOCS / t.partition("#")[0]).resolve() for t in LINK.findall(prose(index))}
    # Decisions have an index of their own; benchmarks are linked where they are talked about.
    pages = {p for p in PAGES if p.is_relative_to(DOCS) and p != index}
    pages -= {p for p in pages if p.parent.name == "decisions" and p.name != "README.md"}
    assert pages - linked <= {DOCS / "benchmarks.md"}


def test_the_decisions_are_numbered_and_listed() -> None:
    records = sorted(p.name for p in (DOCS / "decisions").glob("0*.md"))
    assert [r[:4] for r in records] == [f"{n:04}" for n in range(1, len(records) + 1)]
    listed = LINK.findall(prose(DOCS / "decisions" / "README.md"))
    assert listed == records


# ------------------------------------------------------------------ reference pages


def tables() -> Iterator[tuple[str, type[BaseModel]]]:
    """Heading in the reference → the model whose fields stand under it."""
    yield "## `[system]`", system.SystemTable
    yield "## `[[devices]]`", system.DeviceTable
    yield "## `[hosts]`", system.HostsTable
    yield "## `[models.NAME]`", system.ModelTable
    yield "## `[models.NAME.remote]`", system.RemoteTable
    yield "## `[adapters.NAME]`", system.AdapterTable
    yield "## `[corpora.NAME]`", system.CorpusTable
    yield "## `[graphs.NAME]`", system.GraphTable
    yield "## `[rules.NAME]`", system.RulesTable
    yield "## `[tools.NAME]`", system.ToolTable
    yield "## `[mailboxes]`", system.MailboxesTable
    yield "## `[restarts]`", system.RestartsTable
    yield "## `[store]`", system.StoreTable
    yield "## `[scheduler]`", system.SchedulerTable
    yield "## `[tenants.NAME]`", system.TenantTable
    yield "## `[[agents]]`", system.AgentTable


@pytest.mark.parametrize(
    ("heading", "model"), list(tables()), ids=lambda x: getattr(x, "__name__", "")
)
def test_every_field_of_a_table_is_described(heading: str, model: type[BaseModel]) -> None:
    rows = section("docs/reference/system-toml.md", heading)
    described = set()
    for row in re.findall(r"^\| (`[^|]+`) \|", rows, re.MULTILINE):
        described |= set(re.findall(r"`(\w+)`", row))
    assert described == set(model.model_fields)


def test_every_table_is_described() -> None:
    described = {re.sub(r"[^a-z].*", "", h.strip("# `[")) for h, _ in tables()}
    assert described == set(SystemConfig.model_fields) - {"base"}


def test_every_setting_is_described() -> None:
    text = text_of("docs/reference/system-toml.md")
    for field in Settings.model_fields:
        assert f"`LLMOS_{field.upper()}`" in text


def test_every_field_of_the_manifest_is_described() -> None:
    for heading, model in (("## Manifest", Manifest), ("### Limits", Limits)):
        rows = section("docs/reference/agent-api.md", heading)
        assert set(re.findall(r"^\| `(\w+)` \|", rows, re.MULTILINE)) == set(model.model_fields)


def commands(group: Any, prefix: str = "llmos") -> Iterator[tuple[str, Any]]:
    """Typer brings a click of its own, so the classes are told apart by what they have."""
    for name, command in sorted(group.commands.items()):
        if hasattr(command, "commands"):
            yield from commands(command, f"{prefix} {name}")
        else:
            yield f"{prefix} {name}", command


def test_every_command_and_option_is_described() -> None:
    page = "docs/reference/cli.md"
    headings = re.findall(r"^(### `llmos .+`)$", text_of(page), re.MULTILINE)
    described = {h: re.sub(r" [\[A-Z].*", "", h.strip("#` ")) for h in headings}
    found = dict(commands(typer.main.get_command(app)))
    assert sorted(described.values()) == sorted(found)
    for heading, name in described.items():
        for parameter in found[name].params:
            if parameter.param_type_name == "option" and parameter.name != "help":
                assert f"`{parameter.opts[0]}" in section(page, heading), (name, parameter.opts)


TREES = ("llmos.drivers.errors", "llmos.syscalls.errors", "llmos.kernel.core.errors")


def errors(module: ModuleType) -> list[str]:
    return [
        name
        for name, value in vars(module).items()
        if inspect.isclass(value)
        and issubclass(value, LlmosError)
        and value.__module__ == module.__name__
    ]


@pytest.mark.parametrize("tree", TREES)
def test_every_error_of_the_trees_is_described(tree: str) -> None:
    text = text_of("docs/reference/errors.md")
    missing = [n for n in errors(import_module(tree)) if f"`{n}`" not in text]
    assert not missing


def test_every_metric_is_described() -> None:
    from llmos.kernel.metrics import REGISTRY

    text = text_of("docs/reference/metrics.md")
    named = set(re.findall(r"^\| `(llmos_\w+)` \|", text, re.MULTILINE))
    assert named == {metric.name for metric in REGISTRY.collect()}


SHOWN = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")


def test_every_test_that_shows_a_promise_exists() -> None:
    named = SHOWN.findall(text_of("docs/durability.md"))
    assert len(named) > 50
    functions = {file: text_of(file) for file in {f for f, _ in named} if (ROOT / file).is_file()}
    missing = [
        f"{file}::{name}"
        for file, name in named
        if not re.search(rf"^ *(async )?def {name}\(", functions.get(file, ""), re.MULTILINE)
    ]
    assert not missing


# ------------------------------------------------------------------ code in the pages


def test_the_agent_of_the_readme_is_a_program() -> None:
    (code,) = blocks("README.md", "python")
    found: dict[str, object] = {"__name__": "readme_agent"}
    exec(compile(code, "README.md", "exec"), found)
    program = found["Librarian"]
    assert list(program.handlers) == ["Question"]  # type: ignore[attr-defined]
    lines = [line for line in code.splitlines() if line.strip()]
    assert len(lines) <= 15


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_code_blocks_can_be_read(page: Path) -> None:
    for code in blocks(name_of(page), "python"):
        # Examples show handlers and table rows out of their context.
        wrapped = "async def example():\n" + "\n".join(f"    {x}" for x in code.splitlines())
        ast.parse(wrapped)
    for code in blocks(name_of(page), "toml"):
        tomllib.loads(code)


@pytest.mark.parametrize("page", ["README.md", "docs/tutorial.md"])
def test_the_system_files_of_the_pages_are_valid(page: str) -> None:
    files = [code for code in blocks(page, "toml") if "[models." in code]
    assert files
    for code in files:
        config = SystemConfig.parse(code, page, ROOT)
        assert [a.program for a in config.agents] == ["librarian:Librarian"]


@pytest.mark.models
async def test_the_example_of_structured_output_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.agents.local import Local

    models = Path(Settings().models_dir)
    if not (models / "smollm2-135m-instruct").is_dir():
        pytest.skip("SmolLM2 is not in the model store")
    code, *_ = blocks("docs/how-to/structured-output.md", "python")
    (tmp_path / "structured_clerk.py").write_text(code, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    system = """
    [models.chat]
    engine = "causal"
    source = "smollm2-135m-instruct"

    [tools.prices]
    driver = "memory"

    [[agents]]
    program = "structured_clerk:Clerk"
    tenant = "shop"
    """
    local = Local(SystemConfig.parse(system, "system.toml", tmp_path), models_dir=models)
    try:
        module = import_module("structured_clerk")
        letter = module.Letter(text="Please send 12 red pens at once. Number: P-417")
        read = await local.tell("shop/clerk/main", letter)
        # A model this small may get the content wrong, but never the form.
        assert 1 <= read.count <= 99
        assert 0 < len(read.item) <= 40
        assert re.fullmatch(r"[A-Z]-\d{3}", read.number)
        assert read.price
    finally:
        local.close()


def test_the_rules_of_the_tutorial_decide() -> None:
    clips = pytest.importorskip("llmos.drivers.rules.clips")
    from llmos.drivers.protocols import Fact

    (source,) = blocks("docs/tutorial.md", "clips")
    rules = clips.ClipsRuleBase("fees.clp", source)
    for days, action in ((3, "free"), (12, "fee")):
        decision = rules.evaluate([Fact("loan", {"days-late": days})]).first("decision")
        assert decision is not None
        assert decision.slots["action"] == action
