"""Spare replicas on fixed homes: against enumeration, and fewer than published."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.benchmarks.spares import fewest_spares, spares_bound


def densest(hosts: Any, load: Any, speed: Any) -> float:
    worst = 0.0
    for size in range(1, len(speed) + 1):
        for group in itertools.combinations(range(len(speed)), size):
            inside = sum(w for w, at in zip(load, hosts, strict=True) if set(at) <= set(group))
            worst = max(worst, inside / sum(speed[g] for g in group))
    return worst


def fewest(load: Any, home: Any, spare: Any, speed: Any, time: float) -> int | None:
    """Try every set of spare replicas, small ones first."""
    pairs = [(e, g) for e in range(len(load)) for g in range(len(spare)) if g != home[e]]
    for count in range(sum(spare) + 1):
        for chosen in itertools.combinations(pairs, count):
            if all(sum(g == h for _, g in chosen) <= spare[h] for h in range(len(spare))):
                hosts = [[home[e]] + [g for f, g in chosen if f == e] for e in range(len(load))]
                if densest(hosts, load, speed) <= time * (1 + 1e-9):
                    return count
    return None


def loads_after(load: Any, home: Any, result: Any, gpus: int) -> Any:
    tokens = np.bincount(home, weights=load, minlength=gpus)
    np.add.at(tokens, result.gpu_R, result.tokens_R)
    np.subtract.at(tokens, np.asarray(home)[result.expert_R], result.tokens_R)
    return tokens


@given(st.integers(0, 100_000))
@settings(max_examples=80, deadline=None)
def test_bound_and_plan_against_enumeration(seed: int) -> None:
    rng = np.random.default_rng(seed)
    gpus, experts = int(rng.integers(1, 4)), int(rng.integers(1, 5))
    load = rng.integers(0, 20, experts).astype(float)
    home = rng.integers(0, gpus, experts)
    spare = rng.integers(0, 3, gpus)
    speed = rng.choice([0.5, 1.0, 2.0], gpus) if seed % 2 else np.ones(gpus)
    time = float(load.sum() / speed.sum() * rng.choice([1.0, 1.05, 1.3, 2.0])) + 1e-9
    truth = fewest(load, home, spare, speed, time)
    if truth is not None:
        assert spares_bound(load, home, speed, time) <= truth
    found = fewest_spares(load, home, spare, speed, time=time)
    if found.met:
        assert truth is not None
        assert found.bound <= truth <= len(found.expert_R)
        assert (loads_after(load, home, found, gpus) / speed <= time * (1 + 1e-9)).all()
        assert (np.bincount(found.gpu_R, minlength=gpus) <= spare).all()
        taken = np.bincount(found.expert_R, weights=found.tokens_R, minlength=experts)
        assert (taken <= load * (1 + 1e-9)).all()


@pytest.mark.parametrize(("peak", "published"), [(1.51, 38), (2.01, 46), (3.03, 51)])
def test_fewer_than_published(peak: float, published: int) -> None:
    home = np.arange(256) // 4
    for seed in range(4):
        order = np.random.default_rng(seed).permutation(256)
        low, high = 0.0, 3.0
        for _ in range(50):
            power = (low + high) / 2
            load = (np.arange(1, 257) ** -power)[order]
            tokens = load.reshape(64, 4).sum(axis=1)
            low, high = (power, high) if tokens.max() < peak * tokens.mean() else (low, power)
        time = 1.01 * load.sum() / 64
        found = fewest_spares(load, home, np.full(64, 2), time=time)
        assert found.met
        assert found.bound <= len(found.expert_R) < published
        assert loads_after(load, home, found, 64).max() <= time * (1 + 1e-9)
        assert np.bincount(found.gpu_R).max() <= 2


def test_nothing_to_do_and_nothing_possible() -> None:
    assert len(fewest_spares([3.0, 3.0], [0, 1], [1, 1], time=3.0).expert_R) == 0
    assert not fewest_spares([9.0, 1.0], [0, 1], [0, 0], time=5.0).met
    assert not fewest_spares([9.0, 1.0], [0, 1], [2, 2], time=4.0).met
