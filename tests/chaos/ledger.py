"""The ledger: a server outside the system that writes down every call it gets.

A process of its own, on 127.0.0.1, with an append-only file. It acts once per
``Idempotency-Key``, and writes down the repetitions too, with ``again``.

``GET /<key>`` tells what it did for a key.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import unquote

MAX_WAIT_S = 0.03
"""Longest pause between acting and answering: where a kill leaves the caller in doubt."""


class Entry:
    """One line of the file."""

    __slots__ = ("again", "at", "id", "key", "receiver", "sender")

    def __init__(self, line: dict[str, Any]) -> None:
        self.at: float = line["at"]
        self.key: str = line["key"]
        self.again: bool = line["again"]
        """The key was known: nothing was done."""
        arguments: dict[str, Any] = line["arguments"]
        self.receiver: str = arguments["receiver"]
        self.sender: str = arguments["sender"]
        self.id: str = arguments["id"]
        """What the work is called by whoever asked for it: unique, whatever the turn."""

    def __repr__(self) -> str:
        again = " (again)" if self.again else ""
        return f"{self.at:.3f} {self.key} {self.receiver} <- {self.sender} {self.id}{again}"


def read(file: Path) -> list[Entry]:
    """All lines, in order."""
    return [Entry(json.loads(line)) for line in file.read_text().splitlines()]


def serve(file: Path, seed: int) -> None:
    """Serve until standard input ends; says the port on standard output."""
    chance = random.Random(seed)
    lock = threading.Lock()
    done: dict[str, str] = {}
    out = file.open("a", buffering=1)

    class Handler(BaseHTTPRequestHandler):
        def _answer(self, status: int, body: dict[str, Any]) -> None:
            data = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def do_POST(self) -> None:
            size = int(self.headers["Content-Length"])
            data = self.rfile.read(size)
            if len(data) < size:
                return  # The caller was killed in the middle of it.
            body = json.loads(data)
            key = self.headers["Idempotency-Key"]
            with lock:
                again = key in done
                reference = done.setdefault(key, f"r{len(done) + 1}")
                line = {"at": time.time(), "key": key, "again": again, "arguments": body}
                out.write(json.dumps(line) + "\n")
                wait_s = chance.random() * MAX_WAIT_S
            time.sleep(wait_s)
            self._answer(200, {"reference": reference})

        def do_GET(self) -> None:
            with lock:
                reference = done.get(unquote(self.path[1:]))
            self._answer(404 if reference is None else 200, {"reference": reference})

        def log_message(self, format: str, *args: Any) -> None:
            pass

        def handle(self) -> None:
            with contextlib.suppress(ConnectionError):  # The caller was killed.
                super().handle()

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 1024

    server = Server(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(server.server_address[1], flush=True)
    sys.stdin.read()
    server.shutdown()


class Ledger:
    """The server in a process of its own."""

    def __init__(self, file: Path, seed: int) -> None:
        self.file = file
        file.touch()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.chaos.ledger", str(file), str(seed)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).resolve().parents[2],
        )
        assert self._process.stdout is not None
        self.url = f"http://127.0.0.1:{int(self._process.stdout.readline())}/"

    def close(self) -> None:
        """End it."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(5.0)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def __enter__(self) -> Ledger:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self.close()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("file", type=Path)
    parser.add_argument("seed", type=int)
    given = parser.parse_args()
    serve(given.file, given.seed)
