"""LLM OS: an operating system for LLM agents, on Ray.

The public API. Names are looked up on first use, so that ``import llmos`` loads neither
Ray nor torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llmos.agents.base import Agent as Agent
    from llmos.agents.base import migration as migration
    from llmos.agents.base import on as on
    from llmos.agents.base import on_exit as on_exit
    from llmos.agents.messages import Answer as Answer
    from llmos.agents.messages import Citation as Citation
    from llmos.agents.messages import Question as Question
    from llmos.drivers.errors import LlmosError as LlmosError
    from llmos.kernel.client import Kernel as Kernel
    from llmos.kernel.context import Context as Context
    from llmos.kernel.manifest import Limits as Limits
    from llmos.kernel.manifest import Manifest as Manifest
    from llmos.kernel.settings import Settings as Settings
    from llmos.kernel.system import SystemConfig as SystemConfig
    from llmos.syscalls.exits import Exited as Exited
    from llmos.syscalls.generate import ChatMessage as ChatMessage
    from llmos.syscalls.messages import Message as Message
    from llmos.syscalls.rules import Fact as Fact
    from llmos.syscalls.schemas import ToolDescription as ToolDescription
    from llmos.syscalls.schemas import ToolUse as ToolUse

__version__ = "0.1.0"

_WHERE = {
    "Agent": "llmos.agents.base",
    "Answer": "llmos.agents.messages",
    "ChatMessage": "llmos.syscalls.generate",
    "Citation": "llmos.agents.messages",
    "Context": "llmos.kernel.context",
    "Exited": "llmos.syscalls.exits",
    "Fact": "llmos.syscalls.rules",
    "Kernel": "llmos.kernel.client",
    "Limits": "llmos.kernel.manifest",
    "LlmosError": "llmos.drivers.errors",
    "Manifest": "llmos.kernel.manifest",
    "Message": "llmos.syscalls.messages",
    "Question": "llmos.agents.messages",
    "Settings": "llmos.kernel.settings",
    "SystemConfig": "llmos.kernel.system",
    "ToolDescription": "llmos.syscalls.schemas",
    "ToolUse": "llmos.syscalls.schemas",
    "migration": "llmos.agents.base",
    "on": "llmos.agents.base",
    "on_exit": "llmos.agents.base",
}

__all__ = sorted([*_WHERE, "__version__"])


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        value = getattr(importlib.import_module(_WHERE[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'llmos' has no attribute {name!r}")


def __dir__() -> list[str]:
    return list(__all__)
