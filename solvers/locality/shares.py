"""Free token shares that pay least in a time: a minimum-cost flow from sources over replicas to GPUs.

Experts on one GPU have no choice; of the others, the tokens of every source go to the cheapest replicas with
room. What a token pays is where it comes from and where it is served; tolls of later layers count as well.
"""

from __future__ import annotations

import numpy as np

from moeless_opt.problems.arrays import BoolArray, FloatArray, SlotArray
from moeless_opt.problems.plan import gpu_times
from moeless_opt.problems.spec import Problem
from moeless_opt.solvers.core import risk_L
from moeless_opt.solvers.locality.costs import Costs
from moeless_opt.solvers.locality.groups import idle_elsewhere
from moeless_opt.solvers.locality.search import TokenSources
from moeless_opt.solvers.shares import best_shares, solve_shares

__all__ = ["near_shares", "serving_slots", "slowest_L"]

_UNITS = float(1 << 36)  # whole units of tokens per largest GPU load
_PRICES = 1 << 20  # whole units of the dearest token
_HAIR = 1e-9


def serving_slots(problem: Problem, slots_LGC: SlotArray, away_LEG: BoolArray | None) -> SlotArray:
    """Slots without the replicas outside their kept group's home: such ones serve nothing."""
    if away_LEG is None or not idle_elsewhere(problem):
        return slots_LGC
    layer, gpu, _ = np.indices(slots_LGC.shape)
    return np.where(away_LEG[layer, np.maximum(slots_LGC, 0), gpu], np.int32(-1), slots_LGC)


def slowest_L(problem: Problem, slots_LGC: SlotArray) -> FloatArray:
    """Largest tokens over speed of each layer, with the quickest shares where they are free, by the risk."""
    if problem.loads.shape[0] > 1:
        return risk_L(problem, slots_LGC)
    load_LE, speed_G = problem.load_LE, problem.topology.speed_G
    if problem.split == "fractional":
        return solve_shares(load_LE, slots_LGC, speed_G).time_L
    return np.asarray(gpu_times(load_LE, slots_LGC, best_shares(problem, slots_LGC), speed_G).max(1))


def near_shares(
    problem: Problem, costs: Costs, slots_LGC: SlotArray, limit_L: FloatArray, outside: float = 0.0
) -> FloatArray:
    """Token shares of a placement by the problem's split, shape [L, G, C]; free ones pay least.

    Parameters
    ----------
    limit_L : array, shape [L]
        Tokens over speed up to which GPUs may work for it; the least possible where that is more.
    outside : float
        What a token served outside its group's home pays.
    """
    if problem.split != "fractional":
        return best_shares(problem, slots_LGC)
    slots_LGC = serving_slots(problem, slots_LGC, costs.away_LEG)
    quick = solve_shares(problem.load_LE, slots_LGC, problem.topology.speed_G)
    share_LGC = quick.share_LGC.copy()
    share_LGE = costs.shares_of(slots_LGC, share_LGC)
    for row in range(problem.layers):
        limit = max(float(limit_L[row]), float(quick.time_L[row]) * (1 + _HAIR))
        sources, toll_EG = costs.sources(row, share_LGE), costs.toll_EG(row, slots_LGC, outside)
        share_EG = _layer(problem, row, slots_LGC[row], sources[0], toll_EG, limit)
        slots_GC = slots_LGC[row]
        place_GC = np.maximum(slots_GC, 0)
        found_GC = np.where(slots_GC >= 0, share_EG[place_GC, np.arange(len(slots_GC))[:, None]], 0.0)
        share_LGC[row] = found_GC
        share_LGE[row] = share_EG.T
    return share_LGC


def _layer(
    problem: Problem,
    row: int,
    slots_GC: SlotArray,
    sources: TokenSources,
    toll_EG: FloatArray,
    limit: float,
) -> FloatArray:
    """Shares of one layer by expert and GPU, shape [E, G]."""
    from ortools.graph.python import min_cost_flow

    experts, gpus = problem.experts, problem.topology.gpus
    load_E, speed_G = problem.load_LE[row], problem.topology.speed_G
    held_EG = np.zeros((experts, gpus), dtype=np.bool_)
    gpu, slot = np.nonzero(slots_GC >= 0)
    held_EG[slots_GC[gpu, slot], gpu] = True
    share_EG = held_EG / np.maximum(held_EG.sum(1, keepdims=True), 1)
    free = np.flatnonzero((held_EG.sum(1) > 1) & (load_E > 0))
    if not len(free):
        return np.asarray(share_EG)
    alone_E = np.ones(experts, dtype=np.bool_)
    alone_E[free] = False
    room_G = limit * speed_G - (held_EG * np.where(alone_E, load_E, 0.0)[:, None]).sum(0)
    part_SX = sources.tokens_SE[:, free]
    total_X = part_SX.sum(0)
    even = 1.0 / len(part_SX)
    part_SX = np.where(total_X > 0, part_SX / np.where(total_X > 0, total_X, 1.0), even) * load_E[free]
    unit = limit * float(speed_G.max()) / _UNITS
    supply_SX = np.rint(part_SX / unit).astype(np.int64)
    sets, count = supply_SX.shape
    pair_x, pair_g = np.nonzero(held_EG[free])
    s, p = (i.ravel() for i in np.indices((sets, len(pair_x))))
    price = sources.weight * sources.price_SG[s, pair_g[p]] + toll_EG[free[pair_x[p]], pair_g[p]]
    dearest = float(price.max(initial=0.0)) or 1.0
    network = min_cost_flow.SimpleMinCostFlow()
    tail, head = s * count + pair_x[p], sets * count + pair_g[p]
    arcs = network.add_arcs_with_capacity_and_unit_cost(
        tail, head, supply_SX[s, pair_x[p]], np.rint(price / dearest * _PRICES).astype(np.int64)
    )
    sink = sets * count + gpus
    whole_G = np.ceil(np.maximum(room_G, 0.0) / unit).astype(np.int64) + sets * count
    network.add_arcs_with_capacity_and_unit_cost(
        sets * count + np.arange(gpus), np.full(gpus, sink), whole_G, np.zeros(gpus, dtype=np.int64)
    )
    network.set_nodes_supplies(np.arange(sets * count), supply_SX.ravel())
    network.set_nodes_supplies(np.array([sink]), np.array([-int(supply_SX.sum())]))
    if network.solve() != network.OPTIMAL:  # rounding alone: the quickest shares are there to fall back on
        return _quickest(problem, row, slots_GC)
    tokens_XG = np.zeros((count, gpus))
    np.add.at(tokens_XG, (pair_x[p], pair_g[p]), np.asarray(network.flows(arcs), dtype=np.float64))
    sums_X = tokens_XG.sum(1)
    some = sums_X > 0
    share_EG[free[some]] = tokens_XG[some] / sums_X[some, None]
    return np.asarray(share_EG)


def _quickest(problem: Problem, row: int, slots_GC: SlotArray) -> FloatArray:
    """The shares of the least time, by expert and GPU, shape [E, G]."""
    found = solve_shares(problem.load_LE[row : row + 1], slots_GC[None], problem.topology.speed_G)
    share_EG = np.zeros((problem.experts, problem.topology.gpus))
    gpu, slot = np.nonzero(slots_GC >= 0)
    share_EG[slots_GC[gpu, slot], gpu] = found.share_LGC[0, gpu, slot]
    return share_EG
