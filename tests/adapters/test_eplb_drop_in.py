"""The drop-in for DeepSeek's EPLB."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import moeless_opt as mo
from moeless_opt.adapters.eplb import rebalance_experts
from moeless_opt.solvers.baselines.eplb import rebalance

README = [
    [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
    [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
]


def gpu_loads(weight: Any, phy2log: Any, gpus: int) -> np.ndarray[Any, Any]:
    """Load of each GPU where replicas serve alike, [L, G]."""
    rows = []
    for load, row in zip(np.asarray(weight, dtype=float), np.asarray(phy2log), strict=True):
        piece = load / np.bincount(row, minlength=len(load))
        rows.append(piece[row].reshape(gpus, -1).sum(1))
    return np.array(rows)


def test_the_example_of_the_readme() -> None:
    """EPLB's hierarchical policy has 156 and 179.5, its global one 138.5 and 172."""
    phy2log, log2phy, logcnt = rebalance_experts(README, 16, 4, 2, 8)
    assert gpu_loads(README, phy2log, 8).max(1).tolist() == [136.0, 172.0]
    assert logcnt.sum(1).tolist() == [16, 16]
    for layer, expert in np.ndindex(2, 12):
        own = log2phy[layer, expert][: logcnt[layer, expert]]
        assert (phy2log[layer][own] == expert).all()
        assert (log2phy[layer, expert][logcnt[layer, expert] :] == -1).all()
    assert log2phy.shape == (2, 12, logcnt.max())


def test_tensors_in_tensors_out() -> None:
    plain = rebalance_experts(np.array(README), 16, 4, 2, 8)
    found = rebalance_experts(torch.tensor(README), 16, 4, 2, 8)
    for one, array in zip(found, plain, strict=True):
        assert one.dtype == torch.int64
        assert one.device.type == "cpu"
        assert np.array_equal(one.numpy(), array)
        assert array.dtype == np.int64


def test_few_moves_from_what_is_live() -> None:
    first = rebalance_experts(README, 16, 4, 2, 8)[0]
    same = rebalance_experts(README, 16, 4, 2, 8, current=first)[0]
    assert np.array_equal(first, same)
    drifted = np.array(README) * [1.3, *[1] * 10, 1.2]
    fresh = rebalance_experts(drifted, 16, 4, 2, 8)[0]
    kept = rebalance_experts(drifted, 16, 4, 2, 8, current=torch.from_numpy(first), tolerance=0.05)[0]
    assert (kept != first).sum() < (fresh != first).sum()


@given(st.data())
@settings(max_examples=15, deadline=None)
def test_never_less_level_than_eplb(data: st.DataObject) -> None:
    nodes = data.draw(st.integers(1, 2))
    gpus = nodes * data.draw(st.integers(1, 3))
    groups = nodes * data.draw(st.integers(1, 2))
    experts = groups * data.draw(st.integers(1, 3))
    width = -(-experts // gpus) + data.draw(st.integers(0, 2))
    row = st.lists(st.integers(0, 1000), min_size=experts, max_size=experts)
    weight = np.array(data.draw(st.lists(row, min_size=1, max_size=2)))
    weight[:, 0] += 1
    phy2log, _, logcnt = rebalance_experts(weight, gpus * width, groups, nodes, gpus)
    assert logcnt.min() >= 1
    ours = gpu_loads(weight, phy2log, gpus).max(1)
    for policy in ("auto", "global"):
        theirs = rebalance(weight, gpus * width, groups, nodes, gpus, policy=policy)  # type: ignore[arg-type]
        their_map = theirs.slots_LGC.reshape(len(weight), -1)
        assert (ours <= gpu_loads(weight, their_map, gpus).max(1) * (1 + 1e-6)).all()


@pytest.mark.parametrize("zero", [0, 1])
def test_layers_without_loads(zero: int) -> None:
    weight = np.array(README)
    weight[zero:] = 0
    phy2log, _, logcnt = rebalance_experts(weight, 16, 4, 2, 8)
    assert logcnt.min() >= 1
    assert phy2log.min() >= 0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_replicas": 15}, "num_replicas: is 15, must be a multiple of num_gpus = 8"),
        ({"num_nodes": 3}, "num_gpus: is 8, must be a multiple of num_nodes = 3"),
        ({"num_groups": 5}, "experts: is 12, must be a multiple of num_groups = 5"),
        ({"num_replicas": 8}, "12 experts need at least 12 slots"),
        ({"num_gpus": 0}, "num_gpus"),
        ({"weight": [[1, 2], [3]]}, "weight"),
        ({"weight": [1, 2]}, "weight: has shape"),
        ({"weight": np.full((2, 12), np.nan)}, "weight"),
        ({"current": np.zeros((2, 15), dtype=int)}, r"current: has shape \(2, 15\), must be \[2, 16\]"),
        ({"current": np.full((2, 16), 12)}, "current.*is 12"),
        ({"fill": "none"}, "fill: is 'none'"),
        ({"max_moves": -1}, "max_moves"),
    ],
)
def test_bad_arguments_are_named(change: dict[str, Any], words: str) -> None:
    sizes = {"num_replicas": 16, "num_groups": 4, "num_nodes": 2, "num_gpus": 8}
    arguments: dict[str, Any] = {"weight": README} | sizes
    with pytest.raises(mo.MoelessError, match=words):
        rebalance_experts(**arguments | change)
