"""Reads nodes and edges from CSV files.

What a file holds is told by its header, so column order and file names are free:

=============================================  ==================================
``subject,relation,object``                    edges; also ``source`` and ``target``
                                               for the ends, ``metaedge`` for the
                                               relation, and optional
                                               ``subject_kind``, ``object_kind``
``id,name`` and optional ``kind``              nodes
``child,parent``                               edges ``is_a``
``disease_id,disease,symptom_id,symptom``      nodes and edges ``has_symptom``
=============================================  ==================================

An end of an edge is the id of a node where a nodes file beside it has that id; any
other text is a name, and the node's id is the name in lower case. In a folder, other
CSV files are left out.
"""

from __future__ import annotations

import csv
import io
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from llmos.drivers.errors import DriverNotInstalled, GraphFileError
from llmos.drivers.graphs.names import normalised
from llmos.drivers.graphs.source import read_text
from llmos.drivers.protocols import Edge, Node

log = logging.getLogger(__name__)

_OTHER = {".obo", ".ttl", ".nt", ".rdf", ".owl", ".xml"}

_ALIASES = {"source": "subject", "target": "object", "metaedge": "relation"}
_TRIPLE = {"subject", "relation", "object"}
_SYMPTOMS = {"disease_id", "disease", "symptom_id", "symptom"}
_FORMS = "Use a header with subject,relation,object or id,name or child,parent"


@dataclass(frozen=True, slots=True)
class _Table:
    source: str
    version: str
    columns: frozenset[str]
    rows: Sequence[tuple[int, Mapping[str, str]]]
    """Line number and cells, white space around them removed."""


def load_graph(path: Path) -> tuple[list[Node], list[Edge]]:
    """Read a graph from a file or folder: CSV, OBO (``.obo``) or RDF (``.ttl``, ``.nt``, ``.rdf``, ``.owl``).

    A folder is read as CSV where it holds any, else all its other files are read.

    Raises:
        GraphFileError: as :func:`load_triples`.
        DriverNotInstalled: rdflib is missing.
    """
    if path.is_dir() and not any(path.glob("*.csv")):
        nodes: list[Node] = []
        edges: list[Edge] = []
        for file in sorted(f for f in path.iterdir() if f.suffix.lower() in _OTHER):
            more_nodes, more_edges = _load_other(file)
            nodes += more_nodes
            edges += more_edges
        if nodes or edges:
            return nodes, edges
    elif path.suffix.lower() in _OTHER:
        return _load_other(path)
    return load_triples(path)


def _load_other(file: Path) -> tuple[list[Node], list[Edge]]:
    if file.suffix.lower() == ".obo":
        from llmos.drivers.graphs.obo import load_obo

        return load_obo(file)
    try:
        from llmos.drivers.graphs.rdf import load_rdf
    except ModuleNotFoundError as error:
        raise DriverNotInstalled(
            "graph", "rdf", error.name or "rdflib", "pip install 'llmos[graph]'"
        ) from error
    return load_rdf(file)


def load_triples(path: Path) -> tuple[list[Node], list[Edge]]:
    """Read a CSV file of triples, or a folder of nodes and edges.

    Every node and edge carries the file it came from and, as its version, the first 16
    hex digits of the file's sha256. Nodes and edges are ordered as in the files, each once.

    Raises:
        GraphFileError: missing, not UTF-8, no known header, or a row that lacks a cell;
            names the file and the line.
    """
    if path.is_dir():
        files = sorted(f for f in path.glob("*.csv") if not f.name.startswith("."))
    elif path.is_file():
        files = [path]
    else:
        raise GraphFileError(str(path), "there is no such file or folder")
    tables = [_read(file) for file in files]
    if not any(_kind(table) for table in tables):
        found = "; ".join(f"{t.source}: {','.join(sorted(t.columns))}" for t in tables)
        raise GraphFileError(str(path), f"no known header ({found or 'no CSV'})", remedy=_FORMS)
    builder = _Builder()
    for kind in ("nodes", "symptoms", "is_a", "triples"):
        for table in tables:
            if _kind(table) == kind:
                builder.take(kind, table)
    for table in tables:
        if not _kind(table):
            log.info("%s is left out: its header tells of no nodes or edges", table.source)
    return builder.result()


def _kind(table: _Table) -> str:
    columns = table.columns
    if columns >= _TRIPLE:
        return "triples"
    if columns >= _SYMPTOMS:
        return "symptoms"
    if columns >= {"child", "parent"}:
        return "is_a"
    return "nodes" if columns >= {"id", "name"} else ""


def _read(file: Path) -> _Table:
    text, version = read_text(file)
    rows = list(_rows(file, text))
    if not rows:
        raise GraphFileError(str(file), "the file is empty", remedy=_FORMS)
    header = [_ALIASES.get(name, name) for name in (cell.lower() for cell in rows[0][1])]
    if len(set(header)) != len(header):
        raise GraphFileError(str(file), "a column occurs twice", rows[0][0])
    for line, cells in rows[1:]:
        if len(cells) != len(header):
            raise GraphFileError(
                str(file), f"{len(cells)} cells, the header has {len(header)}", line
            )
    body = [(line, dict(zip(header, cells, strict=True))) for line, cells in rows[1:]]
    return _Table(file.name, version, frozenset(header), body)


def _rows(file: Path, text: str) -> Iterator[tuple[int, list[str]]]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    line = 1
    try:
        for cells in reader:
            if cells:
                yield line, [cell.strip() for cell in cells]
            line = reader.line_num + 1
    except csv.Error as error:
        raise GraphFileError(str(file), str(error), line) from error


class _Builder:
    """Collects nodes and edges; the first word on a node wins, later ones fill gaps."""

    def __init__(self) -> None:
        self.nodes: dict[str, Node] = {}
        self.edges: dict[tuple[str, str, str], Edge] = {}
        self.kinds: dict[str, str] = {}

    def take(self, kind: str, table: _Table) -> None:
        for line, row in table.rows:
            if kind == "nodes":
                self.node(table, line, row, "id", "name", row.get("kind", ""))
            elif kind == "symptoms":
                disease = self.node(table, line, row, "disease_id", "disease", "disease")
                symptom = self.node(table, line, row, "symptom_id", "symptom", "symptom")
                self.kinds.setdefault(disease.partition(":")[0], "disease")
                self.edge(table, disease, "has_symptom", symptom)
            elif kind == "is_a":
                child, parent = (_cell(table, line, row, name) for name in ("child", "parent"))
                self.edge(table, child, "is_a", parent)
            else:
                subject = self.end(table, line, row, "subject")
                relation = _cell(table, line, row, "relation")
                self.edge(table, subject, relation, self.end(table, line, row, "object"))

    def end(self, table: _Table, line: int, row: Mapping[str, str], column: str) -> str:
        name = _cell(table, line, row, column)
        kind = row.get(f"{column}_kind", "")
        if name in self.nodes:
            return self.add(Node(name, self.nodes[name].name, kind, table.source, table.version))
        return self.add(Node(normalised(name), name, kind, table.source, table.version))

    def node(
        self, table: _Table, line: int, row: Mapping[str, str], id_: str, name: str, kind: str
    ) -> str:
        node_id = _cell(table, line, row, id_)
        return self.add(
            Node(node_id, _cell(table, line, row, name), kind, table.source, table.version)
        )

    def add(self, node: Node) -> str:
        known = self.nodes.setdefault(node.id, node)
        if not known.kind and node.kind:
            self.nodes[node.id] = replace(known, kind=node.kind)
        return node.id

    def edge(self, table: _Table, subject: str, relation: str, obj: str) -> None:
        edge = Edge(subject, relation, obj, table.source, table.version)
        self.edges.setdefault((subject, relation, obj), edge)

    def result(self) -> tuple[list[Node], list[Edge]]:
        # A list of terms has no kind column; the symptom links say which ids are diseases.
        nodes = [
            node if node.kind else replace(node, kind=self.kinds.get(node.id.partition(":")[0], ""))
            for node in self.nodes.values()
        ]
        return nodes, list(self.edges.values())


def _cell(table: _Table, line: int, row: Mapping[str, str], column: str) -> str:
    value = row[column]
    if not value:
        raise GraphFileError(table.source, f"the column {column} is empty", line)
    return value
