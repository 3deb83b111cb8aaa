"""Answers, turns and status for the terminal."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import Console, Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from llmos.agents.messages import Answer
from llmos.drivers.protocols import SyscallRow, TurnRow
from llmos.kernel import record
from llmos.kernel.core.errors import gib
from llmos.syscalls.messages import Message, RawMessage

_STYLES = {
    "up": "green",
    "ready": "green",
    "ok": "green",
    "done": "green",
    "error": "red",
    "failed": "red",
    "given up": "red",
    "denied": "magenta",
    "cancelled": "yellow",
    "starting": "yellow",
    "waiting": "yellow",
    "loading": "yellow",
}


def console() -> Console:
    """Standard output; wide enough to read where it is not a terminal."""
    # No markup: what users and models write is full of brackets and colons.
    made = Console(highlight=False, markup=False, emoji=False)
    if not made.is_terminal:
        made = Console(highlight=False, markup=False, emoji=False, width=110)
    return made


def _styled(word: str) -> Text:
    return Text(word, style=_STYLES.get(word, ""))


def seconds(value: float) -> str:
    """A duration for people."""
    if value < 0.001:
        return f"{value * 1e6:.0f} µs"
    return f"{value * 1e3:.0f} ms" if value < 1 else f"{value:.2f} s"


def answer(message: Message) -> RenderableType:
    """An answer with its sources, the rules that fired and its notice."""
    if not isinstance(message, Answer):
        body = message.body if isinstance(message, RawMessage) else message.model_dump(mode="json")
        return Text("\n".join(f"{k}: {v}" for k, v in body.items()))
    parts: list[RenderableType] = [Text(message.text)]
    if message.notice:
        parts.append(Text(message.notice, style="italic yellow"))
    facts = [f"decision: {message.decision}"] if message.decision else []
    facts.append(f"grounded: {message.grounded}")
    facts.append(f"confidence: {message.confidence:.2f}")
    parts.append(Text("  ".join(facts), style="dim"))
    if message.rules:
        table = Table(box=None, show_header=False, padding=(0, 1, 0, 0))
        for fired in message.rules:
            table.add_row(
                Text("rule", style="cyan"),
                Text(fired.rule, style="bold"),
                Text(fired.comment or "; ".join(fired.because)),
            )
        parts.append(table)
    if message.sources:
        table = Table(box=None, show_header=False, padding=(0, 1, 0, 0))
        for source in message.sources:
            quote = " ".join(source.quote.split())
            table.add_row(
                Text(f"[{source.number}]", style="cyan"),
                Text(str(source.provenance), style="blue"),
                Text(quote if len(quote) <= 70 else quote[:69] + "…", style="dim"),
            )
        parts.append(table)
    return Group(*parts)


def where_time_went(syscalls: Sequence[SyscallRow], elapsed_s: float) -> str:
    """The time of a turn by syscall, largest first. Overlapping calls count each."""
    spent: dict[str, tuple[float, int]] = {}
    for row in syscalls:
        name = f"{row.name} {row.resource}".strip()
        total, count = spent.get(name, (0.0, 0))
        spent[name] = (total + row.elapsed_s, count + 1)
    parts = [
        f"{name}{f' ×{count}' if count > 1 else ''} {seconds(total)}"
        for name, (total, count) in sorted(spent.items(), key=lambda item: -item[1][0])
    ]
    return f"{seconds(elapsed_s)} in all: " + ", ".join(parts)


def question(
    agent: str,
    text: str,
    body: RenderableType,
    footer: str,
    number: int | None = None,
    note: str = "",
) -> Panel:
    """A question with what came of it."""
    title = f"{number}. {agent}" if number is not None else agent
    return Panel(
        Group(Text(f"“{text}”", style="bold"), Text(), body, Text(), Text(footer, style="dim")),
        title=Text(title),
        title_align="left",
        box=box.ROUNDED,
    )


def turn(row: TurnRow, syscalls: Sequence[SyscallRow]) -> RenderableType:
    """A turn, syscall by syscall."""
    head = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    started = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(row.started_at))
    head.add_row("turn", row.turn)
    head.add_row("agent", f"{row.agent}  (epoch {row.epoch})")
    head.add_row("message", f"{row.kind} {record.unpack(row.message)}")
    head.add_row("cause", row.cause)
    head.add_row("started", f"{started}, took {seconds(row.elapsed_s)}")
    head.add_row("status", _styled(row.status.value))
    if row.error:
        head.add_row("error", Text(row.error, style="red"))
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1))
    for column in ("#", "at", "took", "syscall", "status", "request → result"):
        table.add_column(column, justify="right" if column in ("#", "at", "took") else "left")
    for s in syscalls:
        table.add_row(
            str(s.seq),
            seconds(s.started_s),
            seconds(s.elapsed_s),
            Text(f"{s.name} {s.resource}".strip(), style="bold"),
            _styled(s.status),
            _summary(s),
        )
    reply = record.unpack(row.reply)
    shown: list[RenderableType] = [head, table]
    if isinstance(reply, dict):
        shown.append(Text(f"reply: {reply.get('text', reply)}"))
    shown.append(Text(where_time_went(syscalls, row.elapsed_s), style="dim"))
    return Group(*shown)


def _summary(row: SyscallRow) -> Group:
    """What went in and came out, in a few lines."""
    request, result = record.unpack(row.request), record.unpack(row.result)
    lines: list[Text] = []
    asked = {k: v for k, v in request.items() if v not in (row.resource, None, "", [], ())}
    lines.append(Text(_cut(", ".join(f"{k}={_plain(v)}" for k, v in asked.items()), 150)))
    if row.status != "ok":
        lines.append(Text(_cut(f"{result['error']}: {result['message']}", 200), style="red"))
    elif row.name == "Evaluate":
        lines += [
            Text(f"→ {fired['rule']}  {_cut(fired['comment'], 90)}", style="cyan")
            for fired in result["fired"]
            if isinstance(fired, dict)
        ]
    elif row.name == "Generate":
        speed = result["new_tokens"] / result["run_s"] if result["run_s"] else 0.0
        lines.append(
            Text(
                f"→ {result['prompt_tokens']} + {result['new_tokens']} tokens, "
                f"{speed:.1f} tokens/s: {_cut(result['text'], 90)}",
                style="green",
            )
        )
    else:
        shown = ", ".join(f"{k}={_plain(v)}" for k, v in result.items() if k != "passages")
        if shown:
            lines.append(Text(_cut(f"→ {shown}", 150), style="green"))
        lines += [
            Text(f"→ {p['score']:.2f} {_cut(p['title'] + ': ' + p['text'], 90)}", style="green")
            for p in result.get("passages", [])
            if isinstance(p, dict)
        ]
    sources = record.unpack(row.provenance) or []
    if sources:
        names = dict.fromkeys(
            f"{s['source']}@{s['version'][:8]}" if s["version"] else s["source"] for s in sources
        )
        lines.append(Text(_cut("from " + ", ".join(names), 150), style="blue"))
    return Group(*lines)


def _plain(value: Any) -> str:
    return " ".join(str(value).split())


def _cut(text: str, limit: int) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= limit else flat[: limit - 1] + "…"


def agents(rows: Sequence[dict[str, Any]]) -> RenderableType:
    """``llmos ps``."""
    if not rows:
        return Text("No agent is launched. Launch one: llmos launch module:Class")
    table = Table(box=None, pad_edge=False)
    for column in ("AGENT", "STATE", "HOST", "MODELS", "PROGRAM"):
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(
            row["agent"],
            _styled(row["state"]),
            row["host"],
            ", ".join(row["models"]),
            row["program"],
        )
    return table


def status(state: dict[str, Any]) -> RenderableType:
    """``llmos status``."""
    processes = Table(box=None, pad_edge=False)
    for column in ("PROCESS", "STATE", "STARTS", "LAST LOST BECAUSE"):
        processes.add_column(column, overflow="fold")
    for p in state["processes"]:
        processes.add_row(p["name"], _styled(p["state"]), str(p["incarnation"]), p["reason"])
    devices = Table(box=None, pad_edge=False)
    for column in ("DEVICE", "BUDGET", "FREE", "IN USE", "THREADS", "HELD BY"):
        devices.add_column(column, overflow="fold")
    for d in state["devices"]:
        owners = ", ".join(f"{o} {gib(b['reserved'])}" for o, b in d["owners"].items())
        used = gib(d["used_bytes"]) if d["used_bytes"] is not None else "?"
        devices.add_row(
            f"{d['name']} {d['product']}".strip(),
            gib(d["capacity_bytes"]),
            gib(d["free_bytes"]),
            used,
            str(d["threads"]),
            owners or "nobody",
        )
    slots = Table(box=None, pad_edge=False)
    for column in (
        "MODEL",
        "SLOT",
        "DEVICE",
        "PREDICTED",
        "MEASURED",
        "AGENTS",
        "RUNNING",
        "ERROR",
    ):
        slots.add_column(column, overflow="fold")
    for s in state["slots"]:
        counters = s["statistics"] or {}
        slots.add_row(
            f"{s['model']} ({s['source']})",
            _styled(s["state"]),
            s["device"] or "",
            gib(s["predicted_bytes"]),
            gib(s["measured_bytes"]) if s["measured_bytes"] is not None else "",
            str(s["users"]),
            f"{counters.get('running', 0)} + {counters.get('waiting', 0)} waiting",
            s["error"] or "",
        )
    for name, error in state["missing_models"].items():
        slots.add_row(name, _styled("failed"), "", "", "", "", "", error)
    knowledge = Table(box=None, pad_edge=False)
    for column in ("KNOWLEDGE", "SIZE", "STATE"):
        knowledge.add_column(column, overflow="fold")
    for name, c in state["knowledge"]["corpora"].items():
        done = c["error"] or ("ready" if c["ready"] else f"{c['embedded']} embedded")
        skipped = f", {len(c['skipped'])} files left out" if c["skipped"] else ""
        knowledge.add_row(f"corpus {name}", f"{c['passages']} passages{skipped}", _styled(done))
    for name, g in state["knowledge"]["graphs"].items():
        done = g["error"] or ("ready" if g["ready"] else "loading")
        size = f"{g['nodes']} nodes, {g['edges']} edges"
        knowledge.add_row(f"graph {name}", size, _styled(done))
    up = seconds(max(0.0, time.time() - state["started_at"]))
    head = Text(f"System {state['system']}, up for {up}, {state['agents']} agents", style="bold")
    return Group(head, Text(), processes, Text(), devices, Text(), slots, Text(), knowledge)


def turns(rows: Sequence[TurnRow]) -> RenderableType:
    """``llmos strace`` without a turn: the newest."""
    table = Table(box=None, pad_edge=False)
    for column in ("TURN", "AGENT", "MESSAGE", "TOOK", "STATUS", ""):
        table.add_column(column, overflow="fold")
    for row in rows:
        body = record.unpack(row.message)
        text = body.get("text", "") if isinstance(body, dict) else ""
        table.add_row(
            row.turn,
            row.agent,
            f"{row.kind} {_cut(str(text), 50)}",
            seconds(row.elapsed_s),
            _styled(row.status.value),
            _cut(row.error, 60),
        )
    return table
