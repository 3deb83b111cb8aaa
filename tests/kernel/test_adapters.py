"""Adapters in the system file, in the directory and in a device."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from llmos.drivers.errors import (
    AdapterUnusable,
    EngineFailed,
    LlmosError,
    UnknownAdapter,
)
from llmos.drivers.protocols import EngineOptions, GenerationJob
from llmos.kernel.adapters import resident_name
from llmos.kernel.device import DeviceServer
from llmos.kernel.directory import AdapterRoute, Directory, DirectoryHolder, SlotRoute
from llmos.kernel.system import SystemConfig, SystemFileError
from llmos.syscalls.labels import Labels, Sensitivity

MODELS = """
[models.chat]
source = "smol"
engine = "causal"
max_adapters = 2

[models.plain]
source = "smol"
engine = "causal"
"""


def adapter(name: str, model: str = "chat", more: str = "") -> str:
    return f'[adapters.{name}]\nmodel = "{model}"\npath = "weights"\n{more}\n'


def read(text: str) -> SystemConfig:
    return SystemConfig.parse(text, "system.toml", Path("/srv"))


def test_the_file_names_adapters_with_their_labels() -> None:
    owned = adapter("b", more='tenant = "acme"\nsensitivity = "confidential"')
    system = read(MODELS + adapter("a") + owned)
    assert system.adapters["a"].labels == Labels(sensitivity=Sensitivity.INTERNAL)
    assert system.adapters["b"].labels.tenants == {"acme"}
    assert system.adapters["b"].labels.sensitivity is Sensitivity.CONFIDENTIAL
    assert system.at(system.adapters["a"].path) == Path("/srv/weights")
    assert (system.models["chat"].max_adapters, system.models["chat"].max_adapter_rank) == (2, 16)


@pytest.mark.parametrize(
    ("text", "field", "words"),
    [
        (MODELS + adapter("a", "nothing"), "adapters.a.model", "such models here: chat"),
        (MODELS + adapter("a", "plain"), "adapters.a.model", "no model with max_adapters"),
        (
            MODELS + adapter("a") + adapter("b") + adapter("c"),
            "models.chat.max_adapters",
            "more adapters",
        ),
        (
            '[models.e]\nsource = "x"\nengine = "echo"\nmax_adapters = 1\n',
            "models.e.max_adapters",
            "only the causal engine",
        ),
        (MODELS + adapter('"a+b"'), "adapters", "a name is"),
    ],
)
def test_what_the_file_cannot_mean_is_told_with_its_place(
    text: str, field: str, words: str
) -> None:
    with pytest.raises(SystemFileError, match=words) as error:
        read(text)
    assert error.value.field.startswith(field)
    assert error.value.line


def holder(**adapters: AdapterRoute) -> DirectoryHolder:
    made = DirectoryHolder()
    slots = {m: SlotRoute("causal", "cpu:0", "d") for m in ("chat", "plain")}
    made.current = Directory(
        version=1, devices={"device:cpu:0": object()}, slots=slots, adapters=adapters
    )
    return made


def route(
    tenant: str | None = None, model: str = "chat", error: LlmosError | None = None
) -> AdapterRoute:
    tenants = frozenset({tenant} if tenant else ())
    return AdapterRoute(model, resident_name("x", tenant), Labels(tenants=tenants), error)


async def test_an_adapter_of_another_tenant_or_model_is_not_there() -> None:
    directory = holder(
        mine=route("acme"), theirs=route("other"), all=route(), far=route(None, "plain")
    )
    assert (await directory.adapter("acme", "chat", "mine")).resident == "acme/x"
    assert (await directory.adapter("acme", "chat", "all")).resident == "x"
    for name in ("theirs", "far", "nothing"):
        with pytest.raises(UnknownAdapter) as unknown:
            await directory.adapter("acme", "chat", name)
        assert unknown.value.known == ("all", "mine")


async def test_an_adapter_that_could_not_be_loaded_says_why() -> None:
    directory = holder(bad=route(error=AdapterUnusable("chat", "bad", "no folder")))
    with pytest.raises(AdapterUnusable, match="no folder"):
        await directory.adapter("acme", "chat", "bad")


async def test_requests_wait_for_the_model_that_the_adapter_changes() -> None:
    directory = holder(mine=route("acme"))
    loaded = directory.current
    waiting = {"chat": SlotRoute("causal", None, "d")}
    directory.current = Directory(version=1, slots=waiting, adapters=loaded.adapters)
    asking = asyncio.create_task(directory.adapter("acme", "chat", "mine"))
    await asyncio.sleep(0)
    assert not asking.done()
    await directory.set(
        Directory(version=2, devices=loaded.devices, slots=loaded.slots, adapters=loaded.adapters)
    )
    assert (await asking).model == "chat"


async def test_a_device_hands_the_engines_refusals_over(tmp_path: Path) -> None:
    device = DeviceServer("device:memory:0", "memory", 0, 1 << 30, 1, str(tmp_path), "INFO")
    await device.load("echo", "causal", EngineOptions("chat", Path()))
    try:
        # This engine has no weights that an adapter could change.
        assert isinstance(await device.load_adapter("chat", "a", tmp_path), AdapterUnusable)
        assert isinstance(await device.unload_adapter("chat", "a"), UnknownAdapter)
        assert isinstance(await device.load_adapter("nothing", "a", tmp_path), EngineFailed)
        (refused,) = await device.submit("host", [("chat", GenerationJob("1", "x", adapter="a"))])
        assert isinstance(refused, UnknownAdapter)
    finally:
        await device.close()
