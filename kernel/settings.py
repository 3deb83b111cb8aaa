"""Settings of this machine, read from the environment in this one place.

What describes a *system* (models, agents, quotas) stands in ``system.toml``; what
differs from machine to machine (folders, addresses, log level) stands here, each as
``LLMOS_<NAME>``.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any, Literal

from pydantic import AliasChoices, Field, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from llmos.drivers.errors import LlmosError

PRIVATE = 0o700
"""Mode of the folders that we make: they hold every conversation."""


class SettingsError(LlmosError):
    """A setting of this machine has no possible value, or names a folder that cannot be used."""

    def __init__(self, setting: str, reason: str, *, remedy: str = "") -> None:
        self.setting, self.reason = setting, reason
        super().__init__(f"{setting}: {reason}", remedy=remedy)


class Settings(BaseSettings):
    """Settings of this machine. Frozen; make a new one to differ.

    Raises:
        SettingsError: a value is not possible; names the variable or the argument.
    """

    model_config = SettingsConfigDict(
        env_prefix="LLMOS_",
        frozen=True,
        extra="ignore",
        # RAY_ADDRESS="" is no address: it would be neither joined nor taken for none.
        env_ignore_empty=True,
    )

    home: Path = Field(default_factory=lambda: Path.home() / ".local" / "share" / "llmos")
    """Everything LLM OS keeps: models, runs, caches. ``LLMOS_HOME``."""

    models: Path | None = None
    """The model store, where it is not ``<home>/models``. ``LLMOS_MODELS``."""

    ray_address: str | None = Field(
        default=None, validation_alias=AliasChoices("LLMOS_RAY_ADDRESS", "RAY_ADDRESS")
    )
    """Join this Ray cluster instead of starting one. Ray sets ``RAY_ADDRESS`` inside a job."""

    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    """Level of the structured logs. ``LLMOS_LOG_LEVEL``."""

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            first = error.errors()[0]
            name = str(first["loc"][0]) if first["loc"] else "settings"
            if name not in values and name.islower():
                name = f"LLMOS_{name.upper()}"
            raise SettingsError(name, first["msg"]) from None

    @property
    def models_dir(self) -> Path:
        """Folder of the model store."""
        return self.models if self.models is not None else self.home / "models"

    @property
    def runs_dir(self) -> Path:
        """One folder per system: store, logs, address of the running kernel."""
        return self.home / "runs"

    def run_dir(self, system: str) -> Path:
        """Folder of one system."""
        return self.runs_dir / system

    def make_folders(self, system: str) -> Path:
        """Make the folders of a system, and return the one of its runs.

        New ones are open to their owner alone. Those that are there keep their mode:
        somebody may have wanted it so.

        Raises:
            SettingsError: they cannot be made or written.
        """
        run = self.run_dir(system)
        try:
            self.home.parent.mkdir(parents=True, exist_ok=True)
            # One by one: with parents=True the mode would count for the last one only.
            for folder in (self.home, self.home / "cache", self.runs_dir, run, run / "logs"):
                folder.mkdir(mode=PRIVATE, exist_ok=True)
                if not os.access(folder, os.W_OK | os.X_OK):
                    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))
        except OSError as error:
            raise SettingsError(
                "LLMOS_HOME", str(error), remedy="Set it to a folder that you can write"
            ) from None
        return run
