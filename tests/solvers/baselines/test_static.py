"""Static expert parallelism and the perfect-balance bound."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from moeless_opt.problems.errors import InfeasibleError, ProblemError
from moeless_opt.solvers.baselines import static


def test_divisible_case_is_megatrons_mapping() -> None:
    slots_LGC = static.contiguous(8, [[2, 2, 2, 2], [3, 3, 3, 3]])
    assert slots_LGC[:, :, :2].tolist() == [[[0, 1], [2, 3], [4, 5], [6, 7]]] * 2
    assert (slots_LGC[:, :, 2] == -1).all()
    assert slots_LGC.dtype == np.int32


def test_unequal_slots_and_a_gpu_without_any() -> None:
    assert static.contiguous(6, [[1, 0, 4, 2]]).tolist() == [
        [[0, -1, -1, -1], [-1, -1, -1, -1], [1, 2, 3, -1], [4, 5, -1, -1]]
    ]


@given(st.lists(st.integers(0, 9), min_size=1, max_size=12), st.integers(1, 60))
def test_every_expert_once_in_order_and_as_equal_as_slots_allow(capacity: list[int], experts: int) -> None:
    assume(sum(capacity) >= experts)
    slots_GC = static.contiguous(experts, [capacity])[0]
    held = [row[row >= 0] for row in slots_GC]
    assert np.concatenate(held).tolist() == list(range(experts))
    sizes = [len(row) for row in held]
    for size, room in zip(sizes, capacity, strict=True):
        assert size <= room
        # Only a full GPU may hold less than the largest block minus one.
        assert size == room or size >= max(sizes) - 1


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
        np.testing.assert_array_equal(slots_LS, static.contiguous(256, capacity_LG).reshape(58, slots))
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


def test_too_few_slots_names_the_layer() -> None:
    with pytest.raises(
        InfeasibleError, match="layer 1: 5 experts need at least 5 slots, there are 3: 2 too few"
    ):
        static.contiguous(5, [[3, 3], [3, 0]])


@pytest.mark.parametrize("capacity", [[], [[]], [2, 2], [[2.5, 3.0]], [[4, -1]]])
def test_bad_capacities(capacity: list[object]) -> None:
    with pytest.raises(
        ProblemError, match=r"capacity: must be a non-empty \[layers, gpus\] array of integers"
    ):
        static.contiguous(2, capacity)  # type: ignore[arg-type]


def test_no_experts() -> None:
    with pytest.raises(ProblemError, match="experts: must be at least 1, got 0"):
        static.contiguous(0, [[1]])
