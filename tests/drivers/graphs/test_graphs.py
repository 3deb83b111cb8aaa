from __future__ import annotations

import networkx as nx
from hypothesis import given, settings
from hypothesis import strategies as st

from llmos.drivers.graphs.memory import MemoryGraph
from llmos.drivers.graphs.names import NameIndex, words
from llmos.drivers.graphs.networkx_graph import NetworkxGraph
from llmos.drivers.protocols import Edge, Graph
from tests.drivers.graphs.graphs_suite import EDGES, NODES, GraphsSuite, ends


class TestMemoryGraph(GraphsSuite):
    def make(self) -> Graph:
        return MemoryGraph("g")


class TestNetworkxGraph(GraphsSuite):
    def make(self) -> Graph:
        return NetworkxGraph("g")


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
