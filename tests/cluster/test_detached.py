"""A detached kernel: its own actor is killed, and everything comes back from the store."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import programs as p
import psutil
import pytest

from llmos.kernel.client import Kernel
from llmos.kernel.cluster import ClusterError
from llmos.kernel.settings import Settings
from llmos.kernel.system import SystemConfig

pytestmark = pytest.mark.cluster

SYSTEM = """
[system]
name = "detached"
[models.chat]
source = "built-in"
engine = "echo"
"""


@pytest.fixture
def detached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Kernel]:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    system = SystemConfig.parse(SYSTEM, "system.toml", tmp_path)
    kernel = Kernel.boot(system, settings=Settings(home=tmp_path), detached=True)
    yield kernel
    kernel.shutdown()


def test_a_killed_kernel_comes_back_with_its_agents_and_their_state(detached: Kernel) -> None:
    agent = detached.launch(p.Worker, tenant="acme")
    assert detached.ask(agent, p.Count(by=5), p.Counted).total == 5
    for process in psutil.process_iter(["cmdline"]):
        if "ray::KernelServer" in " ".join(process.info["cmdline"] or []):
            process.kill()
    assert detached.ask(agent, p.Count(by=1), p.Counted, deadline_s=90).total == 6
    assert [a["agent"] for a in detached.ps()] == [agent]


def test_a_system_runs_once_and_is_found_by_its_name(detached: Kernel, tmp_path: Path) -> None:
    settings = Settings(home=tmp_path)
    with pytest.raises(ClusterError, match="connected to Ray already"):
        Kernel.connect("detached", settings=settings)
    with pytest.raises(ClusterError, match="No kernel of system 'other'"):
        detached.aio._cluster.find("other")
    assert detached.system == "detached"
