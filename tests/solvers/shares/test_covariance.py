"""The covariance risk: how far each GPU strays under one split for all scenarios."""

from __future__ import annotations

import numpy as np
import pytest

import moeless_opt as mo
from moeless_opt.problems.errors import InvalidPlanError, ProblemError
from moeless_opt.problems.plan import gpu_times
from moeless_opt.problems.spec import equal_shares
from moeless_opt.solvers.shares import covariance_shares, solve_shares


def test_covariance_is_how_far_each_gpu_strays() -> None:
    """By the experts' covariance, written out; GPUs that are busy at different times are worth less."""
    rng = np.random.default_rng(0)
    for seed in range(10):
        load_TLE, weight_T = rng.lognormal(0, 1, (4, 2, 6)) * 100, rng.dirichlet(np.ones(4))
        launch = 3.0 * (seed % 2)
        speed_G = np.ones(3) if launch else np.array([1.0, 2.0, 1.0])
        problem = mo.Problem(
            loads=mo.Loads(load_TLE=load_TLE, weight_T=weight_T),
            topology=mo.Topology(node_G=np.zeros(3, dtype=int), slots_G=np.full(3, 3), speed_G=speed_G),
            split=("equal", "fractional", "nearest")[seed % 3],
            objective=mo.Objective(risk="covariance", sigma=1.7),
            time=mo.TimeModel(token_cost=0.5, launch=launch),
        )
        plan = mo.solve(problem).plan
        assert plan is not None
        assert plan.scenario_share_TLGC is None
        for x in range(2):
            share_EG = np.zeros((6, 3))
            for g, c in np.argwhere(plan.slots_LGC[x] >= 0):
                share_EG[plan.slots_LGC[x, g, c], g] += plan.share_LGC[x, g, c]
            covariance_EE = np.cov(load_TLE[:, x].T, aweights=weight_T, ddof=0)
            mean_G = weight_T @ load_TLE[:, x] @ share_EG
            square_G = np.einsum("eg,ef,fg->g", share_EG, covariance_EE, share_EG)
            value = float(((launch + 0.5 * (mean_G + 1.7 * np.sqrt(square_G))) / speed_G).max())
            assert plan.certificate.value_L[x] == pytest.approx(value, rel=1e-9)
            assert plan.certificate.lower_bound_L[x] <= value * (1 + 1e-9)
        each = plan.replace(scenario_share_TLGC=np.repeat(plan.share_LGC[None], 4, 0))
        with pytest.raises(InvalidPlanError, match="shares of scenarios"):
            mo.verify(problem, each)
        steady = problem.replace(objective=mo.Objective(risk="expected"))
        with pytest.raises(InvalidPlanError, match="imbalance is not"):
            mo.verify(steady, plan)
    with pytest.raises(ProblemError, match=r"objective.risk: is 'covariance' with a time model of more"):
        problem.replace(time=mo.TimeModel(activation_cost=1.0))
    with pytest.raises(ProblemError, match=r"objective.sigma: is 2000, must be at most 1000"):
        mo.Objective(risk="covariance", sigma=2000)


def test_opposite_experts_share_a_gpu_by_their_covariance() -> None:
    """The expected loads do not tell these placements apart."""
    load_TE = np.array([[3.0, 1, 3, 1], [1.0, 3, 1, 3]]) * 100
    problem = mo.Problem(
        loads=mo.Loads(load_TLE=load_TE[:, None]),
        topology=mo.uniform(1, 2, slots=2),
        objective=mo.Objective(risk="covariance", sigma=3),
    )
    plan = mo.solve(problem).plan
    assert plan is not None
    assert sorted(sorted(row) for row in plan.slots_LGC[0] % 2) == [[0, 1], [0, 1]]
    assert plan.certificate.value_L[0] == pytest.approx(400)
    assert plan.certificate.gap == pytest.approx(0, abs=1e-9)


def value_L(load_TLE: np.ndarray, slots_LGC: np.ndarray, share_LGC: np.ndarray, sigma: float) -> np.ndarray:
    speed_G = np.ones(slots_LGC.shape[1])
    time_TLG = np.array([gpu_times(load_LE, slots_LGC, share_LGC, speed_G) for load_LE in load_TLE])
    return np.asarray((time_TLG.mean(0) + sigma * time_TLG.std(0)).max(1))


def test_no_shares_nearby_are_better() -> None:
    """The risk is convex in the shares: what no small step lowers is least."""
    rng = np.random.default_rng(1)
    load_TLE = rng.lognormal(0, 1, (5, 3, 12)) * 100
    slots_LGC = mo.plan(load_TLE.mean(0), mo.uniform(1, 4, slots=5)).slots_LGC
    share_LGC = covariance_shares(load_TLE, slots_LGC, np.ones(4), None, 1.5)
    least_L = value_L(load_TLE, slots_LGC, share_LGC, 1.5)
    others = [equal_shares(slots_LGC, 12), solve_shares(load_TLE.mean(0), slots_LGC).share_LGC]
    for other_LGC in others:
        assert (least_L < value_L(load_TLE, slots_LGC, other_LGC, 1.5)).all()
    for _ in range(300):
        other_LGC = np.maximum(share_LGC + rng.normal(0, 0.01, share_LGC.shape) * (slots_LGC >= 0), 0.0)
        for x in range(3):
            for expert in range(12):
                at = slots_LGC[x] == expert
                other_LGC[x][at] /= other_LGC[x][at].sum()
        assert (least_L <= value_L(load_TLE, slots_LGC, other_LGC, 1.5) * (1 + 2e-5)).all()


@pytest.mark.parametrize("split", ["fractional", "equal", "nearest"])
def test_odd_shapes(split: str) -> None:
    """One GPU, one expert, no tokens, a scenario of no weight, more scenarios than experts, uneven slots."""
    rng = np.random.default_rng(2)
    for gpus, experts, scenarios in ((1, 1, 2), (1, 3, 2), (3, 1, 3), (2, 3, 12), (4, 6, 3)):
        load_TLE = rng.lognormal(0, 1, (scenarios, 2, experts)) * 10.0 ** rng.integers(0, 9)
        load_TLE[0] = 0.0
        load_TLE[:, 1, 0] = 0.0
        weight_T = np.ones(scenarios)
        weight_T[-1] = 1e-9
        slots_G = np.full(gpus, experts)
        slots_G[:1] -= experts > 1 and gpus > 1
        problem = mo.Problem(
            loads=mo.Loads(load_TLE=load_TLE, weight_T=weight_T),
            topology=mo.Topology(
                node_G=np.arange(gpus) * 2 // gpus if gpus > 1 else [0],
                slots_G=slots_G,
                speed_G=np.ones(gpus),
            ),
            split=split,
            objective=mo.Objective(risk="covariance", sigma=2),
        )
        first = mo.solve(problem).plan
        assert first is not None
        again = mo.solve(problem.replace(current=mo.Placement.of(first, experts))).plan
        assert again is not None
        assert again.moves.count == 0 or again.certificate.value_L.sum() < first.certificate.value_L.sum()
