"""Placements to begin with, each good at the start of some order of priorities.

Balance first: a fresh construction, its GPUs renamed for what is live, and re-plans with few moves. Moves
first: what is live. Memory first: one replica each (or as many as the limits ask for), live ones where there
are. Traffic first: every node holds the experts that most of its own tokens want, as many as it has room for,
which is a minimum-cost flow; each node is then balanced for itself. Balance before memory: the fewest
replicas for the time that is allowed.

Axes: L layers, N nodes, E experts, G GPUs, C slots of a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from moeless_opt.problems.arrays import BoolArray, FloatArray, IntArray, SlotArray
from moeless_opt.problems.errors import InfeasibleError
from moeless_opt.problems.spec import Problem, held_LGE
from moeless_opt.solvers.construct import construct_equal, construct_fractional
from moeless_opt.solvers.core import Stop, near_homes, widened
from moeless_opt.solvers.lexicographic.figures import Figures
from moeless_opt.solvers.limits import place_counts
from moeless_opt.solvers.pack import improve, pack
from moeless_opt.solvers.replan import ReplanWish, live_slots, on_live_gpus, replan_within
from moeless_opt.solvers.sizing import count_replicas, fewest_for_time

__all__ = ["lean_starts", "starts"]

_ANY = 1e9  # a tolerance that any placement keeps


def starts(figures: Figures, seed: int, stop: Stop) -> Iterator[SlotArray]:
    """Placements that suit the order, quick ones first; some layers may break a limit, see `keeps_limits`."""
    problem, order = figures.problem, figures.order
    current, wide = problem.current, int(problem.capacity_LG.max())
    if problem.limits.min_replicas > 1 or problem.limits != type(problem.limits)():
        yield place_counts(problem, count_replicas(problem))
    if "moves" in order and current is not None:
        mended = ReplanWish(tolerance=_ANY)
        yield replan_within(problem, mended).slots_LGC if current.partial else live_slots(problem)
    if "balance" in order or order == ("moves",):
        fresh = _fresh(problem, problem.load_LE, problem.capacity_LG, problem.topology.speed_G, seed)
        yield widened(_renamed(problem, widened(fresh, wide)), wide)
    if "memory" in order:
        yield from _singles(figures)
    if figures.near:
        yield _renamed(problem, _near_home(figures, seed, stop))
    if "moves" in order and "balance" in order and current is not None:
        wish = ReplanWish(tolerance=problem.objective.balance_tolerance, seed=seed)
        yield replan_within(problem, wish, stop=stop).slots_LGC


def lean_starts(figures: Figures, allowed_L: FloatArray) -> Iterator[SlotArray]:
    """Few replicas that end in the time that is allowed, where balance comes before memory."""
    problem, order = figures.problem, figures.order
    if "memory" not in order or "balance" not in order or order.index("memory") < order.index("balance"):
        return
    time = problem.time
    tokens_L = (allowed_L - time.launch / float(problem.topology.speed_G.max())) / time.token_cost
    found = fewest_for_time(
        problem.load_LE,
        problem.capacity_LG,
        problem.topology.speed_G,
        tokens_L,
        "equal" if problem.split == "equal" else "fractional",
        seconds=0,
    )
    yield _renamed(problem, found.slots_LGC)


def _fresh(
    problem: Problem, load_LE: FloatArray, capacity_LG: IntArray, speed_G: FloatArray, seed: int
) -> SlotArray:
    if problem.split == "equal":
        return construct_equal(load_LE, capacity_LG, speed_G, seed=seed)
    return construct_fractional(load_LE, capacity_LG, speed_G, seed=seed)[0]


def _renamed(problem: Problem, slots_LGC: SlotArray) -> SlotArray:
    """The same contents on the GPUs that hold most of them, where something is live."""
    if problem.current is None or (problem.topology.nodes > 1 and "traffic" in problem.objective.priorities):
        return slots_LGC
    return on_live_gpus(problem, slots_LGC)


def _singles(figures: Figures) -> Iterator[SlotArray]:
    """One replica each: packed anew, and chosen from the live ones."""
    problem = figures.problem
    count_LE = np.maximum(problem.spread_LE, problem.limits.min_replicas)
    capacity_LG, speed_G = problem.capacity_LG, problem.topology.speed_G
    try:
        slots_LGC = pack(problem.load_LE, count_LE, capacity_LG, speed_G)
    except InfeasibleError:
        pass  # the limits' own placement is there already
    else:
        yield _renamed(problem, improve(problem.load_LE, slots_LGC, capacity_LG, speed_G))
    if problem.current is None:
        return
    live_LGE = held_LGE(live_slots(problem), problem.experts)
    wide = int(capacity_LG.max())
    yield np.stack(
        [
            _chosen(live_LGE[i], problem.load_LE[i], capacity_LG[i], speed_G, wide)
            for i in range(problem.layers)
        ]
    )


def _chosen(
    live_GE: BoolArray, load_E: FloatArray, capacity_G: IntArray, speed_G: FloatArray, wide: int
) -> SlotArray:
    """One live replica of every expert, heavy experts first, each to the host that ends first."""
    work_G = np.zeros(len(speed_G))
    content: list[list[int]] = [[] for _ in speed_G]
    hosts_E = live_GE.sum(0)
    for expert in sorted(range(len(load_E)), key=lambda e: (hosts_E[e] == 0, hosts_E[e] > 1, -load_E[e], e)):
        room_G = np.array([len(row) for row in content]) < capacity_G
        hosts = np.flatnonzero((live_GE[:, expert] if hosts_E[expert] else True) & room_G)
        gpu = min(hosts.tolist(), key=lambda g: ((work_G[g] + load_E[expert]) / speed_G[g], g))
        content[gpu].append(expert)
        work_G[gpu] += load_E[expert]
    slots_GC = np.full((len(speed_G), wide), -1, dtype=np.int32)
    for gpu, row in enumerate(content):
        slots_GC[gpu, : len(row)] = row
    return slots_GC


def _near_home(figures: Figures, seed: int, stop: Stop) -> SlotArray:
    """Every node holds what its own tokens want, and is balanced for itself; unfinished layers stay empty."""
    problem = figures.problem
    node_G, wide = problem.topology.node_G, int(problem.capacity_LG.max())
    slots_LGC = np.full((problem.layers, len(node_G), wide), -1, dtype=np.int32)
    for layer in range(problem.layers):
        if stop():
            break
        source_NE, capacity_G = figures.source_LNE[layer], problem.capacity_LG[layer]
        room_N = np.bincount(node_G, weights=capacity_G).astype(np.int64)
        on_NE = near_homes(source_NE, room_N)
        homeless_E = np.where(on_NE, 0.0, source_NE).sum(0) / on_NE.sum(0)
        for node in range(len(room_N)):
            expert_H, gpu_H = np.flatnonzero(on_NE[node]), np.flatnonzero(node_G == node)
            if not len(expert_H):
                continue
            load_H = source_NE[node, expert_H] + homeless_E[expert_H]
            found = _fresh(
                problem, load_H[None], capacity_G[None, gpu_H], problem.topology.speed_G[gpu_H], seed
            )[0]
            slots_LGC[layer, gpu_H, : found.shape[1]] = np.where(found >= 0, expert_H[found], -1)
    return slots_LGC
