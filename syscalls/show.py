"""``show``: text for whoever waits for the answer, before there is one.

What is shown cannot be taken back, so everything it came from is durable first. If the turn
is cut off and runs again, it gets the same results again and so shows the same text, which
whoever watches has already, and goes on from there; a stream of a model goes on from exactly
the text that was handed out.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from llmos.syscalls.base import Caller, Request, Response, Services, handles

MAX_SHOWN_CHARS = 65_536
"""Of one piece."""


class Shown(Response):
    """It can be seen, if anybody looks."""


class Show(Request[Shown]):
    """Show a piece of text."""

    syscall: ClassVar[str] = "show"
    reach: ClassVar[Literal["visible"]] = "visible"

    text: str = Field(max_length=MAX_SHOWN_CHARS)


@handles(Show)
async def show(request: Show, caller: Caller, services: Services) -> Shown:
    """Put it where whoever waits finds it."""
    services.show(caller.turn, caller.seq, request.text)
    return Shown()
