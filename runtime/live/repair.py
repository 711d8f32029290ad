"""A placement from what is left, after a loss."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from moeless_opt.problems.arrays import SlotArray
from moeless_opt.problems.errors import InfeasibleError
from moeless_opt.runtime.live.slots import rows_to_slots
from moeless_opt.solvers.core import mended

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
    As `solvers.core.mending.mended` says, free slots first. The nearest valid placement, not the best: a
    re-plan may follow.
    """
    capacity = np.asarray(capacity_LG, dtype=np.int64)
    layers = len(capacity)
    load = np.ones((layers, experts)) if load_LE is None else np.asarray(load_LE, dtype=np.float64)
    found: list[list[list[int]]] = []
    for i in range(layers):
        if int(np.minimum(capacity[i], experts).sum()) < experts:
            raise InfeasibleError(
                f"layer {i}: {experts} experts and only {int(capacity[i].sum())} slots on the ranks left"
            )
        found.append(mended(load[i].tolist(), have_LG[i], capacity[i].tolist(), free_first=True))
    width = max(len(row) for rows in found for row in rows)
    return np.stack([rows_to_slots(rows, width) for rows in found])
