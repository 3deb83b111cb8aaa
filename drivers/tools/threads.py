"""Calls of functions that block, each in a thread of its own.

Not in a pool: a function that never comes back would take a place of the event loop's pool
for ever, and would keep the process from ending. Here it costs a place of its own tool only.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from typing import TypeVar

from llmos.drivers.errors import ToolUnavailable

T = TypeVar("T")


class Threads:
    """Runs at most so many calls of one tool at a time."""

    def __init__(self, tool: str, limit: int) -> None:
        self._tool, self._limit = tool, limit
        self._running = 0
        self._lock = threading.Lock()

    @property
    def running(self) -> int:
        """Calls under way, those that nobody waits for any more included."""
        return self._running

    async def run(self, function: Callable[[], T]) -> T:
        """Run it and wait. Cancelling stops the waiting, not the function.

        Raises:
            ToolUnavailable: as many calls as may be are under way; it was not begun.
        """
        with self._lock:
            if self._running >= self._limit:
                raise ToolUnavailable(
                    self._tool, f"{self._running} calls are under way, which is its limit"
                )
            self._running += 1
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()
        # Whether or not anybody still waits for it, its error has been seen.
        future.add_done_callback(lambda done: done.cancelled() or done.exception())

        def settle(result: T | None, error: BaseException | None) -> None:
            if future.done():
                return
            if error is not None:
                future.set_exception(error)
            else:
                future.set_result(result)  # type: ignore[arg-type]

        def work() -> None:
            result: T | None = None
            failure: BaseException | None = None
            try:
                result = function()
            except StopIteration as error:
                # A future cannot hold one.
                failure = RuntimeError(f"StopIteration: {error}")
            except BaseException as error:  # noqa: BLE001 - it is raised where the result is awaited
                failure = error
            with self._lock:
                self._running -= 1
            with contextlib.suppress(RuntimeError):  # The loop is closed: nobody waits.
                loop.call_soon_threadsafe(settle, result, failure)

        try:
            threading.Thread(target=work, name=f"tool {self._tool}", daemon=True).start()
        except RuntimeError as error:
            with self._lock:
                self._running -= 1
            raise ToolUnavailable(self._tool, f"no thread for it: {error}") from None
        return await future
