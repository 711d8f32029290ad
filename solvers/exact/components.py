"""A lower bound for the fractional split where slots are scarce: groups of GPUs that cannot share load.

Draw every replica as an edge between its expert and its GPU. With fewer edges than E + G - 1 the graph
falls apart, and load cannot pass from one component to another. A component of m experts and k GPUs has at
least m + k - 1 edges and at most ``c * k`` slots, so ``m <= (c - 1) k + 1``; its time is at least its load
over k. So within time T a component with the experts X needs at least

    k(X) = max(1, ceil(load(X) / T), ceil((|X| - 1) / (c - 1)))

GPUs, and T is possible only if the experts can be partitioned so that the sum of k is at most G. The least
such T is a lower bound, found by bisection over the candidates ``load(X) / k`` with a dynamic programme
over subsets. If every component can be balanced inside, which is usual, it is the optimum.

Axes: E experts, M subsets of them as bit masks.
"""

from __future__ import annotations

import numpy as np

from moeless_opt.problems.arrays import FloatArray, IntArray
from moeless_opt.solvers.core import NeverStop, Stop

__all__ = ["MOST_EXPERTS", "component_bound"]


MOST_EXPERTS = 13
"""Beyond, 3^E steps are too many."""

_OFTEN = 256  # subsets between two looks at `stop`


def component_bound(
    load_E: FloatArray, gpus: int, slots: int, *, upper: float = np.inf, stop: Stop | None = None
) -> float:
    """Return a lower bound on the time of any plan with fractional split on equal GPUs.

    Parameters
    ----------
    load_E : array of float, shape [E]
        Tokens of each expert, E at most `MOST_EXPERTS`.
    gpus, slots : int
        Number of GPUs, and slots of each.
    upper : float
        The time of a known plan: the search stays below it.
    stop : Stop, optional
        When to stop, with the bound proven so far.

    Returns
    -------
    float
        In units of `load_E` per GPU of speed 1. At least the mean; infinite if the experts do not fit.
    """
    load = np.asarray(load_E, dtype=np.float64)
    E = len(load)
    if gpus * slots < E:
        return np.inf
    if E > MOST_EXPERTS or load.sum() == 0:
        return float(load.sum()) / gpus
    mask = np.arange(1 << E)
    sum_M = np.zeros(1 << E)
    size_M = np.zeros(1 << E, dtype=np.int64)
    for e in range(E):
        has = (mask >> e) & 1 == 1
        sum_M[has] += load[e]
        size_M[has] += 1
    shape_M = np.ones(1 << E, dtype=np.int64)
    if slots > 1:
        shape_M = np.maximum(shape_M, -(-(size_M - 1) // (slots - 1)))
    else:
        shape_M = np.where(size_M > 1, gpus + 1, shape_M)
    mean = float(load.sum()) / gpus
    levels = np.unique((sum_M[1:, None] / np.arange(1, gpus + 1)).ravel())
    levels = np.append(mean, levels[(levels > mean * (1 + 1e-12)) & (levels <= upper * (1 + 1e-12))])
    stop = NeverStop() if stop is None else stop
    splits: list[IntArray] = []
    low, high = -1, len(levels) - 1  # not possible; taken to be possible
    try:
        for m in range(1, 1 << E):
            if m % _OFTEN == 0 and stop():
                raise _StoppedError
            splits.append(_halves(m))
        if _fits(mean, sum_M, shape_M, splits, gpus, stop):
            return mean
        low = 0
        if high == 0 or (np.isinf(upper) and not _fits(levels[high], sum_M, shape_M, splits, gpus, stop)):
            return float(min(upper, levels[high]))
        while high - low > 1:
            middle = (low + high) // 2
            if _fits(levels[middle], sum_M, shape_M, splits, gpus, stop):
                high = middle
            else:
                low = middle
    except _StoppedError:
        return float(levels[max(low, 0)])
    return float(levels[high])


class _StoppedError(Exception):
    """Told to stop in the middle of a question."""


def _halves(mask: int) -> IntArray:
    """Return all subsets of a mask that contain its highest bit."""
    top = 1 << (mask.bit_length() - 1)
    rest = mask ^ top
    some = np.zeros(1, dtype=np.int64)
    while rest:
        bit = rest & -rest
        some = np.concatenate([some, some | bit])
        rest ^= bit
    return some | top


def _fits(
    time: float, sum_M: FloatArray, shape_M: IntArray, splits: list[IntArray], gpus: int, stop: Stop
) -> bool:
    """Whether some partition of the experts needs no more GPUs than there are."""
    need_M = np.maximum(shape_M, np.ceil(sum_M / time * (1 - 1e-12)).astype(np.int64))
    least_M = np.zeros(len(sum_M), dtype=np.int64)
    for mask, some in enumerate(splits, start=1):
        if mask % _OFTEN == 0 and stop():
            raise _StoppedError
        least_M[mask] = (need_M[some] + least_M[mask ^ some]).min()
    return bool(least_M[-1] <= gpus)
