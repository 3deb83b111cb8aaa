"""Reads RDF (Turtle, N-Triples, RDF/XML) through rdflib.

Statements between resources become edges, and the relation is the last part of the
predicate's address: ``rdfs:subClassOf`` is ``subClassOf``. Labels (``rdfs:label``,
``skos:prefLabel``) are names, ``skos:altLabel`` and the synonyms of OBO ontologies are
synonyms, ``rdf:type`` is the kind. Other literals are left out: a node has no further
slots. Nodes keep their full address as id, so data of two sources do not merge by chance.
"""

from __future__ import annotations

from pathlib import Path

import rdflib
from rdflib.namespace import RDF, RDFS, SKOS

from llmos.drivers.errors import GraphFileError
from llmos.drivers.graphs.source import read_text
from llmos.drivers.protocols import Edge, Node

FORMATS = {".ttl": "turtle", ".nt": "nt", ".rdf": "xml", ".owl": "xml", ".xml": "xml"}
_NAMES = (SKOS.prefLabel, RDFS.label)
_SYNONYMS = {
    SKOS.altLabel,
    *(
        rdflib.URIRef(f"http://www.geneontology.org/formats/oboInOwl#{name}")
        for name in ("hasExactSynonym", "hasRelatedSynonym")
    ),
}


def load_rdf(file: Path) -> tuple[list[Node], list[Edge]]:
    """Resources as nodes, statements between them as edges, in the order of their addresses.

    Raises:
        GraphFileError: not there, not UTF-8, or not RDF.
    """
    text, version = read_text(file)
    kind = FORMATS.get(file.suffix.lower(), "turtle")
    if kind == "xml" and "<!ENTITY" in text and text.count("<!ENTITY") > 100:
        raise GraphFileError(str(file), "more than 100 entities are declared in it")
    graph = rdflib.Graph()
    try:
        graph.parse(data=text, format=kind)
    # rdflib has no common root of its parsers' errors.
    except Exception as error:
        raise GraphFileError(
            str(file), f"not {kind}: {str(error).partition(chr(10))[0]}"
        ) from error
    names: dict[str, str] = {}
    kinds: dict[str, str] = {}
    synonyms: dict[str, dict[str, None]] = {}
    ids: set[str] = set()
    edges: list[Edge] = []
    for subject, predicate, target in sorted(graph):
        here = str(subject)
        ids.add(here)
        if isinstance(target, rdflib.Literal):
            if predicate in _NAMES and (predicate == SKOS.prefLabel or here not in names):
                names[here] = str(target)
            elif predicate in _SYNONYMS:
                synonyms.setdefault(here, {})[str(target)] = None
        elif predicate == RDF.type:
            kinds.setdefault(here, _last(str(target)))
        else:
            ids.add(str(target))
            edges.append(Edge(here, _last(str(predicate)), str(target), file.name, version))
    nodes = [
        Node(
            i,
            names.get(i) or _last(i),
            kinds.get(i, ""),
            file.name,
            version,
            tuple(s for s in synonyms.get(i, ()) if s != names.get(i)),
        )
        for i in sorted(ids)
    ]
    if not nodes:
        raise GraphFileError(str(file), "there are no statements in it")
    return nodes, list(dict.fromkeys(edges))


def _last(address: str) -> str:
    return address.rstrip("/#").rpartition("#")[2].rpartition("/")[2] or address
