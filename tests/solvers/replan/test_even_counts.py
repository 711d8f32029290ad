"""Lower bounds on the moves of re-plans with an even split, beside every placement of small layers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import moeless_opt as mo
from moeless_opt.problems.errors import ProblemError
from moeless_opt.solvers.core import MaxTime
from moeless_opt.solvers.replan.even_counts import fewest_even_moves
from tests.oracles.even_moves import fewest_moves
from tests.strategies import random_slots


def layer(seed: int, full: bool = False) -> tuple[Any, Any, Any, Any]:
    """Loads, live slots, slots of each GPU and speeds of a small layer."""
    rng = np.random.default_rng(seed)
    gpus, experts = int(rng.integers(2, 4)), int(rng.integers(2, 5))
    capacity_G = rng.integers(1, min(experts, 3) + 1, gpus)
    while capacity_G.sum() < experts:
        capacity_G[int(rng.integers(gpus))] += 1
    capacity_G = np.minimum(capacity_G, experts)
    load_E = rng.lognormal(0, 1, experts)
    live_GC = random_slots(rng, capacity_G[None], experts)[0]
    return load_E, live_GC, capacity_G, rng.choice([1.0, 1.5], gpus)


@pytest.mark.parametrize("fill", ["none", "distinct", "copies"])
@pytest.mark.parametrize("seed", range(14))
def test_no_placement_moves_less_than_the_bound(seed: int, fill: str) -> None:
    load_E, live_GC, capacity_G, speed_G = layer(seed)
    live = [[expert for expert in row if expert >= 0] for row in live_GC.tolist()]
    mean = load_E.sum() / speed_G.sum()
    for wide in (1.05, 1.3, 2.0):
        given = (load_E, live_GC, capacity_G, speed_G, wide * mean)
        least = fewest_moves(load_E, live, capacity_G.tolist(), speed_G, wide * mean, fill)
        found = fewest_even_moves(*given, fill=fill, stop=MaxTime(20))
        if least is None:
            assert found.infeasible or found.bound >= 0
            continue
        assert not found.infeasible
        assert found.bound <= least
        again = fewest_even_moves(*given, fill=fill, below=least, stop=MaxTime(20))
        assert again.bound <= least
        if fill == "copies":
            continue
        truth = fewest_even_moves(*given, fill=fill, exact=True, stop=MaxTime(20))
        assert (truth.bound, truth.exact) == (least, True)
        proof = fewest_even_moves(*given, fill=fill, exact=True, below=least, stop=MaxTime(20))
        assert (proof.bound, proof.infeasible) == (least, True)


def test_the_bound_of_a_replan_is_below_its_moves_and_counts_what_even_splits_need() -> None:
    before = np.random.default_rng(1).lognormal(0, 1, (2, 32))
    after = before * np.random.default_rng(2).lognormal(0, 0.5, before.shape)
    topology = mo.uniform(1, 8, slots=5)
    live = mo.plan(before, topology, split="equal")
    plan = mo.plan(after, topology, current=live, split="equal", balance_tolerance=0.05)
    for x in range(2):
        time = max(plan.certificate.lower_bound_L[x] * 1.05, plan.certificate.value_L[x])
        given = (after[x], live.slots_LGC[x], np.full(8, 5), np.ones(8), float(time))
        even = fewest_even_moves(*given, below=int(plan.moves.count_L[x]), stop=MaxTime(2))
        free = fewest_even_moves(*given, fill="copies", stop=MaxTime(2))
        assert free.bound <= even.bound <= plan.moves.count_L[x]


def test_the_truth_with_second_copies_is_refused() -> None:
    load_E, live_GC, capacity_G, speed_G = layer(0)
    with pytest.raises(ProblemError, match="exact: is not with second copies"):
        fewest_even_moves(
            load_E, live_GC, capacity_G, speed_G, 0.1, fill="copies", exact=True, stop=MaxTime(1)
        )
