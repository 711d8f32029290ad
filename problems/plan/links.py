"""Tokens between GPUs: what a plan sends over each link, what that costs, and how little it could be.

A token of a source GPU is served by the nearest replica that has room for it: of all ways to bring the tokens
of the sources to the GPUs that serve them (which a plan's shares give), the cheapest counts. Costs of a tree,
where a token pays for the dearest group that it leaves, have a closed form: at every level a group keeps as
many of its own tokens as it serves. Other costs are a transport problem for each expert (a flow).
With a split by the nearest replica, tokens go where that rule sends them.

Axes: S source GPUs, G serving GPUs, B groups of a level.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moeless_opt.problems.arrays import BoolArray, FloatArray, IntArray, Record, SlotArray, frozen
from moeless_opt.problems.errors import ProblemError
from moeless_opt.problems.spec import Problem

__all__ = [
    "Level",
    "Locality",
    "by_expert",
    "cost_levels",
    "hop_sources",
    "levels_of",
    "link_costs",
    "outside_tokens",
    "source_tokens",
    "token_flows",
    "tree_below",
]

_SAME = 1e-12
_UNITS = float(1 << 34)


@dataclass(frozen=True, slots=True)
class Level:
    """Groups of GPUs, and what a token pays for leaving one, beyond leaving the groups inside it."""

    group_G: IntArray
    cost: float


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Locality(Record):
    """Where a plan's tokens are served, and how near the best that is.

    No plan that does as well in what the priorities put before it has less than the sum of a bound.

    Parameters
    ----------
    traffic_L, traffic_bound_L : arrays, shape [L]
        Cost of the tokens that leave their source (by default, tokens that leave their node), and a bound.
    outside_L, outside_bound_L : arrays, shape [L], optional
        Tokens served outside the node of their group, where the problem has groups.
    hops_L, hops_bound_L : arrays, shape [L], optional
        Cost of following tokens from the layer before, where the loads have a flow; 0 in the first layer.
    """

    traffic_L: FloatArray
    traffic_bound_L: FloatArray
    outside_L: FloatArray | None = None
    outside_bound_L: FloatArray | None = None
    hops_L: FloatArray | None = None
    hops_bound_L: FloatArray | None = None

    def __post_init__(self) -> None:
        for key in self.__dataclass_fields__:
            if getattr(self, key) is not None:
                object.__setattr__(self, key, frozen(np.asarray(getattr(self, key), dtype=np.float64)))

    def __repr__(self) -> str:
        parts = []
        for name in ("traffic", "outside", "hops"):
            value_L, bound_L = getattr(self, f"{name}_L"), getattr(self, f"{name}_bound_L")
            if value_L is not None and bound_L is not None:
                parts.append(f"{name} {value_L.sum():.6g} (least {bound_L.sum():.6g})")
        return f"Locality({', '.join(parts)})"


def cost_levels(problem: Problem) -> list[Level] | None:
    """The costs between the GPUs as a tree, from the inside out; None if they are no tree."""
    topology = problem.topology
    if topology.cost_GG is None:
        return [Level(topology.node_G, 1.0)]
    return levels_of(topology.cost_GG)


def tree_below(cost_GG: FloatArray) -> FloatArray:
    """The largest costs of a tree that are nowhere above these, shape [G, G].

    That is the dearest step of the path whose dearest step is cheapest: the single-linkage ultrametric
    (Jardine and Sibson, 1971).
    """
    low_GG = np.minimum(cost_GG, cost_GG.T)
    for g in range(len(low_GG)):
        low_GG = np.minimum(low_GG, np.maximum(low_GG[:, g, None], low_GG[None, g]))
    return low_GG


def levels_of(cost_GG: FloatArray) -> list[Level] | None:
    """Costs as a tree, from the inside out; None if they are no tree."""
    levels, below = [], 0.0
    rebuilt_GG = np.zeros_like(cost_GG)
    for cost in np.unique(cost_GG[cost_GG > 0]).tolist():
        group_G = (cost_GG <= below).argmax(1).astype(np.int64)
        levels.append(Level(group_G, cost - below))
        rebuilt_GG += (group_G[:, None] != group_G) * (cost - below)
        below = cost
        if len(levels) > len(cost_GG):
            return None
    return levels if np.allclose(rebuilt_GG, cost_GG, rtol=_SAME, atol=0.0) else None


def by_expert(problem: Problem, slots_LGC: SlotArray, share_LGC: FloatArray) -> FloatArray:
    """Share of each expert's tokens that each GPU serves, shape [L, G, E]."""
    share_LGE = np.zeros((*slots_LGC.shape[:2], problem.experts))
    layer, gpu, slot = np.nonzero(slots_LGC >= 0)
    np.add.at(share_LGE, (layer, gpu, slots_LGC[layer, gpu, slot]), share_LGC[layer, gpu, slot])
    return share_LGE


def source_tokens(problem: Problem) -> FloatArray:
    """Expected tokens by source GPU, shape [L, G, E].

    By GPU where the loads say so; else those of a node come evenly from its GPUs (those alive in the layer,
    if any is); else they come evenly from all nodes (to the nearest replica: from all live GPUs).
    """
    by_gpu = problem.loads.load_LGE
    if by_gpu is not None:
        return by_gpu
    node_G, alive_LG = problem.topology.node_G, problem.usable_LG
    nodes = problem.topology.nodes
    by_node = problem.loads.load_LNE
    if by_node is None and problem.split == "nearest":
        by_node = np.asarray(problem.source_parts() * problem.load_LE[:, None, :])
    if by_node is None:
        by_node = np.repeat(problem.load_LE[:, None, :] / nodes, nodes, axis=1)
    inside_NG = node_G == np.arange(nodes)[:, None]
    count_LN = alive_LG.astype(np.int64) @ inside_NG.T
    part_LG = np.where(
        count_LN[:, node_G] > 0,
        alive_LG / np.maximum(count_LN[:, node_G], 1),
        (1.0 / inside_NG.sum(1))[node_G],
    )
    return np.asarray(by_node[:, node_G] * part_LG[:, :, None])


def hop_sources(flow_LEE: FloatArray, share_LGE: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Of each layer's tokens, how many come from each GPU of the layer before, and how many each one serves.

    Both [L, G, E]; the first layer has none.
    """
    source_LGE, served_LGE = np.zeros_like(share_LGE), np.zeros_like(share_LGE)
    if len(flow_LEE):
        source_LGE[1:] = share_LGE[:-1] @ flow_LEE
        served_LGE[1:] = share_LGE[1:] * flow_LEE.sum(1)[:, None, :]
    return source_LGE, served_LGE


def link_costs(problem: Problem, source_LSE: FloatArray, served_LGE: FloatArray) -> FloatArray:
    """Least cost of bringing each layer's tokens from their GPUs to those that serve them, shape [L]."""
    levels = cost_levels(problem)
    if levels is None:
        assert problem.topology.cost_GG is not None
        flow_LSG = _cheapest(problem.topology.cost_GG, source_LSE, served_LGE)
        return np.asarray((flow_LSG * problem.topology.cost_GG).sum((1, 2)))
    total_L = np.zeros(len(source_LSE))
    for level in levels:
        over_LGE = source_LSE - served_LGE
        for group in np.unique(level.group_G):
            inside = over_LGE[:, level.group_G == group].sum(1)
            total_L += level.cost * np.maximum(inside, 0.0).sum(1)
    return total_L


def token_flows(problem: Problem, slots_LGC: SlotArray, share_LGC: FloatArray) -> FloatArray:
    """Expected tokens from every source GPU to every serving GPU, shape [L, G, G].

    The cheapest way there is; on a tree, what must leave a group is divided in proportion.
    """
    share_LGE = by_expert(problem, slots_LGC, share_LGC)
    source_LSE = source_tokens(problem)
    if problem.split == "nearest":
        return _by_rule(problem, share_LGE > 0, source_LSE)
    served_LGE = share_LGE * problem.load_LE[:, None, :]
    levels = cost_levels(problem)
    if levels is None:
        assert problem.topology.cost_GG is not None
        return _cheapest(problem.topology.cost_GG, source_LSE, served_LGE)
    gpus = problem.topology.gpus
    left_LSE, room_LGE = source_LSE.copy(), served_LGE.copy()
    flow_LSG = np.zeros((problem.layers, gpus, gpus))
    groups = [np.arange(gpus), *(level.group_G for level in levels), np.zeros(gpus, dtype=np.int64)]
    for group_G in groups:
        for group in np.unique(group_G):
            at = np.flatnonzero(group_G == group)
            left, room = left_LSE[:, at], room_LGE[:, at]
            met_LE = np.minimum(left.sum(1), room.sum(1))
            out = left * _part(met_LE, left.sum(1))[:, None, :]
            into = room * _part(met_LE, room.sum(1))[:, None, :]
            per_LE = np.divide(1.0, met_LE, out=np.zeros_like(met_LE), where=met_LE > 0)
            flow_LSG[:, at[:, None], at] += (out * per_LE[:, None, :]) @ into.transpose(0, 2, 1)
            left_LSE[:, at], room_LGE[:, at] = left - out, room - into
    return flow_LSG


def _part(some: FloatArray, whole: FloatArray) -> FloatArray:
    return np.minimum(np.divide(some, whole, out=np.zeros_like(some), where=whole > 0), 1.0)


def _by_rule(problem: Problem, held_LGE: BoolArray, source_LSE: FloatArray) -> FloatArray:
    """Tokens from GPU to GPU where each goes to the nearest replica, shape [L, G, G]."""
    node_G = problem.topology.node_G
    everywhere_LGE = held_LGE / np.maximum(held_LGE.sum(1, keepdims=True), 1)
    flow_LSG = np.zeros((problem.layers, len(node_G), len(node_G)))
    for source in range(len(node_G)):
        inside_G = (node_G == node_G[source])[None, :, None]
        near_LGE = held_LGE & inside_G
        count_LE = near_LGE.sum(1, keepdims=True)
        goes_LGE = np.where(count_LE > 0, near_LGE / np.maximum(count_LE, 1), everywhere_LGE)
        own_LE = held_LGE[:, source]
        goes_LGE = np.where(own_LE[:, None, :], 0.0, goes_LGE)
        goes_LGE[:, source] += own_LE
        flow_LSG[:, source] = np.einsum("lge,le->lg", goes_LGE, source_LSE[:, source])
    return flow_LSG


def _cheapest(cost_GG: FloatArray, source_LSE: FloatArray, served_LGE: FloatArray) -> FloatArray:
    """Cheapest flows by any costs, shape [L, G, G]."""
    flow_LSG = np.zeros((len(source_LSE), *cost_GG.shape))
    dearest = float(cost_GG.max()) or 1.0
    price_GG = np.rint(cost_GG / dearest * 2**20).astype(np.int64)
    for layer, (source_SE, served_GE) in enumerate(zip(source_LSE, served_LGE, strict=True)):
        alone_E = (served_GE > 0).sum(0) <= 1
        gpu_E = served_GE.argmax(0)
        for gpu in np.unique(gpu_E[alone_E]):
            flow_LSG[layer, :, gpu] += source_SE[:, alone_E & (gpu_E == gpu)].sum(1)
        for e in np.flatnonzero(~alone_E):
            flow_LSG[layer] += _transport(price_GG, source_SE[:, e], served_GE[:, e])
    return flow_LSG


def _transport(price_GG: IntArray, source_S: FloatArray, served_G: FloatArray) -> FloatArray:
    """The cheapest way from sources to servers of one expert, shape [G, G]."""
    from ortools.graph.python import min_cost_flow

    total = float(source_S.sum())
    flow_SG = np.zeros(price_GG.shape)
    if total <= 0:
        return flow_SG
    sources, targets = np.flatnonzero(source_S > 0), np.flatnonzero(served_G > 0)
    supply, room = (_whole(part, total) for part in (source_S[sources], served_G[targets]))
    network = min_cost_flow.SimpleMinCostFlow()
    tail, head = (i.ravel() for i in np.indices((len(sources), len(targets))))
    arcs = network.add_arcs_with_capacity_and_unit_cost(
        tail,
        head + len(sources),
        np.full(len(tail), int(_UNITS)),
        price_GG[sources[tail], targets[head]],
    )
    nodes = np.arange(len(sources) + len(targets))
    network.set_nodes_supplies(nodes, np.concatenate([supply, -room]))
    if network.solve() != network.OPTIMAL:
        raise ProblemError("topology.cost", "is out of range for the flow between GPUs")
    flow_SG[sources[tail], targets[head]] = np.asarray(network.flows(arcs)) * (total / _UNITS)
    return flow_SG


def _whole(part: FloatArray, total: float) -> IntArray:
    """Parts of a total in whole units that sum to the same number, whatever is rounded."""
    ends = np.rint(np.cumsum(part) / part.sum() * _UNITS).astype(np.int64)
    return np.asarray(np.diff(ends, prepend=0))


def outside_tokens(problem: Problem, share_LGE: FloatArray) -> FloatArray:
    """Tokens of each layer that are served outside the home of their expert's group, shape [L]."""
    groups = problem.groups
    assert groups is not None
    node_G = problem.topology.node_G
    served_LGE = share_LGE * problem.load_LE[:, None, :]
    away_L = np.zeros(problem.layers)
    for group in range(groups.count):
        by_gpu_LG = served_LGE[:, :, groups.group_E == group].sum(2)
        by_node_LN = np.stack(
            [by_gpu_LG[:, node_G == n].sum(1) for n in range(problem.topology.nodes)], axis=1
        )
        away_L += by_node_LN.sum(1) - by_node_LN.max(1)
    return np.maximum(away_L, 0.0)
