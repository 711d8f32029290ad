"""Memory sizing against enumeration: feasible wherever it can be, and near the best spending of the bytes."""

from __future__ import annotations

import itertools
import os
from typing import Any

import numpy as np
import pytest

import moeless_opt as mo
from moeless_opt.problems.errors import InfeasibleError
from moeless_opt.solvers.core.stopping import NeverStop
from moeless_opt.solvers.sizing.memory import share_slots, slots_for_one_each
from tests.oracles.enumeration import least_within_bytes

INSTANCES = int(os.environ.get("MOELESS_MEMORY_INSTANCES", "60"))  # of every seed


@pytest.mark.parametrize("split", ["equal", "fractional"])
def test_the_best_spending(split: str) -> None:
    rng = np.random.default_rng(len(split))
    over = []
    for _ in range(INSTANCES):
        gpus = int(rng.integers(2, 4))
        layers, experts = int(rng.integers(1, 4)), int(rng.integers(2, 5 if gpus < 3 else 4))
        load_LE, size_L = rng.lognormal(0, 1, (layers, experts)), rng.integers(1, 4, layers)
        need = experts * int(size_L.sum())
        if rng.random() < 0.5:
            memory_G = np.full(gpus, int(need * rng.uniform(1, 1.7) / gpus) + 1)
        else:
            memory_G = rng.multinomial(int(need * rng.uniform(1, 1.8)), np.ones(gpus) / gpus)
        speed_G = np.ones(gpus) if rng.random() < 0.6 else rng.choice([0.5, 1.0, 2.0], gpus)
        best = least_within_bytes(load_LE, speed_G, size_L, memory_G, split)
        topology = mo.uniform(1, gpus, memory=memory_G.tolist(), speed=speed_G.tolist())
        if np.isinf(best):
            with pytest.raises(InfeasibleError):
                mo.plan(load_LE, topology, split=split, sizing="memory", expert_bytes=size_L)
            continue
        plan = mo.plan(load_LE, topology, split=split, sizing="memory", expert_bytes=size_L)
        used_G = ((plan.slots_LGC >= 0).sum(axis=2) * size_L[:, None]).sum(axis=0)
        assert (used_G <= memory_G).all()
        over.append(plan.time_LG.max(axis=1).sum() / best)
        assert over[-1] >= 1 - 1e-9
    assert [one for one in over if one > 1 + 1e-6] == []


def test_one_replica_of_each_finds_the_only_way() -> None:
    # First fit puts one of 3 bytes on each GPU and ends with a byte left on both.
    size_L, memory_G = np.array([3, 2]), np.array([6, 4])
    count_LG = slots_for_one_each(size_L, memory_G, 2, NeverStop())
    assert (count_LG.sum(axis=1) == 2).all()
    assert (size_L @ count_LG <= memory_G).all()


@pytest.mark.parametrize("seed", range(30))
def test_one_replica_of_each_wherever_there_is_a_way(seed: int) -> None:
    rng = np.random.default_rng(seed)
    size_L, gpus, experts = rng.integers(2, 9, int(rng.integers(1, 4))), int(rng.integers(2, 5)), 3
    memory_G = np.full(gpus, -(-experts * int(size_L.sum()) // gpus) + int(rng.integers(0, 3)))
    ways = {tuple([0] * gpus)}
    for size in size_L.tolist():
        rows = [row for row in itertools.product(range(experts + 1), repeat=gpus) if sum(row) == experts]
        ways = {
            tuple(u + size * r for u, r in zip(used, row, strict=True))
            for used, row in itertools.product(ways, rows)
            if all(u + size * r <= m for u, r, m in zip(used, row, memory_G.tolist(), strict=True))
        }
    if ways:
        count_LG = slots_for_one_each(size_L, memory_G, experts, NeverStop())
        assert (count_LG.sum(axis=1) == experts).all()
        assert (size_L @ count_LG <= memory_G).all()
    else:
        with pytest.raises(InfeasibleError):
            slots_for_one_each(size_L, memory_G, experts, NeverStop())


def test_layers_of_different_size_on_equal_gpus() -> None:
    load_LE = np.random.default_rng(0).lognormal(0, 1, (32, 8))
    size_L = np.array([2, 3] * 16)
    plan = mo.plan(load_LE, mo.uniform(1, 8, memory=[87] * 8), sizing="memory", expert_bytes=size_L)
    used_G = ((plan.slots_LGC >= 0).sum(axis=2) * size_L[:, None]).sum(axis=0)
    assert (used_G <= 87).all()


def test_slots_go_where_they_save_most() -> None:
    load_LE = np.array([[4.0, 1], [1.0, 1]])

    def build(load_LE: Any, slots_LG: Any) -> Any:
        slots_LGC = np.where(np.arange(3) < slots_LG[:, :, None], 0, -1).astype(np.int32)
        return slots_LGC, load_LE.max(axis=1) / slots_LG.sum(axis=1)

    start = np.array([[1, 1], [1, 1]])
    slots_LGC = share_slots(
        load_LE,
        np.zeros(2),
        np.ones(2, dtype=np.int64),
        np.array([2, 3]),
        [start],
        build,
        lambda load_LE, slots_LG: load_LE.sum(axis=1) / 2,
        NeverStop(),
    )
    assert (slots_LGC >= 0).sum(axis=(1, 2)).tolist() == [3, 2]
