"""How well passages are found, on a folder in the format of BEIR.

``python -m benchmarks.retrieval [--json] FOLDER [--save FILE | --load FILE]``

Without ``--load`` everything that can be fitted is fitted to ``qrels/train.tsv``, and each
query is answered by what was fitted to the other parts: five parts that share no relevant
passage. ``--save`` fits once more to all and keeps it; ``--load`` applies a file to queries
that it has not seen. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from benchmarks.retrieval_data import BadFolder, Collection, read
from llmos.drivers.engines.encoder import TransformersEncoderEngine
from llmos.drivers.errors import LlmosError
from llmos.drivers.protocols import EngineOptions, Vectors
from llmos.drivers.retrieval import fusion, rerank
from llmos.drivers.retrieval.bm25 import Bm25Index, Bm25Options, best
from llmos.drivers.retrieval.fitted import Fitted, load
from llmos.drivers.retrieval.fusion import Leg, fuse
from llmos.drivers.retrieval.judged import folds, ndcg, recall
from llmos.drivers.retrieval.search import DEPTH, LOOKED_AT, Searcher

PARTS = 5
EMBED_BATCH = 64
"""As the kernel embeds a corpus."""
OPTIONS = tuple(
    Bm25Options(k1, b, title) for k1, b, title in product((0.9, 1.2, 1.5), (0.4, 0.75), (1, 2, 3))
)
L2 = (0.001, 0.003, 0.01, 0.03)


Trials: TypeAlias = dict[Bm25Options, npt.NDArray[np.float64]]


@dataclass(frozen=True, slots=True)
class Asked:
    """The queries with what does not depend on anything fitted."""

    collection: Collection
    passages: Vectors
    queries: Vectors
    cosines: list[Leg]


def main(argv: Sequence[str] | None = None) -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(prog="benchmarks.retrieval", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--json", action="store_true", help="the last line alone")
    parser.add_argument(
        "--model", default="minilm-l6", help="an encoder of the model store, or its folder"
    )
    parser.add_argument("--threads", type=int, default=2)
    either = parser.add_mutually_exclusive_group()
    either.add_argument("--save", type=Path, metavar="FILE", help="fit to all, and keep it")
    either.add_argument("--load", type=Path, metavar="FILE", help="apply what was kept")
    chosen = parser.parse_args(argv)

    def tell(text: str) -> None:
        if not chosen.json:
            print(text, flush=True)

    try:
        collection = read(chosen.folder, unseen=chosen.load is not None)
        if chosen.save is not None and not collection.may_fit:
            raise BadFolder(f"{chosen.folder} has no qrels/train.tsv, so nothing may be fitted")
        loaded = load(chosen.load) if chosen.load is not None else None
        out = measure(collection, _model(chosen.model), chosen.threads, loaded, chosen.save, tell)
    except (BadFolder, LlmosError) as error:
        print(f"benchmarks.retrieval: {error}", file=sys.stderr)
        return 2
    print(json.dumps(out))
    return 0


def measure(
    collection: Collection,
    model: Path,
    threads: int,
    loaded: Fitted | None,
    save: Path | None,
    tell: Callable[[str], None],
) -> dict[str, Any]:
    """All figures of one collection."""
    out: dict[str, Any] = {
        "passages": len(collection.texts),
        "queries": len(collection.queries),
        "qrels": list(collection.qrels),
    }
    engine = TransformersEncoderEngine(
        EngineOptions(model.name, model, threads=threads, max_batch_tokens=2048)
    )
    try:
        passages, seconds = embed_all(engine, collection, tell)
        out["ingest"] = {
            "passages_per_s": round(len(passages) / seconds, 1),
            "model": model.name,
            "threads": threads,
        }
        tell(f"ingest: {out['ingest']}")
        queries = engine.embed(collection.queries)
        cosines = [_leg(row, complete=False) for row in queries @ passages.T]
        asked = Asked(collection, passages, queries, cosines)
        plain = _searcher(asked, Fitted())
        out["bm25"] = _quality(asked, [_lexical(plain, q).positions for q in collection.queries])
        out["vector"] = _quality(asked, [leg.positions for leg in cosines])
        out["rrf"] = _quality(asked, _ranked(plain, asked, rerank=False))
        for name in ("bm25", "vector", "rrf"):
            tell(f"{name}: {out[name]}")
        fitted = loaded
        if fitted is None and collection.may_fit:
            trials = try_options(collection)
            out.update(out_of_fold(asked, trials, tell))
            fitted = fit(asked, trials, range(len(collection.queries)))
            if save is not None:
                fitted.save(save)
                tell(f"fitted to all training queries: {save}")
        elif fitted is not None:
            searcher = _searcher(asked, fitted)
            out["lexical"] = _quality(
                asked, [_lexical(searcher, q).positions for q in collection.queries]
            )
            out["hybrid"] = _quality(asked, _ranked(searcher, asked, rerank=False))
            if fitted.reranker is not None:
                out["rerank"] = _quality(asked, _ranked(searcher, asked, rerank=True))
        else:
            out["hybrid"] = dict(out["rrf"])
        speeds(engine, asked, fitted, out)
    finally:
        engine.close()
    return out


def embed_all(
    engine: TransformersEncoderEngine, collection: Collection, tell: Callable[[str], None]
) -> tuple[Vectors, float]:
    """The vectors of the passages, and the seconds that took."""
    texts = [
        f"{title}\n{text}" if title else text
        for title, text in zip(collection.titles, collection.texts, strict=True)
    ]
    # Neighbours in a batch are of like length: padding, and waiting for the longest, cost less.
    order = sorted(range(len(texts)), key=lambda n: len(texts[n]))
    rows = np.empty((len(texts), engine.dimension), dtype=np.float32)
    started = time.perf_counter()
    told = started
    for at in range(0, len(order), EMBED_BATCH):
        part = order[at : at + EMBED_BATCH]
        rows[part] = engine.embed([texts[n] for n in part])
        if time.perf_counter() - told > 10:
            told = time.perf_counter()
            tell(f"embedded {at + len(part)} of {len(order)}")
    return rows, time.perf_counter() - started


def try_options(collection: Collection) -> Trials:
    """The lexical leg with each of the options: each query's nDCG."""
    found = {}
    for options in OPTIONS:
        index = Bm25Index(collection.texts, collection.titles, options)
        found[options] = np.array(
            [
                ndcg(best(index.scores(q), 10, above=0.0).tolist(), judged)
                for q, judged in zip(collection.queries, collection.judged, strict=True)
            ]
        )
    return found


def out_of_fold(asked: Asked, trials: Trials, tell: Callable[[str], None]) -> dict[str, Any]:
    """Each query by what was fitted to the parts that it is not in."""
    count = len(asked.collection.queries)
    rankings: dict[str, list[Any]] = {
        name: [None] * count for name in ("lexical", "hybrid", "rerank")
    }
    for n, part in enumerate(folds(asked.collection.judged, PARTS), 1):
        inside = set(part)
        fitted = fit(asked, trials, [i for i in range(count) if i not in inside])
        tell(f"part {n}: {fitted.bm25} {fitted.fusion.scaling} {fitted.fusion.weights}")
        searcher = _searcher(asked, fitted)
        for i in part:
            lexical = _lexical(searcher, asked.collection.queries[i])
            rankings["lexical"][i] = lexical.positions
            rankings["hybrid"][i] = _order(searcher, asked, i, lexical, rerank=False)
            rankings["rerank"][i] = _order(searcher, asked, i, lexical, rerank=True)
    found = {name: _quality(asked, each) for name, each in rankings.items()}
    tell(f"out of fold: {found}")
    return found


def fit(asked: Asked, trials: Trials, chosen: Iterable[int]) -> Fitted:
    """Fit the lexical leg, then the fusion, then the reranker, to some of the queries."""
    chosen = list(chosen)
    judged = asked.collection.judged

    options = max(OPTIONS, key=lambda o: float(trials[o][chosen].mean()))
    searcher = _searcher(asked, Fitted(options))
    legs = {
        i: {"lexical": _lexical(searcher, asked.collection.queries[i]), "vector": asked.cosines[i]}
        for i in chosen
    }
    mixed = fusion.fit([(legs[i], judged[i]) for i in chosen])
    lists = []
    for i in chosen:
        top = fuse(legs[i], mixed).positions[:LOOKED_AT]
        facts = searcher.facts(asked.collection.queries[i], asked.queries[i], top)
        lists.append((facts, np.array([judged[i].get(p, 0.0) for p in top.tolist()])))
    return Fitted(
        options, mixed, rerank.fit(lists, l2=_best_l2(lists, [judged[i] for i in chosen]))
    )


def _best_l2(lists: list[Any], judged: list[Any]) -> float:
    """The penalty that does best between parts of the training queries."""
    worth = dict.fromkeys(L2, 0.0)
    for part in folds(judged, 3):
        inside = set(part)
        for l2 in L2:
            made = rerank.fit([lists[i] for i in range(len(lists)) if i not in inside], l2=l2)
            for i in part:
                facts, gains = lists[i]
                order = np.argsort(-made.scores(facts), kind="stable")
                worth[l2] += ndcg(
                    range(len(order)), {r: float(gains[o]) for r, o in enumerate(order)}
                )
    return max(worth, key=lambda l2: worth[l2])


def speeds(
    engine: TransformersEncoderEngine, asked: Asked, fitted: Fitted | None, out: dict[str, Any]
) -> None:
    """Queries per second, one after the other, the embedding of the query included."""
    searcher = _searcher(asked, fitted or Fitted())
    some = asked.collection.queries[:200]

    def vector_leg(query: str) -> tuple[Any, Leg]:
        vector = engine.embed([query])[0]
        return vector, _leg(asked.passages @ vector, complete=False)

    def hybrid(query: str, *, again: bool) -> object:
        vector, near = vector_leg(query)
        legs = {"lexical": _lexical(searcher, query), "vector": near}
        return searcher.search(query, vector, legs, 10, rerank=again)

    ways: dict[str, Callable[[str], object]] = {
        "bm25": lambda q: _lexical(searcher, q),
        "lexical": lambda q: _lexical(searcher, q),
        "vector": vector_leg,
        "rrf": lambda q: hybrid(q, again=False),
        "hybrid": lambda q: hybrid(q, again=False),
        "rerank": lambda q: hybrid(q, again=True),
    }
    for name, ask in ways.items():
        if name in out:
            started = time.perf_counter()
            for query in some:
                ask(query)
            out[name]["queries_per_s"] = round(len(some) / (time.perf_counter() - started), 1)


def _searcher(asked: Asked, fitted: Fitted) -> Searcher:
    return Searcher(
        asked.collection.texts, asked.collection.titles, lambda p: asked.passages[p], fitted
    )


def _leg(scores: Any, *, complete: bool) -> Leg:
    positions = best(scores, DEPTH)
    return Leg(positions, scores[positions], complete)


def _lexical(searcher: Searcher, query: str) -> Leg:
    return searcher.lexical(query, DEPTH)


def _order(searcher: Searcher, asked: Asked, i: int, lexical: Leg, *, rerank: bool) -> Any:
    query = asked.collection.queries[i]
    legs = {"lexical": lexical, "vector": asked.cosines[i]}
    fused = fuse(legs, searcher.fitted.fusion).positions
    if not rerank or searcher.fitted.reranker is None:
        return fused
    top = fused[:LOOKED_AT]
    again = searcher.fitted.reranker.scores(searcher.facts(query, asked.queries[i], top))
    return np.concatenate([top[np.argsort(-again, kind="stable")], fused[LOOKED_AT:]])


def _ranked(searcher: Searcher, asked: Asked, *, rerank: bool) -> list[Any]:
    return [
        _order(searcher, asked, i, _lexical(searcher, q), rerank=rerank)
        for i, q in enumerate(asked.collection.queries)
    ]


def _quality(asked: Asked, rankings: Sequence[Any]) -> dict[str, float]:
    pairs = [(r.tolist(), j) for r, j in zip(rankings, asked.collection.judged, strict=True)]
    return {
        "ndcg@10": round(float(np.mean([ndcg(r, j) for r, j in pairs])), 4),
        "recall@100": round(float(np.mean([recall(r, j) for r, j in pairs])), 4),
    }


def _model(name: str) -> Path:
    """A folder, or that of a name in the model store."""
    if (Path(name) / "config.json").is_file():
        return Path(name)
    from llmos.kernel.settings import Settings

    folder = Path(Settings().models_dir) / name
    if not (folder / "config.json").is_file():
        raise BadFolder(
            f"model {name} is not in the model store; add it with llmos models pull {name}"
        )
    return folder


if __name__ == "__main__":
    sys.exit(main())
