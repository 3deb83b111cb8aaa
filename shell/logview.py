"""Reading structured logs: merged over processes, filtered, followed."""

from __future__ import annotations

import heapq
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LEVELS = {"DEBUG": 10, "INFO": 20, "WARNING": 30, "ERROR": 40}
FOLLOW_S = 0.25
"""How often a followed folder is looked at."""


@dataclass(frozen=True)
class Line:
    """One record."""

    ts: float
    raw: str
    fields: dict[str, Any]

    def text(self) -> str:
        """For people."""
        f = self.fields
        when = (
            time.strftime("%H:%M:%S", time.localtime(self.ts)) + f".{int(self.ts % 1 * 1000):03d}"
        )
        who = " ".join(filter(None, (f.get("agent"), f.get("turn"))))
        tail = f"\n{f['exception']}" if "exception" in f else ""
        who = f" [{who}]" if who else ""
        return (
            f"{when} {f.get('level', '?'):7} {f.get('process', '?')}{who} {f.get('message')}{tail}"
        )


@dataclass(frozen=True)
class Filter:
    """Which records are wanted."""

    process: str | None
    agent: str | None
    turn: str | None
    level: int

    def wants(self, fields: dict[str, Any]) -> bool:
        """Whether this record is."""
        return (
            LEVELS.get(fields.get("level", ""), 50) >= self.level
            and (self.process is None or fields.get("process") == self.process)
            and (self.agent is None or self.agent in fields.get("agent", ""))
            and (self.turn is None or str(fields.get("turn", "")).startswith(self.turn))
        )


def _parse(raw: str) -> Line | None:
    """A record; None for a line that is cut off, as the last one of a killed process may be."""
    try:
        fields = json.loads(raw)
        return Line(float(fields["ts"]), raw, fields)
    except (ValueError, KeyError, TypeError):
        return None


def _file(path: Path, wanted: Filter) -> Iterator[Line]:
    with path.open(encoding="utf-8", errors="replace") as lines:
        for raw in lines:
            line = _parse(raw.rstrip("\n"))
            if line is not None and wanted.wants(line.fields):
                yield line


def read_lines(folder: Path, wanted: Filter) -> Iterator[Line]:
    """All records of all processes, in the order of time."""
    # Rotated files first: each file is in order, and so is their merge.
    files = [*sorted(folder.glob("*.jsonl.*"), reverse=True), *sorted(folder.glob("*.jsonl"))]
    yield from heapq.merge(*(_file(p, wanted) for p in files), key=lambda line: line.ts)


def follow_lines(folder: Path, wanted: Filter) -> Iterator[Line]:
    """Records as they come, until interrupted."""
    at = {p: p.stat().st_size for p in folder.glob("*.jsonl")}
    while True:
        fresh: list[Line] = []
        for path in folder.glob("*.jsonl"):
            size = path.stat().st_size
            seen = at.get(path, 0)
            if size < seen:
                seen = 0  # It was rotated.
            if size > seen:
                with path.open("rb") as file:
                    file.seek(seen)
                    data = file.read(size - seen)
                # A record that is still being written waits for the next look.
                whole = data[: data.rfind(b"\n") + 1]
                at[path] = seen + len(whole)
                for raw in whole.decode("utf-8", "replace").splitlines():
                    line = _parse(raw)
                    if line is not None and wanted.wants(line.fields):
                        fresh.append(line)
        yield from sorted(fresh, key=lambda line: line.ts)
        time.sleep(FOLLOW_S)
