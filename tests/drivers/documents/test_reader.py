from __future__ import annotations

import hashlib
import itertools
import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmos.drivers.documents import reader
from llmos.drivers.documents.reader import read_folder
from llmos.drivers.documents.table import read_csv, read_jsonl
from llmos.drivers.errors import DocumentError


def test_a_folder_in_order_with_sources_ids_and_versions(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "one.md").write_text("# T\r\n\r\ntext", newline="")
    (tmp_path / "a.txt").write_text("alpha\n\nbeta " + "x" * 895)
    (tmp_path / "z.rst").write_text("not included")
    (tmp_path / ".hidden.md").write_text("hidden")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "c.md").write_text("hidden")
    passages, skipped = read_folder(tmp_path)
    assert skipped == []
    assert [(p.id, p.source, p.span) for p in passages] == [
        ("a.txt#0", "a.txt", (0, 5)),
        ("a.txt#1", "a.txt", (7, 907)),
        ("b/one.md#0", "b/one.md", (0, 11)),
    ]
    assert passages[2].version == hashlib.sha256(b"# T\r\n\r\ntext").hexdigest()[:16]
    assert passages[2].title == "T"
    assert passages[2].text == "# T\r\n\r\ntext"
    only, _ = read_folder(tmp_path, include=["*.RST"])
    assert [p.source for p in only] == ["z.rst"]


def test_one_file_whatever_its_name(tmp_path: Path) -> None:
    (tmp_path / "note").write_text("hello")
    passages, skipped = read_folder(tmp_path / "note")
    assert [(p.id, p.text) for p in passages] == [("note#0", "hello")]
    assert skipped == []


def test_files_that_cannot_be_read_are_named_and_the_rest_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader, "MAX_BYTES", 1000)
    (tmp_path / "a.txt").write_bytes(b"abc\xffdef")
    (tmp_path / "b.txt").write_bytes(b"abcd\0ef")
    (tmp_path / "c.txt").write_bytes("text".encode("utf-16"))
    (tmp_path / "d.txt").write_bytes(b"x" * 1001)
    (tmp_path / "e.txt").write_bytes(b"\xef\xbb\xbfgood")
    os.mkfifo(tmp_path / "f.txt")
    (tmp_path / "g.txt").symlink_to(tmp_path / "nowhere")
    (tmp_path / "h.txt").write_text("")
    (tmp_path / os.fsdecode(b"i\xff.txt")).write_text("x")
    passages, skipped = read_folder(tmp_path)
    assert [(p.id, p.text, p.span) for p in passages] == [("e.txt#0", "good", (0, 4))]
    assert [(s.path, s.reason) for s in skipped] == [
        ("a.txt", "not UTF-8 at byte 3"),
        ("b.txt", "binary: a zero at byte 4"),
        ("c.txt", "UTF-16, not UTF-8 (byte 0)"),
        ("d.txt", "larger than 1000 bytes"),
        ("f.txt", "not a regular file"),
        ("g.txt", "No such file or directory"),
        ("i\\udcff.txt", "its name is not UTF-8"),
    ]


def test_links_are_followed_inside_the_folder_only(tmp_path: Path) -> None:
    root, outside = tmp_path / "docs", tmp_path / "secret"
    root.mkdir()
    outside.mkdir()
    (outside / "s.txt").write_text("secret")
    (root / "real.txt").write_text("real")
    (root / "in.txt").symlink_to("real.txt")
    (root / "out.txt").symlink_to(outside / "s.txt")
    (root / "folder").symlink_to(outside)
    (root / "loop").symlink_to(root)
    passages, skipped = read_folder(root)
    assert [(p.source, p.text) for p in passages] == [("in.txt", "real"), ("real.txt", "real")]
    assert {s.path: s.reason for s in skipped} == {
        "folder": "a link to a folder is not followed",
        "loop": "a link to a folder is not followed",
        "out.txt": "a link out of the folder",
    }


def test_missing_folders_and_wrong_bounds(tmp_path: Path) -> None:
    with pytest.raises(DocumentError, match="no such") as caught:
        read_folder(tmp_path / "none")
    assert caught.value.path == str(tmp_path / "none")
    assert read_folder(tmp_path) == ([], [])
    for bounds in ({"max_chars": 0}, {"overlap": -1}, {"max_chars": 10, "overlap": 6}):
        with pytest.raises(ValueError, match="max_chars"):
            read_folder(tmp_path, **bounds)


def test_a_table_of_questions() -> None:
    document = 'Question,answer,topic\r\n"How, now?","Two\nlines",x\r\n\r\nWhy?,Because.,y\r\n'
    pieces, problems = read_csv(document)
    assert problems == []
    assert [(p.text, dict(p.meta)) for p in pieces] == [
        ("How, now?\nTwo\nlines", {"topic": "x"}),
        ("Why?\nBecause.", {"topic": "y"}),
    ]
    assert [document[p.start : p.end] for p in pieces] == [
        '"How, now?","Two\nlines",x',
        "Why?,Because.,y",
    ]


def test_tables_with_text_and_with_anything() -> None:
    pieces, _ = read_csv("text,label,title\nhello,greet,T\n")
    assert (pieces[0].text, pieces[0].title, dict(pieces[0].meta)) == (
        "hello",
        "T",
        {"label": "greet"},
    )
    pieces, _ = read_csv("City,Mayor,\nBrno,Ann,\n")
    assert pieces[0].text == "city: Brno\nmayor: Ann"
    assert read_csv("") == read_csv("a,b\n") == ([], [])


def test_malformed_rows_are_named_by_line() -> None:
    document = 'text,label\ngood,1\nshort\n"a"b,2\n,3\nlast,4\n"open,5\nswallowed,6\n'
    pieces, problems = read_csv(document)
    assert [p.text for p in pieces] == ["good", "last"]
    assert [p.partition(":")[0] for p in problems] == ["line 3", "line 4", "line 5", "line 7"]
    many = "text,label\n" + "x\n" * 50
    pieces, problems = read_csv(many)
    assert pieces == []
    assert len(problems) == 21
    assert problems[-1] == "30 more rows cannot be read"
    assert "twice" in read_csv("a,a\n1,2\n")[1][0]


def test_lines_of_json() -> None:
    document = "\n".join(
        [
            '{"question": "Q", "answer": "A\\u2028", "n": 3, "tags": ["x"], "none": null}',
            '{"text": "T", "title": "H"}\r',
            "",
            "{",
            "[1]",
            '{"other": "x"}',
            '{"text": "\\ud800"}',
            '{"text": "  "}',
            "[" * 100_000,
            '{"text": ' + "9" * 5000 + "}",
        ]
    )
    pieces, problems = read_jsonl(document)
    assert [(p.text, p.title, dict(p.meta)) for p in pieces] == [
        ("Q\nA\u2028", "", {"n": "3", "tags": '["x"]'}),
        ("T", "H", {}),
    ]
    assert document[pieces[1].start : pieces[1].end] == '{"text": "T", "title": "H"}'
    assert [p.partition(":")[0] for p in problems] == [f"line {n}" for n in range(4, 11)]


def test_rows_become_passages_and_bad_ones_are_skipped(tmp_path: Path) -> None:
    (tmp_path / "faq.csv").write_text("question,answer\nWhy?,Because.\nbroken\n")
    (tmp_path / "x.jsonl").write_text('{"text": "hi"}\nnope\n')
    passages, skipped = read_folder(tmp_path)
    assert [(p.id, p.text) for p in passages] == [
        ("faq.csv#0", "Why?\nBecause."),
        ("x.jsonl#0", "hi"),
    ]
    assert [s.path for s in skipped] == ["faq.csv", "x.jsonl"]
    assert "line 3" in skipped[0].reason
    assert "line 2" in skipped[1].reason


@given(st.lists(st.lists(st.text(max_size=8), min_size=2, max_size=2), max_size=8))
def test_any_table_that_python_writes_is_read(rows: list[list[str]]) -> None:
    import csv
    import io

    out = io.StringIO(newline="")
    csv.writer(out).writerows([["text", "label"], *rows])
    document = out.getvalue()
    pieces, _ = read_csv(document)
    assert [(p.text, p.meta["label"]) for p in pieces] == [(t, m) for t, m in rows if t.strip()]
    spans = [(p.start, p.end) for p in pieces]
    assert spans == sorted(spans)
    assert all(a[1] <= b[0] for a, b in itertools.pairwise(spans))
    lines = "\n".join(json.dumps({"text": t, "label": m}) for t, m in rows)
    assert [p.text for p in read_jsonl(lines)[0]] == [p.text for p in pieces]
