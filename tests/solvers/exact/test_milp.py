"""The exact programmes and the component bound: against enumeration, and truthful about limits."""

from __future__ import annotations

import itertools
import warnings
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeless_opt.problems.errors import (
    InfeasibleError,
    InvalidPlanError,
    ProblemError,
    SolverUnavailableError,
)
from moeless_opt.problems.plan.bounds import density_bound
from moeless_opt.problems.plan.evaluate import gpu_times
from moeless_opt.problems.plan.plan import Status
from moeless_opt.problems.plan.result import StoppedBy
from moeless_opt.solvers.core.stopping import MaxTime
from moeless_opt.solvers.exact.components import component_bound
from moeless_opt.solvers.exact.layer import layer_of, result_of
from moeless_opt.solvers.exact.milp import solve_milp, write_model


def densest(hosts: Any, load: Any, speed: Any) -> float:
    worst = 0.0
    for size in range(1, len(hosts) + 1):
        for group in itertools.combinations(range(len(hosts)), size):
            outside = set(itertools.chain.from_iterable(h for g, h in enumerate(hosts) if g not in group))
            inside = sum(load[e] for e in range(len(load)) if e not in outside)
            worst = max(worst, inside / speed[list(group)].sum())
    return worst


def optimum(load: Any, capacity: Any, speed: Any, split: str) -> float:
    """Least largest GPU time over every set of experts on every GPU."""
    load, speed = np.asarray(load, float), np.asarray(speed, float)
    experts = range(len(load))
    sets = [
        [s for k in range(min(len(load), int(c)) + 1) for s in itertools.combinations(experts, k)]
        for c in capacity
    ]
    best = np.inf
    for hosts in itertools.product(*sets):
        count = np.bincount(list(itertools.chain.from_iterable(hosts)), minlength=len(load))
        if count.min() < 1:
            continue
        if split == "equal":
            time = max(sum(load[e] / count[e] for e in h) / s for h, s in zip(hosts, speed, strict=True))
        else:
            time = densest(hosts, load, speed)
        best = min(best, time)
    return best


def check(result: Any, load: Any, capacity: Any, speed: Any) -> None:
    """The plan is a plan, and its value and bound are what it says."""
    slots, share = result.slots_GC, result.share_GC
    held = slots >= 0
    assert (held.sum(axis=1) <= capacity).all()
    for row in slots:
        assert len(set(row[row >= 0])) == (row >= 0).sum()
    np.testing.assert_allclose(np.bincount(slots[held], weights=share[held], minlength=len(load)), 1.0)
    time_LG = gpu_times(np.asarray([load], float), slots[None], share[None], speed)
    assert time_LG.max() == pytest.approx(result.value)
    assert result.bound <= result.value


@pytest.mark.parametrize("engine", ["highs", "gscip", "pulp:cbc"])
@pytest.mark.parametrize("split", ["equal", "fractional"])
@pytest.mark.parametrize("seed", range(6))
def test_against_enumeration(engine: str, split: Any, seed: int) -> None:
    rng = np.random.default_rng(seed)
    experts, gpus = int(rng.integers(2, 5)), int(rng.integers(2, 4))
    load = rng.integers(0, 50, experts).astype(float)
    capacity = rng.integers(1, 3, gpus)
    capacity[0] += experts // 2
    speed = np.ones(gpus) if seed % 2 else rng.choice([0.5, 1.0, 2.0], gpus)
    if capacity.clip(max=experts).sum() < experts:
        capacity[:] = experts
    result = solve_milp(layer_of(load, capacity, speed, split), engine)
    assert result.status is Status.OPTIMAL
    check(result, load, capacity, speed)
    assert result.value == pytest.approx(optimum(load, capacity, speed, split), rel=1e-5, abs=1e-6)


def test_a_known_plan_is_never_made_worse() -> None:
    load, capacity = np.array([600, 560, 120, 120, 20, 10, 10, 10.0]), np.full(8, 2)
    known = np.array([[0, 4], [0, 5], [0, 6], [1, 7], [1, 5], [1, 4], [2, 3], [2, 3]], dtype=np.int32)
    for seconds in (0.01, 30.0):
        layer = layer_of(load, capacity, None, "equal", slots_GC=known)
        result = solve_milp(layer, stop=MaxTime(seconds))
        check(result, load, capacity, np.ones(8))
        assert result.value <= layer.value
        assert (result.status is Status.OPTIMAL) == (result.value <= result.bound * (1 + 1e-6))
    assert result.value == pytest.approx(590 / 3)
    assert result.status is Status.OPTIMAL


def test_a_time_limit_is_not_called_optimal() -> None:
    load = np.random.default_rng(0).lognormal(0, 1.5, 16)
    result = solve_milp(layer_of(load, np.full(8, 3)), "pulp:cbc", stop=MaxTime(1.0))
    assert result.status in (Status.FEASIBLE, Status.NO_SOLUTION)
    assert result.bound <= result.value


def test_files_can_be_solved_again(tmp_path: Any) -> None:
    pulp = pytest.importorskip("pulp")
    load, capacity = np.array([7.0, 5.0, 3.0, 1.0]), np.array([2, 2, 1])
    layer = layer_of(load, capacity)
    write_model(layer, tmp_path / "layer.lp")
    write_model(layer, tmp_path / "layer.mps")
    assert "Minimize" in (tmp_path / "layer.lp").read_text()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        _, problem = pulp.LpProblem.fromMPS(str(tmp_path / "layer.mps"))
        problem.solve(pulp.PULP_CBC_CMD(msg=False))
    best = optimum(load, capacity, np.ones(3), "equal")
    assert pulp.value(problem.objective) * layer.scale == pytest.approx(best, rel=1e-5)
    with pytest.raises(ProblemError, match=r"\.lp or \.mps"):
        write_model(layer, tmp_path / "layer.txt")


def test_wrong_arguments() -> None:
    with pytest.raises(InfeasibleError, match="4 experts"):
        layer_of([1, 1, 1, 1], [1, 2])
    with pytest.raises(ProblemError, match="split"):
        layer_of([1, 1], [1, 2], None, "odd")  # type: ignore[arg-type]
    layer = layer_of([1, 1], [1, 2])
    with pytest.raises(SolverUnavailableError, match="'nobody' is unknown"):
        solve_milp(layer, "nobody")
    with pytest.raises(SolverUnavailableError, match="PuLP cannot find 'nobody'"):
        solve_milp(layer, "pulp:nobody")


@given(st.lists(st.integers(0, 40), min_size=1, max_size=5), st.integers(1, 3), st.integers(1, 3))
@settings(max_examples=150, deadline=None)
def test_component_bound_is_never_above_the_optimum(load: Any, gpus: int, slots: int) -> None:
    capacity = np.full(gpus, slots)
    best = optimum(load, capacity, np.ones(gpus), "fractional")
    bound = component_bound(np.array(load, float), gpus, slots)
    assert bound <= best * (1 + 1e-9) or np.isinf(best)
    if np.isfinite(best):
        assert bound >= sum(load) / gpus * (1 - 1e-9)
        assert component_bound(np.array(load, float), gpus, slots, upper=best) <= best * (1 + 1e-9)


@pytest.mark.parametrize(
    ("load", "best"),
    [
        ([90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86], 129.25),
        ([20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27], 146.0),
        ([600, 560, 120, 120, 20, 10, 10, 10], 181.25),
    ],
)
def test_published_examples_are_settled(load: Any, best: float) -> None:
    assert component_bound(np.array(load, float), 8, 2) == pytest.approx(best)
    layer = layer_of(load, np.full(8, 2), None, "fractional")
    result = solve_milp(layer, stop=MaxTime(0.5))
    if result.slots_GC is not None:
        assert result.value >= best * (1 - 1e-9)
        assert density_bound([load], result.slots_GC[None], result.share_GC[None])[0] <= result.value * (
            1 + 1e-9
        )


def test_a_stopped_component_bound_is_still_a_bound() -> None:
    class After(MaxTime):
        """Stop at the n-th question."""

        def __init__(self, asks: int) -> None:
            super().__init__(100.0)
            self.asks = asks

        def __call__(self, best: float = np.inf, bound: float = 0.0) -> StoppedBy:
            self.asks -= 1
            return StoppedBy.NOTHING if self.asks >= 0 else StoppedBy.CALLER

    load = np.array([20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27.0])
    bounds = [component_bound(load, 8, 2, stop=After(asks)) for asks in (*range(0, 250, 25), 10**9)]
    assert load.sum() / 8 == bounds[0] < bounds[-1] == pytest.approx(146.0)
    assert all(bound <= bounds[-1] for bound in bounds)
    assert len(set(bounds)) > 2


def test_a_bound_above_a_plan_is_a_bug_and_told() -> None:
    known = np.array([[0], [1]], dtype=np.int32)
    layer = layer_of([3.0, 2.0], [1, 1], None, "equal", slots_GC=known)
    assert result_of(layer, None, 3.0 * (1 + 1e-7), "x").bound == 3.0
    with pytest.raises(InvalidPlanError, match=r"x: lower bound 3\.1 is above 3"):
        result_of(layer, None, 3.1, "x")
