"""A program's manifest: what it needs, what it may do, and within which limits.

Default deny: a syscall that no capability names is refused. ``$name`` inside a
string stands for the field ``name`` of the program's configuration, so that one
program can be launched on different models and corpora without widening what each
instance may touch.
"""

from __future__ import annotations

import fnmatch
import re
from functools import lru_cache
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ByteSize, ConfigDict, Field

from llmos.syscalls.errors import InvalidRequest

SYSCALLS = frozenset(
    {
        "ask",
        "call",
        "classify",
        "clock",
        "embed",
        "generate",
        "graph",
        "monitor",
        "publish",
        "random",
        "retrieve",
        "rules",
        "send",
        "show",
        "state",
        "subscribe",
        "timer",
    }
)
"""Names that a capability may begin with."""


class Limits(BaseModel):
    """Bounds on one agent of a program."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    turn_deadline_s: float = Field(default=120.0, gt=0)
    """A turn that takes longer is cancelled."""
    mailbox: int = Field(default=256, ge=1)
    """Messages waiting; one more is answered Busy."""
    concurrent_turns: int = Field(default=32, ge=1)
    """Read-only turns of one agent that run at the same time."""
    syscalls_per_turn: int = Field(default=1000, ge=1)
    call_depth: int = Field(default=8, ge=1)
    """How many agents may wait for one another in a chain."""


class ModelNeed(BaseModel):
    """A model the program needs resident while it is launched."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    memory: ByteSize | None = None
    """Device memory to grant, where the prediction from the model's files is not enough."""


def _need(value: Any) -> Any:
    return {"name": value} if isinstance(value, str) else value


class Manifest(BaseModel):
    """What a program needs and may do."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    description: str = ""
    models: tuple[Annotated[ModelNeed, BeforeValidator(_need)], ...] = ()
    """Models it generates, embeds or classifies with: a name, or a ModelNeed."""
    stores: tuple[str, ...] = ()
    """Corpora, graphs, rule bases and tools that must exist: ``corpus:help``,
    ``graph:diseases``, ``rules:support``, ``tool:booking``."""
    capabilities: tuple[str, ...] = ()
    """What it may call: ``syscall`` or ``syscall:resource``, where the resource may hold
    ``*``: ``generate:chat``, ``retrieve:help``, ``ask:bank/finance/*``, ``call:booking``,
    ``clock``."""
    limits: Limits = Limits()

    def resolve(self, config: BaseModel) -> Manifest:
        """Put the configuration's values in place of ``$name``.

        Raises:
            InvalidRequest: ``$name`` is no field of the configuration, or a capability
                begins with no known syscall.
        """

        def fill(text: str) -> str:
            def value(match: re.Match[str]) -> str:
                name = match.group(1)
                if name not in type(config).model_fields:
                    raise InvalidRequest(
                        "manifest", text, f"${name} is no field of {type(config).__name__}"
                    )
                return str(getattr(config, name))

            return re.sub(r"\$(\w+)", value, text)

        capabilities = tuple(fill(c) for c in self.capabilities)
        for capability in capabilities:
            if capability.split(":", 1)[0] not in SYSCALLS:
                raise InvalidRequest(
                    "manifest",
                    f"capability {capability!r}",
                    f"no syscall of that name; known: {', '.join(sorted(SYSCALLS))}",
                )
        return self.model_copy(
            update={
                "models": tuple(
                    m.model_copy(update={"name": fill(m.name)}) for m in self.models if fill(m.name)
                ),
                "stores": tuple(filter(_named, map(fill, self.stores))),
                "capabilities": tuple(filter(_named, capabilities)),
            }
        )

    def allows(self, syscall: str, resource: str) -> bool:
        """Whether a capability names this syscall on this resource."""
        wanted = f"{syscall}:{resource}" if resource else syscall
        return _allows(self.capabilities, wanted)


@lru_cache(maxsize=4096)
def _allows(capabilities: tuple[str, ...], wanted: str) -> bool:
    """Remembered: it is asked before every syscall, and matching patterns takes as long as the
    quickest of them."""
    return any(c == wanted or fnmatch.fnmatchcase(wanted, c) for c in capabilities)


def _named(entry: str) -> bool:
    """False for what an empty configuration field leaves behind: ``ask:`` of no agent."""
    return not entry.endswith(":")
