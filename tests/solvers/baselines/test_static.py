"""The engines' layout at the start, and the perfect-balance bound."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from moeless_opt.problems.spec.placement import contiguous
from moeless_opt.solvers.baselines import static


@pytest.mark.parametrize(
    ("workload", "gpus", "slots", "imbalance"),
    [
        ("prefill_in1024", 32, 288, "2.018"),
        ("decode_in1000out1000", 32, 288, "2.008"),
        ("decode_in1000out1000", 64, 320, "2.338"),
        ("prefill_in1024", 32, 256, "2.289"),
        ("decode_in1000out1000", 32, 256, "2.880"),
        ("decode_in1000out1000", 64, 256, "3.360"),
    ],
)
def test_figures_measured_on_real_loads(
    shared_data: Path, workload: str, gpus: int, slots: int, imbalance: str
) -> None:
    with np.load(shared_data / "deepseek_v3_counts.npz") as recording:
        load_LE = recording["counts"][recording["workloads"].tolist().index(workload)].astype(np.float64)
    capacity_LG = np.full((58, gpus), slots // gpus)
    slots_LS = static.wrapped(256, capacity_LG).reshape(58, slots)
    if slots == 256:  # no spare slot: the two layouts are one
        np.testing.assert_array_equal(slots_LS, contiguous(256, capacity_LG).reshape(58, slots))
    piece_LE = load_LE / np.bincount(slots_LS[0], minlength=256)
    load_LG = np.take_along_axis(piece_LE, slots_LS, axis=1).reshape(58, gpus, -1).sum(axis=2)
    assert f"{(load_LG.max(axis=1) / load_LG.mean(axis=1)).mean():.3f}" == imbalance


@given(st.lists(st.integers(0, 9), min_size=1, max_size=12), st.integers(1, 20))
def test_wrapped_holds_every_expert_and_none_twice_on_a_gpu(capacity: list[int], experts: int) -> None:
    assume(sum(min(room, experts) for room in capacity) >= experts)
    slots_GC = static.wrapped(experts, [capacity])[0]
    held = [row[row >= 0].tolist() for row in slots_GC]
    assert {expert for row in held for expert in row} == set(range(experts))
    for row, room in zip(held, capacity, strict=True):
        assert len(set(row)) == len(row) == min(room, experts)
