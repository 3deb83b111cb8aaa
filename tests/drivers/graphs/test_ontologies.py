"""OBO and RDF files as graphs."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmos.drivers.errors import GraphFileError
from llmos.drivers.graphs.load import load_graph
from llmos.drivers.graphs.memory import MemoryGraph

OBO = r"""format-version: 1.2
default-namespace: disease_ontology

[Term]
id: DOID:1
name: diabetes mellitus
def: "A disease." [url:http\://x]
synonym: "sugar \"disease\"" EXACT []
synonym: "diabetes mellitus" EXACT []
is_a: DOID:4 ! disease

[Term]
id: DOID:2
name: type 2 diabetes
namespace: other
is_a: DOID:1 {source="x"} ! diabetes mellitus
relationship: has_symptom SYMP:1 ! thirst

[Term]
id: SYMP:1
name: thirst

[Term]
id: DOID:4
name: disease

[Term]
id: DOID:9
name: an old one
is_a: DOID:4
is_obsolete: true

[Typedef]
id: has_symptom
name: has symptom
"""
TURTLE = """
@prefix : <http://x.org/d/> .
@prefix rdfs: <http://www.w3.org/2000/01/rdf-schema#> .
@prefix skos: <http://www.w3.org/2004/02/skos/core#> .
:d2 a :Disease ; rdfs:label "type 2 diabetes" ; skos:altLabel "T2D" ; rdfs:subClassOf :d1 .
:d1 a :Disease ; rdfs:label "diabetes"@en ; skos:prefLabel "diabetes mellitus" ; :hasSymptom :thirst .
"""


def test_obo_terms_with_synonyms_and_relations(tmp_path: Path) -> None:
    file = tmp_path / "do.obo"
    file.write_text(OBO)
    nodes, edges = load_graph(file)
    assert [(n.id, n.kind) for n in nodes] == [
        ("DOID:1", "disease_ontology"),
        ("DOID:2", "other"),
        ("SYMP:1", "disease_ontology"),
        ("DOID:4", "disease_ontology"),
    ]
    assert nodes[0].synonyms == ('sugar "disease"',)
    assert nodes[0].source == "do.obo"
    assert len(nodes[0].version) == 16
    assert [(e.subject, e.relation, e.object) for e in edges] == [
        ("DOID:1", "is_a", "DOID:4"),
        ("DOID:2", "is_a", "DOID:1"),
        ("DOID:2", "has_symptom", "SYMP:1"),
    ]
    graph = MemoryGraph()
    graph.upsert(nodes, edges)
    assert [m.node.id for m in graph.link("sugar disease")] == ["DOID:1"]
    assert load_graph(tmp_path)[0] == nodes


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "no terms"),
        ("[Term]\nname: x\n", "one id"),
        ("[Term]\nid: a\nno colon\n", "line 3"),
    ],
)
def test_files_that_are_not_obo(tmp_path: Path, text: str, words: str) -> None:
    file = tmp_path / "x.obo"
    file.write_text(text)
    with pytest.raises(GraphFileError, match=words):
        load_graph(file)


def test_turtle(tmp_path: Path) -> None:
    file = tmp_path / "d.ttl"
    file.write_text(TURTLE)
    nodes, edges = load_graph(file)
    told = {n.id.rpartition("/")[2]: n for n in nodes}
    assert set(told) == {"d1", "d2", "thirst"}
    assert (told["d1"].name, told["d1"].kind) == ("diabetes mellitus", "Disease")
    assert told["d2"].synonyms == ("T2D",)
    assert [(e.subject[-2:], e.relation) for e in edges] == [
        ("d1", "hasSymptom"),
        ("d2", "subClassOf"),
    ]
    for name, text in (("bad.ttl", "not turtle ;"), ("bad.owl", "<rdf"), ("empty.nt", "")):
        (tmp_path / name).write_text(text)
        with pytest.raises(GraphFileError):
            load_graph(tmp_path / name)
