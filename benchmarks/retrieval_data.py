"""A folder in the format of BEIR: ``corpus.jsonl``, ``queries.jsonl``, ``qrels/*.tsv``."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


class BadFolder(Exception):
    """The folder is not in the format of BEIR."""


@dataclass(frozen=True, slots=True)
class Collection:
    """Passages, and queries with judgements."""

    texts: tuple[str, ...]
    titles: tuple[str, ...]
    queries: tuple[str, ...]
    """Those that have a judgement."""
    keys: tuple[str, ...]
    """Their ids in the file."""
    judged: tuple[Mapping[int, float], ...]
    """For each query the gain of every relevant passage, by its place in ``texts``."""
    qrels: tuple[str, ...]
    """The files of judgements that were read."""
    may_fit: bool
    """They are for training."""


def read(folder: Path, *, unseen: bool) -> Collection:
    """Read the corpus and the queries of one part.

    Judgements for training (``train.tsv``) and the others never meet: without ``unseen`` the
    former are read and nothing may be fitted where there are none; with it the others, where
    there are any.

    Raises:
        BadFolder: a file is missing, or a line is not what it should be.
    """
    place: dict[str, int] = {}
    texts: list[str] = []
    titles: list[str] = []
    for row in _lines(folder / "corpus.jsonl"):
        place[str(row["_id"])] = len(texts)
        texts.append(str(row.get("text", "")))
        titles.append(str(row.get("title", "")))
    files = sorted((folder / "qrels").glob("*.tsv"))
    training = [f for f in files if f.stem == "train"]
    others = [f for f in files if f.stem != "train"]
    chosen = (others or training) if unseen else (training or others)
    if not chosen:
        raise BadFolder(f"{folder / 'qrels'} holds no .tsv")
    asked: dict[str, str] = {}
    known = sorted(folder.glob("queries*.jsonl"))
    if not known:
        raise BadFolder(f"{folder} holds no queries.jsonl")
    for file in known:
        for row in _lines(file):
            asked[str(row["_id"])] = str(row["text"])
    judged: dict[str, dict[int, float]] = {}
    for file in chosen:
        with file.open(encoding="utf-8", newline="") as opened:
            for cells in csv.reader(opened, delimiter="\t"):
                if len(cells) < 3 or cells[2] == "score":
                    continue
                query, passage = cells[0], cells[1]
                try:
                    gain = float(cells[2])
                except ValueError as error:
                    raise BadFolder(f"{file}: {error}") from error
                if gain > 0 and passage in place and query in asked:
                    judged.setdefault(query, {})[place[passage]] = gain
    if not judged:
        raise BadFolder(f"{folder}: no judgement names a query and a passage that are there")
    return Collection(
        tuple(texts),
        tuple(titles),
        tuple(asked[q] for q in judged),
        tuple(judged),
        tuple(judged.values()),
        tuple(f.name for f in chosen),
        chosen == training,
    )


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    try:
        with path.open(encoding="utf-8") as opened:
            for number, line in enumerate(opened, 1):
                if line.strip():
                    row = json.loads(line)
                    if not isinstance(row, dict) or "_id" not in row:
                        raise BadFolder(f"{path}, line {number}: no object with an _id")
                    yield row
    except (OSError, ValueError) as error:
        raise BadFolder(f"{path}: {error}") from error
