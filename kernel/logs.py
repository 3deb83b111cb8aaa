"""Structured logs: one JSON object per line and process, with agent and turn."""

from __future__ import annotations

import contextvars
import json
import logging
import logging.handlers
from pathlib import Path

AGENT: contextvars.ContextVar[str] = contextvars.ContextVar("agent", default="")
TURN: contextvars.ContextVar[str] = contextvars.ContextVar("turn", default="")

MAX_BYTES = 10 << 20
"""A log file is rotated at this size; two older ones are kept."""

_STANDARD = frozenset(logging.makeLogRecord({}).__dict__) | {"message", "asctime"}


class JsonFormatter(logging.Formatter):
    """Time, level, process, agent, turn, message and whatever ``extra`` brought."""

    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        """One line of JSON."""
        line: dict[str, object] = {
            "ts": round(record.created, 6),
            "level": record.levelname,
            "process": self._process,
            "logger": record.name,
            "message": record.getMessage(),
        }
        for key, variable in (("agent", AGENT), ("turn", TURN)):
            if value := variable.get():
                line[key] = value
        line.update({k: v for k, v in record.__dict__.items() if k not in _STANDARD})
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str, ensure_ascii=False)


def configure(folder: Path, process: str, level: str) -> None:
    """Send the logs of ``llmos`` in this process to ``<folder>/<process>.jsonl``.

    Only the logger ``llmos`` is touched: the root logger belongs to the application.
    """
    folder.mkdir(parents=True, exist_ok=True)
    handler = logging.handlers.RotatingFileHandler(
        folder / f"{process.replace(':', '-')}.jsonl",
        maxBytes=MAX_BYTES,
        backupCount=2,
        encoding="utf-8",
        errors="backslashreplace",
    )
    handler.setFormatter(JsonFormatter(process))
    logger = logging.getLogger("llmos")
    for old in logger.handlers[:]:
        logger.removeHandler(old)
        old.close()
    logger.addHandler(handler)
    logger.setLevel(level)
    logger.propagate = False


class turn_context:
    """Logs inside carry this agent and turn."""

    __slots__ = ("_agent", "_before", "_turn")

    def __init__(self, agent: str, turn: str) -> None:
        self._agent, self._turn = agent, turn

    def __enter__(self) -> None:
        self._before = AGENT.set(self._agent), TURN.set(self._turn)

    def __exit__(self, *exc: object) -> None:
        agent, turn = self._before
        AGENT.reset(agent)
        TURN.reset(turn)
