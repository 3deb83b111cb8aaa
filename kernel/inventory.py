"""What a system finds on its machine: devices, and models whose files are there."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from llmos.drivers.devices.precision import Precision, resolve_precision
from llmos.drivers.errors import LlmosError
from llmos.drivers.models.footprint import predict_footprint
from llmos.drivers.models.store import ModelStore
from llmos.drivers.protocols import DeviceInfo
from llmos.kernel.core.types import ModelSpec
from llmos.kernel.settings import Settings
from llmos.kernel.system import SystemConfig

log = logging.getLogger("llmos.kernel")


class Inventory:
    """Mixed into the kernel actor."""

    _system: SystemConfig
    _settings: Settings
    _infos: dict[str, DeviceInfo]
    _digests: dict[str, str]
    _paths: dict[str, Path]
    _dtypes: dict[str, Precision]
    _model_errors: dict[str, LlmosError]

    def _find_devices(self) -> list[DeviceInfo]:
        from llmos.drivers.devices.discover import discover
        from llmos.drivers.errors import DeviceUnavailable

        found = {i.name: i for i in discover()}
        if not self._system.devices:
            infos = list(found.values())
        else:
            infos = []
            for table in self._system.devices:
                info = found.get(table.name)
                if info is None:
                    raise DeviceUnavailable(
                        table.name, "this machine has none", remedy="Devices: " + ", ".join(found)
                    )
                infos.append(
                    DeviceInfo(
                        name=info.name,
                        kind=info.kind,
                        total_bytes=info.total_bytes,
                        budget_bytes=int(table.memory or info.budget_bytes),
                        threads=table.threads or info.threads,
                        product=info.product,
                        compute_capability=info.compute_capability,
                    )
                )
        self._infos = {i.name: i for i in infos}
        return infos

    def _find_models(self) -> list[ModelSpec]:
        """Models whose files are there; what is wrong with the others is kept for who asks."""
        store = ModelStore(self._settings.models_dir)
        embedders = {c.embedder for c in self._system.corpora.values()}
        specs = []
        for name, table in self._system.models.items():
            size, predicted = 0, dict[str, int]()
            threads, place = table.threads, table.device
            if table.needs_files:
                try:
                    files = store.get(table.source)
                except LlmosError as error:
                    self._model_errors[name] = error
                    log.error("model %s: %s", name, error)
                    continue
                self._digests[name], self._paths[name] = files.digest, files.path
                info = self._infos.get(table.device or "") or self._default_device()
                self._dtypes[name] = resolve_precision(table.dtype, table.engine, info)
                footprint = predict_footprint(
                    files.path,
                    kind=table.kind,
                    dtype=self._dtypes[name],
                    kv_tokens=table.kv_tokens,
                    max_batch_tokens=table.max_batch_tokens,
                    max_batch_texts=table.max_batch_texts,
                    max_adapters=table.max_adapters,
                    max_adapter_rank=table.max_adapter_rank,
                    weights=table.weights,
                    device=info.kind,
                )
                size, predicted = footprint.total_bytes, footprint.by_purpose
            elif table.remote is not None:
                try:
                    table.remote.options(name, os.environ)
                except LlmosError as error:
                    self._model_errors[name] = error
                    log.error("model %s: %s", name, error)
                    continue
                # Nobody but the server knows what weights it has.
                self._digests[name] = f"remote:{table.remote.model}@{table.remote.url}"
                if table.remote.tokenizer is not None:
                    self._paths[name] = self._system.at(table.remote.tokenizer)
                # It computes elsewhere: a CPU's process will do, and no GPU's is troubled.
                cpus = [i.name for i in self._infos.values() if i.kind == "cpu"]
                threads, place = 1, table.device or next(iter(cpus), None)
            else:
                self._digests[name] = table.engine
            specs.append(
                ModelSpec(
                    name=name,
                    kind=table.kind,
                    size_bytes=size,
                    pinned=name in embedders,
                    threads=threads,
                    device=place,
                    predicted=predicted,
                )
            )
        return specs

    def _default_device(self) -> DeviceInfo:
        """Where a model goes that is not told where: to a GPU if there is one."""
        return max(self._infos.values(), key=lambda i: (i.kind == "cuda", i.budget_bytes))
