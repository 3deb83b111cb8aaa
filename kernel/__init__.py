"""The kernel decides and keeps: the pure core, and the shell of Ray actors around it."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llmos.kernel.client import Kernel as Kernel
    from llmos.kernel.context import Context as Context
    from llmos.kernel.manifest import Limits as Limits
    from llmos.kernel.manifest import Manifest as Manifest
    from llmos.kernel.settings import Settings as Settings
    from llmos.kernel.system import SystemConfig as SystemConfig

# Looked up on first use: `import llmos.kernel` must load neither Ray nor torch.
_WHERE = {
    "Context": "llmos.kernel.context",
    "Kernel": "llmos.kernel.client",
    "Limits": "llmos.kernel.manifest",
    "Manifest": "llmos.kernel.manifest",
    "Settings": "llmos.kernel.settings",
    "SystemConfig": "llmos.kernel.system",
}

__all__ = ["Context", "Kernel", "Limits", "Manifest", "Settings", "SystemConfig"]


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        return getattr(importlib.import_module(_WHERE[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
