"""Tool calls as a model writes them: how they look, how they are read, how they are forced.

Each family of models was trained on a format of its own, and its chat template shows which.
Where a tokenizer brings a response template (transformers 5), that one reads the answer.
A template that knows nothing of tools gets them as text in the system turn, in the format of
SmolLM2, whose template is such a one.

Nothing of an answer is shown from the place on where a call may have begun. At the end it is
read; what is no call after all comes out as text, whole, so that nothing a model wrote is lost.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from llmos.drivers.protocols import ToolCall, ToolSpec

OPEN, CLOSE = "<tool_call>", "</tool_call>"
MISTRAL, MISTRAL_ARGS = "[TOOL_CALLS]", "[ARGS]"
LLAMA = "<|python_tag|>"
_DECODER = json.JSONDecoder()
_STYLE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}

Found = tuple[str, tuple[ToolCall, ...]]
"""What is left of a text without its calls, and the calls."""


class ToolSyntax(Protocol):
    """How a model writes its calls."""

    @property
    def marks(self) -> tuple[str, ...]:
        """With these a call begins. Empty: it may begin anywhere, so nothing is shown before the
        end of the answer."""
        ...

    @property
    def controls(self) -> tuple[str, ...]:
        """Control tokens that belong to a call, and so are to be seen in the text."""
        ...

    def read(self, text: str, tools: Sequence[ToolSpec]) -> Found:
        """The calls in a text, without ids. What cannot be read stays text."""
        ...

    def grammar(self, tools: Sequence[ToolSpec]) -> str | None:
        """What an answer that calls one of the tools looks like (lark); None: not known."""
        ...


def with_ids(job_id: str, calls: Sequence[ToolCall]) -> tuple[ToolCall, ...]:
    """The calls with ids: nine letters and digits, as the strictest template wants them."""
    return tuple(
        ToolCall(call.name, call.arguments, _short_id(f"{job_id}/{i}"))
        for i, call in enumerate(calls)
    )


def _short_id(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=5).hexdigest()[:9]


# ---------------------------------------------------------------- formats


@dataclass(frozen=True, slots=True)
class Tagged:
    """``<tool_call>{…}</tool_call>`` (Hermes, Qwen), or a list inside (SmolLM2)."""

    special: Mapping[str, int] = field(default_factory=dict)
    """Ids of the marks that are special tokens."""
    listed: bool = False
    """Whether the model was shown a list; both are read."""
    marks: tuple[str, ...] = (OPEN,)
    controls: tuple[str, ...] = (OPEN, CLOSE)

    def read(self, text: str, tools: Sequence[ToolSpec]) -> Found:
        """See :class:`ToolSyntax`."""
        calls: list[ToolCall] = []
        rest: list[str] = []
        at = 0
        while (start := text.find(OPEN, at)) >= 0:
            found = _value(text, start + len(OPEN))
            read = _calls(found[0]) if found else None
            if found is None or read is None:
                rest.append(text[at : start + len(OPEN)])
                at = start + len(OPEN)
                continue
            calls += read
            rest.append(text[at:start])
            at = _after_blanks(text, found[1])
            # A model that stops before the closing mark has said all the same what it wants.
            at += len(CLOSE) if text.startswith(CLOSE, at) else 0
        return _joined([*rest, text[at:]], text, calls)

    def grammar(self, tools: Sequence[ToolSpec]) -> str:
        """See :class:`ToolSyntax`."""
        before, after = ("[", "]") if self.listed else ("\n", "\n")
        opening = f"{_token(OPEN, self.special)} {_quoted(before)}"
        closing = f"{_quoted(after)} {_token(CLOSE, self.special)}"
        return _lark(
            tools,
            f"{opening} ( %s ) {closing}",
            lambda tool: (f'{{"name": {json.dumps(tool.name)}, "arguments": ', "}"),
        )


@dataclass(frozen=True, slots=True)
class Mistral:
    """``[TOOL_CALLS][{…}]``, or ``[TOOL_CALLS]name[ARGS]{…}`` where there is such a token."""

    special: Mapping[str, int]
    """Ids of the two marks that are special tokens."""
    marks: tuple[str, ...] = (MISTRAL,)
    controls: tuple[str, ...] = (MISTRAL, MISTRAL_ARGS)

    def read(self, text: str, tools: Sequence[ToolSpec]) -> Found:
        """See :class:`ToolSyntax`."""
        before, *parts = text.split(MISTRAL)
        calls: list[ToolCall] = []
        for part in parts:
            name, marked, arguments = part.partition(MISTRAL_ARGS)
            found = _value(arguments if marked else part, 0)
            if found is None or (arguments if marked else part)[found[1] :].strip():
                return text, ()
            value = {"name": name.strip(), "arguments": found[0]} if marked else found[0]
            read = _calls(value)
            if read is None:
                return text, ()
            calls += read
        return _joined([before], text, calls)

    def grammar(self, tools: Sequence[ToolSpec]) -> str:
        """See :class:`ToolSyntax`."""
        opening = _token(MISTRAL, self.special)
        if MISTRAL_ARGS not in self.special:
            return _lark(
                tools,
                f'{opening} "[" ( %s ) "]"',
                lambda tool: (f'{{"name": {json.dumps(tool.name)}, "arguments": ', "}"),
            )
        between = _token(MISTRAL_ARGS, self.special)
        return _lark(tools, f"{opening} ( %s )", lambda tool: (tool.name, ""), between)


@dataclass(frozen=True, slots=True)
class Llama:
    """The whole answer is ``{"name": …, "parameters": {…}}``; several are set apart by ``;``."""

    marks: tuple[str, ...] = ()
    controls: tuple[str, ...] = (LLAMA,)

    def read(self, text: str, tools: Sequence[ToolSpec]) -> Found:
        """See :class:`ToolSyntax`."""
        known = {tool.name for tool in tools}
        body = text.strip().removeprefix(LLAMA)
        calls: list[ToolCall] = []
        at = 0
        while at < len(body):
            found = _value(body, at)
            read = _calls(found[0]) if found else None
            # Any JSON may be a plain answer: only that of a tool that was offered is a call.
            if found is None or read is None or any(call.name not in known for call in read):
                return text, ()
            calls += read
            at = _after_blanks(body, found[1])
            at += body.startswith(";", at)
        return ("", tuple(calls)) if calls else (text, ())

    def grammar(self, tools: Sequence[ToolSpec]) -> str:
        """See :class:`ToolSyntax`."""
        return _lark(
            tools, "%s", lambda tool: (f'{{"name": {json.dumps(tool.name)}, "parameters": ', "}")
        )


@dataclass(frozen=True, slots=True)
class ByTemplate:
    """The tokenizer says itself how its model's answers are read."""

    tokenizer: Any
    marks: tuple[str, ...] = ()
    controls: tuple[str, ...] = ()

    def read(self, text: str, tools: Sequence[ToolSpec]) -> Found:
        """See :class:`ToolSyntax`."""
        try:
            message = self.tokenizer.parse_response(text, prefix="", tools=descriptions(tools))
        except (ValueError, TypeError, KeyError, RecursionError):
            return text, ()
        calls: list[ToolCall] = []
        for item in message.get("tool_calls") or ():
            read = _calls(item.get("function", item)) if isinstance(item, dict) else None
            if read is None:
                return text, ()
            calls += read
        return (str(message.get("content") or ""), tuple(calls)) if calls else (text, ())

    def grammar(self, tools: Sequence[ToolSpec]) -> str | None:
        """Such a template says how to read, not how to write."""
        return None


def syntax_of(
    tokenizer: Any, template: str, special: Mapping[str, int], *, told: bool
) -> ToolSyntax | None:
    """The format of a model's calls; None: not one that is known here.

    Args:
        tokenizer: The library's tokenizer.
        template: Its chat template.
        special: The text of its special tokens, with their ids.
        told: Whether the template tells the model of its tools.
    """
    if getattr(tokenizer, "response_template", None):
        return ByTemplate(tokenizer, controls=tuple(special))
    if not told:
        return Tagged(listed=True)
    if MISTRAL in special:
        return Mistral(special)
    if OPEN in template and "<function=" not in template:
        return Tagged(special)
    if LLAMA in special:
        return Llama()
    return None


# ---------------------------------------------------------------- for templates without tools


def descriptions(tools: Sequence[ToolSpec]) -> list[dict[str, Any]]:
    """The tools as chat templates take them."""
    return [
        {
            "type": "function",
            "function": {
                "name": tool.name,
                "description": tool.description,
                "parameters": json.loads(tool.parameters),
            },
        }
        for tool in tools
    ]


def instructions(tools: Sequence[ToolSpec]) -> str:
    """What the system turn says of the tools, where the template says nothing."""
    known = json.dumps([d["function"] for d in descriptions(tools)], ensure_ascii=False)
    return (
        "You can call functions to answer. These are known:\n"
        f"<tools>{known}</tools>\n\n"
        "To call one or more of them, answer with nothing but a list of calls in this form, "
        "each argument of the type that its function asks for:\n"
        f'{OPEN}[{{"name": "function", "arguments": {{"argument": "value"}}}}]{CLOSE}\n'
        "If none of them helps, or something that one needs was not said, answer in words."
    )


def calls_as_text(calls: Sequence[ToolCall]) -> str:
    """An assistant's calls, where the template leaves them out."""
    items = ", ".join(
        f'{{"name": {json.dumps(c.name, ensure_ascii=False)}, "arguments": {c.arguments}}}'
        for c in calls
    )
    return f"{OPEN}[{items}]{CLOSE}"


def result_as_text(content: str) -> str:
    """A tool's answer as a user's turn, where the template knows no other."""
    return f"<tool_response>\n{content}\n</tool_response>"


# ---------------------------------------------------------------- reading


def _value(text: str, at: int) -> tuple[Any, int] | None:
    """The JSON value at a place, and where it ends."""
    try:
        return _DECODER.raw_decode(text, _after_blanks(text, at))
    except (ValueError, RecursionError):
        return None


def _after_blanks(text: str, at: int) -> int:
    while at < len(text) and text[at].isspace():
        at += 1
    return at


def _calls(value: Any) -> list[ToolCall] | None:
    """The calls that a JSON value means; None: it means none, or something else as well."""
    calls = []
    for item in value if isinstance(value, list) else [value]:
        if not isinstance(item, dict) or not isinstance(item.get("name"), str) or not item["name"]:
            return None
        arguments = item.get("arguments", item.get("parameters", {}))
        if isinstance(arguments, str):  # JSON in JSON, as the API of OpenAI has it.
            found = _value(arguments, 0)
            arguments = found[0] if found and not arguments[found[1] :].strip() else None
        if not isinstance(arguments, dict):
            return None
        try:
            text = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
            text.encode("utf-8")
        except ValueError:  # Not JSON after all (NaN), or half a character.
            return None
        calls.append(ToolCall(item["name"], text))
    return calls


def _joined(rest: Sequence[str], text: str, calls: Sequence[ToolCall]) -> Found:
    if not calls:
        return text, ()
    # Blanks around a call set it apart, and are no answer by themselves.
    kept = "".join(rest)
    return (kept.rstrip() if kept.strip() else ""), tuple(calls)


# ---------------------------------------------------------------- grammars


def _token(text: str, special: Mapping[str, int]) -> str:
    """A mark in a grammar: special tokens are never text there."""
    return f"<[{special[text]}]>" if text in special else _quoted(text)


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _lark(
    tools: Sequence[ToolSpec],
    start: str,
    around: Callable[[ToolSpec], tuple[str, str]],
    between: str = "",
) -> str:
    """A grammar of one call. A rule for each tool, so that each schema is a root of its own and
    its references lead where they did."""

    def rules() -> Iterator[str]:
        for i, tool in enumerate(tools):
            before, after = around(tool)
            schema = json.dumps({**json.loads(tool.parameters), "x-guidance": _STYLE})
            parts = [_quoted(before), between, f"args{i}", _quoted(after) if after else ""]
            yield f"call{i}: {' '.join(p for p in parts if p)}"
            yield f"args{i}: %json {schema}"

    which = " | ".join(f"call{i}" for i in range(len(tools)))
    return "\n".join([f"start: {start % which}", *rules()])
