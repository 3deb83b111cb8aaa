"""A booking service over HTTP that misbehaves as a test wants, on a real socket."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import unquote


class Web:
    """Answers on 127.0.0.1; ``/lookup/KEY`` tells what was booked."""

    def __init__(self) -> None:
        self.port = 0
        self.booked: dict[str, list[Any]] = {}
        """Idempotency-Key → bodies that were acted on."""
        self.requests: list[tuple[str, dict[str, str]]] = []
        self.raw: bytes | None = None
        """Sent instead of an answer, before closing."""
        self.acts = True
        """Whether a request that gets ``raw`` is acted on all the same."""
        self.stall = ""
        """``read``: take nothing; ``answer``: answer nothing; ``body``: half an answer."""
        self.stalled = asyncio.Semaphore(0)
        """Released for each request that is not answered."""
        self.idempotent = True

    def url(self, path: str = "/book") -> str:
        return f"http://127.0.0.1:{self.port}{path}"

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await self._answer(reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self.stall == "read":
            await asyncio.sleep(60)
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        line, *rest = head.split("\r\n")
        headers = {k.lower(): v for k, v in (h.split(": ", 1) for h in rest if h)}
        body = await reader.readexactly(int(headers.get("content-length", 0)))
        self.requests.append((line, headers))
        if self.raw is not None:
            if self.acts:
                self._book(headers, json.loads(body))
            writer.write(self.raw)
            await writer.drain()
            return
        if self.stall == "answer":
            self.stalled.release()
            await asyncio.sleep(60)
        method, path, _ = line.split(" ")
        if method == "GET":
            key = unquote(path.removeprefix("/lookup/"))
            found = self.booked.get(key)
            status, answer = (200, self._receipt(key)) if found else (404, {})
        else:
            given = json.loads(body)
            if "seat" not in given:
                status, answer = 422, {"error": "no seat"}
            else:
                self._book(headers, given)
                status, answer = 201, self._receipt(headers["idempotency-key"])
        packed = json.dumps(answer).encode()
        writer.write(response(status, packed, "application/json"))
        await writer.drain()
        if self.stall == "body":
            await asyncio.sleep(60)

    def _book(self, headers: dict[str, str], body: Any) -> None:
        key = headers["idempotency-key"]
        if not (self.idempotent and key in self.booked):
            self.booked.setdefault(key, []).append(body)

    def _receipt(self, key: str) -> dict[str, Any]:
        return {"id": 100 + list(self.booked).index(key), "seat": self.booked[key][0]["seat"]}


def response(status: int, body: bytes = b"", kind: str = "text/plain", *more: str) -> bytes:
    """A whole answer."""
    head = [
        f"HTTP/1.1 {status} Whatever",
        f"Content-Type: {kind}",
        f"Content-Length: {len(body)}",
        *more,
    ]
    return ("\r\n".join(head) + "\r\n\r\n").encode() + body


@asynccontextmanager
async def serving(web: Web) -> AsyncIterator[Web]:
    """Run it on a free port; at the end, cut whatever still hangs."""
    connections: set[asyncio.Task[None]] = set()

    async def accepted(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        connections.add(task)
        try:
            await web.serve(reader, writer)
        except asyncio.CancelledError:
            pass
        finally:
            connections.discard(task)

    server = await asyncio.start_server(accepted, "127.0.0.1", 0)
    web.port = server.sockets[0].getsockname()[1]
    try:
        yield web
    finally:
        server.close()
        for task in connections:
            task.cancel()
        await asyncio.gather(*connections, return_exceptions=True)
