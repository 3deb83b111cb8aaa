"""Settings of this machine, read from the environment in this one place.

What describes a *system* (models, agents, quotas) stands in ``system.toml``; what
differs from machine to machine (folders, addresses, log level) stands here, each as
``LLMOS_<NAME>``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import AliasChoices, Field
from pydantic_settings import BaseSettings, SettingsConfigDict


class Settings(BaseSettings):
    """Settings of this machine. Frozen; make a new one to differ."""

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

    @property
    def models_dir(self) -> Path:
        """Folder of the model store."""
        return self.models if self.models is not None else self.home / "models"

    @property
    def runs_dir(self) -> Path:
        """One folder per system: store, logs, address of the running kernel."""
        return self.home / "runs"
