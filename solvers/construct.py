"""The equal-split construction: sizing, packing and local search, best of several."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from moeless_opt.solvers.packing import pack
from moeless_opt.solvers.search import improve
from moeless_opt.solvers.sizing import apportion, trim

__all__ = ["construct_equal"]


def construct_equal(
    load_LE: NDArray[np.float64],
    capacity_LG: Any,
    speed_G: Any,
    *,
    target: float = 1.0005,
    seed: int = 0,
    effort: str = "normal",
    backend: str = "auto",
) -> NDArray[np.int32]:
    """Place the replicas of every layer for an equal split of each expert's tokens over its replicas."""
    load_LE = np.ascontiguousarray(load_LE, dtype=np.float64)
    capacity = np.asarray(capacity_LG, dtype=np.int64)
    total = np.minimum(capacity, load_LE.shape[1]).sum(axis=1)
    replicas = trim(load_LE, apportion(load_LE, total, (capacity > 0).sum(axis=1)[:, None]), capacity)
    slots = pack(load_LE, replicas, capacity, speed_G)
    return improve(load_LE, slots, capacity, speed_G, target=target)
