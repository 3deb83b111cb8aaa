"""Errors of the drivers, and the root of all errors of LLM OS.

The tree::

    LlmosError
    └── DriverError
        ├── DriverNotFound          no driver of that name
        ├── DriverNotInstalled      its package is missing
        ├── DeviceError
        │   └── DeviceUnavailable
        ├── ModelError
        │   ├── UnknownModel
        │   ├── DigestMismatch
        │   │   └── ModelDamaged    the stored files are no longer those that were pulled
        │   ├── ModelBusy           another process is at work on it
        │   ├── ModelConflict       the name is taken by another source
        │   ├── ModelUnusable       broken or incomplete files, a conversion that failed
        │   ├── SourceUnavailable   no network, no such package, no such folder
        │   └── UnsafeModel         pickled weights or remote code
        ├── EngineError
        │   ├── PromptTooLong
        │   ├── InvalidParams
        │   ├── InvalidGrammar      a schema or expression that cannot bind an answer
        │   ├── UnknownAdapter      not resident; nothing was answered without it
        │   ├── AdapterUnusable     it does not fit its model
        │   ├── AdaptersFull        as many as the model may have
        │   ├── NoHead              an encoder without a classification head
        │   ├── WeightsUnsupported  int8 or int4 that the device or the model cannot have
        │   ├── EngineBusy          queue full, come back later
        │   │   ├── ServerBusy      a remote server has no room, or this key has had its share
        │   │   └── ServerDown      a remote server that failed again and again is left alone
        │   └── EngineFailed        the engine broke while the request was in it
        │       └── RemoteError     a remote server did not give a whole answer
        │           ├── RemoteUnreachable  no connection, or no answer in time
        │           ├── RemoteRefused      it said no: key, model, parameters, content
        │           ├── RemoteBroken       what it sent is no answer, or ends in the middle
        │           └── GrammarIgnored     its answer is not what the grammar allows
        ├── VectorError
        │   ├── DimensionMismatch
        │   ├── NotFinite
        │   └── IndexMismatch       written by another embedding model or version
        ├── FusionFileError         a fitted fusion or reranker that cannot be read
        ├── GraphError
        │   ├── UnknownNode
        │   ├── GraphLimitExceeded  a query that would look at too much
        │   └── GraphFileError      a file of nodes or edges that cannot be read
        ├── RulesError
        │   ├── RuleSyntaxError
        │   ├── UnknownTemplate     a fact that the rule base does not declare
        │   ├── RuleLimitExceeded
        │   ├── RuleTimeout         still at work when its time was over
        │   └── RuleFailed          an action of a rule went wrong
        ├── DocumentError
        ├── ToolError
        │   ├── ToolRefused         the target said no, nothing was done
        │   ├── ToolUnavailable     the target was not reached, nothing was done
        │   └── ToolUncertain       it may or may not have been done
        └── StoreError
            ├── StaleEpoch          another owner has taken over
            ├── MailboxFull         so many messages wait for the receiver
            ├── AlreadyHandled      the message of this turn does not wait any more
            └── StoreUnavailable

Each error keeps its facts as attributes and ends its message with a remedy.
Errors cross process boundaries, so all of them survive pickling with their
attributes, whatever their ``__init__`` takes.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


class LlmosError(Exception):
    """The root of every error that LLM OS raises on purpose."""

    remedy: str = ""

    def __init__(self, message: str, *, remedy: str = "") -> None:
        self.remedy = remedy
        super().__init__(f"{message}. {remedy}" if remedy else message)

    def __reduce__(self) -> tuple[Any, ...]:
        # The default would call __init__ with the finished message and lose every attribute.
        return (_restore, (type(self), self.args, dict(self.__dict__)))

    @property
    def code(self) -> str:
        """The class name: what logs, metrics and JSON output call this error."""
        return type(self).__name__

    @property
    def facts(self) -> dict[str, Any]:
        """The attributes of this error, without the message."""
        return {k: v for k, v in self.__dict__.items() if not k.startswith("_")}


def _restore(cls: type[LlmosError], args: tuple[Any, ...], state: dict[str, Any]) -> LlmosError:
    error = cls.__new__(cls, *args)
    error.args = args
    error.__dict__.update(state)
    return error


def known_names(names: Iterable[str]) -> str:
    """Render names for the end of an error message."""
    ordered = sorted(names)
    return "Known: " + ", ".join(ordered) if ordered else "None is known here"


class DriverError(LlmosError):
    """A driver could not do what was asked."""


class DriverNotFound(DriverError):
    """The registry has no driver of that kind and name."""

    def __init__(self, kind: str, name: str, known: Iterable[str]) -> None:
        self.kind, self.name, self.known = kind, name, tuple(sorted(known))
        super().__init__(f"No {kind} driver is called {name!r}", remedy=known_names(self.known))


class DriverNotInstalled(DriverError):
    """The driver exists, but a package that it imports does not."""

    def __init__(self, kind: str, name: str, package: str, install: str) -> None:
        self.kind, self.name, self.package, self.install = kind, name, package, install
        super().__init__(
            f"The {kind} driver {name!r} needs the package {package!r}, which is not installed",
            remedy=f"Run: {install}",
        )


class DeviceError(DriverError):
    """Something about a device."""


class DeviceUnavailable(DeviceError):
    """The device does not exist on this machine or cannot be used."""

    def __init__(self, device: str, reason: str, *, remedy: str = "") -> None:
        self.device, self.reason = device, reason
        super().__init__(f"Device {device!r} is not available: {reason}", remedy=remedy)


class ModelError(DriverError):
    """Something about a model's files."""


class UnknownModel(ModelError):
    """No catalogue entry, model store entry or source of that name."""

    def __init__(self, model: str, known: Iterable[str], *, remedy: str = "") -> None:
        self.model, self.known = model, tuple(sorted(known))
        super().__init__(
            f"No model is called {model!r}",
            remedy=". ".join(filter(None, [known_names(self.known), remedy])),
        )


class DigestMismatch(ModelError):
    """The bytes that arrived are not those that were pinned; nothing was kept."""

    def __init__(self, model: str, file: str, expected: str, found: str) -> None:
        self.model, self.file, self.expected, self.found = model, file, expected, found
        super().__init__(
            f"Model {model!r}: {file} has sha256 {found}, pinned is {expected}; nothing was kept",
            remedy="Do not use the file. If the source was changed on purpose, pin the new digest",
        )


class ModelDamaged(DigestMismatch):
    """A stored file is not the one that was pulled: changed, gone or added."""

    def __init__(self, model: str, file: str, expected: str, found: str) -> None:
        self.model, self.file, self.expected, self.found = model, file, expected, found
        ModelError.__init__(
            self,
            f"Model {model!r} in the store is damaged: {file} should be {expected}, is {found}",
            remedy=f"Run: llmos models rm {model}, then pull it again",
        )


class ModelBusy(ModelError):
    """Another process works on the model and did not finish in time."""

    def __init__(self, model: str, holder: str, waited_s: float) -> None:
        self.model, self.holder, self.waited_s = model, holder, waited_s
        super().__init__(
            f"Model {model!r} is being worked on by {holder}; waited {waited_s:.0f} s",
            remedy="Wait for it to end or stop it, then try again",
        )


class ModelConflict(ModelError):
    """The store has a model of that name from another source."""

    def __init__(self, model: str, stored_source: str, asked_source: str) -> None:
        self.model, self.stored_source, self.asked_source = model, stored_source, asked_source
        super().__init__(
            f"The store has a model {model!r} from {stored_source!r}, asked for is {asked_source!r}",
            remedy=f"Run: llmos models rm {model}, or give the new one another name",
        )


class ModelUnusable(ModelError):
    """The files do not make a model that can be loaded; nothing of them was kept."""

    def __init__(self, model: str, file: str, reason: str, *, remedy: str = "") -> None:
        self.model, self.file, self.reason = model, file, reason
        super().__init__(f"Model {model!r} cannot be used: {file}: {reason}", remedy=remedy)


class SourceUnavailable(ModelError):
    """The source cannot be reached or does not have the model; nothing was written."""

    def __init__(self, model: str, source: str, reason: str, *, remedy: str) -> None:
        self.model, self.source, self.reason = model, source, reason
        super().__init__(
            f"Model {model!r} cannot be had from {source!r}: {reason}; nothing was written",
            remedy=remedy,
        )


class UnsafeModel(ModelError):
    """The model would run code when loaded (pickled weights, remote code)."""

    def __init__(self, model: str, reason: str) -> None:
        self.model, self.reason = model, reason
        super().__init__(
            f"Model {model!r} is refused: {reason}",
            remedy="Use a safetensors version of it whose architecture transformers knows",
        )


class EngineError(DriverError):
    """Something about running a model."""


class PromptTooLong(EngineError):
    """Prompt and asked-for new tokens do not fit the context or the KV budget."""

    def __init__(
        self, model: str, prompt_tokens: int, max_new_tokens: int, limit_tokens: int, limit: str
    ) -> None:
        self.model, self.limit = model, limit
        self.prompt_tokens, self.max_new_tokens = prompt_tokens, max_new_tokens
        self.limit_tokens = limit_tokens
        super().__init__(
            f"Model {model!r}: the prompt has {prompt_tokens} tokens and {max_new_tokens} new ones "
            f"are asked for, but the {limit} holds {limit_tokens}",
            remedy="Shorten the prompt, retrieve fewer passages or lower max_new_tokens",
        )


class InvalidParams(EngineError):
    """A generation parameter that no engine could honour."""

    def __init__(self, field: str, value: object, reason: str) -> None:
        self.field, self.value, self.reason = field, repr(value)[:200], reason
        super().__init__(f"{field}={self.value} is not possible: {reason}")


class EngineBusy(EngineError):
    """The engine's queue is at its bound."""

    def __init__(self, model: str, waiting: int, retry_after_s: float) -> None:
        self.model, self.waiting, self.retry_after_s = model, waiting, retry_after_s
        super().__init__(
            f"Model {model!r} already has {waiting} requests waiting",
            remedy=f"Try again in {retry_after_s:.1f} s",
        )


class EngineFailed(EngineError):
    """The engine broke with this request in it; the request had no effect."""

    def __init__(self, model: str, reason: str) -> None:
        self.model, self.reason = model, reason
        super().__init__(f"The engine of model {model!r} failed: {reason}")


class ServerBusy(EngineBusy):
    """A remote server has no room, or has given this key its share; it was asked repeatedly."""

    def __init__(self, model: str, url: str, reason: str, retry_after_s: float) -> None:
        self.model, self.url, self.reason = model, url, reason
        self.waiting, self.retry_after_s = 0, retry_after_s
        EngineError.__init__(
            self,
            f"Model {model!r}: the server {url} {reason}",
            remedy=f"Try again in {retry_after_s:.1f} s",
        )


class ServerDown(EngineBusy):
    """A remote server failed again and again; for a while it is not asked at all."""

    def __init__(self, model: str, url: str, failures: int, retry_after_s: float) -> None:
        self.model, self.url, self.failures = model, url, failures
        self.waiting, self.retry_after_s = 0, retry_after_s
        EngineError.__init__(
            self,
            f"Model {model!r}: the server {url} failed {failures} times in a row and is left alone",
            remedy=f"Look after the server; it is asked again in {retry_after_s:.1f} s",
        )


class RemoteError(EngineFailed):
    """A remote server did not give a whole answer. ``status`` is that of HTTP, where it gave one."""

    def __init__(
        self, model: str, url: str, reason: str, *, status: int | None = None, remedy: str = ""
    ) -> None:
        self.model, self.url, self.reason, self.status = model, url, reason, status
        EngineError.__init__(self, f"Model {model!r}: the server {url} {reason}", remedy=remedy)


class RemoteUnreachable(RemoteError):
    """No connection, or none that lasted until an answer began."""


class RemoteRefused(RemoteError):
    """The server said no; the same request will be refused again."""


class RemoteBroken(RemoteError):
    """What the server sent is no answer, or ends in the middle of one. Text that was delivered
    before is what the model wrote, but not all of it."""


class GrammarIgnored(RemoteError):
    """The answer is not what the grammar allows: the server does not bind answers by it."""


class InvalidGrammar(EngineError):
    """A JSON schema, expression or grammar that cannot be followed token by token."""

    def __init__(self, kind: str, reason: str) -> None:
        self.kind, self.reason = kind, reason
        super().__init__(
            f"The {kind} cannot bind an answer: {reason}",
            remedy="Simplify it, or leave it out and check the answer yourself",
        )


class UnknownAdapter(EngineError):
    """A job names an adapter that is not resident; it is never answered without it."""

    def __init__(self, model: str, adapter: str, known: Iterable[str]) -> None:
        self.model, self.adapter, self.known = model, adapter, tuple(sorted(known))
        super().__init__(
            f"Model {model!r} has no adapter {adapter!r}", remedy=known_names(self.known)
        )


class AdapterUnusable(EngineError):
    """An adapter that does not fit its model, or uses what is not supported."""

    def __init__(self, model: str, adapter: str, reason: str) -> None:
        self.model, self.adapter, self.reason = model, adapter, reason
        super().__init__(f"Adapter {adapter!r} cannot be used on {model!r}: {reason}")


class AdaptersFull(EngineError):
    """All places for adapters are taken."""

    def __init__(self, model: str, limit: int) -> None:
        self.model, self.limit = model, limit
        super().__init__(
            f"Model {model!r} has {limit} adapters, and room for no more",
            remedy="Unload one, or raise max_adapters of the model in system.toml",
        )


class NoHead(EngineError):
    """An encoder that only embeds was asked to classify."""

    def __init__(self, model: str) -> None:
        self.model = model
        super().__init__(
            f"Model {model!r} has no classification head",
            remedy="Name a model that was trained to classify, or embed and compare",
        )


class WeightsUnsupported(EngineError):
    """The weights cannot be kept as asked for; nothing was loaded in another form instead."""

    def __init__(self, model: str, weights: str, reason: str) -> None:
        self.model, self.weights, self.reason = model, weights, reason
        super().__init__(
            f"Model {model!r} cannot have its weights in {weights}: {reason}",
            remedy='Set another `weights` for it in system.toml; "plain" always works',
        )


class VectorError(DriverError):
    """Something about a vector index."""


class DimensionMismatch(VectorError):
    """Vectors of another width than the index was made for."""

    def __init__(self, expected: int, found: int) -> None:
        self.expected, self.found = expected, found
        super().__init__(
            f"The index holds vectors of {expected} numbers, got {found}",
            remedy="Embed with the model that the index was built with",
        )


class NotFinite(VectorError):
    """A vector holds NaN or infinity; nothing was added."""

    def __init__(self, ids: Iterable[str]) -> None:
        self.ids = tuple(ids)
        shown = ", ".join(self.ids[:5]) or "a query"
        super().__init__(f"NaN or infinity in the vector of {shown}; nothing was added")


class IndexMismatch(VectorError):
    """The saved index does not belong to what it is being opened for."""

    def __init__(self, path: str, expected: str, found: str) -> None:
        self.path, self.expected, self.found = path, expected, found
        super().__init__(
            f"The index in {path} was written for {found!r}, asked for is {expected!r}",
            remedy="Delete the folder; it is built again at the next start",
        )


class FusionFileError(DriverError):
    """The file of a fitted fusion or reranker cannot be read."""

    def __init__(self, path: str, reason: str) -> None:
        self.path, self.reason = path, reason
        super().__init__(
            f"{path} is no fitted fusion: {reason}",
            remedy="Fit one with python -m benchmarks.retrieval FOLDER --save FILE",
        )


class GraphError(DriverError):
    """Something about a graph."""


class UnknownNode(GraphError):
    """The graph has no such node."""

    def __init__(self, node: str, graph: str = "") -> None:
        self.node, self.graph = node, graph
        super().__init__(f"The graph {graph!r} has no node {node!r}")


class GraphLimitExceeded(GraphError):
    """A query had to look at more than one query may; nothing of it is answered."""

    def __init__(self, graph: str, limit: str) -> None:
        self.graph, self.limit = graph, limit
        super().__init__(
            f"The query of graph {graph!r} needs more than {limit}",
            remedy="Name a node or a relation in more of its patterns",
        )


class GraphFileError(GraphError):
    """A file of nodes or edges that cannot be read; nothing of it was taken."""

    def __init__(
        self, path: str, reason: str, line: int | None = None, *, remedy: str = ""
    ) -> None:
        self.path, self.reason, self.line = path, reason, line
        where = f"{path}, line {line}" if line else path
        super().__init__(f"{where}: {reason}", remedy=remedy)


class RulesError(DriverError):
    """Something about a rule base."""


class RuleSyntaxError(RulesError):
    """The rule engine did not accept the source; its own words are in ``engine_message``."""

    def __init__(self, name: str, engine_message: str, line: int | None = None) -> None:
        self.name, self.engine_message, self.line = name, engine_message, line
        where = f"{name}, line {line}" if line else name
        super().__init__(f"Rules in {where} cannot be read: {engine_message.strip()}")


class UnknownTemplate(RulesError):
    """A fact of a template, or with a slot, that the rule base does not declare."""

    def __init__(self, name: str, template: str, reason: str, known: Iterable[str]) -> None:
        self.name, self.template, self.known = name, template, tuple(sorted(known))
        super().__init__(
            f"Rules {name!r} take no fact {template!r}: {reason}", remedy=known_names(self.known)
        )


class RuleLimitExceeded(RulesError):
    """The rules were still firing at the limit."""

    def __init__(self, name: str, limit: int, last_rules: Iterable[str]) -> None:
        self.name, self.limit, self.last_rules = name, limit, tuple(last_rules)
        super().__init__(
            f"Rules {name!r} had not come to rest after {limit} firings; "
            f"the last were {', '.join(self.last_rules)}",
            remedy="Look for a rule that makes itself true again, or raise the limit",
        )


class RuleTimeout(RulesError):
    """The rules were still at work when their time was over; they were stopped."""

    def __init__(self, name: str, timeout_s: float) -> None:
        self.name, self.timeout_s = name, timeout_s
        super().__init__(
            f"Rules {name!r} had not come to rest after {timeout_s:g} s and were stopped",
            remedy="Look for a loop without an end or conditions that match everything with "
            "everything, or give them more time",
        )


class RuleFailed(RulesError):
    """An action of a rule went wrong; the rest of the evaluation was given up."""

    def __init__(self, name: str, rule: str, engine_message: str) -> None:
        self.name, self.rule, self.engine_message = name, rule, engine_message.strip()
        at = f", rule {rule!r}" if rule else ""
        super().__init__(
            f"Rules {name!r}{at} failed: {self.engine_message}",
            remedy="Correct the rule; no fact of this evaluation was kept",
        )


class DocumentError(DriverError):
    """A document or folder of documents that cannot be read."""

    def __init__(self, path: str, reason: str, *, remedy: str = "") -> None:
        self.path, self.reason = path, reason
        super().__init__(f"{path}: {reason}", remedy=remedy)


class ToolError(DriverError):
    """A tool did not do what was asked, or may not have."""

    def __init__(self, tool: str, reason: str, *, remedy: str = "") -> None:
        self.tool, self.reason = tool, reason
        super().__init__(f"Tool {tool!r}: {reason}", remedy=remedy)


class ToolRefused(ToolError):
    """The target said no. Nothing was done, and the same call will be refused again."""


class ToolUnavailable(ToolError):
    """The target was not reached. Nothing was done; it may be tried again."""


class ToolUncertain(ToolError):
    """The call left, and no answer came: it may or may not have been carried out."""


class StoreError(DriverError):
    """Something about the durable store."""


class StaleEpoch(StoreError):
    """The agent has another owner; nothing of this commit was kept."""

    def __init__(self, agent: str, epoch: int, current: int) -> None:
        self.agent, self.epoch, self.current = agent, epoch, current
        super().__init__(f"Agent {agent} is owned by epoch {current}; epoch {epoch} may not commit")


class MailboxFull(StoreError):
    """A message finds no room; nothing of this part was kept."""

    def __init__(self, agent: str, waiting: int) -> None:
        self.agent, self.waiting = agent, waiting
        super().__init__(f"The mailbox of {agent} has {waiting} messages waiting")


class AlreadyHandled(StoreError):
    """The message that a turn wants to acknowledge does not wait; nothing of it was kept."""

    def __init__(self, agent: str, message: str) -> None:
        self.agent, self.message = agent, message
        super().__init__(f"The message {message} to {agent} was handled or given up already")


class StoreUnavailable(StoreError):
    """The store cannot be opened or written; nothing of this commit was kept."""

    def __init__(
        self, store: str, reason: str, *, remedy: str = "Free disk space or repair the path"
    ) -> None:
        self.store, self.reason = store, reason
        super().__init__(f"The store {store} cannot be used: {reason}", remedy=remedy)
