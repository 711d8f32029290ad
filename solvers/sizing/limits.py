"""MoEless's rule of the coefficient of variation, with every limit honoured."""

from __future__ import annotations

from contextlib import suppress

import numpy as np

from moeless_opt.problems.arrays import IntArray, SlotArray
from moeless_opt.problems.errors import InfeasibleError
from moeless_opt.problems.spec import Problem
from moeless_opt.solvers.construct import Construct
from moeless_opt.solvers.core import Built, Heuristic, NoOptions, Task, best_over_scenarios, risk_L
from moeless_opt.solvers.limits import apportioned, place_counts, rules_of, within_budgets
from moeless_opt.solvers.shares import best_shares
from moeless_opt.solvers.sizing.minimal import fewest_for_cv

__all__ = ["Constrained", "count_replicas"]


def count_replicas(problem: Problem) -> IntArray:
    """Replicas of every expert by the problem's sizing (``slots`` or ``cv``) and limits, shape [L, E]."""
    limits, load_LE, rules = problem.limits, problem.load_LE, rules_of(problem)
    least_LE = np.stack([one.least_E for one in rules])
    if problem.sizing.policy != "cv":
        return within_budgets(problem, apportioned(load_LE, rules), least_LE, load_LE)
    most_LE = np.stack([one.most_E for one in rules])
    room_L = [min(one.total, int(np.minimum(one.capacity_G, problem.experts).sum())) for one in rules]
    sized = fewest_for_cv(
        load_LE,
        problem.sizing.cv,
        np.array(room_L),
        max_replicas=limits.max_replicas,
        ddof=problem.sizing.ddof,
    )
    counts_LE = np.asarray(np.clip(sized.replicas_LE, least_LE, most_LE), dtype=np.int64)
    return within_budgets(problem, counts_LE, least_LE, load_LE)


class Constrained(Heuristic):
    """As many replicas as a coefficient of variation asks for, within every limit."""

    name = "constrained"
    summary = "cv sizing under replica limits, pins, bans and failure domains; else as construct"

    def build(self, task: Task[NoOptions]) -> Built:
        """Count, place, even out, share."""
        problem = task.problem
        if problem.sizing.policy != "cv":
            return Construct().placed(task, problem)
        # The rule counts replicas for the expected loads, whatever the scenarios.
        counts_LE = count_replicas(problem)

        def placed(guise: Problem) -> SlotArray:
            return place_counts(guise, counts_LE, stop=task.stop)

        moves = "moves" in problem.objective.priorities
        slots_LGC = best_over_scenarios(problem, placed, stop=task.stop, moves=moves)
        if moves and problem.current is not None and not task.stop():
            # Warm GPUs first may leave others idle: beyond the tolerance, place as if nothing were live.
            with suppress(InfeasibleError):
                cold = problem.replace(current=None, known=None)
                cold_LGC = best_over_scenarios(cold, placed, stop=task.stop)
                limit_L = risk_L(problem, cold_LGC) * (1 + problem.objective.balance_tolerance)
                late_L = risk_L(problem, slots_LGC) > limit_L
                slots_LGC = np.where(late_L[:, None, None], cold_LGC, slots_LGC)
        return Built(slots_LGC=slots_LGC, share_LGC=best_shares(problem, slots_LGC))
