"""Plans for tokens that go to the nearest replica: beside all placements of small layers; the two twins."""

from __future__ import annotations

import itertools
from functools import cache
from typing import Any

import numpy as np
import pytest

import moeless_opt as mo
from moeless_opt.api import judge
from moeless_opt.problems.spec.nearest import nearest_shares
from moeless_opt.problems.spec.placement import Placement
from moeless_opt.solvers.core.stopping import FirstOf, MaxTime, NeverStop
from moeless_opt.solvers.limits.rules import Rules
from moeless_opt.solvers.nearest.search import NearestTask, nearest_times, search_nearest
from moeless_opt.solvers.pack import fast
from tests.strategies import After, random_slots

NODE_G = np.array([0, 0, 1, 1])


@cache
def placements(experts: int, slots: int) -> np.ndarray:
    """All placements of a layer on four GPUs, [K, G, C], each expert somewhere."""
    rows = [
        [*some, *[-1] * (slots - size)]
        for size in range(slots + 1)
        for some in itertools.combinations(range(experts), size)
    ]
    index = np.array(list(itertools.product(range(len(rows)), repeat=4)))
    held = np.array([[e in row for e in range(experts)] for row in rows])
    whole = held[index].any(1).all(1)
    return np.array(rows, dtype=np.int32)[index[whole]]


def small(seed: int) -> tuple[mo.Problem, np.ndarray, np.ndarray]:
    """A small problem, all its placements, and their times by the rule."""
    rng = np.random.default_rng(seed)
    experts, slots = ((3, 2), (4, 2), (5, 2), (4, 3))[seed % 4]
    load_E = np.floor(rng.lognormal(4, 0.8, experts)) + 1
    speed = [1.0, 1.0, 1.0, 1.0] if seed % 3 else [1.0, 0.5, 1.0, 1.5]
    by_node = None
    if seed % 2:
        first_E = load_E * rng.uniform(0, 1, experts)
        by_node = np.stack([first_E, load_E - first_E])[None, None]
        load_E = by_node.sum(2)[0, 0]
    problem = mo.Problem(
        loads=mo.Loads(load_TLE=load_E[None, None], load_TLNE=by_node),
        topology=mo.uniform(2, 2, slots=slots, speed=speed),
        split="nearest",
    )
    every = placements(experts, slots)
    part = np.broadcast_to(problem.source_parts(), (1, 2, experts))
    share = nearest_shares(every, experts, NODE_G, np.repeat(part, len(every), axis=0))
    served = share * np.where(every >= 0, load_E[every], 0.0)
    return problem, every, (served.sum(2) / np.array(speed)).max(1)


@pytest.mark.parametrize("seed", range(12))
def test_a_small_layer_is_the_best_of_all_placements_or_near(seed: int) -> None:
    problem, _, time_K = small(seed)
    for effort, room in (("normal", 1.02), ("thorough", 1.02)):
        plan = mo.solve(problem, "construct", effort=effort).plan
        assert plan is not None
        value = float(plan.certificate.value_L[0])
        assert time_K.min() * (1 - 1e-9) <= value <= time_K.min() * room
        assert plan.certificate.lower_bound_L[0] <= time_K.min() * (1 + 1e-9)


def moved(every: np.ndarray, live_GC: np.ndarray) -> np.ndarray:
    """Replicas of each placement that are not live."""
    new_KGC = (every >= 0) & ~(every[:, :, :, None] == live_GC[None, :, None, :]).any(3)
    return np.asarray(new_KGC.sum((1, 2)))


@pytest.mark.parametrize("seed", range(12))
def test_a_small_replan_moves_the_fewest_that_reach_its_time_or_one_more(seed: int) -> None:
    problem, every, time_K = small(seed)
    rng = np.random.default_rng(seed)
    live = every[rng.integers(len(every))]
    current = Placement(slots_LGC=live[None], experts=problem.experts)
    moves_K = moved(every, live)
    wish = mo.Objective(balance_tolerance=0.1)
    result = mo.solve(problem.replace(current=current, objective=wish), "auto")
    assert result.plan is not None
    value, moves = float(result.plan.certificate.value_L[0]), result.plan.moves.count
    reached = max(value, float(result.plan.certificate.lower_bound_L[0]) * 1.1) * (1 + 1e-9)
    assert moves <= moves_K[time_K <= reached].min() + 1
    for budget in range(3):
        limits = mo.Limits(max_moves=budget)
        within = mo.solve(problem.replace(current=current, objective=wish, limits=limits), "auto").plan
        assert within is not None
        assert within.moves.count <= budget
        best = time_K[moves_K <= budget].min()
        assert float(within.certificate.value_L[0]) <= max(best, reached) * 1.25


# --- the two twins -----------------------------------------------------------------------------------------


def drawn(seed: int) -> NearestTask:
    """Any small task: uneven nodes, slots and speeds, limits, something live."""
    rng = np.random.default_rng(seed)
    layers, experts, gpus = 2, int(rng.integers(1, 9)), int(rng.integers(1, 7))
    nodes = int(rng.integers(1, min(gpus, 3) + 1))
    node_G = np.sort(np.concatenate([np.arange(nodes), rng.integers(0, nodes, gpus - nodes)]))
    capacity_LG = rng.integers(-(-experts // gpus), -(-experts // gpus) + 3, (layers, gpus))
    start = random_slots(rng, capacity_LG, experts)
    part = rng.dirichlet(np.ones(nodes), (layers, experts)).transpose(0, 2, 1)
    rules = None
    if seed % 3 == 0:
        held_LEG = np.array([[(row == e).any(1) for e in range(experts)] for row in start])
        rules = [
            Rules(
                number=0,
                allowed_EG=held_EG | (rng.random((experts, gpus)) < 0.7),
                pinned_EG=held_EG & (rng.random((experts, gpus)) < 0.2),
                least_E=np.ones(experts, dtype=np.int64),
                most_E=np.maximum(held_EG.sum(1), 2),
                total=int(max(held_EG.sum(), room_G.sum() - 1)),
                capacity_G=room_G,
                domain_G=node_G,
                spread_E=np.minimum(
                    (held_EG @ np.eye(nodes)[node_G] > 0).sum(1), 1 + np.arange(len(held_EG)) % 2
                ),
            )
            for held_EG, room_G in zip(held_LEG, capacity_LG, strict=True)
        ]
    return NearestTask(
        load_LE=np.floor(rng.lognormal(4, 1, (layers, experts))) * (rng.random((layers, experts)) < 0.9),
        part_LNE=part,
        node_G=node_G,
        speed_G=rng.choice([0.5, 1.0, 1.5], gpus) if seed % 2 else np.ones(gpus),
        capacity_LG=capacity_LG,
        start_LGC=start,
        live_LGC=start if seed % 4 else None,
        rules=rules,
        full=seed % 5 == 0,
    )


@pytest.mark.parametrize("seed", range(30))
def test_what_is_found_keeps_the_rules_and_is_no_slower(seed: int) -> None:
    task = drawn(seed)
    goal_L = task.mean_L * 1.02
    found = search_nearest(task, goal_L, tries=1, rounds=4, seed=seed, backend="numpy")
    begun_L, time_L = nearest_times(task, task.start_LGC), nearest_times(task, found.slots_LGC)
    assert time_L == pytest.approx(found.time_L, rel=1e-9)
    assert (time_L <= np.maximum(begun_L, goal_L) * (1 + 1e-9)).all()
    experts = task.load_LE.shape[1]
    placement = Placement(slots_LGC=found.slots_LGC, experts=experts)
    assert (placement.used_LG <= task.capacity_LG).all()
    if task.full:
        assert (placement.used_LG >= (task.start_LGC >= 0).sum(2)).all()
    if task.rules is not None:
        held_LEG = placement.held_LGE.transpose(0, 2, 1)
        assert all(rule.keeps(held_EG) for rule, held_EG in zip(task.rules, held_LEG, strict=True))


@pytest.mark.skipif(not fast.available(), reason="needs Numba")
def test_both_twins_find_the_same() -> None:
    for seed in range(40):
        task = drawn(seed)
        goal_L = task.mean_L * (1.0 + 0.05 * (seed % 3))
        plain, compiled = (
            search_nearest(task, goal_L, tries=2, rounds=5, seed=seed, backend=name)
            for name in ("numpy", "numba")
        )
        assert (plain.slots_LGC == compiled.slots_LGC).all()
        assert (plain.time_L == compiled.time_L).all()
        assert (plain.moves_L == compiled.moves_L).all()


def test_a_search_that_is_stopped_keeps_what_it_has() -> None:
    task = drawn(7)
    for asks in range(12):
        found = search_nearest(task, task.mean_L, rounds=3, backend="numpy", stop=After(asks))
        assert (
            nearest_times(task, found.slots_LGC) <= nearest_times(task, task.start_LGC) * (1 + 1e-9)
        ).all()
    assert search_nearest(task, task.mean_L, backend="numpy", stop=After(0)).cut_L.all()
    assert FirstOf(NeverStop(), MaxTime(1.0)).remaining <= 1.0


# --- through the face --------------------------------------------------------------------------------------


def lognormal(layers: int, experts: int, seed: int = 0) -> np.ndarray:
    return np.floor(np.random.default_rng(seed).lognormal(4, 0.9, (layers, experts)))


def test_a_plan_for_the_nearest_beats_an_even_one_judged_so() -> None:
    load_LE, topology = lognormal(2, 64), mo.uniform(4, 4, slots=5)
    even = mo.plan(load_LE, topology, split="equal")
    near = mo.plan(load_LE, topology, split="nearest")
    problem = mo.Problem(loads=mo.Loads(load_TLE=load_LE[None]), topology=topology, split="nearest")
    judged, same = judge(problem, even)
    assert judged.time_LG.tolist() == same.time_LG.tolist()
    assert near.imbalance_L.max() < 1.01 < judged.imbalance_L.max()


@pytest.mark.parametrize(
    "limits",
    [
        {"pinned": ((-1, 0, 0), (-1, 1, 5)), "forbidden": ((-1, 2, 0), (0, 3, 1))},
        {"spread": 2},
        {"max_replicas": 2, "max_layer_replicas": 30},
        {"max_total_replicas": 58},
        {"min_replicas": 2, "max_moves": 40},
        {"max_layer_moves": 3},
        {"max_move_seconds": 0.02},
        {"max_move_bytes": 5 * 10**6},
    ],
)
def test_limits_are_kept(limits: dict[str, Any]) -> None:
    load_LE, topology = lognormal(2, 12), mo.uniform(2, 3, slots=6)
    allowed = mo.Limits(**limits)
    common: dict[str, Any] = {"split": "nearest", "expert_bytes": 10**6}
    if not allowed.bounds_moves:
        mo.plan(load_LE, topology, limits=allowed, **common)  # the verifier sees to it
    live = mo.plan(lognormal(2, 12, seed=1), topology, **common)
    again = mo.plan(load_LE, topology, current=live, limits=allowed, **common)
    assert again.split == "nearest"


@pytest.mark.parametrize("risk", ["expected", "worst", "cvar"])
@pytest.mark.parametrize("by_node", [False, True])
def test_scenarios_are_judged_by_their_risk(risk: str, by_node: bool) -> None:
    load_TLE = np.stack([lognormal(2, 8, seed=s) for s in range(3)])
    sources = None
    if by_node:
        first = load_TLE * np.random.default_rng(5).uniform(0, 1, load_TLE.shape)
        sources = np.stack([first, load_TLE - first], axis=2)
        load_TLE = sources.sum(2)
    loads = mo.Loads(load_TLE=load_TLE, load_TLNE=sources)
    wish = mo.Objective(risk=risk)
    plan = mo.plan(loads, mo.uniform(2, 2, slots=4), split="nearest", objective=wish)
    assert (plan.scenario_share_TLGC is not None) == by_node
    live = mo.plan(loads, mo.uniform(2, 2, slots=4), split="nearest", objective=wish, current=plan)
    assert (live.certificate.value_L <= plan.certificate.value_L * 1.02).all()


@pytest.mark.parametrize("gpus", [1, 3])
def test_odd_shapes(gpus: int) -> None:
    topology = mo.uniform(1, gpus, slots=3)
    for load_LE in (np.array([[5.0]]), np.array([[0.0, 3.0]]), np.array([[1e30, 1.0], [0.0, 0.0]])):
        plan = mo.plan(load_LE, topology, split="nearest")
        again = mo.plan(load_LE, topology, split="nearest", current=plan)
        assert again.moves.count == 0


def test_a_lost_gpu_is_planned_around() -> None:
    load_LE, topology = lognormal(2, 16), mo.uniform(2, 4, slots=4)
    live = mo.plan(load_LE, topology, split="nearest")
    dead = topology.replace(slots_G=[4, 4, 4, 0, 4, 4, 4, 4])
    again = mo.plan(load_LE, dead, split="nearest", current=live, repair=True)
    assert not again.time_LG[:, 3].any()
    assert again.imbalance_L.max() < 1.2


@pytest.mark.parametrize("fill", ["distinct", "copies"])
def test_every_slot_is_filled_where_that_is_wanted(fill: str) -> None:
    load_LE, topology = lognormal(2, 20), mo.uniform(2, 4, slots=4)
    plan = mo.plan(load_LE, topology, split="nearest", fill=fill)
    assert (plan.slots_LGC >= 0).all()
    again = mo.plan(load_LE[:, ::-1].copy(), topology, split="nearest", fill=fill, current=plan)
    assert (again.slots_LGC >= 0).all()
    free = mo.plan(load_LE, topology, split="nearest")
    assert (plan.certificate.value_L <= free.certificate.value_L * 1.05).all()
