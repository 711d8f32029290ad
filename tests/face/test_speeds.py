"""Speeds measured of GPUs that are nominally alike, and planned with."""

from __future__ import annotations

import numpy as np
import pytest

import moeless_opt as mo
from moeless_opt.problems.errors import ProblemError


def test_slow_gpus_are_found_through_the_noise_and_planned_around() -> None:
    rng = np.random.default_rng(0)
    true = np.array([1.0, 1.0, 0.8, 1.0, 1.1, 1.0, 1.0, 1.0])
    tokens = rng.integers(50, 150, (40, 8))
    seconds = tokens / true * 1e-5 * rng.lognormal(0, 0.03, tokens.shape)
    speeds = mo.measured_speeds(tokens, seconds)
    assert speeds[[0, 1, 3, 5, 6, 7]].tolist() == [1.0] * 6
    assert speeds[[2, 4]] == pytest.approx([0.8, 1.1], rel=0.02)
    loads = rng.lognormal(0, 1, (2, 32))
    topology = mo.uniform(1, 8, slots=5)
    plan = mo.plan(loads, topology.replace(speed_G=speeds))
    # Without them the slow GPU holds the others up.
    blind = mo.plan(loads, topology)
    for made, most in ((plan, 1.02), (blind, None)):
        tokens_LG = (made.share_LGC * loads[np.arange(2)[:, None, None], made.slots_LGC]).sum(2)
        time = (tokens_LG / true).max(1) / (loads.sum(1) / true.sum())
        assert time.max() < most if most else time.min() > 1.2


def test_a_time_model_says_what_work_is() -> None:
    time = mo.TimeModel(token_cost=1e-6, activation_cost=1e-4, unit="s")
    tokens = np.array([[10, 400], [300, 20]])
    active = np.array([[4, 2], [1, 8]])
    seconds = (1e-6 * tokens + 1e-4 * active) / np.array([1.0, 0.5])
    found = mo.measured_speeds(tokens, seconds, activated=active, time=time)
    assert found[0] / found[1] == pytest.approx(2.0)
    with pytest.raises(ProblemError, match="activated: is missing"):
        mo.measured_speeds(tokens, seconds, time=time)


def test_samples_that_say_nothing_are_left_out() -> None:
    tokens = np.array([[10.0, 10, 10], [0, 10, 10], [10, 10, 10]])
    seconds = np.array([[1.0, 1, 2], [5, 1, 2], [1, np.nan, 2]])
    assert mo.measured_speeds(tokens, seconds).tolist() == [1.0, 1.0, 0.5]
    with pytest.raises(ProblemError, match="no sample of GPU 1"):
        mo.measured_speeds(tokens * [1, 0, 1], seconds)
    with pytest.raises(ProblemError, match="must be \\[samples, GPUs\\]"):
        mo.measured_speeds(tokens, seconds[:2])
    with pytest.raises(ProblemError, match="seconds: not an array of numbers"):
        mo.measured_speeds(tokens, [["a", "b", "c"]] * 3)
    with pytest.raises(ProblemError, match="must be \\[samples, GPUs\\]"):
        mo.measured_speeds([[]], [[]])
