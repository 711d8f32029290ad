"""Planning by the time as a solver: what is live, and what a horizon leaves."""

from __future__ import annotations

import numpy as np
import pytest

import moeless_opt as mo
from moeless_opt.problems.plan import move_seconds
from tests.campaign import KINDS
from tests.strategies import random_slots

HORIZONS = (1e-4, 1.0, 1e5)  # forward passes


@pytest.mark.parametrize("seed", range(40))
def test_near_the_optimum_from_whatever_is_live(seed: int) -> None:
    rng = np.random.default_rng(seed)
    case = KINDS["timed"](rng)
    live = random_slots(rng, case.problem.capacity_LG, case.problem.experts)
    problem = case.problem.replace(current=mo.Placement(slots_LGC=live, experts=case.problem.experts))
    plan = mo.solve(problem).plan
    assert plan is not None
    assert plan.certificate.value_L.sum() <= case.best * (1 + problem.objective.balance_tolerance + 1e-9)
    assert plan.certificate.lower_bound_L.sum() == pytest.approx(case.best, rel=1e-6)


def test_alike_gpus_keep_what_they_hold() -> None:
    # The best placement is live already, but for one move; the search names GPUs as it likes.
    load, time = np.array([[100.0, 60, 40, 30, 20, 10]]), mo.TimeModel(activation_cost=20.0)
    topology = mo.uniform(1, 3, slots=3)
    best = mo.plan(load, topology, time=time)
    live = best.slots_LGC[:, ::-1].copy()
    plan = mo.plan(load, topology, time=time, current=mo.Placement(slots_LGC=live, experts=6))
    assert plan.certificate.value_L[0] <= best.certificate.value_L[0] * 1.01
    assert plan.moves.count == 0


@pytest.mark.parametrize("split", ["equal", "fractional"])
def test_with_a_horizon_the_proof_is_still_of_the_least_time(split: str) -> None:
    rng = np.random.default_rng(7)
    load, time = rng.lognormal(4, 1, (1, 6)), mo.TimeModel(token_cost=1e-6, activation_cost=2e-5, unit="s")
    topology = mo.uniform(1, 3, slots=3)
    best = mo.plan(load, topology, time=time, split=split)
    live = mo.Placement(slots_LGC=np.array([[[0, 1, 2], [3, 4, 5], [0, 3, -1]]], dtype=np.int32), experts=6)
    plan = mo.plan(
        load,
        topology,
        time=time,
        split=split,
        current=live,
        expert_bytes=10**9,
        objective=mo.Objective(horizon=1.0),
    )
    assert plan.moves.count == 0
    assert plan.certificate.lower_bound_L == pytest.approx(best.certificate.value_L, rel=1e-6)


@pytest.mark.parametrize("split", ["equal", "fractional"])
def test_with_an_activation_cost_a_horizon_weighs_moves(split: str) -> None:
    """In every layer the moves save over the horizon at least what their transfers take."""
    rng = np.random.default_rng(4)
    before = rng.lognormal(0, 1, (2, 5)) * 1e6
    after = rng.permuted(before, axis=1)
    topology = mo.uniform(2, 1, slots=3)
    time = mo.TimeModel(unit="s", token_cost=1e-6, activation_cost=0.05)
    live = mo.plan(before, topology, split=split)
    asked = {"current": live, "time": time, "split": split, "expert_bytes": 10**9}
    plans = [
        mo.plan(after, topology, objective=mo.Objective(horizon=horizon), **asked) for horizon in HORIZONS
    ]
    moves = [plan.moves.count for plan in plans]
    assert moves[0] == 0
    assert moves == sorted(moves)
    assert moves[-1] > 0
    for horizon, plan in zip(HORIZONS, plans, strict=True):
        saved_L = horizon * (plans[0].certificate.value_L - plan.certificate.value_L)
        cost_L = move_seconds(topology, plan.slots_LGC, live.slots_LGC, 5, np.full(2, 10**9))
        assert (saved_L >= cost_L * (1 - 1e-9)).all()


def test_large_loads_in_whole_entries() -> None:
    load_LE = np.array(
        [[6.8738109788e19, 1.34230371271642e20, 7.7093921976e19, 1.68620823935e20, 9.8409748256e19]]
    )
    gpus = mo.Topology(node_G=[0, 0, 1], speed_G=[2.0, 2.0, 0.5], slots_G=[3, 3, 3])
    time = mo.TimeModel(activation_cost=0.5)
    plan = mo.plan(load_LE, gpus, time=time, share_entries=4, balance_tolerance=0.0)
    assert plan.imbalance_L[0] < 1.2
