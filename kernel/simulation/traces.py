"""Traces: recorded ones read from their files, and made-up ones by a seed."""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from llmos.drivers.errors import LlmosError
from llmos.kernel.simulation.jobs import Call, Job, Trace

CHARS_PER_TOKEN = 4
"""Of English text, for recordings that count characters."""
MOONCAKE_BLOCK = 512
"""Tokens of one of its blocks."""


class TraceError(LlmosError):
    """A trace cannot be read."""

    def __init__(self, path: str, reason: str, *, remedy: str = "") -> None:
        self.path, self.reason = path, reason
        super().__init__(f"Trace {path}: {reason}", remedy=remedy)


def read(path: Path, *, limit: int | None = None) -> Trace:
    """Read a recorded trace; its kind is told by its first line.

    Mooncake (``hash_ids``: blocks of 512 tokens), Azure (CSV of context and generated tokens),
    and recorded agent runs (``llm_calls``: one line a run, no times, see :func:`agent_runs`).

    Raises:
        TraceError: no such file, or none of these.
    """
    try:
        with path.open(encoding="utf-8") as file:
            head = file.readline()
    except (OSError, UnicodeDecodeError) as error:
        raise TraceError(str(path), str(error)) from None
    try:
        if "hash_ids" in head:
            return mooncake(path, limit=limit)
        if "llm_calls" in head:
            return agent_runs(path, limit=limit)
        if "context_tokens" in head.lower() or "contexttokens" in head.lower():
            return azure(path, limit=limit)
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise TraceError(str(path), f"{type(error).__name__}: {error}") from None
    raise TraceError(
        str(path), "its kind is not known", remedy="Known: Mooncake JSONL, Azure CSV, agent runs"
    )


def mooncake(path: Path, *, limit: int | None = None) -> Trace:
    """Requests of a chat service with the blocks of their prompts; each a job of its own."""
    jobs = []
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file):
            if number == limit:
                break
            row = json.loads(line)
            prompt, new = int(row["input_length"]), max(1, int(row["output_length"]))
            blocks = tuple(
                (block, min(MOONCAKE_BLOCK, prompt - at * MOONCAKE_BLOCK))
                for at, block in enumerate(row["hash_ids"])
                if prompt > at * MOONCAKE_BLOCK
            )
            call = Call(prompt, new, _asked(new), blocks)
            jobs.append(Job(number, "all", "chat", row["timestamp"] / 1000, (call,)))
    return _sorted("mooncake", jobs, path)


def azure(path: Path, *, limit: int | None = None) -> Trace:
    """Requests of a conversation service; each a job of its own."""
    jobs = []
    with path.open(encoding="utf-8", newline="") as file:
        rows = csv.reader(file)
        next(rows)
        for number, (time, context, new) in enumerate(rows):
            if number == limit:
                break
            # Python's parser takes six digits of a second, the file has seven.
            at = datetime.fromisoformat(time[:26]).timestamp()
            tokens = max(1, int(new))
            call = Call(max(1, int(context)), tokens, _asked(tokens))
            jobs.append(Job(number, "all", "chat", at, (call,)))
    return _sorted("azure", jobs, path)


def agent_runs(path: Path, *, limit: int | None = None, copies: int = 10, seed: int = 0) -> Trace:
    """Recorded runs of one agent program as chains of calls.

    The file tells no times, so runs are drawn again (``copies`` times as many as there are)
    with Poisson arrivals, and tools take half a second to two seconds.
    """
    runs = [json.loads(line)["llm_calls"] for line in path.read_text("utf-8").splitlines()]
    runs = [r for r in runs if r]
    chance = random.Random(seed)
    jobs: list[Job] = []
    at = 0.0
    for number in range(limit if limit is not None else copies * len(runs)):
        at += chance.expovariate(1.0)
        calls = []
        before = 0
        blocks: tuple[tuple[int, int], ...] = ()
        for step, row in enumerate(chance.choice(runs)):
            prompt = max(1, row["context_chars"] // CHARS_PER_TOKEN)
            new = max(1, row["output_chars"] // CHARS_PER_TOKEN)
            if prompt < before:
                blocks, before = (), 0  # The run began its conversation anew.
            kept = (number * 1000 + step, prompt + new - before)
            calls.append(Call(prompt, new, 512, blocks, kept, chance.uniform(0.5, 2.0)))
            blocks, before = (*blocks, kept), prompt + new
        jobs.append(Job(number, "airline", "clerk", at, tuple(calls)))
    return _sorted("agent-runs", jobs, path)


def _asked(new: int) -> int:
    """What a client asks for that does not know the length of its answer."""
    return 2048 if new <= 2048 else new


def _sorted(name: str, jobs: list[Job], path: Path) -> Trace:
    if not jobs:
        raise TraceError(str(path), "it holds no request")
    return Trace(name, sorted(jobs, key=lambda j: j.arrival_s))


# ---------------------------------------------------------------- made up


def pareto(chance: random.Random, alpha: float, least: float, most: float) -> float:
    """A number of the bounded Pareto law."""
    low, high = least**-alpha, most**-alpha
    return float((low - chance.random() * (low - high)) ** (-1 / alpha))


@dataclass(frozen=True, slots=True)
class Shape:
    """What the turns of a made-up program are like."""

    share: float
    """Of the turns."""
    least_calls: int
    alpha: float
    """Exponent of the Pareto law of the number of calls: the lower, the heavier its tail."""
    most_calls: int
    answer_tokens: int
    """Mean of an exponential law."""
    first_prompt_tokens: int
    step_tokens: int
    """Mean of what a tool adds to the next prompt."""


LONGEST_PROMPT = 4_000
"""A made-up conversation that would be longer begins anew, as agents do that sum up."""

PROGRAMS = {
    "triage": Shape(0.45, 1, 3.0, 3, 40, 180, 40),
    "support": Shape(0.35, 2, 2.0, 20, 60, 350, 60),
    "analyst": Shape(0.15, 4, 1.5, 40, 90, 500, 80),
    "research": Shape(0.05, 8, 1.2, 80, 110, 600, 80),
}


def agents(
    jobs: int, *, seed: int, tenants: tuple[str, ...] = ("bank", "clinic"), pause_s: float = 1.0
) -> Trace:
    """Agents of several steps with heavy tails: four programs, from one call a turn to
    hundreds, the number of calls by a Pareto law and the length of answers by an exponential
    one. Each call's prompt is the former one, its answer, and what the tool said."""
    chance = random.Random(seed)
    names = list(PROGRAMS)
    shares = [shape.share for shape in PROGRAMS.values()]
    made = []
    at = 0.0
    for number in range(jobs):
        at += chance.expovariate(1.0)
        name = chance.choices(names, shares)[0]
        shape = PROGRAMS[name]
        first = shape.first_prompt_tokens
        count = int(pareto(chance, shape.alpha, shape.least_calls, shape.most_calls + 0.999))
        calls = []
        prompt = max(16, int(chance.gauss(first, first / 4)))
        blocks: tuple[tuple[int, int], ...] = ()
        before = 0
        for step in range(count):
            new = min(512, 1 + int(chance.expovariate(1 / shape.answer_tokens)))
            kept = (number * 1000 + step, prompt + new - before)
            calls.append(Call(prompt, new, 512, blocks, kept, chance.expovariate(1 / pause_s)))
            blocks, before = (*blocks, kept), prompt + new
            prompt = before + 1 + int(chance.expovariate(1 / shape.step_tokens))
            if prompt > LONGEST_PROMPT:
                blocks, before, prompt = (), 0, first
        made.append(Job(number, chance.choice(tenants), name, at, tuple(calls)))
    return Trace("agents", made)


def backlog(jobs: int, *, seed: int, flood: int = 1) -> Trace:
    """Two tenants that always have something waiting: all is there at the beginning. ``light``
    asks for short answers, ``heavy`` for long ones, ``flood`` times as many."""
    chance = random.Random(seed)
    made = []
    for number in range(jobs * (1 + flood)):
        heavy = number % (1 + flood) != 0
        prompt = chance.randint(64, 256) if not heavy else chance.randint(128, 1024)
        new = chance.randint(16, 64) if not heavy else chance.randint(64, 384)
        call = Call(prompt, new, 512)
        tenant = "heavy" if heavy else "light"
        # The light tenant comes last: a queue in order of arrival serves it last.
        made.append(Job(number, tenant, "chat", 0.0 if heavy else 0.001, (call,)))
    return Trace("backlog", sorted(made, key=lambda j: j.arrival_s))


MADE_UP: dict[str, Callable[[int, int], Trace]] = {
    "agents": lambda jobs, seed: agents(jobs, seed=seed),
    "backlog": lambda jobs, seed: backlog(jobs, seed=seed),
}
"""By name: from a number of jobs and a seed."""
