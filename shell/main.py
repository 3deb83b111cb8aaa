"""``llmos``: the command line. Exit codes: :mod:`llmos.shell.exits`."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections import deque
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from llmos.drivers.errors import LlmosError
from llmos.kernel.settings import Settings
from llmos.kernel.system import SystemConfig
from llmos.shell import (
    adapters,
    exits,
    graphs,
    models,
    operate,
    records,
    render,
    rules,
    starting,
    top,
    why,
)
from llmos.shell.common import Address, AsJson, System, connected, print_json
from llmos.syscalls.messages import Wire

if TYPE_CHECKING:
    pass

app = typer.Typer(
    name="llmos",
    help="LLM OS: an operating system for LLM agents, on Ray.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(models.app, name="models")
app.add_typer(adapters.app, name="adapters")
app.add_typer(rules.app, name="rules")
app.add_typer(graphs.app, name="graph")
app.add_typer(records.audit_app, name="audit")
app.add_typer(operate.dlq_app, name="dlq")
app.add_typer(operate.effects_app, name="effects")

File = Annotated[Path, typer.Argument(help="The system file.", metavar="FILE")]
Data = Annotated[
    list[str],
    typer.Option("--data", metavar="NAME=PATH", help="Read a corpus or graph from elsewhere."),
]

DOWN_S = 60.0
"""Longest wait of ``down`` before it uses force."""


def _read(file: Path, data: list[str]) -> SystemConfig:
    overrides: dict[str, Path] = {}
    for pair in data:
        name, found, path = pair.partition("=")
        if not found:
            raise typer.BadParameter(f"{pair!r} is not NAME=PATH", param_hint="--data")
        overrides[name] = Path(path)
    return SystemConfig.read(file).with_data(overrides)


# -------------------------------------------------------------------- up and down


@app.command()
def up(
    file: File = Path("system.toml"),
    data: Data = [],  # noqa: B006 - typer reads defaults from the signature
    address: Address = None,
    foreground: Annotated[
        bool, typer.Option("--foreground", help="Stay here until Ctrl-C.")
    ] = False,
) -> None:
    """Boot a kernel that stays, and launch the agents of FILE."""
    with exits.errors():
        system = _read(file, data)
        from llmos.kernel.cluster import ClusterError, RunFile

        settings = Settings()
        name = system.system.name
        with starting.lock(settings, name) as held:
            try:
                running = RunFile.find(settings, name)
            except ClusterError:
                pass
            else:
                exits.fail(
                    f"system {name!r} runs already at {running.address}; llmos down stops it"
                )
            if address or settings.ray_address:
                from llmos.kernel.client import Kernel

                with (
                    exits.signals(),
                    Kernel.boot(system, address=address, detached=True) as kernel,
                ):
                    render.console().print(render.agents(kernel.ps()))
                return
            if foreground:
                from llmos.shell import daemon

                raise typer.Exit(daemon.serve(system))
            with render.console().status(f"Booting {name} …") as shown:
                starting.start(
                    file, data, settings.run_dir(name), held, lambda text: shown.update(text)
                )
    _print_ps(name)


def _print_ps(name: str) -> None:
    with connected(name, None) as kernel:
        console = render.console()
        console.print(render.agents(kernel.ps()))
        console.print(Text("Ask one: llmos ask AGENT TEXT    Stop: llmos down", style="dim"))


@app.command()
def down(system: System = None, address: Address = None) -> None:
    """Shut a kernel down; turns that run get a few seconds to end."""
    with exits.errors():
        from llmos.kernel.client import Kernel
        from llmos.kernel.cluster import RunFile

        settings = Settings()
        if address or settings.ray_address:
            kernel = Kernel.connect(system, address=address)
            kernel.shutdown()
            return
        run = RunFile.find(settings, system)
        if run.pid == 0:
            Kernel.connect(run.system).shutdown()
        else:
            # It may end by itself between any look and the signal.
            with suppress(ProcessLookupError):
                os.kill(run.pid, signal.SIGTERM)
            until = time.monotonic() + DOWN_S
            while run.alive:
                if time.monotonic() > until:
                    with suppress(ProcessLookupError):
                        os.kill(run.pid, signal.SIGKILL)
                    exits.fail(f"process {run.pid} did not end in {DOWN_S:.0f} s and was killed")
                time.sleep(0.05)
        RunFile.path(settings, run.system).unlink(missing_ok=True)
        typer.echo(f"{run.system} is down")


@app.command()
def run(
    file: File,
    ask: Annotated[
        list[str], typer.Option("--ask", metavar="AGENT=TEXT", help="A question; may be repeated.")
    ] = [],  # noqa: B006 - typer reads defaults from the signature
    questions: Annotated[
        Path | None, typer.Option(help="A TOML file with [[questions]]: agent, text, data.")
    ] = None,
    data: Data = [],  # noqa: B006 - typer reads defaults from the signature
    address: Address = None,
    deadline: Annotated[float, typer.Option(help="Seconds for each answer.")] = 120.0,
    as_json: AsJson = False,
) -> None:
    """Boot, launch the agents of FILE, ask them, print the answers, shut down.

    Inside a Ray job it runs in the job's cluster. Without questions it serves until Ctrl-C.
    """
    from llmos.shell.session import Asked, ask_all, read_questions

    with exits.errors(as_json=as_json), exits.signals():
        system = _read(file, data)
        asked = read_questions(questions) if questions else []
        for pair in ask:
            agent, found, text = pair.partition("=")
            if not found:
                raise typer.BadParameter(f"{pair!r} is not AGENT=TEXT", param_hint="--ask")
            asked.append(Asked(agent=agent, text=text))
        if not asked:
            from llmos.shell import daemon

            raise typer.Exit(daemon.serve(system, address))
        from llmos.kernel.client import Kernel

        console = render.console()
        started = time.monotonic()
        if as_json:
            kernel = Kernel.boot(system, address=address)
        else:
            with console.status("Booting the kernel …") as shown:
                kernel = Kernel.boot(
                    system, address=address, progress=lambda text: shown.update(f"{text} …")
                )
        with kernel:
            booted = time.monotonic() - started
            if not as_json:
                console.print(
                    Text(f"Kernel and {len(kernel.ps())} agents are up after {booted:.1f} s.\n")
                )
            results = []
            for result in ask_all(kernel, asked, deadline):
                results.append(result)
                if not as_json:
                    console.print(result.panel(len(results)))
            stopping = time.monotonic()
        ended = time.monotonic()
        failed = [r for r in results if r.error is not None]
        summary = {
            "system": system.system.name,
            "boot_s": round(booted, 3),
            "answers_s": round(stopping - started - booted, 3),
            "shutdown_s": round(ended - stopping, 3),
            "failed": len(failed),
            "answers": [r.as_json() for r in results],
        }
        if as_json:
            print_json(summary)
        else:
            console.print(
                f"{len(results) - len(failed)} answered, {len(failed)} failed. "
                f"Boot {booted:.1f} s, answers {summary['answers_s']:.1f} s, "
                f"shutdown {summary['shutdown_s']:.1f} s."
            )
        if failed:
            raise typer.Exit(exits.FAILED)


# -------------------------------------------------------------------- agents


@app.command()
def launch(
    program: Annotated[str, typer.Argument(metavar="MODULE:CLASS")],
    key: Annotated[str, typer.Option(help="Tells agents of one program apart.")] = "main",
    tenant: Annotated[str, typer.Option(help="Whose agent it is.")] = "default",
    config: Annotated[str, typer.Option(help="JSON of the program's configuration.")] = "{}",
    system: System = None,
    address: Address = None,
    as_json: AsJson = False,
) -> None:
    """Launch an agent."""
    try:
        parsed = json.loads(config)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--config") from None
    with connected(system, address, as_json) as kernel:
        agent = kernel.launch(program, key, tenant=tenant, config=parsed)
        print_json({"agent": agent}) if as_json else typer.echo(agent)


@app.command()
def ask(
    agent: Annotated[str, typer.Argument(help="Its id, or an unambiguous part of it.")],
    text: Annotated[str, typer.Argument(help="The question.")],
    kind: Annotated[
        str | None, typer.Option(help="Send a message of this kind; TEXT is then its JSON body.")
    ] = None,
    deadline: Annotated[float, typer.Option(help="Seconds to wait for the answer.")] = 120.0,
    system: System = None,
    address: Address = None,
    as_json: AsJson = False,
) -> None:
    """Ask an agent and print its answer."""
    from llmos.agents.messages import Question
    from llmos.shell.session import Result

    with connected(system, address, as_json) as kernel:
        if kind is None:
            try:
                wire = Wire.of(Question(text=text))
            except ValueError as error:
                raise typer.BadParameter(str(error), param_hint="TEXT") from None
        else:
            try:
                wire = Wire.of_json(kind, json.loads(text))
            except ValueError as error:
                raise typer.BadParameter(f"not JSON: {error}", param_hint="TEXT") from None
        reply = kernel.ask_reply(agent, wire, deadline_s=deadline)
        if reply.error is not None:
            raise reply.error
        result = Result.of(kernel, reply.agent, text, reply)
        print_json(result.as_json()) if as_json else render.console().print(result.panel(None))


@app.command()
def ps(system: System = None, address: Address = None, as_json: AsJson = False) -> None:
    """List the agents."""
    with connected(system, address, as_json) as kernel:
        rows = kernel.ps()
        print_json(rows) if as_json else render.console().print(render.agents(rows))


@app.command()
def kill(
    agent: Annotated[str, typer.Argument(help="Its id, or an unambiguous part of it.")],
    system: System = None,
    address: Address = None,
    as_json: AsJson = False,
) -> None:
    """Cancel an agent's turns and forget it and its state."""
    with connected(system, address, as_json) as kernel:
        killed = kernel.kill(agent)
        print_json({"killed": killed}) if as_json else typer.echo(f"killed {killed}")


# -------------------------------------------------------------------- looking


@app.command()
def status(system: System = None, address: Address = None, as_json: AsJson = False) -> None:
    """Show processes, devices with memory by owner, slots and knowledge."""
    with connected(system, address, as_json) as kernel:
        state = kernel.status()
        print_json(state) if as_json else render.console().print(render.status(state))


@app.command()
def metrics(system: System = None, address: Address = None) -> None:
    """Print the Prometheus metrics of all processes."""
    with connected(system, address) as kernel:
        sys.stdout.write(kernel.metrics())


@app.command()
def logs(
    process: Annotated[str | None, typer.Option(help="Only this process, e.g. host:0.")] = None,
    agent: Annotated[str | None, typer.Option(help="Only this agent.")] = None,
    turn: Annotated[str | None, typer.Option(help="Only this turn.")] = None,
    level: Annotated[str, typer.Option(help="At least this level.")] = "INFO",
    lines: Annotated[int, typer.Option("-n", help="How many of the newest.", min=1)] = 50,
    follow: Annotated[bool, typer.Option("-f", "--follow", help="Go on as they come.")] = False,
    system: System = None,
    as_json: AsJson = False,
) -> None:
    """Show the structured logs of a system, running or not."""
    from llmos.shell.logview import LEVELS, Filter, follow_lines, read_lines

    if level.upper() not in LEVELS:
        raise typer.BadParameter(f"one of {', '.join(LEVELS)}", param_hint="--level")
    with exits.errors():
        runs = Settings().runs_dir
    folders = sorted(runs.glob(f"{system or '*'}/logs"))
    if not folders:
        exits.fail("no logs yet" + (f" of system {system!r}" if system else ""), exits.NOT_FOUND)
    if len(folders) > 1:
        # The system that was used last is meant.
        folders.sort(key=lambda f: max((p.stat().st_mtime for p in f.glob("*.jsonl")), default=0.0))
    wanted = Filter(process, agent, turn, LEVELS[level.upper()])
    with exits.errors():
        for line in deque(read_lines(folders[-1], wanted), maxlen=lines):
            typer.echo(line.raw if as_json else line.text())
        if follow:
            for line in follow_lines(folders[-1], wanted):
                typer.echo(line.raw if as_json else line.text())


@app.command()
def version() -> None:
    """Print the version."""
    from llmos import __version__

    typer.echo(__version__)


for command in (
    *(records.strace, records.replay, top.top, why.why_waiting),
    *(operate.held, operate.release, operate.timers, operate.mail),
    *(operate.backup, operate.restore, operate.drain, operate.rebalance),
):
    app.command()(command)


def main() -> None:
    """Entry point."""
    try:
        app()
    except LlmosError as error:
        sys.stderr.write(f"error: {error} [{error.code}]\n")
        sys.exit(exits.code_of(error))
    except KeyboardInterrupt as interrupt:
        # Before or after a command's own handling.
        text, code = exits.of_interrupt(interrupt)
        sys.stderr.write(f"error: {text}\n")
        sys.exit(code)


if __name__ == "__main__":
    main()
