"""What every causal engine checks before it takes a job, with or without a model."""

from __future__ import annotations

import math

from llmos.drivers.errors import InvalidParams
from llmos.drivers.protocols import ChatTurn, GenerationJob, SamplingParams

MAX_STOPS = 16
"""Stop strings of one job."""
MAX_STOP_CHARS = 256
"""Characters of one stop string; this much text and one token can be held back at most."""


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
        InvalidParams
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
        if turn.role not in ("system", "user", "assistant"):
            raise InvalidParams("role", turn.role, "known are system, user and assistant")
        check_text("prompt", turn.content)


def check_job(job: GenerationJob) -> None:
    """Refuse a job that could not run whatever the state of the engine. Raises InvalidParams."""
    if not job.id:
        raise InvalidParams("id", job.id, "a job needs an id")
    check_params(job.params)
    check_prompt(job.prompt)
    check_text("prefix", job.prefix)
