"""Loads: validation, expected loads, selection."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeless_opt.problems.errors import ProblemError
from moeless_opt.problems.spec.loads import Loads
from tests.strategies import few, loads


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"load_TLE": [1.0, 2.0]}, r"loads: has shape \(2,\), must be .*for a single layer give loads\[None"),
        ({"load_TLE": 3.0}, r"loads: has shape \(\), must be \[layers, experts\]"),
        ({"load_TLE": np.ones((1, 1, 1, 1))}, r"loads: has shape \(1, 1, 1, 1\)"),
        ({"load_TLE": np.ones((0, 4))}, "loads: is empty"),
        ({"load_TLE": [[1, -1]]}, r"loads\[0\]\[1\]: is -1.0, must be finite and at least 0"),
        ({"load_TLE": [[[1, 2], [np.nan, 1]]]}, r"loads\[0\]\[1\]\[0\]: is nan"),
        ({"load_TLE": [[1, np.inf]]}, r"loads\[0\]\[1\]: is inf"),
        ({"load_TLE": [[1, 1e300]]}, r"loads: reach 1e\+300, must be at most 1e\+30"),
        ({"load_TLE": [["a", "b"]]}, "loads: must hold numbers"),
        ({"load_TLE": [[1, 2], [3]]}, "loads: not an array of numbers"),
        ({"load_TLE": [[1, 2]], "weight_T": [1, 2]}, r"loads\.weights: has shape \(2,\), must be \(1,\)"),
        ({"load_TLE": [[1, 2]], "weight_T": [0]}, r"loads\.weights: are all zero"),
        ({"load_TLE": [[1, 2]], "weight_T": [-1]}, r"loads\.weights\[0\]: is -1.0"),
        ({"load_TLE": [[1, 2]], "layers": (1, 2)}, r"loads\.layers: must be 1 rising numbers"),
        ({"load_TLE": [[1, 2]] * 2, "layers": (2, 2)}, r"loads\.layers: must be 2 rising numbers"),
        ({"load_TLE": [[1, 2]], "layers": ("a",)}, r"loads\.layers: is 'a', must be a whole number"),
        ({"load_TLE": [[1, 2]], "layers": 7}, r"loads\.layers: is 7, must be a list of layer numbers"),
        ({"load_TLE": [[1, 2]], "skipped": (0.5,)}, r"loads\.skipped: is 0.5"),
        (
            {"load_TLE": [[1, 2]], "scenarios": ("a", "b")},
            r"loads\.scenarios: names 2 scenarios, there are 1",
        ),
        ({"load_TLE": [[1, 2]], "scenarios": "a"}, r"loads\.scenarios: is 'a', must be a list"),
        ({"load_TLE": [[1, 2]], "load_TLNE": [[[1, 1]]]}, r"loads\.by_node: does not sum to the loads"),
        (
            {"load_TLE": [[1, 2]], "load_TLNE": [[1, 2]]},
            r"loads\.by_node: has shape \(1, 2\), must be \[1, 1",
        ),
    ],
)
def test_malformed_loads(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ProblemError, match="^" + message):
        Loads(**kwargs)


@few
@given(st.data(), st.integers(1, 3), st.integers(1, 5))
def test_expected_loads(data: Any, layers: int, experts: int) -> None:
    load = data.draw(loads(layers, experts, nodes=data.draw(st.integers(0, 2))))
    scenarios = load.shape[0]
    weights = [1.0] * scenarios if load.weight_T is None else load.weight_T.tolist()
    for x in range(layers):
        for e in range(experts):
            mean = sum(w * load.load_TLE[t, x, e] for t, w in enumerate(weights)) / sum(weights)
            assert load.load_LE[x, e] == pytest.approx(mean, rel=1e-12)
    if load.weight_T is not None:
        assert load.weight_T.sum() == pytest.approx(1)


def test_layers_can_be_selected_by_the_models_own_index() -> None:
    node = np.arange(1.0, 13).reshape(1, 3, 2, 2)
    load = Loads(load_TLE=node.sum(2), load_TLNE=node, layers=(3, 4, 7), skipped=(0, 1, 2))
    part = load.select([7, 3, 7])
    assert part.layers == (3, 7)
    assert part.load_TLE.tolist() == load.load_TLE[:, [0, 2]].tolist()
    assert part.load_TLNE is not None
    assert part.load_TLNE.tolist() == node[:, [0, 2]].tolist()
    with pytest.raises(ProblemError, match="layers: 5 is not among the layers 3-4, 7"):
        load.select([5])


def test_the_callers_array_is_neither_kept_nor_frozen() -> None:
    mine = np.ones((1, 2))
    load = Loads(load_TLE=mine)
    mine[0, 0] = 9
    assert load.load_TLE.max() == 1
    assert not load.load_TLE.flags.writeable


def test_repr() -> None:
    load = Loads(load_TLE=[[[3, 1], [0, 0]], [[1, 3], [0, 0]]], source="chat")
    assert repr(load) == "Loads(2 scenarios, 2 layers x 2 experts, hottest expert 1.00 x mean, from chat)"


def test_workloads_together_are_scenarios_of_as_many_tokens() -> None:
    prefill = Loads(load_TLE=[[4.0, 4.0], [0.0, 0.0]], layers=(3, 5), source="a")
    decode = Loads(load_TLE=[[[1.0, 3.0], [2.0, 0.0]], [[0.0, 2.0], [1.0, 1.0]]], layers=(3, 5))
    both = Loads.together([prefill, decode], names=("prefill", "decode"), weights=(3, 1))
    assert both.scenarios == ("prefill", "decode: 0", "decode: 1")
    np.testing.assert_allclose(both.weight_T, [0.75, 0.125, 0.125])
    expected = [[[4, 4], [0, 0]], [[2, 6], [2, 0]], [[0, 8], [1, 1]]]
    np.testing.assert_allclose(both.load_TLE, expected)
    assert both.layers == (3, 5)
    for parts, more, said in (
        ([], {}, "are of no workload"),
        (
            [prefill, prefill.select([3])],
            {"names": ("a", "b")},
            "b: has layers 3 of 2 experts, a has 3, 5 of 2",
        ),
        ([prefill], {"weights": (1, 2)}, "are 2, there are 1"),
    ):
        with pytest.raises(ProblemError, match=said):
            Loads.together(parts, **more)
