"""Models behind a server, from system.toml to the chunks of a device process."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from llmos.drivers.protocols import (
    DeviceInfo,
    EngineOptions,
    GenerationJob,
    RemoteOptions,
    SamplingParams,
)
from llmos.kernel.device import DeviceServer
from llmos.kernel.inventory import Inventory
from llmos.kernel.settings import Settings
from llmos.kernel.system import SystemConfig, SystemFileError
from tests.drivers.engines.faulty_server import FaultyServer

FILE = """
[models.chat]
engine = "remote"
max_waiting = 7

[models.chat.remote]
url = "https://models.example/v1"
model = "big"
server = "vllm"
api_key_env = "CHAT_KEY"
tokenizer = "tokenizers/big"
tokens_per_minute = 1000
"""


def parse(text: str = FILE, base: Path = Path("/data")) -> SystemConfig:
    return SystemConfig.parse(text, "system.toml", base)


def test_a_remote_model_is_read() -> None:
    table = parse().models["chat"]
    assert (table.kind, table.needs_files) == ("causal", False)
    assert table.origin == "https://models.example/v1"
    assert table.remote is not None
    options = table.remote.options("chat", {"CHAT_KEY": "sk-secret"})
    assert options == RemoteOptions(
        "https://models.example/v1",
        "big",
        server="vllm",
        api_key="sk-secret",
        tokens_per_minute=1000,
    )
    assert "sk-secret" not in repr(options)


def test_the_defaults_are_the_engines_own() -> None:
    text = '[models.chat]\nengine = "remote"\nremote = {url = "http://x/v1", model = "m"}\n'
    remote = parse(text).models["chat"].remote
    assert remote is not None
    assert remote.options("chat", {}) == RemoteOptions("http://x/v1", "m")


@pytest.mark.parametrize(
    ("old", "new", "field", "reason"),
    [
        ("https://models", "models", "models.chat.remote.url", "match"),
        ("https://", "https://user:pass@", "models.chat.remote.url", "match"),
        ('"vllm"', '"gpt"', "models.chat.remote.server", "vllm"),
        ("max_waiting", 'source = "x"\nmax_waiting', "models.chat.source", "none"),
        ('"remote"', '"echo"', "models.chat.remote", "only for the remote engine"),
        ('model = "big"\n', "", "models.chat.remote.model", "is missing"),
        ("tokens_per_minute = 1000", "api_key = 1", "models.chat.remote.api_key", "unknown"),
    ],
)
def test_mistakes_are_named(old: str, new: str, field: str, reason: str) -> None:
    with pytest.raises(SystemFileError) as caught:
        parse(FILE.replace(old, new, 1))
    assert caught.value.field == field
    assert reason in caught.value.reason


def test_a_server_or_files_must_be_named() -> None:
    for text, field in (
        ('[models.chat]\nengine = "remote"\n', "models.chat.remote"),
        ('[models.chat]\nengine = "causal"\n', "models.chat.source"),
    ):
        with pytest.raises(SystemFileError, match="is missing") as caught:
            parse(text)
        assert caught.value.field == field


class Finder(Inventory):
    def __init__(self, system: SystemConfig, models: Path, *devices: str) -> None:
        self._system, self._settings = system, Settings(models_dir=models)
        self._infos = {
            f"{kind}:0": DeviceInfo(f"{kind}:0", kind, 1 << 30, 1 << 30, 4)  # type: ignore[arg-type]
            for kind in devices
        }
        self._digests, self._paths, self._dtypes, self._model_errors = {}, {}, {}, {}


def test_it_needs_no_files_no_memory_and_no_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CHAT_KEY", "sk-secret")
    finder = Finder(parse(), tmp_path, "cuda", "cpu")
    (spec,) = finder._find_models()
    assert (spec.size_bytes, spec.threads, spec.device, spec.kind) == (0, 1, "cpu:0", "causal")
    assert finder._paths["chat"] == Path("/data/tokenizers/big")
    assert finder._digests["chat"] == "remote:big@https://models.example/v1"
    (spec,) = Finder(parse(), tmp_path, "cuda")._find_models()
    assert spec.device is None


def test_a_key_that_is_not_set_is_told_to_who_asks_for_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CHAT_KEY", raising=False)
    finder = Finder(parse(), tmp_path, "cpu")
    assert finder._find_models() == []
    assert "CHAT_KEY" in finder._model_errors["chat"].remedy


async def test_a_device_process_serves_it(tmp_path: Path) -> None:
    device = DeviceServer("device:memory:0", "memory", 0, 1 << 30, 1, str(tmp_path), "INFO")
    with FaultyServer() as server:
        remote = RemoteOptions(server.url, "big")
        options = EngineOptions("chat", Path(), remote=remote)
        assert await device.load("remote", "causal", options) == {}
        job = GenerationJob("1", "Hi", SamplingParams(max_new_tokens=8))
        assert await device.submit("host", [("chat", job)]) == [None]
        chunks = []
        async with asyncio.timeout(10):
            while not chunks or chunks[-1].finish is None:
                chunks += await device.poll("host", 1.0)
        assert "".join(c.text for c in chunks) == "Hello there."
        assert (await device.statistics())["slots"]["chat"].finished == 1
        await device.close()
