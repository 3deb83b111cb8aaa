"""The client's own part, without Ray: interrupts, cancellation, checks, the run file."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llmos.drivers.errors import LlmosError
from llmos.kernel import client
from llmos.kernel.client import AsyncKernel, InvalidLaunch, Kernel, _Runner
from llmos.kernel.cluster import Cluster, ClusterError, RunFile, Token, started_at
from llmos.kernel.settings import Settings, SettingsError


@pytest.fixture(autouse=True)
def _ctrl_c() -> Iterator[None]:
    """Heard, too, where the tests were started in the background, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


class SlowRay(Cluster):
    """A Ray that takes its time, and knows whether it runs."""

    def __init__(self, starts: bool = True) -> None:
        super().__init__(None, None)
        self.begun, self.go_on = threading.Event(), threading.Event()
        self.starts = starts
        self.stops = 0

    def begin(self, *_: Any) -> Cluster:
        self.begun.set()
        assert self.go_on.wait(10)
        if not self.starts:
            raise ClusterError("no")
        return self

    def stop(self) -> None:
        self.stops += 1


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> SlowRay:
    made = SlowRay()
    monkeypatch.setattr(Cluster, "start", made.begin)
    return made


@pytest.fixture
def runner() -> Iterator[_Runner]:
    made = _Runner()
    yield made
    made.close()


def interrupt(after: threading.Event, times: int = 1) -> threading.Thread:
    """Send this process SIGINT once something has happened."""

    def send() -> None:
        assert after.wait(10)
        for _ in range(times):
            time.sleep(0.1)
            os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=send)
    thread.start()
    return thread


# ------------------------------------------------------------------ cancelled boots


@pytest.mark.parametrize("cancellations", [1, 3])
@pytest.mark.parametrize("connecting", [False, True])
async def test_a_ray_that_starts_after_a_cancellation_is_stopped(
    ray: SlowRay, tmp_path: Path, cancellations: int, connecting: bool
) -> None:
    settings = Settings(home=tmp_path)
    making = (
        AsyncKernel.connect("demo", address="x", settings=settings)
        if connecting
        else AsyncKernel.boot(settings=settings)
    )
    task = asyncio.ensure_future(making)
    await asyncio.to_thread(ray.begun.wait, 10)
    for _ in range(cancellations):
        task.cancel()
        await asyncio.sleep(0.02)
    assert not task.done()
    ray.go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert ray.stops == 1


async def test_a_ray_that_fails_after_a_cancellation_is_no_matter(
    ray: SlowRay, tmp_path: Path
) -> None:
    ray.starts = False
    task = asyncio.ensure_future(AsyncKernel.boot(settings=Settings(home=tmp_path)))
    await asyncio.to_thread(ray.begun.wait, 10)
    task.cancel()
    await asyncio.sleep(0)
    ray.go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert ray.stops == 0


def test_ctrl_c_while_ray_starts_waits_until_it_is_stopped(ray: SlowRay, tmp_path: Path) -> None:
    sender = interrupt(ray.begun)
    threading.Timer(0.5, ray.go_on.set).start()
    with pytest.raises(KeyboardInterrupt):
        Kernel.boot(settings=Settings(home=tmp_path))
    sender.join()
    assert ray.stops == 1


def test_a_second_ctrl_c_does_not_wait(ray: SlowRay, tmp_path: Path) -> None:
    sender = interrupt(ray.begun, times=2)
    try:
        began = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            Kernel.boot(settings=Settings(home=tmp_path))
        assert time.monotonic() - began < 5
        assert ray.stops == 0
    finally:
        ray.go_on.set()
        sender.join()


def test_the_clean_up_of_interrupted_work_is_waited_for(runner: _Runner) -> None:
    begun, cleaned = threading.Event(), threading.Event()

    async def work() -> None:
        begun.set()
        try:
            await asyncio.sleep(60)
        finally:
            await asyncio.sleep(1.5)
            cleaned.set()

    sender = interrupt(begun)
    with pytest.raises(KeyboardInterrupt):
        runner.run(work())
    assert cleaned.is_set()
    sender.join()


def test_a_clean_up_that_does_not_end_is_given_up(
    runner: _Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "CLEAN_UP_S", 0.3)
    begun = threading.Event()

    async def work() -> None:
        try:
            begun.set()
            await asyncio.sleep(60)
        finally:
            await asyncio.sleep(60)

    sender = interrupt(begun)
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        runner.run(work())
    assert time.monotonic() - began < 5
    sender.join()


# ------------------------------------------------------------------ checks before anything starts


@pytest.mark.parametrize(
    ("field", "given"),
    [
        ("key", {"key": "k" * 64}),
        ("key", {"key": "Main"}),
        ("tenant", {"tenant": ""}),
        ("config", {"config": [1]}),
        ("config", {"config": []}),
    ],
    ids=str,
)
async def test_a_launch_of_a_wrong_form_names_the_field(
    field: str, given: dict[str, Any], tmp_path: Path
) -> None:
    settings = Settings(home=tmp_path)
    kernel = AsyncKernel(Cluster(None, None), None, "demo", settings, owner=False)
    with pytest.raises(InvalidLaunch) as caught:
        await kernel.launch("m:C", **given)
    assert caught.value.field == field
    assert isinstance(caught.value, LlmosError)


async def test_a_home_that_cannot_be_written_is_told_before_ray_starts(
    ray: SlowRay, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SettingsError):
        await AsyncKernel.boot(settings=Settings(home=tmp_path / "file" / "home"))
    assert not ray.begun.is_set()


def test_files_of_ray_that_cannot_be_written_are_a_typed_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    before = dict(os.environ)
    (tmp_path / "file").write_text("")
    # The token cannot be written.
    with pytest.raises(ClusterError, match="LLMOS_HOME and TMPDIR"):
        Cluster.start(Settings(home=tmp_path / "file" / "home"))
    # Nor, where it can, the temporary folder.
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "none"))
    monkeypatch.setattr(Token, "_reread", staticmethod(lambda: None))
    with pytest.raises(ClusterError, match="LLMOS_HOME and TMPDIR"):
        Cluster.start(Settings(home=tmp_path))
    assert dict(os.environ) == before


# ------------------------------------------------------------------ the run file


def test_a_process_is_known_by_number_and_start() -> None:
    mine = started_at(os.getpid())
    assert mine is not None
    assert mine == started_at(os.getpid()) > 0
    assert started_at(2**22 - 1) is None
    process = subprocess.Popen(["sleep", "60"])
    try:
        began = started_at(process.pid)
        assert began is not None
        assert began >= mine
        process.kill()
        until = time.monotonic() + 10
        # Not waited for, it is a zombie until then.
        while started_at(process.pid) is not None:
            assert time.monotonic() < until
            time.sleep(0.01)
        assert Path(f"/proc/{process.pid}").exists()
    finally:
        process.kill()
        process.wait()


def test_a_run_file_finds_its_own_process_alone(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path / "home")
    mine = RunFile(
        system="demo", address="a:1", pid=os.getpid(), started=started_at(os.getpid()) or 0
    )
    mine.write(settings)
    assert RunFile.find(settings, None) == mine
    mine.model_copy(update={"started": mine.started - 1}).write(settings)
    with pytest.raises(ClusterError, match="No kernel"):
        RunFile.find(settings, None)
    assert not RunFile.path(settings, "demo").exists()
    detached = RunFile(system="demo", address="a:1", pid=0)
    detached.write(settings)
    assert RunFile.find(settings, "demo") == detached
