"""A detached kernel: its own actor is killed, and everything comes back from the store."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from llmos.kernel.client import Kernel
from llmos.kernel.cluster import ClusterError
from llmos.kernel.settings import Settings
from llmos.kernel.system import SystemConfig
from tests.cluster import programs as p
from tests.cluster.conftest import own_processes

pytestmark = pytest.mark.cluster

SYSTEM = """
[system]
name = "detached"
[models.chat]
source = "built-in"
engine = "echo"
"""


@pytest.fixture
def detached(tmp_path: Path) -> Iterator[Kernel]:
    system = SystemConfig.parse(SYSTEM, "system.toml", tmp_path)
    kernel = Kernel.boot(system, settings=Settings(home=tmp_path), detached=True)
    yield kernel
    kernel.shutdown()


def test_a_killed_kernel_comes_back_with_its_agents_and_their_state(detached: Kernel) -> None:
    agent = detached.launch(p.Worker, tenant="acme")
    assert detached.ask(agent, p.Count(by=5), p.Counted).total == 5
    (kernel,) = own_processes("ray::KernelServer")
    hosts = {p.pid for p in own_processes("ray::HostServer")}
    kernel.kill()
    # It boots without being asked: timers are due and mail waits.
    until = time.monotonic() + 60
    while not {p.pid for p in own_processes("ray::HostServer")} - hosts:
        assert time.monotonic() < until
        time.sleep(0.2)
    # Counts nothing: the answer of a host that dies with its kernel is asked for again, and
    # only the journal's deduplication (a later step) will make that count once.
    assert detached.ask(agent, p.Count(by=0), p.Counted, deadline_s=90).total == 5
    assert [a["agent"] for a in detached.ps()] == [agent]


def test_the_file_counts_at_the_next_boot_and_the_state_is_kept(tmp_path: Path) -> None:
    declared = SYSTEM + '[[agents]]\nprogram = "tests.cluster.programs:Worker"\ntenant = "acme"\n'
    settings = Settings(home=tmp_path)
    with Kernel.boot(SystemConfig.parse(declared, "s", tmp_path), settings=settings) as kernel:
        kernel.ask("acme/worker/main", p.Count(by=3))
    changed = declared + 'config = { peer = "acme/*" }\n'
    with Kernel.boot(SystemConfig.parse(changed, "s", tmp_path), settings=settings) as kernel:
        assert kernel.ask("acme/worker/main", p.Count(by=0), p.Counted).total == 3
        (agent,) = kernel.ps()
        assert "ask:acme/*" in agent["capabilities"]


def test_a_system_runs_once_and_is_found_by_its_name(detached: Kernel, tmp_path: Path) -> None:
    settings = Settings(home=tmp_path)
    with pytest.raises(ClusterError, match="connected to Ray already"):
        Kernel.connect("detached", settings=settings)
    with pytest.raises(ClusterError, match="No kernel of system 'other'"):
        detached.aio._cluster.find("other")
    assert detached.system == "detached"
