"""Drivers by kind and name, imported on first use.

One sorted table, after fsspec's registry: a driver that nobody asks for costs
nothing, and one whose package is missing says what to install.
"""

from __future__ import annotations

import importlib
from typing import Any, NamedTuple

from llmos.drivers.errors import DriverNotFound, DriverNotInstalled


class Entry(NamedTuple):
    """Where a driver is, and how to get the package that it needs."""

    target: str
    """``module:attribute``; the attribute is the class or factory."""
    install: str = "pip install llmos"


TABLE: dict[tuple[str, str], Entry] = {
    ("device", "cpu"): Entry("llmos.drivers.devices.cpu:CpuDevice"),
    ("device", "cuda"): Entry("llmos.drivers.devices.cuda:CudaDevice", "pip install 'llmos[cuda]'"),
    ("device", "memory"): Entry("llmos.drivers.devices.memory:MemoryDevice"),
    ("engine", "causal"): Entry("llmos.drivers.engines.causal:TransformersCausalEngine"),
    ("engine", "echo"): Entry("llmos.drivers.engines.echo:EchoEngine"),
    ("engine", "encoder"): Entry("llmos.drivers.engines.encoder:TransformersEncoderEngine"),
    ("engine", "hash"): Entry("llmos.drivers.engines.hashing:HashEncoder"),
    ("engine", "remote"): Entry("llmos.drivers.engines.remote:RemoteEngine"),
    ("graph", "ladybug"): Entry(
        "llmos.drivers.graphs.ladybug_graph:LadybugGraph", "pip install 'llmos[graph]'"
    ),
    ("graph", "memory"): Entry("llmos.drivers.graphs.memory:MemoryGraph"),
    ("graph", "networkx"): Entry("llmos.drivers.graphs.networkx_graph:NetworkxGraph"),
    ("rules", "clips"): Entry(
        "llmos.drivers.rules.clips:ClipsRuleBase", "pip install 'llmos[demo]'"
    ),
    ("rules", "memory"): Entry("llmos.drivers.rules.memory:MemoryRuleBase"),
    ("rules", "zen"): Entry("llmos.drivers.rules.zen:ZenRuleBase", "pip install 'llmos[rules]'"),
    ("store", "memory"): Entry("llmos.drivers.stores.memory:MemoryStore"),
    ("store", "postgres"): Entry(
        "llmos.drivers.stores.postgres:PostgresStore", "pip install 'llmos[postgres]'"
    ),
    ("store", "sqlite"): Entry("llmos.drivers.stores.sqlite:SqliteStore"),
    ("tool", "http"): Entry("llmos.drivers.tools.http:HttpTool"),
    ("tool", "memory"): Entry("llmos.drivers.tools.memory:MemoryTool"),
    ("tool", "python"): Entry("llmos.drivers.tools.python_tool:PythonTool"),
    ("tool", "smtp"): Entry("llmos.drivers.tools.smtp:SmtpTool"),
    ("vector", "faiss"): Entry("llmos.drivers.vectors.faiss_index:FaissIndex"),
    ("vector", "memory"): Entry("llmos.drivers.vectors.memory:MemoryIndex"),
}
"""(kind, name) → where it is. Constructors: device(index, budget_bytes, threads);
engine(EngineOptions); graph(name); rules(name, source); store(path); tool(name, options);
vector(dimension)."""


def names(kind: str) -> tuple[str, ...]:
    """Drivers of a kind."""
    return tuple(sorted(n for k, n in TABLE if k == kind))


def driver(kind: str, name: str) -> Any:
    """The class or factory of a driver.

    Raises:
        DriverNotFound: no such name.
        DriverNotInstalled: a package that the driver imports is missing.
    """
    entry = TABLE.get((kind, name))
    if entry is None:
        raise DriverNotFound(kind, name, names(kind))
    module, attribute = entry.target.split(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except ModuleNotFoundError as error:
        missing = error.name or module
        if missing.startswith("llmos"):
            raise
        raise DriverNotInstalled(kind, name, missing, entry.install) from error
