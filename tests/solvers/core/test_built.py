"""What a solver builds is checked in form, whoever wrote it; arguments of the face are, too."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import moeless_opt as mo
from moeless_opt.problems.errors import InvalidPlanError, MoelessError, ProblemError
from moeless_opt.problems.plan import StoppedBy
from moeless_opt.solvers.core import Built, Feature, Heuristic, Task


class Given(Heuristic):
    """Builds what it was given."""

    name = "given"
    summary = "what it was given"
    features = frozenset({Feature.EQUAL_SPLIT})

    def __init__(self, thing: Any) -> None:
        super().__init__()
        self.thing = thing

    def build(self, task: Task[Any]) -> Any:
        return self.thing


def problem() -> mo.Problem:
    return mo.Problem(
        loads=mo.Loads(load_TLE=[[[4.0, 3.0, 2.0, 1.0]]]), topology=mo.uniform(1, 2, slots=2), split="equal"
    )


GOOD = np.array([[[0, 3], [1, 2]]], dtype=np.int32)


@pytest.mark.parametrize(
    ("thing", "message"),
    [
        (None, "built NoneType, must be Built"),
        (3, "built int, must be Built"),
        ([3], "built int, must be Built"),
        (Built(slots_LGC=GOOD.tolist()), "slots_LGC as list, must be an array of integers"),
        (Built(slots_LGC=GOOD.astype(float)), "slots_LGC as float64, must be an array of integers"),
        (Built(slots_LGC=GOOD[0]), r"slots_LGC of shape \[2, 2\], must be \[1, 2, slots\]"),
        (Built(slots_LGC=np.where(GOOD == 2, 99, GOOD)), "slots with experts 0 to 99, must be 0 to 3"),
        (Built(slots_LGC=np.full_like(GOOD, -1)), "slots with experts -1 to -1"),
        (Built(slots_LGC=np.array([[[0, -1], [1, -1]]])), "expert"),
    ],
)
def test_what_is_built_is_held_against_the_contract(thing: Any, message: str) -> None:
    with pytest.raises(InvalidPlanError, match=message):
        mo.solve(problem(), Given(thing))


def test_a_good_plan_passes_and_is_compared_as_an_object() -> None:
    solver = Given(Built(slots_LGC=GOOD))
    assert mo.solve(problem(), solver).plan is not None
    assert [row.solver for row in mo.compare(problem(), ["static", solver]).rows] == ["static", "given"]


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({"time_limit": "5"}, "time_limit"),
        ({"time_limit": True}, "time_limit"),
        ({"time_limit": 0}, "time_limit"),
        ({"initial": 3}, "initial"),
        ({"stop": 3}, "stop"),
        ({"stop": lambda *_: True}, "stop"),
        ({"progress": 3}, "progress"),
        ({"solver": None}, "solver"),
        ({"solver": Given}, "solver"),
    ],
)
def test_arguments_of_another_kind_are_refused_by_name(arguments: dict[str, Any], field: str) -> None:
    with pytest.raises(ProblemError, match=f"^{field}"):
        mo.solve(problem(), **arguments)


def test_a_solver_that_lacks_something_is_a_row() -> None:
    comparison = mo.compare(problem(), ["auto", "stay", "sized", "min-moves"])
    notes = {row.solver: row.note for row in comparison.rows}
    assert "current" in notes["stay"]
    assert "sizing" in notes["sized"]
    assert notes["min-moves"]


def test_limits_on_moves_need_something_live() -> None:
    with pytest.raises(ProblemError, match="give `current`"):
        mo.plan([[4, 3, 2, 1]], mo.uniform(1, 2, slots=2), limits=mo.Limits(max_moves=3))


def test_of_plans_with_equal_times_the_one_that_holds_less_is_kept() -> None:
    loads = mo.Loads(load_TLE=np.array([[[88.0, 190, 111, 59], [144, 368, 258, 49]]]))
    asked = mo.Problem(
        loads=loads, topology=mo.uniform(1, 3, slots=[4, 3, 3]), expert_bytes_L=np.full(2, 10**9)
    )
    start = mo.solve(asked, "constrained").plan
    assert start is not None
    held = int((start.slots_LGC >= 0).sum())
    for solver in ("auto", "construct", "activation"):
        plan = mo.solve(asked, solver, initial=start).plan
        assert plan is not None
        assert plan.certificate.value_L.sum() <= start.certificate.value_L.sum() * (1 + 1e-9)
        assert int((plan.slots_LGC >= 0).sum()) <= held


def test_merged_copies_are_no_start_for_an_equal_split() -> None:
    """EPLB's two copies on one GPU weight an expert; made even, they are a plan like any other."""
    loads = mo.Loads(load_TLE=np.array([[[62.0, 89, 193, 24]]]))
    asked = mo.Problem(loads=loads, topology=mo.uniform(1, 3, slots=3), split="equal")
    start = mo.solve(asked, "eplb").plan
    for solver in ("cpsat", "auto", "patterns"):
        result = mo.solve(asked, solver, initial=start, time_limit=5)
        assert result.status is mo.Status.OPTIMAL


def test_a_sizing_that_ran_out_of_time_found_nothing() -> None:
    class Now:
        remaining = 0.0

        def __call__(self, *_: float) -> StoppedBy:
            return StoppedBy.TIME

    load_LE = np.random.default_rng(0).lognormal(0, 2, (2, 16))
    asked = mo.Problem(
        loads=mo.Loads(load_TLE=load_LE[None]),
        topology=mo.uniform(1, 4, slots=5),
        sizing=mo.Sizing(policy="makespan", imbalance=1.01),
    )
    try:
        result = mo.solve(asked, stop=Now())
    except MoelessError as error:
        pytest.fail(f"{error}")
    assert result.plan is None
    assert result.status is mo.Status.NO_SOLUTION
