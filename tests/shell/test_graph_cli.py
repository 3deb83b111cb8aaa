from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from llmos.shell.graphs import app


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments])


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "g.csv"
    path.write_text(
        "subject,relation,object\nFlu,causes,Fever\nFlu,causes,Cough\nCold,causes,Cough\n"
    )
    return path


@pytest.mark.parametrize("driver", ["memory", "networkx", "ladybug"])
def test_a_file_is_looked_into(file: Path, driver: str) -> None:
    def told(*arguments: str | Path) -> list[object]:
        result = run(*arguments, "--driver", driver, "--json")
        assert result.exit_code == 0, result.output
        return [json.loads(line) for line in result.stdout.splitlines()]

    assert told("show", file) == [{"nodes": 4, "edges": 3}]
    assert told("link", file, "a flu") == [
        {"span": [2, 5], "text": "flu", "id": "flu", "name": "Flu"}
    ]
    assert told("around", file, "fever", "--hops", "1") == [["flu", "causes", "fever"]]
    assert told("match", file, "?a", "causes", "cough", "?a", "causes", "fever") == [{"?a": "flu"}]


def test_what_is_wrong_has_an_exit_code(file: Path, tmp_path: Path) -> None:
    assert run("show", tmp_path / "nope.csv").exit_code == 1
    assert run("match", file, "?a", "causes").exit_code == 2
    missing = run("around", file, "plague", "--json")
    assert missing.exit_code != 0
    assert json.loads(missing.stdout)["error"] == "UnknownNode"
    assert "2-5  flu" in run("link", file, "a flu").stdout
