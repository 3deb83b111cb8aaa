"""The benchmark of retrieval on a small folder: what it reads, fits, keeps and applies."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import retrieval
from benchmarks.gpu import make_encoder
from benchmarks.retrieval_data import BadFolder, read
from llmos.drivers.retrieval.fitted import load

# ruff: noqa: SIM905 - a word list is easier to read as text
WORDS = (
    "harbour ledger captain cargo orange clerk letter fog bell ship river wood mud depth".split()
)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_encoder(tmp_path_factory.mktemp("bert"), hidden=48, layers=1)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Fourteen passages; a query for each names its word. The last two are for the test."""
    made = tmp_path / "set"
    (made / "qrels").mkdir(parents=True)

    def lines(rows: Any) -> str:
        return "".join(json.dumps(row) + "\n" for row in rows)

    (made / "corpus.jsonl").write_text(
        lines(
            {"_id": f"d{n}", "title": f"The {word}", "text": f"What is said of the {word} here."}
            for n, word in enumerate(WORDS)
        )
    )
    (made / "queries.jsonl").write_text(
        lines({"_id": f"q{n}", "text": f"tell of a {word}"} for n, word in enumerate(WORDS))
    )
    rows = [f"q{n}\td{n}\t1\n" for n in range(len(WORDS))]
    head = "query-id\tcorpus-id\tscore\n"
    (made / "qrels" / "train.tsv").write_text(head + "".join(rows[:12]))
    (made / "qrels" / "test.tsv").write_text(head + "".join(rows[12:]))
    return made


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    assert retrieval.main([str(a) for a in arguments]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    return found


def test_fits_keeps_and_applies(
    capsys: pytest.CaptureFixture[str], encoder: Path, folder: Path, tmp_path: Path
) -> None:
    kept = tmp_path / "fusion.json"
    out = run(capsys, "--json", folder, "--model", encoder, "--save", kept)
    assert (out["queries"], out["qrels"]) == (12, ["train.tsv"])
    assert out["bm25"]["ndcg@10"] == out["bm25"]["recall@100"] == 1
    assert out["hybrid"]["ndcg@10"] > 0.9
    for name in ("bm25", "lexical", "vector", "rrf", "hybrid", "rerank"):
        assert out[name]["queries_per_s"] > 0
    assert out["ingest"]["passages_per_s"] > 0
    assert load(kept).reranker is not None

    unseen = run(capsys, folder, "--model", encoder, "--load", kept)
    assert (unseen["queries"], unseen["qrels"]) == (2, ["test.tsv"])
    assert unseen["hybrid"]["ndcg@10"] > 0.6
    assert unseen["rerank"]["queries_per_s"] > 0


def test_nothing_is_fitted_to_what_is_for_the_test(
    capsys: pytest.CaptureFixture[str], encoder: Path, folder: Path, tmp_path: Path
) -> None:
    (folder / "qrels" / "train.tsv").unlink()
    out = run(capsys, "--json", folder, "--model", encoder)
    assert out["qrels"] == ["test.tsv"]
    assert "rerank" not in out
    assert out["hybrid"]["ndcg@10"] == out["rrf"]["ndcg@10"]
    saving = [str(folder), "--model", str(encoder), "--save", str(tmp_path / "f.json")]
    assert retrieval.main(saving) == 2
    assert "nothing may be fitted" in capsys.readouterr().err
    assert not (tmp_path / "f.json").exists()


def test_training_and_test_never_meet(folder: Path) -> None:
    seen, unseen = read(folder, unseen=False), read(folder, unseen=True)
    assert not set(seen.keys) & set(unseen.keys)
    assert (seen.may_fit, unseen.may_fit) == (True, False)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda f: (f / "corpus.jsonl").unlink(), "corpus.jsonl"),
        (lambda f: (f / "corpus.jsonl").write_text("{}\n"), "line 1"),
        (lambda f: (f / "corpus.jsonl").write_text("{"), "corpus.jsonl"),
        (lambda f: (f / "queries.jsonl").unlink(), "queries.jsonl"),
        (lambda f: (f / "qrels" / "train.tsv").write_text("a\tb\t1\n"), "no judgement"),
        (lambda f: (f / "qrels" / "train.tsv").write_text("q0\td0\tmuch\n"), "train.tsv"),
    ],
)
def test_a_folder_that_is_wrong(folder: Path, change: Any, words: str) -> None:
    change(folder)
    with pytest.raises(BadFolder, match=words):
        read(folder, unseen=False)
