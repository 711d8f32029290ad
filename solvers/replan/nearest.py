"""Re-planning for engines whose source GPUs send to the nearest replica: local search on few moves.

The search (`solvers.nearest`) lowers the tokens above a wanted time, summed over the GPUs, by the change that
lowers them most per replica moved; then GPUs are put back as they were and repaired, to take back moves that
turned out needless.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from moeless_opt.problems.arrays import FloatArray, IntArray, SlotArray
from moeless_opt.problems.plan import best_bound, new_replicas
from moeless_opt.problems.spec import nearest_shares
from moeless_opt.solvers.core import NeverStop, Stop
from moeless_opt.solvers.nearest import NearestTask, nearest_times, search_nearest
from moeless_opt.solvers.replan.live import Content, mend_content, mend_within
from moeless_opt.solvers.replan.task import (
    Point,
    Replanned,
    ReplanTask,
    ReplanWish,
    front_of,
    seated,
    spread_budget,
)

__all__ = ["replan_nearest"]

_ROUNDS = 8  # of putting back and repairing, where none are wished for
_TRIES = 4  # perturbed descents, then looser times, for layers that miss theirs
_SMALL = 256  # pairs of expert and GPU of a layer in which a stricter rule leaves too little choice
_PARTS = (0.75, 0.5, 0.35, 0.2, 0.1, 0.05, 0.0)  # of the way to the wanted time, where a budget may end


def replan_nearest(
    task: ReplanTask, wish: ReplanWish | None = None, *, stop: Stop | None = None
) -> Replanned:
    """Move few replicas until, tokens sent to the nearest, the largest GPU time is within a tolerance.

    Parameters and errors are those of `fractional.replan_fractional`; the task says where the tokens come
    from. 8 rounds of putting back and repairing run for each layer if the wish names no other number.
    """
    wish, stop = wish or ReplanWish(), stop or NeverStop()
    assert task.sources is not None
    part_LNE, node_G, filled = task.sources.part_LNE, task.sources.node_G, task.sources.filled
    load, speed, L = task.load_LE, task.speed_G, len(task.load_LE)
    bound = (
        best_bound(load, task.capacity_LG, speed, "fractional")[0] if wish.bound_L is None else wish.bound_L
    )
    bound = np.asarray(bound, dtype=np.float64)
    base_LGC = _mended(task, task.live_LGC, wish.repair)
    start_LGC = base_LGC if wish.start_LGC is None else _mended(task, wish.start_LGC, wish.repair)
    forced_L = _moves(task, base_LGC)
    wish.check_budget(forced_L)
    target_L = (1.0 + wish.tolerance) * bound
    near = NearestTask(
        load_LE=load,
        part_LNE=part_LNE,
        node_G=node_G,
        speed_G=speed,
        capacity_LG=task.capacity_LG,
        start_LGC=start_LGC,
        live_LGC=task.live_LGC,
        base_LGC=base_LGC,
        rules=task.rules,
        full=filled is not None,
    )
    begun_L = nearest_times(near, start_LGC)
    late_L = begun_L > target_L * (1.0 + 1e-9)
    rows = np.flatnonzero(late_L | (_moves(task, start_LGC) > forced_L))
    rounds = wish.most_rounds(_ROUNDS)
    slots_LGC, cut_L = start_LGC.copy(), np.zeros(L, dtype=np.bool_)
    for first in (
        True,
        False,
    ):  # what is fast where a node sends to its first replica, is by the rule as well
        if first and (load.shape[1] * len(speed) <= _SMALL or wish.max_moves is not None):
            continue
        turn, left = 0, rounds
        while len(rows):
            now = int(min(left, 4 * _ROUNDS))
            part = replace(near.rows(rows), start_LGC=slots_LGC[rows], first=first)
            goal_L = target_L if turn == 0 else np.maximum(target_L, nearest_times(near, slots_LGC))
            tries = _TRIES if turn == 0 and not first else 0
            found = search_nearest(
                part, goal_L[rows], tries=tries, rounds=now, seed=wish.seed + turn, stop=stop
            )
            slots_LGC[rows] = found.slots_LGC
            if turn == 0:
                cut_L[rows] = found.cut_L
            left, turn = left - now, turn + 1
            if left <= 0 or first or stop():
                break
        rows = rows[(nearest_times(near, slots_LGC) > target_L * (1 + 1e-9))[rows]]
        slots_LGC[rows] = start_LGC[rows] if first else slots_LGC[rows]
    if wish.max_moves is not None:
        slots_LGC = _within(task, near, wish, target_L, (start_LGC, slots_LGC), stop)
    contents = [[[e for e in row if e >= 0] for row in rows_GC] for rows_GC in slots_LGC.tolist()]
    new = seated(task, contents)
    return Replanned(
        slots_LGC=new,
        share_LGC=nearest_shares(new, load.shape[1], node_G, part_LNE),
        time_L=nearest_times(near, new),
        moves_L=_moves(task, new),
        forced_L=forced_L,
        bound_L=bound,
        target_L=target_L,
        least_moves_L=np.zeros(L, dtype=np.int64),
        cut_L=cut_L,
    )


def _mended(task: ReplanTask, slots_LGC: SlotArray, repair: bool) -> SlotArray:
    """A placement, mended or refused where it breaks the rules; what stays keeps its slot."""
    speed = task.speed_G.tolist()
    contents: list[Content] = []
    for layer, (load, rows, room) in enumerate(zip(task.load_LE, slots_LGC, task.capacity_LG, strict=True)):
        content = mend_content(load.tolist(), rows.tolist(), room.tolist(), speed, layer, repair)
        if task.rules is not None:
            content = mend_within(task.rules[layer], load, rows, content, task.speed_G)
        contents.append(content)
    whole = seated(task, contents)
    return whole if task.sources is None or task.sources.filled is None else task.sources.filled(whole)


def _moves(task: ReplanTask, slots_LGC: SlotArray) -> IntArray:
    new_LGC = new_replicas(slots_LGC, task.live_LGC, task.load_LE.shape[1])
    return np.asarray(new_LGC.sum((1, 2)), dtype=np.int64)


def _within(
    task: ReplanTask,
    near: NearestTask,
    wish: ReplanWish,
    target_L: FloatArray,
    ends: tuple[SlotArray, SlotArray],
    stop: Stop,
) -> SlotArray:
    """Where each layer stops on its way, so that all moves together keep the budget."""
    start_LGC, last_LGC = ends
    price = wish.price_L(len(target_L))
    assert wish.max_moves is not None
    if int(_moves(task, last_LGC) @ np.array(price)) <= wish.max_moves:
        return last_LGC
    placements = [start_LGC, last_LGC]
    first_L, end_L = (nearest_times(near, one) for one in ends)
    for part in _PARTS:
        if stop():
            break
        goal_L = np.maximum(end_L + part * (first_L - end_L), target_L)
        on = replace(near, start_LGC=placements[-1] if len(placements) > 2 else start_LGC)
        placements.append(search_nearest(on, goal_L, rounds=2, stop=stop).slots_LGC)
    times = [nearest_times(near, one) for one in placements]
    moves = [_moves(task, one) for one in placements]
    fronts = []
    for x, target in enumerate(target_L.tolist()):
        points: list[Point] = [
            (
                int(count_L[x]),
                max(float(time_L[x]), target),
                [[e for e in row if e >= 0] for row in one[x].tolist()],
            )
            for one, time_L, count_L in zip(placements, times, moves, strict=True)
        ]
        fronts.append(front_of(points))
    contents = spread_budget(fronts, [1.0] * len(fronts), price, wish.max_moves)
    return seated(task, contents)
