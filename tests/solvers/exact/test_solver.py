"""The exact solvers on whole problems: proofs where there is time, the heuristic's plan where not."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from moeless_opt.problems.errors import ProblemError
from moeless_opt.problems.instances.library import load_instance
from moeless_opt.problems.plan.plan import Status
from moeless_opt.problems.plan.result import Progress
from moeless_opt.problems.plan.verify import verify
from moeless_opt.problems.spec.loads import Loads
from moeless_opt.problems.spec.problem import Problem
from moeless_opt.problems.spec.time_model import TimeModel
from moeless_opt.problems.spec.topology import uniform
from moeless_opt.solvers.construct.solver import Construct
from moeless_opt.solvers.core.stopping import MaxTime
from moeless_opt.solvers.exact.solver import CpSat, Milp, Patterns, Portfolio


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("flashlb-equal", [590 / 3]),
        ("flashlb-fractional", [181.25]),
        ("deepseek-readme-equal", [136.0, 172.0]),
        ("deepseek-readme-fractional", [129.25, 146.0]),
    ],
)
def test_published_examples_are_proven(name: str, values: Any) -> None:
    result = Portfolio().solve(load_instance(name), stop=MaxTime(30))
    assert result.status is Status.OPTIMAL
    assert result.plan is not None
    verify(result.problem, result.plan)
    np.testing.assert_allclose(result.plan.certificate.value_L, values)
    np.testing.assert_allclose(result.plan.certificate.lower_bound_L, values, rtol=1e-6)


@pytest.mark.parametrize("solver", [Portfolio(), Patterns(), CpSat(), Milp()])
def test_small_layers_by_every_method(solver: Any) -> None:
    problem = load_instance("tiny-pairs")
    seen: list[Progress] = []
    result = solver.solve(problem, stop=MaxTime(30), progress=seen.append)
    assert result.status is Status.OPTIMAL
    assert result.plan is not None
    verify(problem, result.plan)
    best = Patterns().solve(problem, stop=MaxTime(30)).plan
    assert best is not None
    np.testing.assert_allclose(result.plan.certificate.value_L, best.certificate.value_L, rtol=2e-6)
    assert [p.done for p in seen] == sorted(p.done for p in seen)


@pytest.mark.parametrize("solver", [CpSat(), Milp()])
def test_a_layer_that_is_proven_counts_as_optimal(solver: Any) -> None:
    load_LE = np.floor(np.random.default_rng(0).lognormal(3, 1, (2, 7))) + 1
    problem = Problem(loads=Loads(load_TLE=load_LE), topology=uniform(1, 4, slots=2))
    result = solver.solve(problem, stop=MaxTime(30))
    assert result.plan is not None
    assert set(result.plan.certificate.bound_L) == {solver.name}
    assert "not proven" not in result.message
    assert result.status is Status.OPTIMAL
    verify(problem, result.plan)


def test_milp_through_pulp() -> None:
    problem = load_instance("flashlb-fractional")
    result = Milp().solve(problem, stop=MaxTime(10), engine="pulp")
    assert result.status is Status.OPTIMAL
    with pytest.raises(ProblemError, match="backend: is 'abacus'"):
        Milp().solve(load_instance("flashlb-equal"), stop=MaxTime(10), backend="abacus")


@pytest.mark.parametrize("solver", [Portfolio(), CpSat(), Milp()])
def test_without_time_the_heuristics_plan_remains(solver: Any) -> None:
    problem = load_instance("phi-zipf-equal")
    first = Construct().solve(problem, stop=MaxTime(30)).plan
    result = solver.solve(problem, stop=MaxTime(0.0), initial=first)
    assert first is not None
    assert result.plan is not None
    assert result.stopped_by == "time"
    assert result.status is Status.FEASIBLE
    verify(problem, result.plan)
    np.testing.assert_array_equal(result.plan.certificate.value_L, first.certificate.value_L)


def test_never_worse_than_where_it_starts() -> None:
    problem = load_instance("mixtral-zipf-equal")
    first = Construct().solve(problem, stop=MaxTime(30)).plan
    result = Portfolio().solve(problem, stop=MaxTime(30), initial=first)
    assert first is not None
    assert result.plan is not None
    verify(problem, result.plan)
    assert (result.plan.certificate.value_L <= first.certificate.value_L * (1 + 1e-12)).all()
    assert result.status is Status.OPTIMAL


def test_initial_must_fit() -> None:
    other = Construct().solve(load_instance("flashlb-equal"), stop=MaxTime(1)).plan
    with pytest.raises(ProblemError, match="initial"):
        Portfolio().solve(load_instance("tiny-pairs"), stop=MaxTime(1), initial=other)


@pytest.mark.parametrize("name", ["flashlb-equal", "flashlb-fractional"])
def test_a_token_may_cost_other_than_one(name: str) -> None:
    problem = load_instance(name)
    plain = Portfolio().solve(problem, stop=MaxTime(30)).plan
    seconds = problem.replace(time=TimeModel(token_cost=2e-6, launch=1e-4, unit="s"), known=None)
    timed = Portfolio().solve(seconds, stop=MaxTime(30)).plan
    assert plain is not None
    assert timed is not None
    verify(seconds, timed)
    for kind in ("value_L", "lower_bound_L"):
        np.testing.assert_allclose(
            getattr(timed.certificate, kind), 1e-4 + 2e-6 * getattr(plain.certificate, kind), rtol=1e-6
        )
