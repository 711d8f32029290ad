"""The pattern search against enumeration, and published examples."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeless_opt.problems.spec.time_model import TimeModel
from moeless_opt.solvers.core.stopping import MaxTime
from moeless_opt.solvers.pack.patterns import solve_patterns


def gpu_times(slots_GC: Any, load: Any, speed: Any, time: TimeModel) -> Any:
    """GPU times of an equal split, after checking that the placement is one."""
    assert sorted(set(slots_GC[slots_GC >= 0])) == list(range(len(load)))
    for row in slots_GC:
        held = row[row >= 0]
        assert len(set(held)) == len(held)
    count = np.bincount(slots_GC[slots_GC >= 0], minlength=len(load))
    piece = np.append(np.asarray(load, float) / count, 0.0)
    cost = np.where(piece > 0, time.token_cost * piece + time.activation_cost, 0.0)
    return (time.launch + cost[slots_GC].sum(axis=1)) / speed


def optimum(load: Any, capacity: Any, speed: Any, time: TimeModel, most: int) -> float:
    """Enumerate every set of experts on every GPU."""
    load = np.asarray(load, float)
    experts = range(len(load))
    sets = [
        [s for k in range(min(len(load), c) + 1) for s in itertools.combinations(experts, k)]
        for c in capacity
    ]
    best = np.inf
    for hosts in itertools.product(*sets):
        count = np.bincount(list(itertools.chain.from_iterable(hosts)), minlength=len(load))
        if count.min() < 1 or count.max() > most:
            continue
        times = (
            (
                time.launch
                + sum(time.token_cost * load[e] / count[e] + time.activation_cost for e in h if load[e] > 0)
            )
            / s
            for h, s in zip(hosts, speed, strict=True)
        )
        best = min(best, max(times))
    return best


@given(
    load=st.lists(st.one_of(st.integers(0, 40), st.floats(0.01, 40)), min_size=1, max_size=4),
    gpus=st.lists(
        st.tuples(st.integers(0, 3), st.sampled_from([0.5, 1.0, 1.0, 2.0])), min_size=1, max_size=3
    ),
    alike=st.booleans(),
    activation=st.sampled_from([0.0, 0.0, 4.0]),
    launch=st.sampled_from([0.0, 2.0]),
    most=st.integers(1, 3),
)
@settings(max_examples=600, deadline=None)
def test_optimal_against_enumeration(
    load: Any, gpus: Any, alike: bool, activation: float, launch: float, most: int
) -> None:
    if alike:
        gpus = [gpus[0]] * len(gpus)
    capacity, speed = np.array([c for c, _ in gpus]), np.array([s for _, s in gpus])
    time = TimeModel(launch=launch, activation_cost=activation)
    best = optimum(load, capacity, speed, time, most)
    result = solve_patterns(np.array(load, float), capacity, speed, max_replicas=most, time=time)
    assert result.proven
    assert result.upper == pytest.approx(best)
    assert result.lower == pytest.approx(best)
    if np.isfinite(best):
        assert result.slots_GC is not None
        times = gpu_times(result.slots_GC, load, speed, time)
        assert times.max() == pytest.approx(best)
        assert ((result.slots_GC >= 0).sum(axis=1) <= capacity).all()


@pytest.mark.parametrize(
    ("load", "best"),
    [
        ([600, 560, 120, 120, 20, 10, 10, 10], 590 / 3),
        ([90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86], 136),
        ([20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27], 172),
    ],
)
def test_published_examples(load: Any, best: float) -> None:
    load, capacity = np.array(load, float), np.full(8, 2)
    result = solve_patterns(load, capacity)
    assert result.proven
    assert result.upper == pytest.approx(best)
    assert result.slots_GC is not None
    assert gpu_times(result.slots_GC, load, np.ones(8), TimeModel()).max() == pytest.approx(best)


@pytest.mark.parametrize("seed", range(4))
def test_a_known_plan_is_improved_or_confirmed(seed: int) -> None:
    load = np.random.default_rng(seed).lognormal(0, 1, 8)
    capacity = np.full(8, 2)
    best = solve_patterns(load, capacity)
    confirmed = solve_patterns(load, capacity, upper=best.upper)
    assert confirmed.proven
    assert confirmed.slots_GC is None
    assert confirmed.upper == confirmed.lower == best.upper
    improved = solve_patterns(load, capacity, upper=best.upper * 1.02)
    assert improved.proven
    assert improved.upper == pytest.approx(best.upper)
    loose = solve_patterns(load, capacity, upper=best.upper * 1.001, gap=0.05)
    assert loose.proven
    assert loose.lower <= best.upper <= loose.upper <= loose.lower * 1.05


def test_sixteen_experts_are_proven() -> None:
    load = np.random.default_rng(2).lognormal(0, 1, 16)
    result = solve_patterns(load, np.full(8, 3))
    assert result.proven
    assert result.slots_GC is not None
    times = gpu_times(result.slots_GC, load, np.ones(8), TimeModel())
    assert times.max() == pytest.approx(result.upper)
    assert load.sum() / 8 < result.upper < load.sum() / 8 * 1.005


def test_without_time_the_bound_stays_true() -> None:
    load = np.random.default_rng(3).lognormal(0, 1, 64)
    result = solve_patterns(load, np.full(8, 10), upper=load.sum() / 8 * 1.1, stop=MaxTime(0.0))
    assert not result.proven
    assert result.lower == pytest.approx(load.sum() / 8)
    assert result.upper == pytest.approx(load.sum() / 8 * 1.1)
