"""``llmos adapters``: LoRA weights of a running system: list, load, unload."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from llmos.shell import render
from llmos.shell.common import Address, AsJson, System, connected, print_json

app = typer.Typer(
    name="adapters", help="LoRA adapters of the models of a system.", no_args_is_help=True
)

Name = Annotated[str, typer.Argument(help="What agents call it.")]


@app.command("list")
def list_(system: System = None, address: Address = None, as_json: AsJson = False) -> None:
    """List the adapters."""
    with connected(system, address, as_json) as kernel:
        rows = kernel.adapters()
        print_json(rows) if as_json else render.console().print(_table(rows))


@app.command()
def load(
    name: Name,
    path: Annotated[Path, typer.Argument(help="Folder as peft saves it.")],
    model: Annotated[str, typer.Option(help="The model of the system that it changes.")],
    tenant: Annotated[
        str | None, typer.Option(help="Whose it is; without, every tenant may be given it.")
    ] = None,
    sensitivity: Annotated[
        str, typer.Option(help="Of what it was trained on; its answers carry it.")
    ] = "internal",
    system: System = None,
    address: Address = None,
    as_json: AsJson = False,
) -> None:
    """Add an adapter, or replace it by a new version, while the system runs.

    It is known until the system stops; what is to stay goes into the system file.
    """
    with connected(system, address, as_json) as kernel:
        row = kernel.load_adapter(
            name, model, path.absolute(), tenant=tenant, sensitivity=sensitivity
        )
        if as_json:
            print_json(row)
        else:
            typer.echo(f"{name} of {model}: {row['state']}, {row['size_bytes']} bytes")


@app.command()
def unload(
    name: Name, system: System = None, address: Address = None, as_json: AsJson = False
) -> None:
    """Refuse new requests for an adapter; those that run go on with it."""
    with connected(system, address, as_json) as kernel:
        kernel.unload_adapter(name)
        print_json({"unloaded": name}) if as_json else typer.echo(f"unloaded {name}")


def _table(rows: list[dict[str, Any]]) -> Table:
    table = Table(box=None, pad_edge=False)
    for column in ("NAME", "MODEL", "TENANT", "STATE", "BYTES", "PATH"):
        table.add_column(column, overflow="fold")
    for row in rows:
        state = f"failed: {row['error']}" if row["error"] else row["state"]
        cells = (row["name"], row["model"], row["tenant"] or "", state)
        # As Text, since names and reasons may hold what rich takes for markup.
        table.add_row(*map(Text, (*cells, str(row["size_bytes"]), row["path"])))
    return table
