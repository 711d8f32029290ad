"""The budget over all layers: against enumeration, against uniform spending, within every GPU's bytes."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeless_opt.problems.errors import InfeasibleError, ProblemError
from moeless_opt.problems.plan.bounds import best_bound
from moeless_opt.solvers.core.stopping import MaxTime
from moeless_opt.solvers.sizing.budget import (
    REACHED,
    bound_curves,
    plan_budget,
    redundancy_rows,
    spend,
)

curves = st.integers(1, 4).flatmap(
    lambda width: st.lists(
        st.lists(st.one_of(st.integers(0, 30), st.just(np.inf)), min_size=width, max_size=width),
        min_size=1,
        max_size=4,
    )
)


@given(curves, st.integers(0, 12), st.lists(st.integers(1, 4), min_size=4, max_size=4), st.booleans())
@settings(max_examples=800, deadline=None)
def test_spend_against_enumeration(rows: Any, budget: int, costs: Any, alike: bool) -> None:
    value = np.array(rows, dtype=float)
    cost = np.ones(len(value), dtype=int) if alike else np.array(costs[: len(value)])
    choices = [c for c in itertools.product(range(value.shape[1]), repeat=len(value)) if cost @ c <= budget]
    best = min((value[np.arange(len(value)), c].sum() for c in choices), default=np.inf)
    if not np.isfinite(best):
        with pytest.raises(InfeasibleError):
            spend(value, budget, cost)
        return
    found = spend(value, budget, cost)
    assert found.exact
    assert found.value == pytest.approx(best)
    assert value[np.arange(len(value)), found.spare_L].sum() == pytest.approx(best)
    assert found.spent == cost @ found.spare_L <= budget


def test_convex_curves_take_the_shortcut_to_the_same_value() -> None:
    rng = np.random.default_rng(0)
    convex = 100 - np.sort(rng.integers(0, 9, (20, 30)), axis=1)[:, ::-1].cumsum(axis=1).astype(float)
    dented = convex.copy()
    dented[0, -1] += 1e-6  # no longer convex in one place that is not reached: the programme has to agree
    for budget in (0, 7, 60, 200):
        assert spend(convex, budget).value == pytest.approx(spend(dented, budget).value, abs=1e-3)


def test_curves_are_the_bounds_for_each_count() -> None:
    load = np.random.default_rng(1).lognormal(0, 1.5, (5, 12))
    curve = bound_curves(load, np.ones(4), 20)
    for spare in range(21):
        bound, _ = best_bound(
            load, np.full((5, 4), 12), None, "fractional", replicas_L=np.full(5, 12 + spare)
        )
        np.testing.assert_allclose(curve[:, spare], np.maximum(curve[:, 20], curve[:, spare]))
        assert (curve[:, spare] <= bound * (1 + 1e-12)).all()


def check_plan(plan: Any, load: Any, speed: Any) -> None:
    L, E = load.shape
    for layer in range(L):
        held = plan.slots_LGC[layer]
        count = np.bincount(held[held >= 0], minlength=E)
        assert count.min() >= 1
        assert count.sum() <= E + plan.spare_L[layer]
        for row in held:
            assert len(set(row[row >= 0])) == (row >= 0).sum()
        piece = np.append(load[layer] / count, 0.0)
        assert (piece[held].sum(axis=1) / speed).max() == pytest.approx(plan.time_L[layer])
    assert plan.bound <= plan.time_L.sum() * (1 + 1e-9)


@pytest.mark.parametrize("budget", [0, 3, 20, 200])
def test_plan_is_valid_and_beats_uniform(budget: int) -> None:
    rng = np.random.default_rng(3)
    load = np.concatenate([rng.lognormal(0, 0.2, (5, 32)), rng.lognormal(0, 1.5, (5, 32))])
    plan = plan_budget(load, np.ones(8), budget)
    check_plan(plan, load, np.ones(8))
    assert plan.spare_L.sum() <= budget
    rows = redundancy_rows(load, np.ones(8), totals=[0, 20])
    assert rows[0].imbalance >= rows[1].imbalance >= rows[1].bound - 1e-9
    assert rows[1].imbalance <= rows[1].uniform


def test_no_row_is_worse_than_one_with_less() -> None:
    """Nearly even loads: what packing finds is as good with next to nothing, and more is not looked for."""
    for seed in range(4):
        load = np.random.default_rng(seed).lognormal(0, 0.05 + 0.4 * seed, (6, 32))
        rows = redundancy_rows(load, np.ones(8))
        imbalances = [row.imbalance for row in rows]
        assert imbalances == sorted(imbalances, reverse=True)
        assert all(row.spare_L.sum() <= row.spare for row in rows)
        assert not any(row.uniform < row.imbalance for row in rows)
        assert not any(row.imbalance <= 1 + REACHED for row in rows[:-1])
    full = redundancy_rows(load, np.ones(8), totals=[0, 6, 12, 24, 48, 96, 192])
    assert len(full) == 7
    assert np.all(np.diff([row.imbalance for row in full]) <= 0)


def test_uneven_layers_get_uneven_shares() -> None:
    rng = np.random.default_rng(4)
    load = np.concatenate([np.ones((4, 16)), rng.lognormal(0, 2, (4, 16))])
    plan = plan_budget(load, np.ones(8), 24)
    assert plan.spare_L[4:].sum() > 3 * plan.spare_L[:4].sum()


@pytest.mark.parametrize("alike", [True, False])
def test_no_gpu_exceeds_its_bytes(alike: bool) -> None:
    rng = np.random.default_rng(5)
    load = rng.lognormal(0, 1, (6, 16))
    size = np.array([3, 3, 3, 5, 5, 5])
    memory = np.full(4, 110) if alike else np.array([150, 110, 110, 70])
    budget = int(memory.sum() - 16 * size.sum())
    plan = plan_budget(load, np.ones(4), budget - 10, bytes_L=size, memory_G=memory)
    check_plan(plan, load, np.ones(4))
    used = ((plan.slots_LGC >= 0).sum(axis=2) * size[:, None]).sum(axis=0)
    assert (used <= memory).all()
    assert size @ plan.spare_L <= budget


def test_wrong_budgets() -> None:
    with pytest.raises(InfeasibleError, match="budget: 2 units"):
        spend(np.array([[np.inf, np.inf, np.inf, 1.0]]), 2)
    with pytest.raises(ProblemError, match="cost_L"):
        spend(np.zeros((1, 2)), 3, [0])


def test_stopped_at_once_it_still_places_within_the_budget() -> None:
    load = np.random.default_rng(3).lognormal(0, 1, (6, 16))
    for speed in (np.ones(8), np.array([1.0, 2.0] * 4)):
        plan = plan_budget(load, speed, 30, stop=MaxTime(0.0))
        check_plan(plan, load, speed)
        assert plan.spare_L.sum() <= 30
        assert plan.bound <= plan_budget(load, speed, 30).time_L.sum() * (1 + 1e-12)
