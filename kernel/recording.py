"""A recorded turn with all that it takes to run it again: its launch, the state before it,
its message and its rows. As one JSON file it can be kept, sent to somebody, or tested with."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any, NamedTuple

import msgpack

from llmos.drivers.errors import LlmosError
from llmos.drivers.stores.rows import TURN, JournalRow, LaunchRow
from llmos.syscalls.messages import Envelope

FORMAT = 1
"""Of the file; one of another format is refused."""

_BYTES = ("args_hash", "args", "result", "labels", "provenance")
_LEFT_OUT = {"turn", "agent", "prev_hash", "hash"}


class RecordingError(LlmosError):
    """A file holds no recorded turn, or cannot be read or written."""

    def __init__(self, file: str, reason: str) -> None:
        self.file, self.reason = file, reason
        super().__init__(f"{file}: {reason}", remedy="Make one with: llmos audit export TURN FILE")


class Recording(NamedTuple):
    """One turn, out of the journal."""

    launch: LaunchRow
    """As the agent is launched now."""
    envelope: Envelope
    base: int
    """Number of the change of state that it began with; 0 is the first state."""
    state: bytes | None
    """JSON of that state; None: the first one."""
    state_version: int
    """Schema version of the agent's state at the export; 0: not known, taken as the
    program's."""
    rows: list[JournalRow]
    """By pos, with their blobs in place."""

    @property
    def turn(self) -> str:
        """Its id."""
        return self.rows[0].turn

    @property
    def agent(self) -> str:
        """Whose it is."""
        return self.rows[0].agent

    @property
    def end(self) -> JournalRow | None:
        """The row that ends it; None: it was cut off."""
        return next((row for row in self.rows if row.kind == TURN), None)

    def dump(self) -> str:
        """As JSON, for people and for :meth:`load`."""
        launch, envelope = self.launch, self.envelope
        content = {
            "llmos_turn": FORMAT,
            "turn": self.turn,
            "agent": self.agent,
            "launch": {
                "agent": launch.agent,
                "program": launch.program,
                "config": msgpack.unpackb(launch.config),
                "id": launch.id,
                "created_at": launch.created_at,
            },
            "message": {
                "stream": envelope.stream,
                "seq": envelope.seq,
                "envelope": base64.b64encode(envelope.pack()).decode(),
                "kind": envelope.wire.kind,
                "body": envelope.wire.json(),
            },
            "state": {
                "base": self.base,
                "version": self.state_version,
                "value": json.loads(self.state) if self.state is not None else None,
            },
            "rows": [_dump_row(row) for row in self.rows],
        }
        return json.dumps(content, indent=1, default=_plain, ensure_ascii=False) + "\n"

    def write(self, file: Path) -> None:
        """Write it to a file that is not there yet.

        Raises:
            RecordingError
        """
        try:
            with file.open("x", encoding="utf-8") as out:
                out.write(self.dump())
        except FileExistsError:
            raise RecordingError(str(file), "there is such a file already") from None
        except OSError as error:
            raise RecordingError(str(file), str(error)) from None

    @classmethod
    def read(cls, file: Path) -> Recording:
        """Read a file.

        Raises:
            RecordingError
        """
        try:
            text = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise RecordingError(str(file), str(error)) from None
        return cls.load(text, str(file))

    @classmethod
    def load(cls, text: str, file: str = "the recording") -> Recording:
        """What :meth:`dump` made.

        Raises:
            RecordingError
        """
        try:
            content = json.loads(text)
            found = content["llmos_turn"]
            if found != FORMAT:
                raise RecordingError(file, f"its format is {found}, this LLM OS reads {FORMAT}")
            agent, turn, state = content["agent"], content["turn"], content["state"]
            launch, message = content["launch"], content["message"]
            rows = [_load_row(agent, turn, row) for row in content["rows"]]
            if not rows:
                raise RecordingError(file, "it has no rows")
            return cls(
                launch=LaunchRow(
                    launch["agent"],
                    launch["program"],
                    bytes(msgpack.packb(launch["config"])),
                    launch["id"],
                    launch["created_at"],
                ),
                envelope=Envelope.unpack(
                    agent,
                    message["stream"],
                    message["seq"],
                    base64.b64decode(message["envelope"]),
                ),
                base=state["base"],
                state=_compact(state["value"]) if state["value"] is not None else None,
                state_version=state["version"],
                rows=rows,
            )
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise RecordingError(file, f"it holds no recorded turn ({error!r})") from None


def _dump_row(row: JournalRow) -> dict[str, Any]:
    """The columns that say something."""
    out: dict[str, Any] = {}
    for name, value in zip(JournalRow._fields, row, strict=True):
        if name in _LEFT_OUT or value == JournalRow._field_defaults.get(name):
            continue
        out[name] = _dump_bytes(name, value) if isinstance(value, bytes) else value
    return out


def _dump_bytes(name: str, value: bytes) -> Any:
    if name == "args_hash":
        return value.hex()
    try:
        return {"json": json.loads(value)}
    except ValueError:
        return {"base64": base64.b64encode(value).decode()}


def _load_row(agent: str, turn: str, columns: dict[str, Any]) -> JournalRow:
    given = dict(columns)
    for name in _BYTES:
        value = given.get(name)
        if value is None:
            continue
        if name == "args_hash":
            given[name] = bytes.fromhex(value)
        elif "json" in value:
            given[name] = _compact(value["json"])
        else:
            given[name] = base64.b64decode(value["base64"])
    return JournalRow(agent=agent, turn=turn, **given)


def _compact(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode()


def _plain(value: Any) -> Any:
    return {"bytes": base64.b64encode(value).decode()} if isinstance(value, bytes) else str(value)
