"""Bounds under limits: each argument by hand, and all of them below the optimum of every small problem."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import moeless_opt as mo
from moeless_opt.problems.plan import limit_bound, replica_limits
from moeless_opt.solvers.core import lower_bound
from tests.oracles.limited import draw, least_by_layer


def bound(
    load: list[float], slots: list[int], split: str = "fractional", speed: Any = None, **limits: Any
) -> float:
    """The bound of one layer from pins and bans alone."""
    problem = mo.Problem(
        loads=mo.Loads(load_TLE=np.array([[load]])),
        topology=mo.uniform(1, len(slots), slots=slots, **({} if speed is None else {"speed": speed})),
        split=split,
        limits=mo.Limits(**limits),
    )
    return float(limit_bound(problem, problem.load_LE, replica_limits(problem), split)[0])


def test_confined_experts_load_their_gpus() -> None:
    bans = ((0, 0, 2), (0, 1, 2), (0, 0, 3), (0, 1, 3))
    assert bound([6, 4, 1, 1], [2] * 4, forbidden=bans) == pytest.approx(5)
    # Neither pair of GPUs is full by itself: together they are.
    mixed = (*((0, 0, g) for g in (2, 3)), *((0, 1, g) for g in (0, 3)), (0, 2, 3))
    assert bound([4, 4, 4, 0], [2] * 4, forbidden=mixed) == pytest.approx(4)
    assert bound([6, 4, 1, 1], [2] * 4, speed=[1, 3, 1, 1], forbidden=bans) == pytest.approx(10 / 4)


def test_a_gpu_full_of_pins_serves_no_more_than_they_are() -> None:
    # GPU 0 holds 1 + 1 tokens at most, the others share the other 12.
    assert bound([1, 1, 6, 6], [2, 3, 3], pinned=((0, 0, 0), (0, 1, 0))) == pytest.approx(6)
    # One slot is left beside the pin, and expert 2 is banned from it.
    assert bound([1, 1, 6, 6], [2, 3, 3], pinned=((0, 0, 0),), forbidden=((0, 2, 0), (0, 3, 0))) == 6
    assert bound([1, 1, 6, 6], [2, 3, 3], pinned=((0, 0, 0),)) == pytest.approx(14 / 3)


def test_an_expert_ends_no_sooner_than_on_the_gpus_it_may_be_on() -> None:
    bans = ((0, 0, 0), (0, 0, 1))
    assert bound([12, 1, 1], [3] * 4, "equal", forbidden=bans) == pytest.approx(6)
    assert bound([12, 1, 1], [3] * 4, "equal", [1, 1, 2, 0.5], forbidden=bans) == pytest.approx(6)
    assert bound([12, 1, 1], [3] * 4, "fractional", [1, 1, 2, 0.5], forbidden=bans) == pytest.approx(4.8)
    capped = {"max_replicas": 1, "forbidden": bans}
    assert bound([12, 1, 1], [3] * 4, "fractional", [1, 1, 2, 0.5], **capped) == pytest.approx(6)
    # Two replicas must be: even shares are as late as the slower one.
    both = {"min_replicas": 2, "forbidden": bans}
    assert bound([12, 1, 1], [3] * 4, "equal", [1, 1, 2, 0.5], **both) == pytest.approx(12)


def test_loads_of_any_size_are_bounded() -> None:
    free = mo.Problem(
        loads=mo.Loads(load_TLE=[[2e25, 1e25]]),
        topology=mo.uniform(1, 3, slots=2),
        split="equal",
        limits=mo.Limits(forbidden=[(0, 0, 2)]),
    )
    with np.errstate(all="raise"):
        assert limit_bound(free, free.load_LE, replica_limits(free), "equal") == pytest.approx(1e25)


def test_even_shares_of_pins_are_served_where_they_are() -> None:
    pins = tuple((0, e, 0) for e in range(3))
    assert bound([4, 4, 4, 0], [3] * 3, "equal", max_replicas=2, pinned=pins) == pytest.approx(6)
    assert bound([4, 4, 4, 0], [3] * 3, "fractional", max_replicas=2, pinned=pins) == pytest.approx(4)
    # One spare slot: one of them may have two replicas, each by itself.
    assert bound([4, 4, 4, 0], [3] * 3, "equal", max_layer_replicas=5, pinned=pins) == pytest.approx(6)


def test_what_the_other_layers_need_is_not_there() -> None:
    problem = mo.Problem(
        loads=mo.Loads(load_TLE=np.ones((1, 2, 3))),
        topology=mo.uniform(1, 3, slots=3),
        expert_bytes_L=[10, 20],
        limits=mo.Limits(max_total_replicas=8),
    )
    assert replica_limits(problem).room_L.tolist() == [5, 5]
    assert replica_limits(problem).most_LE.max() == 3
    tight = problem.replace(limits=mo.Limits(max_total_bytes=115, min_replicas=1))
    assert replica_limits(tight).room_L.tolist() == [5, 4]
    assert replica_limits(tight).most_LE.tolist() == [[3] * 3, [2] * 3]
    wide = problem.replace(
        topology=mo.uniform(3, 1, slots=3), limits=mo.Limits(spread=2, pinned=((0, 0, 1),))
    )
    assert replica_limits(wide).least_LE.tolist() == [[2] * 3, [2] * 3]


@pytest.mark.parametrize("block", range(4))
def test_no_bound_is_above_the_optimum(block: int) -> None:
    tight = looked = 0
    for case in range(100):
        problem = draw(np.random.default_rng((11, block, case)))
        best_L = least_by_layer(problem)
        if best_L is None or problem.loads.shape[0] > 1:
            continue
        bound_L, names = lower_bound(problem)
        assert (bound_L <= best_L * (1 + 1e-9)).all(), (case, names)
        looked += 1
        tight += bool((bound_L >= best_L * (1 - 1e-6)).all())
    assert looked > 30
    assert tight > 0.4 * looked
