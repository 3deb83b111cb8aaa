"""Operating from the command line, on the store of a kernel that is down."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgpack
import pytest
from typer.testing import CliRunner, Result

from llmos.drivers.registry import driver
from llmos.drivers.stores.rows import (
    Append,
    BuryMail,
    LaunchRow,
    MailRow,
    PutLaunch,
    PutMail,
    PutTimer,
    SetHold,
    TimerRow,
)
from llmos.kernel.core.errors import NoOtherHost, UnknownProcess
from llmos.kernel.operating import OperationRefused, UnknownRecord
from llmos.shell import exits
from llmos.shell.main import app
from llmos.syscalls.messages import Envelope, Wire
from tests.journals.programs import Go
from tests.shell.rows import AGENT, NASTY, failed, syscalls, turn, unusual

JOURNALS = Path(__file__).parent.parent / "journals"
HELD, QUARANTINED = "acme/held/main", "acme/quarantined/main"


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


def told(*arguments: str, code: int = 0) -> Any:
    result = run(*arguments, "--json")
    assert result.exit_code == code, result.output
    return json.loads(result.stdout)


def mail(seq: int, agent: str = AGENT, turn_: str = "") -> MailRow:
    envelope = Envelope(agent, "client:5", Wire.of(Go(text=NASTY)), "client:5", seq)
    return MailRow(agent, "client:5", seq, envelope.pack(), turn=turn_)


@pytest.fixture
def store(home: Path) -> Path:
    path = home / "runs" / "demo" / "store.db"
    path.parent.mkdir(parents=True)
    opened = driver("store", "sqlite")(path)
    launch = LaunchRow(AGENT, "m:Desk", bytes(msgpack.packb({})), "id", 1.0)
    effect = [row._replace(agent=HELD, turn="t-0009") for row in unusual()[3:5]]
    timer = TimerRow(AGENT, "daily", 2e9, mail(1).envelope, "0 9 * * *")
    rows = [*syscalls(), turn(), failed(), *effect]
    part = [
        *(Append(row) for row in rows),
        PutLaunch(launch),
        *(PutMail(mail(n)) for n in (1, 2, 3)),
        BuryMail(*mail(2).key, f"5 attempts failed {NASTY}", "the story", 2.0),
        BuryMail(*mail(3).key, "2 hosts lost", "another story", 3.0),
        PutTimer(timer),
        PutMail(mail(1, HELD, "t-0009")),
        SetHold(HELD, "unknown effect", "story"),
        SetHold(QUARANTINED, "quarantined", f"it failed {NASTY}"),
    ]
    assert opened.commit([part]) == [None]
    opened.close()
    return path


@pytest.mark.parametrize(
    "arguments",
    [
        *(("audit", "verify"), ("audit", "head"), ("audit", "export", "t", "f.json")),
        *(("dlq", "list"), ("dlq", "show", "1"), ("dlq", "retry", "--all"), ("dlq", "drop", "1")),
        *(("effects", "list"), ("effects", "resolve", "t/1", "--retry"), ("held",)),
        *(("release", "a"), ("timers",), ("mail", "a"), ("backup", "f")),
        *(("drain", "host:0"), ("rebalance",), ("replay", "t")),
    ],
    ids=" ".join,
)
def test_without_a_kernel_or_a_store_operations_end_with_3(arguments: tuple[str, ...]) -> None:
    result = run(*arguments)
    assert result.exit_code == exits.NOT_FOUND, result.output
    assert result.stderr.startswith("error: ")
    assert told(*arguments, code=3)["error"] == "ClusterError"


@pytest.mark.parametrize(
    "arguments",
    [
        *(("dlq", "retry"), ("dlq", "retry", "1", "--all"), ("dlq", "show", "x"), ("dlq", "drop")),
        *(("effects", "resolve", "t/1"), ("effects", "resolve", "t/1", "--retry", "--failed", "x")),
        *(("effects", "resolve", "t/1", "--result", "{"), ("replay",), ("audit", "export", "t")),
        *(("replay", "t", "--file", "f"), ("restore", "f"), ("mail",)),
        ("audit", "verify", "--heads", "/no/such/file"),
    ],
    ids=" ".join,
)
def test_wrong_usage_ends_with_2(arguments: tuple[str, ...]) -> None:
    assert run(*arguments).exit_code == exits.USAGE


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (UnknownRecord("turn", "t"), 3),
        (UnknownProcess("host:9", []), 3),
        (OperationRefused("x", "y"), 4),
        (NoOtherHost("host:0"), 4),
    ],
    ids=lambda v: type(v).__name__ if isinstance(v, Exception) else str(v),
)
def test_errors_have_their_exit_codes(error: Any, code: int) -> None:
    assert exits.code_of(error) == code


# ---------------------------------------------------------------- dead letters


def test_dead_letters_are_listed_shown_retried_and_dropped(store: Path) -> None:
    newest, oldest = told("dlq", "list")
    assert (newest["reason"], oldest["message"], oldest["kind"]) == (
        "2 hosts lost",
        "client:5#2",
        "Go",
    )
    assert len(told("dlq", "list", "-n", "1")) == 1
    assert "5 attempts failed a [/b] bracket" in " ".join(run("dlq", "list").stdout.split())
    shown = run("dlq", "show", str(oldest["id"]))
    assert "the story" in shown.stdout
    assert told("dlq", "show", str(oldest["id"]))["body"]["text"] == NASTY
    assert told("dlq", "show", "99", code=3)["error"] == "UnknownRecord"
    assert told("dlq", "drop", str(newest["id"])) == {"dropped": [newest["id"]]}
    assert told("dlq", "retry", "--all") == {"retried": [oldest["id"]]}
    assert run("dlq", "list").stdout == "There are no dead letters.\n"
    assert [m["message"] for m in told("mail", AGENT)] == ["client:5#1", "client:5#2"]
    assert "client:5#2" in run("mail", "desk").stdout
    assert run("mail", "acme/none/main").stdout == "Nothing waits.\n"


# ---------------------------------------------------------------- held agents, effects, timers


def test_effects_are_listed_and_resolved(store: Path) -> None:
    (effect,) = told("effects", "list")
    assert (effect["effect"], effect["agent"], effect["tool"]) == ("t-0009/2", HELD, "booking")
    assert effect["arguments"] == {"what": NASTY}
    assert "t-0009/2" in run("effects", "list").stdout
    assert told("release", HELD, code=4)["error"] == "OperationRefused"
    resolved = told("effects", "resolve", "t-0009/2", "--result", '{"seat": 7}')
    assert resolved == {"resolved": "t-0009/2", "agent": HELD}
    assert run("effects", "list").stdout == "No effect is unknown.\n"
    assert told("effects", "resolve", "t-0009/2", "--failed", "no", code=3)
    whole = told("strace", "t-0009")
    assert whole["syscalls"][0]["result"]["output"] == {"seat": 7}
    assert whole["syscalls"][0]["provenance"][0]["kind"] == "person"
    assert whole["status"] == "running"


def test_held_agents_are_listed_and_released(store: Path) -> None:
    assert {h["agent"]: h["hold"] for h in told("held")} == {
        HELD: "unknown effect",
        QUARANTINED: "quarantined",
    }
    assert "it failed a [/b]" in " ".join(run("held").stdout.split())
    assert told("release", QUARANTINED) == {"released": QUARANTINED}
    assert told("release", QUARANTINED, code=4)["error"] == "OperationRefused"
    assert [h["agent"] for h in told("held")] == [HELD]


def test_timers_are_listed(store: Path) -> None:
    (timer,) = told("timers")
    assert (timer["name"], timer["due"], timer["cron"], timer["kind"]) == (
        "daily",
        2e9,
        "0 9 * * *",
        "Go",
    )
    assert "0 9 * * * (UTC)" in run("timers", "desk").stdout
    assert run("timers", HELD).stdout == "No timer is set.\n"


# ---------------------------------------------------------------- audit


def test_the_audit_finds_what_was_edited_cut_and_forged(store: Path, tmp_path: Path) -> None:
    fine = told("audit", "verify")
    assert (fine["agents"], fine["findings"]) == (3, [])
    assert fine["rows"] == 11
    assert "nothing is wrong" in run("audit", "verify", "desk").stdout
    heads = told("audit", "head")
    assert {h["agent"] for h in heads} == {AGENT, HELD}
    assert run("audit", "head", AGENT).stdout.split()[:2] == [AGENT, "9"]
    kept = tmp_path / "heads.json"
    kept.write_text(json.dumps(heads))
    assert told("audit", "verify", "--heads", str(kept))["findings"] == []
    kept.write_text(json.dumps([{**heads[0], "hash": "0" * 64}]))
    forged = told("audit", "verify", "--heads", str(kept), code=1)["findings"]
    assert [f["problem"] for f in forged] == ["edited"]
    with sqlite3.connect(store) as database:
        database.execute("UPDATE journal SET name = 'other' WHERE pos = 2 AND agent = ?", [AGENT])
        database.execute("DELETE FROM journal WHERE agent = ? AND pos = 2", [HELD])
    database.close()
    found = {(f["agent"], f["problem"]) for f in told("audit", "verify", code=1)["findings"]}
    assert found == {(AGENT, "edited"), (HELD, "tail")}
    shown = run("audit", "verify", AGENT)
    assert shown.exit_code == exits.FAILED
    assert f"{AGENT}, row 2: edited" in shown.stdout
    assert told("audit", "verify", HELD, code=1)["agents"] == 1


def test_a_turn_is_exported(store: Path, tmp_path: Path) -> None:
    # Its state came from a turn that this journal does not hold.
    refused = told("audit", "export", "t-0001", str(tmp_path / "t.json"), code=4)
    assert "state 4" in refused["message"]
    assert told("audit", "export", "t-7", str(tmp_path / "t.json"), code=3)


# ---------------------------------------------------------------- replay


@pytest.mark.parametrize("name", ["tool", "cut-off"])
def test_a_file_is_replayed(name: str) -> None:
    found = told("replay", "--file", str(JOURNALS / f"{name}.json"))
    assert found["identical"]
    assert found["calls"] == 2
    shown = run("replay", "--file", str(JOURNALS / f"{name}.json"))
    assert shown.exit_code == 0
    assert "2 calls: identical" in shown.stdout


def test_a_file_that_comes_out_otherwise_ends_with_1(tmp_path: Path) -> None:
    file = tmp_path / "turn.json"
    text = (JOURNALS / "asked.json").read_text()
    assert '"ONE TWO 0"' in text
    file.write_text(text.replace('"ONE TWO 0"', '"TWO"'))
    found = told("replay", "--file", str(file), code=1)
    assert found["differences"][0].startswith("the reply differs")
    shown = run("replay", "--file", str(file))
    assert shown.exit_code == exits.FAILED
    assert "different" in shown.stdout
    file.write_text("{}")
    assert told("replay", "--file", str(file), code=1)["error"] == "RecordingError"


def test_pdb_stops_in_the_handler() -> None:
    result = CliRunner().invoke(
        app,
        ["replay", "--pdb", "--file", str(JOURNALS / "asked.json")],
        input="p message.text\ncontinue\n",
    )
    assert result.exit_code == 0, result.output
    assert "return Done(texts=[message.text.upper()])" in result.output
    assert "'one two 0'" in result.output
    assert "identical" in result.output


# ---------------------------------------------------------------- backups


def test_a_backup_is_restored_into_an_empty_store(store: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    assert told("backup", str(copy))["bytes"] == copy.stat().st_size
    assert run("backup", str(copy)).exit_code == exits.FAILED
    assert told("restore", str(copy), "--system", "other")["restored"].endswith("other/store.db")
    assert len(told("dlq", "list", "--system", "other")) == 2
    assert run("restore", str(copy), "--system", "other").exit_code == exits.FAILED
    assert run("restore", str(tmp_path / "none"), "--system", "third").exit_code == exits.FAILED
