"""Several nodes: where processes are, losing a node, draining one, restarting the head."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from llmos.kernel import cluster, nodes
from llmos.kernel.client import Kernel
from llmos.kernel.cluster import Token
from llmos.kernel.core.errors import NodeNeeded, UnknownNode
from llmos.kernel.core.placement import Node
from llmos.kernel.settings import Settings
from llmos.kernel.system import SystemConfig
from tests.cluster.noting import PROGRAM, Load, all_serve
from tests.cluster.raylets import Raylets, free_port
from tests.drivers.stores.conftest import database as database
from tests.drivers.stores.conftest import postgres as postgres

# Several Rays at a time: on a machine that is busy each takes its time.
pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(600)]

SYSTEM = """
[system]
name = "nodes"
[[devices]]
driver = "cpu"
memory = "1GiB"
threads = 1
[hosts]
count = {hosts}
[store]
{store}
"""
KEYS = [f"k{n}" for n in range(6)]
AGENTS = [f"t/noting/{key}" for key in KEYS]


def system_file(folder: Path, *, hosts: int = 2, store: str = 'driver = "sqlite"') -> Path:
    file = folder / "system.toml"
    agents = f'[[agents]]\nprogram = "{PROGRAM}"\ntenant = "t"\nkey = "*"\n'
    agents += f'config = {{ begun = "{folder}/begun" }}\n'
    file.write_text(SYSTEM.format(hosts=hosts, store=store) + agents)
    return file


@pytest.fixture
def no_token(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """This process and all that it starts talk to Ray without a token."""
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH", raising=False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    Token._reread()
    yield
    monkeypatch.undo()
    Token._reread()


def listed() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    return found


def places(kernel: Kernel) -> dict[str, str]:
    """Name of the node of each process that runs."""
    known = {n["NodeID"]: n["NodeName"] for n in listed()}
    processes = kernel.status()["processes"]
    return {p["name"]: known[p["node"]] for p in processes if p["node"]}


def id_of(name: str) -> str:
    return next(str(n["NodeID"]) for n in listed() if n["NodeName"] == name and n["Alive"])


def report(text: str) -> None:
    print(text)
    if path := os.environ.get("LLMOS_TEST_TIMES"):
        with Path(path).open("a") as file:
            file.write(f"{text}\n")


def apart(monkeypatch: pytest.MonkeyPatch, kernel: str, home: str) -> None:
    """Have the kernel near one node and the store's file on another, as it is when the kernel
    had to be started again elsewhere."""

    def node(name: str) -> Node:
        found = next(n for n in listed() if n["NodeName"] == name)
        return Node(found["NodeID"], found["NodeManagerAddress"], found["NodeManagerPort"])

    monkeypatch.setattr(nodes, "here", lambda: node(home))
    monkeypatch.setattr(
        cluster,
        "NodeAffinitySchedulingStrategy",
        lambda id, soft: NodeAffinitySchedulingStrategy(node(kernel).id, soft),
    )


def test_hosts_are_spread_and_a_node_is_drained_and_another_lost(
    no_token: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    apart(monkeypatch, kernel="head", home="one")
    raylets = Raylets()
    try:
        raylets.head()
        raylets.worker("one")
        raylets.worker("two")
        file = SystemConfig.read(system_file(tmp_path))
        settings = Settings(home=tmp_path / "home", log_level="DEBUG")
        with Kernel.boot(file, address=raylets.address, settings=settings) as kernel:
            spread(kernel)
            drain(kernel, raylets, tmp_path / "begun")
            lose(kernel, raylets)
    finally:
        raylets.close()


def spread(kernel: Kernel) -> None:
    at = places(kernel)
    assert {at["host:0"], at["host:1"]} == {"one", "two"}
    assert at["knowledge"] == at["device:cpu:0"] == "head"
    assert at["journal"] == "one"
    status = kernel.status()
    assert status["kernel_node"] == id_of("head")
    (address,) = {p["address"] for p in status["processes"]}
    assert {n["address"] for n in status["nodes"]} == {address}
    assert sum(len(n["processes"]) for n in status["nodes"]) == len(status["processes"])


def drain(kernel: Kernel, raylets: Raylets, begun_file: Path) -> None:
    """Nothing is lost, no turn is cut off, and nothing of ours is left."""
    with pytest.raises(NodeNeeded) as refused:
        kernel.operator.drain(id_of("head")[:12])
    assert set(refused.value.processes) == {"kernel", "device:cpu:0"}
    with pytest.raises(UnknownNode) as unknown:
        kernel.operator.drain("nowhere")
    assert len(unknown.value.known) == 3
    with pytest.raises(UnknownNode) as several:
        kernel.operator.drain(kernel.status()["nodes"][0]["address"])
    assert len(several.value.meant) == 3
    # Turns that take a while: one that was cut off would begin again.
    load = Load(kernel, AGENTS, seconds=0.3)
    load.wait(3)
    began = time.monotonic()
    kernel.operator.drain(id_of("one")[:12])
    took = time.monotonic() - began
    until = time.monotonic() + 5  # Killed processes take a moment to be gone.
    while raylets.ours("one") and time.monotonic() < until:
        time.sleep(0.1)
    assert raylets.ours("one") == []
    load.wait(3)
    count = load.stop()
    load.check()
    at = places(kernel)
    assert "one" not in at.values()
    # The file is where it was: the other nodes are on the same machine.
    assert at["journal"] in ("head", "two")
    assert sorted(name for name in at if name.startswith("host:")) in (
        ["host:0", "host:2"],
        ["host:1", "host:2"],
    )
    assert [n["drained"] for n in kernel.status()["nodes"] if n["id"] == id_of("one")] == [True]
    begun = begun_file.read_text().splitlines()
    assert len(begun) == len(set(begun)) == count
    report(f"drain of a node with a host and the journal: {took:.1f} s, {count} messages meanwhile")


def lose(kernel: Kernel, raylets: Raylets) -> None:
    """The raylet and workers of a node with a host are killed while messages are told."""
    before = {p["name"]: p["incarnation"] for p in kernel.status()["processes"]}
    load = Load(kernel, [f"{agent}-lost" for agent in AGENTS])
    load.wait(10)
    assert "two" in places(kernel).values()
    raylets.kill("two")
    took = all_serve(kernel, list(load.acknowledged))
    load.wait(10)
    count = load.stop()
    load.check()
    status = kernel.status()
    lost = [p for p in status["processes"] if p["incarnation"] > before[p["name"]]]
    assert any(p["name"].startswith("host:") for p in lost)
    assert "two" not in places(kernel).values()
    report(f"lost node with a host: all agents serve after {took:.1f} s, {count} messages")


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[str]:
    """A real Redis of our own; its address."""
    server = shutil.which("redis-server")
    if server is None:
        pytest.skip("no redis-server on the PATH (Debian: apt-get install redis-server)")
    port = free_port()
    process = subprocess.Popen(
        [server, "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", str(tmp_path)],
        stdout=subprocess.DEVNULL,
    )
    try:
        yield f"127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(10)


def boot_at(raylets: Raylets, node: str, home: Path, file: Path) -> None:
    """Boot a detached kernel near a node, by a driver that has gone when this returns."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.cluster.boot_at", raylets.address, node, home, file],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "t/noting/*" in done.stdout


@pytest.mark.chaos
def test_the_head_is_restarted_and_then_the_node_of_kernel_and_journal_is_lost(
    no_token: None, redis: str, database: Callable[[], str], tmp_path: Path
) -> None:
    """With GCS fault tolerance, and PostgreSQL as the store."""
    file = system_file(tmp_path, store=f'driver = "postgres"\nurl = "{database()}"')
    settings = Settings(home=tmp_path / "home", log_level="DEBUG")
    raylets = Raylets(redis)
    kernel: Kernel | None = None
    try:
        raylets.head()
        raylets.worker("one")
        raylets.worker("two")
        boot_at(raylets, "one", tmp_path / "home", file)
        with Kernel.connect("nodes", address=raylets.address, settings=settings) as first:
            at = places(first)
            assert at["journal"] == "one"
            load = Load(first, AGENTS)
            load.wait(3)
            load.stop()
            before = {p["name"]: (p["incarnation"], p["pid"]) for p in first.status()["processes"]}
        on_head = {name for name, node in at.items() if node == "head"}

        raylets.kill("head")
        began = time.monotonic()
        raylets.head()
        kernel = Kernel.connect("nodes", address=raylets.address, settings=settings)
        all_serve(kernel, AGENTS)
        took = time.monotonic() - began
        load.check(kernel)
        after = {p["name"]: (p["incarnation"], p["pid"]) for p in kernel.status()["processes"]}
        for name in before.keys() - on_head:
            assert after[name] == before[name], name
        report(f"head killed and started again: all agents serve {took:.1f} s after the start")

        lose_the_kernels_node(kernel, raylets)
        kernel.shutdown()
        kernel = None
    finally:
        if kernel is not None:
            kernel.close()
        raylets.close()


def lose_the_kernels_node(kernel: Kernel, raylets: Raylets) -> None:
    """With it goes the journal: all comes back elsewhere from the database."""
    load = Load(kernel, [f"{agent}-lost" for agent in AGENTS])
    load.wait(10)
    assert places(kernel)["journal"] == "one"
    raylets.kill("one")
    took = all_serve(kernel, list(load.acknowledged))
    load.wait(10)
    count = load.stop()
    load.check()
    assert "one" not in places(kernel).values()
    report(
        f"lost node of kernel and journal: all agents serve after {took:.1f} s, {count} messages"
    )


@pytest.mark.chaos
def test_a_node_that_was_cut_off_and_comes_back_commits_nothing(
    no_token: None, tmp_path: Path
) -> None:
    """Its host wakes up in the middle of turns that others have meanwhile."""
    raylets = Raylets()
    stopped: list[psutil.Process] = []
    try:
        raylets.head()
        raylets.worker("one")
        raylets.worker("two")
        file = SystemConfig.read(system_file(tmp_path))
        settings = Settings(home=tmp_path / "home", log_level="DEBUG")
        with Kernel.boot(file, address=raylets.address, settings=settings) as kernel:
            load = Load(kernel, AGENTS, seconds=0.05)
            load.wait(20)
            assert "two" in places(kernel).values()
            stopped = raylets.stop("two")
            took = all_serve(kernel, AGENTS)
            load.wait(20)
            for process in stopped:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.resume()
            load.wait(100)
            count = load.stop()
            load.check()
            report(
                f"cut-off node with a host: all agents serve after {took:.1f} s, {count} messages"
            )
    finally:
        raylets.close()
