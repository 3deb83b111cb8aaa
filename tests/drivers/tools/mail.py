"""A small mail server on a real socket that answers as a test wants."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator


class Mailhost:
    """Speaks enough SMTP, one thread for each connection."""

    def __init__(self) -> None:
        self.mails: list[tuple[str, list[str], bytes]] = []
        """(from, to, content) of what was taken."""
        self.answers: dict[str, bytes] = {}
        """Command (``CONNECT``, ``EHLO``, ``RCPT``, …, ``.``) → another answer; empty closes."""
        self.stalls: set[str] = set()
        """Commands that are never answered."""
        self.stalled = threading.Event()
        """A command came that is not answered."""
        self.features: list[str] = []
        self.commands: list[str] = []
        self._stop = threading.Event()
        self._sock = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._sock.getsockname()[1]
        self._open: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._sock.accept()
                self._open.append(connection)
                threading.Thread(target=self._talk, args=(connection,), daemon=True).start()

    def _talk(self, connection: socket.socket) -> None:
        with contextlib.suppress(OSError), connection, connection.makefile("rb") as lines:
            if not self._say(connection, "CONNECT", b"220 here"):
                return
            sender, receivers = "", []
            for line in lines:
                command = line.decode(errors="replace").strip()
                verb = command.split(" ")[0].split(":")[0].upper()
                self.commands.append(command)
                if verb in self.stalls:
                    self.stalled.set()
                answer = b"250 fine"
                if verb == "EHLO":
                    rest = ["mail.test", *self.features]
                    answer = b"\r\n".join(
                        f"250{' ' if n == len(rest) - 1 else '-'}{r}".encode()
                        for n, r in enumerate(rest)
                    )
                elif verb == "MAIL":
                    sender = command.split("<")[1].split(">")[0]
                elif verb == "RCPT":
                    receivers.append(command.split("<")[1].split(">")[0])
                    if "nobody@" in command:
                        answer = b"550 no such person"
                elif verb == "DATA":
                    answer = b"354 go on"
                if not self._say(connection, verb, answer):
                    return
                if verb == "DATA":
                    content = b""
                    while (line := lines.readline()) != b".\r\n":
                        if not line:
                            return
                        content += line[1:] if line.startswith(b".") else line
                    if self.answers.get(".", b"2")[:1] not in (b"4", b"5"):
                        self.mails.append((sender, receivers, content))
                    if not self._say(connection, ".", b"250 queued as 42"):
                        return

    def _say(self, connection: socket.socket, command: str, answer: bytes) -> bool:
        if command in self.stalls:
            self._stop.wait(30)
            return False
        answer = self.answers.get(command, answer)
        if answer:
            connection.sendall(answer + b"\r\n")
        return bool(answer)

    def close(self) -> None:
        self._stop.set()
        with contextlib.suppress(OSError):
            # Closing alone would leave the thread in accept(), and the port open.
            self._sock.shutdown(socket.SHUT_RDWR)
        self._sock.close()
        for connection in self._open:
            connection.close()


@contextlib.contextmanager
def mailhost() -> Iterator[Mailhost]:
    made = Mailhost()
    try:
        yield made
    finally:
        made.close()
