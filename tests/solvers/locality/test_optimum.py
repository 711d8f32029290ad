"""Small instances beside every placement that there is: traffic, groups, affinity."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import moeless_opt as mo
from moeless_opt.problems.arrays import FloatArray
from moeless_opt.solvers.locality import GroupWays
from tests.oracles.enumeration import even_times, placements, set_times

SPLITS = ("equal", "fractional")
TOLERANCE = 0.05


def drawn(seed: int, layers: int = 1, experts: int = 8) -> tuple[FloatArray, FloatArray]:
    """Loads, and the part of each expert's that comes from the first of two nodes."""
    rng = np.random.default_rng(seed)
    return rng.lognormal(3, 1, (layers, experts)), rng.random((layers, experts))


def two_nodes(load_LE: FloatArray, part_LE: FloatArray, split: str, slots: int, **more: Any) -> mo.Problem:
    by_node = np.stack([load_LE * part_LE, load_LE * (1 - part_LE)], axis=1)[None]
    priorities = more.pop("priorities", ("balance", "traffic"))
    return mo.Problem(
        loads=mo.Loads(load_TLE=by_node.sum(2), load_TLNE=by_node, flow_LEE=more.pop("flow_LEE", None)),
        topology=mo.uniform(2, 1, slots=slots),
        split=split,
        objective=mo.Objective(priorities=priorities, balance_tolerance=TOLERANCE),
        **more,
    )


def time_of(split: str) -> Any:
    return even_times if split == "equal" else set_times


def shifted(wanted_PG: FloatArray, limit: float) -> FloatArray:
    """Tokens that must go to the other of two GPUs for neither to exceed a limit, shape [P]."""
    return np.asarray(np.maximum(wanted_PG - limit, 0).max(1))


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("seed", range(3))
def test_traffic_is_the_least_of_all_placements(split: str, seed: int) -> None:
    load_LE, part_LE = drawn(seed)
    problem = two_nodes(load_LE, part_LE, split, slots=5)
    held_PEG = placements([5, 5], 8)
    load_E, source_NE = load_LE[0], np.stack([load_LE * part_LE, load_LE * (1 - part_LE)], axis=1)[0]
    time_P = time_of(split)(held_PEG, load_E, np.ones(2))
    good_P = time_P <= time_P.min() * (1 + TOLERANCE)
    share_PEG = held_PEG / held_PEG.sum(2, keepdims=True)
    served = share_PEG * load_E[:, None]
    traffic_P = np.maximum(served - source_NE.T, 0).sum((1, 2))
    if split == "fractional":  # replicated experts stay at home; what is too much there goes to the other
        both_PE = held_PEG.all(2)
        at_home = np.where(both_PE[:, :, None], source_NE.T, served)
        traffic_P = np.maximum(at_home - source_NE.T, 0).sum((1, 2))
        wanted_PG = at_home.sum(1)
        traffic_P = traffic_P + shifted(wanted_PG, float(time_P.min()) * (1 + TOLERANCE))
    result = mo.solve(problem, "locality")
    assert result.plan is not None
    assert result.plan.locality is not None
    assert result.objective["traffic"] == pytest.approx(traffic_P[good_P].min(), rel=1e-5)
    assert result.plan.locality.traffic_bound_L.sum() == pytest.approx(traffic_P[good_P].min(), rel=1e-5)
    assert result.plan.certificate.value_L[0] <= time_P.min() * (1 + TOLERANCE) * (1 + 1e-6)
    assert result.plan.certificate.lower_bound_L[0] == pytest.approx(time_P.min(), rel=1e-5)


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("seed", range(3))
def test_tokens_outside_their_groups_are_the_fewest(split: str, seed: int) -> None:
    load_LE, part_LE = drawn(seed + 10)
    groups = mo.Groups.even(8, 4, 1.0)
    problem = two_nodes(load_LE, part_LE, split, 5, groups=groups, priorities=("balance", "groups"))
    held_PEG, load_E = placements([5, 5], 8), load_LE[0]
    time_P = time_of(split)(held_PEG, load_E, np.ones(2))
    limit = float(time_P.min()) * (1 + TOLERANCE)
    best_P = np.full(len(held_PEG), np.inf)
    for home_K in np.ndindex(2, 2, 2, 2):
        home_EG = np.array(home_K)[groups.group_E][:, None] == np.arange(2)
        if split == "equal":
            served = held_PEG / held_PEG.sum(2, keepdims=True) * load_E[:, None]
            outside_P = (served * ~home_EG).sum((1, 2))
        else:
            goes = np.where((held_PEG & home_EG).any(2, keepdims=True), held_PEG & home_EG, held_PEG)
            served = goes * load_E[:, None]
            may_P = (served * held_PEG.all(2)[:, :, None]).sum(1)  # what may leave each GPU
            need_PG = np.maximum(served.sum(1) - limit, 0)
            outside_P = (served * ~home_EG).sum((1, 2)) + need_PG.sum(1)
            outside_P = np.where((need_PG <= may_P + 1e-9).all(1), outside_P, np.inf)
        best_P = np.minimum(best_P, outside_P)
    best = best_P[time_P <= limit * (1 + 1e-12)].min()
    result = mo.solve(problem, "locality")
    assert result.plan is not None
    assert result.objective["groups"] == pytest.approx(best, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("split", SPLITS)
def test_groups_kept_on_a_node_cost_as_little_as_they_can(split: str) -> None:
    load_LE, part_LE = drawn(21)
    groups = mo.Groups.even(8, 4)
    problem = two_nodes(load_LE, part_LE, split, 5, groups=groups, priorities=("balance",))
    held_PEG, load_E = placements([5, 5], 8), load_LE[0]
    whole_P = np.stack([~held_PEG[:, groups.group_E == k].any(1).all(1) for k in range(4)]).all(
        0
    )  # no group on both nodes
    plan = mo.plan(problem.loads, problem.topology, split=split, groups=groups, objective=problem.objective)
    best = float(time_of(split)(held_PEG[whole_P], load_E, np.ones(2)).min())
    assert plan.certificate.value_L[0] == pytest.approx(best, rel=1e-6)
    assert plan.certificate.lower_bound_L[0] == pytest.approx(best, rel=1e-5)
    assert mo.violations(problem, plan) == []


@pytest.mark.parametrize("seed", range(2))
def test_hops_are_the_least_of_all_pairs_of_placements(seed: int) -> None:
    load_LE, part_LE = drawn(seed + 30, layers=2, experts=4)
    flow_LEE = np.random.default_rng(seed).random((1, 4, 4)) ** 3
    problem = two_nodes(load_LE, part_LE, "equal", 3, priorities=("balance", "hops"), flow_LEE=flow_LEE)
    held_PEG = placements([3, 3], 4)
    share_PEG = held_PEG / held_PEG.sum(2, keepdims=True)
    good = []
    for load_E in load_LE:
        time_P = even_times(held_PEG, load_E, np.ones(2))
        good.append(share_PEG[time_P <= time_P.min() * (1 + TOLERANCE)])
    come = np.einsum("peg,ef->pfg", good[0], flow_LEE[0])
    serve = good[1] * flow_LEE[0].sum(0)[:, None]
    best = min(float(np.maximum(come[:, None] - one, 0).sum((2, 3)).min()) for one in serve)
    result = mo.solve(problem, "locality", time_limit=60)
    assert result.plan is not None
    assert result.objective["hops"] == pytest.approx(best, rel=1e-5, abs=1e-6)
    assert result.plan.locality is not None
    assert result.plan.locality.hops_bound_L is not None
    assert result.plan.locality.hops_bound_L.sum() == pytest.approx(best, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("first", ["moves", "traffic"])
@pytest.mark.parametrize("seed", [1, 5, 8, 12])
def test_what_is_live_is_followed_within_one_tolerance(first: str, seed: int) -> None:
    """Too large for the programme: few moves within the tolerance, and traffic within the same one."""
    rng = np.random.default_rng(seed)
    held_PEG = placements([2, 2, 2, 2], 7)
    by_node = rng.lognormal(3, 0.8, (1, 1, 2, 7))
    load_E = by_node.sum(2)[0, 0]
    live_EG = held_PEG[rng.integers(len(held_PEG))]
    slots = np.full((1, 4, 2), -1, dtype=np.int32)
    for g in range(4):
        experts = np.flatnonzero(live_EG[:, g])
        slots[0, g, : len(experts)] = experts
    order = ("balance", first, "traffic" if first == "moves" else "moves")
    problem = mo.Problem(
        loads=mo.Loads(load_TLE=by_node.sum(2), load_TLNE=by_node),
        topology=mo.uniform(2, 2, slots=2),
        split="equal",
        current=mo.Placement(slots_LGC=slots, experts=7),
        objective=mo.Objective(priorities=order, balance_tolerance=TOLERANCE),
    )
    time_P = even_times(held_PEG, load_E, np.ones(4))
    good_P = time_P <= time_P.min() * (1 + TOLERANCE)
    served = held_PEG / held_PEG.sum(2, keepdims=True) * load_E[:, None]
    by_node_PEN = np.stack([served[:, :, :2].sum(2), served[:, :, 2:].sum(2)], axis=2)
    traffic_P = np.maximum(by_node_PEN - by_node[0, 0].T, 0).sum((1, 2))
    moves_P = (held_PEG & ~live_EG).sum((1, 2))
    result = mo.solve(problem, "locality")
    assert result.plan is not None
    assert result.plan.certificate.value_L[0] <= time_P.min() * (1 + TOLERANCE) * (1 + 1e-6)
    fewest = good_P & (moves_P == moves_P[good_P].min())
    if first == "moves":
        assert result.plan.moves.count == moves_P[fewest][0]
        assert result.objective["traffic"] == pytest.approx(traffic_P[fewest].min(), rel=1e-6)
    else:
        assert result.objective["traffic"] == pytest.approx(traffic_P[good_P].min(), rel=1e-6)


def test_slots_bound_what_stays_at_home() -> None:
    """A hot expert needs replicas for which its home has no slots: never above the best placement."""
    held_PEG, group_E = placements([2, 1, 3, 2], 6), [0, 0, 0, 1, 1, 1]
    hot = np.array([13.0, 1, 1, 13, 1, 1])
    for load_E in (hot, *np.random.default_rng(0).lognormal(0, 1.2, (6, 6))):
        problem = mo.Problem(
            loads=mo.Loads(load_TLE=load_E[None]),
            topology=mo.Topology(node_G=[0, 0, 1, 1], slots_G=[2, 1, 3, 2], speed_G=[1.0] * 4),
            split="equal",
            groups=mo.Groups(group_E=group_E, max_outside=1.0),
        )
        time_P = even_times(held_PEG, load_E, np.ones(4))
        limit = 10.0 if load_E is hot else float(time_P.min()) * (1 + TOLERANCE)
        served = held_PEG / held_PEG.sum(2, keepdims=True) * load_E[:, None]
        on_first_P = served[:, :, :2].sum(2)
        first_PK = np.stack([on_first_P[:, :3].sum(1), on_first_P[:, 3:].sum(1)], axis=1)
        total_K = np.array([load_E[:3].sum(), load_E[3:].sum()])
        outside_P = np.minimum(first_PK, total_K - first_PK).sum(1)
        best = float(outside_P[time_P <= limit].min())
        ways = GroupWays(problem, 0)
        plain, tight = ways.fewest_outside(limit), ways.fewest_outside(limit, slots=True)
        assert plain <= tight <= best * (1 + 1e-9) + 1e-12
        if load_E is hot:
            assert (plain, tight, best) == (0, 1, 1)
