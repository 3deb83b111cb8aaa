"""From a prompt to token ids, with nothing in user text ever taken for a control token.

The template is rendered with marks in place of the texts, so it never sees them.
Then its own special tokens are looked up one by one and everything else, template
text and user text together, goes through a copy of the tokenizer that knows no
special token. The library's ``split_special_tokens`` was the alternative: it also
splits the template's tokens when the prompt is one string, and tokenizing each text
on its own would cut words and blank lines differently from how the model learnt them.
"""

from __future__ import annotations

import json
import re
import secrets
from typing import Any

from llmos.drivers.engines.checks import check_prompt
from llmos.drivers.errors import EngineFailed, InvalidParams
from llmos.drivers.protocols import ChatTurn


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
        # Unguessable, so that no text can pose as a mark.
        self._nonce = secrets.token_hex(8)
        self._mark = re.compile(rf"( ?)\uf8ff{self._nonce}(\d+)\uf8ff( ?)")
        self.longest_token = max((len(t) for t in backend.get_vocab()), default=1)
        """Characters of the longest token: a text has at least len/longest tokens."""

    def encode(self, prompt: str | tuple[ChatTurn, ...]) -> list[int]:
        """Token ids of a prompt, template and beginning-of-sequence included.

        Raises:
            InvalidParams: empty, not Unicode, or the template refuses these turns.
        """
        check_prompt(prompt)
        if isinstance(prompt, str):
            return self._special_prefix() + self._plain_ids(prompt)
        text, spans = self._render(prompt)
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

    def _render(self, turns: tuple[ChatTurn, ...]) -> tuple[str, list[tuple[int, int]]]:
        """The rendered prompt and where the turns' own texts are in it."""
        from jinja2 import TemplateError

        if not getattr(self._tokenizer, "chat_template", None):
            raise InvalidParams(
                "prompt", "turns", "the model has no chat template; pass the prompt as a string"
            )
        # The blanks around a mark show whether the template trims what it is given.
        messages = [
            {"role": t.role, "content": f" \uf8ff{self._nonce}{i}\uf8ff "}
            for i, t in enumerate(turns)
        ]
        try:
            marked = self._tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=False
            )
        except (TemplateError, ValueError, TypeError) as error:
            roles = ", ".join(t.role for t in turns)
            raise InvalidParams("prompt", roles, f"the chat template says: {error}") from error
        parts: list[str] = []
        spans: list[tuple[int, int]] = []
        at = last = 0
        for mark in self._mark.finditer(marked):
            before = marked[last : mark.start()]
            content = turns[int(mark.group(2))].content
            if not mark.group(1):
                content = content.lstrip()
            if not mark.group(3):
                content = content.rstrip()
            at += len(before)
            spans.append((at, at + len(content)))
            at += len(content)
            parts += [before, content]
            last = mark.end()
        parts.append(marked[last:])
        return "".join(parts), spans

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
