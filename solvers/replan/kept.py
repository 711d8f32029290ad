"""Limits on replicas, pairs and domains in a re-plan: rules for the kernels, a search of small layers."""

from __future__ import annotations

import numpy as np

from moeless_opt.problems.arrays import BoolArray, SlotArray
from moeless_opt.problems.errors import InfeasibleError, UnsupportedFeatureError
from moeless_opt.problems.spec import Fill, Problem, held_LGE, replica_counts
from moeless_opt.solvers.core import (
    NeverStop,
    Stop,
    choose_points,
    empty_slots,
    keeps_limits,
    risk_L,
    token_bound,
)
from moeless_opt.solvers.limits import (
    Rules,
    apportioned,
    layer_front,
    rules_of,
    shared_out,
    slots_holding,
    within_budgets,
    within_caps,
)
from moeless_opt.solvers.replan.equal_wide import MANY_PAIRS
from moeless_opt.solvers.replan.live import layer_moves
from moeless_opt.solvers.replan.task import front_of

__all__ = ["TINY", "besides_filling", "search_small", "shared_rules", "within_all"]

TINY = 64
"""Pairs of expert and GPU of layers that are searched where limits tie layers together or moves bind."""


def besides_filling(problem: Problem, live_LGC: SlotArray, *, covers: bool = False) -> Problem:
    """The problem with what its limits on moves leave once the empty slots are filled.

    A GPU with fewer live experts than slots needs new ones, whatever the plan, or a first one where copies of
    it may fill the rest; a search that knows nothing of it leaves as many moves unused. With `covers` only
    those that are more than the experts without a replica, which the search itself brings back.

    Raises
    ------
    InfeasibleError
        If filling the slots alone takes more moves than may be.
    UnsupportedFeatureError
        If seconds are the limit: nobody knows yet which replicas are to come.
    """
    limits = problem.limits
    if problem.fill == Fill.NONE or not limits.bounds_moves:
        return problem
    short_L = np.maximum(empty_slots(problem, live_LGC), 0).sum(1)
    if problem.fill == Fill.COPIES:
        short_L = (problem.usable_LG & (live_LGC < 0).all(2)).sum(1)
    if not short_L.any():
        return problem
    if limits.max_move_seconds is not None:
        raise UnsupportedFeatureError(
            f"limits.max_move_seconds: no solver keeps it where live slots are empty and all must be full "
            f"(fill {problem.fill!r})"
        )
    missing_L = (replica_counts(live_LGC, problem.experts) == 0).sum(1)
    kept_L = np.maximum(short_L - missing_L, 0) if covers else short_L
    needed, kept = (
        {
            "max_moves": int(each_L.sum()),
            "max_layer_moves": int(each_L.max()),
            "max_move_bytes": int(each_L @ problem.bytes_L),
        }
        for each_L in (short_L, kept_L)
    )
    left: dict[str, int] = {}
    for key, need in needed.items():
        most = getattr(limits, key)
        if most is not None and most < need:
            raise InfeasibleError(
                f"limits.{key}: is {most}; filling empty slots (fill {problem.fill!r}) takes {need} or more"
            )
        if most is not None:
            left[key] = most - kept[key]
    if problem.split == "equal" and problem.experts * problem.topology.gpus < MANY_PAIRS:
        return problem  # that search fills the slots itself, and counts what comes
    return problem.replace(limits=limits.replace(**left))


def within_all(problem: Problem, slots_LGC: SlotArray) -> bool:
    """Whether a placement keeps the limits on replicas and bytes of all layers together."""
    return within_caps(problem, (slots_LGC >= 0).sum((1, 2)))


def shared_rules(problem: Problem) -> list[Rules]:
    """The limits of every layer; what all may have together is shared out, so that the live ones fit."""
    rules = rules_of(problem)
    live_LGC = problem.current.slots_LGC if problem.current is not None else None
    if within_caps(problem, np.array([one.total for one in rules])):
        return rules
    assert live_LGC is not None
    if problem.experts * problem.topology.gpus <= TINY:
        return rules_of(problem, shared_out(problem, rules, NeverStop())[0])
    least_LE = np.stack([one.least_E for one in rules])
    counts_LE = apportioned(problem.load_LE, rules)
    caps_L = within_budgets(problem, counts_LE, least_LE, problem.load_LE).sum(1)
    have_L = np.maximum(np.maximum(replica_counts(live_LGC, problem.experts), least_LE).sum(1), caps_L)
    return rules_of(problem, have_L if within_caps(problem, have_L) else caps_L)


def search_small(problem: Problem, live_LGC: SlotArray, slots_LGC: SlotArray, stop: Stop) -> SlotArray:
    """A re-plan whose layers of few GPUs are searched for fewer moves within the tolerance, or less time.

    Parameters
    ----------
    problem : Problem
        Limits of any kind.
    live_LGC, slots_LGC : arrays of int32, shape [L, G, C]
        What is live, and a re-plan within the limits.
    stop : Stop
        When to be content.
    """
    limits = problem.limits
    if limits.max_move_seconds is not None or not keeps_limits(problem, slots_LGC, tied=False).all():
        return slots_LGC
    try:
        rules = rules_of(problem)
    except InfeasibleError:
        return slots_LGC
    budget = limits.max_moves
    price_L = np.ones(problem.layers, dtype=np.int64)
    if limits.max_move_bytes is not None:
        if budget is not None:
            return slots_LGC
        budget, price_L = limits.max_move_bytes, problem.bytes_L
    rules = shared_rules(problem) if not within_caps(problem, np.array([r.total for r in rules])) else rules
    wanted = 1 + problem.objective.balance_tolerance
    live_LEG = held_LGE(live_LGC, problem.experts).transpose(0, 2, 1)
    time_L, moves_L = risk_L(problem, slots_LGC), layer_moves(problem, slots_LGC, live_LGC)
    bound_L = token_bound(problem)
    fronts: list[list[tuple[int, float, BoolArray | None]]] = []
    for row, one in enumerate(rules):
        points: list[tuple[int, float, BoolArray | None]] = [(int(moves_L[row]), float(time_L[row]), None)]
        front = None
        done = moves_L[row] == 0 and time_L[row] <= bound_L[row] * wanted
        if not (done or stop()):
            front = layer_front(problem, row, one, layers=problem.layers, live_EG=live_LEG[row])
        if front is not None:
            points += list(zip(front.moves, front.time, front.held, strict=True))
        most = limits.max_layer_moves
        points = [point for point in points if most is None or point[0] <= most]
        target = max(bound_L[row], min(time for _, time, _ in points)) * wanted
        fronts.append(front_of([(moves, max(time, target), held) for moves, time, held in points]))
    costs = [
        [moves * price for moves, _, _ in front]
        for front, price in zip(fronts, price_L.tolist(), strict=True)
    ]
    if budget is None:
        budget = sum(row[-1] for row in costs)
    chosen = choose_points(costs, [[time for _, time, _ in front] for front in fronts], budget)
    slots_LGC = slots_LGC.copy()
    for row, at in enumerate(chosen.point_L.tolist()):
        held_EG = fronts[row][at][2]
        if held_EG is not None:
            slots_LGC[row] = slots_holding(problem, [held_EG], row)[0][:, : slots_LGC.shape[2]]
    return slots_LGC
