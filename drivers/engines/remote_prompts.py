"""Prompts of a remote model on this side: how long they are, and what must not be in them."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

from llmos.drivers.engines.checks import check_prompt
from llmos.drivers.errors import EngineFailed, InvalidParams
from llmos.drivers.protocols import ChatTurn, GenerationJob

BYTES_PER_TOKEN = 4
TOKENS_PER_TURN = 4
"""For the estimate: what a chat template puts around a turn."""
LONGEST_TOKEN_CHARS = 16
"""A prompt that would not fit even in tokens of this length is refused without asking."""

_CONTROLS = re.compile(r"<[|｜][^<>\s]{1,60}?[|｜]>")
"""What control tokens look like in most vocabularies (ChatML, Llama 3, Phi, DeepSeek)."""


class RemotePrompts:
    """What is known of a server's tokenizer: nothing, or a folder with the same one."""

    def __init__(self, model: str, folder: Path | None) -> None:
        """
        Raises:
            EngineFailed: the folder holds no tokenizer that can be used.
        """
        self._encoder: Any = None
        self._controls = _CONTROLS
        if folder is None:
            return
        # Only here: without a folder, neither library is needed.
        from transformers import AutoTokenizer

        from llmos.drivers.engines.prompts import PromptEncoder

        try:
            self._tokenizer = AutoTokenizer.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
            self._encoder = PromptEncoder(model, self._tokenizer)
        except (OSError, ValueError, KeyError, ImportError) as error:
            raise EngineFailed(
                model, f"the tokenizer in {folder}: {type(error).__name__}: {error}"
            ) from error
        names = sorted(self._tokenizer.all_special_tokens, key=len, reverse=True)
        self._controls = re.compile("|".join([*map(re.escape, names), _CONTROLS.pattern]))

    @property
    def exact(self) -> bool:
        """Whether counts are exact and chat prompts can be rendered."""
        return self._encoder is not None

    def count(self, prompt: str | tuple[ChatTurn, ...], prefix: str = "") -> int:
        """Tokens of prompt and prefix; without a tokenizer an estimate. Raises InvalidParams."""
        check_prompt(prompt)
        if self._encoder is not None:
            return len(self._encoder.encode(prompt)) + len(self._encoder.encode_text(prefix))
        turns = 0 if isinstance(prompt, str) else len(prompt)
        size = sum(len(t.encode()) for t in [*_texts(prompt), prefix])
        return max(1, math.ceil(size / BYTES_PER_TOKEN)) + TOKENS_PER_TURN * turns

    def at_least(self, job: GenerationJob) -> int:
        """Tokens that prompt and prefix have in any case, told without a tokenizer's work."""
        longest = self._encoder.longest_token if self._encoder else LONGEST_TOKEN_CHARS
        return sum(map(len, [*_texts(job.prompt), job.prefix])) // int(longest)

    def refuse_controls(self, job: GenerationJob) -> None:
        """A server reads control tokens in text as such: a user could end the own turn and speak
        as the system. Engines here keep them text; there, all that helps is to refuse them.

        Raises:
            InvalidParams: naming the token.
        """
        for field, texts in (("prompt", _texts(job.prompt)), ("prefix", [job.prefix])):
            for text in texts:
                found = self._controls.search(text)
                if found:
                    raise InvalidParams(
                        field, found.group(), "the server would take it for a control token"
                    )

    def rendered(self, job: GenerationJob) -> str | None:
        """A chat prompt with a prefix as one text, to go on from; None: the server renders."""
        if self._encoder is None or not job.prefix or isinstance(job.prompt, str):
            return None
        text: str = self._tokenizer.apply_chat_template(
            [{"role": t.role, "content": t.content} for t in job.prompt],
            add_generation_prompt=True,
            tokenize=False,
        )
        start = self._tokenizer.bos_token
        if start and self._tokenizer("a").input_ids[:1] == [self._tokenizer.bos_token_id]:
            # The server puts it before a bare text by itself.
            text = text.removeprefix(start)
        return text + job.prefix


def _texts(prompt: str | tuple[ChatTurn, ...]) -> list[str]:
    return [prompt] if isinstance(prompt, str) else [t.content for t in prompt]
