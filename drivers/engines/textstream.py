"""From tokens to text as it arrives: whole characters, and never part of a stop string."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

_BROKEN = "\ufffd"


class StopFilter:
    """Passes text on until one of some strings is complete.

    The first to be *complete* counts, and the text ends before it. (The first to
    *begin* would depend on how the text was cut into tokens.)

    What was let out may be handed to a model as the beginning of its answer, and should
    then become the tokens that it wrote. So, but for the end of the answer, a piece (the
    text of tokens) is let out whole or held back whole; and blanks wait for what follows
    them, because tokenizers cut them by it: before a word, two line feeds are two tokens.

    From a mark on, nothing is let out before the end: there a tool call may have begun.
    """

    MAX_BLANKS = 256
    """Characters after which blanks wait no longer: a model may write nothing else."""

    def __init__(
        self,
        stops: Sequence[str],
        before: str = "",
        *,
        marks: Sequence[str] = (),
        hold_all: bool = False,
    ) -> None:
        """Begin a text.

        Args:
            stops: Each ends the text before it.
            before: Text that was let out already, in which a stop string may begin.
            marks: What comes from the first of these on is held back to the end. They begin
                after ``before``.
            hold_all: Hold back everything.
        """
        self._stops, self._marks = tuple(stops), tuple(marks)
        self.stopped = False
        self.held_pieces = 0
        """Pieces pushed whose text is held back; those without text go with the next."""
        longest = max(map(len, self._stops), default=1)
        self._text = before[len(before) - min(len(before), longest - 1) :]
        """All in which a stop string may have begun: first what is out, then what is held."""
        self._out = len(self._text)
        self._mark_at: int | None = self._out if hold_all else None
        """Where in the text a mark has come."""
        self._ends: deque[tuple[int, int]] = deque()
        """Of each held piece: where in the text it ends, and it and those without text before."""
        self._empty = 0

    def push(self, text: str) -> str:
        """Add a piece; returns what can be let out. After ``stopped`` nothing more comes."""
        if self.stopped:
            return ""
        self.held_pieces += 1
        if not text:
            self._empty += 1
            return ""
        new = len(self._text)
        whole = self._text + text
        found = [
            (at + len(s), at)
            for s in self._stops
            if (at := whole.find(s, max(0, new - len(s) + 1))) >= 0
        ]
        if found:
            self.stopped = True
            return self._let_out(whole, min(found)[1])
        self._ends.append((len(whole), self._empty + 1))
        self._empty = 0
        open_at = len(whole) - max(
            (self._tail(whole, s) for s in (*self._stops, *self._marks)), default=0
        )
        if self._mark_at is None:
            seen = [
                at
                for mark in self._marks
                if (at := whole.find(mark, max(self._out, new - len(mark) + 1))) >= 0
            ]
            self._mark_at = min(seen, default=None)
        if self._mark_at is not None:
            open_at = min(open_at, self._mark_at)
        end = self._out
        for at, _ in self._ends:
            if at > open_at:
                break
            if not (whole[at - 1].isspace() and at - self._out < self.MAX_BLANKS):
                end = at
        while self._ends and self._ends[0][0] <= end:
            self.held_pieces -= self._ends.popleft()[1]
        out = whole[self._out : end]
        # What is out is kept while a stop string may have begun in it.
        kept = min(open_at, end)
        if self._mark_at is not None:
            self._mark_at -= kept
        self._text, self._out = whole[kept:], end - kept
        self._ends = deque((at - kept, pieces) for at, pieces in self._ends)
        return out

    def flush(self) -> str:
        """What was held back, at the end of the text."""
        return self._let_out(self._text, len(self._text))

    def _let_out(self, text: str, end: int) -> str:
        out = text[self._out : end]
        self._text, self._out, self.held_pieces, self._empty = "", 0, 0, 0
        self._ends.clear()
        return out

    @staticmethod
    def _tail(text: str, stop: str) -> int:
        """Length of the longest end of ``text``, not all of ``stop``, that it begins with."""
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
    character. Special tokens give no text, but for those that are asked for.
    """

    MAX_PENDING = 16
    """Tokens without a whole character before the window is let out as it is:
    a model that emits rubbish bytes must not make every step dearer."""

    def __init__(
        self, backend: Any, shown: Sequence[int] = (), controls: Mapping[int, str] | None = None
    ) -> None:
        """Begin an answer.

        Args:
            backend: Of the tokenizers library.
            shown: The tokens of text that the answer was made to begin with.
            controls: Special tokens that are part of the text, with their text.
        """
        self._backend = backend
        self._controls = controls or {}
        # As many as are decoded together later on; more would only take longer.
        self._shown = list(shown[-self.MAX_PENDING :])
        self._pending: list[int] = []

    def push(self, token: int) -> str:
        """Add a token; returns the text that is now certain."""
        if token in self._controls:
            return self.flush() + self._controls[token]
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
