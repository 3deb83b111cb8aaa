"""What every knowledge graph must do."""

from __future__ import annotations

import pickle
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from llmos.drivers.errors import GraphLimitExceeded, UnknownNode
from llmos.drivers.protocols import Edge, Graph, Node, Triple

NODES = [
    Node("d1", "diabetes mellitus", "disease", "t.csv", "v1"),
    Node("d2", "type 2 diabetes mellitus", "disease"),
    Node("d3", "Parkinson's disease", "disease"),
    Node("s1", "Thirst", "symptom"),
    Node("s2", "Tremor", "symptom"),
    Node("s3", "2型糖尿病", "disease"),
]
EDGES = [
    Edge("d2", "is_a", "d1"),
    Edge("d1", "has_symptom", "s1", "t.csv", "v1"),
    Edge("d2", "has_symptom", "s1"),
    Edge("d3", "has_symptom", "s2"),
    Edge("d1", "has_symptom", "fatigue"),
]


def ends(paths: list[list[Edge]]) -> list[list[tuple[str, str, str]]]:
    return [[(e.subject, e.relation, e.object) for e in path] for path in paths]


class GraphsSuite:
    def make(self) -> Graph:
        raise NotImplementedError

    @pytest.fixture
    def graph(self) -> Graph:
        graph = self.make()
        graph.upsert(NODES, EDGES)
        return graph

    def test_nodes_and_edges_are_kept_with_their_provenance(self, graph: Graph) -> None:
        assert graph.size() == (7, 5)
        assert graph.node("d1") == NODES[0]
        edge, node = graph.neighbours("s1", direction="in")[0]
        assert edge == EDGES[1]
        assert node == NODES[0]

    def test_an_unknown_end_becomes_a_node(self, graph: Graph) -> None:
        assert graph.node("fatigue") == Node("fatigue", "fatigue")
        graph.upsert([Node("fatigue", "Fatigue", "symptom")], [])
        assert graph.node("fatigue").name == "Fatigue"
        assert graph.size() == (7, 5)

    def test_edges_are_a_set_and_nodes_are_replaced(self, graph: Graph) -> None:
        graph.upsert([Node("s1", "Polydipsia")], [Edge("d2", "is_a", "d1", "new.csv", "v2")] * 3)
        assert graph.size() == (7, 5)
        assert graph.neighbours("d2", relation="is_a")[0][0].source == "new.csv"
        assert graph.find("thirst") == []
        assert [n.id for n in graph.find("polydipsia")] == ["s1"]

    @pytest.mark.parametrize(
        "call",
        [
            lambda g: g.node("zz"),
            lambda g: g.neighbours("zz"),
            lambda g: g.paths("zz", "d1"),
            lambda g: g.paths("d1", "zz"),
        ],
    )
    def test_unknown_nodes_are_an_error(
        self, graph: Graph, call: Callable[[Graph], object]
    ) -> None:
        with pytest.raises(UnknownNode, match="zz") as caught:
            call(graph)
        assert pickle.loads(pickle.dumps(caught.value)).node == "zz"

    @pytest.mark.parametrize(
        ("text", "ids"),
        [
            ("I have Type-2  DIABETES mellitus.", ["d2", "d1"]),
            ("diabetes mellitus, thirst; tremors!", ["d1", "s1", "s2"]),
            ("parkinson disease", ["d3"]),
            ("Parkinson’s diseases", ["d3"]),
            ("my diabetes", []),
            ("thirsty tremorous", []),
            ("我有2型糖尿病吗", ["s3"]),
            ("type 2 diabetes\nmellitus", ["d2", "d1"]),
            ("", []),
        ],
    )
    def test_find_names_in_text(self, graph: Graph, text: str, ids: list[str]) -> None:
        assert [n.id for n in graph.find(text)] == ids

    def test_find_is_bounded_and_does_not_scan_the_graph(self, graph: Graph) -> None:
        graph.upsert([Node(f"n{i}", f"disease number {i} of {i % 7}") for i in range(30_000)], [])
        text = "What about disease number 29999 of 4? " * 3
        started = time.perf_counter()
        for _ in range(100):
            found = graph.find(text)
        assert (time.perf_counter() - started) / 100 < 0.005
        assert [n.id for n in found] == ["n29999"]
        graph.upsert([Node(f"t{i}", "tremor") for i in range(50)], [])
        assert len(graph.find("tremor", limit=5)) == 5
        assert graph.find("tremor", limit=0) == []

    def test_neighbours_by_relation_and_direction(self, graph: Graph) -> None:
        assert [n.id for _, n in graph.neighbours("d1")] == ["s1", "fatigue", "d2"]
        assert [n.id for _, n in graph.neighbours("d1", direction="out")] == ["s1", "fatigue"]
        assert [n.id for _, n in graph.neighbours("d1", direction="in")] == ["d2"]
        assert [n.id for _, n in graph.neighbours("d1", relation="is_a")] == ["d2"]
        assert graph.neighbours("d1", relation="none") == []
        assert len(graph.neighbours("d1", limit=1)) == 1

    def test_loops_and_parallel_edges(self, graph: Graph) -> None:
        graph.upsert([], [Edge("s2", "like", "s2"), Edge("s2", "of", "d3"), Edge("d3", "of", "s2")])
        assert len(graph.neighbours("s2")) == 4
        assert len(graph.neighbours("s2", relation="like")) == 1
        assert len(graph.neighbours("s2", relation="like", direction="in")) == 1
        assert len(graph.paths("s2", "d3", max_hops=1)) == 3

    def test_paths_are_simple_and_shortest_first(self, graph: Graph) -> None:
        assert ends(graph.paths("d2", "s1")) == [
            [("d2", "has_symptom", "s1")],
            [("d2", "is_a", "d1"), ("d1", "has_symptom", "s1")],
        ]
        assert len(graph.paths("d2", "s1", max_hops=1)) == 1
        assert len(graph.paths("d2", "s1", limit=1)) == 1
        assert graph.paths("d2", "s2", max_hops=9) == []
        assert graph.paths("d2", "d2") == []
        assert graph.paths("d2", "s1", limit=0) == []

    def test_paths_in_a_dense_graph_end(self) -> None:
        graph = self.make()
        graph.upsert(
            [], [Edge(f"a{i}", "r", f"a{k}") for i in range(120) for k in range(120) if i != k]
        )
        started = time.perf_counter()
        found = graph.paths("a0", "a1", max_hops=12, limit=20)
        assert time.perf_counter() - started < 5
        assert len(found) == 20
        assert [len(p) for p in found] == sorted(len(p) for p in found)

    def test_paths_around_a_hub_end(self) -> None:
        graph = self.make()
        graph.upsert([], [Edge("hub", "r", f"leaf{i}") for i in range(5_000)])
        graph.upsert([], [Edge("leaf1", "q", "goal"), Edge("start", "q", "hub")])
        assert ends(graph.paths("start", "goal", max_hops=3)) == [
            [("start", "q", "hub"), ("hub", "r", "leaf1"), ("leaf1", "q", "goal")]
        ]

    def test_threads_see_whole_upserts(self, graph: Graph) -> None:
        def write(i: int) -> None:
            graph.upsert([Node(f"x{i}", f"thing {i}")], [Edge(f"x{i}", "at", "d1")])

        def read(_: int) -> bool:
            return all(n.name != n.id for _, n in graph.neighbours("d1", relation="at"))

        with ThreadPoolExecutor(4) as pool:
            writes = pool.map(write, range(200))
            reads = pool.map(read, range(200))
            assert all(reads)
            list(writes)
        assert graph.size() == (207, 205)

    def test_synonyms_are_found_and_replaced(self, graph: Graph) -> None:
        graph.upsert([Node("d3", "Parkinson's disease", synonyms=("shaking palsy", "PD"))], [])
        assert [n.id for n in graph.find("a shaking palsy?")] == ["d3"]
        assert graph.node("d3").synonyms == ("shaking palsy", "PD")
        graph.upsert([Node("d3", "Parkinson's disease", synonyms=("PD",))], [])
        assert graph.find("shaking palsy") == []
        assert [n.id for n in graph.find("pd")] == ["d3"]

    def test_a_text_is_linked_by_its_longest_names(self, graph: Graph) -> None:
        text = "Thirst in Type-2 diabetes mellitus: Parkinson’s diseases, 我有2型糖尿病吗"
        assert [(m.text, m.node.id) for m in graph.link(text)] == [
            ("Thirst", "s1"),
            ("Type-2 diabetes mellitus", "d2"),
            ("Parkinson’s diseases", "d3"),
            ("2型糖尿病", "s3"),
        ]
        assert all(text[m.start : m.end] == m.text for m in graph.link(text))
        graph.upsert([Node("s9", "thirst")], [])
        assert [m.node.id for m in graph.link("thirst")] == ["s1", "s9"]
        assert len(graph.link(text, limit=1)) == 1
        assert graph.link("") == []

    def test_edges_hold_from_and_to_a_time(self, graph: Graph) -> None:
        graph.upsert(
            [],
            [
                Edge("d3", "treated_by", "levodopa", "g.csv", "v1", 100.0, 200.0),
                Edge("levodopa", "is_a", "drug", valid_from=150.0),
            ],
        )
        assert graph.neighbours("levodopa", direction="in")[0][0].valid_to == 200.0
        for at, here in ((99.0, 0), (100.0, 1), (199.0, 1), (200.0, 0), (None, 1)):
            assert len(graph.neighbours("d3", relation="treated_by", at=at)) == here
            hit = graph.match([Triple("d3", "treated_by", "?x")], at=at)
            assert len(hit) == here
        assert len(graph.paths("d3", "drug", at=160.0)) == 1
        assert graph.paths("d3", "drug", at=120.0) == []
        assert len(graph.subgraph(["d3"], at=120.0)[1]) == 2
        assert [n.id for n, _ in graph.pagerank({"levodopa": 1.0}, at=50.0)] == ["levodopa"]
        graph.upsert([], [Edge("d3", "treated_by", "levodopa", valid_from=300.0)])
        assert graph.neighbours("d3", relation="treated_by", at=150.0) == []

    def test_subgraphs_are_bounded_near_first(self, graph: Graph) -> None:
        nodes, edges = graph.subgraph(["d3"], hops=2)
        assert [n.id for n in nodes] == ["d3", "s2"]
        assert ends([edges]) == [[("d3", "has_symptom", "s2")]]
        nodes, edges = graph.subgraph(["s1"], hops=1)
        assert [n.id for n in nodes] == ["s1", "d1", "d2"]
        nodes, edges = graph.subgraph(["s1"], hops=2)
        assert {n.id for n in nodes} == {"s1", "d1", "d2", "fatigue"}
        assert len(edges) == 4
        assert len(graph.subgraph(["s1"], hops=2, limit=3)[1]) == 3
        assert graph.subgraph(["s1"], hops=0)[1] == []
        assert graph.subgraph([]) == ([], [])

    def test_patterns_bind_variables(self, graph: Graph) -> None:
        assert graph.match([Triple("?d", "has_symptom", "s1")]) == [{"?d": "d1"}, {"?d": "d2"}]
        both = [Triple("?a", "is_a", "?b"), Triple("?a", "has_symptom", "?s")]
        assert graph.match([*both, Triple("?b", "has_symptom", "?s")]) == [
            {"?a": "d2", "?b": "d1", "?s": "s1"}
        ]
        assert graph.match([Triple("d2", "?r", "?x")]) == [
            {"?r": "has_symptom", "?x": "s1"},
            {"?r": "is_a", "?x": "d1"},
        ]
        assert len(graph.match([Triple("?a", "?r", "?b")])) == 5
        assert len(graph.match([Triple("?a", "?r", "?b")], limit=2)) == 2
        assert graph.match([Triple("d3", "has_symptom", "s2")]) == [{}]
        assert graph.match([Triple("d3", "has_symptom", "s1")]) == []
        assert graph.match([Triple("?x", "is_a", "?x")]) == []
        assert graph.match([Triple("nobody", "?r", "?x")]) == []
        with pytest.raises(ValueError, match="patterns"):
            graph.match([])

    def test_text_is_never_a_query(self, graph: Graph) -> None:
        evil = "x'}) DETACH DELETE n //"
        graph.upsert([Node(evil, evil, evil)], [Edge(evil, evil, "d1", evil)])
        assert graph.node(evil).name == evil
        assert graph.match([Triple("?a", evil, "d1")]) == [{"?a": evil}]
        assert graph.neighbours(evil, relation=evil)[0][1].id == "d1"
        assert graph.neighbours("d1", relation="' OR 1=1 //") == []
        with pytest.raises(UnknownNode):
            graph.node("d1'}) RETURN n //")
        assert graph.size() == (8, 6)

    def test_a_query_that_would_look_at_everything_is_refused(self) -> None:
        graph = self.make()
        graph.upsert([], [Edge(f"a{i}", "r", f"b{k}") for i in range(100) for k in range(100)])
        cross = [Triple("?a", "r", "?b"), Triple("?c", "r", "?b"), Triple("?c", "r", "?d")]
        with pytest.raises(GraphLimitExceeded) as caught:
            graph.match(cross)
        assert pickle.loads(pickle.dumps(caught.value)).limit == caught.value.limit

    def test_pagerank_prefers_what_is_near_the_seeds(self, graph: Graph) -> None:
        ranked = graph.pagerank({"d2": 1.0})
        assert ranked[0][0].id in ("d1", "d2")
        assert {n.id for n, _ in ranked} == {"d1", "d2", "s1", "fatigue"}
        assert sum(score for _, score in ranked) == pytest.approx(1, abs=0.01)
        assert len(graph.pagerank({"d2": 1.0, "d3": 2.0}, limit=2)) == 2
        for bad in ({}, {"d2": 0.0}, {"d2": float("nan")}):
            with pytest.raises(ValueError, match="weights"):
                graph.pagerank(bad)
        with pytest.raises(UnknownNode):
            graph.pagerank({"zz": 1.0})
