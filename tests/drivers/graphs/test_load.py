from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from llmos.drivers.errors import GraphFileError
from llmos.drivers.graphs.load import load_triples
from llmos.drivers.protocols import Edge, Node


def write(folder: Path, **files: str) -> Path:
    for name, text in files.items():
        (folder / f"{name}.csv").write_text(text, encoding="utf-8")
    return folder


def test_a_file_of_triples_by_name(tmp_path: Path) -> None:
    text = "subject,relation,object,object_kind\nHigh  Fever,needs,Doctor,person\nhigh fever,is_a, Fever ,\n"
    path = write(tmp_path, facts=text) / "facts.csv"
    nodes, edges = load_triples(path)
    version = hashlib.sha256(text.encode()).hexdigest()[:16]
    assert nodes == [
        Node("high fever", "High  Fever", "", "facts.csv", version),
        Node("doctor", "Doctor", "person", "facts.csv", version),
        Node("fever", "Fever", "", "facts.csv", version),
    ]
    assert [(e.subject, e.relation, e.object) for e in edges] == [
        ("high fever", "needs", "doctor"),
        ("high fever", "is_a", "fever"),
    ]
    assert {(e.source, e.version) for e in edges} == {("facts.csv", version)}


@pytest.mark.parametrize("header", ["source,metaedge,target", "subject,relation,object"])
def test_nodes_and_edges(tmp_path: Path, header: str) -> None:
    write(
        tmp_path,
        nodes='\ufeffid,name,kind\nD::1,"flu, the",Disease\nS::1,cough,Symptom\n',
        edges=f"{header}\nD::1,DpS,S::1\nD::1,DpS,S::1\nD::1,DpS,New Thing\n",
    )
    nodes, edges = load_triples(tmp_path)
    assert [(n.id, n.name, n.kind) for n in nodes] == [
        ("D::1", "flu, the", "Disease"),
        ("S::1", "cough", "Symptom"),
        ("new thing", "New Thing", ""),
    ]
    assert [(e.subject, e.object) for e in edges] == [("D::1", "S::1"), ("D::1", "new thing")]


def test_an_ontology(tmp_path: Path) -> None:
    write(
        tmp_path,
        terms="id,name\nDOID:1,flu\nDOID:2,infection\nX:1,other\n",
        is_a="child,parent\nDOID:1,DOID:2\n",
        disease_symptom="disease_id,disease,symptom_id,symptom\nDOID:1,flu,SYMP:1,cough\n",
        xrefs="id,xref\nDOID:1,MESH:1\n",
    )
    nodes, edges = load_triples(tmp_path)
    assert {n.id: (n.kind, n.source) for n in nodes} == {
        "DOID:1": ("disease", "terms.csv"),
        "DOID:2": ("disease", "terms.csv"),
        "X:1": ("", "terms.csv"),
        "SYMP:1": ("symptom", "disease_symptom.csv"),
    }
    assert [(e.subject, e.relation, e.object) for e in edges] == [
        ("DOID:1", "has_symptom", "SYMP:1"),
        ("DOID:1", "is_a", "DOID:2"),
    ]
    assert all(isinstance(e, Edge) for e in edges)


@pytest.mark.parametrize(
    ("text", "line", "reason"),
    [
        ("subject,relation,object\na,b\n", 2, "2 cells"),
        ("subject,relation,object\n\na,b,c\n\n,b,c\n", 5, "subject is empty"),
        ('subject,relation,object\n"a\nb",r,c\nx,,z\n', 4, "relation is empty"),
        ('subject,relation,object\na,b,"c\n', 2, "end of data"),
        ("subject,relation,source\na,b,c\n", 1, "twice"),
        ("", None, "empty"),
        ("one,two\n1,2\n", None, "no known header"),
    ],
)
def test_errors_name_file_and_line(
    tmp_path: Path, text: str, line: int | None, reason: str
) -> None:
    write(tmp_path, bad=text)
    for path in (tmp_path, tmp_path / "bad.csv"):
        with pytest.raises(GraphFileError, match=reason) as caught:
            load_triples(path)
        assert caught.value.line == line
        assert "bad.csv" in str(caught.value)


def test_bytes_that_are_not_text_and_missing_files(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_bytes(b"subject,relation,object\na,b,\xff\n")
    with pytest.raises(GraphFileError, match="byte 28") as caught:
        load_triples(tmp_path / "x.csv")
    assert caught.value.line == 2
    with pytest.raises(GraphFileError, match="no such"):
        load_triples(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(GraphFileError, match="no CSV"):
        load_triples(tmp_path / "empty")
