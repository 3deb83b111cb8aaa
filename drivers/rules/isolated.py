"""Rule engines in child processes, so that rules which never stop can be stopped.

A loop in an action, or a match over a product of ten thousand facts, runs inside the
engine's own code: no thread can end it, and halting flags are not looked at in a
match. So each evaluation is a request to a child process, and the child is killed
when its time is over ([decision 24]). A child serves many rule bases, one evaluation
at a time; it keeps what it has read, so that a warm evaluation costs one exchange over
a pipe. It ends by itself when its pipe is closed, and an alarm of the system ends it
even if this process is gone by then.
"""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import os
import pickle
import select
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any

from llmos.drivers.errors import RuleFailed, RulesError, RuleTimeout
from llmos.drivers.protocols import Fact, RuleOutcome

LOAD_S = 20.0
"""Time for a child to start and to read a rule file, in seconds."""

MAX_REPLY_BYTES = 256 * 2**20
"""A longer reply is not read; the child is killed."""

MEMORY_BYTES = 2 * 2**30
"""Address space of a child: beyond it the engine fails, and the machine goes on."""

_IDLE = 4
"""Children kept for reuse."""
_IN_USE = 8
"""Children at work at once; who comes then waits, within its own time."""

_HEAD = struct.Struct(">I")


class ChildGone(Exception):
    """The child ended, or was killed, before it answered. ``late``: its time was over."""

    def __init__(self, *, late: bool, code: int | None) -> None:
        self.late, self.code = late, code
        super().__init__("too late" if late else f"the child ended with {code}")


class Child:
    """One process that runs ``module`` and answers pickled requests over a pipe."""

    def __init__(self, module: str, *, stdin: Any = subprocess.DEVNULL, stdout: Any = None) -> None:
        theirs_in, self._to = os.pipe()
        self._from, theirs_out = os.pipe()
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-m", module, str(theirs_in), str(theirs_out)],
                stdin=stdin,
                stdout=subprocess.DEVNULL if stdout is None else stdout,
                stderr=subprocess.DEVNULL if stdout is None else None,
                pass_fds=(theirs_in, theirs_out),
            )
        except BaseException:
            os.close(self._to)
            os.close(self._from)
            raise
        finally:
            os.close(theirs_in)
            os.close(theirs_out)

    def ask(self, request: Any, timeout_s: float) -> Any:
        """Send a request and wait for its reply. Raises ChildGone; the child is dead then."""
        until = time.monotonic() + timeout_s
        try:
            data = pickle.dumps(request)
            _write(self._to, _HEAD.pack(len(data)) + data)
            size = _HEAD.unpack(self._read(_HEAD.size, until))[0]
            if size > MAX_REPLY_BYTES:
                raise ChildGone(late=False, code=None)
            return pickle.loads(self._read(size, until))
        except BaseException as error:
            self.close()
            if isinstance(error, BrokenPipeError):
                raise ChildGone(late=False, code=self.process.returncode) from None
            raise

    def close(self) -> None:
        """Kill it, if it lives. May be called again."""
        self.process.kill()
        self.process.wait()
        for descriptor in (self._to, self._from):
            with contextlib.suppress(OSError):
                os.close(descriptor)
        self._to = self._from = -1

    def _read(self, size: int, until: float) -> bytes:
        poll = select.poll()
        poll.register(self._from, select.POLLIN)
        pieces, missing = [], size
        while missing:
            left = until - time.monotonic()
            if left <= 0 or not poll.poll(left * 1000):
                raise ChildGone(late=True, code=None)
            piece = os.read(self._from, min(missing, 2**20))
            if not piece:
                code = self.process.wait()
                raise ChildGone(late=code == -signal.SIGALRM, code=code)
            pieces.append(piece)
            missing -= len(piece)
        return b"".join(pieces)


class _Pool:
    """Children of this process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._places = threading.BoundedSemaphore(_IN_USE)
        self._idle: list[Child] = []
        # A fork must not share pipes with its parent: its requests would be mixed.
        os.register_at_fork(after_in_child=self._forget)

    def ask(self, request: Any, timeout_s: float, *, source: Any) -> Any:
        """Have a child answer; ``source`` is sent first where the child does not know it yet."""
        if not self._places.acquire(timeout=timeout_s):
            raise ChildGone(late=True, code=None)
        try:
            with self._lock:
                child = self._idle.pop() if self._idle else None
            if child is not None and child.process.poll() is not None:
                child.close()
                child = None
            reply = None
            if child is None:
                # The start of a process is not on the account of the evaluation.
                child = Child("llmos.drivers.rules.isolated_child")
            else:
                reply = child.ask(request, timeout_s)
            if reply is None:
                reply = child.ask(source, LOAD_S)
                if request is not source and not isinstance(reply, Exception):
                    reply = child.ask(request, timeout_s)
            with self._lock:
                if len(self._idle) < _IDLE:
                    self._idle.append(child)
                    return reply
            child.close()
            return reply
        finally:
            self._places.release()

    def close(self) -> None:
        with self._lock:
            idle, self._idle = self._idle, []
        for child in idle:
            child.close()

    def _forget(self) -> None:
        self._lock = threading.Lock()
        self._places = threading.BoundedSemaphore(_IN_USE)
        self._idle = []


_POOL = _Pool()
atexit.register(_POOL.close)


class IsolatedRuleBase:
    """A rule file whose engine runs in child processes."""

    def __init__(self, target: str, name: str, source: str) -> None:
        """Read the source in a child. ``target`` is ``module:class`` of the engine's program.

        Raises:
            RuleSyntaxError: the engine does not accept it.
            RuleTimeout: reading it takes longer than ``LOAD_S``.
        """
        self._name = name
        digest = hashlib.sha256(source.encode("utf-8", "surrogatepass")).hexdigest()
        self._version = digest[:16]
        self._key = (target, name, digest)
        self._load = ("load", self._key, source)
        self._rules: tuple[str, ...] = self._ask(self._load, LOAD_S)

    @property
    def name(self) -> str:
        """What errors call it."""
        return self._name

    @property
    def version(self) -> str:
        """First 16 hex digits of the source's sha256."""
        return self._version

    @property
    def rules(self) -> tuple[str, ...]:
        """Names of the rules, in file order."""
        return self._rules

    def evaluate(
        self, facts: Sequence[Fact], *, max_firings: int = 1000, timeout_s: float = 10.0
    ) -> RuleOutcome:
        """Assert the facts and fire rules until none is left. Thread-safe.

        Raises:
            UnknownTemplate: a fact that the file does not declare, or with a value that
                its slot does not take; no rule has fired then.
            RuleLimitExceeded: still firing at ``max_firings``.
            RuleTimeout: still at work after ``timeout_s`` seconds.
            RuleFailed: an action of a rule made the engine report an error or end.
            ValueError: a limit is not above 0.
        """
        if max_firings < 1:
            raise ValueError(f"max_firings is {max_firings}, at least 1 is needed")
        if timeout_s <= 0:
            raise ValueError(f"timeout_s is {timeout_s}, a time above 0 is needed")
        request = ("evaluate", self._key, list(facts), max_firings, timeout_s)
        outcome: RuleOutcome = self._ask(request, timeout_s)
        return outcome

    def _ask(self, request: Any, timeout_s: float) -> Any:
        try:
            reply = _POOL.ask(request, timeout_s, source=self._load)
        except ChildGone as gone:
            if gone.late:
                raise RuleTimeout(self._name, timeout_s) from None
            raise RuleFailed(
                self._name,
                "",
                f"the engine's process ended ({gone.code}); "
                f"it may use {MEMORY_BYTES // 2**20} MiB of memory",
            ) from None
        if isinstance(reply, RulesError | ValueError):
            raise reply
        return reply


def _write(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]
