"""``llmos graph``: look into a file or folder of a knowledge graph, without a system."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from llmos.drivers.graphs.load import load_graph
from llmos.drivers.protocols import Edge, Graph, Triple
from llmos.drivers.registry import driver
from llmos.shell import exits
from llmos.shell.common import AsJson, print_json

app = typer.Typer(
    name="graph", help="Knowledge graphs in files, without a system.", no_args_is_help=True
)

Source = Annotated[
    Path, typer.Argument(help="CSV, OBO, Turtle or RDF/XML; or a folder.", metavar="PATH")
]
Driver = Annotated[str, typer.Option("--driver", help="memory, networkx or ladybug.")]
Limit = Annotated[int, typer.Option(min=1, max=10_000, help="So many at most.")]


def _opened(path: Path, name: str) -> Graph:
    graph: Graph = driver("graph", name)(path.name)
    graph.upsert(*load_graph(path))
    return graph


def _sentence(edge: Edge) -> str:
    return f"{edge.subject}  {edge.relation}  {edge.object}"


@app.command()
def show(path: Source, driver_name: Driver = "memory", as_json: AsJson = False) -> None:
    """Read a graph and tell how big it is."""
    with exits.errors(as_json=as_json):
        nodes, edges = _opened(path, driver_name).size()
        if as_json:
            print_json({"nodes": nodes, "edges": edges})
        else:
            typer.echo(f"{nodes} nodes, {edges} edges")


@app.command()
def link(
    path: Source,
    text: Annotated[str, typer.Argument(help="Any text.")],
    driver_name: Driver = "memory",
    limit: Limit = 50,
    as_json: AsJson = False,
) -> None:
    """Which nodes does a text name, and where?"""
    with exits.errors(as_json=as_json):
        for found in _opened(path, driver_name).link(text, limit):
            node = found.node
            if as_json:
                span = [found.start, found.end]
                print_json({"span": span, "text": found.text, "id": node.id, "name": node.name})
            else:
                typer.echo(f"{found.start}-{found.end}  {found.text}  {node.id}  {node.name}")


@app.command()
def around(
    path: Source,
    nodes: Annotated[list[str], typer.Argument(help="Ids of nodes.")],
    hops: Annotated[int, typer.Option(min=1, max=4)] = 1,
    driver_name: Driver = "memory",
    limit: Limit = 100,
    as_json: AsJson = False,
) -> None:
    """What lies around some nodes?"""
    with exits.errors(as_json=as_json):
        _, edges = _opened(path, driver_name).subgraph(nodes, hops=hops, limit=limit)
        for edge in edges:
            triple = [edge.subject, edge.relation, edge.object]
            print_json(triple) if as_json else typer.echo(_sentence(edge))


@app.command()
def match(
    path: Source,
    terms: Annotated[
        list[str], typer.Argument(help="Subject, relation, object, …; ?x is a variable.")
    ],
    driver_name: Driver = "memory",
    limit: Limit = 100,
    as_json: AsJson = False,
) -> None:
    """For which values are all patterns edges of the graph?"""
    if len(terms) % 3:
        raise typer.BadParameter(f"{len(terms)} terms; three make a pattern")
    patterns = [Triple(*terms[i : i + 3]) for i in range(0, len(terms), 3)]
    with exits.errors(as_json=as_json):
        for row in _opened(path, driver_name).match(patterns, limit=limit):
            if as_json:
                print_json(row)
            else:
                typer.echo("  ".join(f"{variable}={value}" for variable, value in row.items()))
