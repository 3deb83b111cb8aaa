"""Prometheus metrics of this process; the kernel gathers those of all processes."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server
from prometheus_client.core import Metric
from prometheus_client.exposition import generate_latest
from prometheus_client.registry import Collector

REGISTRY = CollectorRegistry()
"""Only what LLM OS itself counts: not the default registry, which Ray also writes to."""

_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)

TURNS = Histogram(
    "llmos_turn_seconds",
    "Turns, from the start of the handler to the commit",
    ("program", "status"),
    buckets=_SECONDS,
    registry=REGISTRY,
)
TURN_WAIT = Histogram(
    "llmos_turn_wait_seconds",
    "Time a message waited for its turn",
    ("program",),
    buckets=_SECONDS,
    registry=REGISTRY,
)
SYSCALLS = Histogram(
    "llmos_syscall_seconds",
    "Syscalls",
    ("syscall", "status"),
    buckets=_SECONDS,
    registry=REGISTRY,
)
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
    "Texts per forward pass of an encoder",
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
