"""The least time of a layer for any time model, proven by CP-SAT: what no placement and no shares can beat.

Halves the time. Whether a time suffices is a model of its own: which GPU serves how many tokens of which
expert, where a GPU that serves a of them has room for ``cap(a, T)`` tokens (`TimeTable.largest`).
Tokens are whole: with capacities rounded down what is found can be done, with capacities rounded up what is
called infeasible is.

For layers of 8 to 16 experts: seconds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from moeless_opt.problems.arrays import FloatArray, IntArray
from moeless_opt.problems.errors import ProblemError
from moeless_opt.problems.plan.time_bounds import TimeTable, timed_bound
from moeless_opt.solvers.core.cp import solve_cp
from moeless_opt.solvers.core.stopping import MaxTime
from moeless_opt.solvers.timed.search import timed_plan

__all__ = ["LeastTime", "least_time"]


@dataclass(frozen=True, slots=True)
class LeastTime:
    """A proven interval.

    Parameters
    ----------
    value : float
        Some placement and shares take no longer.
    bound : float
        None takes less.
    """

    value: float
    bound: float


def least_time(
    load_E: FloatArray,
    capacity_G: IntArray,
    speed_G: FloatArray,
    table: TimeTable,
    *,
    rel: float = 0.005,
    seconds: float = 30.0,
) -> LeastTime:
    """Least largest GPU time over all placements and shares, within `rel` unless time is up.

    Parameters
    ----------
    load_E : array, shape [E]
        Tokens, whole numbers; some above 0.
    capacity_G : array of int, shape [G]
        Slots.
    speed_G : array, shape [G]
        Relative speeds.
    table : TimeTable
        Times.
    rel : float
        Relative width of the interval to stop at.
    seconds : float
        For each question to CP-SAT; an open one ends the search.

    Raises
    ------
    ProblemError
        If there are no tokens, or not enough slots.
    """
    load_E = np.ceil(np.asarray(load_E, dtype=np.float64))
    experts, gpus = len(load_E), len(speed_G)
    if not load_E.sum() > 0:
        raise ProblemError("load", "is 0; there is nothing to time")
    if int(np.minimum(capacity_G, experts).sum()) < experts:
        raise ProblemError(
            "capacity", f"is {int(np.sum(capacity_G))} slots in all, {experts} experts need one"
        )
    load_1E, capacity_1G = load_E[None], np.asarray(capacity_G, dtype=np.int64)[None]
    # Feasible to begin with: experts dealt out in turn, then the search.
    deal_GC = np.full((gpus, int(capacity_1G.max())), -1, dtype=np.int32)
    open_G = capacity_1G[0].copy()
    for e in range(experts):
        g = int(open_G.argmax())
        deal_GC[g, capacity_1G[0, g] - open_G[g]] = e
        open_G[g] -= 1
    found = timed_plan(load_1E, deal_GC[None], capacity_1G, speed_G, table, load_G=np.zeros(gpus), kicks=64)
    high = float(found.value_L[0])
    low = float(timed_bound(load_1E, capacity_1G, speed_G, table)[0])
    while high > low * (1 + rel):
        middle = float(np.sqrt(low * high)) if low > 0 else 0.5 * high
        if _suffices(load_E, capacity_1G[0], speed_G, table, middle, seconds, np.floor):
            high = middle
        elif _suffices(load_E, capacity_1G[0], speed_G, table, middle, seconds, np.ceil) is False:
            low = middle
        else:
            break
    return LeastTime(high, low)


def _suffices(
    load_E: FloatArray,
    capacity_G: IntArray,
    speed_G: FloatArray,
    table: TimeTable,
    time: float,
    seconds: float,
    whole: Callable[[float], float],
) -> bool | None:
    """Whether all tokens can be served in a time; None if CP-SAT does not find out."""
    from ortools.sat.python import cp_model

    total = int(load_E.sum())
    cap_GA = table.largest(time * np.asarray(speed_G))
    if np.isneginf(cap_GA[:, 0]).any():
        return False
    model = cp_model.CpModel()
    serves, tokens = {}, {}
    for e in np.flatnonzero(load_E > 0).tolist():
        for g in range(len(speed_G)):
            serves[e, g] = model.new_bool_var(f"serves {e} {g}")
            tokens[e, g] = model.new_int_var(0, int(load_E[e]), f"tokens {e} {g}")
            model.add(tokens[e, g] <= int(load_E[e]) * serves[e, g])
        model.add(sum(tokens[e, g] for g in range(len(speed_G))) == int(load_E[e]))
    active = sorted({e for e, _ in serves})
    for g in range(len(speed_G)):
        most = min(int(capacity_G[g]), len(active), cap_GA.shape[1] - 1)
        counts = [a for a in range(most + 1) if not np.isneginf(cap_GA[g, a])]
        chosen = {a: model.new_bool_var(f"uses {a} on {g}") for a in counts}
        model.add_exactly_one(chosen.values())
        model.add(sum(serves[e, g] for e in active) == sum(a * x for a, x in chosen.items()))
        room = {a: int(whole(min(cap_GA[g, a], total))) for a in counts}
        model.add(sum(tokens[e, g] for e in active) <= sum(room[a] * x for a, x in chosen.items()))
    _, status = solve_cp(model, MaxTime(seconds), num_workers=1)
    if status in (cp_model.OPTIMAL, cp_model.FEASIBLE):
        return True
    return False if status == cp_model.INFEASIBLE else None
