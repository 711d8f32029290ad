"""The limits of one layer, compiled: which pairs may or must be, how many replicas, in how many domains."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moeless_opt.problems.arrays import BoolArray, IntArray
from moeless_opt.problems.errors import InfeasibleError
from moeless_opt.problems.plan import least_and_most
from moeless_opt.problems.spec import Problem

__all__ = ["Rules", "rules_of"]

Pair = tuple[int, int]
"""Expert, GPU."""


@dataclass(slots=True, kw_only=True, eq=False)
class Rules:
    """What one layer may hold.

    Parameters
    ----------
    number : int
        The model's own number of the layer, for errors.
    allowed_EG, pinned_EG : arrays of bool, shape [E, G]
        Pairs that may be, and those that must be.
    least_E, most_E : arrays of int, shape [E]
        Replicas that an expert must have, and may have.
    total : int
        Replicas that the layer may have.
    capacity_G, domain_G : arrays of int, shape [G]
        Slots, and failure domains as numbers from 0.
    spread_E : array of int, shape [E]
        Domains that the replicas of each expert must reach.
    """

    number: int
    allowed_EG: BoolArray
    pinned_EG: BoolArray
    least_E: IntArray
    most_E: IntArray
    total: int
    capacity_G: IntArray
    domain_G: IntArray
    spread_E: IntArray

    @property
    def spreads(self) -> bool:
        """Whether any expert must be in more than one domain."""
        return bool((self.spread_E > 1).any())

    def keeps(self, held_EG: BoolArray | IntArray) -> bool:
        """Whether a placement obeys everything; as a mask, or as slots where second copies may be."""
        count_E, here_EG = held_EG.sum(1), held_EG > 0
        return bool(
            (count_E >= self.least_E).all()
            and (count_E <= self.most_E).all()
            and count_E.sum() <= self.total
            and (held_EG.sum(0) <= self.capacity_G).all()
            and not (here_EG & ~self.allowed_EG).any()
            and not (self.pinned_EG & ~here_EG).any()
            and (self.reach_E(here_EG) >= self.spread_E).all()
        )

    def reach_E(self, held_EG: BoolArray) -> IntArray:
        """Failure domains that each expert reaches, shape [E]."""
        return np.asarray((self.domains_ED(held_EG) > 0).sum(1))

    def domains_ED(self, held_EG: BoolArray | IntArray) -> IntArray:
        """Replicas of each expert in each domain, shape [E, D]."""
        member_GD = self.domain_G[:, None] == np.arange(int(self.domain_G.max(initial=0)) + 1)
        return np.asarray(held_EG.astype(np.int64) @ member_GD)

    def may_drop_EG(self, held_EG: BoolArray) -> BoolArray:
        """Replicas without which the rules still hold, each by itself, shape [E, G]."""
        drop_EG = held_EG & ~self.pinned_EG & (held_EG.sum(1) > self.least_E)[:, None]
        if self.spreads:
            in_ED = self.domains_ED(held_EG)
            alone_EG = in_ED[:, self.domain_G] == 1
            drop_EG &= ~alone_EG | ((in_ED > 0).sum(1) > self.spread_E)[:, None]
        return np.asarray(drop_EG)

    def may_move(self, held_EG: BoolArray, expert_X: IntArray, gpu_X: IntArray, to_Y: IntArray) -> BoolArray:
        """Whether replicas of experts on GPUs may go to others, as far as limits say, shape [X, Y]."""
        may_XY = self.allowed_EG[expert_X][:, to_Y] & ~self.pinned_EG[expert_X, gpu_X][:, None]
        if self.spreads:
            in_XD = self.domains_ED(held_EG)[expert_X]
            here_X, there_Y = self.domain_G[gpu_X], self.domain_G[to_Y]
            left_X = (in_XD > 0).sum(1) - (in_XD[np.arange(len(here_X)), here_X] == 1)
            reach_XY = left_X[:, None] + (in_XD[:, there_Y] == 0)
            may_XY &= (here_X[:, None] == there_Y) | (reach_XY >= self.spread_E[expert_X][:, None])
        return np.asarray(may_XY)

    def permits(self, home: Sequence[Sequence[int]], adds: Sequence[Pair], drops: Sequence[Pair]) -> bool:
        """Whether a placement that obeys still does after a change; `home` has the GPUs of each expert."""
        if len(adds) > len(drops) and sum(map(len, home)) + len(adds) - len(drops) > self.total:
            return False
        for expert, gpu in adds:
            if not self.allowed_EG[expert, gpu]:
                return False
        for expert in {pair[0] for pair in (*adds, *drops)}:
            new = [gpu for one, gpu in adds if one == expert]
            gone = [gpu for one, gpu in drops if one == expert]
            count = len(home[expert]) + len(new) - len(gone)
            if not self.least_E[expert] <= count <= self.most_E[expert]:
                return False
            if any(self.pinned_EG[expert, gpu] for gpu in gone):
                return False
            if self.spread_E[expert] > 1 and gone:
                stay = [gpu for gpu in home[expert] if gpu not in gone]
                if len({int(self.domain_G[gpu]) for gpu in (*stay, *new)}) < self.spread_E[expert]:
                    return False
        return True


def rules_of(problem: Problem, total_L: IntArray | None = None) -> list[Rules]:
    """The limits of every layer.

    Parameters
    ----------
    problem : Problem
        Limits on replicas, pairs and domains; those on all layers together count for each by itself.
    total_L : array of int, shape [L], optional
        Replicas that each layer may have at most, where something says so.

    Raises
    ------
    InfeasibleError
        If an expert needs more replicas than it may have.
    """
    limits, topology = problem.limits, problem.topology
    pinned_LEG = problem.pairs_LEG("pinned")
    allowed_LEG = ~problem.pairs_LEG("forbidden") & (problem.capacity_LG > 0)[:, None, :]
    domain_G = np.unique(topology.failure_domain_G, return_inverse=True)[1].reshape(-1)
    least_LE, most_LE = least_and_most(problem)
    short = np.argwhere(least_LE > most_LE)
    if short.size:
        row, expert = (int(i) for i in short[0])
        raise InfeasibleError(
            f"limits: expert {expert} of layer {problem.loads.layers[row]} needs "
            f"{least_LE[row, expert]} replicas, "
            f"{most_LE[row, expert]} are possible (pins, bans, max_replicas, GPUs with slots)"
        )
    room_L = problem.capacity_LG.sum(1)
    if limits.max_layer_replicas is not None:
        room_L = np.minimum(room_L, limits.max_layer_replicas)
    if total_L is not None:
        room_L = np.minimum(room_L, total_L)
    return [
        Rules(
            number=problem.loads.layers[row],
            allowed_EG=allowed_LEG[row],
            pinned_EG=pinned_LEG[row],
            least_E=least_LE[row],
            most_E=most_LE[row],
            total=int(room_L[row]),
            capacity_G=problem.capacity_LG[row],
            domain_G=domain_G,
            spread_E=problem.spread_LE[row],
        )
        for row in range(problem.layers)
    ]
