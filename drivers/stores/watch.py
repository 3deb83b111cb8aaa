"""Deadlines for a database server that holds its connection and does not answer.

The server's own timeouts do not run while it hangs, and the system's, of TCP, do not see a
process that was stopped behind a socket that works. So a thread looks at what is asked, and
shuts the socket of whoever has waited too long: their call then fails as if the connection
had been lost, which it has. An alarm in the waiting thread was rejected: signals reach the
main thread only.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import psycopg


class Watch:
    """The deadlines of one store's connections."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._asked: dict[object, tuple[float, int]] = {}
        """Deadline on the monotonic clock, and a descriptor of the socket."""
        self._late: set[object] = set()
        self._thread: threading.Thread | None = None
        self._closed = False

    @contextlib.contextmanager
    def over(self, connection: psycopg.Connection[Any], seconds: float) -> Iterator[None]:
        """What is asked of the connection inside is answered within so long, or fails.

        Raises:
            psycopg.OperationalError: it was not; the connection is lost.
        """
        # A descriptor of our own: that of the connection may be another file's by then.
        descriptor = os.dup(connection.fileno())
        token = object()
        with self._changed:
            self._asked[token] = (time.monotonic() + seconds, descriptor)
            if self._thread is None and not self._closed:
                self._thread = threading.Thread(target=self._run, name="store-watch", daemon=True)
                self._thread.start()
            elif len(self._asked) == 1:
                self._changed.notify()
        try:
            yield
        except psycopg.Error as error:
            if token in self._late:
                late = f"the server did not answer in {seconds:g} s"
                raise psycopg.OperationalError(late) from error
            raise
        finally:
            with self._changed:
                del self._asked[token]
                self._late.discard(token)
            os.close(descriptor)

    def _run(self) -> None:
        with self._changed:
            while not self._closed:
                now = time.monotonic()
                waiting = [when for when, _ in self._asked.values() if when > now]
                for token, (when, descriptor) in self._asked.items():
                    if when <= now and token not in self._late:
                        self._late.add(token)
                        _shut(descriptor)
                # Without anything asked it sleeps until there is: a later deadline than the
                # first needs no notice.
                self._changed.wait(min(waiting) - now if waiting else None)

    def close(self) -> None:
        """Stop watching."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.join(timeout=5.0)


def _shut(descriptor: int) -> None:
    with contextlib.suppress(OSError), socket.socket(fileno=os.dup(descriptor)) as peer:
        peer.shutdown(socket.SHUT_RDWR)
