"""Sizing policies and time models with activation, through the face."""

from __future__ import annotations

import numpy as np
import pytest

import moeless_opt as mo
from moeless_opt.api import make_problem
from moeless_opt.problems.plan.evaluate import gpu_times
from moeless_opt.problems.spec.generators import lognormal

LOAD = lognormal(4, 16, tokens=10**5, sigma=1.0, seed=1)


@pytest.mark.parametrize("split", ["equal", "fractional"])
def test_makespan_sizing_uses_few_replicas(split: str) -> None:
    topology = mo.uniform(1, 8, slots=4)
    full = mo.plan(LOAD, topology, split=split)
    few = mo.plan(LOAD, topology, split=split, sizing=mo.Sizing(policy="makespan", imbalance=1.1))
    assert few.imbalance_L.max() <= 1.1 + 1e-6
    assert few.replicas < full.replicas
    assert "no plan has fewer than" in few.certificate.proof


def test_makespan_out_of_reach_says_so() -> None:
    with pytest.raises(mo.InfeasibleError, match=r"sizing\.imbalance: 1\.0 was not reached"):
        mo.plan(
            [[100.0, 1, 1, 1]],
            mo.uniform(1, 4, slots=1),
            sizing=mo.Sizing(policy="makespan", imbalance=1.0),
        )


def test_memory_goes_to_the_layers_where_it_buys_most() -> None:
    load = np.stack([np.full(8, 100.0), lognormal(1, 8, tokens=800, sigma=1.5, seed=3)[0]])
    topology = mo.uniform(1, 4, memory=5 * 10)
    plan = mo.plan(load, topology, expert_bytes=10, sizing="memory")
    even, skewed = (plan.slots_LGC >= 0).sum((1, 2))
    assert even == 8
    assert skewed > 10
    uniform = mo.plan(load, topology, expert_bytes=10)  # two slots per GPU in each layer, one replica each
    assert plan.certificate.value_L.sum() < uniform.certificate.value_L.sum()


def test_memory_sizing_errors() -> None:
    with pytest.raises(mo.InfeasibleError, match="320 bytes"):
        mo.plan(LOAD[:2], mo.uniform(1, 2, memory=100), expert_bytes=10, sizing="memory")
    with pytest.raises(mo.ProblemError, match=r"needs topology\.memory"):
        mo.plan(LOAD, mo.uniform(1, 8, slots=4), sizing="memory")


def test_redundancy_table() -> None:
    rows = mo.recommend_redundancy(LOAD, mo.uniform(1, 8, slots=4), totals=[0, 4, 16])
    assert [row.spare for row in rows] == [0, 4, 16]
    assert rows[0].imbalance > rows[1].imbalance > rows[2].imbalance >= rows[2].bound - 1e-9
    assert rows[2].imbalance <= rows[2].uniform + 1e-9


def test_activation_cost_makes_replicas_dear() -> None:
    """With a dear activation, the token-balanced plan with all slots in use is slower than the lean one."""
    topology = mo.uniform(1, 4, slots=8)
    time = mo.TimeModel(token_cost=1.0, activation_cost=1000.0)
    small = lognormal(2, 16, tokens=400, sigma=1.0, seed=4)
    lean = mo.plan(small, topology, time=time)
    balanced = mo.plan(small, topology)
    slow = gpu_times(small, balanced.slots_LGC, balanced.share_LGC, np.ones(4), time).max(1)
    assert (lean.certificate.value_L < slow).all()
    used = ((lean.share_LGC > 0) & (lean.slots_LGC >= 0)).sum((1, 2))
    assert (used <= 17).all()


def test_a_measured_curve_is_planned_with() -> None:
    tokens, used = np.array([0.0, 64, 512, 4096]), np.array([1.0, 4, 8, 16])
    curve = 50 + 6 * used[None, :] + np.maximum(tokens[:, None] - 256, 0) * 0.05
    time = mo.TimeModel(curve_tokens=tokens, curve_activated=used, curve_time=curve, unit="s", name="made up")
    topology = mo.uniform(1, 4, slots=6)
    plan = mo.plan(lognormal(2, 16, tokens=800, sigma=1.0, seed=5), topology, time=time)
    assert set(plan.certificate.bound_L) == {"capacity"}
    assert (plan.certificate.lower_bound_L > 0).all()
    static = mo.plan(lognormal(2, 16, tokens=800, sigma=1.0, seed=5), topology, time=time, solver="static")
    assert (plan.certificate.value_L <= static.certificate.value_L + 1e-9).all()


def test_activation_from_a_live_placement() -> None:
    topology = mo.uniform(1, 4, slots=8)
    time = mo.TimeModel(token_cost=1.0, activation_cost=50.0)
    live = mo.plan(LOAD, topology)
    again = mo.plan(LOAD[:, ::-1], topology, current=live, time=time)
    assert again.moves.fraction < 1


@pytest.mark.parametrize("split", ["equal", "fractional"])
def test_cv_sizing_uses_gpus_that_join(split: str) -> None:
    sizing = mo.Sizing(policy="cv")
    live = mo.plan(LOAD, mo.uniform(2, 2, slots=8), sizing=sizing, split=split)
    more = mo.uniform(3, 2, slots=8)
    fresh = mo.plan(LOAD, more, sizing=sizing, split=split)
    found = mo.expand(live, more).plan
    assert (found.certificate.value_L <= fresh.certificate.value_L * (1.01 + 1e-9)).all()


def test_time_limit_proves_small_layers() -> None:
    problem = make_problem(LOAD[:, :8], mo.uniform(1, 8, slots=2), split="equal")
    quick, proven = mo.solve(problem), mo.solve(problem, time_limit=20)
    assert quick.plan is not None
    assert proven.plan is not None
    assert proven.status is mo.Status.OPTIMAL
    assert (proven.plan.certificate.value_L <= quick.plan.certificate.value_L * (1 + 1e-9)).all()
