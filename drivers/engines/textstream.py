"""From tokens to text as it arrives: whole characters, and never part of a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_BROKEN = "\ufffd"


class StopFilter:
    """Passes text on until one of some strings is complete.

    The first to be *complete* counts, and the text ends before it. (The first to
    *begin* would depend on how the text was cut into tokens.)
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.stopped = False

    def push(self, text: str) -> str:
        """Add text; returns what can be let out. After ``stopped`` nothing more comes."""
        if not self._stops or self.stopped:
            return "" if self.stopped else text
        held = self._held + text
        found = [(at + len(s), at) for s in self._stops if (at := held.find(s)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return held[: min(found)[1]]
        keep = max(self._tail(held, s) for s in self._stops)
        self._held = held[len(held) - keep :]
        return held[: len(held) - keep]

    def flush(self) -> str:
        """What was held back, at the end of the text."""
        held, self._held = self._held, ""
        return held

    @staticmethod
    def _tail(text: str, stop: str) -> int:
        """Length of the longest end of ``text`` that ``stop`` begins with."""
        at = text.find(stop[0], max(0, len(text) - len(stop) + 1))
        while at >= 0:
            if stop.startswith(text[at:]):
                return len(text) - at
            at = text.find(stop[0], at + 1)
        return 0


class Detokenizer:
    """Decodes one answer token by token, in whole characters.

    A token may hold half a character, and some decoders look at the token before
    (spaces, byte runs). So a window of tokens is decoded, beginning with those
    already shown, and what is new in it is let out once it ends in a whole
    character. Special tokens give no text.
    """

    MAX_PENDING = 16
    """Tokens without a whole character before the window is let out as it is:
    a model that emits rubbish bytes must not make every step dearer."""

    def __init__(self, backend: Any) -> None:
        self._backend = backend
        self._shown: list[int] = []
        self._pending: list[int] = []

    def push(self, token: int) -> str:
        """Add a token; returns the text that is now certain."""
        self._pending.append(token)
        text = self._new_text()
        if text.endswith(_BROKEN) and len(self._pending) < self.MAX_PENDING:
            return ""
        if not text and len(self._pending) < self.MAX_PENDING:
            return ""
        self._shown, self._pending = self._pending, []
        return text

    def flush(self) -> str:
        """The rest at the end of the answer, without half a character."""
        text = self._new_text().rstrip(_BROKEN) if self._pending else ""
        self._shown, self._pending = [], []
        return text

    def _new_text(self) -> str:
        before: str = self._backend.decode(self._shown, skip_special_tokens=True)
        whole: str = self._backend.decode(self._shown + self._pending, skip_special_tokens=True)
        return whole[len(before) :]
