"""The child process of :mod:`llmos.drivers.rules.clips_run`: one program, one answer."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import clips

from llmos.drivers.errors import RulesError, RuleSyntaxError
from llmos.drivers.protocols import Firing
from llmos.drivers.rules.clips_engine import Trace, pending, syntax_error
from llmos.drivers.rules.clips_run import MAX_TRACE, Ending, ProgramRun, RunRequest, kind_of
from llmos.drivers.rules.clips_source import parse, rules_of
from llmos.drivers.rules.clips_values import read_fact
from llmos.drivers.rules.isolated_child import confine, pipes, read_request, write_reply
from llmos.drivers.rules.library import with_libraries

MAX_ENDS = 10
"""So often a program may read the end of its input; one that asks on never ends."""


class _Shown(Trace):
    """A trace that shows what the program prints, and keeps as many firings as are told.

    It also hands the program its input, so that the end of the input can end the program.
    """

    def __init__(self, echo: bool, no_input: Callable[[], None]) -> None:
        self.echo, self.no_input = echo, no_input
        self.given_back: list[int] = []
        self.ends = 0
        super().__init__()

    def query(self, name: str) -> bool:
        return name == "stdin" or super().query(name)

    def read(self, name: str) -> int:
        """The next byte of the input, -1 at its end."""
        if self.given_back:
            return self.given_back.pop()
        if byte := sys.stdin.buffer.read(1):
            return byte[0]
        self.ends += 1
        if self.ends > MAX_ENDS:
            self.no_input()
        return -1

    def unread(self, name: str, char: int) -> int:
        """Take a byte back."""
        if char >= 0:
            self.given_back.append(char)
        return char

    def clear(self) -> None:
        super().clear()
        self.count = 0

    def printed(self, name: str, message: str) -> None:
        if self.echo and name == "stdout":
            sys.stdout.write(message)
            sys.stdout.flush()
        super().printed(name, message)

    def fired(self, line: str) -> None:
        self.count += 1
        if self.count <= MAX_TRACE:
            super().fired(line)


class _Run:
    """One program; whoever ends it first, the run itself or what stops it, answers."""

    def __init__(self, version: str, request: RunRequest, send: BinaryIO) -> None:
        self.version, self.request, self.send = version, request, send
        self.trace = _Shown(request.echo, lambda: self.stop("input"))
        self.comments: dict[str, str] = {}
        self.answering = threading.Lock()

    def run(self) -> None:
        """Load, reset, run, answer."""
        os.chdir(self.request.files[0].parent)
        # Nothing in CLIPS can be interrupted; but its calls leave other threads running.
        watch = threading.Timer(self.request.timeout_s, self.stop, ["time"])
        watch.daemon = True
        watch.start()
        try:
            env = self._play()
            ended: Ending = "halt" if pending(env) else "rest"
            reply: ProgramRun | RulesError = self._told(ended, env)
        except RulesError as error:
            reply = error
        with self.answering:
            watch.cancel()
            write_reply(self.send, reply)

    def stop(self, ended: Ending) -> None:
        """Answer with what has happened so far, and end this process."""
        with self.answering:
            write_reply(self.send, self._told(ended, None))
            os._exit(0)

    def _play(self) -> Any:
        env = clips.Environment()
        env.add_router(self.trace)
        self.trace.env = env
        env.eval("(watch rules)")
        files = self.request.files
        if kind_of(files[0]) == "commands":
            self._do(files[0], env.batch_star)
            return env
        for path in files:
            if kind_of(path) == "constructs":
                self._load(env, path)
        env.reset()
        for path in files:
            if kind_of(path) == "facts":
                self._do(path, env.load_facts)
        env.run(self.request.max_firings)
        return env

    def _load(self, env: Any, path: Path) -> None:
        source = path.read_bytes().decode("utf-8", errors="surrogateescape")
        whole = with_libraries(path.name, source)
        if whole == source:
            self._do(path, env.load)
        else:
            with tempfile.TemporaryDirectory(prefix="llmos-rules-") as folder:
                copy = Path(folder) / path.name
                copy.write_bytes(whole.encode("utf-8", errors="surrogateescape"))
                self._do(copy, env.load)
        # The comments are a courtesy: what CLIPS accepts and this reader does not, has none.
        with contextlib.suppress(RuleSyntaxError):
            found = rules_of(parse(path.name, whole))
            self.comments.update((rule.name, rule.comment) for rule in found)

    def _do(self, path: Path, load: Callable[[str], Any]) -> None:
        try:
            load(str(path))
        except (clips.CLIPSError, OSError) as error:
            raise syntax_error(path.name, self.trace.errors, str(path)) from error

    def _told(self, ended: Ending, env: Any) -> ProgramRun:
        comments = self.comments
        return ProgramRun(
            version=self.version,
            firings=self.trace.count,
            trace=tuple(Firing(r, why, comments.get(r, "")) for r, why in [*self.trace.firings]),
            facts=None if env is None else tuple(read_fact(fact) for fact in env.facts()),
            output="".join([*self.trace.output]),
            errors="".join([*self.trace.errors]).strip(),
            ended=ended,
        )


if __name__ == "__main__":
    confine()
    receive, send = pipes()
    _, version, request = read_request(receive)
    _Run(version, request, send).run()
