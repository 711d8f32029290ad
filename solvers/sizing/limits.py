"""Placement under every limit that a problem can state: counts, pins, bans, failure domains, live replicas.

The fast constructions know slots and speeds only. Here replicas are counted within the limits (greedy
apportionment), the replicas that must exist are placed by augmenting paths, so that no pin, ban or full GPU
leaves an expert out while a placement exists, further ones go where they balance best (warm GPUs first where
moves matter), and swaps that respect all limits even out the rest. Token shares, where they are free, are
then solved exactly.
"""

from __future__ import annotations

import numpy as np

from moeless_opt.problems.arrays import BoolArray, FloatArray, IntArray, SlotArray
from moeless_opt.problems.errors import InfeasibleError
from moeless_opt.problems.spec import Problem, held_LGE
from moeless_opt.solvers.construct import construct_equal, construct_fractional
from moeless_opt.solvers.core import (
    Built,
    Heuristic,
    NeverStop,
    NoOptions,
    Stop,
    Task,
    best_over_scenarios,
    keeps_limits,
    risk_L,
    widened,
)
from moeless_opt.solvers.pack import apportion
from moeless_opt.solvers.shares import best_shares
from moeless_opt.solvers.sizing.board import Board
from moeless_opt.solvers.sizing.minimal import fewest_for_cv

__all__ = ["Constrained", "count_replicas", "place_within"]


def count_replicas(problem: Problem) -> IntArray:
    """Replicas of every expert within the limits, shape [L, E]."""
    limits, load_LE = problem.limits, problem.load_LE
    layers, experts = load_LE.shape
    allowed_LEG = _allowed(problem)
    reach_LE = allowed_LEG.sum(2)
    least_LE = _least(problem)
    most_LE = reach_LE if limits.max_replicas is None else np.minimum(reach_LE, limits.max_replicas)
    short = np.argwhere(least_LE > most_LE)
    if short.size:
        layer, expert = (int(i) for i in short[0])
        raise InfeasibleError(
            f"limits: expert {expert} of layer {problem.loads.layers[layer]} needs "
            f"{least_LE[layer, expert]} replicas, "
            f"{most_LE[layer, expert]} are possible (pins, bans, max_replicas, GPUs with slots)"
        )
    room_L = np.minimum(problem.capacity_LG, experts).sum(1)
    if limits.max_layer_replicas is not None:
        room_L = np.minimum(room_L, limits.max_layer_replicas)
    if problem.sizing.policy == "cv":
        cv = fewest_for_cv(
            load_LE, problem.sizing.cv, room_L, max_replicas=limits.max_replicas, ddof=problem.sizing.ddof
        )
        wanted_LE = np.clip(cv.replicas_LE, least_LE, most_LE)
        room_L = np.minimum(room_L, wanted_LE.sum(1))
        counts = np.asarray(np.minimum(wanted_LE, most_LE), dtype=np.int64)
    else:
        counts = np.asarray(apportion(load_LE, room_L, most_LE, least=least_LE), dtype=np.int64)
    budgets = []
    if limits.max_total_replicas is not None:
        budgets.append((limits.max_total_replicas, np.ones(layers, dtype=np.int64), "max_total_replicas"))
    if limits.max_total_bytes is not None:
        budgets.append((limits.max_total_bytes, problem.bytes_L, "max_total_bytes"))
    for budget, cost_L, name in budgets:
        _trim(counts, least_LE, load_LE, cost_L, budget, name)
    return counts


def _trim(
    counts: IntArray, least_LE: IntArray, load_LE: FloatArray, cost_L: IntArray, budget: int, name: str
) -> None:
    """Take replicas back, in place, where the pieces grow least beside their layer's mean."""
    spent = int(counts.sum(1) @ cost_L)
    if spent <= budget:
        return
    mean_L = np.maximum(load_LE.sum(1, keepdims=True), 1e-300)
    while spent > budget:
        piece = np.where(counts > least_LE, load_LE / mean_L / np.maximum(counts - 1, 1), np.inf)
        layer, expert = np.unravel_index(int(piece.argmin()), piece.shape)
        if not np.isfinite(piece[layer, expert]):
            floor = int(least_LE.sum(1) @ cost_L)
            raise InfeasibleError(
                f"limits.{name}: {budget} is {floor - budget} too few; at least {floor} are needed"
            )
        counts[layer, expert] -= 1
        spent -= int(cost_L[layer])


def _least(problem: Problem) -> IntArray:
    """Replicas that an expert must have: pins, and as many more as failure domains are missing among them."""
    limits = problem.limits
    pinned_LEG = problem.pairs_LEG("pinned")
    domains = np.unique(problem.topology.failure_domain_G, return_inverse=True)[1].reshape(-1)
    reached_LE = np.zeros(pinned_LEG.shape[:2], dtype=np.int64)
    for domain in range(int(domains.max()) + 1):
        reached_LE += pinned_LEG[:, :, domains == domain].any(axis=2)
    needed_LE = pinned_LEG.sum(2) + np.maximum(limits.spread - reached_LE, 0)
    return np.asarray(np.maximum(limits.min_replicas, needed_LE), dtype=np.int64)


def _allowed(problem: Problem) -> BoolArray:
    """Pairs that no limit rules out, shape [L, E, G]."""
    return ~problem.pairs_LEG("forbidden") & (problem.capacity_LG > 0)[:, None, :]


def place_within(problem: Problem, counts_LE: IntArray, *, stop: Stop | None = None) -> SlotArray:
    """Place replicas within all limits, shape [L, G, C].

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
    boards = _boards(problem, counts_LE)
    for board in boards:
        board.place_needed()
    for board in boards:
        if not stop():
            board.place_wanted()
    for board in boards:
        if not stop():
            board.even_out(stop)
    width = int(problem.capacity_LG.max())
    slots_LGC = np.full((len(boards), problem.topology.gpus, width), -1, dtype=np.int32)
    for layer, board in enumerate(boards):
        for gpu, held_E in enumerate(board.held_EG.T):
            kept = [] if problem.current is None else problem.current.slots_LGC[layer, gpu].tolist()
            content = np.flatnonzero(held_E).tolist()
            slots_LGC[layer, gpu, : len(content)] = _in_order(set(content), kept)
    return slots_LGC


def _boards(problem: Problem, counts_LE: IntArray) -> list[Board]:
    """The layers, still empty."""
    layers, experts = counts_LE.shape
    topology, limits = problem.topology, problem.limits
    pinned_LEG, allowed_LEG = problem.pairs_LEG("pinned"), _allowed(problem)
    least_LE = _least(problem)
    warm_LGE = np.zeros((layers, topology.gpus, experts), dtype=np.bool_)
    if problem.current is not None and "moves" in problem.objective.priorities:
        warm_LGE = held_LGE(problem.current.slots_LGC, experts)
    # Domains by rank: their own numbers may be large.
    domain_G = np.unique(topology.failure_domain_G, return_inverse=True)[1].reshape(-1)
    return [
        Board(
            number=problem.loads.layers[row],
            piece_E=problem.load_LE[row] / counts_LE[row],
            count_E=counts_LE[row],
            least_E=least_LE[row],
            allowed_EG=allowed_LEG[row],
            pinned_EG=pinned_LEG[row],
            warm_EG=warm_LGE[row].T,
            capacity_G=problem.capacity_LG[row],
            domain_G=domain_G,
            speed_G=topology.speed_G,
            spread=limits.spread,
        )
        for row in range(layers)
    ]


def _in_order(content: set[int], kept: list[int]) -> list[int]:
    """Experts that stay keep their order, new ones follow."""
    stay = [expert for expert in kept if expert in content]
    return stay + sorted(content.difference(stay))


def _or_free(problem: Problem, slots_LGC: SlotArray, seed: int) -> SlotArray:
    """A placement under limits, or in layers where it happens to keep them and is faster, a free one.

    One scenario; limits on all layers together cannot be looked at by the layer.
    """
    limits, speed_G = problem.limits, problem.topology.speed_G
    if limits.max_total_replicas is not None or limits.max_total_bytes is not None:
        return slots_LGC
    if problem.split == "equal":
        free_LGC = construct_equal(problem.load_LE, problem.capacity_LG, speed_G, seed=seed)
    else:
        free_LGC, _ = construct_fractional(problem.load_LE, problem.capacity_LG, speed_G, seed=seed)
    free_LGC = _around_pairs(problem, widened(free_LGC, slots_LGC.shape[2]))
    better_L = keeps_limits(problem, free_LGC) & (risk_L(problem, free_LGC) < risk_L(problem, slots_LGC))
    return np.where(better_L[:, None, None], free_LGC, slots_LGC)


def _around_pairs(problem: Problem, slots_LGC: SlotArray) -> SlotArray:
    """A placement with the contents of like GPUs permuted so that pinned and forbidden pairs are kept, if so.

    Which content may go where is a bipartite graph, and the permutation a perfect matching in it.
    """
    limits, speed_G = problem.limits, problem.topology.speed_G
    if not (limits.pinned or limits.forbidden):
        return slots_LGC
    held_LGE_ = held_LGE(slots_LGC, problem.experts)
    pinned_LEG, forbidden_LEG = problem.pairs_LEG("pinned"), problem.pairs_LEG("forbidden")
    out_LGC = slots_LGC.copy()
    for layer in np.flatnonzero(~keeps_limits(problem, slots_LGC)):
        capacity_G, held_GE = problem.capacity_LG[layer], held_LGE_[layer].astype(np.int64)
        fits = (capacity_G[:, None] == capacity_G) & (speed_G[:, None] == speed_G)  # [content, GPU]
        fits &= held_GE @ forbidden_LEG[layer] == 0
        fits &= (1 - held_GE) @ pinned_LEG[layer] == 0
        if (seat_G := _matching(fits)) is not None:
            out_LGC[layer] = slots_LGC[layer, seat_G]
    return out_LGC


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


class Constrained(Heuristic):
    """Every limit honoured: replica limits, pins, bans, failure domains, the cv sizing."""

    name = "constrained"
    summary = "placement under replica limits, pins, bans, failure domains and cv sizing"

    def build(self, task: Task[NoOptions]) -> Built:
        """Count, place, even out, share."""
        problem = task.problem
        # The rule of cv counts replicas for the expected loads, whatever the scenarios.
        fixed_LE = count_replicas(problem) if problem.sizing.policy == "cv" else None

        moves = "moves" in problem.objective.priorities

        def placed(guise: Problem) -> SlotArray:
            counts_LE = count_replicas(guise) if fixed_LE is None else fixed_LE
            slots_LGC = place_within(guise, counts_LE, stop=task.stop)
            if fixed_LE is not None or task.stop() or (moves and problem.current is not None):
                return slots_LGC
            return _or_free(guise, slots_LGC, task.seed)

        slots_LGC = best_over_scenarios(problem, placed, stop=task.stop, moves=moves)
        return Built(slots_LGC=slots_LGC, share_LGC=best_shares(problem, slots_LGC))
