"""``llmos rules`` as people and scripts meet it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from llmos.shell.rules import app

DATA = Path(__file__).parents[2].parent / "shared" / "data" / "clips" / "examples"

needs_data = pytest.mark.skipif(not DATA.exists(), reason="the CLIPS examples are not here")

COUNT = """
(deftemplate n (slot value (type INTEGER)))
(defrule down "Counts down"
  ?f <- (n (value ?v&:(> ?v 0)))
  =>
  (modify ?f (value (- ?v 1))))
"""


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments])


def test_a_program_runs_and_tells_what_fired(tmp_path: Path) -> None:
    file = tmp_path / "count.clp"
    file.write_text(
        COUNT
        + '(deffacts start (n (value 2)))\n(defrule said (n (value 0)) => (printout t "done" crlf))'
    )
    result = run("run", file, "--json")
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert told["firings"] == 3
    assert [f["rule"] for f in told["trace"]] == ["down", "down", "said"]
    assert told["trace"][0]["because"] == ["(n (value 2))"]
    assert told["trace"][0]["comment"] == "Counts down"
    assert told["output"] == "done\n"
    assert told["ended"] == "rest"
    assert told["facts"] == 1
    text = run("run", file)
    assert text.exit_code == 0
    assert "3 firings in" in text.stdout
    short = json.loads(run("run", file, "--json", "--max-firings", "1").stdout)
    assert (short["firings"], short["ended"]) == (1, "halt")


def test_questions_are_answered_from_a_file(tmp_path: Path) -> None:
    file, answers = tmp_path / "ask.clp", tmp_path / "answers"
    file.write_text('(defrule ask => (printout t "Name? ") (assert (name (read))))')
    answers.write_text("Ann\n")
    told = json.loads(run("run", file, "--json", "--input", answers).stdout)
    assert told["output"] == "Name? "
    assert told["facts"] == 1


def test_a_program_that_never_ends_is_stopped(tmp_path: Path) -> None:
    file = tmp_path / "loop.clp"
    file.write_text("(defrule loop (a) => (while TRUE do)) (defrule start => (assert (a)))")
    result = run("run", file, "--json", "--timeout", "1")
    assert result.exit_code == 124
    told = json.loads(result.stdout)
    assert (told["ended"], told["firings"], told["facts"]) == ("time", 2, None)


def test_a_program_that_asks_on_is_stopped_at_the_end_of_its_input(tmp_path: Path) -> None:
    file, answers = tmp_path / "ask.clp", tmp_path / "answers"
    file.write_text("(defrule ask => (while (neq (read) yes) do (printout t again crlf)))")
    answers.write_text("no\nno\n")
    result = run("run", file, "--json", "--input", answers)
    assert result.exit_code == 1
    told = json.loads(result.stdout)
    assert (told["ended"], told["firings"]) == ("input", 1)
    assert told["output"].startswith("again\nagain\n")
    answers.write_text("no\nyes\n")
    told = json.loads(run("run", file, "--json", "--input", answers).stdout)
    assert (told["ended"], told["output"]) == ("rest", "again\n")


def test_what_is_wrong_is_said(tmp_path: Path) -> None:
    missing = run("run", tmp_path / "nope.clp", "--json")
    assert missing.exit_code == 1
    assert json.loads(missing.stdout)["error"] == "RuleSyntaxError"
    broken, failing = tmp_path / "broken.clp", tmp_path / "failing.clp"
    broken.write_text("\n(defrule r (a) =>")
    assert "broken.clp" in run("run", broken).stderr
    failing.write_text("(defrule r => (/ 1 0))")
    result = run("run", failing, "--json")
    assert result.exit_code == 1
    assert "divide by zero" in json.loads(result.stdout)["errors"]
    (tmp_path / "a.bat").write_text("(reset)")
    assert run("run", tmp_path / "a.bat", failing).exit_code == 2


@needs_data
@pytest.mark.parametrize(("guests", "firings"), [(16, 183), (64, 2271)])
def test_manners_fires_as_it_is_known_to(guests: int, firings: int) -> None:
    folder = DATA / "manners"
    told = json.loads(
        run("run", folder / "manners.clp", folder / f"manners{guests}.fct", "--json").stdout
    )
    assert told["firings"] == len(told["trace"]) == firings
    assert told["trace"][0]["rule"] == "assign_first_seat"
    assert told["trace"][-1]["rule"] == "all_done"


@needs_data
def test_commands_and_consultations_run_unchanged(tmp_path: Path) -> None:
    told = json.loads(run("run", DATA / "manners" / "manners16.bat", "--json").stdout)
    assert told["firings"] == 183
    answers = tmp_path / "answers"
    for name, said in (("auto.clp", "no\n"), ("animal.clp", "yes\n"), ("wine.clp", "unknown\n")):
        answers.write_text(said * 100)
        told = json.loads(
            run("run", DATA / name, "--json", "--input", answers, "--timeout", "20").stdout
        )
        assert told["firings"] > 1
        assert told["ended"] != "time"


def test_a_rule_file_is_tried_on_its_own_cases(tmp_path: Path) -> None:
    file = tmp_path / "count.clp"
    file.write_text(COUNT)
    (tmp_path / "count.cases.toml").write_text("""
[[case]]
name = "from two"
given = [{ n = { value = 2 } }]
expect = [{ n = { value = 0 } }]
absent = [{ n = { value = 1 } }]
fired = ["down", "down"]

[[case]]
name = "too far"
given = [{ n = { value = 20 } }]
max_firings = 5
error = "RuleLimitExceeded"
""")
    good = run("test", file)
    assert good.exit_code == 0, good.output
    assert "2 passed, 0 failed" in good.stdout
    other = tmp_path / "other.toml"
    other.write_text("""
[[case]]
name = "wrong in every way"
given = [{ n = { value = 1 } }]
expect = [{ n = { value = 7 } }]
absent = [{ n = { value = 0 } }]
fired = ["up"]
error = "RuleFailed"
""")
    bad = run("test", file, "--cases", other, "--json")
    assert bad.exit_code == 1
    told = json.loads(bad.stdout)
    assert (told["passed"], told["failed"]) == (0, 1)
    assert len(told["cases"][0]["complaints"]) == 4
    other.write_text("[[case]]\nnam = 1")
    assert run("test", file, "--cases", other).exit_code == 1
    assert run("test", tmp_path / "nope.clp").exit_code == 1
