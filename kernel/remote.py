"""Calls between processes: typed errors as values, lost processes as one error.

A Ray task that raises arrives as a class made up on the way, which loses attributes
and ``isinstance`` for errors whose ``__init__`` takes several arguments. So methods of
our actors *return* their typed errors (:func:`answers`), and :func:`call` raises them
on this side.
"""

from __future__ import annotations

import asyncio
import functools
import logging
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, ParamSpec, TypeAlias, TypeVar

import ray
from ray.exceptions import (
    ActorUnavailableError,
    RayActorError,
    RayError,
    RayTaskError,
    TaskCancelledError,
)

from llmos.drivers.errors import LlmosError
from llmos.syscalls.errors import Cancelled, DeadlineExceeded, ServiceUnavailable

P = ParamSpec("P")
T = TypeVar("T")

Handle: TypeAlias = Any
"""An actor handle. Ray types only what its decorators see; our classes are wrapped at
the edge, so calls through handles are untyped here and typed in the classes that use them."""

log = logging.getLogger("llmos.remote")

SHUTDOWN = "shutdown"
"""What cancels the turns of a host that closes: their messages stay where they are."""
MOVE = "a move"
"""What cancels the turns of an agent that another host has taken over."""


def put_down(cancelled: asyncio.CancelledError) -> bool:
    """Whether a turn was cancelled only to go on elsewhere: what it has asked of others goes
    on, too, and it will ask for that again."""
    return bool(cancelled.args) and cancelled.args[0] in (SHUTDOWN, MOVE)


class ProcessGone(ServiceUnavailable):
    """The process that was asked is dead or cut off; it may or may not have acted."""

    def __init__(self, service: str, reason: str, *, final: bool) -> None:
        super().__init__(service, reason)
        self.final = final
        """Whether it will not come back under the same handle."""


class InternalError(LlmosError):
    """A bug in LLM OS: an error without a type came through."""

    def __init__(self, where: str, error: str) -> None:
        self.where, self.error = where, error
        super().__init__(f"{where} failed unexpectedly: {error}", remedy="See: llmos logs")


def answers(
    method: Callable[P, Coroutine[Any, Any, T]],
) -> Callable[P, Coroutine[Any, Any, T | LlmosError]]:
    """Mark an actor's method: its typed errors are returned, not raised."""

    @functools.wraps(method)
    async def wrapped(*args: P.args, **kwargs: P.kwargs) -> T | LlmosError:
        try:
            return await method(*args, **kwargs)
        except LlmosError as error:
            # Frames do not travel, and would keep their locals alive here.
            return error.with_traceback(None)

    return wrapped


async def call(ref: Awaitable[Any], what: str, timeout_s: float | None = None) -> Any:
    """Wait for a call to an actor.

    Raises:
        LlmosError: what the method raised.
        ProcessGone: the process died or cannot be reached.
        DeadlineExceeded: no answer within ``timeout_s``.
        InternalError: anything else.
    """
    try:
        async with asyncio.timeout(timeout_s):
            value = await ref
    except TimeoutError:
        cancel(ref)
        raise DeadlineExceeded(what, timeout_s or 0.0) from None
    except asyncio.CancelledError as cancelled:
        if not put_down(cancelled):
            cancel(ref)
        raise
    except RayActorError as error:
        final = not isinstance(error, ActorUnavailableError)
        raise ProcessGone(what, _first_line(error), final=final) from None
    except TaskCancelledError:
        raise Cancelled(what, "its process") from None
    except RayTaskError as error:
        raise InternalError(what, str(error).strip().splitlines()[-1]) from error
    except RayError as error:
        raise ProcessGone(what, _first_line(error), final=False) from None
    if isinstance(value, LlmosError):
        raise value
    return value


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def cancel(ref: Any) -> None:
    """Ask for a call to be cancelled; one that is over is left alone."""
    if not ray.is_initialized():
        return  # ray.cancel would start a Ray of its own to cancel it in.
    try:
        ray.cancel(ref)
    except (RayError, ValueError, TypeError) as error:
        log.debug("cancel: %s", error)
