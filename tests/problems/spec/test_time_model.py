"""The time model against a plain reading of its definition."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeless_opt.problems.errors import ProblemError
from moeless_opt.problems.spec.time_model import TimeModel
from tests.strategies import few, slow_time, time_models


@few
@given(
    time_models(),
    st.lists(
        st.tuples(st.floats(0, 1000), st.integers(0, 12), st.sampled_from((0.5, 1.0, 2.0))),
        min_size=1,
        max_size=6,
    ),
)
def test_times_are_those_of_the_definition(model: TimeModel, points: Any) -> None:
    tokens, activated, speed = (np.array(x) for x in zip(*points, strict=True))
    for got, point in zip(model.time(tokens, activated, speed), points, strict=True):
        assert got == pytest.approx(slow_time(model, *point), rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("tokens", [0, 4, 10, 20, 30, 1000])
@pytest.mark.parametrize("activated", [0, 1, 1.5, 3, 5])
def test_curve(tokens: float, activated: float) -> None:
    curve = TimeModel(
        curve_tokens=[4, 10, 30], curve_activated=[1, 3], curve_time=[[1, 2], [3, 5], [9, 20]], unit="s"
    )
    assert curve.has_curve
    assert not curve.counts_tokens_only
    assert curve.time(tokens, activated, 2.0) == pytest.approx(slow_time(curve, tokens, activated, 2.0))


def test_arrays_broadcast() -> None:
    model = TimeModel(token_cost=2, activation_cost=10, launch=1)
    got = model.time([[1, 2], [3, 4]], [[0, 1], [1, 1]], [1.0, 2.0])
    assert got.tolist() == [[3, 7.5], [17, 9.5]]
    assert TimeModel().counts_tokens_only
    assert TimeModel(token_cost=3).counts_tokens_only
    assert not model.counts_tokens_only


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"token_cost": -1}, r"time\.token_cost: is -1"),
        ({"launch": float("nan")}, r"time\.launch: is nan"),
        ({"activation_cost": [1]}, r"time\.activation_cost: is \[1\]"),
        ({"token_cost": 0}, r"time\.token_cost: is 0 with no activation cost"),
        ({"unit": "ms"}, r"time\.unit: is 'ms', must be 'tokens' or 's'"),
        ({"curve_tokens": [0, 1]}, r"time\.curve: needs all of"),
        (
            {"curve_tokens": [0, 0], "curve_activated": [0, 1], "curve_time": [[1, 1], [1, 1]]},
            r"time\.curve_tokens: must be a strictly increasing",
        ),
        (
            {"curve_tokens": [0, 1], "curve_activated": [1], "curve_time": [[1], [1]]},
            r"time\.curve_activated: must be a strictly increasing",
        ),
        (
            {"curve_tokens": [0, 1], "curve_activated": [0, 1], "curve_time": [[1, 1]]},
            r"time\.curve_time: has shape \(1, 2\), must be \(2, 2\)",
        ),
        (
            {"curve_tokens": [0, 1], "curve_activated": [0, 1], "curve_time": [[1, 1], [1, np.inf]]},
            r"time\.curve_time\[1\]\[1\]: is inf",
        ),
        (
            {"curve_tokens": [0, 1], "curve_activated": [0, 1], "curve_time": [[1, 1], [1, 1]], "launch": 2},
            r"time\.curve: replaces token_cost, activation_cost and launch",
        ),
    ],
)
def test_malformed(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ProblemError, match="^" + message):
        TimeModel(**kwargs)


def test_the_nearest_linear_model() -> None:
    tokens, used = np.array([0.0, 10.0, 40.0]), np.array([1.0, 2.0, 4.0])
    straight = 3.0 + 2.0 * used + 0.5 * tokens[:, None]
    bent = np.vstack([straight[:2], 9 * straight[2:]])
    curve = TimeModel(curve_tokens=tokens, curve_activated=used, curve_time=bent, unit="s")
    near = curve.linear(10.0)  # what lies beyond does not count
    assert (near.launch, near.activation_cost, near.token_cost) == pytest.approx((3.0, 2.0, 0.5))
    assert near.unit == "s"
    assert curve.linear(40.0).token_cost > 1.0
    assert near.linear(10.0) is near
