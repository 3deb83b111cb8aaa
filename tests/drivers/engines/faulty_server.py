"""An OpenAI-compatible server that does, request by request, what a test tells it to.

It speaks HTTP/1.1 by hand over real sockets, so that it can also do what no library would.
"""

import asyncio
import json
import threading
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

START_S = 10


@dataclass
class Exchange:
    """One request, and the wire to answer on."""

    method: str
    path: str
    headers: dict[str, str]
    body: dict
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    gone: asyncio.Event = field(default_factory=asyncio.Event)
    """The client has closed the connection."""

    async def raw(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def head(self, status=200, content_type="text/event-stream", **headers) -> None:
        """Status and headers of an answer that ends with the connection."""
        lines = [f"HTTP/1.1 {status} X", f"Content-Type: {content_type}", "Connection: close"]
        lines += [f"{k.replace('_', '-')}: {v}" for k, v in headers.items()]
        await self.raw("\r\n".join([*lines, "", ""]).encode())

    async def event(self, data) -> None:
        text = data if isinstance(data, str) else json.dumps(data, ensure_ascii=False)
        await self.raw(f"data: {text}\n\n".encode())

    async def say(self, text, finish=None, **more) -> None:
        if "messages" in self.body:
            choice = {"index": 0, "delta": {"content": text}, "finish_reason": finish, **more}
        else:
            choice = {"index": 0, "text": text, "finish_reason": finish, **more}
        await self.event({"choices": [choice]})

    async def usage(self, prompt: int, new: int) -> None:
        usage = {"prompt_tokens": prompt, "completion_tokens": new}
        await self.event({"choices": [], "usage": usage})

    async def json(self, status: int, content, **headers) -> None:
        await self.head(status, "application/json", **headers)
        await self.raw(json.dumps(content).encode())

    async def hold(self) -> None:
        """Say no more until the client goes."""
        await self.gone.wait()


Behaviour = Callable[[Exchange], Awaitable[None]]


async def answer(exchange: Exchange, *words: str, finish="stop", usage=True) -> None:
    """What a good server does."""
    await exchange.head()
    for word in words or ("Hello", " there", "."):
        await exchange.say(word)
    await exchange.say("", finish)
    if usage:
        await exchange.usage(7, len(words) or 3)
    await exchange.event("[DONE]")


class FaultyServer:
    """Answers the n-th request by the n-th behaviour, and all after those by the last."""

    def __init__(self, *behaviours: Behaviour) -> None:
        self.behaviours = list(behaviours) or [answer]
        self.requests: list[Exchange] = []
        self.connections = 0
        self.most_at_once = 0
        self._at_once = 0
        self.left = threading.Semaphore(0)
        """Released when a client has closed its connection before the answer was over."""
        self._ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._main()), daemon=True)

    def __enter__(self) -> "FaultyServer":
        self._thread.start()
        assert self._ready.wait(START_S)
        return self

    def __exit__(self, *exc) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(START_S)
        assert not self._thread.is_alive()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def open(self) -> None:
        """Let those through that wait at the gate."""
        self._loop.call_soon_threadsafe(self.gate.set)

    async def _main(self) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        self._tasks: set[asyncio.Task] = set()
        self.gate = asyncio.Event()
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        self._ready.set()
        await self._stop.wait()
        server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(self, reader, writer) -> None:
        task = asyncio.current_task()
        self._tasks.add(task)
        self.connections += 1
        try:
            await self._exchange(reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            self._tasks.discard(task)
            writer.close()

    async def _exchange(self, reader, writer) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        first, *lines = head.split("\r\n")
        method, path, _ = first.split(" ")
        headers = {k.lower(): v.strip() for k, _, v in (x.partition(":") for x in lines if x)}
        content = await reader.readexactly(int(headers.get("content-length", 0)))
        body = json.loads(content) if content else {}
        exchange = Exchange(method, path, headers, body, reader, writer)
        number = min(len(self.requests), len(self.behaviours) - 1)
        self.requests.append(exchange)
        self._at_once += 1
        self.most_at_once = max(self.most_at_once, self._at_once)
        watch = asyncio.create_task(self._watch(exchange))
        try:
            await self.behaviours[number](exchange)
        except ConnectionError:
            exchange.gone.set()
        finally:
            self._at_once -= 1
            watch.cancel()
            if exchange.gone.is_set():
                self.left.release()

    async def _watch(self, exchange: Exchange) -> None:
        # A client sends nothing after its request: what comes is the end.
        if not await exchange.reader.read(1):
            exchange.gone.set()
