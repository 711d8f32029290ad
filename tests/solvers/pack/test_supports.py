"""The exact search of tiny layers: against enumeration, what it claims when it is cut short, and its stop."""

from __future__ import annotations

import numpy as np
import pytest

import moeless_opt as mo
from moeless_opt.problems.plan.time_bounds import TimeTable
from moeless_opt.solvers.pack.supports import Supports, best_supports
from tests.campaign import KINDS, Case
from tests.oracles.enumeration import even_clock
from tests.strategies import After


def found_for(case: Case, factor: float, **wishes: object) -> Supports:
    problem = case.problem
    capacity_G = problem.capacity_LG[0]
    table = TimeTable.of(problem.time, min(int(capacity_G.max()), problem.experts))
    return best_supports(
        problem.load_LE[0],
        capacity_G,
        problem.topology.speed_G,
        table,
        case.best * factor,
        equal=problem.split == "equal",
        **wishes,  # type: ignore[arg-type]
    )


@pytest.mark.parametrize("kind", ["plain", "timed"])
@pytest.mark.parametrize("seed", range(40))
def test_it_finds_the_optimum_and_proves_it(kind: str, seed: int) -> None:
    case = KINDS[kind](np.random.default_rng(seed))
    found = found_for(case, 1.5)
    assert found.proven
    assert found.held_EG is not None
    assert found.value == pytest.approx(case.best, rel=1e-8)
    capacity_G = case.problem.capacity_LG[0]
    assert (found.held_EG.sum(0) <= capacity_G).all()
    assert (found.held_EG.any(1) == (case.problem.load_LE[0] > 0)).all()
    if case.problem.split == "equal":
        held_EG = found.held_EG.copy()
        for expert in np.flatnonzero(~held_EG.any(1)):
            held_EG[expert, np.argmax(capacity_G - held_EG.sum(0))] = True
        time = even_clock(
            held_EG[None], case.problem.load_LE[0], case.problem.topology.speed_G, case.problem.time
        )
        assert float(time[0]) == pytest.approx(case.best, rel=1e-8)


@pytest.mark.parametrize("seed", range(10))
def test_nothing_is_better_than_the_optimum_and_that_is_proven(seed: int) -> None:
    case = KINDS["plain"](np.random.default_rng(seed))
    found = found_for(case, 1.0)
    assert (found.held_EG is None, found.proven, found.value) == (True, True, case.best)


def test_what_was_cut_short_proves_nothing() -> None:
    rng = np.random.default_rng(2)
    load_E, table = rng.lognormal(0, 1, 12) * 100, TimeTable.of(mo.TimeModel(activation_cost=30.0), 4)
    found = best_supports(load_E, np.full(4, 4), np.ones(4), table, 1e9, widths=(8,))
    assert found.held_EG is not None
    assert not found.proven
    longer = best_supports(load_E, np.full(4, 4), np.ones(4), table, found.value, widths=(1000,))
    assert longer.value <= found.value


def test_it_ends_when_told_to() -> None:
    load_E, table = np.arange(1.0, 9.0), TimeTable.of(mo.TimeModel(activation_cost=3.0), 3)
    for asks in (0, 1, 5):
        found = best_supports(load_E, np.full(4, 3), np.ones(4), table, 100.0, stop=After(asks))
        assert (found.held_EG is None, found.proven) == (True, False)


@pytest.mark.parametrize(
    ("load", "slots"), [([0.0, 0.0], [1, 1]), ([1.0, 2.0], [1, 0]), ([1.0] * 12, [1] * 12)]
)
def test_what_it_cannot_say_it_does_not(load: list[float], slots: list[int]) -> None:
    table = TimeTable.of(mo.TimeModel(), 1)
    found = best_supports(np.array(load), np.array(slots), np.ones(len(slots)), table, 5.0)
    assert (found.held_EG is None, found.proven) == (True, False)
