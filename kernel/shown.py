"""What turns show before they answer, for those who wait for them."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from typing import NamedTuple

MAX_TURNS = 1_024
"""Turns whose text is kept; the oldest that have ended go first."""
MAX_PIECES = 10_000
"""Pieces of one turn that are kept; the oldest go first."""
WAIT_S = 5.0
"""Longest wait for something new."""


class Piece(NamedTuple):
    """A piece of text."""

    seq: int
    """Of the syscall that showed it: pieces come in this order."""
    text: str


class _Text:
    __slots__ = ("changed", "ended", "pieces")

    def __init__(self) -> None:
        self.pieces: list[Piece] = []
        self.changed = asyncio.Event()
        self.ended = False


class Shown:
    """The texts of the turns of one host."""

    def __init__(self) -> None:
        self._turns: OrderedDict[str, _Text] = OrderedDict()

    def _of(self, turn: str) -> _Text:
        text = self._turns.get(turn)
        if text is None:
            text = self._turns[turn] = _Text()
            while len(self._turns) > MAX_TURNS:
                old = next((t for t, x in self._turns.items() if x.ended), next(iter(self._turns)))
                del self._turns[old]
        return text

    def put(self, turn: str, seq: int, piece: str) -> None:
        """A piece; one that is there already is left out."""
        text = self._of(turn)
        if text.pieces and text.pieces[-1].seq >= seq:
            return
        text.pieces.append(Piece(seq, piece))
        del text.pieces[:-MAX_PIECES]
        text.changed.set()

    def end(self, turn: str) -> None:
        """The turn is over."""
        text = self._turns.get(turn)
        if text is not None:
            text.ended = True
            text.changed.set()

    async def wait(self, turn: str, after: int) -> tuple[list[Piece], bool]:
        """Pieces after one, and whether there will be no more; waits a while for the first."""
        text = self._of(turn)
        if not text.ended and not any(p.seq > after for p in text.pieces):
            text.changed.clear()
            try:
                async with asyncio.timeout(WAIT_S):
                    await text.changed.wait()
            except TimeoutError:
                return [], text.ended
        return [p for p in text.pieces if p.seq > after], text.ended
