"""``call``: tools, whose effects the kernel cannot take back.

Before a call leaves, its intent is durable; its outcome is recorded after. So a turn that
runs again gets the outcome of a call that is known to have ended. One whose outcome was lost
in a crash is cleared up by :func:`recover`, as far as the tool can tell.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import AfterValidator

from llmos.drivers.errors import LlmosError, ToolUnavailable, ToolUncertain
from llmos.syscalls.base import Caller, Request, Response, Services, handles
from llmos.syscalls.errors import InvalidRequest
from llmos.syscalls.labels import Labels, Provenance

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from llmos.drivers.protocols import Tool, ToolOutcome

T = TypeVar("T")

MAX_ARGUMENTS_BYTES = 1 << 20
"""Arguments of one call, as JSON."""
MAX_TRIES = 5
"""Attempts to reach a tool that is not available."""
RECOVERY_TRIES = 9
"""Attempts to find out what became of a call, over some 20 s: what brought the host down may
have brought down the target too, and giving up means asking a person."""
FIRST_WAIT_S = 0.1
"""Before the second attempt; doubles each time."""


def _plain(arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments as they come back from the journal, so that every attempt gets the same."""
    try:
        text = json.dumps(arguments, allow_nan=False, ensure_ascii=False)
        size = len(text.encode("utf-8"))
    except (TypeError, ValueError, RecursionError) as error:
        # Not a ValueError: pydantic would wrap it, and agents catch LlmosError.
        raise InvalidRequest("call", "arguments", f"no JSON: {error}") from None
    if size > MAX_ARGUMENTS_BYTES:
        raise InvalidRequest(
            "call", "arguments", f"{size} bytes as JSON, the limit is {MAX_ARGUMENTS_BYTES}"
        )
    plain = json.loads(text)
    assert isinstance(plain, dict)
    return plain


class CallResult(Response):
    """What the tool's target answered."""

    output: Any
    """Plain JSON data."""
    reference: str
    """How the target calls what it did: a booking number, a message id; may be empty."""
    idem_key: str
    """What the target was given to tell repetitions by."""


class Call(Request[CallResult]):
    """Call a tool."""

    syscall: ClassVar[str] = "call"
    reach: ClassVar[Literal["outside"]] = "outside"

    tool: str
    arguments: Annotated[dict[str, Any], AfterValidator(_plain)]
    """Plain JSON data, at most 1 MiB of it; anything else raises InvalidRequest."""

    @property
    def resource(self) -> str:
        """The tool."""
        return self.tool


def idem_key_of(caller: Caller) -> str:
    """What the target tells repetitions by.

    The kernel makes it of the message that is handled and of the call, so that it is the same
    when the message is handled again in another turn. Without one it is ``turn/seq``.
    """
    return caller.idem_key or f"{caller.turn}/{caller.seq}"


async def _reached(
    services: Services, attempt: Callable[[], Awaitable[T]], tries: int = MAX_TRIES
) -> T:
    """Try again while the target is not reached; nothing was done then."""
    for number in range(tries - 1):
        try:
            return await attempt()
        except ToolUnavailable:
            # Half of the wait by chance: callers that failed together do not return together.
            wait_s = FIRST_WAIT_S * 2**number
            await services.sleep(wait_s * (0.5 + 0.5 * services.random()))
    return await attempt()


def _result(tool: Tool, labels: Labels, outcome: ToolOutcome, caller: Caller) -> CallResult:
    key = idem_key_of(caller)
    return CallResult(
        output=outcome.output,
        reference=outcome.reference,
        idem_key=key,
        provenance=(Provenance(kind="tool", source=tool.name, version=key),),
        # The answer may repeat what the call told.
        labels=caller.labels.join(labels, Labels(tenants=frozenset({caller.tenant}))),
    )


@handles(Call)
async def call(request: Call, caller: Caller, services: Services) -> CallResult:
    """Call the tool once; again only as long as it has certainly done nothing.

    Raises:
        UnknownResource: no such tool, or not for this tenant.
        ToolRefused: it said no; nothing was done.
        ToolUnavailable: it was not reached in :data:`MAX_TRIES` attempts; nothing was done.
        ToolUncertain: it may or may not have been done; :func:`recover` may find out.
    """
    tool, labels = await services.tool(caller.tenant, request.tool)
    key = idem_key_of(caller)
    outcome = await _reached(services, lambda: tool.call(request.arguments, key))
    return _result(tool, labels, outcome, caller)


async def recover(request: Call, caller: Caller, services: Services) -> CallResult | None:
    """Find out the outcome of a call that left and of which no outcome is recorded.

    Args:
        request: The call, as it was recorded.
        caller: With the ``turn`` and ``seq`` of that call, which make its ``idem_key``.
        services: The services of the turn.

    Returns:
        The outcome: of the call made again if the target is idempotent; as the target tells
        if it can be asked, or of the call made now if it says that it never was. None: still
        nobody knows, so only a person can say. The target can do neither, was not reached in
        :data:`RECOVERY_TRIES` attempts, lost the answer again, or is no tool of the system
        any more.

    Raises:
        ToolRefused: it said no.
        ToolUnavailable: the call was never carried out, and now its target is not reached.
    """
    try:
        tool, labels = await services.tool(caller.tenant, request.tool)
    except LlmosError:
        # Not there, or not as it was. That is no answer to what it did then.
        return None
    key = idem_key_of(caller)

    async def again() -> ToolOutcome:
        return await tool.call(request.arguments, key)

    try:
        if tool.idempotent:
            try:
                outcome = await _reached(services, again, RECOVERY_TRIES)
            except ToolUnavailable:
                # Nothing was done now, but the first attempt may have been.
                return None
            return _result(tool, labels, outcome, caller)
        if not tool.queryable:
            return None
        try:
            found = await _reached(services, lambda: tool.lookup(key), RECOVERY_TRIES)
        except ToolUnavailable:
            return None
        outcome = found if found is not None else await _reached(services, again)
    except ToolUncertain:
        return None
    return _result(tool, labels, outcome, caller)
