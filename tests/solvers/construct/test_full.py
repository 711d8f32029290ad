"""Full slots with an even split, beside the best of all ways to fill the slots of small layers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import moeless_opt as mo
from moeless_opt.api import make_problem
from moeless_opt.problems.plan.evaluate import even_times
from moeless_opt.problems.spec.placement import without_copies
from moeless_opt.solvers.construct.full import best_full
from tests.oracles.enumeration import even_slot_times, full_counts

CASES = 40


def small(rng: Any, fill: str) -> mo.Problem:
    """One layer that can be enumerated."""
    while True:
        slots_G = rng.integers(1, 4, rng.integers(1, 4))
        E = int(rng.integers(1, 5))
        if slots_G.sum() >= E and (fill == "copies" or slots_G.max() <= E):
            break
    load_E = np.maximum(rng.lognormal(0, 1.5, E) * (rng.random(E) < 0.9), 0.0) + np.eye(E)[0] * 0.01
    speed = np.ones(len(slots_G)) if rng.random() < 0.6 else rng.choice([0.5, 1.0, 2.0], len(slots_G))
    topology = mo.uniform(1, len(slots_G), slots=slots_G, speed=speed)
    return make_problem(load_E[None], topology, split="equal", fill=fill)


@pytest.mark.parametrize("fill", ["distinct", "copies"])
def test_beside_the_best_of_all_fillings(fill: str) -> None:
    """Never below it, nor is any bound above; nearly always at it."""
    rng = np.random.default_rng(5)
    over = []
    for _ in range(CASES):
        problem = small(rng, fill)
        counts = full_counts(problem.capacity_LG[0].tolist(), problem.experts, copies=fill == "copies")
        best = even_slot_times(counts, problem.load_LE[0], problem.topology.speed_G).min()
        plan = mo.solve(problem).plan
        assert plan is not None
        assert plan.certificate.lower_bound_L[0] <= best * (1 + 1e-9)
        value = float(plan.certificate.value_L[0])
        assert value >= best * (1 - 1e-9)
        over.append(value / best - 1)
        live = make_problem(problem.load_LE[:, ::-1].copy(), problem.topology, split="equal", fill=fill)
        again = mo.solve(problem.replace(current=mo.solve(live).plan.placement)).plan  # type: ignore[union-attr]
        assert again is not None
        assert float(again.certificate.value_L[0]) >= best * (1 - 1e-9)
    assert np.mean(np.array(over) < 1e-9) > 0.9, np.round(over, 4)
    assert np.mean(over) < 0.01


def test_without_copies_none_is_made_and_no_layer_gets_slower() -> None:
    rng = np.random.default_rng(8)
    load = rng.lognormal(0, 1.2, (6, 12))
    speed = np.array([1.0, 1.0, 0.5, 2.0])
    starts = [np.stack([[rng.permutation(12)[:c] for c in (5, 5, 5, 5)] for _ in range(6)]) for _ in range(2)]
    starts = [np.where(np.arange(5) < 5, one, -1).astype(np.int32) for one in starts]
    for one in starts:  # every expert somewhere
        one[:, :3, :4] = np.arange(12).reshape(3, 4)
        one[:, :3, 4] = (one[:, :3, 0] + 5) % 12
    found = best_full(load, starts, speed, np.zeros(6), copies=False, steps=20)
    assert (without_copies(found) == found).all()
    before = np.min([even_times(load, one, speed).max(1) for one in starts], axis=0)
    after = even_times(load, found, speed).max(1)
    assert (after <= before).all()
    assert (after < before * 0.9).any()
    free = best_full(load, starts, speed, np.zeros(6), copies=True, steps=20)
    assert (even_times(load, free, speed).max(1) <= before).all()


def test_copies_are_weights() -> None:
    """A GPU of half the speed takes one slot of three: balanced, which two replicas are not."""
    gpus = mo.uniform(1, 2, slots=[1, 2], speed=[0.5, 1.0])
    plan = mo.plan([[9.0]], gpus, split="equal", fill="copies")
    assert plan.slots_LGC.tolist() == [[[0, -1], [0, 0]]]
    assert plan.imbalance_L[0] == pytest.approx(1.0)
    assert mo.plan([[9.0]], gpus, split="equal").imbalance_L[0] > 1.1
