"""What each kind of server can be asked for, and the words it wants it in.

Servers of the OpenAI-compatible API leave out what they do not know and say nothing: the same
request means different things to them. So what a job asks for is looked up here, and what the
server cannot do is refused before anything is sent. Sampling is always told in full: some
servers otherwise take defaults from the model's own files, or cut the distribution at 40 tokens.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any, Literal

from llmos.drivers.errors import InvalidGrammar, InvalidParams
from llmos.drivers.protocols import ChatTurn, GenerationJob, Grammar, SamplingParams

MAX_SENT_STOPS = 4
"""Stop strings that the API takes. The others are looked for here alone."""

Server = Literal["openai", "vllm", "sglang", "llama.cpp", "ollama", "transformers"]


@dataclass(frozen=True, slots=True)
class Abilities:
    """What a kind of server does beyond messages, temperature, top_p, stop and max_tokens."""

    seed: bool = True
    logprobs: bool = True
    json_schema: bool = True
    usage_on_request: bool = True
    """It takes ``stream_options``; without, it tells the usage anyway."""
    top_k: bool = False
    ignore_eos: bool = False
    neutral: tuple[tuple[str, Any], ...] = ()
    """Switches off what the server would otherwise do to the distribution by itself."""
    no_top_k: int = -1
    """What ``top_k`` is for no limit."""
    continues: bool = False
    """It goes on with an assistant's turn when asked to."""
    guided: Literal["", "structured_outputs", "fields"] = ""
    """How it is told of choices and expressions."""
    salted_cache: bool = False
    """It takes ``cache_salt``, which keeps the cached prefixes of tenants apart."""


ABILITIES: dict[Server, Abilities] = {
    "openai": Abilities(),
    "vllm": Abilities(
        top_k=True,
        ignore_eos=True,
        neutral=(("min_p", 0.0), ("repetition_penalty", 1.0)),
        continues=True,
        guided="structured_outputs",
        salted_cache=True,
    ),
    "sglang": Abilities(
        top_k=True,
        ignore_eos=True,
        neutral=(("min_p", 0.0), ("repetition_penalty", 1.0)),
        continues=True,
        guided="fields",
        salted_cache=True,
        # It takes a seed, and goes by it only if it was started for deterministic inference.
        seed=False,
    ),
    "llama.cpp": Abilities(
        top_k=True,
        ignore_eos=True,
        neutral=(("min_p", 0.0), ("repeat_penalty", 1.0)),
        no_top_k=0,
    ),
    "ollama": Abilities(),
    # Its seed is one for the whole process, so a request beside would change the answer.
    "transformers": Abilities(
        seed=False,
        logprobs=False,
        json_schema=False,
        usage_on_request=False,
        top_k=True,
        ignore_eos=True,
    ),
}


def check_abilities(server: Server, job: GenerationJob, *, renders: bool) -> None:
    """Refuse what the server would leave out. ``renders``: chat prompts can be rendered here.

    Raises:
        InvalidParams: naming the field.
        InvalidGrammar: the grammar cannot be read.
    """
    can, params = ABILITIES[server], job.params

    def refuse(field: str, value: object, hint: str = "") -> None:
        raise InvalidParams(field, value, f"a server of kind {server!r} has no such thing{hint}")

    if params.top_k and not can.top_k:
        refuse("top_k", params.top_k)
    if params.ignore_eos and not can.ignore_eos:
        refuse("ignore_eos", True)
    if params.seed is not None and not can.seed:
        refuse("seed", params.seed)
    if params.logprobs is not None and not can.logprobs:
        refuse("logprobs", params.logprobs)
    if params.grammar is not None:
        _check_grammar(server, params.grammar)
        if job.prefix:
            refuse("prefix", job.prefix, " together with a grammar")
    if isinstance(job.prompt, str):
        if job.tools:
            raise InvalidParams("tools", len(job.tools), "with a string as prompt there are none")
    elif job.prefix:
        if job.tools:
            refuse("prefix", job.prefix, " together with tools")
        if not (can.continues or renders):
            refuse("prefix", job.prefix, "; with the folder of its tokenizer it would work")


def _check_grammar(server: Server, grammar: Grammar) -> None:
    can = ABILITIES[server]
    known = {"json_schema"} if can.json_schema else set()
    if can.guided:
        known |= {"regex"} | ({"choices"} if can.guided == "structured_outputs" else set())
    if grammar.kind not in known:
        raise InvalidParams(
            "grammar",
            grammar.kind,
            f"a server of kind {server!r} binds answers by {', '.join(sorted(known)) or 'none'}",
        )
    read_grammar(grammar)


def read_grammar(grammar: Grammar) -> Any:
    """The schema as a mapping, the choices as a list, or the compiled expression.

    Raises:
        InvalidGrammar
    """
    if grammar.kind == "regex":
        try:
            return re.compile(grammar.source)
        except re.error as error:
            raise InvalidGrammar(grammar.kind, f"no expression: {error}") from None
    try:
        found = json.loads(grammar.source)
    except (ValueError, RecursionError) as error:
        raise InvalidGrammar(grammar.kind, f"no JSON: {error}") from None
    if grammar.kind == "choices":
        if not found or not isinstance(found, list) or any(type(c) is not str for c in found):
            raise InvalidGrammar(grammar.kind, "not a list of strings")
        return found
    import jsonschema  # type: ignore[import-untyped]

    try:
        jsonschema.Draft202012Validator.check_schema(found)
    except jsonschema.SchemaError as error:
        raise InvalidGrammar(grammar.kind, f"no JSON schema: {error.message[:200]}") from None
    return found


def mismatch(grammar: Grammar, text: str) -> str:
    """Why a whole answer is not what the grammar allows; empty: it is."""
    bound = read_grammar(grammar)
    if grammar.kind == "choices":
        return "" if text in bound else "it is none of the choices"
    if grammar.kind == "regex":
        return "" if bound.fullmatch(text) else "it does not match the expression"
    import jsonschema
    from referencing import Registry
    from referencing.exceptions import Unresolvable

    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        return f"it is no JSON: {error}"
    try:
        # With a registry of its own, or a schema could make this process load a web page.
        validator = jsonschema.Draft202012Validator(bound, registry=Registry())
        found = jsonschema.exceptions.best_match(validator.iter_errors(value))
    except (Unresolvable, re.error, RecursionError) as error:
        return f"the schema cannot be applied: {error}"[:200]
    return "" if found is None else f"{found.json_path}: {found.message}"[:200]


def request_of(
    server: Server, model: str, job: GenerationJob, *, rendered: str | None, salt: str
) -> tuple[str, dict[str, Any]]:
    """Where a job goes below the server's ``/v1``, and the body.

    ``rendered``: a chat prompt that was rendered here already, prefix included.
    """
    can, params = ABILITIES[server], job.params
    body: dict[str, Any] = {
        "model": model,
        "stream": True,
        "max_tokens": params.max_new_tokens,
        "temperature": params.temperature,
        "top_p": params.top_p,
    }
    if params.stop:
        body["stop"] = list(params.stop[:MAX_SENT_STOPS])
    if can.usage_on_request:
        body["stream_options"] = {"include_usage": True}
    if params.seed is not None:
        body["seed"] = params.seed
    if can.salted_cache:
        body["cache_salt"] = salt
    if server == "transformers":
        body["generation_config"] = json.dumps(_generation_config(params))
    elif can.top_k:
        body["top_k"] = params.top_k or can.no_top_k
        body.update(can.neutral)
        if params.ignore_eos:
            body["ignore_eos"] = True
    if params.grammar is not None:
        _add_grammar(can, body, params.grammar)
    text = rendered
    if text is None and isinstance(job.prompt, str):
        text = job.prompt + job.prefix
    if text is not None:
        body["prompt"] = text
        if params.logprobs is not None:
            body["logprobs"] = params.logprobs
        return "/completions", body
    _add_chat(body, job)
    return "/chat/completions", body


def _add_chat(body: dict[str, Any], job: GenerationJob) -> None:
    assert not isinstance(job.prompt, str)
    body["messages"] = [_message(t) for t in job.prompt]
    if job.prefix:
        body["messages"].append({"role": "assistant", "content": job.prefix})
        body["continue_final_message"], body["add_generation_prompt"] = True, False
    if job.params.logprobs is not None:
        body["logprobs"] = True
        # Asked for only where wanted: some servers refuse a 0.
        if job.params.logprobs:
            body["top_logprobs"] = job.params.logprobs
    if job.tools:
        body["tools"] = [
            {
                "type": "function",
                "function": {
                    "name": t.name,
                    "description": t.description,
                    "parameters": json.loads(t.parameters),
                },
            }
            for t in job.tools
        ]
        body["tool_choice"] = job.tool_choice


def _message(turn: ChatTurn) -> dict[str, Any]:
    message: dict[str, Any] = {"role": turn.role, "content": turn.content}
    if turn.tool_calls:
        message["tool_calls"] = [
            {
                "id": call.id or f"call_{i}",
                "type": "function",
                "function": {"name": call.name, "arguments": call.arguments},
            }
            for i, call in enumerate(turn.tool_calls)
        ]
    if turn.role == "tool":
        message["tool_call_id"] = turn.tool_call_id or "call_0"
    return message


def _add_grammar(can: Abilities, body: dict[str, Any], grammar: Grammar) -> None:
    if grammar.kind == "json_schema":
        schema = {"name": "answer", "schema": json.loads(grammar.source), "strict": True}
        body["response_format"] = {"type": "json_schema", "json_schema": schema}
    elif can.guided == "fields":
        body["regex"] = grammar.source
    elif grammar.kind == "choices":
        body["structured_outputs"] = {"choice": json.loads(grammar.source)}
    else:
        body["structured_outputs"] = {"regex": grammar.source}


def _generation_config(params: SamplingParams) -> dict[str, Any]:
    """For transformers' own server, which samples only where it is told to in so many words."""
    config: dict[str, Any] = {
        "max_new_tokens": params.max_new_tokens,
        "do_sample": params.temperature > 0,
        "repetition_penalty": 1.0,
    }
    if params.temperature > 0:
        config["top_k"] = params.top_k
    if params.ignore_eos:
        # It writes no end-of-sequence token before so many.
        config["min_new_tokens"] = params.max_new_tokens
    return config
