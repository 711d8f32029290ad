"""What tokens pay in a layer: sources and tolls for the search and the shares, and bounds on the traffic."""

from __future__ import annotations

import numpy as np

from moeless_opt.problems.arrays import BoolArray, FloatArray, IntArray, SlotArray
from moeless_opt.problems.plan import Level, by_expert, cost_levels, levels_of, source_tokens, tree_below
from moeless_opt.problems.spec import Problem, held_LGE
from moeless_opt.solvers.core import near_homes
from moeless_opt.solvers.locality.search import TokenSources

__all__ = ["NEAR", "Costs", "traffic_bound"]

NEAR = ("traffic", "groups", "hops")
"""Priorities that are about where tokens are served."""
_NEXT = 1e-3  # what a later one of them weighs in the search beside the one before it
_GRID = 1 << 30  # parts of the dearest token in which tolls are counted, so that equals are equal


class Costs:
    """The costs of a problem's layers by its order of priorities.

    Parameters
    ----------
    problem : Problem
    order : sequence of str
        The priorities that are about nearness, first things first.
    home_LK : array of int, shape [L, K], optional
        Home of each group, where there are groups.
    """

    def __init__(self, problem: Problem, order: tuple[str, ...], home_LK: IntArray | None) -> None:
        self.problem, self.order = problem, order
        self.wide = int(problem.capacity_LG.max())
        topology = problem.topology
        node_G = topology.node_G
        cost_GG = topology.cost_GG
        self.cost_GG: FloatArray = (node_G[:, None] != node_G) * 1.0 if cost_GG is None else cost_GG
        levels = cost_levels(problem)
        if levels is None:
            levels = levels_of(tree_below(self.cost_GG)) or []
        self.levels: list[Level] = levels or [Level(np.zeros(len(node_G), dtype=np.int64), 0.0)]
        merged = cost_GG is None or problem.split != "nearest"
        rows = self.cost_GG if merged else np.eye(len(node_G))
        _, first, which_G = np.unique(rows, axis=0, return_index=True, return_inverse=True)
        rank = np.argsort(np.argsort(first))  # sources in the order of their first GPU: of nodes, the nodes
        self.class_G = rank[which_G.reshape(-1)]
        self._first_S = np.sort(first)
        self.price_SG = self.cost_GG[self._first_S]
        """What a token pays, by classes of GPUs that pay alike."""
        self.source_LSE = self.merge(source_tokens(problem))
        self.weight = {name: _NEXT**i for i, name in enumerate(order)}
        self.away_LEG: BoolArray | None = None
        if home_LK is not None:
            assert problem.groups is not None
            self.away_LEG = home_LK[:, problem.groups.group_E][:, :, None] != node_G

    @property
    def first(self) -> str:
        """What counts most; empty if nothing does."""
        return self.order[0] if self.order else ""

    def merge(self, tokens_LGE: FloatArray) -> FloatArray:
        """Tokens by classes of GPUs that pay alike, shape [L, S, E]."""
        out = np.zeros((len(tokens_LGE), len(self._first_S), tokens_LGE.shape[2]))
        for g, s in enumerate(self.class_G):
            out[:, s] += tokens_LGE[:, g]
        return out

    def _sources(self, tokens_SE: FloatArray, *, serves: bool, weight: float) -> TokenSources:
        group_SK = np.stack([level.group_G[self._first_S] for level in self.levels], axis=1)
        return TokenSources(
            tokens_SE=tokens_SE,
            price_SG=self.price_SG,
            serves=serves,
            levels=self.levels,
            group_SK=group_SK,
            weight=weight,
        )

    def sources(self, row: int, share_LGE: FloatArray | None) -> list[TokenSources]:
        """Where the tokens of a layer come from; the first of them are those that are served."""
        found = []
        if "traffic" in self.order or "hops" not in self.order:
            weight = self.weight.get("traffic", 0.0)
            found.append(self._sources(self.source_LSE[row], serves=True, weight=weight))
        if "hops" in self.order:
            assert share_LGE is not None
            tokens_SE = np.zeros_like(self.source_LSE[0])
            flow_LEE = self.problem.loads.flow_LEE
            assert flow_LEE is not None
            if row > 0:
                tokens_SE = self.merge((share_LGE[row - 1] @ flow_LEE[row - 1])[None])[0]
            found.append(self._sources(tokens_SE, serves=not found, weight=self.weight["hops"]))
        return found

    def toll_EG(self, row: int, slots_LGC: SlotArray, outside: float = 0.0) -> FloatArray:
        """What a served token pays on each GPU, wherever it comes from, shape [E, G].

        Parameters
        ----------
        outside : float
            What one served outside its group's home pays, beside what the order says.
        """
        problem = self.problem
        toll_EG = np.zeros((problem.experts, problem.topology.gpus))
        if self.away_LEG is not None:
            toll_EG += self.away_LEG[row] * (outside + self.weight.get("groups", 0.0))
        flow_LEE = problem.loads.flow_LEE
        if "hops" in self.order and flow_LEE is not None and row + 1 < problem.layers:
            held_GE = held_LGE(slots_LGC[row + 1 : row + 2], problem.experts)[0]
            ahead_GE = np.full(held_GE.shape, np.inf)  # from a GPU to the nearest host of the next expert
            for host in range(len(held_GE)):
                way_GE = np.where(held_GE[host], self.cost_GG[:, host, None], np.inf)
                ahead_GE = np.minimum(ahead_GE, way_GE)
            pays_EG = flow_LEE[row] @ np.where(np.isfinite(ahead_GE), ahead_GE, 0.0).T
            load_E = problem.load_LE[row][:, None]
            pays_EG = np.divide(pays_EG, load_E, out=np.zeros_like(pays_EG), where=load_E > 0)
            toll_EG += self.weight["hops"] * pays_EG
        unit = (float(toll_EG.max(initial=0.0)) or 1.0) / _GRID
        return np.asarray(np.rint(toll_EG / unit) * unit)

    def shares_of(self, slots_LGC: SlotArray, share_LGC: FloatArray) -> FloatArray:
        """Shares by GPU and expert, shape [L, G, E]."""
        return by_expert(self.problem, slots_LGC, share_LGC)


def traffic_bound(problem: Problem) -> FloatArray:
    """Cost of traffic that no placement is below, shape [L].

    At every level of a tree below the costs, a group of GPUs keeps at most its own tokens of the experts that
    it has room for: which ones is an assignment.
    """
    source_LGE = source_tokens(problem)
    levels = cost_levels(problem)
    if levels is None:
        assert problem.topology.cost_GG is not None
        levels = levels_of(tree_below(problem.topology.cost_GG)) or []
    room_LG = np.minimum(problem.capacity_LG, problem.experts)
    bound_L = np.zeros(problem.layers)
    for level in levels:
        kinds = np.unique(level.group_G)
        inside_BG = level.group_G == kinds[:, None]
        for row in range(problem.layers):
            own_BE = inside_BG @ source_LGE[row]
            room_B = np.minimum(inside_BG @ room_LG[row], problem.experts)
            if not own_BE.any():
                continue
            kept = float((near_homes(own_BE, room_B) * own_BE).sum())
            bound_L[row] += level.cost * max(float(own_BE.sum()) - kept, 0.0)
    hair_L = 1e-7 * source_LGE.sum((1, 2)) * sum(level.cost for level in levels)
    return np.asarray(np.maximum(bound_L - hair_L, 0.0))
