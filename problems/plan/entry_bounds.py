"""Lower bound on a layer's time where shares are whole entries of a dispatch table."""

from __future__ import annotations

import numpy as np

from moeless_opt.problems.arrays import FloatArray, IntArray

__all__ = ["entry_bound"]

_STEPS = 60  # of the bisection
_UNIT = 1e-9  # of an entry: what may be missing of one


def entry_bound(
    load_LE: FloatArray, capacity_LG: IntArray, speed_G: FloatArray, entries: int, low_L: FloatArray
) -> FloatArray:
    """Largest time that is proven out of reach of shares in multiples of ``1 / entries``, shape [L].

    In time T the fastest GPU serves at most ``floor(T speed entries / load)`` entries of an expert, so that
    the expert needs that many times fewer replicas than entries, rounded up: no more than there are GPUs, and
    all experts together no more than there are slots. What of that is impossible in time T is so in any less.

    Parameters
    ----------
    load_LE : array, shape [L, E]
        Tokens.
    capacity_LG : array of int, shape [L, G]
        Slots.
    speed_G : array, shape [G]
        Relative speeds.
    entries : int
        Entries of every expert.
    low_L : array, shape [L]
        Bounds known (tokens over speed); returned where these entries raise them no further.
    """
    usable_LG = capacity_LG > 0
    fastest_L = np.where(usable_LG, speed_G, 0.0).max(1)
    gpus_L, slots_L = usable_LG.sum(1), np.minimum(capacity_LG, load_LE.shape[1]).sum(1)
    bound_L = np.array(low_L, dtype=np.float64)

    def possible(rows: IntArray, time_R: FloatArray) -> np.ndarray:
        load_RE = load_LE[rows]
        unit_RE = np.where(load_RE > 0, load_RE / entries, 1.0)
        most_RE = np.floor((time_R * fastest_L[rows])[:, None] / unit_RE + _UNIT)
        most_RE = np.where(load_RE > 0, np.minimum(most_RE, entries), entries)
        need_RE = np.ceil(entries / np.maximum(most_RE, 1))
        fits_RE = (most_RE >= 1) & (need_RE <= gpus_L[rows][:, None])
        return np.asarray(fits_RE.all(1) & (need_RE.sum(1) <= slots_L[rows]))

    rows = np.flatnonzero(~possible(np.arange(len(load_LE)), bound_L) & (fastest_L > 0))
    if not len(rows):
        return bound_L
    low_R, high_R = bound_L[rows], load_LE[rows].max(1) / fastest_L[rows]
    for _ in range(_STEPS):
        middle_R = 0.5 * (low_R + high_R)
        fits_R = possible(rows, middle_R)
        low_R, high_R = np.where(fits_R, low_R, middle_R), np.where(fits_R, middle_R, high_R)
    bound_L[rows] = low_R
    return bound_L
