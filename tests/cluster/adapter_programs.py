"""Who asks for adapters. In a module of its own, so that hosts import no torch."""

from __future__ import annotations

from llmos import Agent, Context, Manifest, Message, on
from llmos.syscalls.generate import Generate


class Write(Message):
    prompt: str
    adapter: str = ""


class Written(Message):
    text: str


class Author(Agent):
    manifest = Manifest(
        models=("chat",),
        capabilities=("generate:chat", "generate:chat+tone", "generate:chat+b*"),
    )

    @on(Write, read_only=True)
    async def write(self, message: Write, os: Context) -> Written:
        request = Generate(
            model="chat",
            prompt=message.prompt,
            raw=True,
            adapter=message.adapter,
            max_new_tokens=8,
            ignore_eos=True,
        )
        return Written(text=(await os.call(request)).text)
