"""A placement from what is left, after a loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from moeless_opt.problems.arrays import SlotArray
from moeless_opt.problems.errors import InfeasibleError
from moeless_opt.runtime.live.slots import rows_to_slots

__all__ = ["repair_slots"]


def repair_slots(
    have_LG: Sequence[Sequence[Sequence[int]]],
    experts: int,
    capacity_LG: ArrayLike,
    load_LE: ArrayLike | None = None,
) -> SlotArray:
    """A placement from what is left: everything stays, and experts without a replica get a slot.

    Parameters
    ----------
    have_LG : nested sequences
        Experts that each surviving rank holds, by layer.
    experts : int
        Logical experts of a layer.
    capacity_LG : array of int, shape [L, G]
        Slots of each rank in each layer.
    load_LE : array of float, shape [L, E], optional
        Tokens of each expert; equal by default.

    Returns
    -------
    array of int32, shape [L, G, C]

    Raises
    ------
    InfeasibleError
        If the slots are too few.

    Notes
    -----
    Lost experts are placed in decreasing load on the least loaded rank with a free slot. Where no slot is
    free, the least loaded replica among experts that have another one makes room. The nearest valid
    placement, not the best: a re-plan may follow.
    """
    capacity = np.asarray(capacity_LG, dtype=np.int64)
    layers, gpus = capacity.shape
    load = np.ones((layers, experts)) if load_LE is None else np.asarray(load_LE, dtype=np.float64)
    found: list[list[list[int]]] = []
    for i in range(layers):
        if int(np.minimum(capacity[i], experts).sum()) < experts:
            raise InfeasibleError(
                f"layer {i}: {experts} experts and only {int(capacity[i].sum())} slots on the ranks left"
            )
        rows = [list(row) for row in have_LG[i]]
        count_E = np.bincount([e for row in rows for e in row], minlength=experts)

        def share(e: int, i: int = i, count_E: Any = count_E) -> float:
            return float(load[i, e]) / max(1, int(count_E[e]))

        def evict(g: int, rows: list[list[int]] = rows, count_E: Any = count_E, share: Any = share) -> bool:
            spare = [e for e in rows[g] if count_E[e] > 1]
            if not spare:
                return False
            out = min(spare, key=lambda e: (share(e), e))
            rows[g].remove(out)
            count_E[out] -= 1
            return True

        for g in range(gpus):
            while len(rows[g]) > capacity[i, g] and evict(g):
                pass
            while len(rows[g]) > capacity[i, g]:
                count_E[rows[g].pop()] -= 1
        for e in sorted(np.flatnonzero(count_E == 0).tolist(), key=lambda e: (-load[i, e], e)):
            tokens_G = [sum(share(x) for x in row) for row in rows]
            free = [g for g in range(gpus) if len(rows[g]) < capacity[i, g]]
            if not free:
                free = [g for g in sorted(range(gpus), key=lambda g: (tokens_G[g], g)) if evict(g)][:1]
            if not free:
                raise InfeasibleError(f"layer {i}: no slot left for expert {e}")
            rows[min(free, key=lambda g: (tokens_G[g], g))].append(e)
            count_E[e] += 1
        found.append(rows)
    width = max(len(row) for rows in found for row in rows)
    return np.stack([rows_to_slots(rows, width) for rows in found])
