"""How many replicas each expert gets.

With an equal split every replica of expert e carries the piece ``load_e / r_e``, and no GPU can be lighter
than its largest piece. Handing out slots one at a time, always to the expert whose piece is largest,
minimises that largest piece: it is Adams' divisor method of apportionment, and the greedy that DeepSeek's
EPLB uses.

The greedy can be entered in the middle: once every piece is at most T it stands at ``r_e = ceil(load_e /
T)``, and with ``T = total load / spare slots`` these can't add up to more slots than there are. About one
step per expert, at most, is left to do.

GPUs of unequal size can't host just any replica counts, for no GPU takes an expert twice: k experts
together find at most ``sum_g min(slots_g, k)`` places. That bound is concave in k, so the counts that can
be hosted form a polymatroid, and the same greedy, skipping steps that leave it, is still optimal.

References
----------
M. Balinski, H. P. Young: Fair Representation (1982): divisor methods.
D. Gale: A theorem on flows in networks (1957), and H. J. Ryser (1957): which counts can be hosted.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from moeless_opt.problems.arrays import BoolArray, FloatArray, IntArray, SlotArray
from moeless_opt.problems.errors import InfeasibleError
from moeless_opt.solvers.pack import fast

__all__ = ["apportion", "hostable", "largest_piece", "trim"]


def apportion(
    load_LE: FloatArray,
    total_L: Any,
    cap: Any = None,
    *,
    least: Any = 1,
    lean: float = 0.0,
    backend: str = "numpy",
) -> SlotArray:
    """Share out each layer's slots so that the largest piece ``load / replicas`` is as small as it can be.

    Parameters
    ----------
    load_LE : array of float, shape [L, E]
        Tokens of each expert, not negative.
    total_L : int or int [L]
        Slots to share out in each layer.
    cap : int or int array that broadcasts to [L, E], optional
        Most replicas of an expert (usually the number of GPUs with room). Default: no cap.
    least : int or int array that broadcasts to [L, E]
        Fewest replicas of an expert, at least 1.
    lean : float
        Slots go to the largest ``load / (replicas + lean)``. 0 minimises the largest piece; more gives heavy
        experts more replicas at the cost of light ones, which helps where heavy pieces must share a GPU with
        others (0.5 is Webster's method, 1 Jefferson's).
    backend : {"numpy", "numba"}
        Which of the two twins does the work; the result is the same.

    Returns
    -------
    array of int32, shape [L, E]
        Replicas. They sum to ``total_L``, or to the sum of the caps where that is less. Ties go to the expert
        with the lower index.

    Raises
    ------
    InfeasibleError
        Where the fewest replicas need more slots than there are.
    """
    load_LE = np.ascontiguousarray(load_LE, dtype=np.float64)
    L, E = load_LE.shape
    total = np.broadcast_to(np.asarray(total_L, dtype=np.int64), (L,))
    low = np.broadcast_to(np.asarray(least, dtype=np.int64), (L, E))
    high = np.broadcast_to(np.asarray(total.max(initial=1) if cap is None else cap, dtype=np.int64), (L, E))
    high = np.maximum(low, high)
    short = low.sum(axis=1) - total
    if (short > 0).any():
        layer = int(short.argmax())
        raise InfeasibleError(
            f"layer {layer}: {E} experts need at least {int(low[layer].sum())} slots, "
            f"there are {int(total[layer])}: {int(short[layer])} too few"
        )
    replicas = _enter(load_LE, -short, low, high, lean)
    left = np.minimum(total, high.sum(axis=1)) - replicas.sum(axis=1)
    (fast.hand_out if backend == "numba" else _hand_out)(load_LE, replicas, high, left, lean)
    return replicas.astype(np.int32)


def _hand_out(load_LE: FloatArray, replicas: IntArray, high: IntArray, left: IntArray, lean: float) -> None:
    """Give the slots that are left, one in every layer at a time; changes the replicas in place."""
    key = np.where(replicas < high, load_LE / (replicas + lean), -1.0)
    rows = np.arange(len(key))
    fewest = int(left.min()) if len(left) else 0
    for step in range(int(left.max(initial=0))):
        if step >= fewest:
            rows = np.flatnonzero(left > step)
        pick = (key if len(rows) == len(key) else key[rows]).argmax(axis=1)
        grown = replicas[rows, pick] + 1
        replicas[rows, pick] = grown
        key[rows, pick] = np.where(grown < high[rows, pick], load_LE[rows, pick] / (grown + lean), -1.0)


def _enter(load_LE: FloatArray, spare: IntArray, low: IntArray, high: IntArray, lean: float) -> IntArray:
    """Where the greedy stands once no key is above ``total load / spare slots`` and a hair."""
    threshold = load_LE.sum(axis=1) * (1.0 + 1e-9) / np.maximum(spare, 1)
    enter = (spare > 0) & (threshold > 0.0)
    threshold = np.where(enter, threshold, np.inf)
    wanted = np.ceil(load_LE / threshold[:, None] - lean).astype(np.int64)
    return np.clip(wanted, low, high)


def largest_piece(load_LE: FloatArray, replicas_LE: Any) -> FloatArray:
    """The largest piece ``load / replicas`` of each layer, a lower bound on its fullest GPU's tokens.

    Parameters
    ----------
    load_LE : array of float, shape [L, E]
    replicas_LE : array of int, shape [L, E]

    Returns
    -------
    array of float, shape [L]
    """
    piece: FloatArray = (load_LE / replicas_LE).max(axis=1, initial=0.0)
    return piece


def hostable(replicas_LE: Any, capacity_LG: Any) -> BoolArray:
    """Whether the replicas can be placed with no GPU holding an expert twice (the Gale-Ryser condition).

    Parameters
    ----------
    replicas_LE : array of int, shape [L, E]
    capacity_LG : array of int, shape [L, G]
        Slots of each GPU.

    Returns
    -------
    array of bool, shape [L]
    """
    replicas, capacity = np.asarray(replicas_LE, dtype=np.int64), np.asarray(capacity_LG, dtype=np.int64)
    if (capacity == capacity[:, :1]).all():  # equal GPUs host any counts up to one per GPU
        fits = replicas.sum(axis=1) <= capacity.sum(axis=1)
        most = np.where(capacity[:, 0] > 0, capacity.shape[1], 0)
        return np.asarray(fits & (replicas.max(axis=1, initial=0) <= most), dtype=np.bool_)
    replicas = -np.sort(-replicas, axis=1)
    places = _places(capacity, replicas.shape[1])
    return np.asarray((replicas.cumsum(axis=1) <= places).all(axis=1), dtype=np.bool_)


def _places(capacity_LG: IntArray, E: int) -> IntArray:
    """Places that any k experts find together, for k = 1..E: ``sum_g min(slots_g, k)``."""
    L = len(capacity_LG)
    key = np.minimum(capacity_LG, E) + np.arange(L)[:, None] * (E + 1)
    equal_LK = np.bincount(key.ravel(), minlength=L * (E + 1)).reshape(L, E + 1)
    # The k-th expert finds one more place on every GPU of k slots or more.
    more_LK = equal_LK[:, ::-1].cumsum(axis=1)[:, ::-1]
    return np.asarray(more_LK[:, 1:].cumsum(axis=1))


def trim(load_LE: FloatArray, replicas_LE: Any, capacity_LG: Any) -> SlotArray:
    """Replace counts that unequal GPUs can't host by the best counts that they can.

    Parameters
    ----------
    load_LE : array of float, shape [L, E]
    replicas_LE : array of int, shape [L, E]
        Replicas, for instance from `apportion`.
    capacity_LG : array of int, shape [L, G]

    Returns
    -------
    array of int32, shape [L, E]
        Layers that can be hosted are unchanged. The others are apportioned again under the Gale-Ryser bound,
        with no more slots than before.

    Raises
    ------
    InfeasibleError
        Where not even one replica of each expert can be hosted.
    """
    counts: SlotArray = np.array(replicas_LE, dtype=np.int32)
    capacity = np.asarray(capacity_LG, dtype=np.int64)
    if (capacity == capacity[:, :1]).all() and (counts <= capacity.shape[1]).all():
        return counts  # equal GPUs host any counts up to one per GPU
    for layer in np.flatnonzero(~hostable(counts, capacity)):
        places = _places(capacity[layer : layer + 1], load_LE.shape[1])[0]
        counts[layer] = _greedy_within(load_LE[layer], int(counts[layer].sum()), places)
    return counts


def _greedy_within(load_E: FloatArray, total: int, places_E: IntArray) -> IntArray:
    """Adams' greedy, without the steps after which some k experts need more than ``places_E[k-1]``."""
    E = len(load_E)
    replicas = np.ones(E, dtype=np.int64)
    if (replicas.cumsum() > places_E).any():
        raise InfeasibleError(f"{E} experts need at least {E} slots, there are {int(places_E[-1])}")
    open_E = np.ones(E, dtype=bool)
    while replicas.sum() < total and open_E.any():
        expert = int(np.where(open_E, load_E / replicas, -1.0).argmax())
        replicas[expert] += 1
        if ((-np.sort(-replicas)).cumsum() > places_E).any():
            replicas[expert] -= 1
            open_E[expert] = False  # once no step further is allowed, none ever is again
    return replicas
