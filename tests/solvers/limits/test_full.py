"""Every slot full within limits, beside all full placements that there are."""

from __future__ import annotations

import numpy as np
import pytest

import moeless_opt as mo
from moeless_opt.api import make_problem
from moeless_opt.problems.arrays import BoolArray, FloatArray, IntArray
from moeless_opt.solvers.core.features import Feature, required_features
from moeless_opt.solvers.limits import counts_of, full_counts_within, rules_of
from tests.oracles.enumeration import even_slot_times, full_counts, set_times, wanted_domains
from tests.oracles.limited import draw

CASES = 60
NEAR = 1e-6


def limited_and_full(rng: np.random.Generator) -> mo.Problem:
    """A small problem of one layer and one scenario that wants full slots and limits more than moves."""
    while True:
        problem = draw(rng)
        slots_G = problem.topology.slots_G
        assert slots_G is not None
        if problem.layers > 1 or problem.loads.shape[0] > 1 or slots_G.sum() > 8:
            continue
        limits = problem.limits.replace(
            max_layer_replicas=None, max_total_replicas=None, max_total_bytes=None
        )
        try:
            problem = problem.replace(
                limits=limits, fill="copies" if rng.random() < 0.5 else "distinct", known=None
            )
        except mo.ProblemError:
            continue
        if Feature.FILL_LIMITS in required_features(problem):
            return problem


def all_within(problem: mo.Problem) -> tuple[np.ndarray, np.ndarray]:
    """Times of all full placements within the limits, and replicas that they move, shape [P] each."""
    limits = problem.limits
    capacity_G, domain_G = problem.capacity_LG[0].tolist(), problem.topology.failure_domain_G
    count_PEG = full_counts(capacity_G, problem.experts, copies=problem.fill == "copies")
    held_PEG: BoolArray = count_PEG > 0
    total_PE = count_PEG.sum(2)
    keeps_P = (total_PE >= limits.min_replicas).all(1)
    if limits.max_replicas is not None:
        keeps_P &= (total_PE <= limits.max_replicas).all(1)
    for _, expert, gpu in limits.pinned:
        keeps_P &= held_PEG[:, expert, gpu]
    for _, expert, gpu in limits.forbidden:
        keeps_P &= ~held_PEG[:, expert, gpu]
    reach_PE = sum(held_PEG[:, :, domain_G == one].any(2).astype(int) for one in np.unique(domain_G))
    keeps_P &= (np.asarray(reach_PE) >= wanted_domains(problem)[0]).all(1)
    live_EG = np.zeros(held_PEG.shape[1:], dtype=bool)
    if problem.current is not None:
        live_EG = problem.current.held_LGE[0].T
    moves_P = (held_PEG & ~live_EG).sum((1, 2))
    for most in (limits.max_moves, limits.max_layer_moves) if problem.current is not None else ():
        if most is not None:
            keeps_P &= moves_P <= most
    count_PEG = count_PEG[keeps_P]
    if not len(count_PEG):
        return np.zeros(0), np.zeros(0)
    return times(problem, count_PEG), moves_P[keeps_P]


def times(problem: mo.Problem, count_PEG: IntArray) -> FloatArray:
    """Largest GPU times, shape [P]."""
    load_E, speed_G = problem.load_LE[0], problem.topology.speed_G
    if problem.split == "equal":
        return even_slot_times(count_PEG, load_E, speed_G)
    return set_times(count_PEG > 0, load_E, speed_G)


@pytest.fixture(scope="module")
def excess() -> list[float]:
    """What plans take beyond what is wanted; raises where one is refused wrongly, or breaks a limit."""
    found = []
    for case in (*range(CASES), 210, 273):  # the last ones: filling takes what may move
        problem = limited_and_full(np.random.default_rng((11, case)))
        time_P, _ = all_within(problem)
        try:
            plan = mo.solve(problem).plan
        except mo.InfeasibleError:
            assert not len(time_P), case
            continue
        assert plan is not None, case
        assert mo.violations(problem, plan) == [], case
        assert len(time_P), case
        count_EG = counts_of(plan.slots_LGC[0], problem.experts)
        assert (count_EG.sum(0) == problem.capacity_LG[0]).all(), case
        time = float(times(problem, count_EG[None])[0])
        tolerance = problem.objective.balance_tolerance if problem.current is not None else 0.0
        found.append(max(time / (time_P.min() * (1 + tolerance)) - 1, 0.0))
        proof = plan.certificate
        assert proof.lower_bound_L[0] * time <= proof.value_L[0] * time_P.min() * (1 + NEAR), case
    return found


def test_full_plans_keep_limits_and_few_are_above_the_least(excess: list[float]) -> None:
    assert len(excess) > CASES // 3
    assert sum(one > NEAR for one in excess) <= 0.02 * len(excess)


@pytest.mark.parametrize("split", ["equal", "fractional", "nearest"])
@pytest.mark.parametrize("fill", ["distinct", "copies"])
@pytest.mark.parametrize("live", [False, True])
def test_larger_plans_are_full_and_keep_limits(split: str, fill: str, live: bool) -> None:
    rng = np.random.default_rng(5)
    load_LE = rng.lognormal(3, 1, (1, 12))
    topology = mo.uniform(2, 2, slots=8).replace(domain_G=[0, 0, 1, 1])
    limits = mo.Limits(
        max_replicas=4, spread=2, forbidden=((-1, 0, 0), (-1, 1, 0), (0, 2, 3)), pinned=((-1, 3, 3),)
    )
    problem = make_problem(load_LE, topology, split=split, fill=fill, limits=limits)
    if live:
        before = mo.plan(load_LE[:, ::-1].copy(), topology, split=split, fill=fill)
        problem = make_problem(load_LE, topology, split=split, fill=fill, limits=limits, current=before)
    plan = mo.solve(problem).plan
    assert plan is not None
    assert mo.violations(problem, plan) == []
    assert (plan.slots_LGC >= 0).all()


def test_moves_are_limited_with_full_slots() -> None:
    load_LE = np.arange(1.0, 9.0)[None] ** 2
    topology = mo.uniform(1, 4, slots=3)
    before = mo.plan(load_LE[:, ::-1].copy(), topology, split="equal", fill="distinct")
    count_E = np.bincount(before.slots_LGC.ravel(), minlength=8)
    gpu, slot = np.argwhere(count_E[before.slots_LGC[0]] > 1)[0]
    bans = ((0, int(before.slots_LGC[0, gpu, slot]), int(gpu)),)

    def problem(most: int) -> mo.Problem:
        limits = mo.Limits(forbidden=bans, max_moves=most)
        return make_problem(load_LE, topology, split="equal", fill="distinct", limits=limits, current=before)

    plan = mo.solve(problem(1)).plan
    assert plan is not None
    assert mo.violations(problem(1), plan) == []
    with pytest.raises(mo.InfeasibleError, match="max_moves"):
        mo.solve(problem(0))


def test_what_cannot_be_full_names_limit_and_layer() -> None:
    load_LE = np.ones((2, 3))
    topology = mo.uniform(1, 3, slots=2)
    bans = mo.Limits(forbidden=((1, 0, 2), (1, 1, 2)))
    with pytest.raises(mo.InfeasibleError, match=r"limits.forbidden: layer 1: not every slot"):
        mo.plan(load_LE, topology, split="equal", fill="distinct", limits=bans)
    plan = mo.plan(load_LE, topology, split="equal", fill="copies", limits=bans)
    assert plan.slots_LGC[1, 2].tolist() == [2, 2]
    with pytest.raises(mo.InfeasibleError, match=r"limits.max_total_replicas: is 11"):
        mo.plan(load_LE, topology, fill="distinct", limits=mo.Limits(max_total_replicas=11))


def test_a_flow_keeps_what_is_there() -> None:
    rules = rules_of(make_problem(np.array([[4.0, 2.0, 1.0]]), mo.uniform(1, 3, slots=2), fill="distinct"))[0]
    there_EG = np.array([[1, 1, 0], [1, 0, 0], [0, 0, 1]])
    found_EG = full_counts_within(rules, np.array([4.0, 2.0, 1.0]), there_EG, copies=False)
    assert (found_EG >= there_EG).all()
    assert found_EG.sum(0).tolist() == [2, 2, 2]
    assert found_EG[0].tolist() == [1, 1, 1]
