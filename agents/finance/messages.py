"""What finance is asked."""

from __future__ import annotations

from pydantic import Field

from llmos.syscalls.messages import Message


class RiskCase(Message):
    """A case to weigh."""

    case: str = Field(min_length=1, max_length=100, pattern=r"^[a-z][a-z0-9-]*$")
    """What kind of case: ``loan``, ``limit-increase``, ``dispute``, …; the rules know them."""
    amount: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """In units of ``currency``; 0 where no money is named."""
    currency: str = Field(default="EUR", pattern=r"^[A-Z]{3}$")
    facts: dict[str, str | float] = Field(default_factory=dict, max_length=200)
    """What is known: ``income`` (per month), ``debt`` (payments per month),
    ``late-payments`` (last twelve months), ``account-months``, ``country``, …"""
    text: str = Field(default="", max_length=20_000)
    """The person's own words."""
