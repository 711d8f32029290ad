"""Groups of experts on nodes: all ways to put them there, which are few, and what each would cost.

With as many ways as can be looked at, the best node of every group is exact, and so are bounds: the time that
no plan beats which serves at most so many tokens outside their group's node, and the fewest such tokens in a
time.

Axes: W ways, K groups, N nodes.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np

from moeless_opt.problems.arrays import BoolArray, FloatArray, IntArray
from moeless_opt.problems.errors import InfeasibleError
from moeless_opt.problems.spec import Problem

__all__ = ["GroupWay", "GroupWays", "idle_elsewhere"]

_MOST = 60_000
_BITS = 50
_NEVER = 1 << 40  # moves to a node where a group cannot be


class GroupWay(NamedTuple):
    """A node for each group: replicas that it lacks there at least, and tokens over speed of its slowest."""

    moves: int
    time: float
    node_K: IntArray


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


def idle_elsewhere(problem: Problem) -> bool:
    """Whether replicas outside their kept group's home may be there and serve nothing."""
    groups, free = problem.groups, problem.split == "fractional" and problem.loads.shape[0] == 1
    kept = groups is not None and groups.max_outside <= 0
    return kept and free and problem.limits.max_replicas is None


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
        self.load_E, self.group_E = problem.load_LE[row], groups.group_E
        self.size_K = np.bincount(groups.group_E, minlength=groups.count)
        room_LG, node_G = np.minimum(problem.capacity_LG, problem.experts), topology.node_G
        self.room_N = np.bincount(node_G, weights=room_LG[row], minlength=self.nodes).astype(np.int64)
        usable_G = problem.usable_LG[row]
        self.speed_N = np.bincount(node_G, weights=topology.speed_G * usable_G, minlength=self.nodes)
        fast_G = np.where(usable_G, topology.speed_G, 0.0)
        self.fastest_N = np.array([fast_G[node_G == n].max(initial=0.0) for n in range(self.nodes)])
        alike = bool((self.room_N == self.room_N[0]).all() and (self.speed_N == self.speed_N[0]).all())
        self._need_of(problem)
        self.alike = alike = alike and bool((self.miss_KN < _NEVER).all()) and not self.pins_KN.any()
        ways = _all_ways(groups.count, self.nodes, alike)
        self.exact = ways is not None
        """Whether all ways are looked at."""
        if alike:  # any of them may stand for any
            self.fastest_N[:] = self.fastest_N.max()
        self.way_WK = self._greedy() if ways is None else ways
        on_WKN = self.way_WK[:, :, None] == np.arange(self.nodes)
        self.load_WN = np.einsum("wkn,k->wn", on_WKN, self.load_K)
        left_WN = self.room_N - np.einsum("wkn,kn->wn", ~on_WKN, self.pins_KN)  # pins elsewhere take room
        self.may_W: BoolArray = (np.einsum("wkn,k->wn", on_WKN, self.size_K) <= left_WN).all(1)
        self.fits_W: BoolArray = (np.einsum("wkn,k->wn", on_WKN, self.need_K) <= left_WN).all(1)
        self.fits_W &= (self.miss_KN[np.arange(groups.count), self.way_WK] < _NEVER).all(1)
        if problem.split == "equal":  # else replicas elsewhere may serve nothing
            self.may_W &= self.fits_W

    def _need_of(self, problem: Problem) -> None:
        """Slots that each group needs, and the fewest moves that bring it whole to each node."""
        groups, limits, topology = problem.groups, problem.limits, problem.topology
        assert groups is not None
        spread_E = problem.spread_LE[self.row]
        least_E = np.maximum(spread_E, limits.min_replicas)
        self.need_K = np.bincount(groups.group_E, weights=least_E, minlength=groups.count).astype(np.int64)
        banned_EG, pinned_EG = (problem.pairs_LEG(key)[self.row] for key in ("forbidden", "pinned"))
        open_EG = ~banned_EG & problem.usable_LG[self.row]
        live_EG = np.zeros_like(open_EG)
        if problem.current is not None:
            live_EG = problem.current.held_LGE[self.row].T & open_EG
        miss_EN = np.zeros((problem.experts, self.nodes), dtype=np.int64)
        idle = idle_elsewhere(problem)
        for node in range(self.nodes):
            here_G = topology.node_G == node
            domains = np.unique(topology.failure_domain_G[here_G])
            reach_E = np.zeros(problem.experts, dtype=np.int64)
            for domain in domains:
                reach_E += open_EG[:, here_G & (topology.failure_domain_G == domain)].any(1)
            hosts_E = open_EG[:, here_G].sum(1)
            never_E = (hosts_E < least_E) | (reach_E < spread_E)
            never_E |= pinned_EG[:, ~here_G].any(1) & (not idle)
            come_EG = pinned_EG & ~live_EG
            lacks_E = np.maximum(least_E - live_EG[:, here_G].sum(1), come_EG[:, here_G].sum(1))
            lacks_E = np.maximum(lacks_E, 0) + come_EG[:, ~here_G].sum(1)
            miss_EN[:, node] = np.where(never_E, _NEVER, lacks_E)
        self.miss_KN = np.zeros((groups.count, self.nodes), dtype=np.int64)
        np.add.at(self.miss_KN, groups.group_E, miss_EN)
        self.pins_KN = np.zeros((groups.count, self.nodes), dtype=np.int64)
        on_NG = topology.node_G == np.arange(self.nodes)[:, None]
        np.add.at(self.pins_KN, groups.group_E, pinned_EG.astype(np.int64) @ on_NG.T.astype(np.int64))

    def _greedy(self) -> IntArray:
        """Heavy groups first, each to the node that is least loaded and has room."""
        load_N, left_N = np.zeros(self.nodes), self.room_N.copy()
        way_K = np.zeros(len(self.load_K), dtype=np.int64)
        for group in np.lexsort((-self.load_K, -self.size_K)):
            time_N = (load_N + self.load_K[group]) / np.maximum(self.speed_N, 1e-300)
            shut_N = (left_N < self.need_K[group]) | (self.miss_KN[group] >= _NEVER)
            way_K[group] = node = int(np.lexsort((time_N, shut_N))[0])
            load_N[node] += self.load_K[group]
            left_N[node] -= self.need_K[group]
        return np.stack([way_K, self.miss_KN.argmin(1)])  # the other one stays where it can

    def best(self, *, whole: bool) -> IntArray:
        """Node of each group so that the slowest node is as quick as can be, shape [K].

        Raises
        ------
        InfeasibleError
            If the groups must be whole and their experts fit in no way.
        """
        if whole:
            self.check_fits()
        time_W = (self.load_WN / np.maximum(self.speed_N, 1e-300)).max(1)
        time_W = np.where(self.fits_W | ~self.fits_W.any(), time_W, np.inf)
        spread_W = (self.load_WN**2).sum(1)
        return np.asarray(self.way_WK[np.lexsort((spread_W, time_W))[0]])

    def check_fits(self) -> None:
        """Raise if no way keeps every group on one node.

        Raises
        ------
        InfeasibleError
            If their experts fit in no way.
        """
        if self.fits_W.any():
            return
        shut = (self.miss_KN >= _NEVER).all(1)
        looked = "" if self.exact else " (as far as was looked)"
        if shut.any():
            raise InfeasibleError(
                f"groups: group {int(shut.argmax())} can be on no node as a whole with the limits on pairs, "
                "replicas and failure domains"
            )
        raise InfeasibleError(
            f"groups: their {self.size_K.sum()} experts do not fit on {self.nodes} nodes of "
            f"{self.room_N.min()} to {self.room_N.max()} slots with every group on one node{looked}"
        )

    def front(self, tolerance: float) -> list[GroupWay]:
        """Ways from the fewest moves to the quickest, each quicker than the one before; all of them fit.

        Parameters
        ----------
        tolerance : float
            Of the last one's time: of ways that are so near the quickest, that of the fewest moves.
        """
        time_W = (self.load_WN / np.maximum(self.speed_N, 1e-300)).max(1)
        rows = np.flatnonzero(self.fits_W)
        if not len(rows):
            return []
        wanted = float(time_W[rows].min()) * (1 + tolerance)
        cost_W = self._fewest_moves()
        found: list[GroupWay] = []
        best = _NEVER
        for w in rows[np.lexsort((cost_W[rows], np.maximum(time_W[rows], wanted)))].tolist():
            if cost_W[w] >= best:  # a bound on its moves
                continue
            moves, node_K = self._placed(w)
            if moves < best:
                best = moves
                if found and max(found[-1].time, wanted) >= time_W[w]:
                    found.pop()
                found.append(GroupWay(moves, float(time_W[w]), node_K))
        return found[::-1]

    def every(self, most: int) -> list[GroupWay]:
        """All ways that fit, on whichever node; none where there are more than this."""
        groups = len(self.load_K)
        if self.nodes**groups > most:
            return []
        found = []
        for row in np.ndindex(*(self.nodes,) * groups):
            on_KN = np.array(row)[:, None] == np.arange(self.nodes)
            moves = int(self.miss_KN[on_KN].sum())
            left_N = self.room_N - (self.pins_KN * ~on_KN).sum(0)
            if moves < _NEVER and (self.need_K @ on_KN <= left_N).all():
                time = float((self.load_K @ on_KN / np.maximum(self.speed_N, 1e-300)).max())
                found.append(GroupWay(moves, time, np.array(row, dtype=np.int64)))
        return found

    def _fewest_moves(self) -> IntArray:
        """Moves that each way needs at least, with alike nodes in any order, shape [W]."""
        groups = len(self.load_K)
        if not (self.alike and self.exact):
            return np.asarray(self.miss_KN[np.arange(groups), self.way_WK].sum(1))
        on_WKN = self.way_WK[:, :, None] == np.arange(self.nodes)
        lacks_WNM = np.einsum("wkn,km->wnm", on_WKN.astype(np.int64), self.miss_KN)
        return np.asarray(lacks_WNM.min(2).sum(1))

    def _placed(self, way: int) -> tuple[int, IntArray]:
        """The fewest moves of a way, and the node of each group then; nodes that are alike change places."""
        node_K = self.way_WK[way]
        if self.alike and self.exact:
            from ortools.graph.python.linear_sum_assignment import SimpleLinearSumAssignment

            lacks_NM = np.zeros((self.nodes, self.nodes), dtype=np.int64)
            np.add.at(lacks_NM, node_K, self.miss_KN)
            solver = SimpleLinearSumAssignment()
            left, right = (i.ravel() for i in np.indices(lacks_NM.shape))
            solver.add_arcs_with_cost(left, right, lacks_NM.ravel())
            if solver.solve() != solver.OPTIMAL:
                raise AssertionError("every node may take every place")
            node_K = np.array([solver.right_mate(n) for n in range(self.nodes)])[node_K]
        return int(self.miss_KN[np.arange(len(node_K)), node_K].sum()), np.asarray(node_K, dtype=np.int64)

    def fewest_outside(self, tokens_per_speed: float, *, slots: bool = False) -> float:
        """Tokens that are served outside their group's node in any plan whose GPUs carry at most this.

        Parameters
        ----------
        slots : bool
            Whether to look at the slots of the nodes as well, which takes longer: a replica keeps at most
            what its GPU may carry, so that a node of C slots keeps at most the C largest of such pieces.
        """
        if not self.exact:
            return 0.0
        if slots:
            kept_WN = np.minimum(self._kept_by_slots(tokens_per_speed), tokens_per_speed * self.speed_N)
            return float(np.maximum(self.load_WN - kept_WN, 0.0).sum(1).min())
        return float(np.maximum(self.load_WN - tokens_per_speed * self.speed_N, 0.0).sum(1).min())

    def _kept_by_slots(self, tokens_per_speed: float) -> FloatArray:
        """Most tokens that each node's slots keep of the groups at home there, shape [W, N]."""
        on_WKN = self.way_WK[:, :, None] == np.arange(self.nodes)
        bit_K = 1 << np.arange(len(self.load_K), dtype=np.int64)  # few groups: all their ways are looked at
        set_WN = np.einsum("wkn,k->wn", on_WKN, bit_K)
        same = bool((self.room_N == self.room_N[0]).all() and (self.fastest_N == self.fastest_N[0]).all())
        kept_WN = np.empty_like(self.load_WN)
        for columns in [np.arange(self.nodes)] if same else np.arange(self.nodes)[:, None]:
            node = int(columns[0])
            most = tokens_per_speed * float(self.fastest_N[node])
            sets_S, which = np.unique(set_WN[:, columns], return_inverse=True)
            inside_SK = (sets_S[:, None] & bit_K) > 0
            kept_S = np.array(
                [self._largest(self.load_E[one[self.group_E]], most, node) for one in inside_SK]
            )
            kept_WN[:, columns] = kept_S[which.reshape(len(set_WN), -1)]
        return np.asarray(kept_WN)

    def _largest(self, load_X: FloatArray, most: float, node: int) -> float:
        """Sum of the largest pieces of experts' tokens, none above `most`, one for each slot of a node."""
        room = int(self.room_N[node])
        whole_X = np.minimum(np.floor(load_X / most), room) if most > 0 else np.zeros_like(load_X)
        count = int(min(whole_X.sum(), room))
        rest_X = np.sort(load_X - whole_X * most)[::-1]
        return count * most + float(rest_X[: room - count].sum())

    def least_time(self, max_outside: float) -> float:
        """Tokens over speed that some GPU carries at least, with at most such a share served outside."""
        if not self.exact:
            return 0.0
        if max_outside <= 0:
            time_W = (self.load_WN / np.maximum(self.speed_N, 1e-300)).max(1)
            return float(time_W[self.may_W].min(initial=np.inf))
        allowed = max_outside * float(self.load_K.sum())
        low, high = 0.0, float((self.load_WN / np.maximum(self.speed_N, 1e-300)).max(1).min())
        for _ in range(_BITS):
            middle = 0.5 * (low + high)
            low, high = (middle, high) if self.fewest_outside(middle) > allowed else (low, middle)
        return low
