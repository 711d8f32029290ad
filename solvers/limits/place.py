"""Placement under the limits on replicas, pairs and domains, from the placement that there would be without.

A layer whose free placement obeys keeps it: a limit that does not bind changes nothing. In the others three
placements compete: the free one with like GPUs exchanged so that pairs fit; the free one mended by the least
change; and one made within the limits (replicas counted and placed within them, and evened out by exchanges
that obey). A small layer is then searched for less (`beam`), which often proves that there is nothing less.
Limits on all layers together are spent where they buy most.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moeless_opt.problems.arrays import BoolArray, FloatArray, IntArray, SlotArray
from moeless_opt.problems.errors import InfeasibleError
from moeless_opt.problems.plan import gpu_risk, risk
from moeless_opt.problems.spec import Problem, held_LGE, nearest_shares
from moeless_opt.solvers.core import NeverStop, Stop, choose_points, guises, one_split, risk_L
from moeless_opt.solvers.limits.beam import MOST_GPUS, ROOM, Front, Nearest, gpu_sets, search_layer
from moeless_opt.solvers.limits.board import Board
from moeless_opt.solvers.limits.counts import apportioned, budgets, within_budgets, within_caps
from moeless_opt.solvers.limits.needed import mended_within, needed_EG
from moeless_opt.solvers.limits.rules import Rules, rules_of

__all__ = ["Within", "layer_front", "place_counts", "place_within", "rows_of", "shared_out", "slots_holding"]

ALL_ROOM = 1 << 21
"""States x sets of GPUs that are looked at for an expert of each small layer, in all layers together."""
_NEAR = 1e-9


@dataclass(frozen=True, slots=True, kw_only=True)
class Within:
    """A placement within the limits.

    Attributes
    ----------
    slots_LGC : array of int32, shape [L, G, C]
        The placement.
    free_L : array of bool, shape [L]
        Layers that keep the free placement.
    proven_L : array of float, shape [L]
        Time that no placement within the limits beats; 0 where nothing was proven.
    """

    slots_LGC: SlotArray
    free_L: BoolArray
    proven_L: FloatArray


def place_within(problem: Problem, free_LGC: SlotArray, *, stop: Stop | None = None) -> Within:
    """Place all layers within the limits.

    Parameters
    ----------
    problem : Problem
        Loads, GPUs, limits.
    free_LGC : array of int32, shape [L, G, C]
        A placement without the limits.
    stop : Stop, optional
        When to be content with what is there.

    Raises
    ------
    InfeasibleError
        If no placement obeys.
    """
    stop = NeverStop() if stop is None else stop
    rules = rules_of(problem)
    held_LEG = held_LGE(free_LGC, problem.experts).transpose(0, 2, 1)
    free_L = np.array([one.keeps(held_EG) for one, held_EG in zip(rules, held_LEG, strict=True)])
    count_L = held_LEG.sum((1, 2))
    proven_L = np.zeros(problem.layers)
    if free_L.all() and within_caps(problem, count_L):
        return Within(slots_LGC=free_LGC, free_L=free_L, proven_L=proven_L)
    if budgets(problem):
        caps_L, fronts = shared_out(problem, rules, stop)
        rules = rules_of(problem, caps_L)
        free_L &= count_L <= caps_L
    else:
        fronts = [None] * problem.layers
    held = {row: held_LEG[row] for row in np.flatnonzero(free_L).tolist()}
    rows = np.flatnonzero(~free_L)
    for row, held_EG in _made(problem, rules, free_LGC, rows, stop).items():
        held[row] = held_EG
    slots_LGC = slots_holding(problem, [held[row] for row in range(problem.layers)])
    slots_LGC[free_L, :, : free_LGC.shape[2]] = free_LGC[free_L][:, :, : slots_LGC.shape[2]]
    slots_LGC[free_L, :, free_LGC.shape[2] :] = -1
    time_L = risk_L(problem, slots_LGC)
    floor_L = _floor_L(problem)
    for row in rows.tolist():
        if stop() or time_L[row] <= floor_L[row] * (1 + _NEAR):
            continue
        front = fronts[row] or layer_front(
            problem, row, rules[row], limit=float(time_L[row]), layers=len(rows)
        )
        if front is None:
            continue
        at = [i for i, h in enumerate(front.held) if h.sum() <= rules[row].total]
        if at and front.time[at[-1]] < time_L[row] * (1 - _NEAR):
            slots_LGC[row] = slots_holding(problem, [front.held[at[-1]]], row)[0]
            time_L[row] = front.time[at[-1]]
        if front.exact and not budgets(problem):
            proven_L[row] = time_L[row]
    return Within(slots_LGC=slots_LGC, free_L=free_L, proven_L=proven_L)


def layer_front(
    problem: Problem,
    row: int,
    rules: Rules,
    *,
    limit: float = np.inf,
    layers: int = 1,
    live_EG: BoolArray | None = None,
) -> Front | None:
    """Search a layer of few GPUs for less time than a limit; None where there are too many."""
    weight_T, wish, strays = problem.loads.weight_T, problem.objective, one_split(problem)
    used = np.flatnonzero(rules.capacity_G > 0)
    if len(used) > MOST_GPUS or (strays and problem.split == "fractional"):
        return None
    return search_layer(
        problem.loads.load_TLE[:, row],
        problem.topology.speed_G,
        rules,
        lambda time_TX: risk(time_TX, weight_T, wish),
        equal=problem.split == "equal",
        nearest=_nearest(problem, row, used) if problem.split == "nearest" else None,
        each_gpu=(lambda time_TX: gpu_risk(time_TX, weight_T, wish)) if strays else None,
        limit=limit,
        live_EG=live_EG,
        room=min(ROOM, ALL_ROOM // max(layers, 1)),
    )


def _nearest(problem: Problem, row: int, used: IntArray) -> Nearest:
    """What every expert of a layer has on each set of GPUs, by where its tokens come from."""
    set_MG = gpu_sets(len(used))
    several = problem.loads.load_TLNE is not None
    parts = [problem.source_parts(t)[row] for t in (range(problem.loads.shape[0]) if several else (None,))]
    slots_MG1 = np.full((len(set_MG), problem.topology.gpus, 1), -1, dtype=np.int32)
    slots_MG1[:, used, 0] = np.where(set_MG, 0, -1)
    node_G, served = problem.topology.node_G, []
    for part_NE in parts:
        for part_N in part_NE.T:
            part_MN1 = np.broadcast_to(part_N[:, None], (len(set_MG), len(part_N), 1))
            served.append(nearest_shares(slots_MG1, 1, node_G, part_MN1)[:, used, 0])
    shape = len(parts), parts[0].shape[1], *set_MG.shape
    return Nearest(serve_TEMG=np.array(served).reshape(shape), node_G=node_G)


def _floor_L(problem: Problem) -> FloatArray:
    """What no placement beats: even work on all GPUs, shape [L]."""
    mean_TL = problem.loads.load_TLE.sum(2) / problem.topology.speed_G.sum()
    return risk(mean_TL, problem.loads.weight_T, problem.objective)


def shared_out(problem: Problem, rules: list[Rules], stop: Stop) -> tuple[IntArray, list[Front | None]]:
    """Replicas that each layer may have, within the limits on all of them, and what was found on the way."""
    load_LE = problem.load_LE
    least_LE = np.stack([one.least_E for one in rules])
    counts_LE = within_budgets(problem, apportioned(load_LE, rules), least_LE, load_LE)
    caps_L = counts_LE.sum(1)
    nothing_EG: BoolArray = np.zeros((problem.experts, problem.topology.gpus), dtype=np.bool_)
    fronts: list[Front | None] = []
    for row, one in enumerate(rules):
        front = None
        if not stop():
            front = layer_front(problem, row, one, layers=problem.layers, live_EG=nothing_EG)
        if front is None or not front.held:
            return caps_L, [None] * problem.layers
        fronts.append(front)
    found = [front for front in fronts if front is not None]
    best, value = caps_L, np.inf
    for _, budget, cost_L in budgets(problem):
        try:
            chosen = choose_points(
                [np.array(front.moves) * cost for front, cost in zip(found, cost_L.tolist(), strict=True)],
                [front.time for front in found],
                budget,
            )
        except InfeasibleError:
            continue  # the search was cut; the counts are there
        taken_L = np.array(
            [front.moves[at] for front, at in zip(found, chosen.point_L.tolist(), strict=True)]
        )
        if within_caps(problem, taken_L) and chosen.value < value:
            best, value = taken_L, chosen.value
    return best, fronts


def _made(
    problem: Problem, rules: list[Rules], free_LGC: SlotArray, rows: IntArray, stop: Stop
) -> dict[int, BoolArray]:
    """The best of what is made of the free placement, and within the limits, by layer."""
    best: dict[int, BoolArray] = {}
    value_L, floor_L = np.full(problem.layers, np.inf), _floor_L(problem)
    for guise in guises(problem):
        if best and stop():
            break
        counts_LE = apportioned(guise.load_LE, rules)
        for make in (_around_pairs, _from_counts, _from_free):
            made = {}
            for row in rows[value_L[rows] > floor_L[rows] * (1 + _NEAR)].tolist():
                held_EG = make(guise, row, rules[row], counts_LE[row], free_LGC[row], stop)
                if held_EG is not None:
                    made[row] = held_EG
            if not made:
                continue
            at = np.array(sorted(made))
            time_R = risk_L(problem, slots_holding(problem, [made[row] for row in at.tolist()], at), at)
            for row, time in zip(at.tolist(), time_R.tolist(), strict=True):
                if time < value_L[row] * (1 - _NEAR):
                    best[row], value_L[row] = made[row], time
    return best


def _from_counts(
    problem: Problem, row: int, rules: Rules, count_E: IntArray, free_GC: SlotArray, stop: Stop
) -> BoolArray:
    """Replicas counted, placed and evened out within the limits."""
    board = board_of(problem, row, rules, count_E)
    return filled(board, rules, stop)


def _from_free(
    problem: Problem, row: int, rules: Rules, count_E: IntArray, free_GC: SlotArray, stop: Stop
) -> BoolArray:
    """The free placement mended, and evened out within the limits."""
    load_E, speed_G = problem.load_LE[row], problem.topology.speed_G
    content = mended_within(
        rules, load_E, [[e for e in slots if e >= 0] for slots in free_GC.tolist()], speed_G
    )
    held_EG = rows_of(content, problem.experts)
    board = board_of(problem, row, rules, np.maximum(held_EG.sum(1), 1))
    board.refill(held_EG)
    board.even_out(stop)
    return board.held_EG


def _around_pairs(
    problem: Problem, row: int, rules: Rules, count_E: IntArray, free_GC: SlotArray, stop: Stop
) -> BoolArray | None:
    """The free placement with the contents of like GPUs exchanged so that the rules are kept, if so.

    Which content may go where is a bipartite graph, and the exchange a perfect matching in it.
    """
    speed_G = problem.topology.speed_G
    capacity_G, domain_G = rules.capacity_G, rules.domain_G
    held_GE = held_LGE(free_GC[None], problem.experts)[0].astype(np.int64)
    fits = (capacity_G[:, None] == capacity_G) & (speed_G[:, None] == speed_G)  # [content, GPU]
    fits &= held_GE @ ~rules.allowed_EG == 0
    fits &= (1 - held_GE) @ rules.pinned_EG == 0
    if rules.spreads:
        fits &= domain_G[:, None] == domain_G
    if (seat_G := _matching(fits)) is None:
        return None
    held_EG = held_GE[seat_G].T > 0
    return held_EG if rules.keeps(held_EG) else None


def _matching(fits: BoolArray) -> list[int] | None:
    """For every column a row of its own that fits; None if there is no such matching."""
    row_of: list[int] = [-1] * fits.shape[1]

    def seat(row: int, seen: set[int]) -> bool:
        for column in np.flatnonzero(fits[row]).tolist():
            if column not in seen:
                seen.add(column)
                if row_of[column] < 0 or seat(row_of[column], seen):
                    row_of[column] = row
                    return True
        return False

    return row_of if all(seat(row, set()) for row in range(len(fits))) else None


def board_of(
    problem: Problem, row: int, rules: Rules, count_E: IntArray, warm_EG: BoolArray | None = None
) -> Board:
    """A layer, still empty."""
    return Board(
        number=rules.number,
        piece_E=problem.load_LE[row] / count_E,
        count_E=count_E,
        least_E=rules.least_E,
        allowed_EG=rules.allowed_EG,
        pinned_EG=rules.pinned_EG,
        warm_EG=np.zeros_like(rules.allowed_EG) if warm_EG is None else warm_EG,
        capacity_G=rules.capacity_G,
        domain_G=rules.domain_G,
        speed_G=problem.topology.speed_G,
        spread_E=rules.spread_E,
    )


def filled(board: Board, rules: Rules, stop: Stop) -> BoolArray:
    """Fill a board: what must be, what is wanted, evened out, shape [E, G]."""
    try:
        board.place_needed()
    except InfeasibleError:  # placed one by one; all at once there may be a way
        board.refill(needed_EG(rules, board.warm_EG))
    if not stop():
        board.place_wanted()
    if not stop():
        board.even_out(stop)
    return board.held_EG


def place_counts(problem: Problem, counts_LE: IntArray, *, stop: Stop | None = None) -> SlotArray:
    """Place so many replicas within all limits, warm GPUs first where moves matter, shape [L, G, C].

    Parameters
    ----------
    problem : Problem
        Limits, GPUs, live placement.
    counts_LE : array of int, shape [L, E]
        Replicas wanted; those beyond the least number are left out where they do not fit.
    stop : Stop, optional
        When to end: then the replicas that must exist are there, others as far as it came.

    Raises
    ------
    InfeasibleError
        If a replica that must exist finds no place.
    """
    stop = NeverStop() if stop is None else stop
    warm_LEG: list[BoolArray | None] = [None] * problem.layers
    if problem.current is not None and "moves" in problem.objective.priorities:
        warm_LEG = list(held_LGE(problem.current.slots_LGC, problem.experts).transpose(0, 2, 1))
    held = [
        filled(board_of(problem, row, one, counts_LE[row], warm_LEG[row]), one, stop)
        for row, one in enumerate(rules_of(problem))
    ]
    return slots_holding(problem, held)


def rows_of(content: list[list[int]], experts: int) -> BoolArray:
    """Contents as a mask, shape [E, G]."""
    held_EG: BoolArray = np.zeros((experts, len(content)), dtype=np.bool_)
    for gpu, row in enumerate(content):
        held_EG[row, gpu] = True
    return held_EG


def slots_holding(problem: Problem, held: list[BoolArray], rows: IntArray | int | None = None) -> SlotArray:
    """Masks [E, G] as slots; experts that are live there keep their order, shape [len(held), G, C]."""
    width = max(int(problem.capacity_LG.max()), 1)
    rows = np.arange(len(held)) if rows is None else np.atleast_1d(np.asarray(rows))
    slots_LGC = np.full((len(held), problem.topology.gpus, width), -1, dtype=np.int32)
    for at, (row, held_EG) in enumerate(zip(rows.tolist(), held, strict=True)):
        for gpu, held_E in enumerate(held_EG.T):
            kept = [] if problem.current is None else problem.current.slots_LGC[row, gpu].tolist()
            content = set(np.flatnonzero(held_E).tolist())
            stay = [expert for expert in dict.fromkeys(kept) if expert in content]
            slots_LGC[at, gpu, : len(content)] = stay + sorted(content.difference(stay))
    return slots_LGC
