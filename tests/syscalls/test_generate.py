from __future__ import annotations

import json
from contextlib import aclosing
from dataclasses import replace
from typing import Any

import pytest
from pydantic import ValidationError

from llmos.drivers.errors import EngineFailed, PromptTooLong
from llmos.drivers.protocols import ChatTurn, GenerationChunk, Grammar, TokenLogprob, ToolCall
from llmos.kernel import record
from llmos.syscalls.errors import ServiceUnavailable
from llmos.syscalls.generate import (
    AnswerGrammar,
    ChatMessage,
    Generate,
    Generated,
    generate,
    stream,
)
from llmos.syscalls.labels import Labels, Provenance
from llmos.syscalls.schemas import ToolDescription, ToolUse
from tests.syscalls.fakes import CALLER, SECRET, FakeServices, Script, failing, words


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


def script_of(**last: Any) -> Any:
    """One word, and a last chunk with these fields."""

    def script(job: Any) -> Script:
        return [GenerationChunk(job.id, "one", 1, "stop", new_tokens=1, **last)]

    return script


async def test_seed_logprobs_and_grammar_reach_the_engine(services: FakeServices) -> None:
    told = TokenLogprob("one", -0.5, (("one", -0.5), ("two", -1.5)))
    services.scripts = [script_of(logprobs=(told,))]
    grammar = AnswerGrammar(kind="regex", source="one|two")
    made = await run(services, seed=0, logprobs=1, grammar=grammar)
    job = services.jobs[0][1]
    assert (job.params.seed, job.params.logprobs) == (0, 1)
    assert job.params.grammar == Grammar("regex", "one|two")
    assert (job.agent, job.turn) == (CALLER.agent, CALLER.turn)
    (found,) = made.logprobs
    assert (found.token, found.logprob) == ("one", -0.5)
    assert found.likeliest == (("one", -0.5), ("two", -1.5))
    assert Generated.model_validate_json(made.model_dump_json()) == made


async def test_tools_reach_the_engine_and_calls_come_back(services: FakeServices) -> None:
    services.scripts = [script_of(tool_calls=(ToolCall("f", '{"x": "ü"}', "1"),))]
    talk = (
        ChatMessage(role="user", content="u"),
        ChatMessage(role="assistant", content="", tool_calls=(ToolUse(name="f", arguments={}),)),
        ChatMessage(role="tool", content="r", tool_call_id="0"),
    )
    tool = ToolDescription(name="f", description="d")
    made = await run(services, prompt=talk, tools=(tool,), tool_choice="required")
    job = services.jobs[0][1]
    assert job.prompt[1:] == (
        ChatTurn("assistant", "", (ToolCall("f", "{}"),)),
        ChatTurn("tool", "r", tool_call_id="0"),
    )
    assert [(t.name, t.description) for t in job.tools] == [("f", "d")]
    assert json.loads(job.tools[0].parameters)["type"] == "object"
    assert job.tool_choice == "required"
    assert made.tool_calls == (ToolUse(name="f", arguments={"x": "ü"}, id="1"),)
    assert Generated.model_validate_json(made.model_dump_json()) == made


def test_requests_that_use_none_of_it_are_recorded_as_they_were_before() -> None:
    talk = (ChatMessage(role="user", content="hi"),)
    kept = json.loads(record.args_of(Generate(model="chat", prompt=talk)))
    assert set(kept) == {
        *("model", "prompt", "max_new_tokens", "temperature", "top_p", "top_k", "stop", "raw"),
        *("ignore_eos", "prefix"),
    }
    assert kept["prompt"] == [{"role": "user", "content": "hi"}]
    used = Generate(model="chat", prompt="hi", seed=0, logprobs=0)
    assert {"seed", "logprobs"} <= set(json.loads(record.args_of(used)))


@pytest.mark.parametrize(
    "fields",
    [
        {"seed": -1},
        {"seed": 2**63},
        {"logprobs": -1},
        {"logprobs": 21},
        {"tool_choice": "required"},
        {"tool_choice": "always"},
        {"tools": ({"name": "no good"},)},
        {"tools": ({"name": "f"}, {"name": "f"})},
        {"tools": ({"name": "f"},), "raw": True},
        {"stop": ("x",), "grammar": {"kind": "regex", "source": "a"}},
        {"ignore_eos": True, "grammar": {"kind": "regex", "source": "a"}},
        {
            "tool_choice": "required",
            "tools": ({"name": "f"},),
            "grammar": {"kind": "regex", "source": "a"},
        },
        {"grammar": {"kind": "wizard", "source": "a"}},
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
