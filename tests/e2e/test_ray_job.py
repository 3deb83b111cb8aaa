"""``ray job submit -- llmos run …`` against a ``ray start --head`` with the dashboard."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.conftest import EXAMPLE

pytestmark = [pytest.mark.cluster, pytest.mark.models, pytest.mark.slow]

RAY = str(Path(sys.executable).parent / "ray")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def head(environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a dashboard; the head is a process group of its own, ended as one."""
    port = free_port()
    # Short: sockets live below it, and their paths have a limit.
    temp = tmp_path_factory.mktemp("r")
    environment |= {
        "RAY_AUTH_MODE": "disabled",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    process = subprocess.Popen(
        [
            RAY,
            "start",
            "--head",
            "--block",
            f"--port={free_port()}",
            f"--dashboard-port={port}",
            f"--temp-dir={temp}",
            "--num-cpus=2",
        ],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    address = f"http://127.0.0.1:{port}"
    try:
        until = time.monotonic() + 60
        while True:
            try:
                with urllib.request.urlopen(f"{address}/api/version", timeout=2):
                    break
            except (urllib.error.URLError, OSError):
                assert process.poll() is None
                assert time.monotonic() < until
                time.sleep(0.3)
        yield address
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)


def test_a_job_boots_in_the_cluster_answers_and_ends(
    head: str, environment: dict[str, str]
) -> None:
    done = subprocess.run(
        [
            RAY,
            "job",
            "submit",
            f"--address={head}",
            "--working-dir=.",
            "--",
            "llmos",
            "run",
            "system.toml",
            "--ask",
            "bank/customer-service/main=My card was stolen, what now?",
        ],
        cwd=EXAMPLE,
        env=environment,
        capture_output=True,
        text=True,
        timeout=150,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "decision: escalate" in done.stdout
    assert "1 answered, 0 failed" in done.stdout
