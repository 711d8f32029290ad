"""Groups that are kept on a node: a node for each, and every node planned for itself, within the limits.

With the groups' nodes chosen, nothing ties the nodes of a layer but the limits, and of those the ones on
moves. Nodes that are alike are planned together, as layers of one problem. Where moves are limited, every
node offers its points from the fewest moves to the best balance, for several ways to choose the nodes; a
layer is as slow as its slowest node, and which point each layer takes is a knapsack.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from moeless_opt.problems.arrays import FloatArray, IntArray, SlotArray
from moeless_opt.problems.errors import InfeasibleError
from moeless_opt.problems.plan import new_replicas
from moeless_opt.problems.spec import Limits, Loads, Placement, Problem, Topology, held_LGE
from moeless_opt.solvers.construct import Construct
from moeless_opt.solvers.core import Task, choose_points, widened
from moeless_opt.solvers.limits import Rules, layer_front, rules_of, slots_holding
from moeless_opt.solvers.locality.groups import GroupWay, GroupWays
from moeless_opt.solvers.locality.shares import serving_slots, slowest_L
from moeless_opt.solvers.replan import Replan, frontier

__all__ = ["broken_limit", "kept_groups", "moves_of"]

_TINY = 64  # pairs of an expert and a GPU up to which every way and every number of moves is tried
_EVERY = 64  # ways at most
_LADDER = (0.005, 0.01, 0.02, 0.035, 0.06, 0.1, 0.18, 0.35, 0.7)  # tolerances of balance that are offered


@dataclass(frozen=True, slots=True)
class _Part:
    """One node of a layer, in one of the ways that are tried."""

    way: int
    row: int
    gpu_H: IntArray
    room_H: IntArray
    expert_X: IntArray
    cap: int | None


_Offer = tuple[_Part, SlotArray, FloatArray, IntArray]  # slots, times and moves of each of a node's points


class _Point(NamedTuple):
    """What a layer may take: replicas that move, tokens over speed, slots and the groups' nodes."""

    moves: int
    time: float
    slots_GC: SlotArray
    node_K: IntArray


def kept_groups(
    task: Task[Any], name: str, plain: Problem, ways: list[GroupWays], order: tuple[str, ...]
) -> tuple[SlotArray, IntArray]:
    """A balanced placement with every group on one node, [L, G, C], and the node of each, [L, K].

    Parameters
    ----------
    plain : Problem
        Without groups, for balance and moves alone.
    ways : list of GroupWays
        Of each layer.
    order : tuple of str
        The priorities.

    Raises
    ------
    InfeasibleError
        If the groups fit on no nodes, or would have to move more than may.
    """
    groups = task.problem.groups
    assert groups is not None
    for one in ways:
        one.check_fits()
    if plain.current is None or not ("moves" in order or plain.limits.bounds_moves):
        home_LK = np.stack([one.best(whole=True) for one in ways])
        return _each_node(task, name, plain, home_LK[:, groups.group_E], replans=False), home_LK
    half = 0.5 * plain.objective.balance_tolerance  # the rest is for the GPUs of a node
    front_L = [one.front(half) for one in ways]
    home_LK = np.stack([front[-1].node_K for front in front_L])
    slots_LGC = _each_node(task, name, plain, home_LK[:, groups.group_E], replans=True)
    fits = broken_limit(plain, slots_LGC) is None
    if fits and ("moves" not in order or task.stop()):
        return slots_LGC, home_LK
    if not fits:
        _check_least(plain, front_L, all(one.exact for one in ways))
    small = plain.experts * plain.topology.gpus <= _TINY
    tried = []
    for x, (one, front) in enumerate(zip(ways, front_L, strict=True)):
        every = one.every(_EVERY) if small else []
        tried += [(x, way.node_K) for way in every or _spaced(front)]
    points: list[list[_Point]] = [[] for _ in front_L]
    for (x, _), found in zip(tried, _offers(task, plain, tried, groups.group_E), strict=True):
        points[x] += found
    if not fits:
        return _chosen(plain, points)
    away_LEG = home_LK[:, groups.group_E][:, :, None] != plain.topology.node_G
    time_L = slowest_L(plain, serving_slots(task.problem, slots_LGC, away_LEG))
    return _fewest(plain, points, slots_LGC, home_LK, time_L)


def _fewest(
    problem: Problem,
    points: list[list[_Point]],
    slots_LGC: SlotArray,
    home_LK: IntArray,
    time_L: FloatArray,
) -> tuple[SlotArray, IntArray]:
    """In each layer the fewest moves within the tolerance: only the slowest nodes need balance."""
    more = 1 + problem.objective.balance_tolerance
    slots_LGC, home_LK = slots_LGC.copy(), home_LK.copy()
    moves_L = moves_of(problem, slots_LGC)
    for x, row in enumerate(points):
        own = _Point(int(moves_L[x]), float(time_L[x]), slots_LGC[x], home_LK[x])
        enough = min(one.time for one in (own, *row)) * more
        best = min((one for one in (own, *row) if one.time <= enough), key=lambda one: (one.moves, one.time))
        slots_LGC[x], home_LK[x] = best.slots_GC, best.node_K
    return slots_LGC, home_LK


def _spaced(front: list[GroupWay]) -> list[GroupWay]:
    """Of a front the last, the first, and some between them."""
    last = len(front) - 1
    return [front[k] for k in sorted({0, last // 2, 3 * last // 4, last})]


def moves_of(problem: Problem, slots_LGC: SlotArray) -> IntArray:
    """Replicas of each layer that are not live, shape [L]."""
    if problem.current is None:
        return np.zeros(problem.layers, dtype=np.int64)
    new_LGC = new_replicas(slots_LGC, problem.current.slots_LGC, problem.experts)
    return np.asarray(new_LGC.sum((1, 2)), dtype=np.int64)


def broken_limit(problem: Problem, slots_LGC: SlotArray) -> tuple[str, int] | None:
    """The first limit on moves that a placement breaks, and what it would need."""
    return _over(problem, moves_of(problem, slots_LGC))


def _over(problem: Problem, moves_L: IntArray) -> tuple[str, int] | None:
    for key, used in (
        ("max_moves", int(moves_L.sum())),
        ("max_layer_moves", int(moves_L.max(initial=0))),
        ("max_move_bytes", int(moves_L @ problem.bytes_L)),
    ):
        most = getattr(problem.limits, key)
        if most is not None and used > most:
            return key, used
    return None


def _check_least(problem: Problem, front_L: list[list[GroupWay]], exact: bool) -> None:
    """Refuse where the fewest moves that bring the groups together are more than may be."""
    over = _over(problem, np.array([front[0].moves for front in front_L]))
    if over is not None:
        looked = "" if exact else ", as far as was looked"
        raise InfeasibleError(
            f"limits.{over[0]}: is {getattr(problem.limits, over[0])}; with the groups kept on a node "
            f"{over[1]} are needed{looked}"
        )


# -- nodes as problems -------------------------------------------------------------------------------------


def _parts(problem: Problem, ways: list[tuple[int, IntArray]]) -> list[_Part]:
    """The nodes of some layers, each with the experts that are at home there.

    Parameters
    ----------
    ways : list of (row, array of int, shape [E])
        Layers, and the node of each expert there.
    """
    caps, limits, pinned_LEG = _row_caps(problem), problem.limits, problem.pairs_LEG("pinned")
    found = []
    for way, (row, node_E) in enumerate(ways):
        cap_N: list[int | None] = [None] * problem.topology.nodes
        # Experts that are pinned outside the home of their group take room, and serve nothing.
        guest_EG = pinned_LEG[row] & (node_E[:, None] != problem.topology.node_G)
        room_G = problem.capacity_LG[row] - guest_EG.sum(0)
        if caps[row] is not None:
            least_E = np.maximum(problem.spread_LE[row], limits.min_replicas)
            need_N = np.bincount(node_E, weights=least_E, minlength=problem.topology.nodes).astype(np.int64)
            load_N = np.bincount(node_E, weights=problem.load_LE[row], minlength=problem.topology.nodes)
            spare = max(caps[row] - int(need_N.sum() + guest_EG.sum()), 0)  # type: ignore[operator]
            part_N = spare * load_N / (load_N.sum() or 1.0)
            cap_N = (need_N + np.floor(part_N).astype(np.int64)).tolist()
        for node in range(problem.topology.nodes):
            gpu_H = np.flatnonzero(problem.topology.node_G == node)
            expert_X = np.flatnonzero(node_E == node)
            if len(expert_X):
                found.append(_Part(way, row, gpu_H, room_G[gpu_H], expert_X, cap_N[node]))
    return found


def _row_caps(problem: Problem) -> list[int | None]:
    """Replicas that each layer may hold, an even part of what all may."""
    limits, layers = problem.limits, problem.layers
    total = [] if limits.max_total_replicas is None else [limits.max_total_replicas // layers]
    if limits.max_total_bytes is not None and problem.bytes_L.any():
        total.append(limits.max_total_bytes // int(problem.bytes_L.sum()))
    if limits.max_layer_replicas is not None:
        total.append(limits.max_layer_replicas)
    room_L = problem.capacity_LG.sum(1)
    return [None if not total or min(total) >= room else min(total) for room in room_L.tolist()]


def _stacks(problem: Problem, parts: list[_Part]) -> list[list[_Part]]:
    """Parts that one problem can hold: as many experts, GPUs that are alike."""
    topology, found = problem.topology, dict[Any, list[_Part]]()
    for part in parts:
        domain_H = np.unique(topology.failure_domain_G[part.gpu_H], return_inverse=True)[1].reshape(-1)
        key = (
            len(part.expert_X),
            part.cap,
            topology.speed_G[part.gpu_H].tobytes(),
            part.room_H.tobytes(),
            domain_H.tobytes(),
        )
        found.setdefault(key, []).append(part)
    return list(found.values())


def _stacked(problem: Problem, stack: list[_Part]) -> Problem:
    """Some nodes as the layers of a problem."""
    first, topology, loads = stack[0], problem.topology, problem.loads
    domain_H = np.unique(topology.failure_domain_G[first.gpu_H], return_inverse=True)[1].reshape(-1)
    capacity_H = first.room_H
    current = None
    if problem.current is not None:
        live = np.full((len(stack), len(first.gpu_H), max(int(capacity_H.max()), 1)), -1, dtype=np.int32)
        for i, part in enumerate(stack):
            local_E = np.full(problem.experts + 1, -1, dtype=np.int32)
            local_E[part.expert_X] = np.arange(len(part.expert_X))
            for h, gpu in enumerate(part.gpu_H.tolist()):
                here = local_E[problem.current.slots_LGC[part.row, gpu]]
                here = np.unique(here[here >= 0])[: capacity_H[h]]  # one more goes where a guest comes
                live[i, h, : len(here)] = here
        current = Placement(slots_LGC=live, experts=len(first.expert_X), partial=True)
    limits = problem.limits
    return Problem(
        loads=Loads(
            load_TLE=np.stack([loads.load_TLE[:, part.row, part.expert_X] for part in stack], axis=1),
            weight_T=loads.weight_T,
        ),
        topology=Topology(
            node_G=np.zeros(len(first.gpu_H), dtype=np.int64),
            speed_G=topology.speed_G[first.gpu_H],
            slots_G=capacity_H,
            domain_G=domain_H,
        ),
        split="equal" if problem.split == "nearest" else problem.split,
        fill=problem.fill,
        current=current,
        objective=problem.objective,
        time=problem.time,
        limits=Limits(
            min_replicas=limits.min_replicas,
            max_replicas=limits.max_replicas,
            max_layer_replicas=first.cap,
            spread=limits.spread,
            spread_experts=_local_spread(problem, stack),
            pinned=_local_pairs(problem, stack, "pinned"),
            forbidden=_local_pairs(problem, stack, "forbidden"),
        ),
    )


def _local_spread(problem: Problem, stack: list[_Part]) -> tuple[tuple[int, int], ...] | None:
    """The experts of some nodes that are to reach several failure domains, where that is not asked of all."""
    if problem.limits.spread_experts is None:
        return None
    wide = [problem.spread_LE[part.row, part.expert_X] > 1 for part in stack]
    return tuple((i, int(e)) for i, wide_X in enumerate(wide) for e in np.flatnonzero(wide_X))


def _local_pairs(problem: Problem, stack: list[_Part], key: str) -> tuple[tuple[int, int, int], ...]:
    if not getattr(problem.limits, key):
        return ()
    mask_LEG, found = problem.pairs_LEG(key), []
    for i, part in enumerate(stack):
        local = np.argwhere(mask_LEG[part.row][np.ix_(part.expert_X, part.gpu_H)])
        found += [(i, int(e), int(g)) for e, g in local]
    return tuple(found)


def _each_node(
    task: Task[Any], name: str, problem: Problem, node_LE: IntArray, *, replans: bool
) -> SlotArray:
    """Every node planned for itself, shape [L, G, C]."""
    slots_LGC = np.full((problem.layers, problem.topology.gpus, _wide(problem)), -1, dtype=np.int32)
    for stack in _stacks(problem, _parts(problem, list(enumerate(node_LE)))):
        alone = _stacked(problem, stack)
        solver = Replan(name) if replans else Construct(name)
        if not replans:
            alone = alone.replace(current=None, objective=alone.objective.replace(priorities=("balance",)))
        found_XHC = solver.placed(task, alone).slots_LGC
        for part, found_HC in zip(stack, found_XHC, strict=True):
            _put(slots_LGC[part.row], part, found_HC)
    for x in range(problem.layers):
        _let_in(problem, x, slots_LGC[x])
    return slots_LGC


def _wide(problem: Problem) -> int:
    return int(problem.capacity_LG.max())


def _put(slots_GC: SlotArray, part: _Part, found_HC: SlotArray) -> None:
    """Write a node's slots into its layer."""
    wide = min(found_HC.shape[1], slots_GC.shape[1])
    told_HC = found_HC[:, :wide]
    slots_GC[part.gpu_H, :wide] = np.where(told_HC >= 0, part.expert_X[np.maximum(told_HC, 0)], -1)


def _let_in(problem: Problem, row: int, slots_GC: SlotArray) -> int:
    """Write experts that are pinned outside their group's home; returns how many of them are not live."""
    if not problem.limits.pinned:
        return 0
    live, new = problem.current, 0
    for expert, gpu in np.argwhere(problem.pairs_LEG("pinned")[row]).tolist():
        if expert not in slots_GC[gpu]:
            slots_GC[gpu, int((slots_GC[gpu] < 0).argmax())] = expert
            new += live is not None and expert not in live.slots_LGC[row, gpu]
    return new


# -- moves that are limited --------------------------------------------------------------------------------


def _offers(
    task: Task[Any], problem: Problem, tried: list[tuple[int, IntArray]], group_E: IntArray
) -> list[list[_Point]]:
    """The points of each layer and way to give its groups nodes."""
    offers: list[list[_Offer]] = [[] for _ in tried]
    left = _stacks(problem, _parts(problem, [(x, node_K[group_E]) for x, node_K in tried]))[::-1]
    while left:
        stack = left.pop()
        alone = _stacked(problem, stack)
        try:
            front = frontier(alone, seed=task.seed, ladder=_LADDER, stop=task.stop)
        except InfeasibleError:  # room and pairs of a node together: no such way
            left += [[part] for part in stack[::-1]] if len(stack) > 1 else []
            continue
        tiny = alone.experts * alone.topology.gpus <= _TINY and alone.fill == "none"
        rules = rules_of(alone) if tiny else []
        for i, part in enumerate(stack):
            told = front.slots_KLGC[:, i], front.time_KL[:, i], front.moves_KL[:, i]
            more = _searched(alone, i, rules[i]) if tiny and not task.stop() else None
            if more is not None:
                slots_KHC = widened(more[0], told[0].shape[2])
                told = (
                    np.concatenate([told[0], slots_KHC]),
                    np.concatenate([told[1], more[1]]),
                    np.concatenate([told[2], more[2]]),
                )
            offers[part.way].append((part, *told))
    found: list[list[_Point]] = []
    for (_, node_K), own in zip(tried, offers, strict=True):
        whole = sum(len(part.expert_X) for part, _, _, _ in own) == problem.experts
        found.append([_at(problem, own, limit, node_K) for limit in _times(own)] if whole else [])
    return found


def _searched(problem: Problem, row: int, rules: Rules) -> tuple[SlotArray, FloatArray, IntArray] | None:
    """A tiny node's points, from the fewest moves to the least time: slots, times and moves."""
    assert problem.current is not None
    live_EG = held_LGE(problem.current.slots_LGC[row : row + 1], problem.experts)[0].T
    front = layer_front(problem, row, rules, layers=problem.layers, live_EG=live_EG)
    if front is None or not front.held:
        return None
    slots_KGC = slots_holding(problem, front.held, np.full(len(front.held), row))
    return slots_KGC, np.array(front.time), np.array(front.moves, dtype=np.int64)


def _times(offers: list[_Offer]) -> list[float]:
    """Times at which a layer's points differ: those of its nodes, from the least that all can reach."""
    low = max(float(time_K.min()) for _, _, time_K, _ in offers)
    every = np.unique(np.concatenate([time_K for _, _, time_K, _ in offers]))
    return [low, *every[every > low].tolist()]


def _at(problem: Problem, offers: list[_Offer], limit: float, node_K: IntArray) -> _Point:
    """The fewest moves of a layer whose nodes all end by a time."""
    slots_GC = np.full((problem.topology.gpus, _wide(problem)), -1, dtype=np.int32)
    moves, time = 0, 0.0
    for part, slots_KHC, time_K, moves_K in offers:
        k = int(np.lexsort((time_K, moves_K, time_K > limit))[0])
        _put(slots_GC, part, slots_KHC[k])
        moves, time = moves + int(moves_K[k]), max(time, float(time_K[k]))
    moves += _let_in(problem, offers[0][0].row, slots_GC)
    return _Point(moves, time, slots_GC, node_K)


def _chosen(problem: Problem, points: list[list[_Point]]) -> tuple[SlotArray, IntArray]:
    """A point of each layer, so that the summed time is least within the limits on moves."""
    limits, offers = problem.limits, list[list[_Point]]()
    for row in points:
        falling: list[_Point] = []
        for point in sorted(row, key=lambda one: (one.moves, one.time)):
            most = limits.max_layer_moves
            if (most is None or point.moves <= most) and (not falling or point.time < falling[-1].time):
                falling.append(point)
        if not row:
            raise InfeasibleError("groups: no node has room for a whole group with its pairs and replicas")
        if not falling:
            raise _too_many("max_layer_moves", limits, min(point.moves for point in row))
        offers.append(falling)
    moves = [np.array([point.moves for point in row], dtype=np.int64) for row in offers]
    times = [np.array([point.time for point in row]) for row in offers]
    size_L = problem.bytes_L
    chosen = np.array([len(row) - 1 for row in offers])
    budget = limits.max_moves
    if limits.max_move_bytes is not None and size_L.any():
        sizes = [row * size for row, size in zip(moves, size_L.tolist(), strict=True)]
        budget_bytes = limits.max_move_bytes
        while True:
            chosen = _within("max_move_bytes", limits, sizes, times, budget_bytes)
            used = sum(int(row[k]) for row, k in zip(moves, chosen, strict=True))
            if budget is None or used <= budget:
                break
            budget_bytes = sum(int(row[k]) for row, k in zip(sizes, chosen, strict=True)) * budget // used
    elif budget is not None:
        chosen = _within("max_moves", limits, moves, times, budget)
    taken = [row[k] for row, k in zip(offers, chosen.tolist(), strict=True)]
    return np.stack([one.slots_GC for one in taken]), np.stack([one.node_K for one in taken])


def _within(
    key: str, limits: Limits, costs: list[IntArray], times: list[FloatArray], budget: int
) -> IntArray:
    fewest = sum(int(row[0]) for row in costs)
    if fewest > budget:
        raise _too_many(key, limits, fewest)
    return choose_points(costs, times, budget).point_L


def _too_many(key: str, limits: Limits, used: int) -> InfeasibleError:
    return InfeasibleError(
        f"limits.{key}: is {getattr(limits, key)}; with the groups kept on a node {used} are needed, as far "
        "as was looked"
    )
