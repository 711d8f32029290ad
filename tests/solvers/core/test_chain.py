"""Chains of shared experts: valid whatever the slots, linked as they should be, and worth it."""

from __future__ import annotations

import networkx as nx
import numpy as np
import pytest

import moeless_opt as mo
from moeless_opt.problems.plan import check_slots
from moeless_opt.solvers.core.chain import chained
from moeless_opt.solvers.shares import solve_shares


def test_any_slots_are_used_by_the_rules() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        gpus, experts, layers = (int(n) for n in rng.integers((1, 1, 1), (7, 14, 4)))
        capacity = np.tile(np.minimum(rng.integers(0, 6, gpus), experts), (layers, 1))
        if capacity[0].sum() < experts:
            continue
        load = rng.integers(0, 30, (int(rng.integers(1, 4)), layers, experts)).astype(float)
        for pairs in (False, True):
            slots = chained(load, capacity, rng.choice([1.0, 2.0], gpus), pairs=pairs)
            for row in slots:
                check_slots(row, experts, capacity[0])


@pytest.mark.parametrize("slots", [9, 16])
def test_shared_experts_link_all_gpus_in_a_ring(slots: int) -> None:
    gpus, experts = 8, 8 * (slots - 1)
    load = np.random.default_rng(1).lognormal(0, 0.5, (2, 3, experts))
    found = chained(load, np.full((3, gpus), slots), np.ones(gpus), pairs=True)
    assert (found >= 0).all()
    for row, mean in zip(found, load.mean(0), strict=True):
        ring = nx.MultiGraph()
        for expert in range(experts):
            homes = np.nonzero((row == expert).any(1))[0]
            assert len(homes) == 1 + (expert in np.argsort(-mean)[:gpus])
            if len(homes) == 2:
                ring.add_edge(*homes.tolist())
        assert dict(ring.degree()) == dict.fromkeys(range(gpus), 2)
        assert nx.is_connected(ring)


def test_other_loads_are_borne_better_than_by_a_plan_for_the_mean() -> None:
    topology, worth = mo.uniform(1, 8, slots=9), []
    for seed in range(3):
        rng = np.random.default_rng(seed)
        base = rng.lognormal(0, 0.7, (6, 64))
        seen, then = (base * rng.lognormal(0, 0.3, (2, 6, 64)) for _ in range(2))
        for loads in (seen.mean(0), seen):
            slots = mo.plan(loads, topology).slots_LGC
            worth.append(np.mean([solve_shares(one, slots).time_L / (one.sum(1) / 8) for one in then]))
    plain, robust = np.mean(worth[::2]), np.mean(worth[1::2])
    assert robust - 1 < 0.8 * (plain - 1)
