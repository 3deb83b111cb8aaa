"""``generate`` with an adapter: its resource, its labels and where the answer came from."""

from __future__ import annotations

import pytest

from llmos.drivers.errors import UnknownAdapter
from llmos.drivers.protocols import GenerationChunk
from llmos.syscalls.generate import Generate, Generated, generate
from llmos.syscalls.labels import Labels, Sensitivity
from tests.syscalls.fakes import CALLER, FakeServices

REQUEST = Generate(model="chat", prompt="x", adapter="tone")


@pytest.fixture
def services() -> FakeServices:
    made = FakeServices()
    made.scripts = [
        lambda job: [
            GenerationChunk(job.id, "a ", 1, adapter_digest="abc"),
            GenerationChunk(job.id, "b", 1, "stop", adapter_digest="abc"),
        ]
    ]
    secret = Labels(tenants=frozenset({"acme"}), sensitivity=Sensitivity.RESTRICTED)
    made.adapters = {("acme", "tone"): secret}
    return made


async def test_the_answer_says_which_adapter_and_carries_its_labels(
    services: FakeServices,
) -> None:
    answer = await generate(REQUEST, CALLER, services)
    assert isinstance(answer, Generated)
    assert services.jobs[0][1].adapter == "tone"
    model, adapter = answer.provenance
    assert (model.kind, model.source, model.version) == ("model", "chat", "digest-of-chat")
    assert (adapter.kind, adapter.source, adapter.version) == ("adapter", "chat+tone", "abc")
    assert answer.labels.sensitivity is Sensitivity.RESTRICTED
    assert answer.labels.tenants == {"acme"}
    assert not answer.labels.trusted


async def test_an_adapter_that_is_not_there_reaches_no_engine(services: FakeServices) -> None:
    with pytest.raises(UnknownAdapter):
        await generate(REQUEST.model_copy(update={"adapter": "other"}), CALLER, services)
    assert services.jobs == []


def test_the_resource_names_both_and_old_records_stay_the_same() -> None:
    assert REQUEST.resource == "chat+tone"
    plain = Generate(model="chat", prompt="x")
    assert plain.resource == "chat"
    assert "adapter" not in plain.model_dump()
