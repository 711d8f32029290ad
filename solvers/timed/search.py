"""Planning by the clock: placements and shares for any time model, also measured curves, from what is live.

A GPU's time depends on its tokens and on how many experts it activates, ``f(tokens, activated)``. Spreading
an expert over more GPUs levels the tokens and activates it more often, so a perfect balance of tokens is
slower than need be, and one replica per expert is uneven. This is scheduling of splittable jobs with a set-up
per machine and job [1]_, here with machines that hold few jobs, set-ups that depend on the curve, and a price
of moves.

*Search.* Every expert starts whole on a holder. Then the slowest GPU is relieved by the best single step: an
expert's tokens go, all or in part, to a GPU that serves it, holds it or loads it; or two experts change
places. When no step helps, the best so far is shaken and the search goes on (iterated local search). The same
search gives the shares on a fixed placement (nothing may be loaded) and the plan for the next pass, where
loading a replica costs its transfer beyond the time that hides it (`lead`), plus a price.

*Bound.* In time T, a GPU that activates a experts serves at most ``cap(a, T)`` tokens. If no choice of a for
every GPU reaches both all tokens and all experts that have some, T is too little. The choice is relaxed by a
multiplier on the number of experts, and T is found by halving.

References
----------
.. [1] B. Chen, Y. Ye, J. Zhang, "Lot-sizing scheduling with batch setup times", J. Scheduling 9 (2006).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moeless_opt.problems.arrays import FloatArray, IntArray, SlotArray
from moeless_opt.problems.spec.placement import held_LGE
from moeless_opt.problems.spec.time_model import TimeModel

__all__ = ["TimeTable", "Timed", "kicks_for", "timed_bound", "timed_plan", "timed_shares"]

KICKS = 16
"""Most shakes of a layer: enough for 8 to 16 experts to come within a percent of the optimum on average."""
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
            past = np.where(slope > 0, knot_K[-1] + (time_X - table_AK[a, -1]) / max(slope, 1e-300), np.inf)
            result[:, a] = np.where(k < 0, -np.inf, np.where(k == knot_K.size - 1, past, tokens))
        return result


@dataclass(frozen=True, slots=True)
class Timed:
    """What the search found.

    Parameters
    ----------
    slots_LGC : array of int32, shape [L, G, C]
        Placement.
    share_LGC : array, shape [L, G, C]
        Share of its expert's tokens that each slot serves.
    value_L : array, shape [L]
        Largest GPU time, plus waiting for weights and the price of moves.
    """

    slots_LGC: SlotArray
    share_LGC: FloatArray
    value_L: FloatArray


def kicks_for(experts: int) -> int:
    """Shakes that leave a layer well under a millisecond: fewer of more expensive ones."""
    return min(KICKS, max(2, 16 * KICKS // experts))


def _search(
    load_RE: FloatArray,
    held_REG: NDArray[np.bool_],
    room_RG: IntArray,
    speed_G: FloatArray,
    table: TimeTable,
    *,
    load_G: FloatArray | None = None,
    lead_R: FloatArray | None = None,
    price_R: FloatArray | None = None,
    kicks: int | None,
    start_LEG: FloatArray | None = None,
) -> tuple[FloatArray, FloatArray]:
    """Tokens of every expert on every GPU, shape [R, E, G], and the value of each row."""
    from moeless_opt.solvers.timed import _kernels as kernels  # imports Numba: only when it is needed

    rows, experts = load_RE.shape
    y_REG = np.zeros((rows, experts, len(speed_G)))
    value_R, none_R = np.zeros(rows), np.zeros(rows)
    kernels.rows(
        np.ascontiguousarray(load_RE, dtype=np.float64),
        np.ascontiguousarray(held_REG),
        np.ascontiguousarray(room_RG, dtype=np.int64),
        np.ascontiguousarray(speed_G, dtype=np.float64),
        np.zeros(len(speed_G)) if load_G is None else load_G,
        none_R if lead_R is None else lead_R,
        none_R if price_R is None else price_R,
        load_G is not None,
        table.knot_K,
        table.table_AK,
        kicks_for(experts) if kicks is None else kicks,
        np.zeros((1, 0, 0)) if start_LEG is None else start_LEG,
        y_REG,
        value_R,
    )
    return y_REG, value_R


def timed_shares(
    load_RE: FloatArray,
    slots_LGC: SlotArray,
    speed_G: FloatArray,
    table: TimeTable,
    *,
    kicks: int | None = None,
    start_LGC: FloatArray | None = None,
) -> tuple[FloatArray, FloatArray]:
    """Shares on a placement that make the slowest GPU end soon.

    Parameters
    ----------
    load_RE : array, shape [R, E]
        Tokens; R is a multiple of L, layers in turn.
    slots_LGC : array of int32, shape [L, G, C]
        Placement.
    speed_G : array, shape [G]
        Relative speeds.
    table : TimeTable
        Times.
    kicks : int, optional
        Shakes of each row (`kicks_for` by default).
    start_LGC : array, shape [L, G, C], optional
        Shares to start from as well: those that the placement was planned with.

    Returns
    -------
    share_RGC : array, shape [R, G, C]
    time_R : array, shape [R]
        Largest GPU time of each row.
    """
    rows, experts = load_RE.shape
    held_LGE_ = held_LGE(slots_LGC, experts)
    room_LG = held_LGE_.sum(2).astype(np.int64)
    start_LEG = None
    if start_LGC is not None:
        start_LEG = np.zeros((*held_LGE_.shape[:2], experts + 1))
        np.put_along_axis(start_LEG, slots_LGC.astype(np.int64) + 1, start_LGC, axis=2)
        start_LEG = np.ascontiguousarray(start_LEG[:, :, 1:].transpose(0, 2, 1))
    y_REG, value_R = _search(
        load_RE,
        held_LGE_.transpose(0, 2, 1),
        room_LG,
        speed_G,
        table,
        kicks=kicks,
        start_LEG=start_LEG,
    )
    return _as_shares(load_RE, np.resize(slots_LGC, (rows, *slots_LGC.shape[1:])), y_REG), value_R


def _as_shares(load_RE: FloatArray, slots_RGC: SlotArray, y_REG: FloatArray) -> FloatArray:
    """Shares of the slots from tokens by GPU; an expert without tokens is served by its first slot."""
    rows, gpus, width = slots_RGC.shape
    place = np.maximum(slots_RGC, 0).astype(np.int64)
    r, g = np.arange(rows)[:, None, None], np.arange(gpus)[None, :, None]
    load_RGC = load_RE[r, place]
    filled = slots_RGC >= 0
    share_RGC = np.where(filled & (load_RGC > 0), y_REG[r, place, g] / np.maximum(load_RGC, 1e-300), 0.0)
    row, slot = np.nonzero((filled & (load_RGC <= 0)).reshape(rows, gpus * width))
    if row.size:
        _, first = np.unique(row * load_RE.shape[1] + place.reshape(rows, -1)[row, slot], return_index=True)
        share_RGC.reshape(rows, -1)[row[first], slot[first]] = 1.0
    return np.asarray(share_RGC)


def timed_plan(
    load_LE: FloatArray,
    live_LGC: SlotArray,
    capacity_LG: IntArray,
    speed_G: FloatArray,
    table: TimeTable,
    *,
    load_G: FloatArray,
    lead_L: FloatArray | None = None,
    price_L: FloatArray | None = None,
    kicks: int | None = None,
) -> Timed:
    """Plan from what is live: which replicas to load, and which serve how many tokens.

    Replicas that are held and not used stay where there is room, those of heavy experts first: they cost no
    time and are ready if the loads turn out otherwise.

    Parameters
    ----------
    load_LE : array, shape [L, E]
        Tokens expected.
    live_LGC : array of int32, shape [L, G, C]
        What is held; every expert somewhere, nowhere more than fits.
    capacity_LG : array of int, shape [L, G]
        Slots.
    speed_G : array, shape [G]
        Relative speeds.
    table : TimeTable
        Times.
    load_G : array, shape [G]
        Seconds (the table's unit) until a GPU has loaded one replica.
    lead_L : array, shape [L], optional
        Time in which loading is hidden; none by default.
    price_L : array, shape [L], optional
        What a load must save at least, besides; nothing by default.
    kicks : int, optional
        Shakes of each layer (`kicks_for` by default).
    """
    from moeless_opt.solvers.timed import _kernels as kernels

    layers, experts = load_LE.shape
    held_LEG = np.ascontiguousarray(held_LGE(live_LGC, experts).transpose(0, 2, 1))
    room_LG = np.array(capacity_LG, dtype=np.int64)
    home_LE = np.empty((layers, experts), dtype=np.int64)
    kernels.reserve(load_LE, held_LEG, room_LG, home_LE)
    y_LEG, value_L = _search(
        load_LE,
        held_LEG,
        room_LG,
        speed_G,
        table,
        load_G=load_G,
        lead_R=lead_L,
        price_R=price_L,
        kicks=kicks,
    )
    slots_LGC = _slots(load_LE, y_LEG, held_LEG, home_LE, np.asarray(capacity_LG))
    return Timed(slots_LGC, _as_shares(load_LE, slots_LGC, y_LEG), value_L)


def _slots(
    load_LE: FloatArray,
    y_LEG: FloatArray,
    held_LEG: NDArray[np.bool_],
    home_LE: IntArray,
    capacity_LG: IntArray,
) -> SlotArray:
    """What serves, and what stays, as slots."""
    layers, _, gpus = y_LEG.shape
    width = int(capacity_LG.max())
    # Rank: homes and what serves first, then what is held, heavy experts first.
    heavy_LE = load_LE / np.maximum(load_LE.max(1, keepdims=True), 1e-300)
    rank_LEG = np.where(held_LEG, 1.0 + heavy_LE[:, :, None], 0.0)
    rank_LEG[y_LEG > 0] = 3.0
    layer, expert = np.nonzero(home_LE >= 0)
    rank_LEG[layer, expert, home_LE[layer, expert]] = 3.0
    rank_LGE = rank_LEG.transpose(0, 2, 1)
    top_LGC = np.argsort(-rank_LGE, axis=2, kind="stable")[:, :, :width]
    kept = np.take_along_axis(rank_LGE, top_LGC, axis=2) > 0
    kept &= np.arange(top_LGC.shape[2]) < capacity_LG[:, :, None]
    slots_LGC = np.full((layers, gpus, width), -1, dtype=np.int32)
    slots_LGC[:, :, : top_LGC.shape[2]] = np.where(kept, top_LGC, -1)
    return slots_LGC


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
) -> NDArray[np.bool_]:
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
