"""Several scenarios: every figure of every plan is the documented objective, and bounds are true ones."""

from __future__ import annotations

import numpy as np
import pytest

import moeless_opt as mo
from moeless_opt.problems.plan.objective import gpu_risk, risk
from moeless_opt.problems.plan.verify import check_slots, violations
from moeless_opt.solvers.core import NeverStop, risk_L
from moeless_opt.solvers.core.finish import lower_bound
from moeless_opt.solvers.core.risk_descent import descend_even
from tests.oracles.enumeration import even_times, placements, risk_of, set_times
from tests.strategies import random_slots

RISKS = ("expected", "worst", "cvar")


def drawn(seed: int, split: str, measure: str) -> mo.Problem:
    """Two or three weighted scenarios of two small layers; GPUs of different speed and slots, one dead."""
    rng = np.random.default_rng(seed)
    experts, count = int(rng.integers(3, 6)), int(rng.integers(2, 4))
    load_TLE = rng.lognormal(0, 1.2, (count, 2, experts)).round(3)
    slots = [3, 2, 0, 2] if seed % 3 == 0 else [3, 2, 2]
    speed = rng.choice([1.0, 0.5], len(slots)) if seed % 2 else np.ones(len(slots))
    return mo.Problem(
        loads=mo.Loads(load_TLE=load_TLE, weight_T=rng.integers(1, 4, count)),
        topology=mo.Topology(node_G=[0] * len(slots), speed_G=speed, slots_G=slots),
        split=split,
        objective=mo.Objective(risk=measure, cvar_alpha=0.4),
    )


def by_definition(problem: mo.Problem, layer: int, held_PEG: np.ndarray) -> np.ndarray:
    """The objective of every placement of one layer, shape [P]."""
    loads, times = problem.loads, set_times if problem.split == "fractional" else even_times
    weight_T = loads.weight_T
    assert weight_T is not None
    value_TP = np.array(
        [times(held_PEG, load_E, problem.topology.speed_G) for load_E in loads.load_TLE[:, layer]]
    )
    return risk_of(value_TP, weight_T, problem.objective.risk, problem.objective.cvar_alpha)


@pytest.mark.parametrize("split", ["fractional", "equal"])
@pytest.mark.parametrize("measure", RISKS)
def test_every_figure_is_the_objective_and_no_bound_is_above_the_best(measure: str, split: str) -> None:
    for seed in range(6):
        problem = drawn(seed, split, measure)
        every = [placements(problem.capacity_LG[x].tolist(), problem.experts) for x in range(2)]
        best_L = np.array([by_definition(problem, x, held).min() for x, held in enumerate(every)])
        bound_L, _ = lower_bound(problem)
        assert (bound_L <= best_L * (1 + 1e-9)).all()
        alive = problem.capacity_LG[0] > 0
        mean_TL = problem.loads.load_TLE.sum(2) / problem.topology.speed_G[alive].sum()
        perfect_L = risk(mean_TL, problem.loads.weight_T, problem.objective)
        found = {}
        for solver in ("auto", "construct", "constrained", "static", "moeless"):
            result = mo.solve(problem, solver)
            plan = result.plan
            assert plan is not None
            value_L = np.array(
                [
                    by_definition(problem, x, (plan.share_LGE[x] > 0).T[None] | _held(plan, x))[0]
                    for x in range(2)
                ]
            )
            np.testing.assert_allclose(plan.certificate.value_L, value_L, rtol=1e-7)
            np.testing.assert_allclose(plan.imbalance_L, value_L / perfect_L, rtol=1e-7)
            assert result.objective["balance"] == pytest.approx(value_L.sum(), rel=1e-7)
            assert (plan.certificate.lower_bound_L <= best_L * (1 + 1e-6)).all()
            if plan.certificate.status is mo.Status.OPTIMAL:
                np.testing.assert_allclose(value_L, best_L, rtol=1e-5)
            found[solver] = value_L.sum()
        assert found["auto"] <= min(found["static"], found["moeless"]) * (1 + 1e-7)
        assert found["auto"] <= best_L.sum() * 1.08


def _held(plan: mo.Plan, layer: int) -> np.ndarray:
    held_EG = np.array([(plan.slots_LGC[layer] == e).any(1) for e in range(plan.experts)])
    return held_EG[None]


def test_a_scenario_twice_over_is_the_problem_itself() -> None:
    load = np.random.default_rng(0).lognormal(0, 1, (1, 3, 16))
    for split in ("fractional", "equal"):
        one = mo.Problem(loads=mo.Loads(load_TLE=load), topology=mo.uniform(1, 4, slots=5), split=split)
        twice = one.replace(loads=mo.Loads(load_TLE=np.repeat(load, 2, axis=0)))
        plans = [mo.solve(problem).plan for problem in (one, twice)]
        assert plans[0] is not None
        assert plans[1] is not None
        assert plans[1].certificate.gap <= plans[0].certificate.gap + 1e-9
        np.testing.assert_allclose(
            plans[1].certificate.lower_bound_L, plans[0].certificate.lower_bound_L, rtol=1e-9
        )


def test_shares_of_scenarios_are_verified() -> None:
    problem = drawn(1, "fractional", "expected")
    plan = mo.solve(problem).plan
    assert plan is not None
    each = plan.scenario_share_TLGC
    assert each is not None
    assert violations(problem, plan) == []
    other = each.copy()
    other[0, 0][plan.slots_LGC[0] == 0] *= 0.5
    assert "scenario 0, layer 0: the shares of expert 0 sum to 0.5, not 1" in "\n".join(
        violations(problem, plan.replace(scenario_share_TLGC=other))
    )
    other = each.copy()
    other[0, 0, 0, 0] = np.nan
    assert violations(problem, plan.replace(scenario_share_TLGC=other)) == [
        "shares must be finite and at least 0"
    ]
    assert "have shape" in violations(problem, plan.replace(scenario_share_TLGC=each[:1]))[0]
    assert "have shape" in violations(problem.replace(split="equal"), plan)[0]
    low = plan.certificate.replace(value_L=plan.certificate.value_L * 0.99)
    assert "largest GPU times" in "\n".join(violations(problem, plan.replace(certificate=low)))


def test_plans_of_scenarios_come_back_from_files(tmp_path) -> None:  # type: ignore[no-untyped-def]
    problem = drawn(1, "fractional", "cvar")
    plan = mo.solve(problem).plan
    assert plan is not None
    for name in ("plan.json", "plan.npz"):
        mo.save_plan(plan, tmp_path / name)
        back = mo.load_plan(tmp_path / name)
        assert violations(problem, back) == []
        assert (back.scenario_share_TLGC == plan.scenario_share_TLGC).all()


@pytest.mark.parametrize("measure", RISKS)
def test_the_descent_only_ever_lowers_the_risk_and_keeps_the_rules(measure: str) -> None:
    rng = np.random.default_rng(5)
    wish, better = mo.Objective(risk=measure, cvar_alpha=0.4), 0
    for _ in range(12):
        gpus, experts = int(rng.integers(1, 6)), int(rng.integers(1, 12))
        capacity_G = rng.integers(0, 5, gpus)
        capacity_G[0] = experts
        load_TE = rng.lognormal(0, 1, (3, experts)) * (rng.random((3, experts)) < 0.9)
        slots_GC = random_slots(rng, np.minimum(capacity_G, experts)[None], experts)[0]
        problem = mo.Problem(
            loads=mo.Loads(load_TLE=load_TE[:, None] + 1e-3),
            topology=mo.Topology(node_G=[0] * gpus, speed_G=rng.choice([1.0, 3.0], gpus), slots_G=capacity_G),
            split="equal",
            objective=wish,
        )
        before = risk_L(problem, slots_GC[None])[0]
        descend_even(
            problem.loads.load_TLE[:, 0],
            slots_GC,
            problem.capacity_LG[0],
            problem.topology.speed_G,
            lambda top_TK: risk(top_TK, None, wish),
            lambda time_TX: gpu_risk(time_TX, None, wish),
            enough=0.0,
            stop=NeverStop(),
        )
        check_slots(slots_GC, experts, problem.capacity_LG[0])
        after = risk_L(problem, slots_GC[None])[0]
        assert after <= before * (1 + 1e-9)
        better += after < before * (1 - 1e-6)
    assert better > 4
