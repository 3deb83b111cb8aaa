"""Server-sent events, from bytes as they arrive.

The HTTP library has a reader of its own, but it takes decoded text and gives an event only
after an empty line; some servers leave that out at the end of a stream.
"""

from __future__ import annotations

import codecs

_BOM = codecs.BOM_UTF8


class LineTooLong(ValueError):
    """A line or an event is longer than any of an answer's events is."""


class EventReader:
    """Bytes in, the ``data`` of whole events out. Cuts may be anywhere, also within a character.

    Fields other than ``data``, and comments, carry nothing of an answer and are left out.
    Source: the section "Server-sent events" of the HTML standard.
    """

    def __init__(self, max_bytes: int) -> None:
        """``max_bytes``: of one event; more raises LineTooLong."""
        self._max = max_bytes
        self._line = bytearray()
        """The line that is not ended yet."""
        self._data: list[bytes] = []
        self._size = 0
        self._after_cr = False
        """The last byte was a carriage return; a line feed after it ends no other line."""
        self._begun = False

    def push(self, piece: bytes) -> list[bytes]:
        """The data of the events that this piece completes.

        Raises:
            LineTooLong
        """
        events: list[bytes] = []
        if piece and self._after_cr:
            self._after_cr = False
            piece = piece.removeprefix(b"\n")
        self._after_cr = piece.endswith(b"\r") or (not piece and self._after_cr)
        for part in piece.splitlines(keepends=True):
            # bytes.splitlines cuts at \n, \r and \r\n alone, which is what the standard says.
            self._line += part.rstrip(b"\r\n")
            if self._size + len(self._line) > self._max:
                raise LineTooLong(f"an event has more than {self._max} bytes")
            if part.endswith((b"\n", b"\r")):
                self._end_line(events)
        return events

    def flush(self) -> list[bytes]:
        """At the end of the stream: the event that no empty line has ended."""
        events: list[bytes] = []
        if self._line:
            self._end_line(events)
        self._end_line(events)
        return events

    def _end_line(self, events: list[bytes]) -> None:
        line = bytes(self._line)
        self._line.clear()
        if not self._begun:
            self._begun = True
            line = line.removeprefix(_BOM)
        if not line:
            if self._data:
                events.append(b"\n".join(self._data))
            self._data, self._size = [], 0
            return
        name, _, value = line.partition(b":")
        if name == b"data":
            self._data.append(value.removeprefix(b" "))
            self._size += len(line)
