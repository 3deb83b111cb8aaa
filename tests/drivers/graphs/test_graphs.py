from __future__ import annotations

from pathlib import Path
from typing import Any

import networkx as nx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmos.drivers.errors import GraphFileError
from llmos.drivers.graphs.ladybug_graph import LadybugGraph
from llmos.drivers.graphs.memory import MemoryGraph
from llmos.drivers.graphs.names import NameIndex, words
from llmos.drivers.graphs.networkx_graph import NetworkxGraph
from llmos.drivers.protocols import Edge, Graph, Node, Triple
from tests.drivers.graphs.graphs_suite import EDGES, NODES, GraphsSuite, ends


class TestMemoryGraph(GraphsSuite):
    def make(self) -> Graph:
        return MemoryGraph("g")


class TestNetworkxGraph(GraphsSuite):
    def make(self) -> Graph:
        return NetworkxGraph("g")


class TestLadybugGraph(GraphsSuite):
    def make(self) -> Graph:
        return LadybugGraph("g")


def test_a_ladybug_graph_is_kept_on_disk(tmp_path: Path) -> None:
    path = tmp_path / "graph.lbug"
    graph = LadybugGraph("g", path)
    graph.upsert(NODES, EDGES)
    graph.close()
    graph.close()
    again = LadybugGraph("g", path)
    assert again.size() == (7, 5)
    assert [n.id for n in again.find("tremors")] == ["s2"]
    again.close()
    (tmp_path / "other").write_text("no database " * 1000)
    with pytest.raises(GraphFileError):
        LadybugGraph("g", tmp_path / "other")


def test_an_upsert_that_fails_leaves_nothing() -> None:
    graph = LadybugGraph("g")
    graph.upsert(NODES, EDGES)
    broken: Any = Edge("new", "r", "d1", valid_from="soon")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="soon"):
        graph.upsert([Node("new", "new")], [broken])
    assert graph.size() == (7, 5)
    assert graph.find("new") == []


def test_networkx_algorithms_run_on_a_copy() -> None:
    graph = NetworkxGraph("g")
    graph.upsert(NODES, EDGES)
    copy = graph.networkx()
    assert nx.has_path(copy, "d2", "fatigue")
    assert copy.nodes["d1"]["name"] == "diabetes mellitus"
    copy.clear()
    assert graph.size() == (7, 5)


_NODE = st.sampled_from("abcde")
_EDGE = st.builds(Edge, _NODE, st.sampled_from(["r", "q"]), _NODE)


@settings(max_examples=80, deadline=None)
@given(st.lists(_EDGE, min_size=1, max_size=14), st.integers(1, 4))
def test_paths_are_those_of_networkx(edges: list[Edge], hops: int) -> None:
    memory, other = MemoryGraph(), NetworkxGraph()
    for graph in (memory, other):
        graph.upsert([], edges)
    assert memory.size() == other.size()
    undirected: nx.MultiGraph[str] = nx.MultiGraph()
    for e in edges:
        undirected.add_edge(e.subject, e.object, key=(e.subject, e.relation, e.object))
    start, end = edges[0].subject, edges[-1].object
    found = memory.paths(start, end, max_hops=hops, limit=10_000)
    assert ends(found) == ends(other.paths(start, end, max_hops=hops, limit=10_000))
    expected = (
        [
            [key for *_, key in path]
            for path in nx.all_simple_edge_paths(undirected, start, end, hops)
        ]
        if start != end
        else []
    )
    assert sorted(ends(found)) == sorted(expected)
    assert [len(p) for p in found] == sorted(map(len, found))


@given(st.lists(st.text(max_size=12), max_size=6), st.text(max_size=40))
def test_the_index_agrees_with_a_scan(given_names: list[str], text: str) -> None:
    index = NameIndex()
    for i, name in enumerate(given_names):
        index.add(str(i), name)
    spoken = words(text)
    expected = {
        str(i)
        for i, name in enumerate(given_names)
        if (key := words(name)) and any(spoken[p : p + len(key)] == key for p in range(len(spoken)))
    }
    assert index.find(text) == expected
    for i, name in enumerate(given_names):
        index.remove(str(i), name)
    assert index.find(text) == set()
    assert not index._ids
    assert not index._lengths


@settings(max_examples=25, deadline=None)
@given(st.lists(_EDGE, min_size=1, max_size=14), st.lists(_EDGE, max_size=6))
def test_all_drivers_answer_alike(edges: list[Edge], later: list[Edge]) -> None:
    graphs: list[Graph] = [MemoryGraph(), NetworkxGraph(), LadybugGraph()]
    x = edges[0].subject
    join = [Triple("?a", "r", "?b"), Triple("?b", "?q", "?c")]

    def answers(graph: Graph) -> list[Any]:
        graph.upsert([], edges)
        graph.upsert([], later)
        return [
            graph.size(),
            graph.neighbours(x),
            graph.neighbours(x, direction="in"),
            graph.paths(x, edges[-1].object, limit=50),
            graph.subgraph([x], limit=5),
            graph.match(join),
            graph.pagerank({x: 1.0}),
        ]

    first, *others = map(answers, graphs)
    assert all(other == first for other in others)
    for graph in graphs:
        graph.close()
