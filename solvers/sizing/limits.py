"""MoEless's rule of the coefficient of variation, with every limit honoured."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace

import numpy as np

from moeless_opt.problems.arrays import IntArray, SlotArray
from moeless_opt.problems.errors import InfeasibleError
from moeless_opt.problems.spec import Problem
from moeless_opt.solvers.construct import Construct
from moeless_opt.solvers.core import Built, Heuristic, NoOptions, Task, best_over_scenarios
from moeless_opt.solvers.limits import apportioned, place_counts, rules_of, within_budgets
from moeless_opt.solvers.shares import best_shares
from moeless_opt.solvers.sizing.minimal import fewest_for_cv
from moeless_opt.solvers.sizing.near_live import near_live

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
        tables = [best_over_scenarios(problem, placed, stop=task.stop, moves=moves)]
        if problem.current is None or not moves:
            return Built(slots_LGC=tables[0], share_LGC=best_shares(problem, tables[0]))
        if not task.stop():
            # Warm GPUs first may leave others idle: place as if nothing were live as well.
            with suppress(InfeasibleError):
                cold = problem.replace(current=None, known=None)
                tables.append(best_over_scenarios(cold, placed, stop=task.stop))
        rules = [
            replace(one, least_E=count_E, most_E=count_E, total=int(count_E.sum()))
            for one, count_E in zip(rules_of(problem), counts_LE, strict=True)
        ]
        slots_LGC = near_live(problem, tables, rules, stop=task.stop)
        return Built(slots_LGC=slots_LGC, share_LGC=best_shares(problem, slots_LGC))
