"""From a placement to a certified plan: a bound that contradicts its plan is an error, rounding is not."""

from __future__ import annotations

import numpy as np
import pytest

from moeless_opt.problems.errors import InvalidPlanError
from moeless_opt.problems.plan.plan import PROVEN, Status
from moeless_opt.problems.plan.verify import verify, violations
from moeless_opt.problems.spec.loads import Loads
from moeless_opt.problems.spec.problem import Problem
from moeless_opt.problems.spec.topology import uniform
from moeless_opt.solvers.core.finish import Built, finish
from moeless_opt.solvers.core.stopping import Clock

PROBLEM = Problem(
    loads=Loads(load_TLE=[[6.0, 2.0], [4.0, 4.0]], layers=(3, 7)), topology=uniform(1, 2, slots=1)
)
SLOTS = np.array([[[0], [1]], [[0], [1]]], dtype=np.int32)


def built(bound: float) -> Built:
    return Built(slots_LGC=SLOTS, bound=(np.array([bound, 1.0]), ("oracle", "oracle")))


def test_a_bound_above_the_value_is_a_bug() -> None:
    with pytest.raises(InvalidPlanError, match=r"layer 3: lower bound 6\.1 \(oracle\).* own 6$"):
        finish(PROBLEM, built(6.1), solver="s", began=Clock.begin())
    with pytest.raises(InvalidPlanError, match=r"layer 3: lower bound inf \(oracle\)"):
        finish(PROBLEM, built(np.inf), solver="s", began=Clock.begin())


@pytest.mark.parametrize("over", [0.0, 0.5 * PROVEN])
def test_a_bound_may_exceed_the_value_by_rounding(over: float) -> None:
    plan = finish(PROBLEM, built(6.0 * (1 + over)), solver="s", began=Clock.begin())
    assert plan.certificate.status is Status.OPTIMAL
    assert plan.certificate.gap == 0.0
    assert (plan.certificate.lower_bound_L <= plan.certificate.value_L * (1 + 1e-9)).all()
    verify(PROBLEM, plan)


def test_the_verifier_says_the_same_of_a_plan_from_elsewhere() -> None:
    plan = finish(PROBLEM, built(6.0), solver="s", began=Clock.begin())
    wrong = plan.certificate.replace(lower_bound_L=np.array([6.0, 4.1]), bound_L=("oracle", "mean"))
    (text,) = violations(PROBLEM, plan.replace(certificate=wrong))
    assert text == "layer 7: lower bound 4.1 (mean) is above the plan's own 4"
