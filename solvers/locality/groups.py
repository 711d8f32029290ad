"""Groups of experts on nodes: all ways to put them there, which are few, and what each would cost.

With as many ways as can be looked at, the best node of every group is exact, and so are bounds: the time that
no plan beats which serves at most so many tokens outside their group's node, and the fewest such tokens in a
time.

Axes: W ways, K groups, N nodes.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from moeless_opt.problems.arrays import BoolArray, IntArray
from moeless_opt.problems.errors import InfeasibleError
from moeless_opt.problems.spec import Problem

__all__ = ["GroupWays"]

_MOST = 60_000
_BITS = 50


@lru_cache(maxsize=8)
def _all_ways(groups: int, nodes: int, alike: bool) -> IntArray | None:
    """Node of each group in every way, [W, K]; of like nodes, a new one is the next. None if many."""
    rows: list[tuple[int, ...]] = [()]
    for _ in range(groups):
        rows = [
            (*row, node)
            for row in rows
            for node in range(min(max(row, default=-1) + 2, nodes) if alike else nodes)
        ]
        if len(rows) > _MOST:
            return None
    return np.array(rows, dtype=np.int64).reshape(-1, groups)


class GroupWays:
    """The ways to give every group of one layer a node.

    Parameters
    ----------
    problem : Problem
        With groups.
    row : int
        Which layer.
    """

    def __init__(self, problem: Problem, row: int) -> None:
        groups, topology = problem.groups, problem.topology
        assert groups is not None
        self.nodes, self.row = topology.nodes, row
        self.load_K = np.bincount(groups.group_E, weights=problem.load_LE[row], minlength=groups.count)
        self.size_K = np.bincount(groups.group_E, minlength=groups.count)
        room_LG, node_G = np.minimum(problem.capacity_LG, problem.experts), topology.node_G
        self.room_N = np.bincount(node_G, weights=room_LG[row], minlength=self.nodes).astype(np.int64)
        usable_G = problem.usable_LG[row]
        self.speed_N = np.bincount(node_G, weights=topology.speed_G * usable_G, minlength=self.nodes)
        alike = bool((self.room_N == self.room_N[0]).all() and (self.speed_N == self.speed_N[0]).all())
        ways = _all_ways(groups.count, self.nodes, alike)
        self.exact = ways is not None
        """Whether all ways are looked at."""
        self.way_WK = self._greedy() if ways is None else ways
        on_WKN = self.way_WK[:, :, None] == np.arange(self.nodes)
        self.load_WN = np.einsum("wkn,k->wn", on_WKN, self.load_K)
        self.fits_W: BoolArray = (np.einsum("wkn,k->wn", on_WKN, self.size_K) <= self.room_N).all(1)

    def _greedy(self) -> IntArray:
        """Heavy groups first, each to the node that is least loaded and has room."""
        load_N, left_N = np.zeros(self.nodes), self.room_N.copy()
        way_K = np.zeros(len(self.load_K), dtype=np.int64)
        for group in np.lexsort((-self.load_K, -self.size_K)):
            time_N = (load_N + self.load_K[group]) / np.maximum(self.speed_N, 1e-300)
            way_K[group] = node = int(np.lexsort((time_N, left_N < self.size_K[group]))[0])
            load_N[node] += self.load_K[group]
            left_N[node] -= self.size_K[group]
        return way_K[None]

    def best(self, *, whole: bool) -> IntArray:
        """Node of each group so that the slowest node is as quick as can be, shape [K].

        Raises
        ------
        InfeasibleError
            If the groups must be whole and their experts fit in no way.
        """
        if whole and not self.fits_W.any():
            raise InfeasibleError(
                f"groups: their {self.size_K.sum()} experts do not fit on {self.nodes} nodes of "
                f"{self.room_N.min()} to {self.room_N.max()} slots with every group on one node"
                + ("" if self.exact else " (as far as was looked)")
            )
        time_W = (self.load_WN / np.maximum(self.speed_N, 1e-300)).max(1)
        time_W = np.where(self.fits_W | ~self.fits_W.any(), time_W, np.inf)
        spread_W = (self.load_WN**2).sum(1)
        return np.asarray(self.way_WK[np.lexsort((spread_W, time_W))[0]])

    def fewest_outside(self, tokens_per_speed: float) -> float:
        """Tokens that are served outside their group's node in any plan whose GPUs carry at most this."""
        if not self.exact:
            return 0.0
        return float(np.maximum(self.load_WN - tokens_per_speed * self.speed_N, 0.0).sum(1).min())

    def least_time(self, max_outside: float) -> float:
        """Tokens over speed that some GPU carries at least, with at most such a share served outside."""
        if not self.exact:
            return 0.0
        if max_outside <= 0:
            time_W = (self.load_WN / np.maximum(self.speed_N, 1e-300)).max(1)
            return float(time_W[self.fits_W].min(initial=np.inf))
        allowed = max_outside * float(self.load_K.sum())
        low, high = 0.0, float((self.load_WN / np.maximum(self.speed_N, 1e-300)).max(1).min())
        for _ in range(_BITS):
            middle = 0.5 * (low + high)
            low, high = (middle, high) if self.fewest_outside(middle) > allowed else (low, middle)
        return low
