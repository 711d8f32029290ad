"""The solvers of the registry that start from a live placement."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import moeless_opt as mo
from moeless_opt.api import make_problem
from moeless_opt.problems.plan.result import StoppedBy
from moeless_opt.problems.spec.generators import lognormal, surprise
from moeless_opt.problems.spec.placement import replica_counts
from moeless_opt.problems.spec.problem import Problem
from moeless_opt.solvers.replan import equal
from tests.strategies import After

TOPOLOGY = mo.uniform(2, 4, slots=5, links=mo.Links(intra_node=1e9, inter_node=1e8, host=1e8, latency=0.0))


def drifted(split: str = "fractional", sigma: float = 1.0, layers: int = 6, **extra: object) -> Problem:
    """A problem whose live plan was made for other loads."""
    load = lognormal(layers, 32, tokens=10**6, sigma=1.0, seed=3)
    live = mo.plan(load, TOPOLOGY, split=split)
    return make_problem(
        surprise(load, sigma, seed=4), TOPOLOGY, current=live, split=split, expert_bytes=10**6, **extra
    )


def test_replan_moves_little_and_reaches_the_tolerance() -> None:
    problem = drifted()
    stay = mo.solve(problem, "stay").plan
    again = mo.solve(problem).plan
    fresh = mo.solve(problem, "construct").plan
    assert stay is not None
    assert again is not None
    assert fresh is not None
    assert stay.moves.count == 0
    assert stay.imbalance_L.max() > 1.01
    assert again.certificate.gap_L.max() <= 0.01 + 1e-9
    assert 0 < again.moves.count < fresh.moves.count / 3


def test_same_loads_need_no_move() -> None:
    load = lognormal(2, 32, tokens=10**6, sigma=1.0, seed=3)
    live = mo.plan(load, TOPOLOGY)
    again = mo.plan(load, TOPOLOGY, current=live)
    assert again.moves.count == 0
    np.testing.assert_array_equal(again.slots_LGC, live.slots_LGC)


@pytest.mark.parametrize("budget", [0, 2, 5])
def test_a_budget_of_moves_is_kept_and_used_well(budget: int) -> None:
    problem = drifted(limits=mo.Limits(max_moves=budget))
    plan = mo.solve(problem).plan
    assert plan is not None
    assert plan.moves.count <= budget
    stay = mo.solve(problem, "stay").plan
    assert stay is not None
    assert plan.certificate.value_L.sum() <= stay.certificate.value_L.sum() * (1 + 1e-9)
    if budget:
        assert plan.certificate.value_L.sum() < stay.certificate.value_L.sum()


def test_budgets_of_bytes_layers_and_seconds() -> None:
    free = mo.solve(drifted()).plan
    assert free is not None
    assert free.moves.count > 6
    plan = mo.solve(drifted(limits=mo.Limits(max_move_bytes=6 * 10**6 + 1))).plan
    assert plan is not None
    assert 0 < plan.moves.bytes <= 6 * 10**6
    plan = mo.solve(drifted(limits=mo.Limits(max_layer_moves=1))).plan
    assert plan is not None
    assert plan.moves.count_L.max() <= 1
    problem = drifted(limits=mo.Limits(max_move_seconds=0.01))
    plan = mo.solve(problem).plan
    assert plan is not None
    assert mo.migration(problem, plan).seconds <= 0.01


def test_a_budget_that_cannot_be_weighed_names_what_is_missing() -> None:
    problem = drifted(limits=mo.Limits(max_move_bytes=10)).replace(expert_bytes_L=None)
    with pytest.raises(mo.ProblemError, match=r"limits\.max_move_bytes: needs the size of an expert"):
        mo.solve(problem)


def test_a_move_must_earn_its_cost() -> None:
    time = mo.TimeModel(token_cost=1e-9, unit="s")
    counts = []
    for horizon in (1e-3, 30.0, 1e6):
        problem = drifted(time=time, objective=mo.Objective(horizon=horizon))
        plan = mo.solve(problem).plan
        assert plan is not None
        assert plan.payback is not None
        counts.append(plan.moves.count)
        if plan.moves.count:
            assert plan.payback.passes <= horizon
            assert "saved per pass" in repr(plan)
    assert counts[0] == 0
    assert counts == sorted(counts)
    assert counts[-1] > 0


@pytest.mark.parametrize("split", ["fractional", "equal"])
@pytest.mark.parametrize(
    "limits",
    [
        mo.Limits(max_moves=3),
        mo.Limits(max_layer_moves=1),
        mo.Limits(max_move_seconds=0.02),
        mo.Limits(max_moves=8, max_layer_moves=2, max_move_seconds=0.02),
    ],
)
def test_a_horizon_keeps_to_the_limits_on_moves(split: str, limits: mo.Limits) -> None:
    time = mo.TimeModel(token_cost=1e-9, unit="s")
    free = drifted(split, layers=3, time=time, objective=mo.Objective(horizon=1e6))
    problem = free.replace(limits=limits)
    no_time = free.replace(objective=mo.Objective(horizon=1e-3))
    stay, plan, most = (mo.solve(one).plan for one in (no_time, problem, free))
    assert stay is not None
    assert plan is not None
    assert most is not None
    mo.verify(problem, plan)  # replicas of a layer and in all
    if limits.max_move_seconds is not None:
        assert mo.migration(problem, plan).seconds <= limits.max_move_seconds
    assert 0 < plan.moves.count <= most.moves.count
    assert plan.certificate.value_L.sum() < stay.certificate.value_L.sum()


def test_a_lost_gpu_and_too_few_seconds_are_infeasible() -> None:
    problem = drifted(layers=2)
    assert problem.current is not None
    slots_LGC = problem.current.slots_LGC.copy()
    slots_LGC[:, 0] = -1
    slots_LGC[slots_LGC == 0] = -1
    lost = problem.current.replace(slots_LGC=slots_LGC, partial=True)
    with pytest.raises(mo.InfeasibleError, match="max_move_seconds: 1e-06 cannot give every expert"):
        mo.solve(problem.replace(current=lost, limits=mo.Limits(max_move_seconds=1e-6)))


@pytest.mark.parametrize("limits", [{"pinned": [(0, 0, 1)]}, {"forbidden": [(-1, 2, 0)]}], ids=str)
@pytest.mark.parametrize(
    "bound",
    [{"max_moves": 0}, {"max_layer_moves": 0}, {"max_move_bytes": 1}, {"max_move_seconds": 1e-5}],
    ids=str,
)
@pytest.mark.parametrize("split", ["fractional", "equal"])
def test_what_the_limits_ask_for_and_those_on_moves_forbid_is_infeasible(
    split: str, bound: dict[str, Any], limits: dict[str, Any]
) -> None:
    live = np.array([[[0, 2], [1, 3], [1, 3]]])
    gpus = mo.uniform(1, 3, slots=2)
    asked: dict[str, Any] = {"current": live, "split": split, "expert_bytes": 10**6}
    (name,) = bound
    with pytest.raises(mo.InfeasibleError, match=name):
        mo.plan([[3, 7, 12, 1]], gpus, limits=mo.Limits(**bound, **limits), **asked)
    enough = mo.Limits(**{name: 2 if name.endswith("moves") else 10**7}, **limits)
    assert mo.plan([[3, 7, 12, 1]], gpus, limits=enough, **asked).moves.count > 0


def test_a_horizon_needs_seconds() -> None:
    with pytest.raises(mo.ProblemError, match=r"objective\.horizon: needs times in seconds"):
        mo.solve(drifted(objective=mo.Objective(horizon=10.0)))


@pytest.mark.parametrize("split", ["fractional", "equal"])
def test_layers_that_there_was_no_time_for_stay_as_they_are(
    split: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Compiled kernels are told to stop by a clock, not at the n-th question.
    monkeypatch.setattr("moeless_opt.solvers.pack.fast.loaded", lambda: False)
    monkeypatch.setattr(equal, "_worker", lambda *_: equal._plain)
    problem = drifted(split)
    result = mo.solve(problem, "replan", stop=After(4))
    assert result.stopped_by is StoppedBy.TIME
    assert result.plan is not None
    assert np.count_nonzero(result.plan.moves.count_L) <= 2
    full = mo.solve(problem, "replan").plan
    assert full is not None
    assert np.count_nonzero(full.moves.count_L) == problem.layers


def test_stay_needs_something_live() -> None:
    with pytest.raises(mo.ProblemError, match="current: is missing"):
        mo.solve(mo.load_instance("flashlb-fractional"), "stay")


def test_a_narrower_live_placement_uses_the_new_slots() -> None:
    """The live placement had three slots per GPU, now there are five."""
    load = lognormal(2, 16, tokens=10**6, sigma=1.2, seed=5)
    live = mo.plan(load, mo.uniform(2, 4, slots=2))
    plan = mo.plan(surprise(load, 0.8, seed=6), TOPOLOGY, current=live)
    assert plan.slots_LGC.shape[2] == 5
    assert plan.certificate.gap_L.max() <= 0.011


def test_equal_split_reaches_its_tolerance_too() -> None:
    problem = drifted("equal", objective=mo.Objective(balance_tolerance=0.05))
    plan, fresh = mo.solve(problem).plan, mo.solve(problem, "construct").plan
    assert plan is not None
    assert fresh is not None
    assert plan.certificate.gap_L.max() <= 0.05 + 1e-9
    assert plan.moves.count < fresh.moves.count


@pytest.mark.parametrize("against", ["moves", "memory"])
def test_pareto_front(against: str) -> None:
    problem = drifted()
    front = mo.pareto(problem, ("balance", against), points=6)
    balance, cost = np.array(front.values).T
    assert (np.diff(cost) > 0).all()
    assert (np.diff(balance) < 1e-12).all()
    assert 2 <= len(front.plans) <= 6
    if against == "moves":
        assert front.plans[0].moves.count == 0
        assert front.plans[-1].certificate.gap_L.max() <= 0.01 + 1e-9
    assert {"moves": "moved", "memory": "memory"}[against] in str(front)


def test_pareto_errors() -> None:
    problem = mo.load_instance("flashlb-fractional")
    with pytest.raises(mo.ProblemError, match="current: is missing"):
        mo.pareto(problem)
    with pytest.raises(mo.UnsupportedFeatureError, match="not supported"):
        mo.pareto(problem, ("moves", "traffic"))
    with pytest.raises(mo.ProblemError, match="must be two of"):
        mo.pareto(problem, ("balance", "speed"))


def test_migration_of_a_plan() -> None:
    problem = drifted()
    plan = mo.solve(problem).plan
    assert plan is not None
    schedule = mo.migration(problem, plan)
    assert len(schedule.transfers) == plan.moves.count + schedule.staged
    assert schedule.seconds >= schedule.lower_bound > 0


def test_scenarios_share_one_placement() -> None:
    """Two opposite kinds of traffic: a placement for the mean alone is worse in the worst case."""
    load = lognormal(2, 16, tokens=10**5, sigma=1.0, seed=8)
    both = np.stack([load, surprise(load, 1.0, seed=9)])
    topology = mo.uniform(1, 8, slots=3)
    robust = mo.plan(both, topology, objective=mo.Objective(risk="worst"))
    mean = mo.plan(both.mean(0), topology)

    def worst(plan: mo.Plan) -> float:
        return max(
            float(mo.plan(scene, topology, current=plan, solver="stay").certificate.value_L.sum())
            for scene in both
        )

    assert worst(robust) <= worst(mean) * (1 + 1e-9)


def test_a_broken_live_placement_is_refused_or_repaired() -> None:
    load = lognormal(1, 6, tokens=10**4, sigma=1.0, seed=2)
    topology = mo.uniform(1, 4, slots=2)
    broken = np.array([[[0, 0, 7], [1, 2, 3], [0, -1, -1], [4, 9, -1]]])
    with pytest.raises(mo.ProblemError, match=r"^current"):
        mo.plan(load, topology, current=broken)
    # Drops mend GPU 0 and 3; expert 5, and one of the three on GPU 1, must be shipped
    plan = mo.plan(load, topology, current=broken, repair=True, limits=mo.Limits(max_moves=2))
    assert plan.replicas_LE.min() >= 1
    assert plan.moves.count == 2
    nothing = mo.Limits(max_moves=1)
    with pytest.raises(mo.InfeasibleError, match="least budget that would is 2"):
        mo.plan(load, topology, current=broken, repair=True, limits=nothing)
    with pytest.raises(mo.InfeasibleError, match="has no live replica"):
        mo.plan(load, topology, current=broken, repair=True, solver="stay")


def test_the_loss_of_a_gpu_restores_every_expert() -> None:
    load = lognormal(2, 16, tokens=10**4, sigma=1.0, seed=2)
    live = mo.plan(load, mo.uniform(1, 6, slots=4))
    survivors = live.slots_LGC[:, 1:]
    plan = mo.plan(load, mo.uniform(1, 5, slots=4), current=survivors, repair=True)
    lost = 16 * 2 - int((replica_counts(survivors, 16) > 0).sum())
    assert lost > 0
    assert plan.moves.count >= lost
    assert plan.certificate.gap_L.max() <= 0.011


def test_known_sources_keep_tokens_on_their_node() -> None:
    """The same balance, fewer tokens across the network, once it is known where they come from."""
    rng = np.random.default_rng(0)
    load = lognormal(2, 16, tokens=10**5, sigma=0.8, seed=11)
    part = rng.dirichlet([0.5, 0.5], size=load.shape)  # [L, E, N]
    by_node = np.moveaxis(load[:, :, None] * part, 2, 1)
    topology = mo.uniform(2, 2, slots=8)
    known = mo.Loads(load_TLE=by_node.sum(1), load_TLNE=by_node)
    aware = mo.solve(make_problem(known, topology))
    blind = mo.solve(
        make_problem(known, topology, objective=mo.Objective(priorities=("balance", "moves", "memory")))
    )
    assert aware.plan is not None
    assert aware.plan.certificate.gap_L.max() <= 0.01 + 1e-9
    assert aware.objective["traffic"] < blind.objective["traffic"] * 0.95


def test_fewest_moves_are_proven() -> None:
    problem = drifted(layers=2)
    quick = mo.solve(problem).plan
    result = mo.solve(problem, "min-moves", time_limit=20)
    assert quick is not None
    assert result.plan is not None
    assert result.plan.moves.count <= quick.moves.count
    assert result.plan.certificate.gap_L.max() <= 0.01 + 1e-6
    assert "proven fewest in 2 of 2 layers" in result.message
    assert "moves at least" in quick.certificate.proof
    assert int(quick.certificate.proof.split()[-1]) <= result.plan.moves.count


def test_a_limit_on_moves_that_cannot_bind_changes_nothing() -> None:
    rng = np.random.default_rng(3)
    before = rng.lognormal(0, 1, (1, 64)) * 1e5
    after = before * rng.lognormal(0, 0.2, before.shape)
    slots = mo.plan(before, mo.uniform(2, 8, slots=4), split="equal").slots_LGC
    live = np.pad(slots, ((0, 0), (0, 0), (0, 1)), constant_values=-1)
    wide = mo.uniform(2, 8, slots=5)
    free = mo.plan(after, wide, split="equal", current=live)
    for limits in (mo.Limits(max_moves=80), mo.Limits(max_layer_moves=80)):
        bound = mo.plan(after, wide, split="equal", current=live, limits=limits)
        np.testing.assert_array_equal(bound.slots_LGC, free.slots_LGC)


def test_no_moves_are_said_to_be_needed_where_dropping_a_replica_is_enough() -> None:
    gpus = mo.Topology(node_G=[0, 0], speed_G=[3.0, 0.5], slots_G=[1, 1])
    plan = mo.plan([[1.0]], gpus, current=[[[0], [0]]], split="nearest")
    assert plan.moves.count == 0
    assert plan.slots_LGC.tolist() == [[[0], [-1]]]
    assert plan.certificate.proof.endswith("at least 0")


def test_layers_planned_again_may_be_narrower_than_the_live_ones() -> None:
    """What is live has a slot more on its widest GPU than any GPU has now."""
    problem = mo.Problem(
        loads=mo.Loads(load_TLE=[[[3.0, 5.0], [9.0, 1.0]], [[4.0, 2.0], [1.0, 8.0]]]),
        topology=mo.uniform(2, 2, slots=2),
        split="nearest",
        current=mo.Placement(slots_LGC=[[[1, -1, -1], [0, -1, -1], [1, 0, -1], [0, -1, -1]]] * 2, experts=2),
        limits=mo.Limits(max_replicas=3, pinned=((1, 0, 0),)),
        objective=mo.Objective(risk="cvar", balance_tolerance=0.0),
    )
    plan = mo.solve(problem).plan
    assert plan is not None
    assert 0 in plan.slots_LGC[1, 0]


def test_affinity_that_cannot_differ_is_passed_over_with_scenarios() -> None:
    """On one node nothing hops: the plan is that of balance, and each scenario keeps its flow."""
    load_TLE = np.random.default_rng(0).lognormal(0, 1, (3, 2, 5))
    loads = mo.Loads(load_TLE=load_TLE, flow_LEE=np.ones((1, 5, 5)))
    hops = mo.Objective(priorities=("balance", "hops"))
    for split in ("fractional", "equal"):
        plan = mo.plan(loads, mo.uniform(1, 2, slots=3), split=split, objective=hops)
        assert (plan.certificate.lower_bound_L <= plan.certificate.value_L * (1 + 1e-9)).all()


@pytest.mark.parametrize("split", ["equal", "fractional", "nearest"])
@pytest.mark.parametrize("more", [{}, {"max_layer_moves": 2}])
def test_experts_listed_for_spread_in_some_layers_are_spread_there(split: str, more: dict[str, int]) -> None:
    """Layers are also re-planned by themselves, where those of the others are not known."""
    rng = np.random.default_rng(0)
    limits = mo.Limits(spread=2, spread_experts=((0, 1), (1, 2)))
    topology = mo.uniform(nodes=2, gpus_per_node=2, slots=3)
    load_TLE = rng.integers(1, 99, (3, 2, 6)).astype(float)
    problem = mo.Problem(loads=mo.Loads(load_TLE=load_TLE), topology=topology, limits=limits)
    live = mo.Placement(slots_LGC=mo.solve(problem).plan.slots_LGC, experts=6)
    later = mo.Loads(load_TLE=load_TLE[:, :, ::-1].copy())
    asked = problem.replace(current=live, loads=later, split=split, limits=limits.replace(**more))
    slots_LGC = mo.solve(asked).plan.slots_LGC
    for layer, expert in ((0, 1), (1, 2)):
        assert len(np.unique(topology.failure_domain_G[(slots_LGC[layer] == expert).any(1)])) == 2
