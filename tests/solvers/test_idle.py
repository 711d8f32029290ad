"""Windows in which nothing was served: what is live stays, and any plan will do where nothing is."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import moeless_opt as mo
from tests.strategies import problems


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(problems(), st.integers(1, 2))
def test_what_is_live_stays(problem: mo.Problem, scenarios: int) -> None:
    idle = mo.Loads(
        load_TLE=np.zeros((scenarios, problem.layers, problem.experts)), layers=problem.loads.layers
    )
    free = problem.replace(loads=idle, current=None, limits=mo.Limits(), known=None)
    free = free.replace(objective=free.objective.replace(horizon=None))
    try:
        first = mo.solve(free).plan
    except (mo.InfeasibleError, mo.UnsupportedFeatureError):
        return
    if first is None:
        return
    if problem.time.counts_tokens_only:
        assert (first.imbalance_L == 1).all()
        assert (first.time_LG == 0).all()
    plan = mo.solve(free.replace(current=first.placement)).plan
    assert plan is not None
    assert plan.moves.count == 0


def test_only_what_is_lost_comes_back() -> None:
    topology = mo.uniform(1, 4, slots=3)
    live = mo.plan(np.arange(16.0).reshape(2, 8) + 1, topology)
    slots_LGC = live.slots_LGC.copy()
    slots_LGC[:, 0] = -1
    partial = mo.Placement(slots_LGC=slots_LGC, experts=8, partial=True)
    problem = mo.Problem(loads=mo.Loads(load_TLE=np.zeros((2, 8))), topology=topology, current=partial)
    plan = mo.solve(problem).plan
    assert plan is not None
    assert plan.moves.count == (partial.replicas_LE == 0).sum()


@pytest.mark.parametrize("split", ["fractional", "equal"])
def test_words_for_an_idle_window(split: str) -> None:
    loads = mo.Loads(load_TLE=np.zeros((2, 4)))
    assert "no tokens" in repr(loads)
    plan = mo.plan(loads, mo.uniform(1, 2, slots=3), split=split)
    assert "nothing to do" in str(mo.explain(plan))
    assert "1.0000" in str(mo.compare(plan.made_for)) if isinstance(plan.made_for, mo.Problem) else True
