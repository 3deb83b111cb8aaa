"""How long a step takes, learnt from steps that were taken."""

from __future__ import annotations

from collections import deque
from itertools import combinations

import numpy as np
import numpy.typing as npt

from llmos.drivers.protocols import StepTime

WINDOW = 256
"""Steps of one kind that are remembered; older ones count no more."""
LEAST = 4
"""Steps before anything is said: as many as there are unknowns."""


class StepTimes:
    """A window of steps, and the line through them. Guarded by the engine's lock.

    Steps that read prompts and steps that only decode have a window each, and the
    calibration's are kept beside them: an hour of decoding alone must not wash out what
    is known of reading.
    """

    def __init__(self) -> None:
        self._kept: list[tuple[int, int, int, float]] = []
        self._decoding: deque[tuple[int, int, int, float]] = deque(maxlen=WINDOW)
        self._reading: deque[tuple[int, int, int, float]] = deque(maxlen=WINDOW)
        self._fitted: StepTime | None = None
        self._stale = False

    def add(
        self, batch: int, context: int, prompt: int, seconds: float, *, keep: bool = False
    ) -> None:
        """A step with ``batch`` decoding sequences, ``context`` tokens of context together and
        ``prompt`` tokens read took so long. ``keep``: part of the calibration."""
        window = self._kept if keep else self._reading if prompt else self._decoding
        window.append((batch, context, prompt, seconds))
        self._stale = True

    def fit(self) -> StepTime | None:
        """The model that fits best; None: too few steps were seen. Some milliseconds at most."""
        if self._stale:
            self._stale = False
            steps = [*self._kept, *self._decoding, *self._reading]
            self._fitted = fit(steps) if len(steps) >= LEAST else None
        return self._fitted


def fit(steps: list[tuple[int, int, int, float]]) -> StepTime:
    """Least squares of the relative error, no coefficient below zero.

    Relative, because a step of 20 ms that is told as 40 misleads a scheduler more than
    one of 400 ms told as 420. With four coefficients, trying each set of those that are
    not zero is exact and needs no solver.

    Args:
        steps: (batch, context, prompt, seconds), at least one.
    """
    table = np.asarray(steps, dtype=np.float64)
    seconds = np.maximum(table[:, 3], 1e-9)
    terms = np.column_stack([np.ones(len(table)), table[:, :3]])
    weighted = terms / seconds[:, None]
    gram, goal = weighted.T @ weighted, weighted.sum(axis=0)
    best: npt.NDArray[np.float64] = np.zeros(4)
    least = np.inf
    for size in range(1, 5):
        for chosen in combinations(range(4), size):
            at = list(chosen)
            found = np.linalg.lstsq(gram[np.ix_(at, at)], goal[at], rcond=None)[0]
            if (found < 0).any():
                continue
            whole = np.zeros(4)
            whole[at] = found
            loss = float(whole @ gram @ whole - 2 * whole @ goal)
            if loss < least - 1e-9:
                best, least = whole, loss
    error = float(np.abs(weighted @ best - 1).mean())
    base, batch, context, prompt = map(float, best)
    return StepTime(base, batch, context, prompt, error)
