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
from llmos.kernel.core.errors import gib
from llmos.shell.trace import Step, Trace
from llmos.syscalls.messages import Message, RawMessage

_STYLES = {
    "up": "green",
    "ready": "green",
    "ok": "green",
    "done": "green",
    "identical": "green",
    "error": "red",
    "unknown": "red",
    "quarantined": "red",
    "unknown effect": "red",
    "different": "red",
    "failed": "red",
    "given up": "red",
    "denied": "magenta",
    "cancelled": "yellow",
    "running": "yellow",
    "mark": "cyan",
    "starting": "yellow",
    "waiting": "yellow",
    "loading": "yellow",
}


NODE_CHARS = 8
"""Of a node's id are shown."""


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


def where_time_went(steps: Sequence[Step], elapsed_s: float) -> str:
    """The time of a turn by syscall, largest first. Overlapping calls count each."""
    spent: dict[str, tuple[float, int]] = {}
    for row in steps:
        if row.status == "mark":
            continue
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


def turn(trace: Trace) -> RenderableType:
    """A turn, call by call."""
    head = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    started = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(trace.started_at))
    took = f"took {seconds(trace.elapsed_s)}" if trace.elapsed_s is not None else "has no end yet"
    head.add_row("turn", trace.turn)
    head.add_row("agent", f"{trace.agent}  (epoch {trace.epoch}, code {trace.code_version})")
    head.add_row("message", f"{trace.kind} {trace.message}" if trace.kind else "(no end yet)")
    head.add_row("cause", trace.cause or f"from {trace.sender}" if trace.kind else "")
    head.add_row("started", f"{started}, {took}")
    head.add_row("status", _styled(trace.status))
    if trace.elapsed_s is not None:
        change = f"change {trace.base} → {trace.base + 1}" if trace.changed else "not changed"
        head.add_row("state", change)
    if trace.error:
        head.add_row("error", Text(trace.error_text(), style="red"))
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1))
    for column in ("#", "at", "took", "syscall", "status", "request → result"):
        table.add_column(column, justify="right" if column in ("#", "at", "took") else "left")
    for step in trace.steps:
        mark = step.status == "mark"
        table.add_row(
            "" if mark else str(step.seq),
            seconds(step.started_s),
            "" if mark else seconds(step.elapsed_s),
            Text(f"{step.name} {step.resource}".strip(), style="cyan" if mark else "bold"),
            _styled(step.status),
            _MARK_WORDS.get(step.name, "") if mark else _summary(step),
        )
    shown: list[RenderableType] = [head, table]
    if isinstance(trace.reply, dict):
        shown.append(Text(f"reply: {trace.reply.get('text', trace.reply)}"))
    if trace.elapsed_s is not None:
        shown.append(Text(where_time_went(trace.steps, trace.elapsed_s), style="dim"))
    return Group(*shown)


_MARK_WORDS = {
    "Patched": "this turn runs the code after that change",
    "Retry": "a person has allowed another attempt",
}


def _summary(step: Step) -> Group:
    """What went in and came out, in a few lines."""
    request, result = step.request, step.result
    lines: list[Text] = []
    asked = {k: v for k, v in request.items() if v not in (step.resource, None, "", [], ())}
    lines.append(Text(_cut(", ".join(f"{k}={_plain(v)}" for k, v in asked.items()), 150)))
    if step.pieces and step.status == "running":
        lines.append(Text(f"{step.pieces} pieces handed out, no end recorded", style="yellow"))
    if step.status == "running":
        if isinstance(result, dict) and "text" in result:
            lines.append(Text(_cut(f"→ {result['text']} …", 150), style="yellow"))
    elif step.status == "unknown":
        lines.append(Text("nobody knows whether it was carried out", style="red"))
        lines.append(Text(f"llmos effects resolve {step.effect}", style="red"))
    elif step.status != "ok":
        error = result or {}
        text = f"{error.get('error', '?')}: {error.get('message', '')}"
        lines.append(Text(_cut(text, 200), style="red"))
    elif step.name == "Evaluate":
        lines += [
            Text(f"→ {fired['rule']}  {_cut(fired['comment'], 90)}", style="cyan")
            for fired in result["fired"]
            if isinstance(fired, dict)
        ]
    elif step.name == "Generate":
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
    sources = [s for s in step.provenance if isinstance(s, dict)]
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
    for column in ("AGENT", "STATE", "HOST", "HELD", "MODELS", "PROGRAM"):
        table.add_column(column, overflow="fold")
    for row in rows:
        name = row["agent"]
        if "keys" in row:
            name += f"  ({row['keys']}{'' if row['all_counted'] else ' or more'} agents)"
        held = row.get("held", [])
        table.add_row(
            name,
            _styled(row["state"]),
            row["host"],
            Text(_held_words(held), style="red"),
            ", ".join(row["models"]),
            row["program"],
        )
    return table


def _held_words(held: Sequence[str]) -> str:
    """Why one agent is held, or how many of a program's are."""
    if not held:
        return ""
    reason = held[0].partition(": ")[2]
    return reason or f"{len(held)}: llmos held"


def status(state: dict[str, Any]) -> RenderableType:
    """``llmos status``."""
    processes = Table(box=None, pad_edge=False)
    several = len(state.get("nodes", ())) > 1
    where = ("NODE", "ADDRESS") if several else ()
    for column in ("PROCESS", "STATE", "STARTS", *where, "LAST LOST BECAUSE"):
        processes.add_column(column, overflow="fold")
    for p in state["processes"]:
        at = (p["node"][:NODE_CHARS], p["address"]) if several else ()
        processes.add_row(p["name"], _styled(p["state"]), str(p["incarnation"]), *at, p["reason"])
    if several:
        kernel = next((n for n in state["nodes"] if n["kernel"]), {"id": "", "address": ""})
        processes.add_row("kernel", "", "", kernel["id"][:NODE_CHARS], kernel["address"], "")
        for node in state["nodes"]:
            if node["drained"]:
                at = (node["id"][:NODE_CHARS], node["address"])
                processes.add_row("(drained)", "", "", *at, "")
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


def turns(traces: Sequence[Trace]) -> RenderableType:
    """``llmos strace`` without a turn: the newest."""
    table = Table(box=None, pad_edge=False)
    for column in ("TURN", "AGENT", "MESSAGE", "TOOK", "STATUS", ""):
        table.add_column(column, overflow="fold")
    for trace in traces:
        body = trace.message
        text = body.get("text", "") if isinstance(body, dict) else ""
        table.add_row(
            trace.turn,
            trace.agent,
            f"{trace.kind} {_cut(str(text), 50)}",
            seconds(trace.elapsed_s or 0.0),
            _styled(trace.status),
            _cut(trace.error_text(), 60),
        )
    return table
