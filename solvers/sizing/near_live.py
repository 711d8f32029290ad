"""Placements of a given size near the live one: of those in time, the one that moves fewest replicas.

How many replicas there are to be is decided before. Then two kinds of placements are looked at, layer by
layer: what was built, with each GPU's contents where most of them are live; and what a re-plan makes of the
live placement under the same numbers of replicas.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

import numpy as np

from moeless_opt.problems.arrays import FloatArray, SlotArray
from moeless_opt.problems.errors import InfeasibleError
from moeless_opt.problems.plan import new_replicas
from moeless_opt.problems.spec import Problem
from moeless_opt.solvers.core import Stop, keeps_limits, part_of, risk_L, widened
from moeless_opt.solvers.limits import Rules
from moeless_opt.solvers.replan import ReplanWish, on_live_gpus, replan_within

__all__ = ["near_live"]

_EQUAL = 1e-9


def near_live(
    problem: Problem,
    tables: Sequence[SlotArray],
    rules: list[Rules],
    target_L: FloatArray | None = None,
    *,
    stop: Stop,
) -> SlotArray:
    """Of each layer's placements in time the one that moves least, shape [L, G, C].

    Parameters
    ----------
    problem : Problem
        With something live.
    tables : sequence of arrays, shape [L, G, C]
        What was built; the first is taken as it is where moves are no priority.
    rules : list of Rules
        What every layer may hold.
    target_L : array, shape [L], optional
        Time (tokens over speed) that is soon enough; by default the tolerance above the least of all.
    stop : Stop
        Asked before the live placement is re-planned.
    """
    if problem.current is None or "moves" not in problem.objective.priorities:
        return tables[0]
    tables = [on_live_gpus(problem, table) for table in tables]
    tolerance = problem.objective.balance_tolerance
    reached_L = np.min([risk_L(problem, table) for table in tables], axis=0)
    if target_L is None:
        target_L = reached_L * (1 + tolerance)
    if not stop():
        wish = ReplanWish(tolerance=tolerance, bound_L=target_L / (1 + tolerance))
        with suppress(InfeasibleError):
            found_LGC = replan_within(problem, wish, rules=rules, stop=part_of(stop, 0.5)).slots_LGC
            # What the search may not have kept counts as what was built.
            kept_L = keeps_limits(problem, found_LGC, tied=False)
            kept_L &= (found_LGC >= 0).sum((1, 2)) <= np.array([one.total for one in rules])
            wide = max(found_LGC.shape[2], *(table.shape[2] for table in tables))
            first_LGC = widened(tables[0], wide)
            tables.append(np.where(kept_L[:, None, None], widened(found_LGC, wide), first_LGC))
    return _fewest_moves(problem, tables, np.maximum(target_L, reached_L))


def _fewest_moves(problem: Problem, tables: Sequence[SlotArray], target_L: FloatArray) -> SlotArray:
    """Of each layer's placements within a time the one that moves least; of those the fastest."""
    assert problem.current is not None
    wide = max(table.shape[2] for table in tables)
    slots_XLGC = np.stack([widened(table, wide) for table in tables])
    time_XL = np.stack([risk_L(problem, table) for table in slots_XLGC])
    live_LGC = problem.current.slots_LGC
    moves_XL = np.stack([new_replicas(one, live_LGC, problem.experts).sum((1, 2)) for one in slots_XLGC])
    moves_XL[time_XL > target_L * (1 + _EQUAL)] = np.iinfo(np.int64).max
    index_L = np.where(moves_XL == moves_XL.min(0), time_XL, np.inf).argmin(0)
    return np.asarray(slots_XLGC[index_L, np.arange(problem.layers)])
