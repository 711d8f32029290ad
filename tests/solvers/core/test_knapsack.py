"""The multiple-choice knapsack: exact against enumeration, and within the budget in any case."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeless_opt.problems.errors import InfeasibleError
from moeless_opt.solvers.core import knapsack
from moeless_opt.solvers.core.knapsack import choose_points, hull_steps, lower_hull
from moeless_opt.solvers.core.stopping import MaxTime

Rows = list[list[float]]


@st.composite
def layers(draw: st.DrawFn) -> tuple[list[list[int]], Rows, int]:
    """Points of a few layers; often evenly spaced, or in ever smaller steps; some not to be had."""
    cost, value = [], []
    even = draw(st.booleans())
    for _ in range(draw(st.integers(1, 4))):
        count = draw(st.integers(1, 5))
        if even:
            cost.append(list(range(count)))
        else:
            cost.append(sorted(draw(st.sets(st.integers(0, 9), min_size=count, max_size=count))))
        row = draw(st.lists(st.integers(0, 50), min_size=count, max_size=count))
        if draw(st.booleans()):
            drops = sorted(row[1:], reverse=True)
            row = [200 - sum(drops[:k]) for k in range(count)]
        dear = draw(st.integers(0, 3)) == 0
        value.append([np.inf if dear and k == 0 else float(one) for k, one in enumerate(row)])
    return cost, value, draw(st.integers(-1, 25))


def best_of(cost: list[list[int]], value: Rows, budget: int) -> float:
    return min(
        (
            sum(row[at] for row, at in zip(value, picks, strict=True))
            for picks in itertools.product(*[range(len(row)) for row in cost])
            if sum(row[at] for row, at in zip(cost, picks, strict=True)) <= budget
        ),
        default=np.inf,
    )


@settings(max_examples=300, deadline=None)
@given(layers(), st.sampled_from(["", "coarse", "stopped"]))
def test_against_enumeration(case: tuple[list[list[int]], Rows, int], how: str) -> None:
    cost, value, budget = case
    best = best_of(cost, value, budget)
    stop = MaxTime(0.0) if how == "stopped" else None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(knapsack, "_MOST_CELLS", 12 if how == "coarse" else 10**6)
        if best == np.inf:
            with pytest.raises(InfeasibleError, match="budget"):
                choose_points(cost, value, budget, stop=stop)
            return
        found = choose_points(cost, value, budget, stop=stop)
    assert found.cost == sum(row[at] for row, at in zip(cost, found.point_L, strict=True)) <= budget
    assert found.value == sum(row[at] for row, at in zip(value, found.point_L, strict=True))
    assert found.value >= best
    if found.exact:
        assert found.value == best
    assert found.exact or how


def test_costs_are_counted_in_their_common_divisor() -> None:
    found = choose_points([[0, 10**15], [0, 3 * 10**15]], [[5.0, 1.0], [9.0, 0.0]], 3 * 10**15)
    assert (found.point_L.tolist(), found.exact) == ([0, 1], True)


def test_the_hull_leaves_out_what_lies_above_it() -> None:
    cost, value = np.array([0.0, 1.0, 2.0, 3.0, 3.0]), np.array([10.0, 9.0, 4.0, 3.0, 2.0])
    assert lower_hull(cost, value) == [0, 2, 4]
    start_L, steps = hull_steps([cost, [0, 1]], [value, [5.0, 3.0]])
    assert start_L.tolist() == [0, 0]
    assert steps == [(0, 2), (0, 4), (1, 1)]  # 3, 2 and 2 a unit
