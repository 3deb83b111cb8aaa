from __future__ import annotations

from contextlib import aclosing
from dataclasses import replace
from typing import Any

import pytest
from pydantic import ValidationError

from llmos.drivers.errors import EngineFailed, PromptTooLong
from llmos.drivers.protocols import ChatTurn
from llmos.syscalls.errors import ServiceUnavailable
from llmos.syscalls.generate import ChatMessage, Generate, Generated, generate, stream
from llmos.syscalls.labels import Labels, Provenance
from tests.syscalls.fakes import CALLER, SECRET, FakeServices, failing, words


@pytest.fixture
def services() -> FakeServices:
    made = FakeServices()
    made.scripts = [words("one", " two")]
    return made


async def run(services: FakeServices, caller: Any = CALLER, **fields: Any) -> Generated:
    made = await generate(Generate(model="chat", **{"prompt": "hi", **fields}), caller, services)
    assert isinstance(made, Generated)
    return made


async def test_the_pieces_are_put_together(services: FakeServices) -> None:
    made = await run(services, max_new_tokens=9, temperature=0.5, stop=("x",), top_k=3, top_p=0.5)
    assert (made.text, made.finish) == ("one two", "stop")
    assert (made.prompt_tokens, made.new_tokens, made.queued_s, made.run_s) == (7, 2, 0.1, 0.2)
    assert made.provenance == (Provenance(kind="model", source="chat", version="digest-of-chat"),)
    ((model, job),) = services.jobs
    assert (model, job.tenant, job.prompt) == ("chat", "acme", (ChatTurn("user", "hi"),))
    assert (job.params.max_new_tokens, job.params.temperature) == (9, 0.5)
    assert (job.params.stop, job.params.top_k, job.params.top_p) == (("x",), 3, 0.5)
    assert services.closed == [job.id]


async def test_the_length_limit_is_told(services: FakeServices) -> None:
    services.scripts = [words("one", finish="length")]
    assert (await run(services)).finish == "length"


async def test_conversations_and_raw_prompts_reach_the_engine_as_they_are(
    services: FakeServices,
) -> None:
    talk = (ChatMessage(role="system", content="s"), ChatMessage(role="user", content="u"))
    await run(services, prompt=talk)
    await run(services, prompt="once upon", raw=True)
    assert services.jobs[0][1].prompt == (ChatTurn("system", "s"), ChatTurn("user", "u"))
    assert services.jobs[1][1].prompt == "once upon"
    assert services.jobs[0][1].id != services.jobs[1][1].id


async def test_what_a_model_writes_is_untrusted_and_as_secret_as_its_input(
    services: FakeServices,
) -> None:
    assert (await run(services)).labels == Labels(trusted=False)
    made = await run(services, replace(CALLER, labels=SECRET))
    assert made.labels == SECRET.join(Labels(trusted=False))


async def test_closing_the_stream_cancels_the_job(services: FakeServices) -> None:
    async with aclosing(stream(Generate(model="chat", prompt="hi"), CALLER, services)) as chunks:  # type: ignore[type-var]
        async for chunk in chunks:
            assert chunk.text == "one"
            assert services.closed == []
            break
    assert services.closed == [services.jobs[0][1].id]


async def test_an_error_chunk_is_raised_with_its_own_class(services: FakeServices) -> None:
    services.scripts = [failing(PromptTooLong("chat", 10, 5, 12, "context"), "one")]
    with pytest.raises(PromptTooLong) as caught:
        await run(services)
    assert caught.value.limit_tokens == 12
    assert len(services.closed) == 1


async def test_a_job_cancelled_in_the_engine_is_no_answer(services: FakeServices) -> None:
    services.scripts = [words("one", finish="cancelled")]
    with pytest.raises(EngineFailed, match="cancelled in the engine"):
        await run(services)


async def test_a_lost_device_is_tried_again_from_the_start(services: FakeServices) -> None:
    gone = ServiceUnavailable("device cpu:0", "it died", retry_after_s=5.0)
    services.scripts = [failing(gone, "lost "), failing(gone), words("whole")]
    assert (await run(services)).text == "whole"
    assert len(services.jobs) == 3
    assert len({job.id for _, job in services.jobs}) == 3
    assert services.slept == [0.2, 0.2]


async def test_other_errors_are_not_tried_again(services: FakeServices) -> None:
    services.scripts = [failing(EngineFailed("chat", "it broke"))]
    with pytest.raises(EngineFailed):
        await run(services)
    assert len(services.jobs) == 1


@pytest.mark.parametrize(
    "fields",
    [
        {"max_new_tokens": 0},
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_k": -1},
        {"stop": ("x",) * 17},
        {"prompt": ({"role": "wizard", "content": "x"},)},
        {"colour": "red"},
    ],
    ids=lambda f: next(iter(f)),
)
def test_requests_that_no_engine_could_honour_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError) as caught:
        Generate(**{"model": "chat", "prompt": "hi", **fields})
    assert next(iter(fields)) in str(caught.value)
