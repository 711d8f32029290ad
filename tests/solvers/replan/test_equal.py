"""Re-planning under an equal split."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeless_opt.problems.errors import InfeasibleError, ProblemError
from moeless_opt.solvers.construct.equal import construct_equal
from moeless_opt.solvers.core.stopping import Stop
from moeless_opt.solvers.replan.equal import replan_equal
from moeless_opt.solvers.replan.task import Replanned, ReplanTask, ReplanWish
from tests.strategies import After


def replanned(
    load: Any, live: Any, capacity: Any, speed: Any = None, *, stop: Stop | None = None, **wish: Any
) -> Replanned:
    # The twin without Numba asks before every step, so that tests can stop it at each of them.
    task = ReplanTask(load, live, capacity, speed)
    return replan_equal(task, ReplanWish(**{"tolerance": 0.02, **wish}), stop=stop, backend="numpy")


def times(load_E: np.ndarray, slots_GC: np.ndarray, speed_G: np.ndarray) -> np.ndarray:
    """GPU times by the definition."""
    count = np.bincount(slots_GC[slots_GC >= 0], minlength=len(load_E))
    piece = load_E / np.maximum(count, 1)
    return np.where(slots_GC >= 0, piece[slots_GC], 0.0).sum(axis=1) / speed_G


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 5000), st.integers(2, 5), st.integers(2, 4), st.booleans())
def test_replan_is_valid_counts_its_moves_and_is_never_worse(
    seed: int, gpus: int, width: int, hetero: bool
) -> None:
    rng = np.random.default_rng(seed)
    experts = int(rng.integers(2, gpus * width + 1))
    load = rng.lognormal(0, 1, (2, experts))
    capacity = np.full((2, gpus), width)
    speed = 1.0 + 0.5 * (np.arange(gpus) % 2) if hetero else np.ones(gpus)
    live = construct_equal(rng.lognormal(0, 1, (2, experts)), capacity, speed)
    plan = replanned(load, live, capacity, speed, tolerance=0.05, rounds=2)
    for layer in range(2):
        slots = plan.slots_LGC[layer]
        for row in slots.tolist():
            full = [expert for expert in row if expert >= 0]
            assert len(full) == len(set(full))
        assert set(slots[slots >= 0].tolist()) == set(range(experts))
        moved = sum(
            expert not in live[layer, gpu]
            for gpu in range(gpus)
            for expert in slots[gpu].tolist()
            if expert >= 0
        )
        assert plan.moves_L[layer] == moved
        now = times(load[layer], slots, speed).max()
        assert now == pytest.approx(plan.time_L[layer])
        stay = times(load[layer], live[layer], speed).max()
        assert now <= max(stay, plan.target_L[layer]) * (1 + 1e-9)
        if stay <= plan.target_L[layer]:
            assert moved == 0
    again = replanned(load, live, capacity, speed, tolerance=0.05, rounds=2)
    np.testing.assert_array_equal(plan.slots_LGC, again.slots_LGC)


def test_adding_one_replica_is_one_move() -> None:
    live = np.array([[[0, -1], [1, -1]]])
    plan = replanned([[8.0, 2.0]], live, [[2, 2]], tolerance=0.3)
    assert plan.moves_L[0] == 1
    assert plan.time_L[0] == pytest.approx(6.0)


def test_dropping_a_replica_is_free() -> None:
    # With both replicas of expert 0, GPU 1 carries 3 + 4; without its one, 4.
    live = np.array([[[0, -1], [0, 1]]])
    plan = replanned([[6.0, 4.0]], live, [[2, 2]], tolerance=0.2)
    assert plan.moves_L[0] == 0
    assert plan.time_L[0] == pytest.approx(6.0)


def test_more_rounds_never_move_more_and_budgets_hold() -> None:
    rng = np.random.default_rng(2)
    before = rng.lognormal(0, 1, (3, 64))
    after = before * rng.lognormal(0, 0.3, before.shape)
    capacity = np.full((3, 8), 10)
    live = construct_equal(before, capacity, np.ones(8))
    none = replanned(after, live, capacity, rounds=0)
    some = replanned(after, live, capacity, rounds=6)
    assert (none.time_L <= none.target_L * (1 + 1e-9)).all()
    assert (some.time_L <= some.target_L * (1 + 1e-9)).all()
    assert (some.moves_L <= none.moves_L).all()
    total = int(some.moves_L.sum())
    last = np.inf
    for budget in (0, total // 3, total // 2, total):
        plan = replanned(after, live, capacity, rounds=6, max_moves=budget)
        assert plan.moves_L.sum() <= budget
        assert plan.time_L.sum() <= last * 1.03
        last = plan.time_L.sum()


@pytest.mark.parametrize("budget", [None, 9])
def test_whenever_it_is_stopped_the_plan_is_valid_and_no_worse(budget: int | None) -> None:
    rng = np.random.default_rng(8)
    before = rng.lognormal(0, 1, (3, 32))
    after = before * rng.lognormal(0, 0.5, before.shape)
    capacity = np.full((3, 8), 5)
    live = construct_equal(before, capacity, np.ones(8))
    stay = np.array([times(one, slots, np.ones(8)).max() for one, slots in zip(after, live, strict=True)])
    whole = replanned(after, live, capacity, rounds=3, max_moves=budget)
    counts = []
    for asks in (0, 1, 2, 3, 5, 9, 17, 40, 90, 10**6):
        plan = replanned(after, live, capacity, rounds=3, max_moves=budget, stop=After(asks))
        assert [set(row[row >= 0].tolist()) for row in plan.slots_LGC] == [set(range(32))] * 3
        assert (plan.time_L <= stay * (1 + 1e-6)).all()
        assert budget is None or plan.moves_L.sum() <= budget
        counts.append(int(plan.moves_L.sum()))
        assert asks or plan.cut_L.all()
    assert counts[0] == 0
    assert not plan.cut_L.any()
    assert counts[-1] > 0
    np.testing.assert_array_equal(plan.slots_LGC, whole.slots_LGC)


def test_a_lost_gpu_is_mended_even_without_time() -> None:
    live = np.array([[[0, 1, 2], [3, 4, 2], [5, 2, -1]]])
    plan = replanned([[1.0] * 6], live, [[3, 0, 3]], repair=True, stop=After(0))
    assert plan.moves_L.tolist() == [2]
    assert set(plan.slots_LGC[plan.slots_LGC >= 0].tolist()) == set(range(6))


def test_bad_live_placements_and_budgets() -> None:
    with pytest.raises(ProblemError, match="held twice"):
        replanned([[1.0, 1.0]], [[[0, 0], [1, -1]]], [[2, 2]])
    with pytest.raises(InfeasibleError, match="least budget that would is 1"):
        replanned([[1.0, 1.0]], [[[0], [-1]]], [[1, 1]], repair=True, max_moves=0)
    mended = replanned([[1.0, 1.0]], [[[0], [-1]]], [[1, 1]], repair=True)
    assert mended.slots_LGC.tolist() == [[[0], [1]]]


@pytest.mark.slow
def test_measured_drift(shared_data: Path) -> None:
    with np.load(shared_data / "deepseek_v3_counts.npz") as archive:
        loads = dict(zip(archive["workloads"].tolist(), archive["counts"].astype(float), strict=True))
    capacity = np.full((58, 32), 9)
    live = construct_equal(loads["prefill_in1024"], capacity, np.ones(32))
    plan = replanned(loads["decode_in1000out1000"], live, capacity)
    assert (plan.time_L <= 1.02 * loads["decode_in1000out1000"].sum(axis=1) / 32 * (1 + 1e-9)).all()
    assert 100 * plan.moves_L.mean() / 288 <= 10
