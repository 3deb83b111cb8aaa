"""One answer of a remote server, event by event: what is new in each, and how it ended.

Two shapes come along the same road: ``/chat/completions`` sends ``delta``, ``/completions``
sends ``text``; both may send usage with the last piece or after it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from llmos.drivers.protocols import FinishReason, TokenLogprob, ToolCall

_ENDS: dict[str, FinishReason] = {
    "stop": "stop",
    "eos": "stop",
    "eos_token": "stop",
    "stop_sequence": "stop",
    "tool_calls": "stop",
    "function_call": "stop",
    "length": "length",
    "max_tokens": "length",
}
MAX_TOOL_CALLS = 128
DONE = b"[DONE]"


class BadEvent(ValueError):
    """What came is no piece of an answer."""


class ServerSaid(Exception):
    """An error that came in place of a piece of the answer."""

    def __init__(self, content: Any) -> None:
        self.content = content
        super().__init__(str(content)[:200])


@dataclass(frozen=True, slots=True)
class Piece:
    """What one event adds."""

    text: str = ""
    tokens: int = 0
    """As many as it has log-probabilities; without those 1, if it has anything the model wrote."""
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(slots=True)
class _Call:
    id: str = ""
    name: str = ""
    arguments: list[str] = field(default_factory=list)


class Answer:
    """What is known of the answer so far."""

    def __init__(self, *, wants_logprobs: bool) -> None:
        self._wants_logprobs = wants_logprobs
        self.finish: FinishReason | None = None
        """How it ended; None: it did not yet."""
        self.reason = ""
        """The server's own word for that."""
        self.done = False
        """Nothing more will come."""
        self.prompt_tokens: int | None = None
        """As the server counts; None: it did not tell."""
        self.new_tokens: int | None = None
        self.cached_tokens = 0
        self._calls: dict[int, _Call] = {}

    @property
    def tool_calls(self) -> tuple[ToolCall, ...]:
        """The calls in it. Raises BadEvent: the arguments of one are no JSON object."""
        calls = []
        for _, call in sorted(self._calls.items()):
            arguments = "".join(call.arguments) or "{}"
            try:
                found = json.loads(arguments)
            except (ValueError, RecursionError):
                found = None
            if not isinstance(found, dict):
                raise BadEvent(f"calls the tool {call.name!r} with what is no JSON object")
            calls.append(ToolCall(call.name, arguments, call.id))
        return tuple(calls)

    def take(self, data: bytes) -> Piece:
        """Read one event. After the end only counts are of interest.

        Raises:
            BadEvent: it is no piece of an answer.
            ServerSaid: it is an error.
        """
        if data.strip() == DONE:
            self.done = True
            return Piece()
        try:
            event = json.loads(data)
        except (ValueError, RecursionError):
            raise BadEvent(f"sent what is no JSON: {_shown(data)}") from None
        if not isinstance(event, dict):
            raise BadEvent(f"sent what is no JSON object: {_shown(data)}")
        if event.get("error"):
            raise ServerSaid(event["error"])
        self._count(event.get("usage"))
        choices = event.get("choices")
        if choices is None and event.get("usage") is None:
            raise BadEvent(f"sent an event without choices: {_shown(data)}")
        if not isinstance(choices or [], list):
            raise BadEvent(f"sent choices that are no list: {_shown(data)}")
        for choice in choices or []:
            # One answer was asked for.
            if isinstance(choice, dict) and choice.get("index", 0) == 0:
                return self._choice(choice, data)
        return Piece()

    def _choice(self, choice: dict[str, Any], data: bytes) -> Piece:
        if self.finish is not None:
            return Piece()
        delta = choice.get("delta")
        if not isinstance(delta, dict):
            delta = {"content": choice.get("text")}
        text = delta.get("content")
        if text is None:
            text = ""
        if not isinstance(text, str):
            raise BadEvent(f"sent text that is no string: {_shown(data)}")
        # What a model thinks before it answers is no part of the answer, but it was generated.
        thought = delta.get("reasoning_content") or delta.get("reasoning")
        called = self._tools(delta.get("tool_calls") or [])
        logprobs = self._logprobs(choice.get("logprobs"))
        if self._wants_logprobs and text and not logprobs:
            raise BadEvent("sent text without the log-probabilities that were asked for")
        reason = choice.get("finish_reason")
        if reason is not None:
            self.reason = str(reason)[:50]
            self.finish = _ENDS.get(self.reason, "error")
        wrote = bool(text or thought or called)
        return Piece(_whole(text), len(logprobs) or int(wrote), logprobs)

    def _tools(self, parts: Any) -> bool:
        if not isinstance(parts, list):
            raise BadEvent("sent tool calls that are no list")
        for part in parts:
            function = part.get("function") if isinstance(part, dict) else None
            if not isinstance(function, dict):
                raise BadEvent("sent a tool call without a function")
            index = part.get("index")
            if not isinstance(index, int):
                index = len(self._calls)
            call = self._calls.setdefault(index, _Call())
            if len(self._calls) > MAX_TOOL_CALLS:
                raise BadEvent(f"sent more than {MAX_TOOL_CALLS} tool calls")
            call.id = call.id or str(part.get("id") or "")
            call.name = call.name or str(function.get("name") or "")
            arguments = function.get("arguments")
            if isinstance(arguments, dict):
                arguments = json.dumps(arguments)
            call.arguments.append(str(arguments or ""))
        return bool(parts)

    def _logprobs(self, found: Any) -> tuple[TokenLogprob, ...]:
        if not self._wants_logprobs or not isinstance(found, dict):
            return ()
        try:
            if found.get("content") is not None:
                return tuple(
                    TokenLogprob(
                        _whole(str(t["token"])),
                        float(t["logprob"]),
                        tuple(
                            (_whole(str(o["token"])), float(o["logprob"]))
                            for o in t.get("top_logprobs") or ()
                        ),
                    )
                    for t in found["content"]
                )
            tokens, values = found.get("tokens") or (), found.get("token_logprobs") or ()
            others = found.get("top_logprobs") or [None] * len(tokens)
            return tuple(
                TokenLogprob(
                    _whole(str(token)),
                    float(value),
                    tuple(
                        sorted(
                            ((_whole(str(n)), float(v)) for n, v in (top or {}).items()),
                            key=lambda pair: -pair[1],
                        )
                    ),
                )
                for token, value, top in zip(tokens, values, others, strict=True)
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise BadEvent(f"sent log-probabilities that cannot be read: {error!r}") from None

    def _count(self, usage: Any) -> None:
        if not isinstance(usage, dict):
            return
        prompt, new = usage.get("prompt_tokens"), usage.get("completion_tokens")
        self.prompt_tokens = prompt if isinstance(prompt, int) else self.prompt_tokens
        self.new_tokens = new if isinstance(new, int) else self.new_tokens
        details = usage.get("prompt_tokens_details")
        cached = details.get("cached_tokens") if isinstance(details, dict) else None
        self.cached_tokens = cached if isinstance(cached, int) else self.cached_tokens


def _whole(text: str) -> str:
    """Text that can be encoded: JSON can hold halves of a character, a store cannot."""
    if text.isascii():
        return text
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def _shown(data: bytes) -> str:
    return repr(data[:80].decode(errors="replace"))
