"""A whole system in one file: ``system.toml``.

Every error names the file, the line where it can be told, and the field.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ByteSize,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from llmos.drivers import registry
from llmos.drivers.errors import LlmosError
from llmos.drivers.protocols import RemoteOptions
from llmos.kernel.core import policies
from llmos.kernel.core.limits import Quota
from llmos.kernel.scheduling import Scheduling
from llmos.syscalls.labels import Labels, Sensitivity


class SystemFileError(LlmosError):
    """The system file cannot be used."""

    def __init__(
        self, file: str, reason: str, *, line: int | None = None, field: str = "", remedy: str = ""
    ) -> None:
        self.file, self.line, self.field, self.reason = file, line, field, reason
        where = f"{file}, line {line}" if line else file
        super().__init__(f"{where}: {field + ': ' if field else ''}{reason}", remedy=remedy)


def _name(value: str) -> str:
    if not re.fullmatch(r"[a-z0-9][a-z0-9._-]{0,62}", value):
        raise ValueError(
            "a name is 1 to 63 of a-z, 0-9, '.', '_' and '-', and begins with a-z or 0-9"
        )
    return value


def _key(value: str) -> str:
    return value if value == "*" else _name(value)


def _sensitivity(value: Any) -> Any:
    if isinstance(value, str):
        try:
            return Sensitivity[value.upper()]
        except KeyError:
            raise ValueError("one of " + ", ".join(s.name.lower() for s in Sensitivity)) from None
    return value


Name = Annotated[str, AfterValidator(_name)]
SensitivityName = Annotated[Sensitivity, BeforeValidator(_sensitivity)]


class _Table(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class SystemTable(_Table):
    """``[system]``."""

    name: Name = "system"
    """Names the run folder; two systems of one name do not run side by side."""
    metrics_port: int | None = Field(default=None, ge=0, le=65535)
    """Serve Prometheus metrics on 127.0.0.1 at this port; 0 takes a free one."""
    hang_timeout_s: float = Field(default=20.0, ge=1.0)
    """A process that has not answered for so long hangs: it is killed and restarted."""


class DeviceTable(_Table):
    """``[[devices]]``: without any, all devices of the machine are used."""

    driver: Literal["cpu", "cuda"] = "cpu"
    index: int = Field(default=0, ge=0)
    memory: ByteSize | None = None
    """Budget; default: a part of what is free."""
    threads: int | None = Field(default=None, ge=1)

    @property
    def name(self) -> str:
        """``cpu:0``."""
        return f"{self.driver}:{self.index}"


class HostsTable(_Table):
    """``[hosts]``: the processes in which turns run."""

    count: int = Field(default=1, ge=1, le=256)


class RemoteTable(_Table):
    """``[models.NAME.remote]``: the server that runs a model of the engine ``remote``."""

    url: Annotated[str, Field(pattern=r"^https?://[^/@\s]+(/\S*)?$")]
    """Up to and with ``/v1``."""
    model: str = Field(min_length=1)
    """What the server calls the model."""
    server: Literal["openai", "vllm", "sglang", "llama.cpp", "ollama", "transformers"] = "openai"
    """Which one it is; ``openai``: any other."""
    api_key_env: str | None = Field(default=None, pattern=r"^\w+$")
    """The environment variable that holds the key, so that it does not stand in the file."""
    tokenizer: Path | None = None
    """A folder with the model's tokenizer: exact counts, and streams that go on after a crash."""
    max_concurrent: int = Field(default=32, ge=1, le=4096)
    """Requests at a time."""
    tokens_per_minute: int = Field(default=0, ge=0)
    """Prompts and answers together; 0: no limit."""
    context_tokens: int = Field(default=8192, ge=16)
    """Longest prompt plus answer."""
    connect_timeout_s: float = Field(default=5.0, gt=0, le=3600, allow_inf_nan=False)
    first_token_timeout_s: float = Field(default=120.0, gt=0, le=3600, allow_inf_nan=False)
    stall_timeout_s: float = Field(default=30.0, gt=0, le=3600, allow_inf_nan=False)
    retries: int = Field(default=4, ge=0, le=20)
    """Attempts after the first."""

    def options(self, model: str, environment: Mapping[str, str]) -> RemoteOptions:
        """For the engine of the model of that name.

        Raises:
            SystemFileError: the environment variable of the key is not set.
        """
        key = ""
        if self.api_key_env is not None:
            key = environment.get(self.api_key_env, "")
            if not key:
                raise SystemFileError(
                    "system.toml",
                    f"the environment variable {self.api_key_env} is not set",
                    field=f"models.{model}.remote.api_key_env",
                    remedy=f"Set {self.api_key_env} to the server's key before the boot",
                )
        fields = self.model_dump(exclude={"api_key_env", "tokenizer"})
        return RemoteOptions(**fields, api_key=key)


class ModelTable(_Table):
    """``[models.NAME]``: a model that the system can make resident."""

    source: str = ""
    """A name of the catalogue or of the model store, or ``hf:``, ``pypi:``, ``path:``. Required,
    but for the remote engine, which has none."""
    engine: Literal["causal", "encoder", "remote", "echo", "hash"]
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    weights: Literal["plain", "int8", "int4"] = "plain"
    """How the weights of linear layers are kept; ``plain``: in ``dtype``."""
    kv_tokens: int = Field(default=16384, ge=16)
    """KV cache for all requests together (causal)."""
    max_batch_tokens: int = Field(default=512, ge=8)
    """Tokens in one step."""
    max_batch_texts: int = Field(default=64, ge=1)
    """Texts in one forward pass (encoder)."""
    max_waiting: int = Field(default=1024, ge=1)
    """Requests in the engine before it answers busy."""
    max_adapters: int = Field(default=0, ge=0, le=4096)
    """Adapters that may be resident beside each other; their memory is granted with the
    model's (causal)."""
    max_adapter_rank: int = Field(default=16, ge=1, le=512)
    """Largest rank of one of them."""
    threads: int | None = Field(default=None, ge=1)
    """Thread quota; default: the kernel decides."""
    device: str | None = None
    """A device's name, e.g. ``cuda:0``; default: where there is room."""
    remote: RemoteTable | None = None
    """The server (remote)."""

    @property
    def origin(self) -> str:
        """Where the model comes from, for people."""
        return self.remote.url if self.remote else self.source

    @property
    def kind(self) -> Literal["causal", "encoder"]:
        """What it can do."""
        return "causal" if self.engine in ("causal", "remote", "echo") else "encoder"

    @property
    def needs_files(self) -> bool:
        """Whether the engine loads weights (the test engines and a remote one do not)."""
        return self.engine in ("causal", "encoder")


class _Owned(_Table):
    tenant: Name | None = None
    """Whose it is; without one, every tenant may be given it."""
    sensitivity: SensitivityName = Sensitivity.INTERNAL
    trusted: bool = True

    @property
    def labels(self) -> Labels:
        """What everything read from it carries."""
        return Labels(
            tenants=frozenset({self.tenant} if self.tenant else ()),
            sensitivity=self.sensitivity,
            trusted=self.trusted,
        )


class _Resource(_Owned):
    path: Path
    """Relative to the system file."""


def _driver(kind: str) -> AfterValidator:
    def check(value: str) -> str:
        if value not in registry.names(kind):
            raise ValueError(f"no such {kind} driver; known: {', '.join(registry.names(kind))}")
        return value

    return AfterValidator(check)


class CorpusTable(_Resource):
    """``[corpora.NAME]``: a folder or file of documents, made into passages and vectors."""

    embedder: str
    """A model of this system whose engine is an encoder."""
    driver: Annotated[str, _driver("vector")] = "faiss"
    max_chars: int = Field(default=900, ge=100, le=20_000)
    """Longest passage."""
    fusion: Path | None = None
    """What ``benchmarks.retrieval --save`` has fitted, relative to the system file; without it
    the legs are fused by their ranks, and nothing is reranked."""


class AdapterTable(_Resource):
    """``[adapters.NAME]``: LoRA weights on a causal model, a folder as peft saves it."""

    model: str
    """A causal model of this system with ``max_adapters`` above 0."""


class GraphTable(_Resource):
    """``[graphs.NAME]``: a knowledge graph read from CSV."""

    driver: Annotated[str, _driver("graph")] = "networkx"


class RulesTable(_Resource):
    """``[rules.NAME]``: a rule base."""

    driver: Annotated[str, _driver("rules")] = "clips"


class ToolTable(_Owned):
    """``[tools.NAME]``: something outside that agents may call."""

    driver: Annotated[str, _driver("tool")]
    trusted: bool = False
    """What it answers comes from outside."""
    options: dict[str, Any] = Field(default_factory=dict)
    """``[tools.NAME.options]``: the driver's own; checked when the tool is made."""


class MailboxesTable(_Table):
    """``[mailboxes]``: when the kernel gives up on a message."""

    attempts: int = Field(default=5, ge=1)
    """Turns that a message may fail in before it becomes a dead letter."""
    deaths: int = Field(default=2, ge=1)
    """Hosts that may be lost with a message in them before it becomes a dead letter."""


class RestartsTable(_Table):
    """``[restarts]``: when the kernel gives up on one of its processes."""

    intensity: int = Field(default=3, ge=1)
    """Losses within ``window_s`` after which it is still restarted; one more, and it is given
    up."""
    window_s: float = Field(default=60.0, gt=0, allow_inf_nan=False)
    """How long a loss counts. Each one that does makes the next restart wait longer."""


class StoreTable(_Table):
    """``[store]``: where everything durable is."""

    driver: Literal["sqlite", "postgres"] = "sqlite"
    url: str | None = None
    """PostgreSQL's address, ``postgresql://…``, or ``env:NAME`` to read it from the
    environment, so that no password stands in the file."""

    def address(self, environment: Mapping[str, str]) -> str | None:
        """The address itself; None for SQLite, whose file is in the run folder.

        Raises:
            SystemFileError: the environment variable is not set, or holds no such address.
        """
        if self.url is None or not self.url.startswith("env:"):
            return self.url
        name = self.url.removeprefix("env:")
        found = environment.get(name, "")
        if not _POSTGRES.match(found):
            raise SystemFileError(
                "system.toml",
                f"the environment variable {name} "
                + ("holds no postgresql:// address" if found else "is not set"),
                field="store.url",
                remedy=f"Set {name} to the address of the database",
            )
        return found


_POSTGRES = re.compile(r"postgres(ql)?://\S+$")


def _policy(value: str) -> str:
    if value not in policies.NAMES:
        raise ValueError(f"no such policy; known: {', '.join(policies.NAMES)}")
    return value


class SchedulerTable(_Table):
    """``[scheduler]``: who enters a model's batch next."""

    policy: Annotated[str, AfterValidator(_policy)] = "fair"


class TenantTable(_Table):
    """``[tenants.NAME]``: a tenant's share and quotas. Tenants need not be listed."""

    weight: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    """Of its share, under the fair policies."""
    tokens_per_minute: int | None = Field(default=None, ge=1)
    """Prompts and answers together, on each device."""
    concurrent_requests: int | None = Field(default=None, ge=1)
    """To models, waiting or running, on each device."""

    @property
    def quota(self) -> Quota:
        """As the core knows it."""
        return Quota(
            tokens_per_minute=self.tokens_per_minute, concurrent_requests=self.concurrent_requests
        )


class AgentTable(_Table):
    """``[[agents]]``: an agent to launch."""

    program: str
    """``module:Class``; the module may stand beside the system file."""
    tenant: Name
    key: Annotated[str, AfterValidator(_key)] = "main"
    """``*`` launches every agent of the program: each key is an agent of its own, and comes
    into being with its first message."""
    config: dict[str, Any] = Field(default_factory=dict)


class SystemConfig(_Table):
    """The whole file."""

    system: SystemTable = SystemTable()
    devices: tuple[DeviceTable, ...] = ()
    hosts: HostsTable = HostsTable()
    models: dict[Name, ModelTable] = Field(default_factory=dict)
    adapters: dict[Name, AdapterTable] = Field(default_factory=dict)
    corpora: dict[Name, CorpusTable] = Field(default_factory=dict)
    graphs: dict[Name, GraphTable] = Field(default_factory=dict)
    rules: dict[Name, RulesTable] = Field(default_factory=dict)
    tools: dict[Name, ToolTable] = Field(default_factory=dict)
    mailboxes: MailboxesTable = MailboxesTable()
    restarts: RestartsTable = RestartsTable()
    store: StoreTable = StoreTable()
    scheduler: SchedulerTable = SchedulerTable()
    tenants: dict[Name, TenantTable] = Field(default_factory=dict)
    agents: tuple[AgentTable, ...] = ()
    base: Path = Path()
    """Folder of the file; relative paths start here. Not written in the file."""

    @model_validator(mode="after")
    def _references(self) -> SystemConfig:
        for name, corpus in self.corpora.items():
            model = self.models.get(corpus.embedder)
            if model is None or model.kind != "encoder":
                encoders = [n for n, m in self.models.items() if m.kind == "encoder"]
                raise _at(
                    ("corpora", name, "embedder"),
                    f"no encoder is called {corpus.embedder!r}; "
                    f"encoders here: {', '.join(encoders) or 'none'}",
                )
        for name, table in self.models.items():
            if (table.engine == "remote") != (table.remote is not None):
                reason = "is missing" if table.engine == "remote" else "only for the remote engine"
                raise _at(("models", name, "remote"), reason)
            if (table.engine == "remote") == bool(table.source):
                reason = "a remote model has none" if table.source else "is missing"
                raise _at(("models", name, "source"), reason)
            if table.max_adapters and table.engine != "causal":
                raise _at(("models", name, "max_adapters"), "only the causal engine has adapters")
        counts: dict[str, int] = {}
        for name, adapter in self.adapters.items():
            base = self.models.get(adapter.model)
            if base is None or not base.max_adapters:
                able = [n for n, m in self.models.items() if m.max_adapters]
                raise _at(
                    ("adapters", name, "model"),
                    f"no model with max_adapters above 0 is called {adapter.model!r}; "
                    f"such models here: {', '.join(able) or 'none'}",
                )
            counts[adapter.model] = counts.get(adapter.model, 0) + 1
            if counts[adapter.model] > base.max_adapters:
                raise _at(
                    ("models", adapter.model, "max_adapters"),
                    f"{base.max_adapters}, and there are more adapters of it",
                )
        url = self.store.url
        if self.store.driver == "postgres" and url is None:
            raise _at(("store", "url"), 'postgres needs one: "postgresql://…" or "env:NAME"')
        if self.store.driver != "postgres" and url is not None:
            raise _at(("store", "url"), f"{self.store.driver} takes none")
        if url is not None and not (_POSTGRES.match(url) or re.fullmatch(r"env:\w+", url)):
            raise _at(("store", "url"), "begins with postgresql://, or is env:NAME")
        names = [d.name for d in self.devices]
        for index, device in enumerate(names):
            if device in names[:index]:
                raise _at(("devices", index, "index"), f"{device} is listed twice")
        for name, table in self.models.items():
            if table.device is not None and names and table.device not in names:
                raise _at(
                    ("models", name, "device"),
                    f"no device {table.device!r}; devices here: {', '.join(names)}",
                )
        return self

    @property
    def scheduling(self) -> Scheduling:
        """What the device processes are told."""
        return Scheduling(
            self.scheduler.policy,
            {name: table.weight for name, table in self.tenants.items()},
            {name: table.quota for name, table in self.tenants.items()},
        )

    def at(self, path: Path) -> Path:
        """A path of the file, made absolute."""
        return path if path.is_absolute() else (self.base / path).resolve()

    @classmethod
    def parse(cls, text: str, file: str, base: Path) -> SystemConfig:
        """Read the text of a system file.

        Raises:
            SystemFileError: with line and field.
        """
        try:
            data = tomllib.loads(text)
        except RecursionError:
            raise SystemFileError(file, "it nests too deeply") from None
        except ValueError as error:
            # TOMLDecodeError, or the int() of a number with thousands of digits.
            at = re.search(r"line (\d+)", str(error))
            line = int(at.group(1)) if at else None
            if "end of document" in str(error):
                line = len(text.splitlines())
            raise SystemFileError(file, str(error), line=line) from None
        if "base" in data:
            raise SystemFileError(file, "unknown field", field="base", line=_line(text, ("base",)))
        try:
            return cls.model_validate({**data, "base": base})
        except ValidationError as error:
            # A misspelt field makes another one missing: name the misspelling.
            first = min(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
            ctx = first.get("ctx", {}).get("error")
            where = ctx.where if isinstance(ctx, _Misplaced) else first["loc"]
            where = tuple(part for part in where if part != "[key]")
            reason = first["msg"].removeprefix("Value error, ")
            if first["type"] == "extra_forbidden":
                reason = "unknown field"
            elif first["type"] == "missing":
                reason = "is missing"
            raise SystemFileError(
                file,
                reason,
                line=_line(text, where),
                field=".".join(map(str, where)),
                remedy="All fields: docs/reference/system-toml.md"
                if first["type"] in ("extra_forbidden", "missing")
                else "",
            ) from None

    @classmethod
    def read(cls, file: Path) -> SystemConfig:
        """Read a system file.

        Raises:
            SystemFileError: it does not exist, is not UTF-8, or is wrong; with line and field.
        """
        try:
            text = file.read_text(encoding="utf-8")
        except FileNotFoundError:
            raise SystemFileError(
                str(file), "no such file", remedy="Give the path of a system.toml"
            ) from None
        except (OSError, UnicodeDecodeError) as error:
            raise SystemFileError(str(file), str(error)) from None
        return cls.parse(text, str(file), file.resolve().parent)

    def with_data(self, overrides: dict[str, Path]) -> SystemConfig:
        """Point corpora and graphs at other files (``--data NAME=PATH``).

        Raises:
            SystemFileError: no corpus or graph of that name, or the path does not exist.
        """
        corpora, graphs = dict(self.corpora), dict(self.graphs)
        for name, path in overrides.items():
            absolute = path.expanduser().resolve()
            if not absolute.exists():
                raise SystemFileError(str(path), "no such file or folder", field=f"--data {name}")
            if name in corpora:
                corpora[name] = corpora[name].model_copy(update={"path": absolute})
            elif name in graphs:
                graphs[name] = graphs[name].model_copy(update={"path": absolute})
            else:
                raise SystemFileError(
                    f"--data {name}",
                    "no corpus or graph of that name",
                    remedy="Known: " + ", ".join([*corpora, *graphs]),
                )
        return self.model_copy(update={"corpora": corpora, "graphs": graphs})


class _Misplaced(ValueError):
    """A ValueError that knows which field it is about."""

    def __init__(self, where: tuple[str | int, ...], reason: str) -> None:
        self.where = where
        super().__init__(reason)


def _at(where: tuple[str | int, ...], reason: str) -> _Misplaced:
    return _Misplaced(where, reason)


def _line(text: str, where: tuple[str | int, ...]) -> int | None:
    """The line of a field: tomllib keeps no positions, so look for header and key.

    ``where`` is pydantic's location, e.g. ``("models", "chat", "kv_tokens")`` or
    ``("agents", 1, "tenant")``. Falls back to the header's line, then to None.
    """
    lines = text.splitlines()
    best: int | None = None
    depth = -1
    table: tuple[str, ...] = ()
    counts: dict[str, int] = {}
    keys = [str(p) for p in where if not isinstance(p, int)]
    indexes = [p for p in where if isinstance(p, int)]
    inside = True
    for number, line in enumerate(lines, 1):
        header = re.match(r"\s*(\[\[?)\s*([^\]]+?)\s*\]", line)
        if header:
            table = tuple(p.strip().strip("\"'") for p in header.group(2).split("."))
            if header.group(1) == "[[":
                name = ".".join(table)
                counts[name] = counts.get(name, -1) + 1
                inside = not indexes or counts[name] == indexes[0]
            else:
                inside = True
            matched = len(table) if inside and tuple(keys[: len(table)]) == table else -1
            if matched > depth:
                best, depth = number, matched
            continue
        key = re.match(r"\s*([A-Za-z0-9_.\"'-]+)\s*=", line)
        if key and inside:
            full = (*table, *(p.strip("\"'") for p in key.group(1).split(".")))
            if tuple(keys[: len(full)]) == full and len(full) > depth:
                best, depth = number, len(full)
    return best
