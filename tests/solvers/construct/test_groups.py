"""Groups of GPUs for few spare slots: valid, close to the bound, and never worse than an equal split."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from moeless_opt.problems.plan.bounds import best_bound
from moeless_opt.problems.plan.evaluate import gpu_times
from moeless_opt.problems.spec.placement import equal_shares
from moeless_opt.solvers.construct.equal import construct_equal
from moeless_opt.solvers.construct.fractional import construct_fractional
from moeless_opt.solvers.construct.groups import pack_groups
from moeless_opt.solvers.core.stopping import MaxTime
from moeless_opt.solvers.shares.flow import solve_shares


def check(load_LE: Any, capacity_LG: Any, speed_G: Any, slots_LGC: Any, share_LGC: Any) -> Any:
    """Every expert is there, none twice on a GPU, no GPU overfull, empties last, shares sum to 1."""
    assert ((slots_LGC >= 0).sum(axis=2) <= capacity_LG).all()
    assert not ((slots_LGC[:, :, :-1] < 0) & (slots_LGC[:, :, 1:] >= 0)).any()
    for slots_GC, share_GC in zip(slots_LGC, share_LGC, strict=True):
        held = slots_GC >= 0
        assert all(len(set(row[row >= 0])) == (row >= 0).sum() for row in slots_GC)
        sums = np.bincount(slots_GC[held], weights=share_GC[held], minlength=load_LE.shape[1])
        np.testing.assert_allclose(sums, 1.0, atol=1e-9)
        assert (share_GC[held] >= -1e-12).all()
        assert (share_GC[~held] == 0.0).all()
    return gpu_times(load_LE, slots_LGC, share_LGC, speed_G).max(axis=1)


@pytest.mark.parametrize("seed", range(60))
def test_placements_are_valid(seed: int) -> None:
    rng = np.random.default_rng(seed)
    gpus, layers = int(rng.integers(1, 9)), int(rng.integers(1, 5))
    capacity_G = rng.integers(0, 5, gpus) if seed % 2 else np.full(gpus, int(rng.integers(1, 6)))
    capacity_G[0] = max(capacity_G[0], 2)
    speed_G = rng.choice([0.25, 1.0, 2.0], gpus) if seed % 3 == 0 else np.ones(gpus)
    room = int(capacity_G.sum())
    experts = int(rng.integers(max(1, room - gpus), room + 1))
    if np.minimum(capacity_G, experts).sum() < experts:
        return
    load_LE = rng.lognormal(0, 1, (layers, experts)) * (rng.random((layers, experts)) < 0.9)
    capacity_LG = np.tile(capacity_G, (layers, 1))
    goal_L, _ = best_bound(load_LE, capacity_LG, speed_G, "fractional")
    slots_LGC, share_LGC, time_L = pack_groups(load_LE, capacity_LG, speed_G, goal_L)
    found = np.flatnonzero(np.isfinite(time_L))
    real_L = check(load_LE[found], capacity_LG[found], speed_G, slots_LGC[found], share_LGC[found])
    np.testing.assert_allclose(time_L[found], real_L, rtol=1e-9, atol=1e-12)
    assert (real_L >= goal_L[found] * (1 - 1e-9)).all()


@pytest.mark.parametrize(
    ("gpus", "slots", "experts", "gap"),
    [
        (32, 8, 256, 0.002),
        (32, 8, 255, 0.002),
        (72, 4, 256, 0.002),
        (24, 11, 256, 0.0005),
        (48, 6, 256, 5e-4),
    ],
)
def test_near_the_bound_where_slots_are_scarce(gpus: int, slots: int, experts: int, gap: float) -> None:
    load_LE = np.random.default_rng(5).lognormal(0, 1, (6, experts))
    capacity_LG, speed_G = np.full((6, gpus), slots), np.ones(gpus)
    goal_L, _ = best_bound(load_LE, capacity_LG, speed_G, "fractional")
    slots_LGC, share_LGC, time_L = pack_groups(load_LE, capacity_LG, speed_G, goal_L)
    check(load_LE, capacity_LG, speed_G, slots_LGC, share_LGC)
    assert time_L.sum() <= goal_L.sum() * (1 + gap)


def test_a_pair_shares_its_heaviest_expert() -> None:
    load_LE = np.array([[8.0, 5, 3, 2, 2]])
    slots_LGC, share_LGC, time_L = pack_groups(load_LE, np.full((1, 2), 3), np.ones(2), np.array([10.0]))
    assert time_L.tolist() == [10.0]
    assert (slots_LGC == 0).sum() == 2
    check(load_LE, np.full((1, 2), 3), np.ones(2), slots_LGC, share_LGC)


def test_layers_without_room_are_left_out() -> None:
    load_LE = np.ones((2, 5))
    *_, time_L = pack_groups(load_LE, np.array([[2, 2], [3, 3]]), np.ones(2), np.ones(2))
    assert np.isinf(time_L).tolist() == [True, False]


SHAPES: list[tuple[list[int], list[float], int]] = [
    ([4] * 18, [1.0] * 18, 64),
    ([3] * 24, [1.0] * 24, 64),
    ([11] * 6, [1.0] * 6, 64),
    ([2] * 36, [1.0] * 36, 64),
    ([7] * 6, [1.0] * 6, 40),
    ([4, 9, 9, 4, 4, 9, 9, 4], [1.0] * 8, 50),
    ([9] * 8, [0.25, 0.5, 1.0, 2.0, 4.0, 4.0, 0.25, 1.0], 64),
    ([8] * 8, [0.25, 0.5, 1.0, 2.0, 4.0, 4.0, 0.25, 1.0], 64),
    ([1, 1, 2, 3], [0.5, 3.7, 3.7, 0.25], 4),
    ([3, 1, 1], [1.0, 2.0, 3.7], 3),
    ([2, 1, 2, 1], [0.5, 0.5, 0.5, 2.0], 4),
    ([2, 1, 3, 1], [1.0] * 4, 4),
]


@pytest.mark.parametrize("shape", range(len(SHAPES)))
def test_free_shares_are_never_worse_than_equal_ones(shape: int) -> None:
    slots, speed, experts = SHAPES[shape]
    load_LE = np.random.default_rng(shape).lognormal(0, 1, (12, experts))
    capacity_LG, speed_G = np.tile(slots, (12, 1)), np.array(speed)
    slots_LGC, share_LGC = construct_fractional(load_LE, capacity_LG, speed_G)
    time_L = check(load_LE, capacity_LG, speed_G, slots_LGC, share_LGC)
    equal_LGC = construct_equal(load_LE, capacity_LG, speed_G)
    equal_L = gpu_times(load_LE, equal_LGC, equal_shares(equal_LGC, experts), speed_G).max(axis=1)
    assert (time_L <= equal_L * (1 + 1e-9)).all()


def test_groups_are_sturdy() -> None:
    """Loads that turn out different hurt less than with the spare slots used for balance alone."""
    load_LE, speed_G = np.random.default_rng(2).lognormal(0, 1, (8, 256)), np.ones(48)
    capacity_LG = np.full((8, 48), 6)
    slots_LGC, *_ = pack_groups(load_LE, capacity_LG, speed_G, load_LE.sum(axis=1) / 48)
    equal_LGC = construct_equal(load_LE, capacity_LG, speed_G)
    ours, mark = 0.0, 0.0
    for seed in range(3):
        actual_LE = load_LE * np.exp(np.random.default_rng(seed).normal(0.0, 0.2, load_LE.shape))
        ours += (solve_shares(actual_LE, slots_LGC).time_L / actual_LE.sum(axis=1)).mean()
        mark += (solve_shares(actual_LE, equal_LGC).time_L / actual_LE.sum(axis=1)).mean()
    assert ours < mark


@pytest.mark.parametrize("seed", range(12))
def test_layers_may_differ_in_slots(seed: int) -> None:
    rng = np.random.default_rng(seed)
    gpus, experts = int(rng.integers(2, 9)), int(rng.integers(4, 20))
    load_LE = rng.lognormal(0, 1, (5, experts))
    capacity_LG = rng.integers(0, 4, (5, gpus)) + -(-experts // gpus)
    speed_G = np.ones(gpus)
    slots_LGC, share_LGC = construct_fractional(load_LE, capacity_LG, speed_G)
    time_L = check(load_LE, capacity_LG, speed_G, slots_LGC, share_LGC)
    equal_LGC = construct_equal(load_LE, capacity_LG, speed_G)
    equal_L = check(load_LE, capacity_LG, speed_G, equal_LGC, equal_shares(equal_LGC, experts))
    assert (time_L <= equal_L * (1 + 1e-9)).all()


@pytest.mark.parametrize("split", ["equal", "fractional"])
def test_slow_gpus_may_stay_half_empty(split: str) -> None:
    """The spare slots are worth most where they stay empty: on the slow GPUs."""
    load_LE = np.random.default_rng(3).lognormal(0, 1, (4, 64))
    slots_G, speed_G = np.full(8, 10), np.array([0.25, 0.5, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0])
    capacity_LG = np.tile(slots_G, (4, 1))
    if split == "equal":
        slots_LGC = construct_equal(load_LE, capacity_LG, speed_G)
        share_LGC = equal_shares(slots_LGC, 64)
    else:
        slots_LGC, share_LGC = construct_fractional(load_LE, capacity_LG, speed_G)
    time_L = check(load_LE, capacity_LG, speed_G, slots_LGC, share_LGC)
    bound_L, _ = best_bound(load_LE, capacity_LG, speed_G, "equal" if split == "equal" else "fractional")
    assert (time_L <= 1.02 * bound_L).all()


def test_a_stop_ends_the_constructions_with_a_plan() -> None:
    load_LE = np.random.default_rng(0).lognormal(0, 1, (6, 128))
    capacity_LG, speed_G = np.full((6, 64), 2), np.ones(64)
    slots_LGC, share_LGC = construct_fractional(load_LE, capacity_LG, speed_G, stop=MaxTime(0.0))
    check(load_LE, capacity_LG, speed_G, slots_LGC, share_LGC)
