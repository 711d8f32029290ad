"""Levelling shares."""

from __future__ import annotations

import numpy as np

from moeless_opt.problems.plan.evaluate import gpu_times
from moeless_opt.problems.spec.placement import equal_shares
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
