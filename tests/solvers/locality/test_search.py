"""The search for nearness: what it keeps, what it gains, and that both of its twins do the same."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import moeless_opt as mo
from moeless_opt import fronts
from moeless_opt.problems.plan import gpu_times, objective_vector, order_of, outside_tokens, traffic_L
from moeless_opt.solvers.core import NeverStop
from moeless_opt.solvers.locality import search, state
from moeless_opt.solvers.locality.costs import Costs
from moeless_opt.solvers.locality.search import LayerSearch, _job, search_near_layers
from moeless_opt.solvers.pack import fast
from moeless_opt.solvers.shares import best_shares

LIVE = mo.Placement(
    slots_LGC=np.tile(np.arange(30).reshape(6, 5) % 24, (2, 1, 1)).astype(np.int32), experts=24
)
NEAR = mo.Objective(priorities=("balance", "traffic"), balance_tolerance=0.02)


def skewed(seed: int, layers: int = 2, experts: int = 24, nodes: int = 2) -> mo.Loads:
    """Loads whose experts are wanted by one node more than by others, and followed by some more."""
    rng = np.random.default_rng(seed)
    by_node = rng.lognormal(3, 1, (1, layers, nodes, experts))
    flow = rng.random((layers - 1, experts, experts)) ** 4
    return mo.Loads(load_TLE=by_node.sum(2), load_TLNE=by_node, flow_LEE=flow)


def problem_of(split: str, **more: Any) -> mo.Problem:
    settings: dict[str, Any] = {"objective": NEAR, "topology": mo.uniform(2, 3, slots=5)} | more
    loads = settings.pop("loads", skewed(0))
    return mo.Problem(loads=loads, split=split, **settings)


def solved(problem: mo.Problem, solver: str = "locality", **options: Any) -> mo.Plan:
    plan = mo.solve(problem, solver, **options).plan
    assert plan is not None
    assert mo.violations(problem, plan) == []
    return plan


@pytest.mark.parametrize("split", ["fractional", "equal", "nearest"])
def test_traffic_falls_within_the_tolerance(split: str) -> None:
    problem = problem_of(split)
    blind = solved(problem.replace(objective=mo.Objective(priorities=("balance",))), "construct")
    near = solved(problem)
    before, after = (objective_vector(problem, one)["traffic"] for one in (blind, near))
    assert after < 0.85 * before
    assert near.locality is not None
    assert near.locality.traffic_bound_L.sum() <= after
    least = blind.certificate.value_L
    assert (near.certificate.value_L <= least * (1 + NEAR.balance_tolerance) * (1 + 1e-6)).all()


@pytest.mark.parametrize("split", ["fractional", "equal", "nearest"])
@pytest.mark.parametrize("seed", range(3))
def test_any_shape_gives_a_valid_plan(split: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    nodes = int(rng.integers(1, 4))
    gpus = nodes * int(rng.integers(1, 4))
    experts = int(rng.integers(1, 2 * gpus + 1))
    slots = rng.integers(2, 5, gpus)
    speed = rng.choice([0.5, 1.0, 2.0], gpus)
    topology = mo.uniform(nodes, gpus // nodes, slots=slots.tolist(), speed=speed.tolist())
    if seed == 1:
        topology = topology.with_costs(np.where(np.eye(gpus), 0, rng.random((gpus, gpus))))
    load = np.floor(rng.lognormal(2, 2, (3, experts))) * (rng.random((3, experts)) < 0.8)
    loads = mo.Loads(load_TLE=load, flow_LEE=rng.random((2, experts, experts)))
    groups = mo.Groups.even(experts, 1, 1.0)
    order = (("balance", "traffic", "hops"), ("balance", "hops"), ("balance", "groups", "traffic"))[seed]
    problem = mo.Problem(
        loads=loads, topology=topology, split=split, groups=groups, objective=mo.Objective(priorities=order)
    )
    if order_of(problem) == ("balance",):
        pytest.skip("nothing to keep near")
    solved(problem, "auto")


def test_both_twins_find_the_same(monkeypatch: Any) -> None:
    if not fast.available():
        pytest.skip("Numba is not installed")
    found = []
    for compiled in (True, False):
        if not compiled:
            monkeypatch.setattr(fast, "available", lambda: False)
        else:
            search.warm_locality()
        for split in ("fractional", "equal", "nearest"):
            plan = solved(problem_of(split, loads=skewed(3, layers=3)), effort="quick")
            found.append(plan.slots_LGC)
    for one, other in zip(found[:3], found[3:], strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_search_that_is_stopped_ends() -> None:
    problem = problem_of("equal")
    assert mo.solve(problem, "locality", time_limit=1e-3).seconds < 5


@pytest.mark.parametrize("split", ["fractional", "equal", "nearest"])
def test_moves_are_limited_and_buy_traffic(split: str) -> None:
    live = solved(problem_of(split, objective=mo.Objective(priorities=("balance",))), "construct")
    problem = problem_of(split, current=live.placement)
    traffic = []
    for most in (0, 4, 40):
        plan = solved(problem.replace(limits=mo.Limits(max_moves=most)))
        assert plan.moves.count <= most
        traffic.append(objective_vector(problem, plan)["traffic"])
    assert traffic[2] < traffic[1] < traffic[0] * (1 + 1e-9)
    few = problem.replace(objective=mo.Objective(priorities=("balance", "moves", "traffic")))
    assert solved(few).moves.count <= solved(problem).moves.count


def test_what_is_live_stays_where_moves_come_first() -> None:
    live = solved(problem_of("equal", objective=mo.Objective(priorities=("balance",))), "construct")
    order = mo.Objective(priorities=("balance", "moves", "traffic"))
    assert solved(problem_of("equal", current=live.placement, objective=order)).moves.count == 0


@pytest.mark.parametrize("split", ["fractional", "equal", "nearest"])
@pytest.mark.parametrize("outside", [0.0, 0.1])
def test_groups_stay_on_a_node(split: str, outside: float) -> None:
    groups = mo.Groups.even(24, 6, outside)
    problem = problem_of(split, groups=groups)
    plan = solved(problem)
    served = outside_tokens(problem, plan.share_LGE)
    assert (served <= problem.load_LE.sum(1) * (outside + 1e-6)).all()
    if outside == 0:
        assert set(plan.certificate.bound_L) <= {"groups", "locality"}
        assert plan.certificate.gap < 0.02


def test_groups_that_do_not_fit_are_infeasible() -> None:
    problem = problem_of("equal", groups=mo.Groups.even(24, 1))
    with pytest.raises(mo.InfeasibleError, match=r"groups: their 24 experts do not fit on 2 nodes of 15"):
        mo.solve(problem, "locality")


def test_groups_that_fit_nowhere_are_infeasible_where_some_tokens_may_leave() -> None:
    problem = mo.Problem(
        loads=mo.Loads(load_TLE=np.arange(1.0, 9.0)[None, None]),
        topology=mo.uniform(2, 1, slots=5),
        groups=mo.Groups.even(8, 1, 0.1),
        limits=mo.Limits(max_replicas=1),
    )
    with pytest.raises(mo.InfeasibleError, match=r"groups\.max_outside: is 0\.1; in layer 0"):
        mo.solve(problem)


def test_groups_that_would_move_more_than_may_are_told_by_the_limit() -> None:
    limits = mo.Limits(max_moves=1)
    problem = problem_of("fractional", groups=mo.Groups.even(24, 4), current=LIVE, limits=limits)
    with pytest.raises(mo.InfeasibleError, match=r"limits\.max_moves: is 1; with the groups kept"):
        mo.solve(problem)


@pytest.mark.parametrize("name", ["traffic", "groups"])
def test_models_without_tokens_have_bounds_of_nothing(name: str) -> None:
    problem = mo.Problem(
        loads=mo.Loads(load_TLE=np.zeros((1, 2, 4))),
        topology=mo.uniform(2, 1, slots=3),
        groups=mo.Groups.even(4, 2, 1.0),
        objective=mo.Objective(priorities=("balance", name)),
    )
    told = solved(problem).locality
    assert told is not None
    assert told.traffic_bound_L.tolist() == [0.0, 0.0]


def test_tokens_follow_from_layer_to_layer() -> None:
    loads = skewed(5, layers=4)
    order = mo.Objective(priorities=("balance", "hops"), balance_tolerance=0.02)
    for split in ("fractional", "equal"):
        problem = problem_of(split, loads=loads, objective=order)
        blind = solved(problem.replace(objective=mo.Objective(priorities=("balance",))), "construct")
        before, after = (objective_vector(problem, one)["hops"] for one in (blind, solved(problem)))
        assert after < 0.9 * before


def test_the_front_falls_in_both() -> None:
    problem = problem_of("equal", groups=mo.Groups.even(24, 6, 1.0))
    for name in ("traffic", "groups"):
        front = mo.pareto(problem, ("balance", name), points=4)
        first, second = zip(*front.values, strict=True)
        assert list(first) == sorted(first, reverse=True)
        assert list(second) == sorted(second)
        assert len(front.plans) > 1
        assert name in str(front)
    live = solved(problem_of("equal", objective=mo.Objective(priorities=("balance",))), "construct")
    moving = mo.pareto(problem_of("equal", current=live.placement), ("traffic", "moves"), points=3)
    assert moving.plans[0].moves.count < moving.plans[-1].moves.count
    assert moving.values[0][0] > moving.values[-1][0]


def test_links_of_many_tokens_are_told_in_larger_units() -> None:
    problem = problem_of("equal", objective=mo.Objective(priorities=("balance",)))
    scaled = problem.replace(loads=mo.Loads(load_TLE=problem.load_LE[None] * 1e4))
    small, large = (mo.traffic(solved(one, "construct")) for one in (problem, scaled))
    assert str(small).startswith("tokens from node")
    row = str(large).splitlines()
    assert row[0].split() == ["million", "tokens", "from", "node", "to", "0", "to", "1"]
    assert float(row[2].split()[2]) == pytest.approx(large.token_NN[0, 1] / 1e6, rel=1e-3)


@pytest.mark.parametrize(("name", "split"), [("traffic", "fractional"), ("groups", "equal")])
def test_merged_fronts_fall_in_both_and_are_no_worse(
    name: str, split: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What many large layers get: a few tolerances searched, and the layers' steps merged."""
    topology, loads = mo.uniform(2, 3, slots=8), skewed(2, layers=8, experts=40)
    problem = problem_of(split, loads=loads, topology=topology, groups=mo.Groups.even(40, 8, 1.0))
    apart = mo.pareto(problem, ("balance", name), points=6)
    monkeypatch.setattr(fronts, "_PAIRS", 1)
    merged = mo.pareto(problem, ("balance", name), points=9)
    assert len(apart.plans) < len(merged.plans) <= 9
    assert (np.diff(np.array(merged.values).T) * [[-1], [1]] > 0).all()
    for plan, (first, cost) in zip(merged.plans, merged.values, strict=True):
        assert mo.violations(problem, plan) == []
        told = plan.locality.traffic_L if name == "traffic" else plan.locality.outside_L  # type: ignore[union-attr]
        assert told is not None
        assert (first, cost) == pytest.approx((plan.imbalance_L.mean(), told.sum()))
    assert name == "traffic" or merged.values[0][1] == 0
    time, cost = zip(*merged.values, strict=True)
    for first, spent in apart.values:  # between two points as between a straight line's ends
        line = float(np.interp(spent, cost, time))
        assert line <= first * 1.05


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"objective": mo.Objective(priorities=("traffic", "groups"))}, "this order of priorities"),
        ({"objective": NEAR.replace(horizon=10.0), "current": LIVE}, r"objective\.horizon"),
        ({"fill": "copies"}, "second copies on a GPU"),
        (
            {
                "loads": mo.Loads(load_TLE=np.ones((2, 1, 24))),
                "split": "fractional",
                "groups": mo.Groups.even(24, 6, 0.5),
            },
            r"groups\.max_outside: a share between",
        ),
        ({"time": mo.TimeModel(activation_cost=1.0)}, "time model with more than tokens"),
    ],
)
def test_what_it_cannot_follow_is_refused_by_name(more: dict[str, Any], message: str) -> None:
    problem = problem_of(**{"split": "equal", "groups": mo.Groups.even(24, 6, 1.0)} | more)
    with pytest.raises(mo.UnsupportedFeatureError, match=message):
        mo.solve(problem, "locality")


@pytest.mark.parametrize("even", [True, False])
def test_the_kernel_counts_as_the_evaluation_does(even: bool) -> None:
    """What a placement costs in the search is what it costs by the evaluation."""
    problem = problem_of("equal" if even else "nearest")
    alone = problem.replace(loads=problem.loads.select([0]))
    start = solved(problem.replace(objective=mo.Objective(priorities=("balance",))), "construct")
    layer = LayerSearch(
        row=0,
        start_GC=start.slots_LGC[0],
        sources=Costs(problem, ("traffic",), None).sources(0, None),
        toll_EG=np.zeros((24, 6)),
        allowed_EG=np.ones((24, 6), dtype=np.bool_),
        limit_T=start.certificate.value_L[:1] * 1.05,
        most_held=30,
        move=0.0,
        most_moves=1000,
        even=even,
    )
    (slots_GC,) = search_near_layers(problem, [layer], steps=3000, seed=1, stop=NeverStop())
    field, _, found = _job(problem, replace(layer, start_GC=slots_GC), 1, 1, (1.0, 1.0))
    state.begin(field, found)
    unit = float(problem.load_LE[0].sum()) / 6
    share = best_shares(alone, slots_GC[None])
    assert found.cost_E.sum() * unit == pytest.approx(traffic_L(alone, slots_GC[None], share)[0], rel=1e-9)
    time = gpu_times(alone.load_LE, slots_GC[None], share, alone.topology.speed_G)[0]
    np.testing.assert_allclose(found.carried_TG[0] * unit, time, rtol=1e-9)
    assert time.max() <= layer.limit_T[0] * (1 + 1e-9)
