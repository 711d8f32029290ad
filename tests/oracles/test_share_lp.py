"""The exact share programme: optimality by its own certificate, persistence under moves and new loads."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeless_opt.problems.errors import ProblemError
from tests.oracles.share_lp import ShareLP, density, solve_shares_exact


def random_layer(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Loads, a placement with every expert somewhere and none twice on a GPU, and speeds."""
    rng = np.random.default_rng(seed)
    gpus, slots = int(rng.integers(1, 9)), int(rng.integers(1, 5))
    experts = int(rng.integers(1, gpus * slots + 1))
    slots_GC = np.full((gpus, slots), -1, dtype=np.int32)
    for expert in rng.permutation(experts):
        room = np.flatnonzero((slots_GC < 0).any(axis=1))
        gpu = int(rng.choice(room))
        slots_GC[gpu, np.argmax(slots_GC[gpu] < 0)] = expert
    for gpu in range(gpus):
        for slot in np.flatnonzero(slots_GC[gpu] < 0)[: int(rng.integers(0, slots + 1))]:
            others = np.setdiff1d(np.arange(experts), slots_GC[gpu])
            if len(others):
                slots_GC[gpu, slot] = rng.choice(others)
    load_E = np.exp(rng.normal(0.0, 1.5, experts)) * 1000.0
    load_E[rng.random(experts) < 0.1] = 0.0
    speed_G = np.ones(gpus) if seed % 2 else rng.uniform(0.5, 2.0, gpus)
    return load_E, slots_GC, speed_G


def check(load_E: np.ndarray, slots_GC: np.ndarray, speed_G: np.ndarray, share_GC: np.ndarray) -> np.ndarray:
    """Shares are a split: not negative, none on empty slots, one in all per expert. Returns GPU times."""
    assert (share_GC >= 0.0).all()
    assert (share_GC[slots_GC < 0] == 0.0).all()
    filled = slots_GC >= 0
    total_E = np.bincount(slots_GC[filled], weights=share_GC[filled], minlength=len(load_E))
    np.testing.assert_allclose(total_E, 1.0, atol=1e-9)
    return np.where(filled, load_E[slots_GC] * share_GC, 0.0).sum(axis=1) / speed_G


@given(st.integers(0, 10**6))
@settings(max_examples=60, deadline=None)
def test_time_equals_density_of_the_critical_set(seed: int) -> None:
    load_E, slots_GC, speed_G = random_layer(seed)
    found = ShareLP(slots_GC, speed_G, len(load_E)).solve(load_E)
    time_G = check(load_E, slots_GC, speed_G, found.share_GC)
    np.testing.assert_allclose(time_G.max(), found.time, rtol=1e-9)
    # Strong duality, checked by hand: no split beats the density of any set.
    assert density(load_E, slots_GC, speed_G, found.critical) == pytest.approx(found.time, rel=1e-8, abs=1e-6)
    assert found.bound <= found.time * (1.0 + 1e-12) + 1e-9


@given(st.integers(0, 10**6))
@settings(max_examples=30, deadline=None)
def test_no_set_is_denser_than_the_optimum(seed: int) -> None:
    load_E, slots_GC, speed_G = random_layer(seed)
    time = ShareLP(slots_GC, speed_G, len(load_E)).solve(load_E).time
    gpus = len(speed_G)
    densest = max(
        density(load_E, slots_GC, speed_G, [g for g in range(gpus) if code >> g & 1])
        for code in range(1, 2**gpus)
    )
    assert densest == pytest.approx(time, rel=1e-8, abs=1e-6)


@given(st.integers(0, 10**6))
@settings(max_examples=30, deadline=None)
def test_prices_are_a_dual_solution(seed: int) -> None:
    load_E, slots_GC, speed_G = random_layer(seed)
    if load_E.sum() == 0.0:
        return
    lp = ShareLP(slots_GC, speed_G, len(load_E))
    found = lp.solve(load_E)
    assert (found.price_G >= 0.0).all()
    assert found.price_G @ speed_G == pytest.approx(1.0)
    value = sum(load_E[e] * min(found.price_G[g] for g in home) for e, home in enumerate(lp.home_E))
    assert value == pytest.approx(found.time, rel=1e-7)


@given(st.integers(0, 10**6), st.lists(st.integers(0, 10**6), max_size=12))
@settings(max_examples=40, deadline=None)
def test_moves_and_new_loads_equal_a_fresh_programme(seed: int, picks: list[int]) -> None:
    load_E, slots_GC, speed_G = random_layer(seed)
    lp = ShareLP(slots_GC, speed_G, len(load_E))
    lp.solve(load_E)
    rng = np.random.default_rng(seed + 1)
    for pick in picks:
        expert, gpu = pick % len(load_E), (pick // 7) % len(speed_G)
        holds = gpu in lp.home_E[expert]
        if holds and len(lp.home_E[expert]) > 1:
            lp.remove(expert, gpu)
        elif not holds and (lp.slots_GC[gpu] < 0).any():
            lp.add(expert, gpu)
        load_E = load_E * np.exp(rng.normal(0.0, 0.3, len(load_E)))
        fresh = ShareLP(lp.slots_GC, speed_G, len(load_E)).solve(load_E)
        found = lp.solve(load_E)
        check(load_E, lp.slots_GC, speed_G, found.share_GC)
        assert found.time == pytest.approx(fresh.time, rel=1e-8, abs=1e-6)
        assert lp.time(load_E) == pytest.approx(fresh.time, rel=1e-7, abs=1e-6)


def test_swap_exchanges_two_replicas() -> None:
    slots_GC = np.array([[0, 1], [2, 3], [0, 2]], dtype=np.int32)
    load_E = np.array([8.0, 4.0, 6.0, 2.0])
    lp = ShareLP(slots_GC, np.ones(3), 4)
    lp.solve(load_E)
    lp.swap(1, 0, 3, 1)
    assert sorted(lp.slots_GC[0].tolist()) == [0, 3]
    assert sorted(lp.slots_GC[1].tolist()) == [1, 2]
    assert lp.solve(load_E).time == pytest.approx(ShareLP(lp.slots_GC, np.ones(3), 4).solve(load_E).time)
    with pytest.raises(ProblemError, match="two replicas on one GPU"):
        lp.swap(0, 0, 2, 2)


def test_degenerate_stream_of_loads_ends() -> None:
    """Warm starts over many loads on one placement: every solve ends and is optimal."""
    rng = np.random.default_rng(5)
    slots_GC = np.array([[g, (g + 1) % 16, 16 + g] for g in range(16)], dtype=np.int32)
    lp = ShareLP(slots_GC, np.ones(16), 32)
    for _ in range(100):
        found = lp.solve(rng.integers(0, 4, 32).astype(float))
        assert found.time == pytest.approx(found.bound, rel=1e-9, abs=1e-9)


def test_all_layers() -> None:
    layers = [random_layer(2 * i + 1) for i in range(1)] * 2
    load_LE = np.array([load for load, _, _ in layers])
    slots_LGC = np.array([slots for _, slots, _ in layers])
    share_LGC, time_L, critical = solve_shares_exact(load_LE, slots_LGC, layers[0][2])
    assert share_LGC.shape == slots_LGC.shape
    assert time_L[0] == time_L[1]
    assert critical[0] == critical[1]


def test_bad_placements_are_named() -> None:
    with pytest.raises(ProblemError, match=r"slots_GC: expert 1 has no replica"):
        ShareLP(np.array([[0, -1]]), np.ones(1), 2)
    with pytest.raises(ProblemError, match=r"slots_GC\[0\]: holds expert 0 twice"):
        ShareLP(np.array([[0, 0]]), np.ones(1), 1)
    lp = ShareLP(np.array([[0], [1]]), np.ones(2), 2)
    with pytest.raises(ProblemError, match="no empty slot"):
        lp.add(0, 1)
    with pytest.raises(ProblemError, match="already holds"):
        lp.add(0, 0)
    with pytest.raises(ProblemError, match="last replica"):
        lp.remove(0, 0)
    with pytest.raises(ProblemError, match="gpu_set: is empty"):
        density(np.ones(2), lp.slots_GC, np.ones(2), [])
