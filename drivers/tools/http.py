"""``http``: a service that takes JSON by POST."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from typing import Annotated, Any
from urllib.parse import quote

import httpx2
from pydantic import AfterValidator, Field

from llmos.drivers.errors import ToolError, ToolRefused, ToolUnavailable, ToolUncertain
from llmos.drivers.protocols import ToolOutcome
from llmos.drivers.tools.options import Options, Secret, read_options
from llmos.drivers.tools.outcome import MAX_OUTPUT_BYTES, plain_outcome

KEY_HEADER = "Idempotency-Key"

_NOT_TAKEN = frozenset({408, 425, 429, 503})
"""The server says that it has not begun: come back later."""


def _web(value: str) -> str:
    try:
        url = httpx2.URL(value)
    except httpx2.InvalidURL as error:
        raise ValueError(f"no URL: {error}") from None
    if url.scheme not in ("http", "https") or not url.host:
        raise ValueError("begins with http:// or https:// and a host")
    if url.userinfo:
        raise ValueError("has a user or password in it; use headers, with env:NAME")
    return value


def _header(value: str) -> str:
    if not (value.isascii() and value.isprintable()):
        raise ValueError("printable ASCII characters only")
    return value


def _with_key(value: str) -> str:
    if "{idem_key}" not in value:
        raise ValueError("has no {idem_key} in it")
    return _web(value.replace("{idem_key}", "key")) and value


HeaderName = Annotated[str, Field(pattern=r"^[A-Za-z0-9-]+$", max_length=100)]
HeaderValue = Annotated[Secret, AfterValidator(_header)]


class HttpOptions(Options):
    """``[tools.NAME.options]``."""

    url: Annotated[str, AfterValidator(_web)]
    """Where the arguments are posted to. Redirects are not followed."""
    headers: dict[HeaderName, HeaderValue] = Field(default_factory=dict)
    """Sent with every request."""
    idempotent: bool = False
    """Whether the server, given one Idempotency-Key twice, acts once."""
    lookup_url: Annotated[str, AfterValidator(_with_key)] | None = None
    """Where GET tells what became of ``{idem_key}``: 404 means that it was never carried out."""


class _Progress:
    """Whether a request has begun to leave: before that, nothing can have been done."""

    def __init__(self) -> None:
        self.sent = False

    async def trace(self, event: str, info: dict[str, Any]) -> None:
        if ".send_request_" in event:
            self.sent = True


class HttpTool:
    """Posts the arguments as JSON with an ``Idempotency-Key``, and reads JSON.

    =========================  ==========================================================
    2xx                        the outcome: JSON, else text; the reference is the header
                               ``Location``, else the field ``reference`` or ``id``
    408, 425, 429, 503         ToolUnavailable
    409 of an idempotent tool  ToolUncertain: an earlier attempt may be under way
    other 4xx, 301, 307, 308   ToolRefused
    everything else            ToolUncertain
    nothing was sent yet       ToolUnavailable
    no whole answer            ToolUncertain
    =========================  ==========================================================

    Every call has a connection of its own: one that the server closes between two calls
    would look like one that broke during the second.
    """

    def __init__(self, name: str, options: Mapping[str, Any]) -> None:
        self._name = name
        self._options = read_options(name, HttpOptions, options)
        # Reading the certificates takes tens of milliseconds: once, not for each call.
        self._ssl = httpx2.create_ssl_context()
        self._running = 0

    @property
    def name(self) -> str:
        """Its name."""
        return self._name

    @property
    def idempotent(self) -> bool:
        """As the options say."""
        return self._options.idempotent

    @property
    def queryable(self) -> bool:
        """Whether there is a ``lookup_url``."""
        return self._options.lookup_url is not None

    async def call(self, arguments: Mapping[str, Any], idem_key: str) -> ToolOutcome:
        """Post it."""
        try:
            body = json.dumps(arguments, allow_nan=False).encode()
        except (TypeError, ValueError, RecursionError) as error:
            raise ToolRefused(self._name, f"the arguments are no JSON: {error}") from None
        progress = _Progress()
        status, headers, content = await self._request(
            "POST",
            self._options.url,
            {"Content-Type": "application/json", KEY_HEADER: idem_key},
            body,
            progress,
        )
        if not 200 <= status < 300:
            raise self._refusal(status, content)
        return self._outcome(headers, content)

    def _refusal(self, status: int, content: bytes) -> ToolError:
        said = content[:200].decode(errors="replace").strip()
        reason = f"{self._options.url} answered {status}" + (f": {said}" if said else "")
        if status in _NOT_TAKEN:
            return ToolUnavailable(self._name, reason)
        if status == 409 and self.idempotent:
            return ToolUncertain(self._name, reason)
        if 400 <= status < 500:
            return ToolRefused(self._name, reason)
        if status in (301, 307, 308):
            return ToolRefused(
                self._name, reason, remedy="It has moved: correct the url of the tool"
            )
        # 302 and 303 often stand for "done, look there"; 5xx may come after the effect.
        return ToolUncertain(self._name, reason)

    def _outcome(self, headers: httpx2.Headers, content: bytes) -> ToolOutcome:
        output: Any = None
        if content:
            try:
                output = json.loads(content)
            except (ValueError, RecursionError):
                output = content.decode(errors="replace")
        reference = headers.get("Location", "")
        if not reference and isinstance(output, dict):
            found = output.get("reference", output.get("id", ""))
            reference = str(found) if isinstance(found, str | int) else ""
        return plain_outcome(self._name, ToolOutcome(output, reference))

    async def lookup(self, idem_key: str) -> ToolOutcome | None:
        """Ask the server."""
        if self._options.lookup_url is None:
            raise ToolUnavailable(self._name, "it has no lookup_url")
        url = self._options.lookup_url.replace("{idem_key}", quote(idem_key, safe=""))
        try:
            status, headers, content = await self._request("GET", url, {}, b"", _Progress())
            if status == 404:
                return None
            if 200 <= status < 300:
                return self._outcome(headers, content)
        except ToolUncertain as error:
            # Asking changes nothing, so it may be asked again.
            raise ToolUnavailable(self._name, error.reason) from None
        raise ToolUnavailable(self._name, f"{url} answered {status}")

    async def _request(
        self, method: str, url: str, headers: dict[str, str], body: bytes, progress: _Progress
    ) -> tuple[int, httpx2.Headers, bytes]:
        """One request and its whole answer."""
        if self._running >= self._options.max_calls:
            raise ToolUnavailable(
                self._name, f"{self._running} calls are under way, which is its limit"
            )
        self._running += 1
        try:
            async with asyncio.timeout(self._options.timeout_s):
                return await self._exchange(method, url, headers, body, progress)
        except (TimeoutError, httpx2.TimeoutException):
            reason = f"{url} did not answer in {self._options.timeout_s:.3g} s"
        except (httpx2.HTTPError, httpx2.InvalidURL, OSError) as error:
            reason = f"{url}: {type(error).__name__}: {error}".rstrip(": ")
        except (UnicodeEncodeError, ValueError) as error:
            reason = f"the request cannot be written: {error}"
        finally:
            self._running -= 1
        raise (ToolUncertain if progress.sent else ToolUnavailable)(self._name, reason)

    async def _exchange(
        self, method: str, url: str, headers: dict[str, str], body: bytes, progress: _Progress
    ) -> tuple[int, httpx2.Headers, bytes]:
        content = bytearray()
        async with (
            httpx2.AsyncClient(
                verify=self._ssl,
                timeout=self._options.timeout_s,
                follow_redirects=False,
                # Proxies and .netrc of the machine would change where a call goes.
                trust_env=False,
            ) as client,
            client.stream(
                method,
                url,
                content=body,
                headers={**self._options.headers, "Accept-Encoding": "identity", **headers},
                extensions={"trace": progress.trace},
            ) as response,
        ):
            async for piece in response.aiter_raw():
                content += piece
                if len(content) > MAX_OUTPUT_BYTES:
                    if not response.is_success:
                        break  # The status says enough.
                    raise ToolUncertain(
                        self._name,
                        f"{url} answered {response.status_code} and more than "
                        f"{MAX_OUTPUT_BYTES} bytes",
                        remedy="Let it answer with a reference to the data",
                    )
        return response.status_code, response.headers, bytes(content)

    async def close(self) -> None:
        """Nothing to release."""
