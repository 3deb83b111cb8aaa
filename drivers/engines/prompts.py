"""From a prompt to token ids, with nothing in user text ever taken for a control token.

The template is rendered with marks in place of the texts, so it never sees them.
Then its own special tokens are looked up one by one and everything else, template
text and user text together, goes through a copy of the tokenizer that knows no
special token. The library's ``split_special_tokens`` was the alternative: it also
splits the template's tokens when the prompt is one string, and tokenizing each text
on its own would cut words and blank lines differently from how the model learnt them.

Arguments of tool calls and descriptions of tools are data, which templates take apart and
write as JSON. There only the strings of control tokens are hidden by marks.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from llmos.drivers.engines.checks import check_prompt
from llmos.drivers.engines.toolcalls import (
    ToolSyntax,
    calls_as_text,
    descriptions,
    instructions,
    result_as_text,
    syntax_of,
)
from llmos.drivers.errors import EngineFailed, InvalidParams
from llmos.drivers.protocols import ChatTurn, ToolCall, ToolSpec


class PromptEncoder:
    """The tokenizer of one model, as prompts need it. Thread-safe."""

    def __init__(self, model: str, tokenizer: Any) -> None:
        from tokenizers import Tokenizer

        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise EngineFailed(model, "its tokenizer has no fast (tokenizer.json) form")
        self.backend = backend
        self._tokenizer = tokenizer
        spec = json.loads(backend.to_str())
        spec["truncation"] = spec["padding"] = None
        added = spec.get("added_tokens", [])
        # Runs of blanks are kept: some models add them for code, and they control nothing.
        controls = [t for t in added if t["special"] or t["content"].strip()]
        spec["added_tokens"] = [t for t in added if t not in controls]
        self._plain = Tokenizer.from_str(json.dumps(spec))
        self._controls = {t["content"]: t for t in controls}
        self._control_ids = frozenset(t["id"] for t in controls)
        by_length = sorted(self._controls, key=len, reverse=True)
        self._control_pattern = re.compile("|".join(map(re.escape, by_length)) or r"(?!)")
        # Unguessable, so that no text can pose as a mark. The quote shows by the backslashes
        # before it whether the template has written the text as JSON, and how often.
        self._nonce = secrets.token_hex(8)
        self._mark = re.compile(
            rf"( ?)\uf8ff(\\*)\"{self._nonce}(\d+)\uf8ff( ?)|\uf8ff{self._nonce}h(\d+)\uf8ff"
        )
        self._template: str = self._template_text()
        self._tells_tools = "tools" in self._template and self._renders_a_tool()
        self.syntax: ToolSyntax | None = syntax_of(
            tokenizer,
            self._template,
            {text: token["id"] for text, token in self._controls.items() if token["special"]},
            told=self._tells_tools,
        )
        """How this model writes tool calls; None: in a way that is not known here."""
        self.longest_token = max((len(t) for t in backend.get_vocab()), default=1)
        """Characters of the longest token: a text has at least len/longest tokens."""

    def encode(
        self, prompt: str | tuple[ChatTurn, ...], tools: Sequence[ToolSpec] = ()
    ) -> list[int]:
        """Token ids of a prompt, template and beginning-of-sequence included.

        Raises:
            InvalidParams: empty, not Unicode, or the template refuses these turns.
        """
        check_prompt(prompt)
        if isinstance(prompt, str):
            return self._special_prefix() + self._plain_ids(prompt)
        text, spans = self._render(prompt, tools)
        ids: list[int] = []
        start = 0
        for match in self._control_pattern.finditer(text):
            if any(match.start() < end and begin < match.end() for begin, end in spans):
                continue
            if match.start() < start:
                continue
            control = self._controls[match.group()]
            before = text[start : match.start()]
            ids += self._plain_ids(before.rstrip() if control["lstrip"] else before)
            ids.append(control["id"])
            start = match.end()
            while control["rstrip"] and start < len(text) and text[start].isspace():
                start += 1
        return ids + self._plain_ids(text[start:])

    def encode_text(self, text: str) -> list[int]:
        """Token ids of text that goes on after a prompt or is an answer's beginning.

        By itself and not with the prompt: what a model writes begins with a new token.
        """
        return self._plain_ids(text)

    @property
    def shown_controls(self) -> dict[int, str]:
        """Control tokens that are part of a tool call's text, by id."""
        names = self.syntax.controls if self.syntax is not None else ()
        return {self._controls[n]["id"]: n for n in names if n in self._controls}

    def _render(
        self, turns: tuple[ChatTurn, ...], tools: Sequence[ToolSpec]
    ) -> tuple[str, list[tuple[int, int]]]:
        """The rendered prompt and where text that is not the template's is in it."""
        from jinja2 import TemplateError

        if not self._template:
            raise InvalidParams(
                "prompt", "turns", "the model has no chat template; pass the prompt as a string"
            )
        if not self._tells_tools:
            turns = _without_tools(turns, tools)
        hidden: list[str] = []
        messages = [self._message(i, turn, hidden) for i, turn in enumerate(turns)]
        told = self._hide(descriptions(tools), hidden) if tools and self._tells_tools else None
        try:
            marked = self._tokenizer.apply_chat_template(
                messages, tools=told, add_generation_prompt=True, tokenize=False
            )
        except (TemplateError, ValueError, TypeError) as error:
            roles = ", ".join(t.role for t in turns)
            raise InvalidParams("prompt", roles, f"the chat template says: {error}") from error
        parts: list[str] = []
        spans: list[tuple[int, int]] = []
        at = last = 0
        for mark in self._mark.finditer(marked):
            before = marked[last : mark.start()]
            if mark.group(5) is not None:
                content = hidden[int(mark.group(5))]
            else:
                content = turns[int(mark.group(3))].content
                if not mark.group(1):
                    content = content.lstrip()
                if not mark.group(4):
                    content = content.rstrip()
                for _ in range((len(mark.group(2)) + 1).bit_length() - 1):
                    content = json.dumps(content, ensure_ascii=False)[1:-1]
            at += len(before)
            spans.append((at, at + len(content)))
            at += len(content)
            parts += [before, content]
            last = mark.end()
        parts.append(marked[last:])
        return "".join(parts), spans

    def _message(self, index: int, turn: ChatTurn, hidden: list[str]) -> dict[str, Any]:
        """A turn as templates take it, its text replaced by a mark."""
        # The blanks around a mark show whether the template trims what it is given.
        mark = f' \uf8ff"{self._nonce}{index}\uf8ff '
        message: dict[str, Any] = {"role": turn.role, "content": mark}
        if turn.tool_calls:
            message["tool_calls"] = [self._call(call, hidden) for call in turn.tool_calls]
            if not turn.content:
                message["content"] = ""
        if turn.tool_call_id:
            message["tool_call_id"] = self._hide(turn.tool_call_id, hidden)
        return message

    def _call(self, call: ToolCall, hidden: list[str]) -> dict[str, Any]:
        function = {"name": call.name, "arguments": json.loads(call.arguments)}
        plain = {"type": "function", "function": function, **({"id": call.id} if call.id else {})}
        found: dict[str, Any] = self._hide(plain, hidden)
        return found

    def _hide(self, value: Any, hidden: list[str]) -> Any:
        """JSON data in which marks stand for the strings of control tokens."""

        def mark(match: re.Match[str]) -> str:
            hidden.append(match.group())
            return f"\uf8ff{self._nonce}h{len(hidden) - 1}\uf8ff"

        if isinstance(value, str):
            return self._control_pattern.sub(mark, value)
        if isinstance(value, list):
            return [self._hide(item, hidden) for item in value]
        if isinstance(value, dict):
            return {self._hide(k, hidden): self._hide(v, hidden) for k, v in value.items()}
        return value

    def _template_text(self) -> str:
        """The chat template for conversations with tools, or the only one; empty: none."""
        templates = getattr(self._tokenizer, "chat_template", None)
        if isinstance(templates, dict):
            templates = templates.get("tool_use") or templates.get("default")
        return templates or ""

    def _renders_a_tool(self) -> bool:
        """Whether the template really tells the model what it may call."""
        from jinja2 import TemplateError

        name = f"probe_{self._nonce}"
        probe = descriptions([ToolSpec(name, "A probe.", '{"type": "object", "properties": {}}')])
        turns = [{"role": "user", "content": "?"}]
        try:
            rendered = self._tokenizer.apply_chat_template(turns, tools=probe, tokenize=False)
        except (TemplateError, ValueError, TypeError):
            return False
        return name in rendered

    def _special_prefix(self) -> list[int]:
        """What the tokenizer puts before a plain text (a beginning-of-sequence token)."""
        probe = self.backend.encode("a", add_special_tokens=True)
        prefix: list[int] = []
        for token, special in zip(probe.ids, probe.special_tokens_mask, strict=True):
            if not special:
                break
            prefix.append(token)
        return prefix

    def _plain_ids(self, text: str) -> list[int]:
        """Ids of text in which nothing is special."""
        if not text:
            return []
        encoding = self._plain.encode(text, add_special_tokens=False)
        ids: list[int] = encoding.ids
        if self._control_ids.isdisjoint(ids):
            return ids
        # Some vocabularies also hold the special strings as ordinary pieces; cut those apart.
        safe: list[int] = []
        for token, (begin, end) in zip(ids, encoding.offsets, strict=True):
            if token not in self._control_ids:
                safe.append(token)
            elif end - begin > 1:
                safe += self._plain_ids(text[begin : begin + 1])
                safe += self._plain_ids(text[begin + 1 : end])
            elif self._unknown_id() == token:
                safe.append(token)
        return safe

    def _unknown_id(self) -> int | None:
        """The id for characters outside the vocabulary; it may be a special token."""
        found: int | None = getattr(self._tokenizer, "unk_token_id", None)
        return found


def _without_tools(turns: tuple[ChatTurn, ...], tools: Sequence[ToolSpec]) -> tuple[ChatTurn, ...]:
    """The same conversation for a template that knows no tools."""
    found = [
        ChatTurn("user", result_as_text(turn.content))
        if turn.role == "tool"
        else replace(turn, content=turn.content + calls_as_text(turn.tool_calls), tool_calls=())
        if turn.tool_calls
        else turn
        for turn in turns
    ]
    if tools:
        told = instructions(tools)
        if found[0].role == "system":
            found[0] = replace(found[0], content=f"{found[0].content.rstrip()}\n\n{told}")
        else:
            found.insert(0, ChatTurn("system", told))
    return tuple(found)
