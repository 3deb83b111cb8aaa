"""Starting the background process: the lock, its pipe, signals; with small programs for kernels."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import typer

from llmos.drivers.errors import EngineFailed
from llmos.kernel.settings import Settings, SettingsError
from llmos.kernel.system import SystemConfig
from llmos.shell import daemon, exits, starting

READY = 'import os\nos.write(report, b\'{"progress": "one"}\\n{"ready"\')\nimport time\n'
READY += "time.sleep(0.2)\nos.write(report, b': true}\\n')\nos.close(lock)\ntime.sleep(60)\n"


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(home=tmp_path / "home")


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Has the background process run this code, with the descriptors it was given."""
    begin = "#!/bin/sh\nexec %s - \"$@\" <<'END'\nimport sys\nargs = sys.argv[1:]\n"
    begin += "report = int(args[args.index('--report') + 1])\n"
    begin += "lock = int(args[args.index('--lock') + 1])\n"
    python, file = sys.executable, tmp_path / "python"

    def use(code: str) -> None:
        file.write_text(begin % python + code + "\nEND\n")
        file.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(file))

    return use


def started(settings: Settings) -> list[str]:
    told: list[str] = []
    with starting.lock(settings, "demo") as held:
        starting.start(Path("f.toml"), [], settings.run_dir("demo"), held, told.append)
    return told


def processes() -> set[int]:
    """Our children, zombies not counted."""
    out = subprocess.run(
        ["ps", "-o", "pid=,stat=,comm=", "--ppid", str(os.getpid())], capture_output=True, text=True
    ).stdout
    rows = [line.split() for line in out.splitlines()]
    return {int(r[0]) for r in rows if not r[1].startswith("Z") and r[2] != "ps"}


def test_it_is_ready_when_it_says_so_in_its_pipe(
    settings: Settings, program: Callable[[str], None]
) -> None:
    # What an output says, be it this very word, is no word of the process.
    program("print('ready', flush=True)\n" + READY)
    before, began = processes(), time.monotonic()
    try:
        assert started(settings) == ["one …"]
        assert time.monotonic() - began >= 0.2
        (pid,) = processes() - before
        assert os.getsid(pid) == pid
        # It serves, so its lock is free again.
        with starting.lock(settings, "demo"):
            pass
    finally:
        for pid in processes() - before:
            os.kill(pid, signal.SIGKILL)


def test_two_do_not_start_one_system(
    settings: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    with starting.lock(settings, "demo") as held:
        with pytest.raises(typer.Exit) as caught, starting.lock(settings, "demo"):
            pytest.fail("both have it")
        assert caught.value.exit_code == exits.FAILED
        assert "'demo' is just being started" in capsys.readouterr().err
        with starting.lock(settings, "other"):
            pass
        # A child that was given it keeps it.
        child = subprocess.Popen(["sleep", "60"], pass_fds=(held,))
    try:
        with pytest.raises(typer.Exit), starting.lock(settings, "demo"):
            pytest.fail("the child has it")
    finally:
        child.kill()
        child.wait()
    with starting.lock(settings, "demo"):
        pass


@pytest.mark.parametrize(
    ("code", "said", "exit_code"),
    [
        ('import os\nos.write(report, b\'{"error": "too big", "exit": 4}\\n\')', "too big", 4),
        ("sys.exit('no module')", "no module", 1),
        ("sys.exit(7)", "the kernel ended with 7", 1),
    ],
)
def test_one_that_fails_is_told(
    settings: Settings,
    program: Callable[[str], None],
    capsys: pytest.CaptureFixture[str],
    code: str,
    said: str,
    exit_code: int,
) -> None:
    program(code)
    with pytest.raises(typer.Exit) as caught:
        started(settings)
    assert caught.value.exit_code == exit_code
    assert capsys.readouterr().err == f"error: {said}\n"


def test_one_that_is_silent_is_given_up(
    settings: Settings, program: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(starting, "SILENCE_S", 0.3)
    program("import time\ntime.sleep(60)")
    before = processes()
    with pytest.raises(typer.Exit) as caught:
        started(settings)
    assert caught.value.exit_code == exits.DEADLINE
    assert processes() == before


@pytest.mark.parametrize("stubborn", [False, True])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it(
    settings: Settings,
    program: Callable[[str], None],
    monkeypatch: pytest.MonkeyPatch,
    stubborn: bool,
    number: int,
) -> None:
    monkeypatch.setattr(starting, "END_S", 0.3)
    deaf = "import signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n" if stubborn else ""
    program(f'{deaf}import os, time\nos.write(report, b\'{{"progress": "p"}}\\n\')\ntime.sleep(60)')
    before = processes()
    with (
        pytest.raises(KeyboardInterrupt) as caught,
        starting.lock(settings, "demo") as held,
    ):
        starting.start(
            Path("f"), [], settings.run_dir("demo"), held, lambda _: os.kill(os.getpid(), number)
        )
    assert isinstance(caught.value, exits.Terminated) == (number == signal.SIGTERM)
    assert processes() == before
    with starting.lock(settings, "demo"):
        pass


def test_a_run_folder_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(SettingsError),
        starting.lock(Settings(home=tmp_path / "file" / "home"), "demo"),
    ):
        pytest.fail("locked")


# ------------------------------------------------------------------ the background process


class Booted:
    """In place of a kernel, which needs Ray."""

    def __init__(self) -> None:
        self.shut = 0

    def shutdown(self) -> None:
        self.shut += 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_it_boots_interrupts_and_later_shuts_down(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, number: int
) -> None:
    kernel = Booted()

    def slow(*_: object, **__: object) -> Booted:
        signal.raise_signal(number)
        pytest.fail("goes on booting")

    monkeypatch.setattr(daemon.Kernel, "boot", slow)
    with pytest.raises(KeyboardInterrupt) as caught:
        daemon.serve(SystemConfig(base=tmp_path))
    assert exits.of_interrupt(caught.value)[1] == 128 + number

    monkeypatch.setattr(daemon.Kernel, "boot", lambda *_, **__: kernel)
    ready = threading.Event()

    def serves() -> None:
        ready.set()
        signal.raise_signal(number)

    assert daemon.serve(SystemConfig(base=tmp_path), ready=serves) == 0
    assert ready.is_set()
    assert kernel.shut == 1


@pytest.mark.parametrize(
    ("error", "code"),
    [(EngineFailed("m", "r"), 1), (KeyboardInterrupt(), 130), (exits.Terminated(), 143)],
    ids=lambda v: type(v).__name__,
)
def test_how_it_ended_is_its_last_word(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    settings: Settings,
    error: BaseException,
    code: int,
) -> None:
    file = tmp_path / "system.toml"
    file.write_text("")

    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(daemon.Kernel, "boot", fail)
    ours, theirs = os.pipe()
    with starting.lock(settings, "demo") as held, os.fdopen(ours) as pipe:
        assert daemon.main(["--report", str(theirs), "--lock", str(held), str(file)]) == code
        (line,) = pipe.readlines()
    assert f'"exit": {code}' in line
