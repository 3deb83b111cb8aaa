import random

import pytest

from llmos.drivers.engines.steptime import LEAST, StepTimes, fit


def steps(base, batch, context, prompt, noise=0.0, count=60):
    chance = random.Random(3)
    for _ in range(count):
        b, p = chance.randrange(33), chance.choice([0, 0, 64, 256])
        c = b * chance.randrange(16, 500)
        seconds = base + batch * b + context * c + prompt * p
        yield b, c, p, seconds * (1 + noise * chance.uniform(-1, 1))


def test_the_line_is_found_and_its_error_told():
    exact = fit(list(steps(0.02, 0.001, 1e-6, 5e-4)))
    assert exact.base_s == pytest.approx(0.02, rel=1e-6)
    assert exact.batch_s == pytest.approx(0.001, rel=1e-6)
    assert exact.context_s == pytest.approx(1e-6, rel=1e-6)
    assert exact.prompt_s == pytest.approx(5e-4, rel=1e-6)
    assert exact.error < 1e-6
    noisy = fit(list(steps(0.02, 0.001, 1e-6, 5e-4, noise=0.2)))
    assert 0.02 < noisy.error < 0.2
    assert noisy.predict_s(16, 1600, 0) == pytest.approx(0.0376, rel=0.1)


def test_no_coefficient_is_negative():
    found = fit([(b, b * 100, 0, 0.05 - 0.0005 * b) for b in range(1, 30)])
    assert min(found.base_s, found.batch_s, found.context_s, found.prompt_s) >= 0
    # Nothing that grows explains what shrinks.
    assert found.predict_s(10, 1000, 0) == pytest.approx(0.043, rel=0.1)


def test_equal_steps_are_no_division_by_zero():
    found = fit([(8, 800, 0, 0.1)] * 20)
    assert found.predict_s(8, 800, 0) == pytest.approx(0.1)


def test_nothing_is_said_before_enough_was_seen():
    times = StepTimes()
    assert times.fit() is None
    for i in range(LEAST):
        assert times.fit() is None
        times.add(i, i, 0, 0.1)
    assert times.fit() is not None


def test_an_hour_of_decoding_forgets_nothing_of_reading():
    times = StepTimes()
    for step in steps(0.02, 0.001, 0.0, 1e-3, count=20):
        times.add(*step, keep=True)
    for _ in range(20_000):
        times.add(8, 800, 0, 0.04)
    found = times.fit()
    assert found.predict_s(0, 0, 256) == pytest.approx(0.276, rel=0.2)
    assert found.predict_s(8, 800, 0) == pytest.approx(0.04, rel=0.1)
