"""``llmos models`` as people and scripts meet it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from llmos.shell.models import app
from tests.drivers.models import tiny


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LLMOS_MODELS", str(tmp_path / "store"))
    return tiny.encoder(tmp_path / "tiny")


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def test_from_pull_to_rm(folder: Path, tmp_path: Path) -> None:
    assert "empty" in run("list").stdout
    assert json.loads(run("list", "--json").stdout) == []

    pulled = run("pull", f"path:{folder}", "--name", "mine", "--json")
    assert pulled.exit_code == 0
    (row,) = json.loads(pulled.stdout)
    assert (row["name"], row["kind"]) == ("mine", "encoder")
    assert Path(row["path"]) == tmp_path / "store" / "mine"
    assert run("pull", "mine").exit_code == 0

    assert json.loads(run("list", "--json").stdout) == [row]
    assert "mine" in run("list").stdout
    assert run("path", "mine").stdout == f"{tmp_path}/store/mine\n"
    assert json.loads(run("path", "mine", "--json").stdout) == row
    assert run("verify").exit_code == 0
    (checked,) = json.loads(run("verify", "mine", "--json").stdout)
    assert checked["ok"] is True

    (tmp_path / "store" / "mine" / "vocab.txt").write_text("x")
    broken = run("verify", "--json")
    assert broken.exit_code == 1
    assert json.loads(broken.stdout)[0]["error"] == "ModelDamaged"
    said = run("verify", "mine")
    assert said.exit_code == 1
    assert said.stderr.startswith("error: ")
    assert "vocab.txt" in said.stderr

    assert run("rm", "mine").stdout == "removed mine\n"
    assert run("rm", "mine").exit_code == 3


def test_what_is_not_there_is_code_3(folder: Path) -> None:
    for arguments in (("path", "nope"), ("pull", "nope"), ("rm", "nope"), ("verify", "nope")):
        result = run(*arguments)
        assert result.exit_code == 3, arguments
        assert result.stderr.startswith("error: ")
        assert result.stdout == ""
    assert "llmos models pull minilm-l6" in run("path", "minilm-l6").stderr


def test_failures_are_code_1_and_wrong_usage_code_2(folder: Path) -> None:
    (folder / "config.json").write_text("{")
    assert run("pull", f"path:{folder}").exit_code == 1
    assert run("pull", "a", "b", "--name", "c").exit_code == 2
    assert run("pull").exit_code == 2
    assert run("fly").exit_code == 2


def test_the_catalogue_is_shown_on_request(folder: Path) -> None:
    rows = {row["name"]: row for row in json.loads(run("list", "--available", "--json").stdout)}
    assert rows["smollm2-135m-instruct"]["stored"] is False
    assert rows["llama-3.1-8b-instruct"]["gated"] is True
    assert "not pulled, gated" in run("list", "--available").stdout
