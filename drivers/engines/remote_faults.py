"""What a server's refusal means: which error, which remedy, and whether to ask again."""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Mapping
from email.utils import parsedate_to_datetime
from typing import Any

from llmos.drivers.errors import (
    EngineError,
    PromptTooLong,
    RemoteError,
    RemoteRefused,
    RemoteUnreachable,
    ServerBusy,
)
from llmos.drivers.protocols import RemoteOptions

LONGEST_PAUSE_S = 60.0
"""A server that wants to be left alone for longer is not waited for: the caller is told."""

_CONTEXT = re.compile(
    r"context[ _](length|size|window)|maximum (context|model) length|prompt is too long|"
    r"longer than the model|exceed_context",
    re.IGNORECASE,
)
_LIMIT = re.compile(r"(?:length|size|window|limit)\D{0,40}?(\d{2,9})", re.IGNORECASE)


class Fault(Exception):
    """An attempt failed."""

    def __init__(
        self,
        error: EngineError,
        *,
        again: bool = False,
        servers: bool = True,
        pause_s: float = 0.0,
    ) -> None:
        """
        Args:
            error: What the caller is told if this was the last attempt.
            again: Whether the same request may succeed later.
            servers: Whether the server is to blame, and not the request.
            pause_s: How long the server wants to be left alone.
        """
        self.error, self.again, self.servers, self.pause_s = error, again, servers, pause_s
        super().__init__(str(error))


def fault_of(
    model: str,
    options: RemoteOptions,
    status: int,
    headers: Mapping[str, str],
    content: Any,
    asked: tuple[int, int],
) -> Fault:
    """What an answer that is no stream means.

    ``content``: its JSON or text; ``asked``: tokens of the prompt (maybe an estimate) and new.
    """
    said = _said(content)
    if options.api_key:
        said = said.replace(options.api_key, "***")
    reason = f"answered {status}" + (f": {said}" if said else "")
    if status >= 400 and _CONTEXT.search(f"{said} {json.dumps(content, default=str)[:1000]}"):
        return Fault(_too_long(model, options, content, said, asked), servers=False)
    if status in (429, 503, 529):
        pause_s = _retry_after_s(headers.get("retry-after", ""), time.time())
        busy = ServerBusy(model, options.url, reason, min(pause_s or 1.0, 3600.0))
        # A server without a word on when is one that has trouble, not one with a plan.
        return Fault(busy, again=pause_s <= LONGEST_PAUSE_S, servers=status != 429, pause_s=pause_s)
    if status in (408, 425) or (status >= 500 and status not in (501, 505)):
        error: RemoteError = RemoteUnreachable(
            model, options.url, reason, status=status, remedy="See the server's log"
        )
        return Fault(error, again=True, servers=status >= 500)
    error = RemoteRefused(
        model, options.url, reason, status=status, remedy=_remedy(model, options, status)
    )
    return Fault(error, servers=status >= 500)


def _remedy(model: str, options: RemoteOptions, status: int) -> str:
    table = f"[models.{model}.remote]"
    if status in (401, 403):
        if options.api_key:
            return f"It does not take the key that api_key_env of {table} names"
        return f"Let api_key_env of {table} name the environment variable that holds its key"
    if status in (404, 405):
        return (
            f"Let model of {table} be one that {options.url}/models lists "
            f"(it is {options.model!r}), and url end where that begins, in /v1"
        )
    if 300 <= status < 400:
        return f"Correct url of {table}: redirects are not followed, the key would go along"
    return "Ask for less, or correct the request"


def _too_long(
    model: str, options: RemoteOptions, content: Any, said: str, asked: tuple[int, int]
) -> PromptTooLong:
    prompt, new = asked
    details = content.get("error", content) if isinstance(content, dict) else {}
    details = details if isinstance(details, dict) else {}
    found = _LIMIT.search(said)
    limit = details.get("n_ctx", int(found.group(1)) if found else options.context_tokens)
    prompt = details.get("n_prompt_tokens", prompt)
    whole = [n if isinstance(n, int) else 0 for n in (prompt, limit)]
    return PromptTooLong(model, whole[0], new, whole[1], "server's context")


def _said(content: Any) -> str:
    """The words in an error, wherever a server puts them."""
    for _ in range(3):
        if not isinstance(content, dict):
            break
        content = next(
            (content[k] for k in ("error", "message", "detail") if content.get(k)), str(content)
        )
    text = content if isinstance(content, str) else json.dumps(content, default=str)
    return " ".join(text.split())[:300]


def _retry_after_s(value: str, now_s: float) -> float:
    """Seconds, from the number or the date that the header holds; 0: it says nothing."""
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(value).timestamp() - now_s
        except (ValueError, TypeError, OverflowError):
            return 0.0
    return max(0.0, seconds) if math.isfinite(seconds) else 0.0
