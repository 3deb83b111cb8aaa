from __future__ import annotations

import json
import logging
import os
import pickle
import stat
import time
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import parser
from pydantic import ValidationError

from llmos.kernel import logs, metrics
from llmos.kernel.settings import Settings, SettingsError


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LLMOS_HOME", "LLMOS_MODELS", "LLMOS_RAY_ADDRESS", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv("LLMOS_LOG_LEVEL", raising=False)


# ------------------------------------------------------------------ settings


def test_settings_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Settings().ray_address is None
    assert Settings().log_level == "INFO"
    monkeypatch.setenv("LLMOS_HOME", "/data/llmos")
    monkeypatch.setenv("LLMOS_LOG_LEVEL", "DEBUG")
    made = Settings()
    assert (made.home, made.log_level) == (Path("/data/llmos"), "DEBUG")
    assert made.models_dir == Path("/data/llmos/models")
    assert made.runs_dir == Path("/data/llmos/runs")
    monkeypatch.setenv("LLMOS_MODELS", "/models")
    assert Settings().models_dir == Path("/models")


def test_a_ray_job_gives_its_address_and_ours_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert Settings().ray_address == "10.0.0.1:6379"
    monkeypatch.setenv("LLMOS_RAY_ADDRESS", "10.0.0.2:6379")
    assert Settings().ray_address == "10.0.0.2:6379"
    # What a caller says counts before what the environment says.
    assert Settings(ray_address="10.0.0.3:6379").ray_address == "10.0.0.3:6379"


def test_an_empty_variable_is_no_value(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "")
    monkeypatch.setenv("LLMOS_LOG_LEVEL", "")
    assert Settings().ray_address is None
    assert Settings().log_level == "INFO"


def test_settings_are_frozen_checked_and_travel(monkeypatch: pytest.MonkeyPatch) -> None:
    made = Settings(home=Path("/x"))
    assert pickle.loads(pickle.dumps(made)) == made
    with pytest.raises(ValidationError):
        made.home = Path("/y")  # type: ignore[misc]
    monkeypatch.setenv("LLMOS_LOG_LEVEL", "LOUD")
    with pytest.raises(SettingsError) as caught:
        Settings()
    assert caught.value.setting == "LLMOS_LOG_LEVEL"
    assert "'DEBUG'" in caught.value.reason
    assert pickle.loads(pickle.dumps(caught.value)).facts == caught.value.facts
    with pytest.raises(SettingsError) as caught:
        Settings(log_level="LOUD")
    assert caught.value.setting == "log_level"


def test_the_folders_of_a_system_are_for_their_owner_alone(tmp_path: Path) -> None:
    made = Settings(home=tmp_path / "share" / "llmos")
    before = os.umask(0)
    try:
        run = made.make_folders("demo")
    finally:
        os.umask(before)
    assert run == made.run_dir("demo") == made.home / "runs" / "demo"
    for folder in (made.home, made.home / "cache", made.runs_dir, run, run / "logs"):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    # What somebody has opened on purpose stays open.
    made.home.chmod(0o755)
    made.make_folders("demo")
    assert stat.S_IMODE(made.home.stat().st_mode) == 0o755


def test_a_home_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SettingsError) as caught:
        Settings(home=tmp_path / "file" / "home").make_folders("demo")
    assert caught.value.setting == "LLMOS_HOME"
    assert str(tmp_path) in caught.value.reason


# ------------------------------------------------------------------ metrics


def test_two_processes_are_joined_into_what_prometheus_reads() -> None:
    metrics.TURNS.labels("p:A", "ok").observe(0.02)
    metrics.TOKENS.labels(model='we"ird\\\n', phase="decode").inc(5)
    metrics.MEMORY.labels(device="cpu:0", owner="model chat").set(1024)
    one = pickle.loads(pickle.dumps(metrics.export("host:0")))
    metrics.TURNS.labels("p:A", "ok").observe(0.2)
    two = metrics.export("host:1")
    text = metrics.render([one, two])

    families = {f.name: f for f in parser.text_string_to_metric_families(text)}
    assert len(families) == len(text.split("# TYPE ")) - 1
    assert families["llmos_turn_seconds"].type == "histogram"
    counts = {
        s.labels["process"]: s.value
        for s in families["llmos_turn_seconds"].samples
        if s.name.endswith("_count") and s.labels["program"] == "p:A"
    }
    assert set(counts) == {"host:0", "host:1"}
    assert counts["host:1"] == counts["host:0"] + 1
    tokens = [s for s in families["llmos_tokens"].samples if s.labels["model"] == 'we"ird\\\n']
    assert [(s.name, s.value) for s in tokens] == [("llmos_tokens_total", 5.0)] * 2
    assert families["llmos_device_bytes"].type == "gauge"
    buckets = [
        s
        for s in families["llmos_turn_seconds"].samples
        if s.name.endswith("_bucket")
        and s.labels["process"] == "host:1"
        and s.labels["program"] == "p:A"
    ]
    assert [s.value for s in buckets] == sorted(s.value for s in buckets)
    assert buckets[-1].labels["le"] == "+Inf"


def test_a_label_has_a_bounded_number_of_values() -> None:
    label = metrics.Bounded(2)
    assert [label(t) for t in ("a", "b", "c", "a", "d")] == [
        *("a", "b", metrics.OTHERS, "a", metrics.OTHERS)
    ]


def test_nothing_gathered_is_an_empty_page() -> None:
    assert metrics.render([]) == ""


# ------------------------------------------------------------------ logs


def lines(folder: Path, name: str = "host-0") -> list[dict[str, Any]]:
    for handler in logging.getLogger("llmos").handlers:
        handler.flush()
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


def test_a_line_is_json_with_agent_and_turn(tmp_path: Path) -> None:
    logs.configure(tmp_path, "host:0", "INFO")
    log = logging.getLogger("llmos.host")
    log.debug("not wanted")
    log.info("outside")
    with logs.turn_context("acme/desk/main", "t1"):
        log.warning("inside %d", 3, extra={"seconds": 1.5, "path": Path("/x")})
    log.info("after \ud800 “quoted”\nline")
    first, second, third = lines(tmp_path)
    assert first["message"] == "outside"
    assert abs(first["ts"] - time.time()) < 60
    assert "agent" not in first
    assert (second["agent"], second["turn"], second["level"]) == ("acme/desk/main", "t1", "WARNING")
    assert (second["message"], second["seconds"], second["path"]) == ("inside 3", 1.5, "/x")
    assert (second["process"], second["logger"]) == ("host:0", "llmos.host")
    assert third["message"].endswith("“quoted”\nline")
    assert "turn" not in third


def test_an_exception_is_logged_with_its_trace(tmp_path: Path) -> None:
    logs.configure(tmp_path, "host:0", "INFO")
    try:
        raise KeyError("lost")
    except KeyError:
        logging.getLogger("llmos.host").exception("it failed")
    (line,) = lines(tmp_path)
    assert line["level"] == "ERROR"
    assert line["exception"].splitlines()[0].startswith("Traceback")
    assert line["exception"].splitlines()[-1] == "KeyError: 'lost'"


def test_files_are_rotated_and_the_oldest_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logs, "MAX_BYTES", 2000)
    logs.configure(tmp_path, "host:0", "INFO")
    for number in range(200):
        logging.getLogger("llmos.host").info("number %d", number)
    assert {p.name for p in tmp_path.iterdir()} == {
        "host-0.jsonl",
        "host-0.jsonl.1",
        "host-0.jsonl.2",
    }
    assert all(p.stat().st_size <= 2000 for p in tmp_path.iterdir())
    assert lines(tmp_path)[-1]["message"] == "number 199"


def test_configuring_again_moves_the_log_and_leaves_other_loggers(tmp_path: Path) -> None:
    root = logging.getLogger().handlers[:]
    logs.configure(tmp_path / "a", "host:0", "INFO")
    logs.configure(tmp_path / "b", "host:0", "WARNING")
    logging.getLogger("llmos.x").warning("here")
    assert lines(tmp_path / "b")[0]["message"] == "here"
    assert (tmp_path / "a" / "host-0.jsonl").read_text() == ""
    assert len(logging.getLogger("llmos").handlers) == 1
    assert logging.getLogger().handlers == root
