"""A few steps of known size before the first job, so that the kernel can plan from the start."""

from __future__ import annotations

import time
from collections.abc import Callable

from llmos.drivers.engines.sequence import Sequence
from llmos.drivers.engines.stepper import Stepper
from llmos.drivers.engines.steptime import StepTimes
from llmos.drivers.protocols import SamplingParams

SHAPES = ((1, 64, 0), (0, 0, 64), (8, 64, 0), (8, 256, 0), (16, 32, 0), (0, 0, 192), (32, 128, 0))
"""(sequences, context of each, prompt tokens), cheap ones first: on a slow machine the
dearer ones are left out."""


def calibrate(
    stepper: Stepper, times: StepTimes, limit_s: float, wanted: Callable[[], bool]
) -> None:
    """Take steps of all shapes that fit, until the time is over or somebody waits.

    Nothing is read that a job wrote, and nothing is kept: contexts are empty cache rows.
    """
    began = time.monotonic()
    warm = False
    for shape in (SHAPES[0], *SHAPES):
        if wanted() or time.monotonic() - began + _longest(times, shape) > limit_s:
            return
        _step(stepper, times, shape, keep=warm)
        # The first step of all pays for what is set up once.
        warm = True


def _longest(times: StepTimes, shape: tuple[int, int, int]) -> float:
    """What a step may take, by what is known so far."""
    known = times.fit()
    batch, context, prompt = shape
    return known.predict_s(batch, batch * context, prompt) if known else 0.0


def _step(stepper: Stepper, times: StepTimes, shape: tuple[int, int, int], *, keep: bool) -> None:
    batch, context, prompt = shape
    # One more than is written, so that the shape stays what it is until the step is over.
    params = SamplingParams(max_new_tokens=2)
    lengths = [context] * batch + ([prompt] if prompt else [])
    inside: list[Sequence] = []
    try:
        for number, length in enumerate(lengths):
            # Each a tenant of its own, so that none finds another's empty blocks.
            tenant = f"\0{len(inside)} of {shape}"
            sequence = Sequence(f"calibration-{number}", [0] * length, params, tenant=tenant)
            if not stepper.admit(sequence):
                break
            inside.append(sequence)
            if number < batch:
                # As if all but the last token had been read before.
                sequence.prompt_tokens -= 1
                sequence.read = length - 1
        result = stepper.step()
        if result is not None and keep and len(inside) == len(lengths):
            read = sum(new for _, new in result.parts) - result.decoding
            times.add(result.decoding, result.context, read, result.seconds, keep=True)
    finally:
        for sequence in inside:
            stepper.drop(sequence)
        if stepper.cache.memory is not None:
            stepper.cache.memory.prefixes.expire(time.monotonic())
