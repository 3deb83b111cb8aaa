"""The simulation runs without Ray."""

from __future__ import annotations

import os

RUNS = float(os.environ.get("LLMOS_SIMULATIONS", "1"))
"""How many times the usual number of runs: ``LLMOS_SIMULATIONS=20`` takes minutes."""
