"""One layer while replicas are placed in it under limits: who may go where, who must, and what evens out.

References
----------
Augmenting paths for assignment: Kuhn (1955). The placing order is longest processing time first: Graham
(1969).
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import numpy as np

from moeless_opt.problems.arrays import BoolArray, FloatArray, IntArray
from moeless_opt.problems.errors import InfeasibleError
from moeless_opt.solvers.core import Stop

__all__ = ["Board"]

SWAPS = 400
"""Swaps tried per layer at most."""


@dataclass(slots=True, kw_only=True)
class Board:
    """A layer and what is placed in it so far.

    Parameters
    ----------
    number : int
        The model's own number of the layer, for errors.
    piece_E : array, shape [E]
        Tokens of one replica of each expert.
    count_E, least_E : arrays of int, shape [E]
        Replicas wanted, and those that must exist.
    allowed_EG, pinned_EG : arrays of bool, shape [E, G]
        Pairs that no limit rules out, and those that must be.
    warm_EG : array of bool, shape [E, G]
        Where an expert is live and staying counts.
    capacity_G, domain_G : arrays of int, shape [G]
        Slots and failure domains.
    speed_G : array, shape [G]
        Relative speeds.
    spread_E : array of int, shape [E]
        Failure domains that each expert's replicas must reach.
    """

    number: int
    piece_E: FloatArray
    count_E: IntArray
    least_E: IntArray
    allowed_EG: BoolArray
    pinned_EG: BoolArray
    warm_EG: BoolArray
    capacity_G: IntArray
    domain_G: IntArray
    speed_G: FloatArray
    spread_E: IntArray
    held_EG: BoolArray = field(init=False)
    load_G: FloatArray = field(init=False)
    used_G: IntArray = field(init=False)

    def __post_init__(self) -> None:
        self.held_EG = np.zeros_like(self.allowed_EG)
        self.load_G = np.zeros(len(self.speed_G))
        self.used_G = np.zeros(len(self.speed_G), dtype=np.int64)

    def place_needed(self) -> None:
        """Place what is pinned, then every replica that must exist, the heaviest first.

        Raises
        ------
        InfeasibleError
            If a replica that must exist finds no place.
        """
        for expert, gpu in np.argwhere(self.pinned_EG):
            if self.used_G[gpu] >= self.capacity_G[gpu]:
                raise InfeasibleError(
                    f"limits.pinned: layer {self.number}, GPU {gpu} has {self.capacity_G[gpu]} slots, "
                    "more experts are pinned to it"
                )
            self._put(int(expert), int(gpu))
        for expert in self._heavy_first():
            for placed in range(int(self.held_EG[expert].sum()), int(self.least_E[expert])):
                gpu = self._choose(expert, needed=True)
                if gpu is not None:
                    self._put(expert, gpu)
                elif not self._force(expert):
                    raise InfeasibleError(
                        f"limits: layer {self.number}: no GPU was found for replica {placed + 1} of "
                        f"{self.least_E[expert]} of expert {expert} (slots, pins, bans, failure domains)"
                    )

    def place_wanted(self) -> None:
        """Place further replicas where they balance best and fit; then all pieces are what they are."""
        for expert in self._heavy_first():
            for _ in range(int(self.held_EG[expert].sum()), int(self.count_E[expert])):
                gpu = self._choose(expert, needed=False)
                if gpu is None:
                    break
                self._put(expert, gpu)

    def refill(self, held_EG: BoolArray) -> None:
        """Hold what is given, instead of what is held."""
        self.held_EG = held_EG.copy()
        self.used_G = held_EG.sum(0)
        self.load_G = self.piece_E @ held_EG

    def even_out(self, stop: Stop) -> None:
        """Swap replicas of the busiest GPU while the largest time falls."""
        # Pieces of experts that got fewer replicas than counted are larger now.
        self.piece_E = self.piece_E * self.count_E / np.maximum(self.held_EG.sum(1), 1)
        for gpu, held_E in enumerate(self.held_EG.T):
            self.load_G[gpu] = sum(self.piece_E[held_E].tolist())
        if self.warm_EG.any():
            return
        for _ in range(SWAPS):
            if stop() or not self._swap():
                return

    def _heavy_first(self) -> list[int]:
        return [int(e) for e in np.argsort(-self.piece_E, kind="stable")]

    def _put(self, expert: int, gpu: int) -> None:
        self.held_EG[expert, gpu] = True
        self.used_G[gpu] += 1
        self.load_G[gpu] += self.piece_E[expert]

    def _take(self, expert: int, gpu: int) -> None:
        self.held_EG[expert, gpu] = False
        self.used_G[gpu] -= 1
        self.load_G[gpu] -= self.piece_E[expert]

    def _free_G(self, expert: int) -> BoolArray:
        """GPUs on which the expert may be and is not, shape [G]."""
        return np.asarray(self.allowed_EG[expert] & ~self.held_EG[expert])

    def _new_domain_G(self, expert: int) -> BoolArray | None:
        """GPUs of failure domains that the expert has to reach yet; None if it reaches enough."""
        if self.spread_E[expert] <= 1:
            return None
        reached = np.unique(self.domain_G[self.held_EG[expert]])
        return None if len(reached) >= self.spread_E[expert] else ~np.isin(self.domain_G, reached)

    def _choose(self, expert: int, *, needed: bool) -> int | None:
        """The GPU for one more replica: with room, in a new domain if one is missing, warm, least loaded."""
        free_G = self._free_G(expert) & (self.used_G < self.capacity_G)
        if needed and (new_G := self._new_domain_G(expert)) is not None:
            free_G &= new_G
        if not free_G.any():
            return None
        warm_G = free_G & self.warm_EG[expert]
        if warm_G.any():
            free_G = warm_G
        time_G = (self.load_G + self.piece_E[expert]) / self.speed_G
        return int(np.where(free_G, time_G, np.inf).argmin())

    def _force(self, expert: int) -> bool:
        """Place a replica that must exist by moving others along a shortest augmenting path."""
        free_G = self._free_G(expert) & (self.capacity_G > 0)
        if (new_G := self._new_domain_G(expert)) is not None:
            free_G &= new_G
        starts = np.flatnonzero(free_G).tolist()
        came: dict[int, tuple[int, int] | None] = dict.fromkeys(starts)
        queue = deque(starts)
        while queue:
            gpu = queue.popleft()
            if self.used_G[gpu] < self.capacity_G[gpu]:
                self._shift(expert, gpu, came)
                return True
            for other in np.flatnonzero(self.held_EG[:, gpu] & ~self.pinned_EG[:, gpu]).tolist():
                others = np.array([other])
                keeps_G = self._keeps_spread(others, np.array([gpu]), np.arange(len(self.used_G)))[0]
                for to in np.flatnonzero(self._free_G(other) & keeps_G).tolist():
                    if to not in came:
                        came[to] = (gpu, other)
                        queue.append(to)
        return False

    def _shift(self, expert: int, gpu: int, came: dict[int, tuple[int, int] | None]) -> None:
        while (step := came[gpu]) is not None:
            back, moved = step
            self._take(moved, back)
            self._put(moved, gpu)
            gpu = back
        self._put(expert, gpu)

    def _keeps_spread(self, expert_X: IntArray, gpu_X: IntArray, to_Y: IntArray) -> BoolArray:
        """Whether experts that leave a GPU for another still reach as many domains as they can, [X, Y]."""
        here_X, there_Y = self.domain_G[gpu_X], self.domain_G[to_Y]
        if not (self.spread_E > 1).any():
            return np.ones((len(here_X), len(there_Y)), dtype=np.bool_)
        in_XD = np.zeros((len(expert_X), int(self.domain_G.max()) + 1), dtype=np.int64)
        row, gpu = np.nonzero(self.held_EG[expert_X])
        np.add.at(in_XD, (row, self.domain_G[gpu]), 1)
        enough_X = np.minimum(self.spread_E[expert_X], in_XD.sum(1))
        left_X = (in_XD > 0).sum(1) - (in_XD[np.arange(len(here_X)), here_X] == 1)
        reach = left_X[:, None] + (in_XD[:, there_Y] == 0)
        return np.asarray((here_X[:, None] == there_Y) | (reach >= enough_X[:, None]))

    def _swap(self) -> bool:
        """Make the best move or swap between the busiest GPU and another; False if none helps."""
        time_G = self.load_G / self.speed_G
        worst = int(time_G.argmax())
        a_A = np.flatnonzero(self.held_EG[:, worst] & ~self.pinned_EG[:, worst])
        back_E = self._free_back(worst)
        # What the other GPU gives in return, in the order in which ties are broken: nothing, where it has a
        # free slot, then its experts.
        gives_GE = (self.held_EG & ~self.pinned_EG & back_E[:, None]).T
        gpu_R, b_R = np.nonzero(np.column_stack([self.used_G < self.capacity_G, gives_GE]))
        b_R = b_R - 1
        shift_AR = self.piece_E[a_A][:, None] - np.where(b_R >= 0, self.piece_E[b_R], 0.0)
        after_AR = np.maximum(
            time_G[worst] - shift_AR / self.speed_G[worst], time_G[gpu_R] + shift_AR / self.speed_G[gpu_R]
        )
        fits_AG = self.allowed_EG[a_A] & ~self.held_EG[a_A]
        good_AR = (shift_AR > 0) & fits_AG[:, gpu_R] & (gpu_R != worst)
        if (self.spread_E > 1).any():
            at_A, here = np.full(len(a_A), worst), np.array([worst])
            good_AR &= self._keeps_spread(a_A, at_A, np.arange(len(time_G)))[:, gpu_R]
            good_AR &= (b_R < 0) | self._keeps_spread(b_R, gpu_R, here)[:, 0]
        good_AR &= after_AR < time_G[worst] * (1 - 1e-9)
        if not good_AR.any():
            return False
        a, r = divmod(int(np.where(good_AR, after_AR, np.inf).argmin()), len(gpu_R))
        expert, gpu, other = int(a_A[a]), int(gpu_R[r]), int(b_R[r])
        self._take(expert, worst)
        if other >= 0:
            self._take(other, gpu)
            self._put(other, worst)
        self._put(expert, gpu)
        return True

    def _free_back(self, gpu: int) -> BoolArray:
        """Experts that may be on a GPU and are not, shape [E]."""
        return self.allowed_EG[:, gpu] & ~self.held_EG[:, gpu]
