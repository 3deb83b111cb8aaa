"""The child process of :mod:`llmos.drivers.rules.isolated`: reads requests, evaluates, answers.

Called as ``python -m llmos.drivers.rules.isolated_child IN OUT`` with two pipes.
"""

from __future__ import annotations

import importlib
import pickle
import resource
import signal
import struct
import sys
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, BinaryIO

from llmos.drivers.errors import RulesError
from llmos.drivers.rules.isolated import LOAD_S, MEMORY_BYTES

_KEPT = 32
"""Rule bases kept read, the latest used."""
_GRACE_S = 1.0
"""The parent kills in time; this alarm is for a parent that is gone."""

_HEAD = struct.Struct(">I")


def read_request(receive: BinaryIO) -> Any:
    """The next request; None when the other end has closed the pipe."""
    head = receive.read(_HEAD.size)
    return pickle.loads(receive.read(_HEAD.unpack(head)[0])) if head else None


def write_reply(send: BinaryIO, reply: Any) -> None:
    """Answer a request."""
    data = pickle.dumps(reply)
    send.write(_HEAD.pack(len(data)) + data)
    send.flush()


def serve(receive: BinaryIO, send: BinaryIO, answer: Callable[[Any], Any]) -> None:
    """Answer requests until the other end closes the pipe.

    A rule's error is an answer; any other error ends this process, and the parent says so.
    """
    while (request := read_request(receive)) is not None:
        try:
            reply = answer(request)
        except (RulesError, ValueError) as error:
            reply = error
        write_reply(send, reply)


def confine() -> None:
    """Bound the memory of this process, and keep no image of its crash."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # Ctrl-C is the parent's to answer.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)


def pipes() -> tuple[BinaryIO, BinaryIO]:
    """The two ends that were handed over."""
    return open(int(sys.argv[1]), "rb"), open(int(sys.argv[2]), "wb")


class _Programs:
    """Rule bases that were read."""

    def __init__(self) -> None:
        self._known: OrderedDict[tuple[str, str, str], Any] = OrderedDict()

    def answer(self, request: Any) -> Any:
        kind, key, *rest = request
        if kind == "load":
            return self._timed(LOAD_S, lambda: self._load(key, *rest))
        program = self._known.get(key)
        if program is None:
            return None
        self._known.move_to_end(key)
        facts, max_firings, timeout_s = rest
        return self._timed(timeout_s, lambda: program.evaluate(facts, max_firings))

    def _load(self, key: tuple[str, str, str], source: str) -> tuple[str, ...]:
        target, name, _ = key
        module, _, attribute = target.partition(":")
        program = getattr(importlib.import_module(module), attribute)(name, source)
        self._known[key] = program
        if len(self._known) > _KEPT:
            self._known.popitem(last=False)
        rules: tuple[str, ...] = program.rules
        return rules

    def _timed(self, timeout_s: float, work: Callable[[], Any]) -> Any:
        signal.setitimer(signal.ITIMER_REAL, timeout_s + _GRACE_S)
        try:
            return work()
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)


if __name__ == "__main__":
    confine()
    serve(*pipes(), _Programs().answer)
