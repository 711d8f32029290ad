"""Packing: complete, without duplicates, on any GPUs, and close together."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from moeless_opt.problems.errors import InfeasibleError
from moeless_opt.problems.plan.evaluate import even_times
from moeless_opt.solvers.pack.counts import apportion, hostable
from moeless_opt.solvers.pack.packing import pack


def check(slots, counts, capacity):
    """Each replica placed, no expert twice on a GPU, no more than the slots, empty slots last."""
    L, E = counts.shape
    assert slots.dtype == np.int32
    assert slots.shape == (*capacity.shape, capacity.max())
    for layer in range(L):
        for gpu, held in enumerate(slots[layer].tolist()):
            experts = [e for e in held if e >= 0]
            assert len(set(experts)) == len(experts)
            assert len(experts) <= capacity[layer, gpu]
            assert held == experts + [-1] * (len(held) - len(experts))
        assert (np.bincount(slots[layer][slots[layer] >= 0], minlength=E) == counts[layer]).all()


@settings(max_examples=200, deadline=None)
@given(
    counts=st.lists(st.integers(1, 6), min_size=1, max_size=8),
    capacity=st.lists(st.integers(0, 5), min_size=1, max_size=6),
    seed=st.integers(0, 1000),
    fast_gpu=st.booleans(),
)
def test_finds_a_packing_whenever_there_is_one(counts, capacity, seed, fast_gpu):
    counts_LE, capacity_LG = np.array([counts]), np.array([capacity])
    load = np.random.default_rng(seed).lognormal(0, 1, counts_LE.shape)
    speed = np.ones(len(capacity))
    speed[0] += fast_gpu
    if hostable(counts_LE, capacity_LG)[0]:
        check(pack(load, counts_LE, capacity_LG, speed), counts_LE, capacity_LG)
    else:
        with pytest.raises(InfeasibleError, match="layer 0"):
            pack(load, counts_LE, capacity_LG, speed)


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 10_000), G=st.integers(1, 9), C=st.integers(1, 5), spare=st.integers(0, 12))
def test_equal_gpus(seed, G, C, spare):
    rng = np.random.default_rng(seed)
    E = int(
        rng.integers(max(1, C), G * C + 1)
    )  # as many experts as a GPU has slots: any counts can be hosted
    assume(E <= G * C)
    load = rng.zipf(1.3, (3, E)).clip(0, 10_000).astype(float) * (rng.random((3, E)) < 0.9)
    capacity = np.full((3, G), C)
    counts = apportion(load, min(E + spare, G * C), G)
    slots = pack(load, counts, capacity, np.ones(G))
    check(slots, counts, capacity)
    assert np.allclose(even_times(load, slots, np.ones(G)).sum(axis=1), load.sum(axis=1))


def test_layers_of_different_sizes_in_one_call():
    load = np.random.default_rng(0).lognormal(0, 1, (4, 10))
    capacity = np.array([[3, 3, 3, 3, 3], [4, 4, 4, 4, 4], [1, 2, 3, 4, 5], [3, 3, 3, 3, 3]])
    counts = apportion(load, np.minimum(capacity, 10).sum(axis=1), 5)
    slots = pack(load, counts, capacity, np.ones(5))
    check(slots, counts, capacity)
    for layer in range(4):
        room = capacity[layer : layer + 1]
        alone = pack(load[layer : layer + 1], counts[layer : layer + 1], room, np.ones(5))
        assert (
            alone[0] == slots[layer, :, : room.max()]
        ).all()  # the company of other layers changes nothing


def test_differencing_beats_lpt_on_a_known_case():
    """Pieces 8 7 6 5 4 4 3 3 on two GPUs of four slots: LPT ends at 21 and 19, differencing at 20 and 20."""
    load = np.array([[8.0, 7, 6, 5, 4, 4, 3, 3]])
    slots = pack(load, np.ones((1, 8), dtype=int), np.array([[4, 4]]), np.ones(2))
    assert even_times(load, slots, np.ones(2)).tolist() == [[20.0, 20.0]]


def test_real_shapes_start_within_a_hundredth():
    load = np.random.default_rng(7).lognormal(0, 1, (8, 256))
    capacity = np.full((8, 32), 9)
    counts = apportion(load, 288, 32)
    time = even_times(load, pack(load, counts, capacity, np.ones(32)), np.ones(32))
    assert (time.max(axis=1) / time.mean(axis=1)).mean() < 1.005


def test_fast_gpus_get_more():
    load = np.ones((1, 40))
    speed = np.array([1.0, 1.0, 2.0, 4.0])
    slots = pack(load, np.ones((1, 40), dtype=int), np.full((1, 4), 20), speed)
    assert (slots >= 0).sum(axis=2).tolist() == [[5, 5, 10, 20]]


def test_too_many_replicas_are_named():
    with pytest.raises(InfeasibleError, match="layer 0: 1 replicas more than the GPUs have slots"):
        pack(np.ones((1, 2)), np.array([[2, 3]]), np.array([[2, 2]]), np.ones(2))


def test_gpu_time_counts_an_equal_split():
    slots = np.array([[[0, 1], [0, -1], [2, -1]]])
    assert even_times(np.array([[6.0, 1.0, 4.0]]), slots, np.array([1.0, 1.0, 2.0])).tolist() == [
        [4.0, 3.0, 2.0]
    ]
