"""``clock`` and ``random``: time and chance, from the kernel alone.

A turn must be able to run again with the same results, so it takes neither from the
standard library.
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from llmos.syscalls.base import Caller, Request, Response, Services, handles


class Instant(Response):
    """A moment, in seconds since 1970-01-01 UTC."""

    time_s: float


class Slept(Response):
    """The wait is over."""


class RandomNumber(Response):
    """A number in [0, 1)."""

    value: float


class Now(Request[Instant]):
    """What time is it?"""

    syscall: ClassVar[str] = "clock"
    immediate: ClassVar[bool] = True


class Sleep(Request[Slept]):
    """Wait."""

    syscall: ClassVar[str] = "clock"

    seconds: float = Field(ge=0, le=3600, allow_inf_nan=False)


class Random(Request[RandomNumber]):
    """Draw a number."""

    syscall: ClassVar[str] = "random"
    immediate: ClassVar[bool] = True


@handles(Now)
async def now(request: Now, caller: Caller, services: Services) -> Instant:
    """Read the clock."""
    return Instant(time_s=services.time())


@handles(Sleep)
async def sleep(request: Sleep, caller: Caller, services: Services) -> Slept:
    """Wait."""
    await services.sleep(request.seconds)
    return Slept()


@handles(Random)
async def random(request: Random, caller: Caller, services: Services) -> RandomNumber:
    """Draw."""
    return RandomNumber(value=services.random())
