"""Asking many questions side by side, and what came of each."""

from __future__ import annotations

import asyncio
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError
from rich.panel import Panel
from rich.text import Text

from llmos.agents.messages import Question
from llmos.drivers.errors import LlmosError
from llmos.drivers.stores.rows import JournalRow
from llmos.kernel.system import SystemFileError
from llmos.shell import render
from llmos.shell.trace import Trace
from llmos.syscalls.messages import Reply, Wire

if TYPE_CHECKING:
    from llmos.kernel.client import Kernel

MAX_SIDE_BY_SIDE = 64
"""Questions in flight at the same time."""


class Asked(BaseModel):
    """One question of ``[[questions]]``."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    agent: str
    text: str = Field(min_length=1)
    data: dict[str, JsonValue] = Field(default_factory=dict)
    note: str = ""
    """For whoever reads the file; shown beside the question."""


def read_questions(file: Path) -> list[Asked]:
    """Read ``[[questions]]``.

    Raises:
        SystemFileError: naming the question and the field.
    """
    try:
        data = tomllib.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SystemFileError(str(file), "no such file") from None
    except (ValueError, RecursionError, OSError) as error:
        raise SystemFileError(str(file), str(error)) from None
    questions = data.get("questions", [])
    if not isinstance(questions, list) or not questions:
        raise SystemFileError(str(file), "holds no [[questions]]")
    read = []
    for number, entry in enumerate(questions, 1):
        try:
            read.append(Asked.model_validate(entry))
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(map(str, first["loc"]))
            raise SystemFileError(
                str(file), first["msg"], field=f"question {number}, {field}"
            ) from None
    return read


@dataclass(frozen=True)
class Result:
    """What came of a question."""

    agent: str
    text: str
    reply: Reply | None
    error: LlmosError | None
    rows: Sequence[JournalRow] = ()
    """Of its turn."""
    note: str = ""

    @classmethod
    def of(cls, kernel: Kernel, agent: str, text: str, reply: Reply) -> Result:
        """With the record of its turn."""
        return cls(agent, text, reply, reply.error, kernel.turn(reply.turn) if reply.turn else ())

    def panel(self, number: int | None) -> Panel:
        """For the terminal."""
        if self.error is not None:
            body: Any = Text(f"{self.error.code}: {self.error}", style="red")
        else:
            message = self.reply.message() if self.reply else None
            body = render.answer(message) if message is not None else Text("(no reply)")
        footer = "no turn was begun"
        if self.reply is not None and self.reply.turn:
            steps = Trace.of(self.rows).steps if self.rows else []
            spent = render.where_time_went(steps, self.reply.elapsed_s)
            footer = f"{spent}\nllmos strace {self.reply.turn}"
        return render.question(self.agent, self.text, body, footer, number, self.note)

    def as_json(self) -> dict[str, Any]:
        """For ``--json``."""
        reply = self.reply
        return {
            "agent": self.agent,
            "question": self.text,
            "answer": reply.wire.json() if reply and reply.wire else None,
            "error": {"error": self.error.code, "message": str(self.error)} if self.error else None,
            "turn": reply.turn if reply else "",
            "elapsed_s": reply.elapsed_s if reply else None,
            "labels": reply.labels.model_dump(mode="json") if reply else None,
            "provenance": [p.model_dump(mode="json") for p in reply.provenance] if reply else [],
            "syscalls": [
                {
                    "name": s.name,
                    "resource": s.resource,
                    "elapsed_s": s.elapsed_s,
                    "status": s.status,
                }
                for s in (Trace.of(self.rows).steps if self.rows else ())
            ],
        }


def ask_all(kernel: Kernel, questions: Sequence[Asked], deadline_s: float) -> Iterator[Result]:
    """Ask side by side; results come in the order of the questions."""
    places = asyncio.Semaphore(MAX_SIDE_BY_SIDE)

    async def one(asked: Asked) -> Result:
        aio = kernel.aio
        try:
            async with places:
                wire = Wire.of(Question(text=asked.text, data=asked.data))
                reply = await aio.ask_reply(asked.agent, wire, deadline_s=deadline_s)
            rows = await aio.turn(reply.turn) if reply.turn else []
        except LlmosError as error:
            return Result(asked.agent, asked.text, None, error, note=asked.note)
        return Result(reply.agent, asked.text, reply, reply.error, rows, asked.note)

    # On the client's loop and not in threads: an interrupt can cancel them all at once.
    futures = [kernel.start(one(asked)) for asked in questions]
    try:
        for future in futures:
            yield future.result()
    finally:
        for future in futures:
            future.cancel()
