"""Moves and times of many small re-plans in all: whatever changes in the search, they may fall, not rise."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest

from moeless_opt.solvers.construct.equal import construct_equal
from moeless_opt.solvers.replan.equal import replan_equal
from moeless_opt.solvers.replan.fractional import replan_fractional
from moeless_opt.solvers.replan.task import Replanned, ReplanTask, ReplanWish

SLACK = 1.01  # for searches that change: what is gained in one place is lost in another


@cache
def drifts(count: int) -> list[ReplanTask]:
    """Placements made for other loads; unlike GPUs, free slots, and lost replicas among them."""
    rng = np.random.default_rng(0)
    tasks = []
    for _ in range(count):
        gpus, width, layers = int(rng.integers(3, 7)), int(rng.integers(3, 6)), 2
        experts = int(rng.integers(gpus * 2, gpus * width - 1))
        speed = np.ones(gpus) if rng.random() < 0.6 else rng.choice([0.5, 1.0, 2.0], gpus)
        before = rng.lognormal(0, 1, (layers, experts)) * 1000
        capacity = np.full((layers, gpus), width)
        live = construct_equal(before, capacity, speed)
        kind = rng.integers(4)
        if kind == 0:
            live = np.concatenate([live, np.full((layers, gpus, 1), -1, dtype=live.dtype)], axis=2)
            capacity = capacity + 1
        elif kind == 1:
            live[:, 0] = -1
        after = before * rng.lognormal(0, rng.choice([0.2, 0.5, 0.9]), before.shape)
        tasks.append(ReplanTask(after, live, capacity, speed))
    return tasks


def spent(found: list[Replanned]) -> tuple[int, float]:
    """Replicas that move, and times over their bounds."""
    return sum(int(one.moves_L.sum()) for one in found), sum(
        float((one.time_L / one.bound_L).sum()) for one in found
    )


@pytest.mark.parametrize(
    ("kernel", "wish", "moves", "time"),
    [
        (replan_fractional, {"tolerance": 0.01}, 122, 40.28),
        (replan_fractional, {"tolerance": 0.05, "rounds": 3}, 97, 40.93),
        (replan_fractional, {"tolerance": 0.0, "max_moves": 9}, 105, 40.9),
        (replan_equal, {"tolerance": 0.05, "rounds": 2}, 149, 42.38),
        (replan_equal, {"tolerance": 0.02, "max_moves": 9, "rounds": 1}, 139, 42.13),
    ],
)
def test_no_more_moves_and_no_more_time(kernel: Any, wish: Any, moves: int, time: float) -> None:
    found = [kernel(task, ReplanWish(repair=True, **wish)) for task in drifts(20)]
    move_sum, time_sum = spent(found)
    assert move_sum <= moves * SLACK
    assert time_sum <= time * SLACK
