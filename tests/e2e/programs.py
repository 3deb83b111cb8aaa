"""Programs of the end-to-end tests."""

from __future__ import annotations

from llmos import Agent, Answer, Context, Manifest, Question, on


class Raw(Agent):
    """Hands the question to the model as it is, three times over."""

    manifest = Manifest(models=("chat",), capabilities=("generate:chat",))

    @on(Question, read_only=True)
    async def answer(self, question: Question, os: Context) -> Answer:
        made = await os.generate("chat", question.text * 3, max_new_tokens=8)
        return Answer(text=made.text or "-")
