"""One attempt at a server: the request goes out, and events come in until the answer ends."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from typing import Any, Protocol

import httpx2

from llmos.drivers.engines.remote_answer import Answer, BadEvent, Piece, ServerSaid
from llmos.drivers.engines.remote_faults import Fault, fault_of
from llmos.drivers.engines.sse import EventReader, LineTooLong
from llmos.drivers.errors import RemoteBroken, RemoteRefused, RemoteUnreachable
from llmos.drivers.protocols import RemoteOptions

MAX_EVENT_BYTES = 1 << 20
MAX_ERROR_BYTES = 1 << 16
ERROR_S = 5.0
"""How long the text of an error is waited for; the status alone says enough."""
AFTER_S = 0.25
"""How long counts are waited for when the text is complete."""


class Reader(Protocol):
    """Who takes the answer."""

    answer: Answer

    @property
    def complete(self) -> bool:
        """No more text is wanted: it ended, here or there."""
        ...

    def take(self, piece: Piece) -> bool:
        """A piece; True: it holds something that the model wrote."""
        ...

    @property
    def paused(self) -> bool:
        """Nothing more is to be read for now."""
        ...

    async def ready(self) -> None:
        """Returns when it is not paused any more."""
        ...


class Caller:
    """Requests to one server. Lives in one event loop."""

    def __init__(self, model: str, options: RemoteOptions) -> None:
        self._model, self._options = model, options
        headers = {"Accept": "text/event-stream", "Accept-Encoding": "identity"}
        if options.api_key:
            headers["Authorization"] = f"Bearer {options.api_key}"
        self._client = httpx2.AsyncClient(
            headers=headers,
            verify=httpx2.create_ssl_context(),
            # Only the connection has a limit of the library's; the others run over several reads.
            timeout=httpx2.Timeout(None, connect=options.connect_timeout_s),
            limits=httpx2.Limits(
                max_connections=options.max_concurrent + 1,
                max_keepalive_connections=options.max_concurrent,
            ),
            follow_redirects=False,
            # Proxies and .netrc of the machine would change where prompts and the key go.
            trust_env=False,
        )

    async def close(self) -> None:
        """Close the connections."""
        await self._client.aclose()

    async def run(
        self, path: str, body: Mapping[str, Any], reader: Reader, asked: tuple[int, int]
    ) -> None:
        """Ask, and hand over the answer until it is complete. Cancelling closes the connection,
        by which the server knows.

        Raises:
            Fault
        """
        loop = asyncio.get_running_loop()
        limits = self._options
        first = loop.time() + limits.first_token_timeout_s
        events = EventReader(MAX_EVENT_BYTES)
        begun = over = False
        try:
            async with (
                asyncio.timeout_at(first) as limit,
                self._client.stream(
                    "POST",
                    limits.url.rstrip("/") + path,
                    content=json.dumps(body).encode(),
                    headers={"Content-Type": "application/json"},
                ) as response,
            ):
                await self._check(response, asked)
                async for part in _parts(response):
                    for data in events.flush() if part is None else events.push(part):
                        if reader.paused:
                            # Its own silence is not the server's, which sees that nobody reads.
                            limit.reschedule(None)
                            await reader.ready()
                            again_s = (
                                limits.stall_timeout_s if begun else limits.first_token_timeout_s
                            )
                            limit.reschedule(loop.time() + again_s)
                        begun = reader.take(reader.answer.take(data)) or begun
                        if reader.complete or reader.answer.done:
                            # Read on to the end: counts may follow, and only then can the
                            # connection be used again.
                            if not over:
                                limit.reschedule(loop.time() + AFTER_S)
                            over = True
                        elif begun:
                            limit.reschedule(loop.time() + limits.stall_timeout_s)
        except TimeoutError:
            if not over:
                raise self._silent(begun) from None
        except ServerSaid as error:
            if not over:
                raise self._said(error, asked) from None
        except (BadEvent, LineTooLong) as error:
            if not over:
                raise self._broken(str(error)) from None
        except (httpx2.HTTPError, httpx2.InvalidURL, OSError) as error:
            if not over:
                raise self._lost(error, begun) from None
        if not reader.complete:
            raise self._broken("ended its answer in the middle", again=True)

    async def models(self) -> list[dict[str, Any]]:
        """What the server serves. Raises Fault."""
        url = self._options.url.rstrip("/") + "/models"
        try:
            async with asyncio.timeout(self._options.connect_timeout_s + ERROR_S):
                response = await self._client.get(url, headers={"Accept": "application/json"})
        except (TimeoutError, httpx2.HTTPError, OSError) as error:
            raise self._lost(error, False) from None
        if response.status_code != 200:
            raise fault_of(
                self._model,
                self._options,
                response.status_code,
                response.headers,
                response.text[:MAX_ERROR_BYTES],
                (0, 0),
            )
        try:
            found = response.json()["data"]
            return [m for m in found if isinstance(m, dict)]
        except (ValueError, KeyError, TypeError):
            raise self._broken("sent a list of models that cannot be read") from None

    async def _check(self, response: httpx2.Response, asked: tuple[int, int]) -> None:
        kind = response.headers.get("content-type", "").partition(";")[0].strip().lower()
        encoding = response.headers.get("content-encoding", "identity").lower()
        if response.status_code == 200 and kind == "text/event-stream" and encoding == "identity":
            return
        content = await self._content(response)
        if response.status_code != 200:
            raise fault_of(
                self._model, self._options, response.status_code, response.headers, content, asked
            )
        if isinstance(content, dict) and content.get("error"):
            raise ServerSaid(content["error"])
        what = f"{kind or 'no content type'}, {encoding}"
        raise Fault(
            RemoteBroken(
                self._model,
                self._options.url,
                f"answered with {what} where a stream of events was asked for",
                status=200,
                remedy="Is there an OpenAI-compatible server at that url, and does it stream?",
            )
        )

    async def _content(self, response: httpx2.Response) -> Any:
        content = bytearray()
        try:
            async with asyncio.timeout(ERROR_S):
                async for part in response.aiter_raw():
                    content += part
                    if len(content) > MAX_ERROR_BYTES:
                        break
        except (TimeoutError, httpx2.HTTPError):
            return bytes(content).decode(errors="replace")
        try:
            return json.loads(content)
        except (ValueError, RecursionError):
            return bytes(content[:1000]).decode(errors="replace")

    def _silent(self, begun: bool) -> Fault:
        limits, table = self._options, f"[models.{self._model}.remote]"
        if begun:
            reason, name = f"fell silent for {limits.stall_timeout_s:.3g} s", "stall_timeout_s"
        else:
            reason = f"wrote nothing in {limits.first_token_timeout_s:.3g} s"
            name = "first_token_timeout_s"
        # Not again: whoever waits has waited as long as was to be waited.
        return Fault(
            RemoteBroken(
                self._model,
                limits.url,
                reason,
                remedy=f"See what holds the server up, or raise {name} in {table}",
            )
        )

    def _said(self, error: ServerSaid, asked: tuple[int, int]) -> Fault:
        status = error.content.get("code") if isinstance(error.content, dict) else None
        if not isinstance(status, int) or not 400 <= status < 600:
            status = 500
        return fault_of(self._model, self._options, status, {}, {"error": error.content}, asked)

    def _broken(self, reason: str, *, again: bool = False) -> Fault:
        return Fault(
            RemoteBroken(self._model, self._options.url, reason, remedy="See the server's log"),
            again=again,
        )

    def _lost(self, error: Exception, begun: bool) -> Fault:
        what = f"{type(error).__name__}: {error}".rstrip(": ")
        table = f"[models.{self._model}.remote]"
        if begun:
            return self._broken(f"broke off in the middle of its answer ({what})", again=True)
        if isinstance(error, httpx2.UnsupportedProtocol | httpx2.InvalidURL):
            return Fault(
                RemoteRefused(
                    self._model,
                    self._options.url,
                    f"has no possible address ({what})",
                    remedy=f"Correct url of {table}",
                ),
                servers=False,
            )
        connecting = isinstance(error, httpx2.ConnectError | httpx2.ConnectTimeout)
        reason = "cannot be reached" if connecting else "closed the connection without an answer"
        return Fault(
            RemoteUnreachable(
                self._model,
                self._options.url,
                f"{reason} ({what})",
                remedy=f"Start the server, or correct url of {table}",
            ),
            again=True,
        )


async def _parts(response: httpx2.Response) -> AsyncIterator[bytes | None]:
    """The body as it comes, and None at its end."""
    async for part in response.aiter_raw():
        yield part
    yield None
