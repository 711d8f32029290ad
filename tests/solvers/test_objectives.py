"""Objectives mean what they say: any order of priorities, and any risk, against enumeration."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

import moeless_opt as mo
from moeless_opt.problems.plan.objective import TERMS, objective_vector, order_of, usual_order
from moeless_opt.problems.spec.placement import Placement
from moeless_opt.problems.spec.wishes import PRIORITIES
from moeless_opt.solvers.core.features import PUBLISHED, Feature, required_features
from moeless_opt.solvers.core.scenarios import guises, risk_L
from tests.oracles.enumeration import Enumeration, placements
from tests.strategies import random_slots

ORDERS = [
    order
    for size in range(1, len(PRIORITIES) + 1)
    for some in itertools.combinations(PRIORITIES, size)
    for order in itertools.permutations(some)
]
RISKS = ("expected", "cvar", "worst")


def small_problem(
    seed: int, split: str, *, layers: int = 1, live: bool = True, by_node: bool = True
) -> mo.Problem:
    """Three to five experts on three GPUs of two nodes, with few slots to spare."""
    rng = np.random.default_rng(seed)
    experts = int(rng.integers(3, 6))
    load_TLNE = rng.lognormal(0, 1.2, (1, layers, 2, experts)).round(2)
    topology = mo.Topology(
        node_G=[[0, 0, 1], [0, 1, 1]][seed % 2],
        slots_G=[3 if experts == 5 else 2] * 3,
        speed_G=[[1.0, 1.0, 1.0], [1.0, 0.5, 1.0]][seed // 2 % 2],
    )
    problem = mo.Problem(
        loads=mo.Loads(load_TLE=load_TLNE.sum(2), load_TLNE=load_TLNE if by_node else None),
        topology=topology,
        split=split,
    )
    if not live:
        return problem
    slots_LGC = random_slots(rng, problem.capacity_LG, experts)
    return problem.replace(current=Placement(slots_LGC=slots_LGC, experts=experts))


def wanting(problem: mo.Problem, order: tuple[str, ...], tolerance: float) -> mo.Problem:
    return problem.replace(objective=mo.Objective(priorities=order, balance_tolerance=tolerance))


def assert_right(problem: mo.Problem, result: mo.Result, truth: Enumeration) -> None:
    """The plan's figures, one priority after the other, are no worse than the order allows."""
    value = result.objective
    for stage in truth.order(order_of(problem), problem.objective.balance_tolerance):
        where = f"{problem.objective.priorities}: {stage} but {value}"
        assert value[stage.name] <= stage.allowed * (1 + 1e-6) + 1e-6, where


# --- priorities --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seed", "split", "tolerance", "live", "by_node"),
    [
        (0, "fractional", 0.1, True, True),
        (1, "equal", 0.1, True, True),
        pytest.param(2, "fractional", 0.0, True, False, marks=pytest.mark.slow),
        pytest.param(3, "equal", 0.0, True, False, marks=pytest.mark.slow),
        pytest.param(5, "fractional", 0.05, False, True, marks=pytest.mark.slow),
    ],
)
def test_any_order_is_right_by_enumeration(
    seed: int, split: str, tolerance: float, live: bool, by_node: bool
) -> None:
    bare = small_problem(seed, split, live=live, by_node=by_node)
    truth = Enumeration(bare)
    for order in ORDERS:
        problem = wanting(bare, order, tolerance)
        # By itself the default order is planned at engine speed, see below.
        solver = "lexicographic" if order == PRIORITIES else "auto"
        assert_right(problem, mo.solve(problem, solver), truth)


@pytest.mark.parametrize("split", ["fractional", "equal"])
def test_the_default_order_at_engine_speed_keeps_the_tolerance_with_few_moves(split: str) -> None:
    more = 0.0
    for seed in range(40):
        problem = wanting(small_problem(seed, split), PRIORITIES, 0.05)
        truth = Enumeration(problem)
        best, least = truth.order(("balance", "moves"), 0.05)
        value = mo.solve(problem).objective
        assert value["balance"] <= best.allowed * (1 + 1e-9)
        more += value["moves"] - least.best
    assert more <= {"fractional": 4, "equal": 20}[split]  # replicas, over all of them


def test_layers_are_solved_each_for_itself() -> None:
    both = wanting(small_problem(6, "fractional", layers=2), ("memory", "traffic", "balance"), 0.01)
    found = mo.solve(both)
    assert "no plan comes before" in found.message
    assert found.plan is not None
    total = dict.fromkeys(both.objective.priorities, 0.0)
    for layer in range(2):
        assert both.current is not None
        one = both.replace(
            loads=both.loads.select([layer]),
            current=both.current.replace(slots_LGC=both.current.slots_LGC[layer : layer + 1]),
        )
        for stage in Enumeration(one).order(both.objective.priorities, 0.01):
            total[stage.name] += stage.best
    for name, value in total.items():
        assert found.objective[name] == pytest.approx(value, rel=1e-6)


@pytest.mark.parametrize("split", ["fractional", "equal"])
def test_limits_hold_in_any_order(split: str) -> None:
    bare = small_problem(8, split)
    experts, gpus = bare.experts, bare.topology.gpus
    limits = mo.Limits(
        max_replicas=2, pinned=((0, 0, 2),), forbidden=((0, 1, 0),), max_layer_replicas=experts + 1
    )
    bare = bare.replace(limits=limits)
    truth = Enumeration(bare)
    assert len(truth.held_PEG) < len(placements([int(c) for c in bare.capacity_LG[0]], experts))
    for order in (
        ("balance", "memory"),
        ("traffic", "moves", "balance"),
        ("memory", "balance"),
        ("moves", "balance"),
    ):
        problem = wanting(bare, order, 0.02)
        result = mo.solve(problem)  # verifies the limits
        assert_right(problem, result, truth)
    assert gpus == 3


def test_what_ties_layers_together_is_refused_by_name_in_an_order_of_its_own() -> None:
    bare = small_problem(0, "equal", layers=2)
    bare = bare.replace(limits=mo.Limits(max_total_replicas=2 * bare.experts))
    problem = wanting(bare, ("memory", "balance"), 0.01)
    with pytest.raises(mo.UnsupportedFeatureError, match=r"limits\.max_total_replicas: ties layers together"):
        mo.solve(problem)
    moves = bare.replace(limits=mo.Limits(max_moves=2))
    with pytest.raises(mo.UnsupportedFeatureError, match="this order of priorities"):
        mo.solve(wanting(moves, ("memory", "moves"), 0.01))


def test_a_horizon_is_refused_in_an_order_of_its_own() -> None:
    bare = small_problem(0, "equal").replace(
        objective=mo.Objective(priorities=("moves", "balance"), horizon=10)
    )
    with pytest.raises(mo.UnsupportedFeatureError, match=r"objective\.horizon"):
        mo.solve(bare)


def test_who_does_not_minimise_an_order_refuses_it_and_names_who_does() -> None:
    problem = wanting(small_problem(0, "fractional"), ("memory", "balance"), 0.01)
    assert Feature.PRIORITIES in required_features(problem)
    for name in ("construct", "replan", "constrained", "stay", *sorted(PUBLISHED)):
        with pytest.raises(mo.UnsupportedFeatureError, match=r"this order of priorities.*lexicographic"):
            mo.solve(problem, name)


def test_published_methods_are_compared_all_the_same_and_judged_by_the_order() -> None:
    topology = mo.uniform(2, 2, slots=3)
    load_LE = np.array([[8.0, 5, 3, 2, 2, 1]])
    problem = mo.Problem(
        loads=mo.Loads(load_TLE=load_LE),
        topology=topology,
        objective=mo.Objective(priorities=("memory", "balance")),
    )
    table = mo.compare(problem, ("static", "eplb", "auto"))
    held = {name: result.objective["memory"] for name, result in table.results.items()}
    assert held["auto"] == 6 <= min(held["static"], held["eplb"])
    assert all(result.problem == problem for result in table.results.values())
    mo.verify(problem, table.results["eplb"].plan)


@pytest.mark.parametrize(
    ("order", "needs"),
    [
        (PRIORITIES, False),
        (("balance",), False),
        (("balance", "moves"), False),
        (("moves",), True),
        (("balance", "memory"), True),
        (("balance", "moves", "memory"), True),
        (("traffic", "balance"), True),
    ],
)
def test_which_orders_are_usual(order: tuple[str, ...], needs: bool) -> None:
    problem = wanting(small_problem(0, "fractional"), order, 0.01)
    assert usual_order(problem) is not needs


def test_priorities_that_cannot_differ_are_passed_over() -> None:
    fresh = wanting(small_problem(0, "fractional", live=False), ("moves", "memory", "balance"), 0.01)
    assert order_of(fresh) == ("memory", "balance")
    one_node = mo.Problem(
        loads=mo.Loads(load_TLE=np.ones((1, 1, 4))),
        topology=mo.uniform(1, 2, slots=3),
        objective=mo.Objective(priorities=("traffic",)),
    )
    assert order_of(one_node) == ("balance",)


def test_the_vector_is_one_table_of_terms() -> None:
    result = mo.solve(small_problem(0, "fractional"))
    assert result.plan is not None
    vector = objective_vector(result.problem, result.plan)
    assert tuple(vector) == tuple(TERMS)[:4] == PRIORITIES == tuple(result.objective)
    assert TERMS["memory"].unit(result.problem) == "replicas"
    sized = result.problem.replace(expert_bytes_L=[1000])
    assert TERMS["memory"].unit(sized) == TERMS["moves"].unit(sized) == "bytes"
    assert TERMS["memory"].value(sized, result.plan) == 1000 * result.plan.replicas


@pytest.mark.parametrize("split", ["fractional", "equal"])
@pytest.mark.parametrize(
    "order", [("balance", "memory"), ("memory", "balance"), ("moves", "balance"), ("traffic", "balance")]
)
def test_layers_too_large_for_a_proof_follow_the_order_too(order: tuple[str, ...], split: str) -> None:
    rng = np.random.default_rng(3)
    load_TLNE = rng.lognormal(0, 1, (1, 3, 2, 24))
    problem = mo.Problem(
        loads=mo.Loads(load_TLE=load_TLNE.sum(2), load_TLNE=load_TLNE),
        topology=mo.uniform(2, 4, slots=4),
        split=split,
    )
    live = mo.solve(problem, seed=1).plan
    assert live is not None
    turned = problem.replace(
        loads=mo.Loads(load_TLE=load_TLNE[:, ::-1].sum(2), load_TLNE=load_TLNE[:, ::-1]),
        current=Placement(slots_LGC=live.slots_LGC, experts=24),
    )
    usual = mo.solve(turned).objective
    result = mo.solve(wanting(turned, order, 0.01))
    value = result.objective
    assert "proven in 0 of 3 layers" in result.message
    if order[0] == "balance":
        assert value["balance"] <= 1.02 * usual["balance"]
        assert value["memory"] < 3 * 32
    elif order[0] == "traffic":
        assert value["traffic"] < 0.9 * usual["traffic"]
    else:
        assert value[order[0]] == {"memory": 3 * 24, "moves": 0}[order[0]]


# --- risk --------------------------------------------------------------------------------------------------


def scenarios(seed: int, split: str, risk: str, **more: Any) -> mo.Problem:
    """Two or three scenarios of one layer, weighted, without nodes."""
    rng = np.random.default_rng(seed)
    experts, count = int(rng.integers(4, 6)), 2 + seed % 2
    return mo.Problem(
        loads=mo.Loads(
            load_TLE=rng.lognormal(0, 1.2, (count, 1, experts)).round(2), weight_T=rng.integers(1, 4, count)
        ),
        topology=mo.uniform(1, 3, slots=3 if experts == 5 else 2),
        split=split,
        objective=mo.Objective(priorities=more.pop("priorities", PRIORITIES), risk=risk, cvar_alpha=0.4),
        **more,
    )


@pytest.mark.parametrize("split", ["fractional", "equal"])
@pytest.mark.parametrize("risk", RISKS)
def test_risk_over_scenarios_against_enumeration(risk: str, split: str) -> None:
    for seed in range(8):
        problem = scenarios(seed, split, risk)
        best = Enumeration(problem).best_time()
        plan = mo.solve(problem).plan
        assert plan is not None
        assert best * (1 - 1e-9) <= risk_L(problem, plan.slots_LGC)[0] <= best * 1.08
    exact = mo.solve(wanting_risk(problem), "lexicographic")
    assert exact.plan is not None
    assert risk_L(problem, exact.plan.slots_LGC)[0] == pytest.approx(best, rel=1e-6)


def wanting_risk(problem: mo.Problem) -> mo.Problem:
    return problem.replace(objective=problem.objective.replace(priorities=("balance",)))


@pytest.mark.parametrize("split", ["fractional", "equal"])
@pytest.mark.parametrize("limits", [mo.Limits(max_replicas=2), mo.Limits(forbidden=((0, 0, 0),))])
def test_risk_is_honoured_under_limits(limits: mo.Limits, split: str) -> None:
    for risk in RISKS:
        for seed in range(4):
            problem = scenarios(seed, split, risk, limits=limits)
            best = Enumeration(problem).best_time()
            plan = mo.solve(problem, "constrained").plan
            assert plan is not None
            assert best * (1 - 1e-9) <= risk_L(problem, plan.slots_LGC)[0] <= best * 1.1


@pytest.mark.parametrize("split", ["fractional", "equal"])
@pytest.mark.parametrize("solver", ["construct", "constrained", "activation"])
def test_a_plan_for_the_worst_case_is_no_worse_there(solver: str, split: str) -> None:
    time = mo.TimeModel(activation_cost=50.0) if solver == "activation" else mo.TimeModel()
    limits = mo.Limits(max_replicas=3) if solver == "constrained" else mo.Limits()
    rng = np.random.default_rng(3)
    loads = mo.Loads(load_TLE=rng.lognormal(0, 1.2, (2, 3, 12)) * 1000)
    value = {}
    for risk in ("expected", "worst"):
        problem = mo.Problem(
            loads=loads,
            topology=mo.uniform(1, 4, slots=4),
            split=split,
            time=time,
            limits=limits,
            objective=mo.Objective(risk=risk),
        )
        plan = mo.solve(problem, solver).plan
        assert plan is not None
        judge = problem.replace(objective=mo.Objective(risk="worst"))
        if solver == "activation":
            from moeless_opt.solvers.timed.solver import _risk_L

            value[risk] = float(_risk_L(judge, plan.slots_LGC, plan.share_LGC).sum())
        else:
            value[risk] = float(risk_L(judge, plan.slots_LGC).sum())
    assert value["worst"] <= value["expected"] * (1 + 1e-9)


@pytest.mark.parametrize("split", ["fractional", "equal"])
@pytest.mark.parametrize("risk", RISKS)
def test_makespan_sizing_meets_its_target_by_the_risk(risk: str, split: str) -> None:
    rng = np.random.default_rng(4)
    loads = mo.Loads(load_TLE=rng.lognormal(0, 0.8, (3, 2, 12)))
    problem = mo.Problem(
        loads=loads,
        topology=mo.uniform(1, 4, slots=6),
        split=split,
        objective=mo.Objective(risk=risk),
        sizing=mo.Sizing(policy="makespan", imbalance=1.3),
    )
    plan = mo.solve(problem).plan
    assert plan is not None
    even = problem.replace(topology=mo.uniform(1, 1, slots=12), sizing=mo.Sizing())
    ideal_L = risk_L(even, np.tile(np.arange(12, dtype=np.int32), (2, 1, 1))) / 4
    assert (risk_L(problem, plan.slots_LGC) <= 1.3 * ideal_L * (1 + 1e-9)).all()
    assert plan.replicas < 2 * 24


def test_replanning_looks_at_all_scenarios() -> None:
    rng = np.random.default_rng(8)
    load_TLE = rng.lognormal(0, 1.2, (2, 3, 12)) * 1000
    topology = mo.uniform(1, 4, slots=4)
    live = mo.solve(mo.Problem(loads=mo.Loads(load_TLE=load_TLE[:1, ::-1]), topology=topology)).plan
    assert live is not None
    value = {}
    for risk in ("expected", "worst"):
        problem = mo.Problem(
            loads=mo.Loads(load_TLE=load_TLE),
            topology=topology,
            current=Placement(slots_LGC=live.slots_LGC, experts=12),
            objective=mo.Objective(risk=risk),
        )
        plan = mo.solve(problem).plan
        assert plan is not None
        assert plan.certificate.solver == "auto"
        worst = problem.replace(objective=mo.Objective(risk="worst"))
        value[risk] = float(risk_L(worst, plan.slots_LGC).sum())
    assert value["worst"] <= value["expected"] * 1.01


def test_guises_are_one_scenario_each() -> None:
    problem = scenarios(1, "equal", "worst")
    parts = list(guises(problem))
    assert [part.loads.shape[0] for part in parts] == [1] * (2 + problem.loads.shape[0])
    assert (parts[1].load_LE == problem.loads.load_TLE.max(0)).all()
    one = small_problem(0, "equal")
    assert [part is one for part in guises(one)] == [True]


def test_a_layer_without_load_on_one_gpu() -> None:
    plan = mo.plan([[0, 22, 0], [0, 0, 0]], mo.uniform(1, 1, slots=3), solver="lexicographic")
    assert plan.certificate.lower_bound_L[1] == 0
    assert plan.certificate.status is mo.Status.OPTIMAL
