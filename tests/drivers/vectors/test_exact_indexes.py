from __future__ import annotations

from pathlib import Path

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from llmos.drivers.protocols import VectorIndex
from llmos.drivers.vectors.faiss_index import FaissIndex
from llmos.drivers.vectors.memory import MemoryIndex
from tests.drivers.vectors.vectors_suite import VectorsSuite, names, unit


class TestMemoryIndex(VectorsSuite):
    def make(self, dimension: int) -> VectorIndex:
        return MemoryIndex(dimension)


class TestFaissIndex(VectorsSuite):
    def make(self, dimension: int) -> VectorIndex:
        return FaissIndex(dimension)


def test_both_drivers_answer_alike_and_read_each_others_files(tmp_path: Path) -> None:
    memory, native = MemoryIndex(96), FaissIndex(96)
    rows = unit(3000, 96)
    rows[1000:2000] = rows[:1000]
    for index in (memory, native):
        index.upsert(names(3000), rows)
        index.remove(names(3000)[5::9])
    for count in (1, 64):
        queries = np.concatenate([rows[:count], unit(count, 96, seed=9)])
        assert memory.search(queries, 50) == native.search(queries, 50)
    native.save(tmp_path, "t")
    other = MemoryIndex(96)
    other.load(tmp_path, "t")
    assert other.search(rows[:5], 10) == memory.search(rows[:5], 10)


_ID = st.sampled_from("abcdefgh")
_STEP = st.one_of(
    st.tuples(st.just("upsert"), st.dictionaries(_ID, st.integers(0, 3), max_size=4)),
    st.tuples(st.just("remove"), st.lists(_ID, max_size=3)),
)


@settings(max_examples=60, deadline=None)
@given(st.lists(_STEP, max_size=12), st.integers(1, 9))
def test_any_history_gives_the_same_in_both(steps: list[tuple[str, object]], k: int) -> None:
    memory, native, table = MemoryIndex(4), FaissIndex(4), unit(4, 4)
    kept: dict[str, int] = {}
    for _kind, argument in steps:
        for index in (memory, native):
            if isinstance(argument, dict):
                index.upsert(list(argument), table[list(argument.values())])
            elif isinstance(argument, list):
                index.remove(argument)
        if isinstance(argument, dict):
            kept.update(argument)
        elif isinstance(argument, list):
            kept = {i: v for i, v in kept.items() if i not in argument}
    assert len(memory) == len(native) == len(kept)
    found = memory.search(table, k)
    assert found == native.search(table, k)
    assert all(len(hits) == min(k, len(kept)) for hits in found)
