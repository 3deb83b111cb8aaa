"""``llmos top``: memory, slots, tenants, agents and hosts as they are, again every second."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from llmos.shell import render
from llmos.shell.common import Address, AsJson, System, connected, print_json
from llmos.shell.tables import age

if TYPE_CHECKING:
    from llmos.kernel.client import Kernel

WIDE = 110
"""Columns from which on there is room for the longer form."""
AGENTS = 10
"""Agents shown, where the height is no limit."""
BAR = {True: 30, False: 16}
"""Width of a bar, wide or not."""
_COLOURS = ("cyan", "green", "magenta", "yellow", "blue", "red")
_STYLES = {"up": "green", "ready": "green", "loading": "yellow", "starting": "yellow"}


def top(
    once: Annotated[bool, typer.Option("--once", help="Print it once and end.")] = False,
    interval: Annotated[
        float, typer.Option(help="Seconds between two looks.", min=0.2, max=3600)
    ] = 1.0,
    system: System = None,
    address: Address = None,
    as_json: AsJson = False,
) -> None:
    """Show who uses what: memory by owner, slots, tenants, agents, hosts."""
    with connected(system, address, as_json) as kernel:
        if as_json:
            print_json(kernel.top())
            return
        console = render.console()
        if once or not console.is_terminal:
            console.print(page(kernel.top(), console.width))
            return
        try:
            _follow(kernel, interval)
        except KeyboardInterrupt:
            return  # That is how one leaves.


def _follow(kernel: Kernel, interval: float) -> None:
    console = render.console()
    # A screen of its own: what stood in the terminal before is there again afterwards.
    with Live(console=console, screen=True, auto_refresh=False) as live:
        while True:
            began = time.monotonic()
            shown = page(kernel.top(), console.width, console.height)
            live.update(shown, refresh=True)
            time.sleep(max(0.0, interval - (time.monotonic() - began)))


# -------------------------------------------------------------------- the page


def page(state: dict[str, Any], width: int, height: int | None = None) -> RenderableType:
    """One look, for a terminal of this width; with a height, agents fill what is left of it."""
    wide = width >= WIDE
    head = Text(f"{state['system']}", style="bold")
    head.append(
        f"   up {age(state['uptime_s'])}   {state['launched']} launched   policy {state['policy']}",
        style="not bold",
    )
    tables = [
        _devices(state, wide),
        _slots(state, wide),
        _tenants(state, wide),
        _hosts(state),
    ]
    # Each table is a line of headings, its rows and a blank line.
    used = 2 + sum(len(t.rows) + 2 for t in tables) + 1
    room = AGENTS if height is None else max(1, height - used)
    parts: list[RenderableType] = [head, Text()]
    for made in (*tables[:3], _agents(state, room), tables[3]):
        parts += [made, Text()]
    return Group(*parts[:-1])


def _table(*columns: str) -> Table:
    """Columns that begin with ``>`` hold numbers."""
    made = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold dim")
    for column in columns:
        number = column.startswith(">")
        made.add_column(
            column.removeprefix(">"),
            justify="right" if number else "left",
            no_wrap=True,
            overflow="ellipsis",
        )
    return made


def _word(state: str) -> Text:
    return Text(state, style=_STYLES.get(state, "red" if state in ("failed", "given up") else ""))


def _devices(state: dict[str, Any], wide: bool) -> Table:
    names = ("DEVICE", "STATE", ">HELD", ">OF", "MEMORY BY OWNER (LEDGER)")
    made = _table(*names[:2], *((">IN USE", ">BUSY") if wide else ()), *names[2:])
    for device in state["devices"]:
        owners = sorted(device["owners"].items(), key=lambda o: -o[1])
        capacity = device["capacity_bytes"]
        busy = device["utilisation"]
        real = (
            size(device["used_bytes"]),
            f"{busy:.0%}" if busy is not None else "",
        )
        made.add_row(
            device["name"],
            _word(device["state"]),
            *(real if wide else ()),
            size(capacity - device["free_bytes"]),
            size(capacity),
            _memory(owners, capacity, wide),
        )
    return made


def _memory(owners: list[tuple[str, int]], capacity: int, wide: bool) -> Text:
    """A bar with a part for each owner, and who they are."""
    text, width, drawn = Text(), BAR[wide], 0
    for number, (_, held) in enumerate(owners):
        cells = min(round(width * held / capacity) if capacity else 0, width - drawn)
        text.append("█" * cells, style=_COLOURS[number % len(_COLOURS)])
        drawn += cells
    text.append("░" * (width - drawn), style="dim")
    for number, (name, held) in enumerate(owners):
        text.append("  ")
        text.append(name, style=_COLOURS[number % len(_COLOURS)])
        text.append(f" {size(held)}")
    return text


def _slots(state: dict[str, Any], wide: bool) -> Table:
    wide_columns = (">CACHED", ">PREEMPTED", ">ADAPTERS") if wide else (">CACHED",)
    made = _table(
        *("MODEL", "STATE", *(("DEVICE",) if wide else ()), ">RUN", ">WAIT", ">KV USED"),
        *(*wide_columns, ">READ/S", ">WRITTEN/S", ">STEP"),
        *(("",) if wide else ()),
    )
    for slot in state["slots"]:
        counts = slot["statistics"]
        causal = counts is not None and slot["kind"] == "causal"
        kv = cached = preempted = adapters = ""
        if causal and counts["kv_tokens"]:
            kv = f"{counts['kv_tokens_used'] / counts['kv_tokens']:.0%}"
            kv = f"{kv} of {short(counts['kv_tokens'])}" if wide else kv
            cached = f"{counts['kv_tokens_cached'] / counts['kv_tokens']:.0%}"
        if causal:
            preempted, adapters = str(counts["preempted"]), str(len(counts["adapters"]))
        made.add_row(
            slot["model"],
            _word(slot["state"]),
            *((slot["device"] or "",) if wide else ()),
            str(counts["running"]) if causal else "",
            str(counts["waiting"]) if causal else "",
            kv,
            cached,
            *((preempted, adapters) if wide else ()),
            f"{slot['read_per_s']:.0f}" if causal else "",
            f"{slot['written_per_s']:.0f}" if causal else "",
            render.seconds(slot["step_s"]) if slot["step_s"] is not None else "",
            *((Text(slot["error"] or "", style="red"),) if wide else ()),
        )
    for name in state["missing_models"]:
        made.add_row(name, _word("failed"))
    return made


def _tenants(state: dict[str, Any], wide: bool) -> Table:
    made = _table(
        *("TENANT", ">WEIGHT", ">SHARE", *(("",) if wide else ()), ">READ", ">WRITTEN"),
        *(">REQUESTS", f"QUOTA (LAST {state['window_s']} S)"),
    )
    for tenant in state["tenants"]:
        tokens = tenant["read"] + tenant["written"]
        quota = []
        words = (" of ", "tokens", "requests") if wide else ("/", "tok", "req")
        used_up = False
        for used, most, what in (
            (tokens, tenant["tokens_per_minute"], words[1]),
            (tenant["under_way"], tenant["concurrent_requests"], words[2]),
        ):
            if most:
                quota.append(f"{short(used)}{words[0]}{short(most)} {what}")
                used_up = used_up or used >= most
        full = round(20 * tenant["share"])
        made.add_row(
            tenant["tenant"],
            f"{tenant['weight']:g}",
            f"{tenant['share']:.0%}",
            *((Text("█" * full + "░" * (20 - full), style="cyan"),) if wide else ()),
            short(tenant["read"]),
            short(tenant["written"]),
            str(tenant["under_way"]),
            Text(", ".join(quota) or "none", style="red" if used_up else "" if quota else "dim"),
        )
    return made


def _agents(state: dict[str, Any], rows: int) -> Table:
    made = _table("AGENT WITH MOST SERVICE", ">READ", ">WRITTEN")
    shown = state["agents"][:rows]
    for agent in shown:
        made.add_row(agent["agent"], short(agent["read"]), short(agent["written"]))
    if not shown:
        made.add_row(Text(f"no tokens in the last {state['window_s']} s", style="dim"))
    return made


def _hosts(state: dict[str, Any]) -> Table:
    made = _table("HOST", "STATE", ">AGENTS IN MEMORY", ">TURNS RUNNING", ">MESSAGES WAITING")
    for host in state["hosts"]:
        made.add_row(
            host["name"],
            _word(host["state"]),
            *("" if host[k] is None else str(host[k]) for k in ("active", "running", "waiting")),
        )
    return made


# -------------------------------------------------------------------- figures


def size(size_bytes: int | None) -> str:
    """Bytes in four figures at most: ``812M``, ``1.2G``; of nothing known ``?``."""
    if size_bytes is None:
        return "?"
    return _scaled(float(size_bytes), 1024.0, ("", "K", "M", "G", "T"))


def short(count: int) -> str:
    """A count in four figures at most: ``940``, ``12k``, ``1.2M``."""
    return _scaled(float(count), 1000.0, ("", "k", "M", "G", "T"))


def _scaled(value: float, step: float, units: tuple[str, ...]) -> str:
    for unit in units:
        if value < step * 0.9995 or unit == units[-1]:
            break
        value /= step
    digits = 1 if unit and value < 10 else 0
    return f"{value:.{digits}f}{unit}"
