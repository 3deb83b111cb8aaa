"""Prometheus metrics of this process; the kernel gathers those of all processes."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.exposition import generate_latest
from prometheus_client.registry import Collector

from llmos.drivers.protocols import EngineStatistics

REGISTRY = CollectorRegistry()
"""Only what LLM OS itself counts: not the default registry, which Ray also writes to."""

_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


MAX_TENANTS = 200
"""Tenants that have series of their own in one process; all others share ``OTHERS``."""
OTHERS = "(others)"


class Bounded:
    """Values of a label, the first so many that come: every one costs memory here and in
    whoever reads the metrics, for ever."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._known: set[str] = set()

    def __call__(self, value: str) -> str:
        """The value itself, or ``OTHERS``."""
        if value in self._known:
            return value
        if len(self._known) >= self._most:
            return OTHERS
        self._known.add(value)
        return value


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
TENANT_TOKENS = Counter(
    "llmos_tenant_tokens",
    "Tokens through causal engines by tenant",
    ("tenant", "phase"),
    registry=REGISTRY,
)
REQUEST_WAIT = Tallies(
    "llmos_request_wait_seconds",
    "Requests to causal engines, from their arrival to their first step",
    ("tenant",),
)
REFUSED = Counter(
    "llmos_refused_requests",
    "Requests that a tenant's quota has refused",
    ("tenant", "limit"),
    registry=REGISTRY,
)
tenant_label = Bounded(MAX_TENANTS)
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
PREDICTION = Gauge(
    "llmos_slot_prediction_error",
    "How far the predicted memory of a model was off, as a part of what was measured",
    ("model",),
    registry=REGISTRY,
)
SLOT = Gauge(
    "llmos_slot_state", "1 for the state that a slot is in", ("model", "state"), registry=REGISTRY
)
EVICTIONS = Counter(
    "llmos_slot_evictions", "Models taken off their device", ("model",), registry=REGISTRY
)
LEDGER = Gauge(
    "llmos_ledger_bytes",
    "Memory of a device by owner, as it was reserved and as it was measured",
    ("device", "owner", "kind"),
    registry=REGISTRY,
)
AGENTS = Gauge("llmos_agents", "Agents by state", ("state",), registry=REGISTRY)


class Engines(Collector):
    """Queues, KV caches and counters of the engines of a device, read when they are asked for."""

    def __init__(self) -> None:
        self.read: Callable[[], Mapping[str, EngineStatistics]] = dict
        """The statistics of each causal engine by model."""
        REGISTRY.register(self)

    def collect(self) -> Iterable[Metric]:
        """The figures now."""
        requests = GaugeMetricFamily(
            "llmos_engine_queue",
            "Requests in a causal engine, running or waiting",
            labels=("model", "state"),
        )
        kv = GaugeMetricFamily(
            "llmos_kv_tokens", "Tokens of KV cache by state", labels=("model", "state")
        )
        adapters = GaugeMetricFamily(
            "llmos_resident_adapters", "Adapters resident in an engine", labels=("model",)
        )
        preempted = CounterMetricFamily(
            "llmos_preemptions", "Requests put back into the queue for another", labels=("model",)
        )
        cached = CounterMetricFamily(
            "llmos_cached_prompt_tokens", "Prompt tokens found in the cache", labels=("model",)
        )
        steps = CounterMetricFamily("llmos_engine_steps", "Steps of an engine", labels=("model",))
        for model, found in self.read().items():
            requests.add_metric((model, "running"), found.running)
            requests.add_metric((model, "waiting"), found.waiting)
            kv.add_metric((model, "capacity"), found.kv_tokens)
            kv.add_metric((model, "used"), found.kv_tokens_used)
            kv.add_metric((model, "cached"), found.kv_tokens_cached)
            adapters.add_metric((model,), len(found.adapters))
            preempted.add_metric((model,), found.preempted)
            cached.add_metric((model,), found.cached_prompt_tokens)
            steps.add_metric((model,), found.steps)
        return [requests, kv, adapters, preempted, cached, steps]


ENGINES = Engines()


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
