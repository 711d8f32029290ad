"""Levelling shares."""

from __future__ import annotations

import numpy as np

from moeless_opt.problems.plan.evaluate import gpu_times
from moeless_opt.problems.spec.placement import equal_shares
from moeless_opt.solvers.construct.join import connect
from moeless_opt.solvers.construct.level import level
from moeless_opt.solvers.pack.counts import apportion, trim
from moeless_opt.solvers.pack.packing import pack


def test_levelling_never_makes_it_worse() -> None:
    load_LE = np.random.default_rng(9).lognormal(0.0, 1.5, (12, 24)) * 1000.0
    capacity_LG, speed_G = np.full((12, 8), 4), np.ones(8)
    replicas_LE = trim(load_LE, apportion(load_LE, np.full(12, 32), 8), capacity_LG)
    slots_LGC = pack(load_LE, replicas_LE, capacity_LG, speed_G)
    share_LGC, time_L = level(load_LE, slots_LGC, speed_G, replicas_LE)
    top_L = gpu_times(load_LE, slots_LGC, share_LGC, speed_G).max(axis=1)
    np.testing.assert_allclose(top_L, time_L, rtol=1e-9)
    assert (share_LGC >= 0.0).all()
    even_L = gpu_times(load_LE, slots_LGC, equal_shares(slots_LGC, 24), speed_G).max(axis=1)
    assert (time_L <= even_L * (1.0 + 1e-9)).all()


def test_levelled_shares_are_the_nearest_to_the_equal_split() -> None:
    layers, gpus, experts = 8, 12, 30
    load_LE = np.random.default_rng(5).lognormal(0.0, 0.5, (layers, experts))
    capacity_LG, speed_G = np.full((layers, gpus), 4), np.linspace(0.9, 1.1, gpus)
    replicas_LE = apportion(load_LE, np.full(layers, gpus * 4), gpus, lean=0.5)
    slots_LGC, ok_L = connect(load_LE, replicas_LE, capacity_LG, speed_G)
    share_LGC, time_L = level(load_LE, slots_LGC, speed_G, replicas_LE)
    mean_L = load_LE.sum(axis=1) / speed_G.sum()
    levelled = np.flatnonzero(ok_L & (time_L <= mean_L * (1 + 1e-9)))
    assert len(levelled) >= 6
    for layer in levelled:
        gpu, slot = np.nonzero(replicas_LE[layer][slots_LGC[layer]] > 1)
        expert = slots_LGC[layer, gpu, slot]
        piece = load_LE[layer, expert] / replicas_LE[layer, expert]
        pieces_GC = (load_LE[layer] / replicas_LE[layer])[slots_LGC[layer]]
        rows = np.zeros((gpus + experts, len(gpu)))
        rows[gpu, np.arange(len(gpu))] = rows[gpus + expert, np.arange(len(gpu))] = 1.0
        due = np.concatenate([mean_L[layer] * speed_G - pieces_GC.sum(axis=1), np.zeros(experts)])
        # moved = root(piece) * x with the least x: the least squares of what is moved over the pieces
        moved = np.sqrt(piece) * (np.linalg.pinv(rows * np.sqrt(piece)) @ due)
        wanted = (piece + moved) / load_LE[layer, expert]
        np.testing.assert_allclose(share_LGC[layer, gpu, slot], wanted, atol=1e-9)
