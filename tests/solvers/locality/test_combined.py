"""What real clusters want together: groups, traffic, limits on moves, pairs, domains and scenarios."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

import moeless_opt as mo
from moeless_opt.problems.arrays import FloatArray
from moeless_opt.problems.plan import outside_L
from tests.oracles.enumeration import even_times, placements, set_times

TOLERANCE = 0.05
ORDERS = {
    "traffic": ("balance", "traffic"),
    "moves": ("balance", "moves", "traffic"),
    "groups": ("balance", "groups"),
    "hops": ("balance", "hops"),
}


def time_of(split: str) -> Any:
    return even_times if split == "equal" else set_times


def solved(problem: mo.Problem, **options: Any) -> mo.Plan:
    plan = mo.solve(problem, "locality", **options).plan
    assert plan is not None
    assert mo.violations(problem, plan) == []
    return plan


def node_front(
    experts: tuple[int, ...], gpus: tuple[int, int], problem: mo.Problem, live: set[tuple[int, int]]
) -> list[tuple[float, int]]:
    """Least time of a node that holds these experts, for each number of moves."""
    if not experts:
        return [(0.0, 0)]
    pinned, banned = (
        {(e, g) for _, e, g in pairs} for pairs in (problem.limits.pinned, problem.limits.forbidden)
    )
    good, moves = [], []
    for held_EG in placements([3, 3], len(experts)):
        pairs = {(experts[i], gpus[h]) for i, h in np.argwhere(held_EG)}
        if pairs & banned or {pair for pair in pinned if pair[1] in gpus} - pairs:
            continue
        good.append(held_EG)
        moves.append(len(pairs - live))
    if not good:
        return []
    load_E = problem.load_LE[0, list(experts)]
    time_P = time_of(problem.split)(np.array(good), load_E, np.ones(2))
    return [(float(time_P[np.array(moves) == n].min()), n) for n in sorted(set(moves))]


def least_kept(problem: mo.Problem, group_E: list[int], live: set[tuple[int, int]], budget: int) -> float:
    """Least time with every group on one of two nodes of two GPUs, within a budget of moves."""
    best = np.inf
    for way in itertools.product((0, 1), repeat=max(group_E) + 1):
        inside = [tuple(e for e in range(8) if way[group_E[e]] == n) for n in (0, 1)]
        fronts = [
            node_front(inside[n], ((0, 1), (2, 3))[n], problem, live) if len(inside[n]) <= 6 else []
            for n in (0, 1)
        ]
        if any(e in inside[1 - g // 2] for _, e, g in problem.limits.pinned):
            continue
        for one, other in itertools.product(*fronts):
            if one[1] + other[1] <= budget:
                best = min(best, max(one[0], other[0]))
    return best


@pytest.mark.parametrize("split", ["equal", "fractional"])
@pytest.mark.parametrize("seed", range(4))
def test_groups_are_kept_within_limits_on_moves(split: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    group_E = rng.permutation([0, 0, 1, 1, 1, 2, 2, 3]).tolist() if seed % 2 else [0, 0, 1, 1, 2, 2, 3, 3]
    live_GC = np.full((4, 3), -1, dtype=np.int32)
    live_GC[:, :2] = rng.permutation(8).reshape(4, 2)
    live = {(int(e), g) for g, row in enumerate(live_GC) for e in row if e >= 0}
    pairs: dict[str, Any] = {}
    if split == "equal" and seed >= 2:  # with free shares a pinned replica elsewhere may serve nothing
        pairs = {"pinned": ((0, 2, int(rng.integers(4))),), "forbidden": ((0, 5, int(rng.integers(4))),)}
    base = mo.Problem(
        loads=mo.Loads(load_TLE=rng.lognormal(3, 1, (1, 1, 8))),
        topology=mo.uniform(2, 2, slots=3),
        split=split,
        groups=mo.Groups(group_E=np.array(group_E)),
        current=mo.Placement(slots_LGC=live_GC[None], experts=8),
        objective=mo.Objective(priorities=("balance", "moves"), balance_tolerance=0.0),
    )
    for budget in (3, 6):
        problem = base.replace(limits=mo.Limits(max_moves=budget, **pairs))
        best = least_kept(problem, group_E, live, budget)
        if not np.isfinite(best):
            with pytest.raises(mo.InfeasibleError, match=r"limits\.max_moves: is|groups: "):
                mo.solve(problem, "locality")
            continue
        plan = solved(problem)
        assert plan.moves.count <= budget
        assert plan.certificate.value_L[0] == pytest.approx(best, rel=1e-6)
        assert plan.certificate.lower_bound_L[0] <= best * (1 + 1e-9)


@pytest.mark.parametrize("split", ["equal", "fractional"])
def test_groups_move_little_where_little_has_changed(split: str) -> None:
    rng = np.random.default_rng(1)
    load_LE = rng.lognormal(3, 1, (3, 32))
    topology, groups = mo.uniform(4, 2, slots=5), mo.Groups.even(32, 8)
    first = mo.plan(load_LE, topology, split=split, groups=groups)
    drifted = load_LE * rng.lognormal(0, 0.1, load_LE.shape)
    again = mo.plan(drifted, topology, split=split, groups=groups, current=first)
    scratch = mo.plan(drifted, topology, split=split, groups=groups)
    assert again.moves.count <= 0.35 * first.slots_LGC.size
    assert again.imbalance_L.mean() <= scratch.imbalance_L.mean() * 1.02
    few = mo.plan(
        drifted,
        topology,
        split=split,
        groups=groups,
        current=first,
        limits=mo.Limits(max_moves=again.moves.count // 2),
    )
    assert few.moves.count <= again.moves.count // 2
    problem = mo.Problem(loads=mo.Loads(load_TLE=drifted), topology=topology, split=split, groups=groups)
    assert (outside_L(problem, few.slots_LGC, few.share_LGC) == 0).all()


def weighted(seed: int, scenarios: int) -> FloatArray:
    """Loads by scenario and source node, [T, 1, 2, 8]."""
    return np.random.default_rng(seed).lognormal(3, 1, (scenarios, 1, 2, 8))


@pytest.mark.parametrize("split", ["equal", "fractional"])
@pytest.mark.parametrize("risk", ["worst", "expected"])
@pytest.mark.parametrize("seed", range(2))
def test_traffic_under_several_scenarios_is_the_least(split: str, risk: str, seed: int) -> None:
    load_TLNE = weighted(seed, 3)
    problem = mo.Problem(
        loads=mo.Loads(load_TLE=load_TLNE.sum(2), load_TLNE=load_TLNE),
        topology=mo.uniform(2, 1, slots=5),
        split=split,
        objective=mo.Objective(priorities=("balance", "traffic"), balance_tolerance=TOLERANCE, risk=risk),
    )
    held_PEG, source_NE = placements([5, 5], 8), load_TLNE[:, 0].mean(0)
    times = np.stack([time_of(split)(held_PEG, one[0].sum(0), np.ones(2)) for one in load_TLNE])
    time_P = times.max(0) if risk == "worst" else times.mean(0)
    limit = float(time_P.min()) * (1 + TOLERANCE)
    load_E = source_NE.sum(0)
    served = held_PEG / held_PEG.sum(2, keepdims=True) * load_E[:, None]
    if split == "fractional":
        served = np.where(held_PEG.all(2)[:, :, None], source_NE.T, served)
    traffic_P = np.maximum(served - source_NE.T, 0).sum((1, 2))
    if split == "fractional":
        traffic_P = traffic_P + np.maximum(served.sum(1) - limit, 0).max(1)
    best = float(traffic_P[time_P <= limit * (1 + 1e-9)].min())
    plan = solved(problem)
    assert plan.certificate.value_L[0] <= limit * (1 + 1e-6)
    assert plan.locality is not None
    assert plan.locality.traffic_L.sum() <= best * 1.001
    assert plan.locality.traffic_bound_L.sum() <= best * (1 + 1e-9)


@pytest.mark.parametrize("seed", range(2))
def test_traffic_of_experts_on_several_domains_is_the_least(seed: int) -> None:
    load_NE = np.random.default_rng(seed).lognormal(3, 1, (2, 5))
    problem = mo.Problem(
        loads=mo.Loads(load_TLE=load_NE.sum(0)[None, None], load_TLNE=load_NE[None, None]),
        topology=mo.uniform(2, 2, slots=3),
        split="equal",
        limits=mo.Limits(spread=2),
        objective=mo.Objective(priorities=("balance", "traffic"), balance_tolerance=TOLERANCE),
    )
    held_PEG = placements([3, 3, 3, 3], 5)
    held_PEG = held_PEG[(held_PEG[:, :, :2].any(2) & held_PEG[:, :, 2:].any(2)).all(1)]
    time_P = even_times(held_PEG, load_NE.sum(0), np.ones(4))
    served = held_PEG / held_PEG.sum(2, keepdims=True) * load_NE.sum(0)[:, None]
    by_node = np.stack([served[:, :, :2].sum(2), served[:, :, 2:].sum(2)], axis=2)
    traffic_P = np.maximum(by_node - load_NE.T, 0).sum((1, 2))
    best = float(traffic_P[time_P <= time_P.min() * (1 + TOLERANCE)].min())
    plan = solved(problem, time_limit=60)
    assert plan.locality is not None
    assert plan.locality.traffic_L.sum() == pytest.approx(best, rel=1e-5)


@pytest.mark.parametrize("split", ["equal", "fractional", "nearest"])
@pytest.mark.parametrize("aim", list(ORDERS))
@pytest.mark.parametrize("live", [False, True])
def test_everything_together_is_honoured(split: str, aim: str, live: bool) -> None:
    """Levels of depth three, unequal GPUs, domains, scenarios, pairs and limits on moves: valid plans."""
    rng = np.random.default_rng(len(aim))
    load_TLNE = rng.lognormal(3, 1, (2, 2, 2, 12))
    topology = mo.uniform(2, 4, slots=[5, 5, 4, 5, 5, 6, 5, 5], speed=[1, 1, 0.8, 1, 1.2, 1, 1, 1])
    topology = topology.replace(domain_G=np.array([0, 0, 1, 1, 2, 2, 3, 3]))
    topology = topology.with_levels([("gpu", 0.1), ("domain", 0.3), ("node", 1)])
    settings: dict[str, Any] = {"limits": {"spread": 2, "pinned": ((-1, 3, 2),), "forbidden": ((-1, 4, 5),)}}
    problem = mo.Problem(
        loads=mo.Loads(load_TLE=load_TLNE.sum(2), load_TLNE=load_TLNE, flow_LEE=rng.random((1, 12, 12))),
        topology=topology,
        split=split,
        groups=mo.Groups.even(12, 4, 1.0 if aim == "groups" else 0.0)
        if aim in ("groups", "traffic")
        else None,
        objective=mo.Objective(priorities=("balance", "traffic"), risk="worst", balance_tolerance=0.1),
        limits=mo.Limits(**settings["limits"]),
    )
    if live:
        current = mo.solve(
            problem.replace(groups=None, objective=mo.Objective(priorities=("balance",))), "construct"
        ).plan
        assert current is not None
        moves = 30 if aim == "traffic" else 6
        problem = problem.replace(
            current=current.placement, limits=mo.Limits(**settings["limits"], max_moves=moves)
        )
    problem = problem.replace(objective=problem.objective.replace(priorities=ORDERS[aim]))
    solved(problem, effort="quick")


@pytest.mark.parametrize("seed", range(4))
def test_groups_are_kept_in_every_scenario(seed: int) -> None:
    """Free shares follow the traffic, but not to another node; as quick as any plan, by enumeration."""
    load_TE = np.random.default_rng(seed).lognormal(3, 1, (2, 6))
    group_E = np.arange(6) // 2
    plan = mo.plan(
        mo.Loads(load_TLE=load_TE[:, None]),
        mo.uniform(2, 2, slots=3),
        groups=mo.Groups(group_E=group_E),
        objective=mo.Objective(risk="worst", balance_tolerance=0.0),
    )
    assert plan.scenario_share_TLGC is not None
    for share_GC in plan.scenario_share_TLGC[:, 0]:
        homes = {(int(group_E[plan.slots_LGC[0, g, c]]), g // 2) for g, c in np.argwhere(share_GC > 0)}
        assert len(homes) == 3
    best = np.inf
    for way in itertools.product((0, 1), repeat=3):
        inside = [np.flatnonzero(np.array(way)[group_E] == node) for node in (0, 1)]
        nodes = [(one, placements([3, 3], len(one))) for one in inside if len(one)]
        if all(len(held_PEG) for _, held_PEG in nodes):
            times = [[set_times(h, load_E[one], np.ones(2)) for load_E in load_TE] for one, h in nodes]
            best = min(best, max(float(np.max(time_TP, axis=0).min()) for time_TP in times))
    assert plan.certificate.value_L[0] == pytest.approx(best, rel=1e-6)
    assert plan.certificate.lower_bound_L[0] <= best * (1 + 1e-9)


def test_scenario_shares_outside_their_group_are_told() -> None:
    """The verifier looks at the shares of every scenario, not only at those of the expected loads."""
    problem = mo.Problem(
        loads=mo.Loads(load_TLE=[[[4.0, 1.0]], [[1.0, 4.0]]]),
        topology=mo.uniform(2, 1, slots=2),
        groups=mo.Groups(group_E=np.array([0, 1])),
    )
    free = mo.solve(problem.replace(groups=None)).plan
    assert free is not None
    at_home_LGC = np.array(
        [[[1.0 if e == g else 0.0 for e in row] for g, row in enumerate(free.slots_LGC[0])]]
    )
    assert any("outside their group's node" in one for one in mo.violations(problem, free))
    assert any(
        "outside their group's node" in one
        for one in mo.violations(problem, free.replace(share_LGC=at_home_LGC))
    )


@pytest.mark.parametrize("split", ["equal", "fractional"])
def test_full_slots_that_groups_at_home_cannot_fill_are_refused(split: str) -> None:
    loads = mo.Loads(load_TLE=np.random.default_rng(1).lognormal(3, 1, (2, 1, 6)))
    with pytest.raises(mo.InfeasibleError, match=r"fill: GPU \d has more slots in layer 0"):
        mo.plan(loads, mo.uniform(2, 2, slots=4), split=split, groups=mo.Groups.even(6, 3), fill="distinct")


def test_a_front_of_groups_has_no_point_that_another_beats() -> None:
    """Tokens outside that come of rounding are none."""
    loads = mo.Loads(load_TLE=(np.random.default_rng(0).lognormal(0, 1, (1, 2, 8)) * 100).round())
    problem = mo.Problem(loads=loads, topology=mo.uniform(2, 2, slots=3), groups=mo.Groups.even(8, 2))
    values = np.array(mo.pareto(problem, ("balance", "groups")).values)
    assert values[0, 1] == 0
    assert (np.diff(values[:, 1]) > 1e-6).all()


def test_moves_that_are_no_priority_give_up_no_balance() -> None:
    """With moves limited and not wanted few, the tolerance is nearness's own, and counted once."""
    live_LGC = [
        [[-1, -1, -1], [0, 2, 1], [2, 0, -1], [1, -1, -1]],
        [[0, -1, -1], [2, 0, -1], [1, -1, -1], [1, -1, -1]],
    ]
    problem = mo.Problem(
        loads=mo.Loads(load_TLE=[[[4.1, 3.6, 2.9], [6.5, 7.2, 10.0]]]),
        topology=mo.uniform(2, 2, slots=[1, 3, 2, 3]),
        current=mo.Placement(slots_LGC=live_LGC, experts=3),
        limits=mo.Limits(max_moves=2, max_layer_replicas=4, spread=2, spread_experts=((0, 1),)),
        objective=mo.Objective(priorities=("balance",), balance_tolerance=0.5),
    )
    best_L = np.array([4.1, 7.2])  # the heaviest that is whole, by a move in the second layer
    alone = mo.solve(problem).plan
    near = problem.objective.replace(priorities=("balance", "traffic"))
    both = mo.solve(problem.replace(objective=near)).plan
    assert alone is not None
    assert both is not None
    assert alone.certificate.value_L == pytest.approx(best_L)
    assert (both.certificate.value_L <= best_L * 1.5 * (1 + 1e-6)).all()


@pytest.mark.parametrize("split", ["equal", "fractional"])
def test_kept_groups_move_no_more_than_the_tolerance_asks(split: str) -> None:
    """Nodes that are not the slowest stay as they are: one move less is late."""
    rng = np.random.default_rng(5)
    loads = [rng.lognormal(3, 1, (1, 64)) for _ in range(2)]
    problem = mo.Problem(
        loads=mo.Loads(load_TLE=loads[0]),
        topology=mo.uniform(4, 4, slots=5),
        split=split,
        groups=mo.Groups.even(64, 8),
        objective=mo.Objective(priorities=("balance",)),
    )
    then = problem.replace(loads=mo.Loads(load_TLE=loads[1]))
    best = float(solved(then).certificate.value_L[0])
    wish = mo.Objective(priorities=("balance", "moves"), balance_tolerance=TOLERANCE)
    then = then.replace(current=solved(problem).placement, objective=wish)
    plan = solved(then)
    assert plan.certificate.value_L[0] <= best * (1 + TOLERANCE) * (1 + 1e-6)
    fewer = solved(then.replace(limits=mo.Limits(max_moves=plan.moves.count - 1)))
    assert fewer.certificate.value_L[0] > best * (1 + TOLERANCE)


@pytest.mark.parametrize("moving", [False, True])
def test_an_expert_pinned_outside_its_groups_home_serves_nothing_there(moving: bool) -> None:
    rng = np.random.default_rng(3)
    order = ("balance", "moves", "traffic") if moving else ("balance", "traffic")
    by_node = rng.lognormal(3, 0.5, (2, 1, 2, 16))
    loads = [mo.Loads(load_TLE=one.sum(1)[None], load_TLNE=one[None]) for one in by_node]
    # Groups of four, two on a node; experts of one group pinned to both, so that one of them is outside.
    problem = mo.Problem(
        loads=loads[0],
        topology=mo.uniform(2, 4, slots=3),
        groups=mo.Groups.even(16, 4),
        objective=mo.Objective(priorities=order, balance_tolerance=TOLERANCE),
        limits=mo.Limits(pinned=((0, 0, 0), (0, 1, 5), (0, 1, 6))),
    )
    free = solved(problem.replace(limits=mo.Limits()))
    plan = solved(problem)
    if moving:
        problem = problem.replace(loads=loads[1], current=plan.placement)
        free, plan = (
            solved(problem.replace(limits=limits))
            for limits in (mo.Limits(), mo.Limits(pinned=((0, 2, 7), *problem.limits.pinned)))
        )
    assert plan.certificate.value_L[0] <= free.certificate.value_L[0] * (1 + TOLERANCE)
    assert outside_L(problem, plan.slots_LGC, plan.share_LGC).sum() <= 1e-6 * problem.load_LE.sum()
    for gpu, expert in ((0, 0), (5, 1), (6, 1)):
        assert expert in plan.slots_LGC[0, gpu]
    with pytest.raises(mo.InfeasibleError, match="groups"):  # every replica serves
        solved(problem.replace(split="equal"))


@pytest.mark.parametrize("split", ["fractional", "equal", "nearest"])
@pytest.mark.parametrize("which", [1, ((-1, 0),)])
@pytest.mark.parametrize("live", [False, True])
def test_only_the_experts_named_in_a_kept_group_are_spread(split: str, which: Any, live: bool) -> None:
    """A node of three slots holds a group of two of which one is to be on both GPUs."""
    topology = mo.uniform(2, 2, slots=2).replace(slots_G=np.array([2, 1, 2, 1]), domain_G=np.arange(4))
    current = mo.Placement(slots_LGC=np.array([[[0, 1], [0, -1], [2, 3], [-1, -1]]]), experts=4)
    plan = mo.plan(
        [[5.0, 3.0, 2.0, 1.0]],
        topology,
        split=split,
        groups=mo.Groups.even(4, 2),
        limits=mo.Limits(spread=2, spread_experts=which, max_moves=0 if live else None),
        current=current if live else None,
    )
    assert {0, 1} <= set(np.argwhere(plan.slots_LGC[0] == 0)[:, 0].tolist())


def test_a_node_that_has_no_room_for_its_group_stops_no_other() -> None:
    """Expert 1 goes from GPU 1 and keeps its replica on node 1, with expert 0: nothing has to move."""
    current = mo.Placement(slots_LGC=np.array([[[-1], [1], [1], [0]], [[0], [0], [0], [1]]]), experts=2)
    plan = mo.plan(
        [[1.4, 0.9], [3.7, 0.9]],
        mo.uniform(2, 2, slots=1),
        groups=mo.Groups.even(2, 2),
        limits=mo.Limits(max_layer_moves=0, forbidden=((-1, 0, 1), (-1, 1, 1))),
        current=current,
    )
    assert plan.moves.count == 0


def test_slots_to_fill_beyond_a_group_are_refused_by_name_whatever_is_live() -> None:
    """Rungs of a re-plan that any time is good enough for count in 64 bits."""
    current = mo.Placement(slots_LGC=np.array([[[0, -1], [-1, -1], [1, 0], [1, -1]]]), experts=2)
    with pytest.raises(mo.InfeasibleError, match="fill: GPU 0 has more slots"):
        mo.plan(
            [[1.2, 54.0]],
            mo.uniform(2, 2, slots=2),
            split="nearest",
            fill="distinct",
            groups=mo.Groups.even(2, 2),
            current=current,
        )


def test_the_loosest_rung_of_a_lopsided_node_stays_within_64_bits() -> None:
    """A node's own load is a tenth of what its bound by another scenario is."""
    current = mo.Placement(
        slots_LGC=np.array(
            [[[3, 1], [2, 0], [2, -1], [2, 0]], [[-1, -1], [1, -1], [2, 1], [0, 3]]], dtype=np.int32
        ),
        experts=4,
    )
    problem = mo.Problem(
        loads=mo.Loads(
            load_TLE=np.array([[[1, 0, 2, 2], [3, 2, 3, 0]], [[1, 1, 0, 2], [0, 0, 1, 1]]], dtype=np.float64),
            weight_T=np.array([0.00888921, 0.99111079]),
        ),
        topology=mo.uniform(2, 2, slots=2),
        groups=mo.Groups.even(4, 2),
        objective=mo.Objective(risk="sigma"),
        limits=mo.Limits(max_moves=2),
        current=current,
    )
    assert solved(problem).moves.count <= 2
