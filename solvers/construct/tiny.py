"""Tiny layers, exactly: placement and shares by `pack.best_supports`, where nothing quicker is at the bound.

How long is searched depends on the size alone, so that plans are the same everywhere; only where the caller
gives a time limit, larger layers are searched in full, too.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moeless_opt.problems.arrays import BoolArray, FloatArray, IntArray, SlotArray
from moeless_opt.problems.plan import TimeTable
from moeless_opt.problems.spec import equal_shares
from moeless_opt.solvers.core import NeverStop, Stop
from moeless_opt.solvers.pack import best_supports
from moeless_opt.solvers.shares import solve_shares

__all__ = ["Tiny", "search_tiny", "widths_for"]

_FULL = {False: 40, True: 64}  # pairs of expert and GPU of a layer that is searched in full
_SOME = 128  # up to which it is searched at all
_MANY = 512  # pairs of all layers from which the searches are the shortest


@dataclass(frozen=True, slots=True)
class Tiny:
    """The best of a tiny layer.

    Parameters
    ----------
    slots_GC : array of int32, shape [G, C], or None
        Placement; None if none is quicker than what was known.
    share_GC : array, shape [G, C], or None
        Shares.
    bound : float
        No plan takes less; 0 if nothing was proven.
    """

    slots_GC: SlotArray | None
    share_GC: FloatArray | None
    bound: float


def widths_for(pairs: int, layers: int, equal: bool, stop: Stop) -> tuple[int, ...]:
    """How many states to keep in the searches of a layer; none if it is not to be searched.

    Parameters
    ----------
    pairs : int
        Experts times GPUs.
    layers : int
        How many are to be planned.
    equal : bool
        Whether shares are even, which is quicker.
    stop : Stop
        With a time limit, all are searched in full.
    """
    limited = stop.remaining < float("inf")
    if pairs > _SOME and not limited:
        return ()
    if limited or (pairs <= _FULL[equal] and pairs * layers <= _MANY):
        return (64, 1_000, 16_000)
    return (64, 1_000) if pairs * layers <= _MANY else (64,)


def search_tiny(
    load_E: FloatArray,
    capacity_G: IntArray,
    speed_G: FloatArray,
    table: TimeTable,
    known: float,
    *,
    equal: bool,
    widths: tuple[int, ...],
    replicas: int | None = None,
    stop: Stop | None = None,
) -> Tiny:
    """Search a layer for less than a known time.

    Parameters
    ----------
    load_E : array of float, shape [E]
        Tokens.
    capacity_G : array of int, shape [G]
        Slots.
    speed_G : array of float, shape [G]
        Relative speeds.
    table : TimeTable
        Times of a GPU.
    known : float
        A time that can be had.
    equal : bool
        Whether shares are even.
    widths : tuple of int
        From `widths_for`.
    replicas : int, optional
        Most of them in all.
    stop : Stop, optional
        Asked at every expert.
    """
    found = best_supports(
        load_E,
        capacity_G,
        speed_G,
        table,
        known,
        equal=equal,
        replicas=replicas,
        widths=widths,
        stop=stop or NeverStop(),
    )
    # The time was halved, not solved for: the bound stays below it.
    bound = found.value * (1.0 - 2e-9) if found.proven else 0.0
    if found.held_EG is None:
        return Tiny(None, None, bound)
    slots_GC = _slots(found.held_EG, load_E, capacity_G)
    if equal:
        share_GC = equal_shares(slots_GC[None], len(load_E))[0]
    else:
        share_GC = _shares(load_E, slots_GC, found.held_EG, speed_G, table, found.value)
    return Tiny(slots_GC, share_GC, bound)


def _slots(held_EG: BoolArray, load_E: FloatArray, capacity_G: IntArray) -> SlotArray:
    """Who serves whom as slots; experts without load go where most room is left."""
    rows = [np.flatnonzero(column).tolist() for column in held_EG.T]
    for expert in np.flatnonzero(load_E <= 0).tolist():
        gpu = int(np.argmax(capacity_G - np.array([len(row) for row in rows])))
        rows[gpu].append(expert)
    width = int(capacity_G.max())
    return np.array([row + [-1] * (width - len(row)) for row in rows], dtype=np.int32)


def _shares(
    load_E: FloatArray,
    slots_GC: SlotArray,
    held_EG: BoolArray,
    speed_G: FloatArray,
    table: TimeTable,
    value: float,
) -> FloatArray:
    """Shares with which every GPU ends in time: as if each were as fast as it has time for tokens."""
    used_G = np.minimum(held_EG.sum(axis=0), len(table.table_AK) - 1)
    room_GA = table.largest(value * (1.0 + 1e-12) * speed_G)
    total = float(load_E.sum())
    room_G = np.clip(room_GA[np.arange(len(speed_G)), used_G], 1e-9 * total, 2.0 * total)
    usual_G = np.ldexp(room_G, -np.frexp(total)[1])  # the flow counts in units of tokens over speed
    return np.asarray(solve_shares(load_E[None], slots_GC[None], usual_G).share_LGC[0])
