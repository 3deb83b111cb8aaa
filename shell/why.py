"""``llmos why-waiting``: what an agent waits for, in sentences."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated, Any

import typer
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from llmos.shell import render
from llmos.shell.common import Address, AsJson, System, connected, print_json

_STYLES = {"hold": "red", "quota": "red", "host": "yellow", "device": "yellow", "slot": "yellow"}


def why_waiting(
    agent: Annotated[str, typer.Argument(help="Its id, or an unambiguous part of it.")],
    system: System = None,
    address: Address = None,
    as_json: AsJson = False,
) -> None:
    """Say what an agent waits for: its mailbox, a model, another agent, a tool, a timer."""
    with connected(system, address, as_json) as kernel:
        found = kernel.why(agent)
        print_json(found) if as_json else render.console().print(page(found))


def page(found: dict[str, Any]) -> RenderableType:
    """The tree of reasons, each under what it holds up."""
    where = f" on {found['host']}" if found["host"] else ""
    head = Text(found["agent"], style="bold").append(where, style="not bold dim")
    return Group(head, *_lines(found["reasons"], 0))


def _lines(reasons: Sequence[dict[str, Any]], depth: int) -> Iterator[RenderableType]:
    for reason in reasons:
        style = _STYLES.get(reason["what"], "" if depth == 0 else "cyan")
        # In a column of its own, so that what is wrapped stands beside the mark.
        line = Table.grid()
        line.add_column(no_wrap=True)
        line.add_column(ratio=1)
        mark = "" if depth == 0 else "  " * depth + "└ "
        line.add_row(mark, Text(reason["text"], style=style))
        if reason.get("story") and isinstance(reason["story"], str):
            line.add_row("", Text(reason["story"], style="dim"))
        yield line
        yield from _lines(reason["under"], depth + 1)
