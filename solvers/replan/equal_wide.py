"""Equal-split re-planning on hundreds of GPUs: every change of `equal` over all layers at once, as arrays.

The search of `equal` looks at all changes of a layer for each one that it makes. On a thousand GPUs with half
of them too slow after a drift, that is a thousand changes among millions. Here

1. experts whose pieces no GPU could end in time get replicas, on free slots, else in place of those whose
   experts' pieces grow least;
2. GPUs that are too slow are paired with quick ones, another one in every round, and swap the two
   replicas that bring them closest (see `pack.swaps`); GPUs in time are left alone otherwise.

What is wanted is the target, or where that is out of reach what a quick construction from nothing reaches.
The placements between the rounds are where a budget may end.
"""

from __future__ import annotations

import numpy as np

from moeless_opt.problems.arrays import FloatArray, IntArray, SlotArray
from moeless_opt.problems.plan import best_bound, even_times, new_replicas
from moeless_opt.problems.spec import equal_shares, replica_counts
from moeless_opt.solvers.construct import construct_equal
from moeless_opt.solvers.core import NeverStop, Stop
from moeless_opt.solvers.pack import hasten
from moeless_opt.solvers.replan.live import mend_content
from moeless_opt.solvers.replan.task import (
    Point,
    Replanned,
    ReplanTask,
    ReplanWish,
    front_of,
    seated,
    spread_budget,
)

__all__ = ["MANY_PAIRS", "replan_equal_wide"]


MANY_PAIRS = 1 << 16
"""Experts times GPUs from which on layers are re-planned so."""

_ROUNDS = 48  # of swaps in pairs
_FOCUS = 96  # of swaps with the slowest GPU
_STEPS = 6  # places where a budget may end, on the way there
_SLACK = 1e-9


def replan_equal_wide(
    task: ReplanTask, wish: ReplanWish | None = None, *, stop: Stop | None = None
) -> Replanned:
    """Move replicas until, tokens split evenly, the largest GPU time is within a tolerance of the bound.

    Parameters and errors are those of `equal.replan_equal`; there are no rounds of destroying and repairing.

    Returns
    -------
    Replanned
        As there.
    """
    wish, stop = wish or ReplanWish(), stop or NeverStop()
    load, speed, capacity = task.load_LE, task.speed_G, task.capacity_LG
    L, E = load.shape
    bound = best_bound(load, capacity, speed, "equal")[0] if wish.bound_L is None else wish.bound_L
    target_L = (1.0 + wish.tolerance) * np.asarray(bound, dtype=np.float64)
    start = _mended(task, wish)
    forced_L = _moves(task, start)
    wish.check_budget(forced_L)
    first_L = even_times(load, start, speed).max(axis=1)
    rows = np.flatnonzero(first_L > target_L * (1.0 + _SLACK))
    slots, cut_L, trail = start, np.zeros(L, dtype=bool), [start]
    if len(rows) and stop():
        cut_L[rows] = True
    elif len(rows):
        near = construct_equal(load[rows], capacity[rows], speed, effort="quick")
        goal_L = target_L.copy()
        goal_L[rows] = np.maximum(target_L[rows], even_times(load[rows], near, speed).max(axis=1))
        steps = _STEPS if wish.max_moves is not None else 1
        trail = [start, *_rounds(task, start, rows, goal_L, first_L, steps, stop)]
        slots = trail[-1]
        cut_L[rows] = bool(stop())
    if wish.max_moves is not None and int(_moves(task, slots) @ np.array(wish.price_L(L))) > wish.max_moves:
        slots = _kept_to_budget(task, wish, trail, target_L)
    new = seated(task, [[[e for e in row if e >= 0] for row in layer] for layer in slots.tolist()])
    return Replanned(
        slots_LGC=new,
        share_LGC=equal_shares(new, E),
        time_L=even_times(load, new, speed).max(axis=1),
        moves_L=_moves(task, new),
        forced_L=forced_L,
        bound_L=np.asarray(bound, dtype=np.float64),
        target_L=target_L,
        least_moves_L=np.zeros(L, dtype=np.int64),
        cut_L=cut_L,
    )


def _mended(task: ReplanTask, wish: ReplanWish) -> SlotArray:
    """The live placement, mended or refused where it breaks the rules."""
    start = np.full_like(task.live_LGC, -1)
    mean_L = np.maximum(task.load_LE.sum(axis=1) / task.speed_G.sum(), 1e-300)
    for layer, rows in enumerate(task.live_LGC.tolist()):
        load = (task.load_LE[layer] / mean_L[layer]).tolist()
        capacity = task.capacity_LG[layer].tolist()
        content = mend_content(load, rows, capacity, task.speed_G.tolist(), layer, wish.repair)
        for gpu, row in enumerate(content):
            start[layer, gpu, : len(row)] = row
    return start


def _moves(task: ReplanTask, slots_LGC: SlotArray) -> IntArray:
    """Replicas of each layer that are not live."""
    new_LGC = new_replicas(slots_LGC, task.live_LGC, task.load_LE.shape[1])
    return np.asarray(new_LGC.sum(axis=(1, 2)))


def _rounds(
    task: ReplanTask,
    start: SlotArray,
    rows: IntArray,
    goal_L: FloatArray,
    first_L: FloatArray,
    steps: int,
    stop: Stop,
) -> list[SlotArray]:
    """Placements on the way to the goals, each quicker than the one before."""
    load, capacity, speed = task.load_LE[rows], task.capacity_LG[rows], task.speed_G
    trail = []
    for step in range(1, steps + 1):
        if stop():
            break
        goal = first_L[rows] + step / steps * (goal_L[rows] - first_L[rows])
        counted = np.stack(
            [_split(*layer, speed) for layer in zip(load, start[rows], capacity, goal, strict=True)]
        )
        swapped = hasten(load, counted, capacity, speed, goal, rounds=_ROUNDS, focus=_FOCUS, stop=stop)
        better = even_times(load, swapped, speed).max(axis=1) < first_L[rows] * (1.0 - _SLACK)
        found = start.copy()
        found[rows[better]] = swapped[better]
        trail.append(found)
    return trail or [start]


def _split(
    load_E: FloatArray, slots_GC: SlotArray, capacity_G: IntArray, goal: float, speed_G: FloatArray
) -> SlotArray:
    """Step 1 for one layer: replicas until no piece alone takes longer than the goal on the fastest GPU."""
    slots = slots_GC.copy()
    count = replica_counts(slots[None], len(load_E))[0].astype(np.int64)
    limit = goal * float(speed_G.max())
    width = np.minimum(capacity_G, slots.shape[1])
    for expert in np.flatnonzero(load_E > limit * count).tolist():
        while load_E[expert] > limit * count[expert] and count[expert] < len(slots):
            free = (slots < 0) & (np.arange(slots.shape[1]) < width[:, None])
            yields = (slots >= 0) & (count[slots] > 1) & (slots != expert)
            grown = np.where(free, 0.0, load_E[slots] / np.maximum(count[slots] - 1, 1))
            grown[~(free | yields) | (slots == expert).any(axis=1)[:, None]] = np.inf
            gpu, slot = divmod(int(grown.argmin()), slots.shape[1])
            if grown[gpu, slot] >= load_E[expert] / count[expert]:
                break
            if slots[gpu, slot] >= 0:
                count[slots[gpu, slot]] -= 1
            slots[gpu, slot] = expert
            count[expert] += 1
    return slots


def _kept_to_budget(
    task: ReplanTask, wish: ReplanWish, trail: list[SlotArray], target_L: FloatArray
) -> SlotArray:
    """Where each layer stops on its way, all moves together within the budget."""
    assert wish.max_moves is not None
    load, speed = task.load_LE, task.speed_G
    times = [np.maximum(even_times(load, slots, speed).max(axis=1), target_L) for slots in trail]
    moves = [_moves(task, slots) for slots in trail]
    fronts: list[list[Point]] = []
    for layer in range(len(load)):
        # What stands for the contents is the number of the placement.
        fronts.append(
            front_of(
                [
                    (int(m[layer]), float(t[layer]), [[k]])
                    for k, (m, t) in enumerate(zip(moves, times, strict=True))
                ]
            )
        )
    weight_L = np.ones(len(load)).tolist()
    chosen = spread_budget(fronts, weight_L, wish.price_L(len(load)), wish.max_moves)
    return np.stack([trail[content[0][0]][layer] for layer, content in enumerate(chosen)])
