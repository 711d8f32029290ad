"""Our heuristics as solvers of the registry: construct from nothing, re-plan what is live, or stay."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from moeless_opt.problems.arrays import FloatArray, SlotArray
from moeless_opt.problems.errors import InfeasibleError, ProblemError
from moeless_opt.problems.plan.evaluate import gpu_times
from moeless_opt.problems.plan.objective import risk
from moeless_opt.problems.plan.plan import Plan
from moeless_opt.problems.plan.result import ProgressCallback, Result
from moeless_opt.problems.spec.placement import equal_shares
from moeless_opt.problems.spec.problem import Problem
from moeless_opt.solvers.construct.equal import construct_equal
from moeless_opt.solvers.construct.fractional import construct_fractional
from moeless_opt.solvers.core.finish import Clock, Feature, finish
from moeless_opt.solvers.core.stopping import Stop
from moeless_opt.solvers.shares.best import best_shares
from moeless_opt.solvers.shares.flow import solve_shares

__all__ = ["Construct", "Stay"]

MOST_SCENARIOS = 8
"""Scenarios that a placement of their own is made for, the heaviest first."""


class Construct:
    """Sizing, packing and local search (equal split) or exact token shares on them (fractional)."""

    summary = "sizing + packing + local search; with a fractional split, exact token shares"
    options: ClassVar[frozenset[str]] = frozenset({"backend", "effort"})
    features: ClassVar[frozenset[Feature]] = frozenset(
        {
            Feature.EQUAL_SPLIT,
            Feature.FRACTIONAL,
            Feature.MIGRATION,
            Feature.HETEROGENEOUS,
            Feature.MEMORY,
            Feature.SCENARIOS,
            Feature.NODE_AWARE,
        }
    )

    def __init__(self, name: str = "construct") -> None:
        self.name = name

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
        """Construct a placement for the expected loads, or the best of several where there are scenarios."""
        began = Clock.begin()
        slots_LGC, share_LGC = self._construct(problem, problem.load_LE, seed, options)
        if problem.loads.shape[0] > 1:
            slots_LGC, share_LGC = self._over_scenarios(problem, slots_LGC, share_LGC, seed, options)
        elif problem.loads.load_TLNE is not None:
            share_LGC = best_shares(problem, slots_LGC)
        return finish(
            problem, slots_LGC, share_LGC, solver=self.name, began=began, options=options, seed=seed
        )

    @staticmethod
    def _construct(
        problem: Problem, load_LE: FloatArray, seed: int, options: dict[str, Any]
    ) -> tuple[SlotArray, FloatArray]:
        capacity_LG, speed_G = problem.capacity_LG, problem.topology.speed_G
        if problem.split == "equal":
            slots_LGC = construct_equal(load_LE, capacity_LG, speed_G, seed=seed, **options)
            return slots_LGC, equal_shares(slots_LGC, problem.experts)
        effort = options.get("effort", "normal")
        return construct_fractional(
            load_LE, capacity_LG, speed_G, seed=seed, effort="normal" if effort == "quick" else effort
        )

    def _over_scenarios(
        self,
        problem: Problem,
        slots_LGC: SlotArray,
        share_LGC: FloatArray,
        seed: int,
        options: dict[str, Any],
    ) -> tuple[SlotArray, FloatArray]:
        """Per layer, the best placement among those made for the mean, the envelope, and each scenario.

        Shares follow the traffic, so a placement is judged by its best shares in every scenario.
        """
        loads = problem.loads
        weight_T = np.ones(loads.shape[0]) if loads.weight_T is None else loads.weight_T
        heaviest = np.argsort(-weight_T, kind="stable")[:MOST_SCENARIOS]
        best_L = self._risk_L(problem, slots_LGC)
        slots_LGC = slots_LGC.copy()
        for load_LE in (loads.load_TLE.max(0), *(loads.load_TLE[t] for t in heaviest)):
            other_LGC, _ = self._construct(problem, np.asarray(load_LE), seed, options)
            risk_L = self._risk_L(problem, other_LGC)
            better_L = risk_L < best_L * (1 - 1e-9)
            best_L = np.minimum(best_L, risk_L)
            slots_LGC[better_L] = other_LGC[better_L]
        return slots_LGC, best_shares(problem, slots_LGC)

    @staticmethod
    def _risk_L(problem: Problem, slots_LGC: SlotArray) -> FloatArray:
        speed_G = problem.topology.speed_G
        even_LGC = equal_shares(slots_LGC, problem.experts)
        top_TL = []
        for load_LE in problem.loads.load_TLE:
            if problem.split == "equal":
                top_TL.append(gpu_times(load_LE, slots_LGC, even_LGC, speed_G).max(1))
            else:
                top_TL.append(solve_shares(load_LE, slots_LGC, speed_G).time_L)
        return risk(np.array(top_TL), problem.loads.weight_T, problem.objective)


class Stay:
    """Keep the live placement; with a fractional split, re-solve the token shares, which moves nothing."""

    name = "stay"
    summary = "keep the live placement and re-solve the token shares: no move at all"
    options: ClassVar[frozenset[str]] = frozenset()
    features: ClassVar[frozenset[Feature]] = Construct.features | {Feature.MOVE_LIMITS}

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
        """Solve the shares on what is live."""
        began = Clock.begin()
        if problem.current is None:
            raise ProblemError(
                "current", "is missing: solver 'stay' keeps the live placement, so it needs one"
            )
        slots_LGC = problem.current.slots_LGC
        missing = np.argwhere(problem.current.replicas_LE == 0)
        if missing.size:
            layer, expert = missing[0]
            raise InfeasibleError(
                f"current: expert {expert} of layer {layer} has no live replica; staying cannot bring it back"
            )
        share_LGC = best_shares(problem, slots_LGC)
        return finish(
            problem, slots_LGC, share_LGC, solver=self.name, began=began, options=options, seed=seed
        )
