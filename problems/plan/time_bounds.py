"""A lower bound for any time model, also measured curves; for linear models `bounds` has better ones.

In time T, a GPU that activates a experts serves at most ``cap(a, T)`` tokens. If no choice of a for every GPU
reaches both all tokens and all experts that have some, T is too little. The choice is relaxed by a multiplier
on the number of experts, and T is found by halving.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moeless_opt.problems.arrays import BoolArray, FloatArray, IntArray
from moeless_opt.problems.spec import TimeModel

__all__ = ["TimeTable", "timed_bound"]

HALVINGS = 34
"""Of the bound's interval: it ends far below any kernel's noise."""


@dataclass(frozen=True, slots=True)
class TimeTable:
    """A time model as rows over tokens, one for each number of activated experts.

    Parameters
    ----------
    knot_K : array, shape [K]
        Tokens.
    table_AK : array, shape [A + 1, K]
        Times of 0 to A activated experts; between the knots linear, beyond them the last slope.
    """

    knot_K: FloatArray
    table_AK: FloatArray

    @classmethod
    def of(cls, time: TimeModel, most: int, *, per_token: float = 0.0) -> TimeTable:
        """The same times as the model's, up to `most` activated experts.

        `per_token` is added for every token: the link, where the GPU with most tokens also ends last there.
        """
        knot_K = np.array([0.0, 1.0]) if time.curve_tokens is None else np.asarray(time.curve_tokens)
        used_A1 = np.arange(most + 1)[:, None]
        table_AK = time.time(np.broadcast_to(knot_K, (most + 1, knot_K.size)), used_A1, 1.0)
        # An idle GPU serves no tokens: no slope.
        table_AK[0] = table_AK[0, 0]
        table_AK[1:] += per_token * knot_K
        return cls(np.ascontiguousarray(knot_K), np.ascontiguousarray(table_AK))

    def largest(self, time_X: FloatArray) -> FloatArray:
        """Most tokens that a GPU of speed 1 serves in a time, by activated experts; -inf if none is in time.

        Shape [X, A + 1].
        """
        knot_K, table_AK = self.knot_K, self.table_AK
        result = np.full((time_X.size, len(table_AK)), -np.inf)
        result[:, 0] = np.where(table_AK[0, 0] <= time_X, 0.0, -np.inf)
        for a in range(1, len(table_AK)):
            slope = (table_AK[a, -1] - table_AK[a, -2]) / (knot_K[-1] - knot_K[-2])
            # A curve may fall: what counts is the last point in time.
            ahead_K = np.minimum.accumulate(table_AK[a, ::-1])[::-1]
            k = np.searchsorted(ahead_K, time_X, side="right") - 1  # last knot in time
            inside = np.clip(k, 0, knot_K.size - 2)
            low, high = table_AK[a, inside], table_AK[a, inside + 1]
            along = np.divide(time_X - low, high - low, out=np.zeros(time_X.size), where=high > low)
            tokens = knot_K[inside] + np.clip(along, 0.0, 1.0) * (knot_K[inside + 1] - knot_K[inside])
            with np.errstate(over="ignore"):  # with next to no slope: no limit
                past = np.where(
                    slope > 0, knot_K[-1] + (time_X - table_AK[a, -1]) / max(slope, 1e-300), np.inf
                )
            result[:, a] = np.where(k < 0, -np.inf, np.where(k == knot_K.size - 1, past, tokens))
        return result


def timed_bound(
    load_LE: FloatArray, capacity_LG: IntArray, speed_G: FloatArray, table: TimeTable
) -> FloatArray:
    """Lower bound on the largest GPU time of any placement and any shares, shape [L].

    Notes
    -----
    For a multiplier m >= 0, no choice of activated experts a_g on the GPUs serves more than
    ``sum_g max_a (cap(a, T) + m a) - m E`` tokens if it has to activate E. The bound is the largest T (found
    by halving) at which some m proves that the tokens do not fit.
    """
    total_L, active_L = load_LE.sum(1), (load_LE > 0).sum(1)
    # GPUs alike in speed and slots are counted, not listed.
    kinds, count_X = np.unique(np.vstack([speed_G, capacity_LG]), axis=1, return_counts=True)
    speed_X, slots_LX = kinds[0], kinds[1:].astype(np.int64)
    slope = float((np.diff(table.table_AK[1:], axis=1) / np.diff(table.knot_K)).max(initial=0.0))
    high_L = (table.table_AK.max() + total_L * slope) / float(speed_G.min())
    low_L = np.zeros(len(load_LE))
    for _ in range(HALVINGS):
        middle_L = 0.5 * (low_L + high_L)
        short_L = _too_short(middle_L, speed_X, slots_LX, count_X, total_L, active_L, table)
        low_L = np.where(short_L, middle_L, low_L)
        high_L = np.where(short_L, high_L, middle_L)
    return np.asarray(np.where(total_L > 0, low_L, 0.0))


def _too_short(
    time_L: FloatArray,
    speed_X: FloatArray,
    slots_LX: IntArray,
    count_X: IntArray,
    total_L: FloatArray,
    active_L: IntArray,
    table: TimeTable,
) -> BoolArray:
    """Whether no choice of activated experts serves all tokens in this time, by layer."""
    used_A = np.arange(len(table.table_AK))
    cap_LXA = table.largest((time_L[:, None] * speed_X).ravel()).reshape(*slots_LX.shape, used_A.size)
    cap_LXA[used_A > slots_LX[:, :, None]] = -np.inf
    never_L = np.any(np.isneginf(cap_LXA.max(2)), axis=1)
    # Where nothing is in time, or everything, any number will do.
    cap_LXA = np.where(np.isneginf(cap_LXA), -1e300, np.minimum(cap_LXA, 1e300))
    few, many = np.triu_indices(used_A.size, 1)
    price_LP = ((cap_LXA[:, :, few] - cap_LXA[:, :, many]) / (many - few)).reshape(len(time_L), -1)
    price_LP = np.where((price_LP > 0) & (price_LP < 1e200), price_LP, 0.0)
    best_L = (cap_LXA.max(2) * count_X).sum(1)
    for price_L in price_LP.T:
        reach_LX = (cap_LXA + price_L[:, None, None] * used_A).max(2)
        best_L = np.minimum(best_L, (reach_LX * count_X).sum(1) - price_L * active_L)
    return np.asarray(never_L | (best_L < total_L * (1 - 1e-12)))
