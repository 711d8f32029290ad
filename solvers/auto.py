"""The default solver: what fits the problem best."""

from __future__ import annotations

from typing import Any, ClassVar

from moeless_opt.problems.plan import Plan, ProgressCallback, Result
from moeless_opt.problems.problem import Problem
from moeless_opt.solvers.base import Feature, Stop, required_features
from moeless_opt.solvers.constrained import Constrained
from moeless_opt.solvers.planners import Construct
from moeless_opt.solvers.replanner import Replan

__all__ = ["Auto"]


class Auto:
    """Construct where nothing is live; re-plan where something is."""

    name = "auto"
    summary = "the default: re-plans what is live, or constructs"
    features: ClassVar[frozenset[Feature]] = Replan.features | Constrained.features

    def solve(
        self,
        problem: Problem,
        *,
        stop: Stop,
        seed: int = 0,
        initial: Plan | None = None,
        progress: ProgressCallback | None = None,
        **options: Any,
    ) -> Result:
        """Choose and solve."""
        fresh = problem.current is None or "moves" not in problem.objective.priorities
        chosen: type[Construct | Replan | Constrained] = Construct if fresh else Replan
        if required_features(problem) & Constrained.features - chosen.features:
            chosen = Constrained
        return chosen(self.name).solve(
            problem, stop=stop, seed=seed, initial=initial, progress=progress, **options
        )
