"""Adapters through the whole kernel: from the system file, added while it runs, and whose."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llmos.drivers.errors import AdaptersFull, AdapterUnusable, UnknownAdapter
from llmos.drivers.models.store import ModelStore
from llmos.kernel.client import Kernel
from llmos.kernel.settings import Settings
from llmos.kernel.system import SystemConfig
from llmos.syscalls.errors import CapabilityDenied
from llmos.syscalls.messages import Wire
from tests.cluster.adapter_programs import Author, Write, Written
from tests.cluster.conftest import own_processes
from tests.drivers.engines.lora_files import Peft, make_adapters, tiny_llama

pytestmark = pytest.mark.cluster

SYSTEM = """
[system]
name = "adapters"

[[devices]]
driver = "cpu"
memory = "1GiB"
threads = 1

[models.chat]
source = "tiny"
engine = "causal"
dtype = "float32"
kv_tokens = 2048
max_adapters = 3
max_adapter_rank = 8

[adapters.tone]
model = "chat"
path = "a0"
tenant = "acme"
sensitivity = "confidential"

[adapters.broken]
model = "chat"
path = "nowhere"
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("files")
    tiny_llama(base / "tiny")
    make_adapters(base / "tiny", {n: base / f"a{n}" for n in range(4)})
    return base


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def peft(folder: Path) -> Peft:
    return Peft(folder / "tiny", {f"a{n}": folder / f"a{n}" for n in range(4)})


@pytest.fixture(scope="module")
def kernel(folder: Path, home: Path) -> Iterator[Kernel]:
    settings = Settings(home=home)
    ModelStore(settings.models_dir).pull(f"path:{folder / 'tiny'}", name="tiny")
    system = SystemConfig.parse(SYSTEM, "system.toml", folder)
    with Kernel.boot(system, settings=settings) as booted:
        yield booted


def llmos(home: Path, *arguments: str) -> Any:
    done = subprocess.run(
        [Path(sys.executable).parent / "llmos", "adapters", *arguments, "--json"],
        env={**os.environ, "LLMOS_HOME": str(home)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def states(kernel: Kernel) -> dict[str, str]:
    return {row["name"]: row["state"] for row in kernel.adapters()}


def test_adapters_through_the_whole_kernel(
    kernel: Kernel, peft: Peft, folder: Path, home: Path
) -> None:
    assert states(kernel) == {"tone": "waiting", "broken": "waiting"}
    author = kernel.launch(Author, tenant="acme")
    assert states(kernel) == {"tone": "ready", "broken": "failed"}

    def written(prompt: str, adapter: str = "") -> str:
        return kernel.ask(author, Write(prompt=prompt, adapter=adapter), Written).text

    # One of the system file, with where the answer came from.
    assert written("The sea") == peft.answer("The sea", "", 8)
    assert written("The sea", "tone") == peft.answer("The sea", "a0", 8)
    reply = kernel.ask_reply(author, Wire.of(Write(prompt="The sea", adapter="tone")))
    kinds = {p.kind: p for p in reply.provenance}
    assert kinds["adapter"].source == "chat+tone"
    assert len(kinds["adapter"].version) == 64
    assert reply.labels.sensitivity.name == "CONFIDENTIAL"
    (call, _) = kernel.turn(reply.turn)
    assert call.name == "chat+tone"

    # What is not allowed, not there, or not usable is an error, and never an answer without.
    with pytest.raises(CapabilityDenied) as denied:
        written("The sea", "other")
    assert denied.value.resource == "chat+other"
    with pytest.raises(UnknownAdapter) as unknown:
        written("The sea", "bold")
    assert set(unknown.value.known) == {"tone", "broken"}
    with pytest.raises(AdapterUnusable, match="not a folder"):
        written("The sea", "broken")

    # Another tenant's adapter is not there at all.
    stranger = kernel.launch(Author, tenant="other")
    with pytest.raises(UnknownAdapter) as unknown:
        kernel.ask(stranger, Write(prompt="x", adapter="tone"))
    assert unknown.value.known == ("broken",)

    # Added while the system runs, replaced, and taken away.
    row = llmos(home, "load", "bold", str(folder / "a1"), "--model", "chat")
    assert (row["state"], row["tenant"]) == ("ready", None)
    assert written("The sea", "bold") == peft.answer("The sea", "a1", 8)
    kernel.load_adapter("bold", "chat", "a2")
    assert written("The sea", "bold") == peft.answer("The sea", "a2", 8)
    kernel.load_adapter("b3", "chat", folder / "a3", tenant="acme")
    with pytest.raises(AdaptersFull):
        kernel.load_adapter("b4", "chat", "a3")
    with pytest.raises(AdapterUnusable, match="taken"):
        kernel.load_adapter("bold", "chat", "a3", tenant="acme")
    with pytest.raises(AdapterUnusable, match="max_adapters"):
        kernel.load_adapter("b4", "nothing", "a3")
    assert llmos(home, "unload", "b3") == {"unloaded": "b3"}
    with pytest.raises(UnknownAdapter):
        written("The sea", "b3")
    with pytest.raises(UnknownAdapter):
        kernel.unload_adapter("b3")
    assert {r["name"] for r in llmos(home, "list")} == {"tone", "broken", "bold"}

    # A device that is lost has them all again.
    (device,) = own_processes("ray::DeviceServer")
    device.kill()
    assert written("The sea", "bold") == peft.answer("The sea", "a2", 8)
    assert written("The sea", "tone") == peft.answer("The sea", "a0", 8)
