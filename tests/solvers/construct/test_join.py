"""Placing replicas so that they join the GPUs."""

from __future__ import annotations

import numpy as np
import pytest

from moeless_opt.solvers.construct import join
from moeless_opt.solvers.construct.join import connect
from moeless_opt.solvers.pack.counts import apportion, trim


def lognormal(layers: int, experts: int, sigma: float, seed: int) -> np.ndarray:
    return np.exp(np.random.default_rng(seed).normal(0.0, sigma, (layers, experts))) * 1000.0


def test_links_join_all_gpus() -> None:
    load_LE = lognormal(6, 64, 1.0, 3)
    capacity_LG, speed_G = np.full((6, 8), 10), np.ones(8)
    replicas_LE = apportion(load_LE, np.full(6, 80), 8, lean=0.5)
    slots_LGC, ok_L = connect(load_LE, replicas_LE, capacity_LG, speed_G)
    assert ok_L.all()
    for slots_GC in slots_LGC:
        reached, frontier = {0}, [0]
        while frontier:
            held = set(slots_GC[frontier.pop()].tolist()) - {-1}
            for gpu in range(8):
                if gpu not in reached and held & set(slots_GC[gpu].tolist()):
                    reached.add(gpu)
                    frontier.append(gpu)
        assert reached == set(range(8))


@pytest.mark.parametrize("seed", range(40))
def test_compiled_twin_places_alike(seed: int) -> None:
    pytest.importorskip("numba")
    rng = np.random.default_rng(seed)
    layers, gpus = int(rng.integers(1, 6)), int(rng.integers(1, 20))
    capacity_LG = np.tile(rng.integers(seed % 2, 7, gpus) if seed % 3 else np.full(gpus, 4), (layers, 1))
    capacity_LG[:, 0] = 6
    speed_G = rng.uniform(0.5, 2.0, gpus) if seed % 5 == 0 else np.ones(gpus)
    experts = int(rng.integers(1, capacity_LG[0].sum() + 1))
    load_LE = np.round(lognormal(layers, experts, 1.5, seed), 0 if seed % 2 else 6)
    load_LE[rng.random(load_LE.shape) < 0.2] = 0.0
    total_L = np.minimum(capacity_LG, experts).sum(axis=1)
    cap = (capacity_LG > 0).sum(axis=1)[:, None]
    replicas_LE = trim(load_LE, apportion(load_LE, total_L, cap, lean=0.5), capacity_LG)
    one = connect(load_LE, replicas_LE, capacity_LG, speed_G, backend="numpy")
    two = connect(load_LE, replicas_LE, capacity_LG, speed_G, backend="numba")
    np.testing.assert_array_equal(one[0], two[0])
    np.testing.assert_array_equal(one[1], two[1])


@pytest.mark.parametrize("seed", range(60))
def test_many_gpus_in_heaps_are_joined_alike(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(seed)
    layers, gpus, most = 3, int(rng.integers(1, 30)), int(rng.integers(1, 5))
    capacity_LG = np.full((layers, gpus), most) if seed % 3 else rng.integers(0, most + 1, (layers, gpus))
    capacity_LG[:, 0] = 5
    speed_G = np.ones(gpus) if seed % 2 else rng.choice([0.5, 1.0, 2.0], gpus)
    experts = int(rng.integers(1, capacity_LG.sum(axis=1).min() + 1))
    load_LE = (
        lognormal(layers, experts, 1.5, seed) if seed % 5 else rng.integers(0, 4, (layers, experts)) * 1.0
    )
    capacity_LG[:, 0] = np.maximum(5, experts)
    total_L = np.minimum(capacity_LG, experts).sum(axis=1)
    cap = (capacity_LG > 0).sum(axis=1)[:, None]
    replicas_LE = trim(load_LE, apportion(load_LE, total_L, cap, lean=0.5 - seed % 2), capacity_LG)
    one = connect(load_LE, replicas_LE, capacity_LG, speed_G, backend="numpy")
    monkeypatch.setattr(join, "MANY_GPUS", 0)
    two = connect(load_LE, replicas_LE, capacity_LG, speed_G)
    np.testing.assert_array_equal(one[0], two[0])
    np.testing.assert_array_equal(one[1], two[1])
