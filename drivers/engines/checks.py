"""What every causal engine checks before it takes a job, with or without a model."""

from __future__ import annotations

import json
import math
import re

from llmos.drivers.errors import InvalidGrammar, InvalidParams
from llmos.drivers.protocols import ChatTurn, GenerationJob, Grammar, SamplingParams, ToolSpec

MAX_STOPS = 16
"""Stop strings of one job."""
MAX_STOP_CHARS = 256
"""Characters of one stop string; this much text and one token can be held back at most."""
MAX_SEED = 2**63 - 1
MAX_LOGPROBS = 20
"""Likeliest tokens told beside each that was written."""
MAX_GRAMMAR_CHARS = 100_000
MAX_CHOICES = 1024
MAX_TOOLS = 128
_TOOL_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
GRAMMARS = ("json_schema", "regex", "choices", "lark")


def _whole(field: str, value: object, least: int) -> None:
    # bool is an int in Python; max_new_tokens=True is a mistake of the caller.
    if isinstance(value, bool) or not isinstance(value, int):
        raise InvalidParams(field, value, "it must be a whole number")
    if value < least:
        raise InvalidParams(field, value, f"it must be at least {least}")


def _real(field: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InvalidParams(field, value, "it must be a number")
    if not math.isfinite(value):
        raise InvalidParams(field, value, "it must be finite")
    return float(value)


def check_text(field: str, text: object) -> None:
    """Refuse what is not text or cannot be encoded as UTF-8 (lone surrogates)."""
    if not isinstance(text, str):
        raise InvalidParams(field, text, "it must be a string")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InvalidParams(
            field, text[error.start : error.end], f"lone surrogate at character {error.start}"
        ) from None


def check_params(params: SamplingParams) -> None:
    """Refuse parameters that no engine could honour.

    Raises:
        InvalidParams, InvalidGrammar
    """
    _whole("max_new_tokens", params.max_new_tokens, 1)
    _whole("top_k", params.top_k, 0)
    if _real("temperature", params.temperature) < 0:
        raise InvalidParams("temperature", params.temperature, "it must not be negative")
    if not 0 < _real("top_p", params.top_p) <= 1:
        raise InvalidParams("top_p", params.top_p, "it must be above 0 and at most 1")
    stops: object = params.stop
    if isinstance(stops, str):  # A tuple of its characters would pass for stop strings.
        raise InvalidParams("stop", params.stop, "it must be a tuple of strings, not a string")
    if len(params.stop) > MAX_STOPS:
        raise InvalidParams("stop", len(params.stop), f"at most {MAX_STOPS} stop strings")
    for stop in params.stop:
        check_text("stop", stop)
        if not 0 < len(stop) <= MAX_STOP_CHARS:
            raise InvalidParams("stop", stop, f"each needs 1 to {MAX_STOP_CHARS} characters")
    if params.seed is not None:
        _whole("seed", params.seed, 0)
        if params.seed > MAX_SEED:
            raise InvalidParams("seed", params.seed, "it must be below 2**63")
    if params.logprobs is not None:
        _whole("logprobs", params.logprobs, 0)
        if params.logprobs > MAX_LOGPROBS:
            raise InvalidParams("logprobs", params.logprobs, f"at most {MAX_LOGPROBS}")
    if params.grammar is not None:
        check_grammar(params.grammar)
        # What the grammar means would end elsewhere than it says.
        if params.stop:
            raise InvalidParams("stop", params.stop, "the grammar says where the answer ends")
        if params.ignore_eos:
            raise InvalidParams("ignore_eos", True, "the grammar says where the answer ends")


def check_grammar(grammar: Grammar) -> None:
    """Refuse what no library need be asked about.

    Raises:
        InvalidParams: not a grammar at all.
        InvalidGrammar: it is empty or beyond the bounds.
    """
    if not isinstance(grammar, Grammar) or grammar.kind not in GRAMMARS:
        raise InvalidParams("grammar", grammar, f"known kinds are {', '.join(GRAMMARS)}")
    check_text("grammar", grammar.source)
    if not grammar.source.strip():
        raise InvalidGrammar(grammar.kind, "it is empty")
    if len(grammar.source) > MAX_GRAMMAR_CHARS:
        raise InvalidGrammar(grammar.kind, f"it has more than {MAX_GRAMMAR_CHARS} characters")
    if grammar.kind == "choices":
        choices = _json("choices", grammar.source)
        if not isinstance(choices, list) or not 0 < len(choices) <= MAX_CHOICES:
            raise InvalidGrammar("choices", f"they are a JSON list of 1 to {MAX_CHOICES} texts")
        if not all(isinstance(choice, str) and choice for choice in choices):
            raise InvalidGrammar("choices", "each is a text, and none is empty")
    if grammar.kind == "json_schema" and not isinstance(_json("json_schema", grammar.source), dict):
        raise InvalidGrammar("json_schema", "a JSON schema is an object")


def _json(kind: str, source: str) -> object:
    try:
        found: object = json.loads(source)
    except (ValueError, RecursionError) as error:
        raise InvalidGrammar(kind, f"it is not JSON: {error}") from error
    return found


def check_prompt(prompt: str | tuple[ChatTurn, ...]) -> None:
    """Refuse an empty prompt, unknown roles and text that is not Unicode.

    Raises:
        InvalidParams
    """
    if isinstance(prompt, str):
        if not prompt:
            raise InvalidParams("prompt", prompt, "it is empty")
        check_text("prompt", prompt)
        return
    if not prompt:
        raise InvalidParams("prompt", prompt, "it has no turns")
    for turn in prompt:
        if turn.role not in ("system", "user", "assistant", "tool"):
            raise InvalidParams("role", turn.role, "known are system, user, assistant and tool")
        check_text("prompt", turn.content)
        check_text("tool_call_id", turn.tool_call_id)
        if turn.tool_calls and turn.role != "assistant":
            raise InvalidParams("tool_calls", turn.role, "only an assistant's turn has them")
        if turn.tool_call_id and turn.role != "tool":
            raise InvalidParams("tool_call_id", turn.role, "only a tool's turn has one")
        for call in turn.tool_calls:
            check_text("tool_calls", call.name)
            check_text("tool_calls", call.id)
            _object("tool_calls", call.arguments)


def _object(field: str, source: str) -> dict[str, object]:
    check_text(field, source)
    try:
        found = json.loads(source)
    except (ValueError, RecursionError) as error:
        raise InvalidParams(field, source[:200], f"it is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise InvalidParams(field, source[:200], "it must be a JSON object")
    return found


def check_tools(tools: tuple[ToolSpec, ...]) -> None:
    """Refuse tools that no model could call. Raises InvalidParams."""
    if len(tools) > MAX_TOOLS:
        raise InvalidParams("tools", len(tools), f"at most {MAX_TOOLS} tools")
    names = [tool.name for tool in tools]
    for tool in tools:
        if not isinstance(tool.name, str) or not _TOOL_NAME.fullmatch(tool.name):
            raise InvalidParams("tools", tool.name, "a name has 1 to 64 of a-z, A-Z, 0-9, _, -, .")
        if names.count(tool.name) > 1:
            raise InvalidParams("tools", tool.name, "two tools have this name")
        check_text("tools", tool.description)
        if _object("tools", tool.parameters).get("type") != "object":
            raise InvalidParams("tools", tool.name, 'its parameters have "type": "object"')


def check_job(job: GenerationJob) -> None:
    """Refuse a job that could not run whatever the state of the engine.

    Raises:
        InvalidParams, InvalidGrammar
    """
    if not job.id:
        raise InvalidParams("id", job.id, "a job needs an id")
    check_params(job.params)
    check_prompt(job.prompt)
    check_text("prefix", job.prefix)
    check_tools(job.tools)
    if job.tools and isinstance(job.prompt, str):
        raise InvalidParams("tools", len(job.tools), "a bare prompt has no place for them")
    if job.tool_choice not in ("auto", "required"):
        raise InvalidParams("tool_choice", job.tool_choice, "known are auto and required")
    if job.tool_choice == "required":
        if not job.tools:
            raise InvalidParams("tool_choice", job.tool_choice, "there are no tools")
        for field in ("grammar", "stop", "ignore_eos"):
            if value := getattr(job.params, field):
                raise InvalidParams(field, value, "the answer is bound to be a call of a tool")
