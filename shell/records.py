"""Looking at what is recorded, checking it, running it again: strace, audit, replay."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer
from rich.text import Text

from llmos.kernel.settings import Settings
from llmos.shell import exits, render
from llmos.shell.common import Address, AsJson, System, operating, print_json
from llmos.shell.trace import Trace

if TYPE_CHECKING:
    from llmos.kernel.auditing import AuditStore, Head
    from llmos.kernel.client import SyncOperator
    from llmos.kernel.recording import Recording
    from llmos.kernel.replaying import Replayed

audit_app = typer.Typer(
    name="audit", help="Check the journal, and take it elsewhere.", no_args_is_help=True
)

Agent = Annotated[
    str | None,
    typer.Argument(help="Its id, or an unambiguous part of it; none is all that are launched."),
]


def strace(
    turn: Annotated[
        str | None, typer.Argument(help="A turn's id or its beginning; none lists the newest.")
    ] = None,
    agent: Annotated[str | None, typer.Option(help="List only this agent's turns.")] = None,
    limit: Annotated[int, typer.Option("-n", help="How many to list.", min=1)] = 20,
    system: System = None,
    address: Address = None,
    as_json: AsJson = False,
) -> None:
    """Show a turn's syscalls with times, sources and rules.

    Also works on the record of a kernel that is down, with --system NAME.
    """
    with operating(system, address, as_json) as operator:
        if turn is None:
            traces = [Trace.of([row]) for row in operator.turns(agent, limit)]
            if as_json:
                print_json([trace.as_json(syscalls=False) for trace in traces])
            else:
                render.console().print(render.turns(traces))
            return
        rows = operator.turn(turn)
        if not rows:
            exits.fail(f"no turn {turn!r} is recorded", exits.NOT_FOUND)
        trace = Trace.of(rows)
        print_json(trace.as_json()) if as_json else render.console().print(render.turn(trace))


# ---------------------------------------------------------------- audit


def _agents(operator: SyncOperator, agent: str | None) -> tuple[AuditStore, list[str]]:
    from llmos.kernel import auditing

    store = cast("AuditStore", operator)
    found = [operator.full_id(agent)] if agent is not None else list(auditing.names(store))
    return store, found


@audit_app.command()
def verify(
    agent: Agent = None,
    heads: Annotated[
        Path | None, typer.Option(help="What llmos audit head --json gave earlier.")
    ] = None,
    system: System = None,
    address: Address = None,
    as_json: AsJson = False,
) -> None:
    """Check the hash chains of agents: rows that were edited, are missing, or were cut off."""
    from llmos.kernel import auditing

    kept = _kept(heads, agent) if heads is not None else []
    with operating(system, address, as_json) as operator:
        store, agents = _agents(operator, agent)
        found = auditing.audit(store, agents, kept)
        if as_json:
            print_json(
                {
                    "agents": found.agents,
                    "rows": found.rows,
                    "findings": [f._asdict() for f in found.findings],
                }
            )
        else:
            console = render.console()
            for f in found.findings:
                console.print(Text(f"{f.agent}, row {f.pos}: {f.problem}: {f.detail}", style="red"))
            verdict = f"{len(found.findings)} findings" if found.findings else "nothing is wrong"
            console.print(f"{found.agents} agents, {found.rows} rows: {verdict}")
    if found.findings:
        raise typer.Exit(exits.FAILED)


def _kept(file: Path, agent: str | None) -> list[Head]:
    """Heads out of a file."""
    from llmos.kernel.auditing import Head

    try:
        entries = json.loads(file.read_text(encoding="utf-8"))
        kept = [Head(str(e["agent"]), int(e["pos"]), str(e["hash"])) for e in entries]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise typer.BadParameter(f"{file}: {error!r}", param_hint="--heads") from None
    return [h for h in kept if agent is None or agent == h.agent or agent in h.agent.split("/")]


@audit_app.command()
def head(
    agent: Agent = None, system: System = None, address: Address = None, as_json: AsJson = False
) -> None:
    """Print the end of each chain: kept elsewhere, it shows a chain that was forged as a whole."""
    from llmos.kernel import auditing

    with operating(system, address, as_json) as operator:
        found = list(auditing.heads(*_agents(operator, agent)))
        if as_json:
            print_json([h._asdict() for h in found])
        else:
            for h in found:
                typer.echo(f"{h.agent} {h.pos} {h.hash}")


@audit_app.command()
def export(
    turn: Annotated[str, typer.Argument(help="A turn's id or its beginning.")],
    file: Annotated[Path, typer.Argument(help="A JSON file that is not there yet.")],
    system: System = None,
    address: Address = None,
    as_json: AsJson = False,
) -> None:
    """Write a recorded turn as one file: launch, state before it, message and rows."""
    with operating(system, address, as_json) as operator:
        recording = operator.recording(turn)
        recording.write(file)
        out = {"turn": recording.turn, "agent": recording.agent, "rows": len(recording.rows)}
        if as_json:
            print_json({**out, "file": str(file)})
        else:
            typer.echo(f"{file}: turn {out['turn']} of {out['agent']}, {out['rows']} rows")


# ---------------------------------------------------------------- replay


def replay(
    turn: Annotated[
        str | None, typer.Argument(help="A turn's id or its beginning; not with --file.")
    ] = None,
    debug: Annotated[
        bool, typer.Option("--pdb", help="Stop in the debugger at the first line of the handler.")
    ] = False,
    file: Annotated[
        Path | None, typer.Option("--file", help="What llmos audit export wrote.")
    ] = None,
    system: System = None,
    address: Address = None,
    as_json: AsJson = False,
) -> None:
    """Run a recorded turn again, here and with the recorded results only; say what differs.

    The program is looked for beside the system's file, in the working directory, and among
    what is installed. Exit code 1: it does not run as it did.
    """
    if (turn is None) == (file is None):
        raise typer.BadParameter("give a turn or --file", param_hint="TURN")
    recording: Recording
    if file is not None:
        from llmos.kernel.recording import Recording as Recordings

        with exits.errors(as_json=as_json):
            recording = Recordings.read(file)
    else:
        assert turn is not None
        with operating(system, address, as_json) as operator:
            recording = operator.recording(turn)
    with exits.errors(as_json=as_json):
        from llmos.kernel.replaying import replay as run

        debugger = None
        if debug:
            import pdb

            # Ctrl-C ends the command, also after "continue".
            debugger = pdb.Pdb(nosigint=True)
        found = asyncio.run(run(recording, search=_programs(system), debugger=debugger))
    print_json(_replay_json(found)) if as_json else _show(found)
    if not found.identical:
        raise typer.Exit(exits.FAILED)


def _programs(system: str | None) -> Path:
    """Where programs are looked for first; the working directory always is."""
    from llmos.kernel.offline import SystemNote

    here = Path.cwd()
    sys.path[:0] = [str(here)] if str(here) not in sys.path else []
    note = SystemNote.find(Settings(), system)
    return note.base if note is not None and note.base is not None else here


def _replay_json(found: Replayed) -> dict[str, Any]:
    return {
        "turn": found.turn,
        "agent": found.agent,
        "identical": found.identical,
        "ended": found.ended,
        "calls": found.calls,
        "differences": list(found.differences),
        "code_version": found.code_version,
        "recorded_code": found.recorded_code,
        "reply": found.reply.json() if found.reply is not None else None,
        "error": {"error": found.error.code, "message": str(found.error)} if found.error else None,
    }


def _show(found: Replayed) -> None:
    console = render.console()
    if found.code_version != found.recorded_code:
        console.print(
            f"The program has changed since: {found.recorded_code} then, {found.code_version} now."
        )
    for difference in found.differences:
        console.print(Text(difference, style="red"))
    verdict = "identical" if found.identical else "different"
    end = "" if found.ended else ", as far as it is recorded: it has no end"
    console.print(Text(f"{found.turn} of {found.agent}, {found.calls} calls: {verdict}{end}"))
    if not found.ended and found.identical and found.error is not None:
        console.print(Text(str(found.error), style="dim"))
