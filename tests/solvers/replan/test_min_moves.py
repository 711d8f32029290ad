"""The proof of the least number of moves, against enumeration."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from moeless_opt.problems.errors import ProblemError, SolverUnavailableError
from moeless_opt.solvers.construct.equal import construct_equal
from moeless_opt.solvers.core.stopping import MaxTime
from moeless_opt.solvers.replan.fractional import replan_fractional
from moeless_opt.solvers.replan.min_moves import min_moves, min_moves_bound
from moeless_opt.solvers.replan.task import ReplanTask, ReplanWish
from moeless_opt.solvers.shares.flow import solve_shares


def by_enumeration(load_E: np.ndarray, live_GC: np.ndarray, width: int, time: float) -> int | None:
    """Least moves over all placements of a tiny layer."""
    experts, gpus = len(load_E), len(live_GC)
    rows = [row for size in range(width + 1) for row in itertools.combinations(range(experts), size)]
    best: int | None = None
    for content in itertools.product(rows, repeat=gpus):
        if len(set(itertools.chain(*content))) < experts:
            continue
        moves = sum(expert not in live_GC[gpu] for gpu, row in enumerate(content) for expert in row)
        if best is not None and moves >= best:
            continue
        slots = np.array([list(row) + [-1] * (width - len(row)) for row in content])
        if solve_shares(load_E[None], slots[None], np.ones(gpus)).time_L[0] <= time * (1 + 1e-9):
            best = moves
    return best


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("engine", ["highs", "pulp"])
def test_agrees_with_enumeration(seed: int, engine: str) -> None:
    rng = np.random.default_rng(seed)
    experts, gpus, width = 4, 3, 2
    load = rng.lognormal(0, 1, experts)
    live = construct_equal(rng.lognormal(0, 1, (1, experts)), np.full((1, gpus), width), np.ones(gpus))[0]
    stay = solve_shares(load[None], live[None], np.ones(gpus)).time_L[0]
    for time in (stay * 1.001, 0.5 * (stay + load.sum() / gpus), load.sum() / gpus * 1.01):
        least = by_enumeration(load, live, width, time)
        proof = min_moves(load, live, [width] * gpus, np.ones(gpus), time, engine=engine)
        if least is None:
            assert proof.status == "infeasible"
            assert proof.moves is None
        else:
            assert (proof.status, proof.moves, proof.bound) == ("optimal", least, least)
            assert min_moves_bound([load], [live], np.ones(gpus), [time])[0] <= least


def drift(seed: int, experts: int, gpus: int, width: int, sigma: float):
    rng = np.random.default_rng(seed)
    before = rng.lognormal(0, 1, (1, experts))
    after = before * rng.lognormal(0, sigma, before.shape)
    capacity = np.full((1, gpus), width)
    return after, construct_equal(before, capacity, np.ones(gpus)), capacity


@pytest.mark.parametrize("seed", range(5))
def test_bounds_and_heuristic_enclose_the_proof(seed: int) -> None:
    after, live, capacity = drift(seed, 24, 6, 5, 0.8)
    plan = replan_fractional(ReplanTask(after, live, capacity), ReplanWish(rounds=10))
    if plan.time_L[0] > plan.target_L[0]:
        return
    known = [[int(e) for e in row if e >= 0] for row in plan.slots_LGC[0]]
    args = (after[0], live[0], capacity[0], np.ones(6), float(plan.target_L[0]))
    cold, warm = min_moves(*args), min_moves(*args, known=known)
    assert cold.status == warm.status == "optimal"
    assert plan.least_moves_L[0] <= cold.bound == cold.moves == warm.moves <= plan.moves_L[0]


def test_a_known_plan_that_meets_the_bound_needs_no_solver() -> None:
    live = np.array([[0, -1], [1, -1]])
    proof = min_moves([3.0, 1.0], live, [2, 2], np.ones(2), 2.0, known=[[0], [1, 0]], engine="pulp")
    assert (proof.status, proof.moves) == ("optimal", 1)


def test_a_lost_gpu_forces_its_experts_to_move() -> None:
    live = np.array([[0, 1], [2, -1], [3, -1]])
    proof = min_moves([1.0] * 4, live, [2, 2, 0], np.ones(3), 2.0)
    assert (proof.status, proof.moves) == ("optimal", 1)
    assert proof.content is not None
    assert proof.content[2] == []


def test_a_time_limit_is_never_called_a_proof() -> None:
    after, live, capacity = drift(3, 128, 16, 10, 1.0)
    plan = replan_fractional(ReplanTask(after, live, capacity), ReplanWish(tolerance=0.002))
    known = [[int(e) for e in row if e >= 0] for row in plan.slots_LGC[0]]
    assert plan.least_moves_L[0] < plan.moves_L[0], "the instance would be trivial"
    time = float(plan.target_L[0])
    stopped = min_moves(after[0], live[0], capacity[0], np.ones(16), time, known=known, stop=MaxTime(0.01))
    assert stopped.status == "feasible"
    assert stopped.bound < stopped.moves == plan.moves_L[0]
    nothing = min_moves(after[0], live[0], capacity[0], np.ones(16), time, stop=MaxTime(0.01))
    assert nothing.status == "no_solution"
    assert nothing.content is None


def test_few_pairs_give_a_bound_and_often_the_plan() -> None:
    equal = 0
    for seed in range(4):
        after, live, capacity = drift(seed, 24, 6, 5, 0.8)
        time = float(after.sum() / 6) * 1.01
        quick, proof = (
            min_moves(after[0], live[0], capacity[0], np.ones(6), time, steps=steps) for steps in (1, 3)
        )
        assert proof.status == "optimal"
        assert quick.bound <= proof.bound
        if quick.moves is not None:
            assert quick.moves >= proof.moves
            equal += quick.status == "optimal"
    assert equal >= 2


def test_moves_that_are_known_to_be_needed_are_believed() -> None:
    live = np.array([[0, 1], [2, -1]])
    args = ([3.0, 1.0, 1.0], live, [2, 2], np.ones(2), 3.0)
    assert min_moves(*args).moves == 1
    assert min_moves(*args, known=[[0], [2, 1]], least=1, engine="pulp").status == "optimal"
    assert min_moves([1.0, 1.0, 1.0], live, [2, 2], np.ones(2), 3.0, least=1).moves == 0, "it may stay"


def test_bad_known_plans_are_refused() -> None:
    live = np.array([[0, -1], [1, -1]])
    for known, words in (
        ([[0], [1]], "cannot keep"),
        ([[0, 1], []], "cannot keep"),
        ([[0], [0]], "no replica"),
        ([[0, 0], [1]], "distinct"),
    ):
        with pytest.raises(ProblemError, match=words):
            min_moves([3.0, 1.0], live, [2, 2], np.ones(2), 2.0, known=known)
    with pytest.raises(SolverUnavailableError, match="'abacus' is unknown"):
        min_moves([3.0, 1.0], live, [2, 2], np.ones(2), 2.0, engine="abacus")
