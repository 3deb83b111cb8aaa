"""The context of a turn: the syscalls, as an agent program calls them."""

from __future__ import annotations

import json
import logging
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, overload

from llmos.syscalls import clock, exits, graph, messages, timers, topics
from llmos.syscalls.base import Request, Response
from llmos.syscalls.classify import Classified, Classify
from llmos.syscalls.effects import Call, CallResult
from llmos.syscalls.embed import Embed, Embedded
from llmos.syscalls.errors import InvalidRequest
from llmos.syscalls.generate import AnswerGrammar, ChatMessage, Generate, Generated
from llmos.syscalls.labels import Labels
from llmos.syscalls.messages import Message, Wire
from llmos.syscalls.retrieve import Filter, Retrieve, Retrieved
from llmos.syscalls.rules import Evaluate, Fact, Verdict
from llmos.syscalls.schemas import ModelT, ToolLike, answer_schema, describe_all
from llmos.syscalls.show import Show
from llmos.syscalls.state import ReadState, StateSnapshot

if TYPE_CHECKING:
    from typing import Literal

    from llmos.drivers.protocols import GenerationChunk

ResponseT = TypeVar("ResponseT", bound=Response)
MessageT = TypeVar("MessageT", bound=Message)


class Dispatcher(Protocol):
    """Carries out syscalls for one turn: checks, deadline, handler, provenance, record."""

    @property
    def agent(self) -> str:
        """The agent whose turn it is."""
        ...

    @property
    def turn(self) -> str:
        """The id of the turn."""
        ...

    @property
    def labels(self) -> Labels:
        """The join of all the turn has seen."""
        ...

    @property
    def remaining_s(self) -> float:
        """Seconds until the turn's deadline."""
        ...

    async def call(self, request: Request[ResponseT], deadline_s: float | None) -> ResponseT:
        """Carry out one syscall."""
        ...

    def stream(self, request: Generate, deadline_s: float | None) -> AsyncIterator[GenerationChunk]:
        """Carry out ``generate``, chunk by chunk."""
        ...

    def patched(self, name: str) -> bool:
        """Whether this turn runs the code after a change of that name."""
        ...


def _choices(choices: Sequence[str]) -> str:
    if isinstance(choices, str):  # Each of its characters would be a choice.
        raise InvalidRequest("generate", "choices", "they are a list of texts, not one text")
    return json.dumps(list(choices), ensure_ascii=False)


_IDS = uuid.UUID("5f3c1b0e-6a34-5d0c-9d2b-0f5b8f6c7a11")
"""Namespace of the ids that :meth:`Context.uuid` makes."""


_LOG = logging.getLogger("llmos.agent")


class Context:
    """The syscalls of a turn. Every call may be given ``deadline_s``, else the turn's counts.

    All calls raise :class:`~llmos.syscalls.errors.SyscallError` or a driver's error;
    both are :class:`~llmos.drivers.errors.LlmosError`.
    """

    def __init__(self, dispatcher: Dispatcher) -> None:
        self._dispatcher = dispatcher
        self._ids = 0
        self.log = _LOG
        """Structured log; its records carry this agent and turn."""

    @property
    def agent(self) -> str:
        """This agent: ``tenant/program/key``."""
        return self._dispatcher.agent

    @property
    def tenant(self) -> str:
        """The tenant this agent belongs to."""
        return self.agent.split("/", 1)[0]

    @property
    def turn(self) -> str:
        """The id of this turn."""
        return self._dispatcher.turn

    @property
    def labels(self) -> Labels:
        """The join of the labels of all this turn has seen."""
        return self._dispatcher.labels

    @property
    def remaining_s(self) -> float:
        """Seconds until the turn's deadline."""
        return self._dispatcher.remaining_s

    async def call(self, request: Request[ResponseT], deadline_s: float | None = None) -> ResponseT:
        """Make any syscall by its Request."""
        return await self._dispatcher.call(request, deadline_s)

    # -- models

    @overload
    async def generate(
        self,
        model: str,
        prompt: str | Sequence[ChatMessage],
        *,
        schema: type[ModelT],
        adapter: str = "",
        max_new_tokens: int = 512,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        seed: int | None = None,
        deadline_s: float | None = None,
    ) -> ModelT: ...

    @overload
    async def generate(
        self,
        model: str,
        prompt: str | Sequence[ChatMessage],
        *,
        adapter: str = "",
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        stop: Sequence[str] = (),
        seed: int | None = None,
        logprobs: int | None = None,
        choices: Sequence[str] | None = None,
        regex: str | None = None,
        tools: Sequence[ToolLike] = (),
        tool_choice: Literal["auto", "required"] = "auto",
        deadline_s: float | None = None,
    ) -> Generated: ...

    async def generate(
        self,
        model: str,
        prompt: str | Sequence[ChatMessage],
        *,
        schema: type[ModelT] | None = None,
        adapter: str = "",
        max_new_tokens: int | None = None,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        stop: Sequence[str] = (),
        seed: int | None = None,
        logprobs: int | None = None,
        choices: Sequence[str] | None = None,
        regex: str | None = None,
        tools: Sequence[ToolLike] = (),
        tool_choice: Literal["auto", "required"] = "auto",
        deadline_s: float | None = None,
    ) -> Generated | ModelT:
        """Let a model write. Temperature 0 is greedy decoding.

        Args:
            model: Its name.
            prompt: A string is one user message; else the conversation.
            schema: A pydantic class: the answer is made to be JSON of it, and is returned as
                an object of it. For its text, counts and provenance as well, use
                ``call(Generate(…))`` and :meth:`Generated.parsed`.
            adapter: LoRA weights that change how the model answers, by name.
            max_new_tokens: 128 tokens, or 512 with ``schema``, if nothing is said.
            temperature: Divides the scores of the tokens.
            top_p: The likeliest tokens that together have this probability are kept.
            top_k: So many of the likeliest tokens are kept; 0: all.
            stop: The text ends before the first of these.
            seed: Source of this answer's chance: the same again gives the same answer.
            logprobs: 0 for those of the tokens written, n for the n likeliest as well.
            choices: The answer is made to be one of these.
            regex: The answer is made to match the whole of this expression.
            tools: What the model may ask for: pydantic classes, functions with type hints, or
                descriptions. Nothing is called; see ``Generated.tool_calls``.
            tool_choice: ``required``: the answer is made to be a call of one of the tools.
            deadline_s: Seconds; the turn's deadline counts in any case.

        Raises:
            AnswerCutOff: ``max_new_tokens`` were used up before the object was complete.
            InvalidAnswer: the answer fits the schema, but not what the class checks besides.
            InvalidGrammar: the schema or expression cannot bind an answer.
            UnknownAdapter: the model has no such adapter, or not for this tenant.
        """
        grammars: list[AnswerGrammar] = []
        if schema is not None:
            grammars.append(AnswerGrammar(kind="json_schema", source=answer_schema(schema)))
        if choices is not None:
            grammars.append(AnswerGrammar(kind="choices", source=_choices(choices)))
        if regex is not None:
            grammars.append(AnswerGrammar(kind="regex", source=regex))
        if len(grammars) > 1:
            reason = f"a {grammars[0].kind} binds the answer already"
            raise InvalidRequest("generate", grammars[1].kind, reason)
        if max_new_tokens is None:
            max_new_tokens = 128 if schema is None else 512
        request = Generate(
            model=model,
            prompt=prompt if isinstance(prompt, str) else tuple(prompt),
            adapter=adapter,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            stop=tuple(stop),
            seed=seed,
            logprobs=logprobs,
            grammar=grammars[0] if grammars else None,
            tools=describe_all(tools),
            tool_choice=tool_choice,
        )
        written = await self.call(request, deadline_s)
        return written if schema is None else written.parsed(schema)

    async def stream(
        self, request: Generate, *, deadline_s: float | None = None
    ) -> AsyncIterator[str]:
        """Let a model write, piece by piece; leaving the loop cancels the rest."""
        async with aclosing(self._dispatcher.stream(request, deadline_s)) as chunks:  # type: ignore[type-var]
            async for chunk in chunks:
                if chunk.text:
                    yield chunk.text

    async def embed(
        self, model: str, texts: Sequence[str], *, deadline_s: float | None = None
    ) -> Embedded:
        """Texts into vectors of length 1."""
        return await self.call(Embed(model=model, texts=tuple(texts)), deadline_s)

    async def classify(
        self, model: str, texts: str | Sequence[str], *, deadline_s: float | None = None
    ) -> Classified:
        """One text or several into the classes that the model was trained for."""
        several = (texts,) if isinstance(texts, str) else tuple(texts)
        return await self.call(Classify(model=model, texts=several), deadline_s)

    # -- knowledge

    async def retrieve(
        self,
        corpus: str,
        query: str,
        *,
        k: int = 5,
        min_score: float = -1.0,
        mode: Literal["vector", "lexical", "hybrid"] | None = None,
        filters: Sequence[Filter] = (),
        rerank: bool = False,
        diversity: float = 0.0,
        explain: bool = False,
        deadline_s: float | None = None,
    ) -> Retrieved:
        """Passages near the query, best first; by vector where no mode is given."""
        request = Retrieve(
            corpus=corpus,
            query=query,
            k=k,
            min_score=min_score,
            mode=mode,
            filters=tuple(filters),
            rerank=rerank,
            diversity=diversity,
            explain=explain,
        )
        return await self.call(request, deadline_s)

    async def find_nodes(
        self, graph_name: str, text: str, *, limit: int = 10, deadline_s: float | None = None
    ) -> graph.Nodes:
        """Nodes of a graph that the text names."""
        return await self.call(
            graph.FindNodes(graph=graph_name, text=text, limit=limit), deadline_s
        )

    async def neighbours(
        self,
        graph_name: str,
        node: str,
        *,
        relation: str | None = None,
        direction: Literal["out", "in", "both"] = "both",
        limit: int = 100,
        deadline_s: float | None = None,
    ) -> graph.Neighbours:
        """What a graph says about a node."""
        request = graph.FindNeighbours(
            graph=graph_name, node=node, relation=relation, direction=direction, limit=limit
        )
        return await self.call(request, deadline_s)

    async def paths(
        self,
        graph_name: str,
        start: str,
        end: str,
        *,
        max_hops: int = 3,
        limit: int = 10,
        deadline_s: float | None = None,
    ) -> graph.Paths:
        """How two nodes are connected."""
        request = graph.FindPaths(
            graph=graph_name, start=start, end=end, max_hops=max_hops, limit=limit
        )
        return await self.call(request, deadline_s)

    async def rules(
        self,
        name: str,
        facts: Sequence[Fact],
        *,
        max_firings: int = 1000,
        deadline_s: float | None = None,
    ) -> Verdict:
        """Let a rule base decide about the facts."""
        request = Evaluate(rules=name, facts=tuple(facts), max_firings=max_firings)
        return await self.call(request, deadline_s)

    # -- agents

    @overload
    async def ask(
        self, agent: str, message: Message, *, deadline_s: float | None = None
    ) -> Message | None: ...

    @overload
    async def ask(
        self,
        agent: str,
        message: Message,
        reply: type[MessageT],
        *,
        deadline_s: float | None = None,
    ) -> MessageT: ...

    async def ask(
        self,
        agent: str,
        message: Message,
        reply: type[MessageT] | None = None,
        *,
        deadline_s: float | None = None,
    ) -> Message | None:
        """Ask another agent and wait. With ``reply``, the answer is checked to be of that class."""
        budget = self.remaining_s if deadline_s is None else min(deadline_s, self.remaining_s)
        request = messages.Ask(agent=agent, message=Wire.of(message), deadline_s=max(budget, 0.001))
        asked = await self.call(request, deadline_s)
        if reply is not None:
            wire = asked.reply or Wire.of_json("nothing", {})
            return wire.decode(reply, self.agent)
        return asked.reply.message() if asked.reply is not None else None

    async def show(self, text: str) -> None:
        """Show a piece of text to whoever waits for the answer of this turn.

        All that the turn has read is durable before, so that nobody is ever shown one thing
        and, after a crash, another.
        """
        await self.call(Show(text=text))

    async def send(self, agent: str, message: Message, priority: int = 0) -> str:
        """Tell another agent something; returns the message's id.

        The message becomes durable with this turn's commit: it is then handled once, also
        after a crash. If the turn fails, it was never sent.

        Args:
            agent: The receiver.
            message: What it is told.
            priority: -100 to 100. Higher is handled first, but never before what this agent
                sent it earlier.
        """
        request = messages.Send(agent=agent, message=Wire.of(message), priority=priority)
        return (await self.call(request)).message_id

    async def publish(self, topic: str, message: Message, priority: int = 0) -> int:
        """Send a message to all agents of the tenant that want the topic, except this one.

        The messages become durable with this turn's commit. Who gets it is settled now:
        a subscription that commits later does not count.

        Returns:
            How many agents will get it; at most 10,000, more raise InvalidRequest.
        """
        request = topics.Publish(topic=topic, message=Wire.of(message), priority=priority)
        return (await self.call(request)).receivers

    async def subscribe(self, topic: str) -> None:
        """Get what is published under a topic; begins with this turn's commit, is durable."""
        await self.call(topics.Subscribe(topic=topic))

    async def unsubscribe(self, topic: str) -> None:
        """Get no more of a topic; counts from this turn's commit."""
        await self.call(topics.Unsubscribe(topic=topic))

    async def monitor(self, agent: str) -> None:
        """Get :class:`~llmos.syscalls.exits.Exited` when an agent is killed or quarantined.

        Begins with this turn's commit and is durable. Only within the tenant: others raise
        UnknownAgent.
        """
        await self.call(exits.Monitor(agent=agent))

    async def demonitor(self, agent: str) -> None:
        """Watch an agent no more, linked or not; counts from this turn's commit."""
        await self.call(exits.Demonitor(agent=agent))

    async def link(self, agent: str) -> None:
        """Be ended with an agent when it is killed or quarantined; as :meth:`monitor`."""
        await self.call(exits.Link(agent=agent))

    async def read_state(self, agent: str, *, deadline_s: float | None = None) -> StateSnapshot:
        """The committed state of another agent."""
        return await self.call(ReadState(agent=agent), deadline_s)

    # -- tools

    async def call_tool(self, tool: str, /, **arguments: Any) -> CallResult:
        """Call a tool: something outside, whose effects cannot be taken back.

        It happens now and stays done, also if this turn fails later. An intent is durable
        before it leaves, and the outcome soon after it came: when the turn runs again, the
        call is not made again, or first found out about. Arguments are plain JSON data. For a deadline of its own
        use ``call(Call(tool=…, arguments=…), deadline_s)``.

        Raises:
            ToolRefused, ToolUnavailable: nothing was done.
            EffectUnknown: nobody knows whether it was done; a person has to say.
        """
        return await self.call(Call(tool=tool, arguments=arguments))

    # -- time and chance

    async def timer(
        self,
        name: str,
        message: Message,
        *,
        after_s: float | None = None,
        at: float | None = None,
    ) -> float:
        """Get a message once: after some seconds, or at a time (seconds since 1970).

        Set with this turn's commit, durable, replaces this agent's timer of that name. At
        most ten years ahead.

        Returns:
            When it is due, in seconds since 1970.
        """
        request = timers.SetTimer(name=name, message=Wire.of(message), after_s=after_s, at=at)
        return (await self.call(request)).due

    async def schedule(self, name: str, message: Message, cron: str, tz: str = "UTC") -> float:
        """Get a message again and again, until :meth:`cancel_timer`.

        Set with this turn's commit, durable, replaces this agent's timer of that name.

        Args:
            name: 1 to 100 printable characters.
            message: What it gets.
            cron: Minute, hour, day, month and day of the week: ``0 9 * * 1-5``.
            tz: The time zone they are meant in.

        Returns:
            When it is due first, in seconds since 1970.

        Raises:
            InvalidRequest: the expression or the time zone cannot be read.
        """
        request = timers.SetTimer(name=name, message=Wire.of(message), cron=cron, tz=tz)
        return (await self.call(request)).due

    async def cancel_timer(self, name: str) -> None:
        """Forget a timer of this agent, if there is one; counts from this turn's commit."""
        await self.call(timers.CancelTimer(name=name))

    def uuid(self) -> str:
        """A unique id, the same again when the turn runs again.

        Made of the turn's id and the number of the id in it, so it needs no record. Not a
        secret: whoever knows the turn can work it out.
        """
        self._ids += 1
        return str(uuid.uuid5(_IDS, f"{self.turn}/{self._ids}"))

    def patched(self, name: str) -> bool:
        """Whether this turn runs the code after a change of that name.

        Lets code change while turns are under way: False when the turn began, and recorded
        syscalls, before the change, True for all others. The answer is recorded::

            if os.patched("ask-twice"):
                ...  # the new way
            else:
                ...  # the old way, until no such turn is left
        """
        return self._dispatcher.patched(name)

    async def now(self) -> float:
        """Seconds since 1970-01-01 UTC."""
        return (await self.call(clock.Now())).time_s

    async def sleep(self, seconds: float) -> None:
        """Wait; other agents go on."""
        await self.call(clock.Sleep(seconds=seconds))

    async def random(self) -> float:
        """A number in [0, 1)."""
        return (await self.call(clock.Random())).value
