"""Prometheus metrics of this process; the kernel gathers those of all processes."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server
from prometheus_client.core import HistogramMetricFamily, Metric
from prometheus_client.exposition import generate_latest
from prometheus_client.registry import Collector

REGISTRY = CollectorRegistry()
"""Only what LLM OS itself counts: not the default registry, which Ray also writes to."""

_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class Tally:
    """How often a value fell into each bucket, and the sum. For one thread."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        """Not added up; the last is of what is above all bounds."""
        self.total = 0.0

    def observe(self, value: float) -> None:
        """Count a value."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value


class Tallies(Collector):
    """A histogram that one thread counts, and the same thread reads.

    The library's own takes a lock for each of its numbers and looks through the buckets one
    by one: with three of them in each turn, a fortieth of a host's time.
    """

    def __init__(self, name: str, help_text: str, labels: tuple[str, ...]) -> None:
        self._name, self._help, self._labels = name, help_text, labels
        self._series: dict[tuple[str, ...], Tally] = {}
        REGISTRY.register(self)

    def labels(self, *values: str) -> Tally:
        """The series with these values of the labels."""
        found = self._series.get(values)
        if found is None:
            assert len(values) == len(self._labels)
            found = self._series[values] = Tally(_SECONDS)
        return found

    def collect(self) -> Iterable[Metric]:
        """What was counted so far."""
        family = HistogramMetricFamily(self._name, self._help, labels=self._labels)
        for values, tally in self._series.items():
            buckets, so_far = [], 0
            for bound, count in zip((*tally.bounds, float("inf")), tally.counts, strict=True):
                so_far += count
                buckets.append(("+Inf" if bound == float("inf") else str(float(bound)), so_far))
            family.add_metric(values, buckets, tally.total)
        return [family]


TURNS = Tallies(
    "llmos_turn_seconds",
    "Turns, from the start of the handler to the commit",
    ("program", "status"),
)
TURN_WAIT = Tallies("llmos_turn_wait_seconds", "Time a message waited for its turn", ("program",))
SYSCALLS = Tallies("llmos_syscall_seconds", "Syscalls", ("syscall", "status"))
TOKENS = Counter(
    "llmos_tokens",
    "Tokens through an engine",
    ("model", "phase"),
    registry=REGISTRY,
)
REQUESTS = Counter(
    "llmos_engine_requests",
    "Requests that left an engine",
    ("model", "outcome"),
    registry=REGISTRY,
)
EMBED_BATCH = Histogram(
    "llmos_embed_batch_texts",
    "Texts per round of an encoder: one or two forward passes",
    ("model",),
    buckets=(1, 2, 4, 8, 16, 32, 64, 128, 256),
    registry=REGISTRY,
)
COMMITS = Histogram(
    "llmos_commit_seconds", "Group commits of the store", buckets=_SECONDS, registry=REGISTRY
)
COMMIT_ROWS = Histogram(
    "llmos_commit_writes",
    "Writes per group commit",
    buckets=(1, 2, 5, 10, 20, 50, 100, 200, 500, 1000),
    registry=REGISTRY,
)
RESTARTS = Counter("llmos_process_lost", "Processes lost", ("process",), registry=REGISTRY)
MEMORY = Gauge(
    "llmos_device_bytes", "Memory of a device by owner", ("device", "owner"), registry=REGISTRY
)
AGENTS = Gauge("llmos_agents", "Agents by state", ("state",), registry=REGISTRY)


class Exported(NamedTuple):
    """The metrics of one process at one moment, as plain data."""

    process: str
    families: list[tuple[str, str, str, list[tuple[str, dict[str, str], float]]]]
    """(name, help, type, samples)."""


def export(process: str) -> Exported:
    """Read this process's metrics."""
    return Exported(
        process,
        [
            (
                m.name,
                m.documentation,
                m.type,
                [(s.name, dict(s.labels), s.value) for s in m.samples],
            )
            for m in REGISTRY.collect()
        ],
    )


def join(exports: list[Exported]) -> list[Metric]:
    """The metrics of several processes as one, with a label ``process``."""
    families: dict[str, Metric] = {}
    for exported in exports:
        for name, help_text, kind, samples in exported.families:
            family = families.setdefault(name, Metric(name, help_text, kind))
            for sample, labels, value in samples:
                if not sample.endswith("_created"):
                    family.add_sample(sample, {**labels, "process": exported.process}, value)
    return list(families.values())


class _Gathered(Collector):
    """A registry's only collector: asks for the exports whenever it is scraped."""

    def __init__(self, gather: Callable[[], list[Exported]]) -> None:
        self._gather = gather

    def describe(self) -> list[Metric]:
        """Nothing: registering must not scrape."""
        return []

    def collect(self) -> list[Metric]:
        """Join what is there now."""
        return join(self._gather())


def render(exports: list[Exported]) -> str:
    """Prometheus text of several processes."""
    registry = CollectorRegistry()
    registry.register(_Gathered(lambda: exports))
    return generate_latest(registry).decode()


class MetricsEndpoint:
    """``/metrics`` on 127.0.0.1, for a Prometheus beside it."""

    def __init__(self, port: int, gather: Callable[[], list[Exported]]) -> None:
        """Serve at once.

        Args:
            port: 0 takes a free one.
            gather: Called from the server's thread for every scrape.

        Raises:
            OSError: the port is taken.
        """
        registry = CollectorRegistry()
        registry.register(_Gathered(gather))
        self._server, self._thread = start_http_server(port, "127.0.0.1", registry)
        self.port: int = self._server.server_port

    def close(self) -> None:
        """Stop serving."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(timeout=5.0)
