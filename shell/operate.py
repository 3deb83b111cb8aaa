"""Operating a system: dead letters, unknown effects, held agents, timers, mail, backups, hosts."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmos.kernel.settings import Settings
from llmos.shell import exits, render, tables
from llmos.shell.common import Address, AsJson, System, connected, operating, print_json

if TYPE_CHECKING:
    from collections.abc import Sequence

dlq_app = typer.Typer(
    name="dlq", help="Dead letters: messages that were given up.", no_args_is_help=True
)
effects_app = typer.Typer(
    name="effects",
    help="Effects of which nobody knows whether they happened.",
    no_args_is_help=True,
)

Id = Annotated[int, typer.Argument(help="Its number in llmos dlq list.", metavar="ID")]
Agent = Annotated[str, typer.Argument(help="Its id, or an unambiguous part of it.")]


# ---------------------------------------------------------------- dead letters


@dlq_app.command("list")
def dlq_list(
    limit: Annotated[int, typer.Option("-n", help="How many of the newest.", min=1)] = 100,
    system: System = None,
    address: Address = None,
    as_json: AsJson = False,
) -> None:
    """List dead letters, newest first."""
    with operating(system, address, as_json) as operator:
        letters = operator.dead_letters(limit)
        if as_json:
            print_json([tables.dead_json(letter) for letter in letters])
        else:
            render.console().print(tables.dead_letters(letters))


@dlq_app.command("show")
def dlq_show(
    id: Id, system: System = None, address: Address = None, as_json: AsJson = False
) -> None:
    """Show a dead letter: why it died, its message, and what each attempt did."""
    from llmos.shell.trace import Trace

    with operating(system, address, as_json) as operator:
        story = operator.dead_letter(id)
        if as_json:
            turns = [Trace.of(rows).as_json() for rows in story.turns]
            print_json({**tables.dead_json(story.letter), "turns": turns})
        else:
            render.console().print(tables.dead_story(story))


@dlq_app.command("retry")
def dlq_retry(
    ids: Annotated[
        list[int] | None, typer.Argument(help="Numbers in llmos dlq list.", metavar="[ID…]")
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="All of them.")] = False,
    system: System = None,
    address: Address = None,
    as_json: AsJson = False,
) -> None:
    """Put dead letters back into their mailboxes, at the end."""
    if bool(ids) == every:
        raise typer.BadParameter("give numbers or --all", param_hint="ID")
    with operating(system, address, as_json) as operator:
        done = operator.retry_dead(None if every else ids)
        _print_json_ids("retried", done) if as_json else typer.echo(f"{len(done)} go on")


@dlq_app.command("drop")
def dlq_drop(
    ids: Annotated[list[int], typer.Argument(help="Numbers in llmos dlq list.", metavar="ID…")],
    system: System = None,
    address: Address = None,
    as_json: AsJson = False,
) -> None:
    """Throw dead letters away."""
    with operating(system, address, as_json) as operator:
        done = operator.drop_dead(ids)
        _print_json_ids("dropped", done) if as_json else typer.echo(f"{len(done)} thrown away")


def _print_json_ids(what: str, ids: Sequence[int]) -> None:
    print_json({what: list(ids)})


# ---------------------------------------------------------------- unknown effects


@effects_app.command("list")
def effects_list(system: System = None, address: Address = None, as_json: AsJson = False) -> None:
    """List calls of tools of which nobody knows whether they were carried out."""
    with operating(system, address, as_json) as operator:
        found = operator.unknown_effects()
        if as_json:
            print_json([tables.effect_json(effect) for effect in found])
        else:
            render.console().print(tables.effects(found))


@effects_app.command("resolve")
def effects_resolve(
    effect: Annotated[str, typer.Argument(help="As listed.", metavar="TURN/SEQ")],
    result: Annotated[
        str | None, typer.Option(metavar="JSON", help="It was carried out, and gave this.")
    ] = None,
    failed: Annotated[
        str | None, typer.Option(metavar="TEXT", help="It was not, and will not be; why.")
    ] = None,
    retry: Annotated[
        bool, typer.Option("--retry", help="It was not, and is to be tried again.")
    ] = False,
    system: System = None,
    address: Address = None,
    as_json: AsJson = False,
) -> None:
    """Say what became of an effect; its agent goes on."""
    if sum((result is not None, failed is not None, retry)) != 1:
        raise typer.BadParameter("give one of --result, --failed and --retry")
    value: Any = failed
    if result is not None:
        try:
            value = json.loads(result)
        except ValueError as error:
            raise typer.BadParameter(str(error), param_hint="--result") from None
    with operating(system, address, as_json) as operator:
        if retry:
            found = operator.resolve(effect, "retry")
        else:
            found = operator.resolve(effect, "result" if result is not None else "failed", value)
        if as_json:
            print_json({"resolved": f"{found.turn}/{found.seq}", "agent": found.agent})
        else:
            typer.echo(f"{found.turn}/{found.seq}: {found.agent} goes on")


# ---------------------------------------------------------------- held agents, timers, mail


def held(system: System = None, address: Address = None, as_json: AsJson = False) -> None:
    """List agents that get no turns, and why."""
    with operating(system, address, as_json) as operator:
        found = operator.held()
        if as_json:
            print_json([agent._asdict() for agent in found])
        else:
            render.console().print(tables.held(found))


def release(
    agent: Agent, system: System = None, address: Address = None, as_json: AsJson = False
) -> None:
    """Lift an agent's quarantine: what waits for it is handled."""
    with operating(system, address, as_json) as operator:
        found = operator.release(agent)
        print_json({"released": found.agent}) if as_json else typer.echo(f"{found.agent} goes on")


def timers(
    agent: Annotated[
        str | None, typer.Argument(help="Its id, or an unambiguous part of it; none is all.")
    ] = None,
    system: System = None,
    address: Address = None,
    as_json: AsJson = False,
) -> None:
    """List timers and schedules, the earliest first."""
    with operating(system, address, as_json) as operator:
        rows = operator.timers(agent)
        if as_json:
            print_json([tables.timer_json(row) for row in rows])
        else:
            render.console().print(tables.timers(rows))


def mail(
    agent: Agent, system: System = None, address: Address = None, as_json: AsJson = False
) -> None:
    """List what waits for an agent, in the order it came."""
    with operating(system, address, as_json) as operator:
        rows = operator.mail(agent)
        if as_json:
            print_json([tables.mail_json(row) for row in rows])
        else:
            render.console().print(tables.mail(rows, time.time()))


# ---------------------------------------------------------------- the store


def backup(
    file: Annotated[Path, typer.Argument(help="A file that is not there yet.")],
    system: System = None,
    address: Address = None,
    as_json: AsJson = False,
) -> None:
    """Write a copy of all that is durable, while the system works."""
    with operating(system, address, as_json) as operator:
        # The journal's process has a working directory of its own.
        target = file.expanduser().absolute()
        size = operator.backup(str(target))
        if as_json:
            print_json({"file": str(target), "bytes": size})
        else:
            typer.echo(f"{target}: {size} bytes")


def restore(
    file: Annotated[Path, typer.Argument(help="What llmos backup wrote.")],
    system: Annotated[
        str | None, typer.Option("--system", help="The system whose store it becomes.")
    ] = None,
    url: Annotated[str | None, typer.Option("--url", help="A PostgreSQL database instead.")] = None,
    as_json: AsJson = False,
) -> None:
    """Load a backup into the empty store of a system that is down."""
    if (system is None) == (url is None):
        raise typer.BadParameter("give --system or --url")
    with exits.errors(as_json=as_json):
        from llmos.kernel.cluster import ClusterError, RunFile
        from llmos.kernel.offline import restore as load
        from llmos.kernel.operating import OperationRefused

        settings = Settings()
        if system is not None:
            try:
                run = RunFile.find(settings, system)
            except ClusterError:
                pass
            else:
                raise OperationRefused(
                    f"Nothing was restored into {system}",
                    f"its kernel runs at {run.address}",
                    remedy="Stop it: llmos down",
                )
        where = load(settings, file, system=system, url=url)
        print_json({"restored": where}) if as_json else typer.echo(f"restored into {where}")


# ---------------------------------------------------------------- hosts


def drain(
    host: Annotated[
        str,
        typer.Argument(
            help="A host, e.g. host:1; or a whole node: its address, or the beginning of its id.",
            metavar="HOST|NODE",
        ),
    ],
    deadline: Annotated[float, typer.Option(help="Seconds to wait for it.")] = 120.0,
    system: System = None,
    address: Address = None,
    as_json: AsJson = False,
) -> None:
    """Give a host's agents to the others and stop it; or leave a node, so that it can go."""
    with connected(system, address, as_json) as kernel:
        kernel.operator.drain(host, deadline)
        print_json({"drained": host}) if as_json else typer.echo(f"{host} is drained")


def rebalance(system: System = None, address: Address = None, as_json: AsJson = False) -> None:
    """Spread agents evenly over the hosts, e.g. after one has come back."""
    with connected(system, address, as_json) as kernel:
        moves = kernel.operator.rebalance()
        if as_json:
            print_json({"moving": moves})
        else:
            typer.echo(f"{moves} of 256 parts move" if moves else "nothing has to move")
