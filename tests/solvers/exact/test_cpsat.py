"""CP-SAT: against enumeration, and with whole units that never cut a plan off."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from moeless_opt.problems.plan.evaluate import gpu_times
from moeless_opt.problems.plan.plan import Status
from moeless_opt.solvers.core.stopping import MaxTime
from moeless_opt.solvers.exact.cpsat import solve_cpsat
from moeless_opt.solvers.exact.layer import layer_of
from moeless_opt.solvers.exact.milp import solve_milp
from moeless_opt.solvers.pack.patterns import solve_patterns


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("alike", [True, False])
def test_equal_split_against_the_pattern_search(seed: int, alike: bool) -> None:
    rng = np.random.default_rng(seed)
    load = rng.lognormal(0, 1, 5)
    capacity = np.full(3, 3) if alike else rng.integers(2, 4, 3)
    speed = np.ones(3) if alike else rng.choice([0.7, 1.0, 1.3], 3)
    result = solve_cpsat(layer_of(load, capacity, speed), seed=seed)
    assert result.status is Status.OPTIMAL
    assert result.slots_GC is not None
    assert result.share_GC is not None
    assert result.value == pytest.approx(solve_patterns(load, capacity, speed).upper, rel=2e-6)
    time_LG = gpu_times(load[None], result.slots_GC[None], result.share_GC[None], speed)
    assert time_LG.max() == pytest.approx(result.value)
    assert result.bound <= result.value <= result.bound * (1 + 1e-6)


@pytest.mark.parametrize("seed", range(8))
def test_fractional_split_against_highs(seed: int) -> None:
    rng = np.random.default_rng(seed)
    load = rng.lognormal(0, 1, 5)
    capacity, speed = rng.integers(1, 3, 4) + np.array([1, 0, 1, 0]), rng.choice([0.7, 1.0, 1.3], 4)
    layer = layer_of(load, capacity, speed, "fractional")
    ours, theirs = solve_cpsat(layer), solve_milp(layer)
    assert ours.status is Status.OPTIMAL
    assert ours.value == pytest.approx(theirs.value, rel=1e-5)
    assert ours.bound <= theirs.value * (1 + 1e-6)


def test_limits_on_replicas() -> None:
    load = np.array([90.0, 5.0, 4.0])
    for most, least in itertools.product((1, 2, 3), (1, 2)):
        if least > most:
            continue
        layer = layer_of(load, np.full(3, 3), max_replicas=most, min_replicas=least)
        result = solve_cpsat(layer)
        assert result.slots_GC is not None
        count = np.bincount(result.slots_GC[result.slots_GC >= 0], minlength=3)
        assert count.max() <= most
        assert count.min() >= least
        expected = solve_patterns(load, np.full(3, 3), max_replicas=most, min_replicas=least)
        assert result.value == pytest.approx(expected.upper, rel=2e-6)


def test_a_known_plan_is_kept_or_beaten() -> None:
    load = np.random.default_rng(1).lognormal(0, 1, 8)
    capacity = np.full(8, 2)
    best = solve_patterns(load, capacity)
    known: Any = best.slots_GC
    layer = layer_of(load, capacity, None, "equal", slots_GC=known)
    result = solve_cpsat(layer, stop=MaxTime(0.05))
    assert result.value == pytest.approx(best.upper)
    assert not result.improved
    assert result.status in (Status.FEASIBLE, Status.OPTIMAL)
