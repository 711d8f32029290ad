"""The multiple-choice knapsack: each layer offers points (cost, value), one is chosen per layer.

The summed value is to be least within a budget of the summed cost: moves of a re-plan, spare replicas of a
model, bytes of a front. Three ways, the first that does:

- where every step of every layer costs the same and none buys more than the one before it, the largest steps
  anywhere are the optimum;
- dynamic programming over the layers and the budget is exact for any points, in units of the costs' common
  divisor;
- for a budget of too many units, the better of the programme in coarser units (costs rounded up) and the
  greedy along the lower convex hulls of the layers' points, which is exact wherever the budget ends at a hull
  point.

Axes: L layers, K points of a layer, B units of budget.

References
----------
P. Sinha and A. A. Zoltners, "The multiple-choice knapsack problem", Operations Research 27 (1979).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from moeless_opt.problems.arrays import FloatArray, IntArray
from moeless_opt.problems.errors import InfeasibleError
from moeless_opt.solvers.core.stopping import NeverStop, Stop

__all__ = ["Choice", "choose_points", "hull_steps", "lower_hull"]


_MOST_CELLS = 60_000_000  # of the dynamic programme: points x budget


class Choice(NamedTuple):
    """A point of every layer.

    Parameters
    ----------
    point_L : array of int, shape [L]
        Its index.
    value, cost : float, int
        Sums over the layers.
    exact : bool
        Whether no other choice within the budget has a smaller value.
    """

    point_L: IntArray
    value: float
    cost: int
    exact: bool


def choose_points(
    cost: Sequence[ArrayLike], value: Sequence[ArrayLike], budget: int, *, stop: Stop | None = None
) -> Choice:
    """Choose a point of every layer.

    Parameters
    ----------
    cost, value : per layer, array of int and of float, shape [K] each
        The points, costs ascending from 0 or more; a value may be infinite: not to be had.
    budget : int
        Summed cost that is allowed.
    stop : Stop, optional
        When to be content with the greedy along the hulls.

    Returns
    -------
    Choice
        Of equal choices the one with the lower indices in the last layers.

    Raises
    ------
    InfeasibleError
        If no choice is within the budget.
    """
    stop = NeverStop() if stop is None else stop
    costs = [np.asarray(row, dtype=np.int64) for row in cost]
    values = [np.asarray(row, dtype=np.float64) for row in value]
    unit = max(int(np.gcd.reduce([_divisor(row) for row in costs])), 1)
    units = [row // unit for row in costs]
    most = min(budget // unit, sum(int(row[-1]) for row in units))
    first = [int(np.isfinite(row).argmax()) for row in values]
    fewest = sum(int(row[at]) for row, at in zip(units, first, strict=True))
    if fewest > most or not all(np.isfinite(row[at]) for row, at in zip(values, first, strict=True)):
        raise InfeasibleError(f"budget: {budget} units are not enough for any choice")
    exact = True
    found: list[IntArray | None] = [_largest_steps(units, values, most)]
    if found[0] is None:
        cells = sum(len(row) for row in units) * (most + 1)
        exact = cells <= _MOST_CELLS
        coarse = -(-cells // _MOST_CELLS)
        found = [_programme([-(-row // coarse) for row in units], values, most // coarse, stop)]
        exact = exact and found[0] is not None
    if not exact:
        found.append(_along_hulls(units, values, most))
    choices = [_choice(point_L, costs, values, exact) for point_L in found if point_L is not None]
    return min(choices, key=lambda choice: choice.value)


def _divisor(cost_K: IntArray) -> int:
    """The greatest common divisor; of evenly spaced costs two are enough."""
    even = len(cost_K) > 1 and bool((np.diff(cost_K) == cost_K[1] - cost_K[0]).all())
    return int(np.gcd.reduce(cost_K[:2] if even else cost_K))


def _choice(point_L: IntArray, costs: list[IntArray], values: list[FloatArray], exact: bool) -> Choice:
    value = float(sum(row[at] for row, at in zip(values, point_L, strict=True)))
    return Choice(point_L, value, sum(int(row[at]) for row, at in zip(costs, point_L, strict=True)), exact)


def _largest_steps(units: list[IntArray], values: list[FloatArray], most: int) -> IntArray | None:
    """Take the largest drops of value anywhere; None where steps cost differently or grow."""
    step = next((int(row[1]) for row in units if len(row) > 1), 0)
    if step <= 0 or any(row[0] != 0 or (np.diff(row) != step).any() for row in units):
        return None
    for row in values:
        if not np.isfinite(row).all() or not (np.diff(row, n=2) >= -1e-12 * row[0]).all():
            return None
    # Drops fall within a layer, so they are taken in its order.
    drop = np.concatenate([row[:-1] - row[1:] for row in values])
    layer = np.repeat(np.arange(len(values)), [len(row) - 1 for row in values])
    taken = np.argsort(-drop, kind="stable")[: most // step]
    return np.bincount(layer[taken[drop[taken] > 0]], minlength=len(values))


def _programme(units: list[IntArray], values: list[FloatArray], most: int, stop: Stop) -> IntArray | None:
    """Best value of the layers so far for every part of the budget; None if nothing fits, or told to stop."""
    best_B = np.zeros(most + 1)
    pick_LB = np.zeros((len(units), most + 1), dtype=np.int32)
    for layer, (row, some) in enumerate(zip(units, values, strict=True)):
        if stop():
            return None
        best_B, pick_LB[layer] = _with_layer(best_B, row, some)
    if not np.isfinite(best_B[most]):
        return None
    point_L = np.zeros(len(units), dtype=np.int64)
    left = most
    for layer in range(len(units) - 1, -1, -1):
        point_L[layer] = pick_LB[layer, left]
        left -= int(units[layer][point_L[layer]])
    return point_L


def _with_layer(best_B: FloatArray, units_K: IntArray, value_K: FloatArray) -> tuple[FloatArray, IntArray]:
    """One layer more: the best value for every part of the budget, and the (first) point that gives it."""
    most = len(best_B) - 1
    units_K = units_K[units_K <= most]
    step = int(units_K[1] - units_K[0]) if len(units_K) > 1 else 0
    if step > 0 and units_K[0] == 0 and (np.diff(units_K) == step).all():
        padded = np.concatenate([np.full(int(units_K[-1]), np.inf), best_B])
        with_BK = np.lib.stride_tricks.sliding_window_view(padded, int(units_K[-1]) + 1)[:, ::-step]
        with_BK = with_BK + value_K[: len(units_K)]
        pick_B = with_BK.argmin(axis=1)
        return np.take_along_axis(with_BK, pick_B[:, None], axis=1)[:, 0], pick_B
    next_B, pick_B = np.full(most + 1, np.inf), np.zeros(most + 1, dtype=np.int64)
    for point, (price, value) in enumerate(zip(units_K.tolist(), value_K.tolist(), strict=False)):
        with_B = best_B[: most + 1 - price] + value
        better = with_B < next_B[price:]
        np.copyto(next_B[price:], with_B, where=better)
        np.copyto(pick_B[price:], point, where=better)
    return next_B, pick_B


def _along_hulls(units: list[IntArray], values: list[FloatArray], most: int) -> IntArray:
    """Steps along the hulls while they fit, then single better points while those do."""
    point_L, steps = hull_steps(units, values)
    left = most - sum(int(row[at]) for row, at in zip(units, point_L, strict=True))
    ended = np.zeros(len(units), dtype=bool)
    for layer, point in steps:
        price = int(units[layer][point] - units[layer][point_L[layer]])
        ended[layer] |= price > left
        if not ended[layer]:
            point_L[layer] = point
            left -= price
    while True:
        best: tuple[float, int, int] | None = None
        for layer, (row, some) in enumerate(zip(units, values, strict=True)):
            price_K, gain_K = row - row[point_L[layer]], some[point_L[layer]] - some
            open_K = (price_K <= left) & (gain_K > 0.0)
            if open_K.any():
                rate_K = np.where(open_K, gain_K / np.maximum(price_K, 1e-300), -np.inf)
                key = (-float(rate_K.max()), layer, int(rate_K.argmax()))
                best = key if best is None or key < best else best
        if best is None:
            return point_L
        _, layer, point = best
        left -= int(units[layer][point] - units[layer][point_L[layer]])
        point_L[layer] = point


def hull_steps(
    cost: Sequence[ArrayLike], value: Sequence[ArrayLike]
) -> tuple[IntArray, list[tuple[int, int]]]:
    """Merge the layers' lower convex hulls: where they start, and steps (layer, point), steepest first.

    Parameters
    ----------
    cost, value : per layer, array of float, shape [K] each
        The points.

    Returns
    -------
    start_L : array of int, shape [L]
        The cheapest point of each hull.
    steps : list of (int, int)
        The value falls most per cost in the first; each layer's in the order of its hull.
    """
    start_L = np.zeros(len(cost), dtype=np.int64)
    ranked: list[tuple[float, int, int, int]] = []
    for layer, (row, some) in enumerate(zip(cost, value, strict=True)):
        cost_K, value_K = np.asarray(row, dtype=np.float64), np.asarray(some, dtype=np.float64)
        hull = lower_hull(cost_K, value_K)
        start_L[layer] = hull[0]
        for order, (a, b) in enumerate(pairwise(hull)):
            gain = float((value_K[a] - value_K[b]) / (cost_K[b] - cost_K[a]))
            ranked.append((-gain, layer, order, b))
    return start_L, [(layer, point) for _, layer, _, point in sorted(ranked)]


def lower_hull(cost_K: FloatArray, value_K: FloatArray) -> list[int]:
    """Indices of the lower convex hull of points, from the least cost to the least value."""
    hull: list[int] = []
    for i in np.lexsort((value_K, cost_K)):
        if not np.isfinite(value_K[i]):
            continue
        if hull and (value_K[i] >= value_K[hull[-1]] * (1 - 1e-12) or cost_K[i] == cost_K[hull[-1]]):
            continue
        while len(hull) > 1 and (value_K[hull[-2]] - value_K[hull[-1]]) * (cost_K[i] - cost_K[hull[-2]]) <= (
            value_K[hull[-2]] - value_K[i]
        ) * (cost_K[hull[-1]] - cost_K[hull[-2]]):
            hull.pop()
        hull.append(int(i))
    return hull
