"""Programs that the benchmarks launch."""

from __future__ import annotations

from typing import ClassVar

from pydantic import BaseModel

from llmos import Agent, Context, Limits, Manifest, Message, on
from llmos.syscalls.generate import Generate


class Write(Message):
    """Write exactly so many tokens about this."""

    text: str
    new_tokens: int


class Written(Message):
    """The text, and how many tokens it has."""

    text: str
    new_tokens: int


class WriterConfig(BaseModel):
    """Which model."""

    model: str = "chat"


class Writer(Agent):
    """Generates, and does nothing else: what is measured is the way to the engine and back."""

    manifest = Manifest(
        models=("$model",),
        capabilities=("generate:$model",),
        limits=Limits(turn_deadline_s=600),
    )
    Config: ClassVar[type[BaseModel]] = WriterConfig
    config: WriterConfig

    @on(Write, read_only=True)
    async def write(self, message: Write, os: Context) -> Written:
        """One request, greedy."""
        request = Generate(
            model=self.config.model,
            prompt=message.text,
            max_new_tokens=message.new_tokens,
            ignore_eos=True,
        )
        made = await os.call(request)
        return Written(text=made.text, new_tokens=made.new_tokens)
