"""Errors that an agent may see and catch.

The tree, beside that of the drivers (:mod:`llmos.drivers.errors`), whose engine,
rules, graph and vector errors reach agents as they are::

    LlmosError
    └── SyscallError
        ├── CapabilityDenied       the manifest does not allow it
        ├── LabelViolation         the data may not go there
        ├── DeadlineExceeded
        ├── Cancelled              the turn or its caller was cancelled
        ├── Busy                   a queue is at its bound, come back later
        │   └── OverQuota          a tenant has used what it may use
        ├── UnknownResource        no such corpus, graph, rule base, model
        ├── EmptyCorpus
        ├── InvalidRequest         the request's fields do not fit
        ├── InvalidAnswer          what a model wrote is not what was asked for
        │   └── AnswerCutOff       its tokens were used up before the end
        ├── MessageError
        │   ├── UnknownAgent
        │   ├── UnhandledMessage   that program has no handler for that kind
        │   ├── InvalidMessage     the body does not fit the message class
        │   ├── MessageTooLarge
        │   ├── CallCycle          an agent would wait for itself
        │   ├── DeliveryFailed     every host that had the message was lost
        │   └── HandlerFailed      the handler raised
        ├── ReadOnlyTurn           a read-only handler changed the state
        ├── EffectUnknown          nobody knows whether a tool's call was carried out
        ├── Quarantined            the agent gets no turns until a person releases it
        └── ServiceUnavailable     what serves this syscall is gone; it is being restarted
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from llmos.drivers.errors import LlmosError, known_names


class SyscallError(LlmosError):
    """A syscall did not succeed."""


class CapabilityDenied(SyscallError):
    """Default deny: the manifest names no capability for this."""

    def __init__(self, agent: str, syscall: str, resource: str, granted: Iterable[str]) -> None:
        self.agent, self.syscall, self.resource = agent, syscall, resource
        self.granted = tuple(sorted(granted))
        wanted = f"{syscall}:{resource}" if resource else syscall
        super().__init__(
            f"Agent {agent} may not {wanted}",
            remedy=f'If it should, add "{wanted}" to the capabilities of its manifest',
        )


class LabelViolation(SyscallError):
    """The labels of what the turn has seen forbid this flow."""

    def __init__(self, agent: str, sink: str, reason: str, *, remedy: str) -> None:
        self.agent, self.sink, self.reason = agent, sink, reason
        super().__init__(f"Agent {agent} may not pass data to {sink}: {reason}", remedy=remedy)


class DeadlineExceeded(SyscallError):
    """It took longer than it was given; what was started has been cancelled."""

    def __init__(self, what: str, deadline_s: float) -> None:
        self.what, self.deadline_s = what, deadline_s
        super().__init__(f"{what} was not done after {deadline_s:.3g} s")


class Cancelled(SyscallError):
    """The turn was cancelled by its caller, by a kill or by shutdown."""

    def __init__(self, what: str, by: str) -> None:
        self.what, self.by = what, by
        super().__init__(f"{what} was cancelled by {by}")


class Busy(SyscallError):
    """A queue is full; nothing was taken."""

    def __init__(self, what: str, waiting: int, retry_after_s: float) -> None:
        self.what, self.waiting, self.retry_after_s = what, waiting, retry_after_s
        super().__init__(
            f"{what} has {waiting} waiting already", remedy=f"Try again in {retry_after_s:.1f} s"
        )


class OverQuota(Busy):
    """A tenant has used what its quota allows; nothing was taken."""

    def __init__(
        self, owner: str, limit: str, allowed: float, used: float, retry_after_s: float
    ) -> None:
        self.owner, self.limit, self.allowed, self.used = owner, limit, allowed, used
        self.what, self.waiting, self.retry_after_s = owner, 0, retry_after_s
        SyscallError.__init__(
            self,
            f"{owner}: {limit} is {allowed:g}, used are {used:g}",
            remedy=f"Try again in {retry_after_s:.1f} s",
        )


class UnknownResource(SyscallError):
    """The system has no resource of that name (or not for this tenant)."""

    def __init__(self, kind: str, name: str, known: Iterable[str]) -> None:
        self.kind, self.name, self.known = kind, name, tuple(sorted(known))
        super().__init__(f"No {kind} is called {name!r}", remedy=known_names(self.known))


class EmptyCorpus(SyscallError):
    """The corpus holds no passage, so nothing can be retrieved from it."""

    def __init__(self, corpus: str, path: str, skipped: Sequence[str] = ()) -> None:
        self.corpus, self.path, self.skipped = corpus, path, tuple(skipped)
        detail = f" ({len(self.skipped)} files were skipped: {self.skipped[0]})" if skipped else ""
        super().__init__(
            f"Corpus {corpus!r} has no passages{detail}",
            remedy=f"Put Markdown, text, CSV or JSONL files into {path}",
        )


class InvalidRequest(SyscallError):
    """A field of the request does not fit; ``field`` names it."""

    def __init__(self, syscall: str, field: str, reason: str) -> None:
        self.syscall, self.field, self.reason = syscall, field, reason
        super().__init__(f"{syscall}: {field}: {reason}")


class InvalidAnswer(SyscallError):
    """What a model wrote does not fit the class that was asked for."""

    def __init__(
        self, model: str, schema: str, reason: str, text: str, *, remedy: str = ""
    ) -> None:
        self.model, self.schema, self.reason, self.text = model, schema, reason, text[:2000]
        super().__init__(
            f"What {model!r} wrote is no {schema}: {reason}",
            remedy=remedy or "Ask again, or check the text yourself: it is in the error",
        )


class AnswerCutOff(InvalidAnswer):
    """The tokens were used up before the answer was complete."""

    def __init__(self, model: str, schema: str, text: str) -> None:
        super().__init__(
            model,
            schema,
            f"it was cut off after {len(text)} characters",
            text,
            remedy="Raise max_new_tokens, or bound the lengths in the schema",
        )


class MessageError(SyscallError):
    """A message could not be handled."""


class UnknownAgent(MessageError):
    """Nobody of that name has been launched."""

    def __init__(self, agent: str, known: Iterable[str] = ()) -> None:
        self.agent, self.known = agent, tuple(sorted(known))
        super().__init__(f"No agent is called {agent!r}", remedy=known_names(self.known))


class UnhandledMessage(MessageError):
    """The program has no handler for messages of that kind."""

    def __init__(self, agent: str, kind: str, handled: Iterable[str]) -> None:
        self.agent, self.kind, self.handled = agent, kind, tuple(sorted(handled))
        super().__init__(
            f"Agent {agent} does not handle messages of kind {kind!r}",
            remedy="It handles: " + (", ".join(self.handled) or "none"),
        )


class InvalidMessage(MessageError):
    """The body is not a valid message of its kind."""

    def __init__(self, agent: str, kind: str, reason: str) -> None:
        self.agent, self.kind, self.reason = agent, kind, reason
        super().__init__(f"Message {kind!r} to {agent} is not valid: {reason}")


class MessageTooLarge(MessageError):
    """Messages have a bound; large data goes into a store."""

    def __init__(self, size_bytes: int, limit_bytes: int) -> None:
        self.size_bytes, self.limit_bytes = size_bytes, limit_bytes
        super().__init__(
            f"The message has {size_bytes} bytes, the limit is {limit_bytes}",
            remedy="Send a reference to the data instead",
        )


class CallCycle(MessageError):
    """Waiting for this agent would be waiting for oneself."""

    def __init__(self, agent: str, chain: Sequence[str]) -> None:
        self.agent, self.chain = agent, tuple(chain)
        super().__init__(
            f"Asking {agent} would never end: it waits for this answer "
            f"({' → '.join((*self.chain, agent))})",
            remedy="Use tell, or answer from what you have",
        )


class DeliveryFailed(MessageError):
    """Each host that was given the message was lost with it; it is not tried again.

    A message that brings its host down would otherwise bring down one after the other.
    """

    def __init__(self, agent: str, message_id: str, losses: int, reason: str) -> None:
        self.agent, self.message_id, self.losses, self.reason = agent, message_id, losses, reason
        super().__init__(
            f"The message {message_id} to {agent} was in {losses} hosts that were lost: {reason}",
            remedy="See: llmos logs --agent " + agent,
        )


class HandlerFailed(MessageError):
    """The handler raised an error of its own; the agent goes on with its last good state."""

    def __init__(self, agent: str, turn: str, error: str, where: str) -> None:
        self.agent, self.turn, self.error, self.where = agent, turn, error, where
        super().__init__(
            f"Agent {agent} failed with {error} at {where}",
            remedy=f"See: llmos strace {turn}",
        )


class ReadOnlyTurn(SyscallError):
    """A handler marked ``read_only`` changed the state."""

    def __init__(self, agent: str, handler: str, what: str) -> None:
        self.agent, self.handler, self.what = agent, handler, what
        super().__init__(
            f"Agent {agent}: the read-only handler {handler} {what}",
            remedy="Drop read_only=True, or tell the agent a message whose handler does it",
        )


class EffectUnknown(SyscallError):
    """A call of a tool may or may not have been carried out, and only a person can find out.

    Until somebody says, the agent gets no turns: it could do the thing twice.
    """

    def __init__(self, agent: str, turn: str, seq: int, tool: str, idem_key: str) -> None:
        self.agent, self.turn, self.seq = agent, turn, seq
        self.tool, self.idem_key = tool, idem_key
        super().__init__(
            f"Nobody knows whether the call of tool {tool!r} by {agent} was carried out "
            f"(idempotency key {idem_key})",
            remedy=f"Look there, then tell: llmos effects resolve {turn}/{seq}",
        )


class Quarantined(SyscallError):
    """The agent gets no turns; its messages wait."""

    def __init__(self, agent: str, story: str) -> None:
        self.agent, self.story = agent, story
        super().__init__(
            f"Agent {agent} is quarantined: {story}",
            remedy=f"When the cause is gone: llmos release {agent}",
        )


class ServiceUnavailable(SyscallError):
    """The process that serves this syscall is gone and is being replaced."""

    def __init__(self, service: str, reason: str, retry_after_s: float = 1.0) -> None:
        self.service, self.reason, self.retry_after_s = service, reason, retry_after_s
        super().__init__(
            f"{service} is not available: {reason}", remedy=f"Try again in {retry_after_s:.1f} s"
        )
