"""The default solver: what fits the problem best."""

from __future__ import annotations

from typing import Any, ClassVar

from moeless_opt.problems.errors import UnsupportedFeatureError
from moeless_opt.problems.plan.plan import Plan
from moeless_opt.problems.plan.result import ProgressCallback, Result
from moeless_opt.problems.spec.problem import Problem
from moeless_opt.solvers.construct.solver import Construct
from moeless_opt.solvers.core.finish import Feature, required_features
from moeless_opt.solvers.core.stopping import Stop
from moeless_opt.solvers.exact.solver import Portfolio
from moeless_opt.solvers.replan.solver import Replan
from moeless_opt.solvers.sizing.limits import Constrained
from moeless_opt.solvers.sizing.solver import ActivationAware, Sized

__all__ = ["Auto"]


class Auto:
    """Construct where nothing is live; re-plan where something is; prove where there is time."""

    name = "auto"
    summary = "the default: constructs, or re-plans what is live; with a time limit, proves small layers"
    options: ClassVar[frozenset[str]] = frozenset({"backend", "effort", "rounds"})
    features: ClassVar[frozenset[Feature]] = (
        Replan.features | Constrained.features | Sized.features | ActivationAware.features
    )

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
        needs = required_features(problem)
        base = Construct if fresh else Replan
        # The first that has what the problem needs: they go from the fastest to the most particular.
        for kind in (base, Construct, Constrained, Sized, ActivationAware):
            if needs <= kind.features:
                chosen: type[_Kind] = kind
                break
        else:
            lacking = ", ".join(sorted(feature.value for feature in needs - base.features))
            raise UnsupportedFeatureError(f"solver {self.name!r}: no one method takes all of: {lacking}")
        if chosen is Construct and stop.remaining < float("inf") and needs <= Portfolio.features:
            proven = Portfolio().solve(problem, stop=stop, seed=seed, initial=initial, progress=progress)
            return proven.replace(solver=self.name)
        own = {key: value for key, value in options.items() if key in chosen.options}
        return chosen(self.name).solve(
            problem, stop=stop, seed=seed, initial=initial, progress=progress, **own
        )


_Kind = Construct | Replan | Constrained | Sized | ActivationAware
