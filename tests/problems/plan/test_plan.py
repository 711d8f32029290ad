"""Plans, certificates and results: what they derive and how they print."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given

from moeless_opt.problems.plan.plan import PROVEN, Certificate, Plan, Status
from moeless_opt.problems.plan.result import Result
from moeless_opt.problems.spec.loads import Loads
from moeless_opt.problems.spec.problem import Problem
from moeless_opt.problems.spec.topology import uniform
from tests.strategies import few, plan_of, planned


def certificate(value: list[float], bound: list[float]) -> Certificate:
    return Certificate(
        value_L=np.array(value),
        lower_bound_L=np.array(bound),
        bound_L=("mean", "tau"),
        solver="s",
        seconds=0.5,
    )


def test_gaps() -> None:
    some = certificate([11.0, 10.0], [10.0, 10.0])
    assert some.gap_L.tolist() == pytest.approx([0.1, 0.0])
    assert some.gap == pytest.approx(0.05)
    assert some.status is Status.FEASIBLE
    assert repr(some) == (
        "Certificate(feasible, gap 5.000% (worst layer 10.000%), bound by mean, tau, s in 500.0 ms)"
    )


@pytest.mark.parametrize(
    ("value", "bound", "status"),
    [
        ([10.0, 5.0], [10.0, 5.0], Status.OPTIMAL),
        ([10.0, 5.0 * (1 + 1e-12)], [10.0, 5.0], Status.OPTIMAL),
        ([10.0, 5.0 * (1 + 0.9 * PROVEN)], [10.0, 5.0], Status.OPTIMAL),
        ([10.0, 5.0 * (1 + 1.1 * PROVEN)], [10.0, 5.0], Status.FEASIBLE),
        ([10.0, 5.0], [10.0, 4.999], Status.FEASIBLE),
        ([0.0, 5.0], [0.0, 5.0], Status.OPTIMAL),  # a layer without tokens
        ([5.0, 5.0], [0.0, 5.0], Status.FEASIBLE),  # nothing is known of the first layer
    ],
)
def test_status(value: list[float], bound: list[float], status: Status) -> None:
    found = certificate(value, bound)
    assert found.status is status
    assert (found.gap_L >= 0).all()
    assert found.gap >= 0


def test_a_sum_of_layers_without_a_bound_has_no_gap() -> None:
    assert certificate([5.0, 5.0], [0.0, 0.0]).gap == 0.0


def test_certificates_are_read_only_but_not_the_callers_arrays() -> None:
    value = np.array([1.0, 2.0])
    found = Certificate(value_L=value, lower_bound_L=value, bound_L=("mean",) * 2)
    assert not found.value_L.flags.writeable
    assert value.flags.writeable


@few
@given(planned())
def test_a_plans_parts_agree(drawn: Any) -> None:
    problem, plan = drawn
    assert plan.placement.slots_LGC.tolist() == plan.slots_LGC.tolist()
    assert plan.replicas == plan.replicas_LE.sum() == plan.placement.used_LG.sum()
    np.testing.assert_allclose(plan.share_LGE.sum(1), 1.0, atol=1e-9)
    for array in (plan.slots_LGC, plan.share_LGC, plan.time_LG, plan.imbalance_L):
        assert not array.flags.writeable
    text, html = repr(plan), plan._repr_html_()
    assert f"{problem.layers} layer(s)" in text
    assert f"{plan.imbalance_L.max():.4f} worst" in text
    assert html.startswith("<table>")
    assert html.endswith("</table>")


def tiny() -> tuple[Problem, Plan]:
    problem = Problem(
        loads=Loads(load_TLE=[[3.0, 1.0]], layers=(7,)), topology=uniform(1, 2, slots=2), name="<b>&co"
    )
    return problem, plan_of(problem, np.array([[[0, -1], [0, 1]]], dtype=np.int32))


def test_text_and_html() -> None:
    _, plan = tiny()
    assert repr(plan) == (
        "<Plan <b>&co: 1 layer(s), 2 experts as 3 replicas on 2 GPUs (up to 2 slots), fractional split\n"
        "  imbalance (max/mean) 1.2500 mean, 1.2500 worst (layer 7)\n"
        "  Certificate(feasible, gap 0.000% (worst layer 0.000%), bound by none, drawn in 250.0 ms)\n"
        "  Moves(cold start: 3 replicas to load)>"
    )
    assert "Plan &lt;b&gt;&amp;co (fractional split)" in plan._repr_html_()
    assert "<b>" not in plan._repr_html_()


def test_results() -> None:
    problem, plan = tiny()
    done = Result(problem=problem, plan=plan, status=Status.FEASIBLE, solver="drawn", options={"a": [1]})
    assert done.objective == {"balance": 2.5, "moves": 3.0, "traffic": 0.0, "memory": 3.0}
    assert done.lower_bound == 0.0
    assert done.gap == 0.0
    assert hash(done) == hash(done.replace())
    none = Result(problem=problem, plan=None, status=Status.INFEASIBLE, message="no room")
    assert none.objective == {}
    assert np.isnan(none.lower_bound)
    assert np.isnan(none.gap)
    assert done != none


def test_moves_print_what_they_cost() -> None:
    _, plan = tiny()
    assert repr(plan.moves) == "Moves(cold start: 3 replicas to load)"
    warm = plan.moves.replace(count=2, bytes=5 * 10**9, fraction=0.5, cold=False)
    assert repr(warm) == "Moves(2 replicas, 5 GB, 50.00% of the plan)"


def test_status_values_are_words() -> None:
    assert [s.value for s in Status] == ["optimal", "feasible", "infeasible", "no solution"]
