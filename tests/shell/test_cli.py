"""The command line without a kernel: exit codes, JSON, and what is read from disk."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner, Result

import llmos
from llmos.drivers.errors import EngineBusy, EngineFailed, LlmosError, UnknownModel
from llmos.drivers.registry import driver
from llmos.drivers.stores.rows import Append
from llmos.kernel.client import InvalidLaunch
from llmos.kernel.cluster import started_at
from llmos.kernel.core.errors import AlreadyLaunched, DoesNotFit
from llmos.kernel.settings import SettingsError
from llmos.kernel.system import SystemFileError
from llmos.shell import exits
from llmos.shell.main import app
from llmos.syscalls.errors import (
    Busy,
    CapabilityDenied,
    DeadlineExceeded,
    HandlerFailed,
    LabelViolation,
    UnknownAgent,
    UnknownResource,
)
from tests.shell.rows import NASTY, failed, syscalls, turn


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    import ray

    for name in ("RAY_ADDRESS", "LLMOS_RAY_ADDRESS", "LLMOS_MODELS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LLMOS_HOME", str(tmp_path / "home"))
    yield tmp_path / "home"
    assert not ray.is_initialized()


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


# ------------------------------------------------------------------ no kernel


@pytest.mark.parametrize(
    "arguments",
    [
        ("ps",),
        ("ps", "--system", "demo"),
        ("status",),
        ("metrics",),
        ("top",),
        ("top", "--once"),
        ("why-waiting", "desk"),
        ("ask", "desk", "hello"),
        ("kill", "desk"),
        ("launch", "m:Desk"),
        ("strace",),
        ("down",),
        ("logs",),
    ],
    ids=" ".join,
)
def test_without_a_kernel_commands_end_with_3(arguments: tuple[str, ...]) -> None:
    result = run(*arguments)
    assert result.exit_code == exits.NOT_FOUND, result.output
    assert result.stderr.startswith("error: ")
    assert result.stdout == ""


def test_no_kernel_is_told_with_the_way_to_one_and_as_json() -> None:
    assert "llmos up FILE" in run("ps").stderr
    assert "'demo'" in run("ps", "--system", "demo").stderr
    for command in (("ps",), ("status",), ("ask", "desk", "hi"), ("strace",)):
        result = run(*command, "--json")
        assert result.exit_code == exits.NOT_FOUND
        assert json.loads(result.stdout)["error"] == "ClusterError"


def test_a_kernel_that_was_killed_is_no_kernel(home: Path) -> None:
    file = home / "runs" / "demo" / "kernel.json"
    file.parent.mkdir(parents=True)
    # No process has the highest number there is.
    file.write_text(json.dumps({"system": "demo", "address": "127.0.0.1:1", "pid": 2**22 - 1}))
    assert run("ps").exit_code == exits.NOT_FOUND
    assert not file.exists()


def running_here(system: str) -> dict[str, object]:
    """What kernel.json holds when this process is the kernel's."""
    return {
        "system": system,
        "address": "x",
        "pid": os.getpid(),
        "started": started_at(os.getpid()),
    }


def test_a_number_that_came_again_is_no_kernel_and_is_not_killed(home: Path) -> None:
    file = home / "runs" / "demo" / "kernel.json"
    file.parent.mkdir(parents=True)
    with subprocess.Popen(["sleep", "60"]) as stranger:
        started = started_at(stranger.pid)
        assert started is not None
        left = {"system": "demo", "address": "x", "pid": stranger.pid}
        for told in ({**left, "started": started - 1}, left):
            file.write_text(json.dumps(told))
            result = run("down")
            assert result.exit_code == exits.NOT_FOUND, result.output
            assert not file.exists()
            assert stranger.poll() is None
        # The process itself, on the other hand, is told to end.
        file.write_text(json.dumps({**left, "started": started}))
        result = run("down")
        assert result.exit_code == 0, result.output
        assert result.stdout == "demo is down\n"
        assert stranger.wait(10) == -signal.SIGTERM
        assert not file.exists()


def test_of_several_kernels_one_must_be_named(home: Path) -> None:
    for name in ("one", "two"):
        file = home / "runs" / name / "kernel.json"
        file.parent.mkdir(parents=True)
        file.write_text(json.dumps(running_here(name)))
    result = run("ps")
    assert result.exit_code == exits.FAILED
    assert "one, two" in result.stderr
    assert "--system" in result.stderr


# ------------------------------------------------------------------ wrong usage

BROKEN = '[models.chat]\nsource = "built-in"\nengine = "ecko"\n'
GOOD = '[models.e]\nsource="s"\nengine="hash"\n[corpora.help]\npath="help"\nembedder="e"\n'


@pytest.mark.parametrize("command", ["up", "run"])
def test_a_broken_system_file_is_told_with_line_and_field(tmp_path: Path, command: str) -> None:
    file = tmp_path / "system.toml"
    file.write_text(BROKEN)
    result = run(command, str(file))
    assert result.exit_code == exits.USAGE
    assert f"{file}, line 3: models.chat.engine" in result.stderr
    assert "[SystemFileError]" in result.stderr
    assert run(command, str(tmp_path / "none.toml")).exit_code == exits.USAGE


def test_a_broken_system_file_as_json(tmp_path: Path) -> None:
    file = tmp_path / "system.toml"
    file.write_text(BROKEN)
    told = json.loads(run("run", str(file), "--json").stdout)
    assert told["error"] == "SystemFileError"
    assert (told["facts"]["line"], told["facts"]["field"]) == (3, "models.chat.engine")


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ("help", "is not NAME=PATH"),
        ("halp=.", "no corpus or graph of that name"),
        ("help=/no/such/folder", "no such file or folder"),
    ],
)
@pytest.mark.parametrize("command", ["up", "run"])
def test_wrong_data_is_told(tmp_path: Path, command: str, data: str, said: str) -> None:
    file = tmp_path / "system.toml"
    file.write_text(GOOD)
    result = run(command, str(file), "--data", data)
    assert result.exit_code == exits.USAGE
    assert said in " ".join(result.stderr.replace("│", " ").split())


@pytest.mark.parametrize(
    "arguments",
    [
        ("run", "FILE", "--ask", "no equals sign"),
        ("run", "FILE", "--questions", "none.toml"),
        ("launch", "m:C", "--config", "{"),
        ("logs", "--level", "LOUD"),
        ("logs", "-n", "0"),
        ("fly",),
        ("ask", "desk"),
    ],
    ids=" ".join,
)
def test_wrong_usage_ends_with_2(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    file = tmp_path / "system.toml"
    file.write_text(GOOD)
    result = run(*(str(file) if a == "FILE" else a for a in arguments))
    assert result.exit_code == exits.USAGE, result.output


def test_the_version_and_the_help() -> None:
    assert run("version").stdout == f"{llmos.__version__}\n"
    for command in ("up", "down", "run", "launch", "ask", "ps", "kill", "status", "metrics"):
        assert run(command, "--help").exit_code == 0
        assert command in run("--help").stdout


# ------------------------------------------------------------------ settings and folders


@pytest.mark.parametrize(
    "arguments",
    [("ps",), ("up", "FILE"), ("run", "FILE"), ("down",), ("logs",), ("models", "list")],
    ids=" ".join,
)
def test_a_wrong_setting_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...]
) -> None:
    file = tmp_path / "system.toml"
    file.write_text(GOOD)
    monkeypatch.setenv("LLMOS_LOG_LEVEL", "foo")
    result = run(*(str(file) if a == "FILE" else a for a in arguments))
    assert result.exit_code == exits.USAGE, result.output
    assert result.stderr.startswith("error: LLMOS_LOG_LEVEL: ")


@pytest.mark.parametrize("command", [("up",), ("up", "--foreground"), ("run", "--ask", "a=b")])
def test_a_home_that_cannot_be_written_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: tuple[str, ...]
) -> None:
    file = tmp_path / "system.toml"
    file.write_text("")
    # A file, since the superuser can write into every folder.
    monkeypatch.setenv("LLMOS_HOME", str(file / "home"))
    result = run(command[0], str(file), *command[1:])
    assert result.exit_code == exits.USAGE, result.output
    assert result.stderr.startswith("error: LLMOS_HOME: ")


# ------------------------------------------------------------------ exit codes


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (SystemFileError("f", "r"), 2),
        (SettingsError("LLMOS_HOME", "r"), 2),
        (InvalidLaunch("key", "r"), 2),
        (UnknownAgent("a"), 3),
        (UnknownModel("m", []), 3),
        (UnknownResource("corpus", "c", []), 3),
        (CapabilityDenied("a", "clock", "", []), 4),
        (LabelViolation("a", "b", "r", remedy=""), 4),
        (DoesNotFit("a", "m", 2, "d", 1), 4),
        (Busy("w", 1, 1.0), 5),
        (EngineBusy("m", 1, 1.0), 5),
        (DeadlineExceeded("w", 1.0), 124),
        (EngineFailed("m", "r"), 1),
        (HandlerFailed("a", "t", "e", "w"), 1),
        (AlreadyLaunched("a"), 1),
    ],
    ids=lambda v: type(v).__name__ if isinstance(v, Exception) else str(v),
)
def test_an_error_has_its_exit_code(
    error: LlmosError, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exits.code_of(error) == code
    with pytest.raises(typer.Exit) as caught, exits.errors(as_json=True):
        raise error
    assert caught.value.exit_code == code
    out, err = capsys.readouterr()
    told = json.loads(out)
    assert told["error"] == type(error).__name__
    assert told["message"] == str(error)
    assert f"[{type(error).__name__}]" in err


def test_an_interrupt_has_its_exit_code() -> None:
    with pytest.raises(typer.Exit) as caught, exits.errors():
        raise KeyboardInterrupt
    assert caught.value.exit_code == exits.INTERRUPTED


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_interrupts_and_has_its_exit_code(number: int, code: int) -> None:
    before = signal.getsignal(number)
    with pytest.raises(typer.Exit) as caught, exits.errors(), exits.signals():
        signal.raise_signal(number)
    assert caught.value.exit_code == code
    assert signal.getsignal(number) is before


# ------------------------------------------------------------------ the record of a kernel that is down


@pytest.fixture
def recorded(home: Path) -> None:
    run_folder = home / "runs" / "demo"
    run_folder.mkdir(parents=True)
    store = driver("store", "sqlite")(run_folder / "store.db")
    rows = [*syscalls(), turn(), failed()]
    assert store.commit([[Append(row)] for row in rows]) == [None] * len(rows)
    store.close()


@pytest.mark.usefixtures("recorded")
def test_turns_can_be_looked_at_without_a_kernel() -> None:
    listed = run("strace", "--system", "demo")
    assert listed.exit_code == 0, listed.output
    assert "t-0001" in listed.stdout
    assert "t-0002" in listed.stdout
    shown = run("strace", "t-0001")
    assert shown.exit_code == 0, shown.output
    assert "Generate chat" in shown.stdout
    rows = json.loads(run("strace", "--json", "-n", "1").stdout)
    assert [r["turn"] for r in rows] == ["t-0002"]
    assert json.loads(run("strace", "--json", "--agent", "acme/none/x").stdout) == []
    whole = json.loads(run("strace", "t-0001", "--json").stdout)
    assert whole["message"]["text"] == NASTY
    assert [s["status"] for s in whole["syscalls"]][-3:] == ["error", "denied", "cancelled"]
    assert whole["syscalls"][0]["provenance"][0]["source"] == "a.md"
    missing = run("strace", "t-9")
    assert missing.exit_code == exits.NOT_FOUND
    assert "no turn 't-9'" in missing.stderr


# ------------------------------------------------------------------ logs


@pytest.fixture
def logged(home: Path) -> Path:
    folder = home / "runs" / "demo" / "logs"
    folder.mkdir(parents=True)
    lines = [
        {"ts": n, "level": level, "process": "host:0", "agent": f"acme/desk/{n}", "turn": f"t{n}"}
        for n, level in enumerate(["DEBUG", "INFO", "WARNING", "ERROR"])
    ]
    text = "".join(json.dumps({**line, "message": f"m{line['ts']} [/x]"}) + "\n" for line in lines)
    (folder / "host-0.jsonl").write_text(text)
    return folder


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((), [1, 2, 3]),
        (("--level", "debug"), [0, 1, 2, 3]),
        (("--level", "ERROR"), [3]),
        (("-n", "2"), [2, 3]),
        (("--agent", "desk/2"), [2]),
        (("--turn", "t1"), [1]),
        (("--process", "journal"), []),
        (("--system", "demo"), [1, 2, 3]),
    ],
    ids=str,
)
@pytest.mark.usefixtures("logged")
def test_logs_are_shown_and_filtered(arguments: tuple[str, ...], expected: list[int]) -> None:
    result = run("logs", *arguments, "--json")
    assert result.exit_code == 0
    assert [json.loads(line)["ts"] for line in result.stdout.splitlines()] == expected
    text = run("logs", *arguments)
    assert [f"m{n} [/x]" in text.stdout for n in expected] == [True] * len(expected)


@pytest.mark.usefixtures("logged")
def test_logs_of_another_system_are_not_there() -> None:
    result = run("logs", "--system", "other")
    assert result.exit_code == exits.NOT_FOUND
    assert "'other'" in result.stderr


def test_the_system_that_was_used_last_is_meant(logged: Path, home: Path) -> None:
    other = home / "runs" / "zzz" / "logs"
    other.mkdir(parents=True)
    (other / "host-0.jsonl").write_text("")
    os.utime(other / "host-0.jsonl", (1, 1))
    assert "m3" in run("logs").stdout


def test_following_ends_with_an_interrupt(logged: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looks = 0

    def sleep(seconds: float) -> None:
        nonlocal looks
        looks += 1
        if looks == 1:
            with (logged / "host-0.jsonl").open("a") as log:
                log.write(json.dumps({"ts": 9, "level": "INFO", "message": "fresh"}) + "\n")
        else:
            raise KeyboardInterrupt

    monkeypatch.setattr("llmos.shell.logview.time.sleep", sleep)
    result = run("logs", "-f", "--json")
    assert result.exit_code == exits.INTERRUPTED
    assert [json.loads(x)["ts"] for x in result.stdout.splitlines()] == [1, 2, 3, 9]
