"""The bound for few spare slots: never above the optimum of an enumeration, and close where it should be."""

from __future__ import annotations

import itertools
import os
from functools import lru_cache
from typing import Any

import numpy as np
import pytest

from moeless_opt.problems.plan.bounds import best_bound
from moeless_opt.problems.plan.scarce_bounds import _Shape, _steps, scarce_bound
from moeless_opt.problems.spec.time_model import TimeModel
from tests.campaign import ways
from tests.oracles import enumeration

INSTANCES = int(os.environ.get("MOELESS_BOUND_INSTANCES", "150"))  # of every seed
MOST_PLACEMENTS = 150_000


@lru_cache(maxsize=32)
def placements(experts: int, capacity: tuple[int, ...]) -> Any:
    """All placements with a replica of each expert, [GPUs, experts, placements]; slots may stay empty."""
    held = [[m for m in range(1 << experts) if m.bit_count() <= c] for c in capacity]
    masks = np.array(np.meshgrid(*held, indexing="ij")).reshape(len(capacity), -1)
    masks = masks[:, np.bitwise_or.reduce(masks, axis=0) == (1 << experts) - 1]
    return ((masks[:, None, :] >> np.arange(experts)[None, :, None]) & 1).astype(bool)


def optimum(load: Any, capacity: tuple[int, ...], speed: Any, split: str) -> float:
    """The least largest time; for free shares by the densest set of GPUs, the dual of the shares."""
    host = placements(len(load), capacity)
    if split == "equal":
        piece = load[:, None] / host.sum(axis=0)
        return float(((host * piece).sum(axis=1) / speed[:, None]).max(axis=0).min())
    time = np.zeros(host.shape[2])
    for chosen in itertools.product((False, True), repeat=len(capacity)):
        inside = np.array(chosen)
        if inside.any():
            captive = ~host[~inside].any(axis=0)
            time = np.maximum(time, (captive * load[:, None]).sum(axis=0) / speed[inside].sum())
    return float(time.min())


def shapes() -> list[tuple[int, tuple[int, ...]]]:
    found = []
    for gpus in (2, 3, 4):
        for experts in range(2, 8):
            for capacity in itertools.combinations_with_replacement(range(1, 5), gpus):
                spare = sum(min(c, experts) for c in capacity) - experts
                ways = np.prod([sum(m.bit_count() <= c for m in range(1 << experts)) for c in capacity])
                if 0 <= spare <= gpus + 1 and ways <= MOST_PLACEMENTS:
                    found.append((experts, capacity))
    return found


def loads(rng: Any, experts: int) -> Any:
    kind = rng.integers(4)
    if kind == 0:
        return rng.lognormal(0, 1, experts)
    if kind == 1:
        return rng.integers(0, 6, experts).astype(float)
    return rng.lognormal(0, 0.3, experts) if kind == 2 else rng.pareto(1, experts)


@pytest.mark.parametrize("seed", range(4))
def test_never_above_the_optimum(seed: int) -> None:
    rng = np.random.default_rng(seed)
    every = shapes()
    for _ in range(INSTANCES):
        experts, capacity = every[rng.integers(len(every))]
        load = loads(rng, experts)
        speed = np.ones(len(capacity)) if seed % 2 else rng.choice([0.25, 0.5, 1, 2, 4], len(capacity))
        for split in ("equal", "fractional"):
            least = optimum(load, capacity, speed, split)
            for known in (0.0, load.sum() / speed.sum()):
                bound = scarce_bound(
                    -np.sort(-load)[None], np.array(capacity), speed, np.array([known]), split
                )[0]
                assert bound <= least * (1 + 1e-9) + 1e-12, (load, capacity, speed, split)


@pytest.mark.parametrize("slots", [(2, 2, 2), (2, 2, 2, 2)])
@pytest.mark.parametrize("spare", [0, 1])
def test_often_proves_the_optimum_on_equal_gpus(slots: tuple[int, ...], spare: int) -> None:
    rng = np.random.default_rng(spare)
    tight = 0
    for _ in range(30):
        load = rng.lognormal(0, 1, sum(slots) - spare)
        speed = np.ones(len(slots))
        least = optimum(load, slots, speed, "fractional")
        known = np.array([load.sum() / len(slots)])
        tight += scarce_bound(-np.sort(-load)[None], np.array(slots), speed, known)[0] >= least * (1 - 1e-9)
    assert tight >= 15


def test_full_gpus_hold_the_heaviest_with_the_lightest() -> None:
    load = np.array([[9.0, 3, 3, 3, 2, 1]])
    bound, name = best_bound(load, np.full((1, 3), 2))
    assert bound.tolist() == [10.0]
    assert name.tolist() == ["fillers"]
    spent, _ = best_bound(load, np.full((1, 3), 2), time=TimeModel(token_cost=0.5))
    assert spent.tolist() == [5.0]


def test_a_slow_gpu_must_fill_its_slots() -> None:
    load = np.array([[4.0, 3, 2, 1]])
    bound, name = best_bound(load, [[1, 1, 2]], [10.0, 10.0, 0.5])
    assert bound.tolist() == [6.0]  # the two lightest, 3 tokens at half speed
    assert name.tolist() == ["fillers"]


def test_an_equal_split_is_bounded_more_tightly() -> None:
    # One spare slot: two of the three heavy experts stay whole, and with free shares one pair could pool.
    load = np.array([[10.0, 10, 10, 1, 1, 1, 1]])
    equal, _ = best_bound(load, [[2, 2, 2, 2]], split="equal")
    free, _ = best_bound(load, [[2, 2, 2, 2]], split="fractional")
    assert equal[0] == pytest.approx(optimum(load[0], (2, 2, 2, 2), np.ones(4), "equal"))
    assert free[0] <= optimum(load[0], (2, 2, 2, 2), np.ones(4), "fractional") * (1 + 1e-9)


def test_more_slots_than_it_is_about() -> None:
    heavy = np.array([[3.0, 2, 1]])
    assert scarce_bound(heavy, np.array([3, 3]), np.ones(2), np.array([3.0])).tolist() == [3.0]
    assert scarce_bound(heavy, np.array([1, 1]), np.ones(2), np.array([3.0])).tolist() == [3.0]


def test_steps_are_never_above_the_optimum_and_sometimes_more_than_the_mean() -> None:
    rng = np.random.default_rng(0)
    raised = 0
    for _ in range(300):
        gpus = int(rng.integers(2, 5))
        slots = np.full(gpus, int(rng.integers(1, 4))) + (
            rng.integers(0, 2, gpus) if rng.random() < 0.4 else 0
        )
        experts = int(rng.integers(max(1, slots.sum() - gpus), slots.sum()))
        slots = np.minimum(slots, experts)
        if slots.sum() <= experts or ways(slots.tolist(), experts) > 20_000:
            continue
        speed = np.ones(gpus) if rng.random() < 0.5 else rng.choice([0.5, 1.0, 2.0], gpus)
        load = -np.sort(-rng.lognormal(0, rng.choice([0.5, 1, 2]), experts))
        light = np.concatenate([[0.0], load[::-1].cumsum()])[None]
        mean = np.array([load.sum() / speed.sum()])
        bound = float(_steps(load[None], light, _Shape.make(experts, slots, speed), mean)[0])
        held = enumeration.placements(slots.tolist(), experts)
        best = float(enumeration.set_times(held, load, speed).min())
        assert bound <= best * (1 + 1e-9)
        raised += bound > mean[0] * (1 + 1e-6)
    assert raised > 2
