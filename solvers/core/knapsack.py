"""Spend one budget of moves on the layers that gain most: a multiple-choice knapsack.

Each layer offers points (moves, time); one is chosen per layer so that the summed time is least and the
summed cost within the budget. Small integer budgets are solved exactly by dynamic programming over the
layers; larger ones by the greedy on the lower convex hull of each layer's points, best gain per cost first,
which is exact wherever the budget ends at a hull point.

References
----------
Sinha and Zoltners (1979), "The multiple-choice knapsack problem".
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

__all__ = ["choose_points"]

_EXACT_CELLS = 4_000_000  # layers x budget up to which the dynamic programme runs


def choose_points(
    moves: Sequence[Sequence[int]],
    time: Sequence[Sequence[float]],
    cost_L: Sequence[int],
    budget: int,
) -> list[int]:
    """Choose a point of every layer.

    Parameters
    ----------
    moves, time : per layer, sequences of equal length
        Points: replicas moved, ascending, and the largest GPU time then.
    cost_L : sequence of int
        Cost of one move in each layer (1, or bytes of a replica).
    budget : int
        Summed cost that is allowed. Every layer's first point must fit together.

    Returns
    -------
    list of int
        Index of the chosen point per layer.
    """
    cost = [[one * price for one in row] for row, price in zip(moves, cost_L, strict=True)]
    unit = int(np.gcd.reduce([one for row in cost for one in row] or [1])) or 1
    cost = [[one // unit for one in row] for row in cost]
    budget = min(budget // unit, sum(row[-1] for row in cost))
    if len(cost) * (budget + 1) <= _EXACT_CELLS:
        return _exact(cost, time, budget)
    return _greedy(cost, time, budget)


def _exact(cost: list[list[int]], time: Sequence[Sequence[float]], budget: int) -> list[int]:
    best_B: NDArray[np.float64] = np.zeros(budget + 1)
    picks: list[NDArray[np.int64]] = []
    for row, times in zip(cost, time, strict=True):
        value_PB = np.full((len(row), budget + 1), np.inf)
        for point, (price, seconds) in enumerate(zip(row, times, strict=True)):
            if price <= budget:
                value_PB[point, price:] = best_B[: budget + 1 - price] + seconds
        pick_B = value_PB.argmin(axis=0)
        best_B = value_PB[pick_B, np.arange(budget + 1)]
        picks.append(pick_B)
    left, chosen = budget, []
    for row, pick_B in zip(reversed(cost), reversed(picks), strict=True):
        point = int(pick_B[left])
        left -= row[point]
        chosen.append(point)
    return chosen[::-1]


def _greedy(cost: list[list[int]], time: Sequence[Sequence[float]], budget: int) -> list[int]:
    chosen = [0] * len(cost)
    left = budget - sum(row[0] for row in cost)
    while True:
        best: tuple[float, int, int] | None = None
        for layer, (row, times) in enumerate(zip(cost, time, strict=True)):
            at = chosen[layer]
            for point in range(at + 1, len(row)):
                price, gain = row[point] - row[at], times[at] - times[point]
                if price <= left and gain > 0.0:
                    key = (-gain / max(price, 1e-300), layer, point)
                    best = key if best is None or key < best else best
        if best is None:
            return chosen
        _, layer, point = best
        left -= cost[layer][point] - cost[layer][chosen[layer]]
        chosen[layer] = point
