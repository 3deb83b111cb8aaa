"""Callbacks after one and the same short delay, nearly all of which are called off before."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable


class Call:
    """A callback that waits. ``cancel`` calls it off."""

    __slots__ = ("callback", "due")

    def __init__(self, due: float, callback: Callable[[], None]) -> None:
        self.due = due
        self.callback: Callable[[], None] | None = callback

    def cancel(self) -> None:
        """Call it off; without effect once it was called."""
        self.callback = None


class Soon:
    """One timer of the event loop for all of them.

    A timer of its own for each, made and cancelled for thousands of turns a second that end
    before it is due, took a fiftieth of a host's time.
    """

    def __init__(self, delay_s: Callable[[], float]) -> None:
        """``delay_s`` is asked at each call, and always says the same."""
        self._delay_s = delay_s
        self._calls: deque[Call] = deque()
        """In the order in which they are due. Those that were called off leave it then, too:
        it holds as many as are made within the delay."""
        self._timer: asyncio.TimerHandle | None = None

    def call(self, callback: Callable[[], None]) -> Call:
        """Call it after the delay."""
        loop = asyncio.get_running_loop()
        call = Call(loop.time() + self._delay_s(), callback)
        self._calls.append(call)
        if self._timer is None:
            self._timer = loop.call_at(call.due, self._run)
        return call

    def _run(self) -> None:
        loop = asyncio.get_running_loop()
        self._timer = None
        now, calls = loop.time(), self._calls
        try:
            while calls and calls[0].due <= now:
                callback = calls.popleft().callback
                if callback is not None:
                    callback()
        finally:
            while calls and calls[0].callback is None:
                calls.popleft()
            if calls and self._timer is None:
                self._timer = loop.call_at(calls[0].due, self._run)
