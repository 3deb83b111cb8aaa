"""How a system is: what the kernel actor tells of it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from llmos.drivers.errors import LlmosError
from llmos.drivers.protocols import DeviceInfo, EngineStatistics, StepTime
from llmos.drivers.stores.rows import AgentRow
from llmos.kernel.core.errors import KernelError
from llmos.kernel.core.slots import SlotState
from llmos.kernel.core.state import KernelCore
from llmos.kernel.core.types import ProcessKind
from llmos.kernel.manifest import Manifest
from llmos.kernel.metrics import (
    AGENTS,
    LEDGER,
    MEMORY,
    PREDICTION,
    SLOT,
    Exported,
    MetricsEndpoint,
    export,
    render,
)
from llmos.kernel.nodes import Nodes
from llmos.kernel.remote import Handle, ProcessGone, answers, call
from llmos.kernel.system import AgentTable, SystemConfig
from llmos.kernel.usage import RATE_S, WINDOW_S, joined

log = logging.getLogger("llmos.kernel")

PAGE = 1_000
"""Rows of agents read at a time."""
GLANCE_S = 1.5
"""Longest wait for one process's figures: who looks every second wants them now."""
MAX_COUNTED = 2_000
"""Agents of one program are counted up to here: who lists them waits for it."""


class Looking:
    """Mixed into the kernel actor."""

    _core: KernelCore
    _system: SystemConfig
    _run: Path
    _started_at: float
    _handles: dict[str, Handle]
    _kinds: dict[str, ProcessKind]
    _infos: dict[str, DeviceInfo]
    _nodes: Nodes
    _model_errors: dict[str, LlmosError]
    _manifests: dict[str, Manifest]
    _programs: dict[str, AgentTable]
    _endpoint: MetricsEndpoint | None

    async def _booted(self) -> None:
        raise NotImplementedError

    async def _read(self, method: str, *args: Any, **options: Any) -> Any:
        raise NotImplementedError

    # -- agents

    def _agent(self, agent: str) -> dict[str, Any]:
        entry = self._core.agents[agent]
        table = self._programs.get(agent)
        manifest = self._manifests.get(agent)
        return {
            "agent": agent,
            "program": table.program if table else "",
            "state": entry.state.value,
            "host": self._host_of(agent),
            "models": list(entry.models),
            "capabilities": list(manifest.capabilities) if manifest else [],
            "description": manifest.description if manifest else "",
        }

    def _host_of(self, agent: str) -> str:
        """Where an agent is now; empty while it is nowhere, and for a pattern."""
        if agent.endswith("/*"):
            return ""
        with contextlib.suppress(LlmosError):
            route = self._core.route(agent)
            return route[0] if route is not None else ""
        return ""

    @answers
    async def ps(self) -> list[dict[str, Any]]:
        """All launches; of those of any key how many agents there are, and which are held."""
        await self._booted()
        held: list[AgentRow] = await self._held()
        rows = []
        for agent in sorted(self._core.agents):
            row = self._agent(agent)
            if agent.endswith("/*"):
                row["keys"], row["all_counted"] = await self._count(agent[:-1])
                row["held"] = [h.agent for h in held if h.agent.startswith(agent[:-1])]
            else:
                row["held"] = [f"{h.agent}: {h.hold}" for h in held if h.agent == agent]
            rows.append(row)
        return rows

    async def _held(self) -> list[AgentRow]:
        found: list[AgentRow] = await self._read("agents", limit=PAGE, held=True)
        return found

    async def _count(self, prefix: str) -> tuple[int, bool]:
        """Agents whose names begin so, and whether that is all of them."""
        count, after = 0, prefix
        while count < MAX_COUNTED:
            rows: list[AgentRow] = await self._read("agents", after=after, limit=PAGE)
            mine = [row for row in rows if row.agent.startswith(prefix)]
            count += len(mine)
            if len(mine) < PAGE:
                return count, True
            after = rows[-1].agent
        return count, False

    @answers
    async def status(self) -> dict[str, Any]:
        """Processes, devices with memory by owner, slots, knowledge."""
        await self._booted()
        return await self._status()

    async def _status(self) -> dict[str, Any]:
        core = self._core
        knowledge: dict[str, Any] = {"corpora": {}, "graphs": {}}
        statistics: dict[str, Any] = {}
        for name, handle in list(self._handles.items()):
            try:
                if name == "knowledge":
                    knowledge = await call(handle.status.remote(), name, 5.0)
                elif self._kinds[name] in (ProcessKind.HOST, ProcessKind.DEVICE):
                    statistics[name] = await call(handle.statistics.remote(), name, 5.0)
            except LlmosError as error:
                log.warning("status of %s: %s", name, error)
        return {
            "system": self._system.system.name,
            "started_at": self._started_at,
            "run": str(self._run),
            "processes": [
                {
                    "name": p.name,
                    "state": p.state.value,
                    "incarnation": p.incarnation,
                    "pid": statistics.get(p.name, {}).get("pid"),
                    "node": self._nodes.of(p.name),
                    "address": self._nodes.address(self._nodes.of(p.name)),
                    "reason": p.reason,
                }
                for p in core.processes.values()
            ],
            "devices": [
                {
                    "name": name,
                    "kind": spec.kind,
                    "product": self._infos[name].product,
                    "threads": spec.threads,
                    "capacity_bytes": spec.capacity_bytes,
                    "free_bytes": core.ledger.free_bytes(name),
                    "used_bytes": statistics.get(f"device:{name}", {}).get("used_bytes"),
                    "owners": {
                        o: {"reserved": r.reserved_bytes, "measured": r.committed_bytes}
                        for o, r in core.ledger.accounts[name].reservations.items()
                    },
                }
                for name, spec in core.devices.items()
            ],
            "slots": [
                {
                    "model": s.name,
                    "source": self._system.models[s.name].origin,
                    "state": s.state.value,
                    "device": s.device,
                    "threads": s.threads,
                    "predicted_bytes": s.size_bytes,
                    "measured_bytes": s.measured_bytes,
                    "predicted": dict(s.predicted),
                    "measured": None if s.measured is None else dict(s.measured),
                    "prediction_error": s.prediction_error,
                    "users": len(s.users),
                    "error": str(s.error) if s.error else None,
                    "statistics": _statistics(
                        statistics.get(f"device:{s.device}", {}).get("slots", {}).get(s.name)
                    ),
                }
                for s in core.slots.values()
            ],
            "missing_models": {n: str(e) for n, e in self._model_errors.items()},
            "knowledge": knowledge,
            "hosts": {n: s for n, s in statistics.items() if n.startswith("host")},
            "agents": len(core.agents),
            "kernel_node": self._nodes.kernel,
            "nodes": await self._nodes.table(),
            "metrics_port": self._endpoint.port if self._endpoint else None,
        }

    @answers
    async def top(self) -> dict[str, Any]:
        """What is used now, by whom; of a process that does not answer at once nothing."""
        await self._booted()
        core = self._core
        asked = [
            n for n in self._handles if self._kinds[n] in (ProcessKind.HOST, ProcessKind.DEVICE)
        ]
        answers = await asyncio.gather(*(self._glance(name) for name in asked))
        figures = dict(zip(asked, answers, strict=True))
        usage = joined([f["usage"] for f in figures.values() if "usage" in f])
        tenants = self._system.tenants
        used = usage["tenants"]
        for tenant in {a.split("/", 1)[0] for a in core.agents} | set(tenants):
            used.setdefault(tenant, {"read": 0, "written": 0, "under_way": 0})
        tokens = sum(u["read"] + u["written"] for u in used.values())
        return {
            "system": self._system.system.name,
            "uptime_s": max(0.0, time.time() - self._started_at),
            "policy": self._system.scheduler.policy,
            "window_s": WINDOW_S,
            "rate_s": RATE_S,
            "devices": [
                {
                    "name": name,
                    "product": self._infos[name].product,
                    "state": core.processes[f"device:{name}"].state.value,
                    "capacity_bytes": spec.capacity_bytes,
                    "free_bytes": core.ledger.free_bytes(name),
                    "used_bytes": figures.get(f"device:{name}", {}).get("used_bytes"),
                    "utilisation": figures.get(f"device:{name}", {}).get("utilisation"),
                    "owners": {
                        o: r.held_bytes for o, r in core.ledger.accounts[name].reservations.items()
                    },
                }
                for name, spec in core.devices.items()
            ],
            "slots": [
                {
                    "model": slot.name,
                    "kind": self._system.models[slot.name].kind,
                    "state": slot.state.value,
                    "device": slot.device,
                    "error": str(slot.error) if slot.error else None,
                    **_rates(slot.name, figures.get(f"device:{slot.device}", {}), usage["rates"]),
                }
                for slot in core.slots.values()
            ],
            "missing_models": {n: str(e) for n, e in self._model_errors.items()},
            "tenants": [
                {
                    "tenant": name,
                    "weight": tenants[name].weight if name in tenants else 1.0,
                    **counts,
                    "share": (counts["read"] + counts["written"]) / tokens if tokens else 0.0,
                    "tokens_per_minute": tenants[name].tokens_per_minute
                    if name in tenants
                    else None,
                    "concurrent_requests": tenants[name].concurrent_requests
                    if name in tenants
                    else None,
                }
                for name, counts in sorted(
                    used.items(), key=lambda u: (-u[1]["read"] - u[1]["written"], u[0])
                )
            ],
            "agents": usage["agents"],
            "hosts": [
                {
                    "name": p.name,
                    "state": p.state.value,
                    **{k: figures.get(p.name, {}).get(k) for k in ("active", "running", "waiting")},
                }
                for p in core.processes.values()
                if p.kind is ProcessKind.HOST
            ],
            "launched": len(core.agents),
        }

    async def _glance(self, name: str) -> dict[str, Any]:
        handle = self._handles.get(name)
        if handle is None:
            return {}
        try:
            found: dict[str, Any] = await call(handle.statistics.remote(), name, GLANCE_S)
        except LlmosError as error:
            log.debug("a glance at %s: %s", name, error)
            return {}
        return found

    @answers
    async def knowledge(self) -> dict[str, Any]:
        """Corpora and graphs: what is ready, and how far the others are.

        Raises:
            ProcessGone: the knowledge process is being restarted.
        """
        await self._booted()
        handle = self._handles.get("knowledge")
        if handle is None:
            raise ProcessGone("knowledge", "it is being restarted", final=False)
        found: dict[str, Any] = await call(handle.status.remote(), "knowledge", 10.0)
        return found

    async def metrics(self) -> str:
        """Prometheus text of all processes."""
        return render(await self._exports())

    async def _exports(self) -> list[Exported]:
        exports: list[Exported] = [export("kernel")]
        for name, handle in list(self._handles.items()):
            with contextlib.suppress(LlmosError):
                exports.append(await call(handle.metrics.remote(), name, 5.0))
        return exports

    def _serve_metrics(self, port: int) -> None:
        loop = asyncio.get_running_loop()

        def gather() -> list[Exported]:
            return asyncio.run_coroutine_threadsafe(self._exports(), loop).result(30.0)

        try:
            self._endpoint = MetricsEndpoint(port, gather)
        except OSError as error:
            raise KernelError(
                f"metrics_port = {port}: {error}", remedy="Choose another port, or 0 for a free one"
            ) from None
        log.info("metrics at http://127.0.0.1:%d/metrics", self._endpoint.port)

    def _measure(self) -> None:
        MEMORY.clear()
        LEDGER.clear()
        for device, account in self._core.ledger.accounts.items():
            for owner, reservation in account.reservations.items():
                MEMORY.labels(device=device, owner=owner).set(reservation.held_bytes)
                reserved = LEDGER.labels(device=device, owner=owner, kind="reserved")
                reserved.set(reservation.reserved_bytes)
                if reservation.committed_bytes is not None:
                    measured = LEDGER.labels(device=device, owner=owner, kind="measured")
                    measured.set(reservation.committed_bytes)
            MEMORY.labels(device=device, owner="free").set(account.free_bytes)
        PREDICTION.clear()
        for slot in self._core.slots.values():
            for state in SlotState:
                SLOT.labels(model=slot.name, state=state.value).set(slot.state is state)
            if slot.prediction_error is not None:
                PREDICTION.labels(model=slot.name).set(slot.prediction_error)
        counts: dict[str, int] = {}
        for entry in self._core.agents.values():
            counts[entry.state.value] = counts.get(entry.state.value, 0) + 1
        for name in ("pending", "ready"):
            AGENTS.labels(state=name).set(counts.get(name, 0))


def _statistics(statistics: Any) -> dict[str, Any] | None:
    return asdict(statistics) if statistics is not None else None


def _rates(model: str, device: dict[str, Any], rates: dict[str, Any]) -> dict[str, Any]:
    """A slot's counters, tokens per second, and the seconds of a step as it runs now."""
    statistics: EngineStatistics | None = device.get("slots", {}).get(model)
    step: StepTime | None = device.get("step_times", {}).get(model)
    step_s = None
    if step is not None and statistics is not None and statistics.running:
        step_s = step.predict_s(statistics.running, statistics.kv_tokens_used, 0)
    rate = rates.get(model, {"read_per_s": 0.0, "written_per_s": 0.0})
    return {"statistics": _statistics(statistics), "step_s": step_s, **rate}
