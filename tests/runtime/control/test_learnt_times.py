"""Times learnt from what GPUs took: near the truth where it was seen, sensible where it was not."""

from __future__ import annotations

import numpy as np
import pytest

from moeless_opt.problems.errors import ProblemError
from moeless_opt.problems.spec import TimeModel
from moeless_opt.runtime.control import LearntTimes

PRIOR = TimeModel(token_cost=1.1e-6, activation_cost=9e-5, launch=1e-5, unit="s")


def truth(tokens: np.ndarray, used: np.ndarray) -> np.ndarray:
    """A kernel with tiles of 64 rows, an expert after the other."""
    return used * (1e-4 + 64e-6 * np.ceil(tokens / used / 64) * 0.9)


def seen(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    chance = np.random.default_rng(seed)
    used = chance.integers(1, 4, count)
    return used * np.exp(chance.uniform(np.log(64), np.log(4096), count)), used


def test_a_curve_is_known_where_it_was_seen() -> None:
    learnt = LearntTimes(PRIOR, 4)
    for part in range(20):
        tokens, used = seen(400, part)
        learnt.see(tokens, used, truth(tokens, used))
    tokens, used = seen(500, 99)
    wrong = np.abs(learnt.time.time(tokens, used, 1.0) / truth(tokens, used) - 1)
    before = np.abs(PRIOR.time(tokens, used, 1.0) / truth(tokens, used) - 1)
    assert wrong.mean() < 0.015 < 0.1 < before.mean()


def test_noise_settles() -> None:
    learnt = LearntTimes(PRIOR, 4)
    chance = np.random.default_rng(1)
    flat = PRIOR.replace(token_cost=2e-6)
    for part in range(100):
        tokens, used = seen(400, part)
        learnt.see(tokens, used, flat.time(tokens, used, 1.0) * chance.lognormal(0, 0.2, 400))
    tokens, used = seen(500, 999)
    wrong = learnt.time.time(tokens, used, 1.0) / (flat.time(tokens, used, 1.0) * np.exp(0.02)) - 1
    assert abs(wrong.mean()) < 0.01
    assert np.abs(wrong).mean() < 0.04


def test_clocks_that_change_are_followed() -> None:
    learnt = LearntTimes(PRIOR, 4)
    tokens, used = seen(400)
    for factor, times in ((1.0, 100), (1.5, 400)):
        for _ in range(times):
            learnt.see(tokens, used, factor * PRIOR.time(tokens, used, 1.0))
    found = learnt.time.time(tokens, used, 1.0) / PRIOR.time(tokens, used, 1.0)
    assert (found > 1.4).mean() > 0.9


def test_what_was_never_seen_is_like_what_was() -> None:
    learnt = LearntTimes(PRIOR, 8)
    learnt.see(1000.0, 1, 2 * PRIOR.time(1000.0, 1, 1.0))
    near = learnt.time.time(2000.0, 2, 1.0) / PRIOR.time(2000.0, 2, 1.0)
    far = learnt.time.time(8.0, 8, 1.0) / PRIOR.time(8.0, 8, 1.0)
    assert 1.5 < near <= 2.0
    assert 1.0 <= far < 1.2 < near


def test_more_tokens_never_take_less() -> None:
    learnt = LearntTimes(PRIOR, 4)
    tokens, used = seen(60)
    learnt.see(tokens, used, np.random.default_rng(2).permutation(truth(tokens, used)))
    assert learnt.time.curve_time is not None
    assert (np.diff(learnt.time.curve_time, axis=0) >= 0).all()


def test_speeds_are_of_gpus_and_idle_ones_say_nothing() -> None:
    learnt = LearntTimes(PRIOR, 1)
    learnt.see([0.0, 5.0, 0.0], [0, 0, 1], [1.0, 1.0, 1.0])
    assert learnt.time is PRIOR
    learnt.see(np.full((3, 2), 640.0), 1, PRIOR.time(640.0, 1, 1.0) * np.array([3.0, 6.0]), [1.0, 0.5])
    assert learnt.time.time(640.0, 1, 1.0) == pytest.approx(3 * PRIOR.time(640.0, 1, 1.0))
    again = LearntTimes(PRIOR, 1)
    again.see(np.full((3, 2), 640.0), 1, PRIOR.time(640.0, 1, 1.0) * np.array([3.0, 6.0]), [1.0, 0.5])
    assert again.time == learnt.time
    with pytest.raises(ProblemError, match="seen"):
        learnt.see([float("nan")], [1], [1.0])
