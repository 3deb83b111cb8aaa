"""``llmos rules``: run a CLIPS program, or try a rule file on its own cases."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from llmos.drivers.protocols import RuleBase
from llmos.drivers.registry import driver
from llmos.drivers.rules.cases import read_cases, run_case
from llmos.drivers.rules.clips_run import ProgramRun, run_program
from llmos.drivers.rules.files import driver_of, read_source
from llmos.shell import exits
from llmos.shell.common import AsJson, print_json

app = typer.Typer(name="rules", help="Expert rules, without a system.", no_args_is_help=True)

TIMEOUT_S, AT_A_TERMINAL_S = 60.0, 3600.0


@app.command()
def run(
    files: Annotated[
        list[Path],
        typer.Argument(
            help="CLIPS files, loaded in this order; facts (.fct) after the reset; "
            "or one file of commands (.bat).",
            metavar="FILE...",
        ),
    ],
    max_firings: Annotated[int, typer.Option(min=1, help="Stop after so many.")] = 1_000_000,
    timeout: Annotated[
        float | None,
        typer.Option(help="Seconds; by default 60, or 3600 where a person can answer."),
    ] = None,
    answers: Annotated[
        Path | None,
        typer.Option("--input", help="Answers to the program's questions, one a line."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Run a CLIPS program unchanged: reset, run, and tell what fired and why.

    The program is trusted like any script: it may read and write files.
    """
    person = answers is None and not as_json and sys.stdin.isatty()
    if timeout is None:
        timeout = AT_A_TERMINAL_S if person else TIMEOUT_S
    begun = time.monotonic()
    with exits.errors(as_json=as_json):
        try:
            stdin = answers.open("rb") if answers else None
        except OSError as error:
            exits.fail(f"{answers}: {error.strerror}")
        try:
            done = run_program(
                files, max_firings=max_firings, timeout_s=timeout, stdin=stdin, echo=not as_json
            )
        except ValueError as error:
            exits.fail(str(error), exits.USAGE)
        finally:
            if stdin is not None:
                stdin.close()
    seconds = time.monotonic() - begun
    if as_json:
        print_json(_json(files, done, seconds))
    else:
        for number, firing in enumerate(done.trace, 1):
            typer.echo(f"{number:5}  {firing.rule}: {', '.join(firing.because)}")
        typer.echo(f"{done.firings} firings in {seconds:.2f} s")
    if done.errors:
        exits.fail(done.errors)
    if done.ended == "time":
        exits.fail(f"still running after {timeout:g} s, and stopped", exits.DEADLINE)
    if done.ended == "input":
        exits.fail("stopped: it asks on, and there are no more answers (--input)")


def _json(files: list[Path], done: ProgramRun, seconds: float) -> dict[str, object]:
    return {
        "files": [str(file) for file in files],
        "version": done.version,
        "firings": done.firings,
        "ended": done.ended,
        "seconds": round(seconds, 3),
        "facts": None if done.facts is None else len(done.facts),
        "output": done.output,
        "errors": done.errors,
        "trace": [
            {"rule": f.rule, "because": list(f.because), "comment": f.comment} for f in done.trace
        ],
    }


def try_cases(
    file: Annotated[Path, typer.Argument(help="A rule file: .clp, or .json.")],
    cases: Annotated[
        Path | None,
        typer.Option(help="The cases; by default NAME.cases.toml beside the rule file."),
    ] = None,
    driver_name: Annotated[
        str | None, typer.Option("--driver", help="clips, zen or memory; by default by the file.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Try a rule file on its own cases; 1 if one of them fails."""
    with exits.errors(as_json=as_json):
        source = read_source(file)
        kind = driver_name or driver_of(file, source)
        base: RuleBase = driver("rules", kind)(file.name, source)
        stated = read_cases(cases or file.with_name(f"{file.stem}.cases.toml"))
        results = [run_case(base, case) for case in stated]
    failed = [result for result in results if result.complaints]
    if as_json:
        print_json(
            {
                "file": str(file),
                "driver": kind,
                "version": base.version,
                "passed": len(results) - len(failed),
                "failed": len(failed),
                "cases": [
                    {"name": r.name, "complaints": list(r.complaints), "fired": list(r.fired)}
                    for r in results
                ],
            }
        )
    else:
        for result in results:
            typer.echo(f"{'FAILED' if result.complaints else 'ok    '}  {result.name}")
            for complaint in result.complaints:
                typer.echo(f"        {complaint}")
        typer.echo(f"{len(results) - len(failed)} passed, {len(failed)} failed")
    if failed:
        raise typer.Exit(exits.FAILED)


# By this name pytest's linter would take it for a test.
app.command("test")(try_cases)
