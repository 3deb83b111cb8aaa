"""What the journal keeps of a syscall: whole, so that it can be handed back, and as JSON, so
that people and other programs can read it."""

from __future__ import annotations

import hashlib
import importlib
import json
import sys
from functools import cache
from typing import Any, TypeVar

import msgpack
from pydantic import BaseModel, TypeAdapter
from pydantic_core import PydanticSerializationError, to_json

from llmos.drivers.errors import LlmosError
from llmos.drivers.stores.rows import JournalRow
from llmos.syscalls.base import Request, Response
from llmos.syscalls.labels import NO_LABELS, Labels, Provenance
from llmos.syscalls.messages import Reply, Wire

ResponseT = TypeVar("ResponseT", bound=Response)

MAX_INLINE_BYTES = 4096
"""What is longer is kept as a blob, once for all rows that have it."""
MAX_TEXT = 2000
"""Characters of a text that people are shown."""
MAX_ITEMS = 64
"""Items of a list that people are shown."""
MAX_DEPTH = 32
"""Levels of nesting that people are shown."""

_REFERENCE = b"sha256:"
_APART = {"provenance", "labels"}
_PROVENANCE = TypeAdapter(tuple[Provenance, ...])


class RecordedError(LlmosError):
    """An error out of the journal whose class is not known in this process."""

    def __init__(self, error: str, message: str) -> None:
        self.error, self.message = error, message
        super().__init__(f"{error}: {message}")


# ---------------------------------------------------------------- requests and responses


def args_of(request: Request[Any]) -> bytes:
    """The request as JSON, without what differs when the same call is made again."""
    return _json(request, None)


def hash_of(args: bytes) -> bytes:
    """16 bytes by which two calls are told apart."""
    return hashlib.blake2b(args, digest_size=16).digest()


def result_of(response: Response) -> bytes:
    """The response as JSON; provenance and labels have columns of their own."""
    return _json(response, _APART)


def response_of(request: Request[ResponseT], row: JournalRow) -> ResponseT:
    """A response out of the journal.

    Raises:
        ValueError: the row holds no response to such a request.
    """
    bare = response_type(type(request)).model_validate_json(row.result)
    apart = {"provenance": provenance_of(row), "labels": labels_of(row)}
    response: ResponseT = bare.model_copy(update=apart)
    return response


@cache
def response_type(request: type[Request[ResponseT]]) -> type[ResponseT]:
    """The class of the answers to a class of requests."""
    for base in request.__mro__:
        metadata = vars(base).get("__pydantic_generic_metadata__") or {}
        if metadata.get("origin") is Request:
            answer: type[ResponseT] = metadata["args"][0]
            return answer
    raise TypeError(f"{request.__name__} does not derive from Request[…]")


def _json(model: BaseModel, exclude: set[str] | None) -> bytes:
    try:
        return model.__pydantic_serializer__.to_json(model, exclude=exclude)
    except (PydanticSerializationError, UnicodeEncodeError):
        # Lone surrogates and objects of the program's own: kept as they can be, for people.
        return json.dumps(_plain(model.model_dump(exclude=exclude))).encode()


# ---------------------------------------------------------------- errors


def error_of(error: BaseException) -> bytes:
    """An error as JSON: class, module, message and facts."""
    facts = error.facts if isinstance(error, LlmosError) else {}
    content = {
        "error": type(error).__name__,
        "module": type(error).__module__,
        "message": str(error.args[0] if error.args else error),
        "facts": facts,
    }
    try:
        return to_json(content, inf_nan_mode="constants", bytes_mode="base64")
    except (PydanticSerializationError, UnicodeEncodeError, ValueError):
        return json.dumps(_plain(content)).encode()


def raised(result: bytes) -> LlmosError:
    """The error that :func:`error_of` kept."""
    content = json.loads(result)
    name, message = str(content.get("error", "?")), str(content.get("message", ""))
    module = str(content.get("module", ""))
    if module.startswith("llmos."):
        importlib.import_module(module)
    # Other modules are only looked up, never imported because a row names them.
    found = getattr(sys.modules.get(module), name, None)
    if isinstance(found, type) and issubclass(found, LlmosError):
        error = found.__new__(found)
        error.args = (message,)
        for fact, value in content.get("facts", {}).items():
            setattr(error, fact, tuple(value) if isinstance(value, list) else value)
        return error
    return RecordedError(name, message)


# ---------------------------------------------------------------- turns


def turn_result(
    reply: Wire | None, error: LlmosError | None, base: int, state: bytes | None
) -> bytes:
    """The end of a turn as JSON.

    Args:
        reply: What it answered.
        error: Why it failed.
        base: Number of the change of state that it began with; 0 is the first state.
        state: JSON of the state it left, if that is another one; it is change ``base + 1``.
    """
    parts = [b'{"reply":', _wire(reply), b',"error":', error_of(error) if error else b"null"]
    parts += [b',"base":', str(base).encode()]
    if state is not None:
        parts += [b',"state":', state]
    return b"".join((*parts, b"}"))


def _wire(wire: Wire | None) -> bytes:
    if wire is None:
        return b"null"
    content = {"kind": wire.kind, "module": wire.module, "body": wire.json()}
    try:
        return to_json(content, inf_nan_mode="constants", bytes_mode="base64")
    except (PydanticSerializationError, UnicodeEncodeError, ValueError):
        return json.dumps(_plain(content)).encode()


def reply_of(row: JournalRow) -> Reply:
    """The reply of a turn that has ended, as its asker got it."""
    content = json.loads(row.result) if row.result else {}
    wire = content.get("reply")
    error = content.get("error")
    return Reply(
        turn=row.turn,
        agent=row.agent,
        wire=Wire.of_json(wire["kind"], wire["body"], wire["module"]) if wire else None,
        error=raised(json.dumps(error).encode()) if error else None,
        labels=labels_of(row),
        provenance=provenance_of(row),
        elapsed_s=row.elapsed_s,
    )


# ---------------------------------------------------------------- labels and provenance


def pack_labels(labels: Labels) -> bytes:
    """As JSON; nothing for no labels, which most rows have."""
    if labels is NO_LABELS or not (labels.tenants or labels.sensitivity or not labels.trusted):
        return b""
    return labels.model_dump_json().encode()


def labels_of(row: JournalRow) -> Labels:
    """The labels of a row."""
    return Labels.model_validate_json(row.labels) if row.labels else NO_LABELS


def pack_provenance(provenance: tuple[Provenance, ...]) -> bytes:
    """As a JSON list; nothing for none."""
    return _PROVENANCE.dump_json(provenance) if provenance else b""


def provenance_of(row: JournalRow) -> tuple[Provenance, ...]:
    """The provenance of a row."""
    return _PROVENANCE.validate_json(row.provenance) if row.provenance else ()


# ---------------------------------------------------------------- blobs


def blob_of(data: bytes) -> tuple[str, bytes]:
    """The sha256 of long data, and the reference that stands for it in a row."""
    digest = hashlib.sha256(data).hexdigest()
    return digest, _REFERENCE + digest.encode()


def referred(data: bytes) -> str | None:
    """The sha256 that a column refers to, if it is a reference."""
    if data.startswith(_REFERENCE) and len(data) == len(_REFERENCE) + 64:
        return data[len(_REFERENCE) :].decode()
    return None


# ---------------------------------------------------------------- for people


def view(data: bytes) -> Any:
    """A column as plain data, with long texts and lists cut; None for nothing."""
    if not data:
        return None
    try:
        return _short(json.loads(data))
    except ValueError:
        return _short(msgpack.unpackb(data))


def _short(value: Any, depth: int = 0) -> Any:
    if depth > MAX_DEPTH:
        return f"… ({type(value).__name__}, nested too deeply)"
    if isinstance(value, str) and len(value) > MAX_TEXT:
        return f"{value[:MAX_TEXT]}… ({len(value)} characters)"
    if isinstance(value, bytes):
        return f"bytes({len(value)})"
    if isinstance(value, dict):
        return {str(k): _short(v, depth + 1) for k, v in value.items()}
    if isinstance(value, list | tuple):
        kept = [_short(v, depth + 1) for v in value[:MAX_ITEMS]]
        return kept if len(value) <= MAX_ITEMS else [*kept, f"… ({len(value)} items)"]
    return value


def _plain(value: Any, depth: int = 0) -> Any:
    """What JSON can hold of a value, with surrogates escaped and odd objects as their text."""
    if depth > MAX_DEPTH:
        return f"… ({type(value).__name__}, nested too deeply)"
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode("utf-8")
    if isinstance(value, bool | int | float | type(None)):
        return value
    if isinstance(value, dict):
        return {_plain(str(k)): _plain(v, depth + 1) for k, v in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(v, depth + 1) for v in value]
    if isinstance(value, BaseModel):
        return _plain(value.model_dump(), depth + 1)
    return _plain(str(value))
