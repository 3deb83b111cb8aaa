"""Time and chance of the live kernel; tests hand in their own."""

from __future__ import annotations

import asyncio
import random
import time
from datetime import datetime
from typing import Protocol
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from llmos.drivers.errors import LlmosError
from llmos.kernel.core.cron import Cron
from llmos.syscalls.errors import InvalidRequest


class Clock(Protocol):
    """Where the shell takes time and chance from."""

    def monotonic(self) -> float:
        """Seconds that never go back."""
        ...

    def time(self) -> float:
        """Seconds since 1970-01-01 UTC."""
        ...

    async def sleep(self, seconds: float) -> None:
        """Wait."""
        ...

    def random(self) -> float:
        """A number in [0, 1)."""
        ...


class SystemClock:
    """The real ones."""

    def __init__(self) -> None:
        self._random = random.SystemRandom()

    def monotonic(self) -> float:
        """Seconds that never go back."""
        return time.monotonic()

    def time(self) -> float:
        """Seconds since 1970-01-01 UTC."""
        return time.time()

    async def sleep(self, seconds: float) -> None:
        """Wait."""
        await asyncio.sleep(seconds)

    def random(self) -> float:
        """A number in [0, 1)."""
        return self._random.random()


def next_due(expression: str, tz: str, now: float) -> float:
    """When a cron expression is due next after ``now``, in seconds since 1970.

    Raises:
        InvalidRequest: no such expression or time zone, or it is never due.
    """
    try:
        zone = ZoneInfo(tz)
    except (ZoneInfoNotFoundError, ValueError, OSError):
        raise InvalidRequest("timer", "tz", f"no time zone is called {tz!r}") from None
    try:
        return Cron.parse(expression).next_after(datetime.fromtimestamp(now, zone)).timestamp()
    except LlmosError as error:
        raise InvalidRequest("timer", "cron", str(error)) from None
