"""A placement from what is left, after a loss."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from moeless_opt.problems.arrays import SlotArray
from moeless_opt.problems.errors import InfeasibleError
from moeless_opt.runtime.live.slots import rows_to_slots
from moeless_opt.solvers.core import mended

__all__ = ["repair_slots", "spread_slots"]


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


def spread_slots(
    slots_LGC: SlotArray,
    experts: int,
    capacity_LG: ArrayLike,
    new: Sequence[int],
    load_LE: ArrayLike | None = None,
) -> SlotArray:
    """Give ranks that came back their part: experts of the fullest ranks move there, one after the other.

    Parameters
    ----------
    slots_LGC : array of int32, shape [L, G, C]
        A valid placement, in which the new ranks may hold nothing.
    experts, capacity_LG, load_LE
        As of `repair_slots`.
    new : sequence of int
        The ranks, by their place on axis G.

    Returns
    -------
    array of int32, shape [L, G, C]

    Notes
    -----
    A move is made while it lowers the fuller of the two ranks, counted in tokens and then in experts; what
    moves is the expert that leaves them most even. Moves only: a re-plan may add replicas.
    """
    capacity = np.asarray(capacity_LG, dtype=np.int64)
    load = np.ones((len(capacity), experts)) if load_LE is None else np.asarray(load_LE, dtype=np.float64)
    found: list[list[list[int]]] = []
    for layer, slots_GC in enumerate(slots_LGC):
        rows = [[int(e) for e in row if e >= 0] for row in slots_GC]
        replicas = np.bincount([e for row in rows for e in row], minlength=experts)
        # A hair for every expert, so that those without tokens are spread, too.
        part = load[layer] / replicas + max(1.0, load[layer].sum()) * 1e-9
        while _move_one(rows, part.tolist(), new, capacity[layer].tolist()):
            pass
        found.append(rows)
    width = max(len(row) for rows in found for row in rows)
    return np.stack([rows_to_slots(rows, width) for rows in found])


def _move_one(
    rows: list[list[int]], part: Sequence[float], new: Sequence[int], capacity: Sequence[int]
) -> bool:
    full = [sum(part[e] for e in row) for row in rows]
    open_to = [g for g in new if len(rows[g]) < capacity[g]]
    if not open_to:
        return False
    to = min(open_to, key=lambda g: (full[g], g))
    for source in sorted((g for g in range(len(rows)) if g not in new), key=lambda g: (-full[g], g)):
        gap = full[source] - full[to]
        fitting = [e for e in rows[source] if part[e] < gap and e not in rows[to]]
        if fitting:
            best = min(fitting, key=lambda e: (abs(gap - 2 * part[e]), e))
            rows[source].remove(best)
            rows[to].append(best)
            return True
    return False
