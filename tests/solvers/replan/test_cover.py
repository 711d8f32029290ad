"""Coverage after a loss: by the fewest moves, within limits, and refused only where it cannot be."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import moeless_opt as mo
from moeless_opt.problems.errors import InfeasibleError
from moeless_opt.problems.spec import Placement
from moeless_opt.solvers.replan.cover import covered
from tests.strategies import random_slots


def after_loss(rng: Any, *, spread: int = 1) -> mo.Problem | None:
    """A random problem with a live placement of which some GPUs are gone; None if the others lack room."""
    gpus, slots, layers = (int(n) for n in rng.integers((2, 1, 1), (7, 5, 4)))
    experts = int(rng.integers(1, gpus * slots + 1))
    slots_G = np.full(gpus, slots) - (rng.random(gpus) < 0.3) * (slots > 1)
    capacity_LG = np.tile(np.minimum(slots_G, experts), (layers, 1))
    if capacity_LG[0].sum() < experts:
        return None
    live = random_slots(rng, capacity_LG, experts)
    gone = rng.permutation(gpus)[: int(rng.integers(1, gpus))]
    slots_G[gone] = 0
    live[:, gone] = -1
    if np.minimum(slots_G, experts).sum() < experts * spread:
        return None
    load = rng.integers(0, 50, (layers, experts)).astype(float) * (rng.random() < 0.9)
    return mo.Problem(
        loads=mo.Loads(load_TLE=load),
        topology=mo.Topology(
            node_G=np.arange(gpus) // 2, speed_G=rng.choice([1.0, 0.5], gpus), slots_G=slots_G
        ),
        split=str(rng.choice(["equal", "fractional"])),
        current=Placement(slots_LGC=live, experts=experts, partial=True),
        limits=mo.Limits(spread=spread),
    )


def test_every_expert_comes_back_by_as_many_moves_as_there_are_missing() -> None:
    rng = np.random.default_rng(0)
    drawn = [problem for _ in range(250) if (problem := after_loss(rng)) is not None]
    assert len(drawn) > 100
    for problem in drawn:
        assert problem.current is not None
        plan = mo.solve(problem, "cover").plan
        assert plan is not None
        missing = int((problem.current.replicas_LE == 0).sum())
        assert plan.moves.count == missing
        few = problem.replace(limits=mo.Limits(max_moves=missing))
        again = mo.solve(few, "cover").plan
        assert again is not None
        assert again.moves.count == missing
        if missing:
            with pytest.raises(InfeasibleError, match=rf"max_moves: is {missing - 1}; {missing} are needed"):
                mo.solve(problem.replace(limits=mo.Limits(max_moves=missing - 1)), "cover")


def test_the_busy_count_is_kept_up() -> None:
    """The heaviest goes to the GPU with least to do, which changes with what was dropped."""
    live = np.array([[[0, 1], [0, 2], [-1, -1]]], dtype=np.int32)
    load = np.array([[8.0, 1.0, 3.0, 6.0, 5.0]])
    found = covered(load, live, np.array([[2, 2, 2]]), np.ones(3))
    assert [sorted(row) for row in found[0].tolist()] == [[0, 1], [0, 2], [3, 4]]
    # GPU 2 gone: 3 takes the slot of 0 on GPU 0 (least busy), and 0 is all on GPU 1 from then on.
    load = np.array([[8.0, 1.0, 3.0, 6.0]])
    found = covered(load, live, np.array([[2, 2, 0]]), np.ones(3))
    assert [sorted(row) for row in found[0, :2].tolist()] == [[1, 3], [0, 2]]


def test_domains_are_reached_again_where_that_is_possible() -> None:
    rng = np.random.default_rng(1)
    reached = 0
    for _ in range(200):
        problem = after_loss(rng, spread=2)
        if problem is None:
            continue
        try:
            plan = mo.solve(problem, "cover").plan
        except InfeasibleError:
            with pytest.raises(InfeasibleError):  # by any other method as well
                mo.solve(problem, "constrained")
            continue
        assert plan is not None
        reached += 1
        assert problem.current is not None
        held = [[set() for _ in range(problem.experts)] for _ in range(problem.layers)]
        for x, g, c in zip(*np.nonzero(problem.current.slots_LGC >= 0), strict=True):
            held[x][problem.current.slots_LGC[x, g, c]].add(int(problem.topology.node_G[g]))
        lacking = sum(max(2 - len(nodes), 0) for row in held for nodes in row)
        assert plan.moves.count >= lacking  # the verifier saw to the rest
    assert reached > 10


def test_full_slots_stay_full() -> None:
    live = mo.plan([[5, 4, 3, 2, 1, 1]], mo.uniform(2, 2, slots=3), fill="distinct", split="equal")
    found = mo.repair(live, [1])
    assert (found.coverage.slots_LGC[0, [0, 2, 3]] >= 0).all()
    assert (found.plan.slots_LGC[0, [0, 2, 3]] >= 0).all()


@pytest.mark.parametrize("solver", ["cover", "replan"])
@pytest.mark.parametrize(
    "limits", [{"max_moves": 1}, {"max_move_bytes": 10**9}, {"max_move_seconds": 1e-9}], ids=str
)
def test_a_limit_that_forbids_coverage_is_named(solver: str, limits: dict[str, Any]) -> None:
    live = Placement(slots_LGC=[[[0, 1], [-1, -1], [-1, -1]]], experts=4, partial=True)
    with pytest.raises(InfeasibleError, match=next(iter(limits))):
        mo.plan(
            [[5.0, 4, 3, 2]],
            mo.uniform(1, 3, slots=2),
            expert_bytes=10**9,
            current=live,
            limits=mo.Limits(**limits),
            solver=solver,
            repair=True,
        )
