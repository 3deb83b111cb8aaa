"""A Ray of several nodes on this machine, each ended as a lost machine ends: all at once."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

RAY = str(Path(sys.executable).parent / "ray")
START_S = 60.0
HEALTH_CHECKS = {
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "1500",
    "RAY_health_check_failure_threshold": "3",
}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Raylets:
    """A head and workers, by name. Each is a ``ray start`` of its own with all it starts."""

    def __init__(self, redis: str | None = None) -> None:
        # Short: sockets live below it, and their paths have a limit.
        self.temp = Path(tempfile.mkdtemp(prefix="llmos-r-"))
        self.port = free_port()
        self.address = f"127.0.0.1:{self.port}"
        self._environment = {
            **os.environ,
            **HEALTH_CHECKS,
            "RAY_AUTH_MODE": "disabled",
            "PYTHONPATH": os.getcwd(),
        }
        if redis is not None:
            self._environment["RAY_REDIS_ADDRESS"] = redis
        self._processes: dict[str, subprocess.Popen[bytes]] = {}

    def head(self, name: str = "head") -> None:
        # Its note of the last cluster; with workers of that on the same machine it would take
        # it for running. On a machine of its own the head finds none.
        (self.temp / "ray_current_cluster").unlink(missing_ok=True)
        self._start(
            name,
            "--head",
            f"--port={self.port}",
            "--include-dashboard=false",
            f"--temp-dir={self.temp}",
        )

    def worker(self, name: str) -> None:
        self._start(name, f"--address={self.address}")

    def _start(self, name: str, *options: str) -> None:
        log = (self.temp / f"{name}.log").open("wb")
        self._processes[name] = subprocess.Popen(
            [
                RAY,
                "start",
                "--block",
                "--disable-usage-stats",
                f"--node-name={name}",
                "--num-cpus=2",
                f"--object-store-memory={100 << 20}",
                # Several on one machine: no port is theirs by default.
                "--min-worker-port=0",
                "--max-worker-port=0",
                f"--dashboard-agent-listen-port={free_port()}",
                *options,
            ],
            env=self._environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        log.close()
        until = time.monotonic() + START_S
        while "Ray runtime started" not in self.said(name):
            assert self._processes[name].poll() is None, self.said(name)
            assert time.monotonic() < until, self.said(name)
            time.sleep(0.1)
        assert "error" not in self.said(name).lower(), self.said(name)

    def said(self, name: str) -> str:
        return (self.temp / f"{name}.log").read_text(errors="replace")

    def processes(self, name: str) -> list[psutil.Process]:
        """All of a node."""
        with contextlib.suppress(psutil.NoSuchProcess):
            first = psutil.Process(self._processes[name].pid)
            return [first, *first.children(recursive=True)]
        return []

    def ours(self, name: str) -> list[str]:
        """What of LLM OS runs on a node."""
        found = []
        for process in self.processes(name):
            with contextlib.suppress(psutil.NoSuchProcess):
                title = " ".join(process.cmdline())
                if title.startswith("ray::") and "Server" in title:
                    found.append(title.split(".")[0].split(" ")[0])
        return sorted(found)

    def kill(self, name: str) -> None:
        """SIGKILL for the node's raylet and everything below it."""
        for process in self.processes(name):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self._processes.pop(name).wait(10)

    def stop(self, name: str) -> list[psutil.Process]:
        """SIGSTOP for all of a node: to the others it is cut off; returns what was stopped."""
        found = self.processes(name)
        for process in found:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.suspend()
        return found

    def close(self) -> None:
        running = [p for name in self._processes for p in self.processes(name)]
        for process in self._processes.values():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
        _, alive = psutil.wait_procs(running, 5.0)
        for left in alive:
            with contextlib.suppress(psutil.NoSuchProcess):
                left.kill()
        for started in self._processes.values():
            started.wait(10)
        shutil.rmtree(self.temp, ignore_errors=True)
