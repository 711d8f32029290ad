"""A fractional plan is never worse than another quick solver's of the same problem, whatever its shape."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import moeless_opt as mo
from moeless_opt.problems.errors import MoelessError
from moeless_opt.solvers.core.features import PUBLISHED

SHAPES: list[tuple[int, list[int], list[float]]] = [
    (64, [11] * 6, [1.0] * 6),
    (66, [4] * 18, [1.0] * 18),
    (66, [3] * 24, [1.0] * 24),
    (64, [2] * 36, [1.0] * 36),
    (40, [7] * 6, [1.0] * 6),
    (40, [3] * 16, [1.0] * 16),
    (62, [4] * 16, [1.0] * 16),
    (64, [5] * 4 + [4] * 12, [1.0] * 16),
    (64, [12] * 8, [0.25, 0.5, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0]),
    (60, [4, 8, 16] * 3, [0.5, 1.0, 2.0] * 3),
    (8, [1] * 8, [0.5] * 4 + [2.0] * 4),
    (1, [1] * 4, [1.0, 2.0, 4.0, 0.5]),
    (5, [5], [1.0]),
]


def others(problem: mo.Problem) -> dict[str, np.ndarray]:
    """Largest GPU times of the plans that other quick solvers have, shape [L]."""
    found = {"equal": mo.solve(problem.replace(split="equal"))}
    for name in sorted(PUBLISHED):
        try:
            found[name] = mo.solve(problem, name)
        except MoelessError:  # it cannot take such GPUs
            continue
    return {name: one.plan.certificate.value_L for name, one in found.items() if one.plan is not None}


def never_worse(load_LE: Any, slots: list[int], speed: list[float]) -> None:
    topology = mo.uniform(1, len(slots), slots=slots, speed=speed)
    problem = mo.Problem(loads=mo.Loads(load_TLE=load_LE[None]), topology=topology, split="fractional")
    plan = mo.solve(problem).plan
    assert plan is not None
    ours_L = plan.certificate.value_L
    for name, time_L in others(problem).items():
        assert (ours_L <= time_L * (1 + 1e-9)).all(), name
    # Nor than what it starts from.
    start = mo.solve(problem.replace(split="equal")).plan
    found = mo.solve(problem, initial=start).plan
    assert start is not None
    assert found is not None
    assert (found.certificate.value_L <= start.certificate.value_L * (1 + 1e-9)).all()


@pytest.mark.parametrize("shape", range(len(SHAPES)))
def test_on_the_shapes_where_slots_are_scarce(shape: int) -> None:
    experts, slots, speed = SHAPES[shape]
    load_LE = np.random.default_rng(shape).lognormal(0, [[0.5], [1.5]], (2, experts)) * 100
    never_worse(load_LE, slots, speed)


@pytest.mark.parametrize("seed", range(24))
def test_on_any_shape(seed: int) -> None:
    rng = np.random.default_rng(seed)
    gpus = int(rng.integers(1, 25))
    slots = rng.integers(1, 7, gpus) if rng.random() < 0.5 else np.full(gpus, int(rng.integers(1, 7)))
    speed = rng.choice([0.25, 0.5, 1.0, 2.0, 4.0], gpus) if rng.random() < 0.5 else np.ones(gpus)
    experts = int(rng.integers(1, slots.sum() + 1))
    while np.minimum(slots, experts).sum() < experts:
        experts -= 1
    load_LE = rng.lognormal(0, rng.choice([0.3, 1.0, 2.0]), (2, experts)) * 100
    load_LE[0, rng.random(experts) < 0.1] = 0.0
    load_LE[:, 0] = np.maximum(load_LE[:, 0], 1.0)
    never_worse(load_LE, slots.tolist(), speed.tolist())


@pytest.mark.parametrize("split", ["equal", "fractional"])
def test_dead_gpus_leave_the_plan_of_the_others(split: str) -> None:
    """Slots and shares are those of a cluster that never had them."""
    rng = np.random.default_rng(9)
    for experts, gpus, dead in ((16, 8, [2]), (5, 4, [0, 3]), (24, 8, [5, 6, 7])):
        load_LE = rng.lognormal(0, 1, (2, experts))
        whole = mo.uniform(1, gpus, slots=[0 if g in dead else 6 for g in range(gpus)])
        few = mo.uniform(1, gpus - len(dead), slots=6)
        plan, other = (mo.plan(load_LE, one, split=split) for one in (whole, few))
        assert (plan.slots_LGC[:, dead] == -1).all()
        assert np.array_equal(np.delete(plan.slots_LGC, dead, axis=1), other.slots_LGC)
        assert np.array_equal(np.delete(plan.share_LGC, dead, axis=1), other.share_LGC)
