"""The exact model in CP-SAT, which is strong where counts and exclusions matter more than fractions.

The same rows as in `exact_model`, in whole numbers: loads are rounded *down* to units of a ten-billionth of
the lower bound, so that CP-SAT's bound stays below the true optimum, and the plan it finds is evaluated
with the true loads. In the fractional split the tokens served are whole units as well (of a
ten-millionth), and the bound gives the rounding back.

A full feasible hint is lost in presolve if the solver detects symmetry in this model. Small layers are proven
faster with symmetry, and the known plan's time is an upper bound in any case; large ones keep the hint with
``symmetry_level = 0``. Whatever comes out, the better of the known plan and the solution is returned.
"""

from __future__ import annotations

from math import ceil
from typing import Any

import numpy as np

from moeless_opt.solvers.exact.layer import ExactLayer, ExactResult, LinearModel, build, read_back, result_of

__all__ = ["solve_cpsat"]

_UNITS = {"equal": 10**10, "fractional": 10**7}  # to the lower bound; products of two stay in 64 bits
_SPEED_UNITS = 1_000_000
_LARGE = 5_000  # variables from which a start is worth more than symmetry


def solve_cpsat(
    layer: ExactLayer, *, seconds: float = np.inf, threads: int = 1, seed: int = 0, gap: float = 0.0
) -> ExactResult:
    """Solve one layer by CP-SAT.

    Parameters
    ----------
    layer : ExactLayer
        From `exact_model.layer_of`.
    seconds : float
        Time limit.
    threads : int
        Workers. One is deterministic for a given seed unless time runs out.
    seed : int
        Random seed.
    gap : float
        Relative gap at which it may stop.

    Returns
    -------
    ExactResult
        Status FEASIBLE, not OPTIMAL, where only the time limit ended the search.
    """
    from ortools.sat.python import cp_model

    linear = build(layer)
    scale = _UNITS[layer.split]
    model = cp_model.CpModel()
    variables: list[Any] = []
    # A fractional plan rounded to whole units may put one unit more than it had into each slot of a GPU.
    slop = int(layer.capacity_G.max()) if layer.split == "fractional" else 0
    for number, (name, low, high, whole) in enumerate(
        zip(linear.names, linear.low, linear.high, linear.whole, strict=True)
    ):
        if whole:
            variables.append(model.new_bool_var(name))
        else:
            top = 2.0**16 if np.isinf(high) else high
            # The known plan's time must stay reachable after rounding.
            units = ceil(top * scale) + (slop + 1 if number == linear.objective else 0)
            variables.append(model.new_int_var(int(low * scale), units, name))
    for _, index, coefficient, least, most in linear.rows:
        factors, bottom, ceiling = _whole_row(linear, scale, index, coefficient, least, most)
        total = sum(c * variables[v] for v, c in zip(index, factors, strict=True))
        model.add_linear_constraint(total, bottom, ceiling)
    model.minimize(variables[linear.objective])
    solver = cp_model.CpSolver()
    solver.parameters.num_workers = threads
    solver.parameters.random_seed = seed
    solver.parameters.relative_gap_limit = gap
    if np.isfinite(seconds):
        solver.parameters.max_time_in_seconds = max(seconds, 0.01)
    if layer.slots_GC is not None:
        if len(variables) > _LARGE:
            solver.parameters.symmetry_level = 0
        for variable, value, whole in zip(variables, linear.start, linear.whole, strict=True):
            if whole:
                model.add_hint(variable, round(value))
    status = solver.solve(model)
    plan = None
    bound = -np.inf
    if status in (cp_model.OPTIMAL, cp_model.FEASIBLE):
        plan = read_back(layer, linear, np.array([float(solver.value(v)) for v in variables]))
    if status in (cp_model.OPTIMAL, cp_model.FEASIBLE, cp_model.UNKNOWN):
        bound = (solver.best_objective_bound - slop) / scale * layer.scale
    return result_of(
        layer,
        plan,
        bound,
        f"cp-sat: {solver.status_name(status).lower()}",
        infeasible=status == cp_model.INFEASIBLE,
    )


def _whole_row(
    linear: LinearModel, scale: int, index: list[int], coefficient: list[float], low: float, high: float
) -> tuple[list[int], int, int]:
    """Return a row in whole numbers that every plan still satisfies (up to the slop of `solve_cpsat`)."""
    far = 1 << 60
    mixed = not all(linear.whole[v] for v in index)
    if linear.objective in index:
        # Work of a GPU within speed * T: work rounded down, the speed up.
        speed = -coefficient[index.index(linear.objective)]
        if all(linear.whole[v] for v in index if v != linear.objective):
            factors = [
                -1 if v == linear.objective else int(c / speed * scale)
                for v, c in zip(index, coefficient, strict=True)
            ]
        else:
            factors = [-ceil(speed * _SPEED_UNITS) if v == linear.objective else _SPEED_UNITS for v in index]
        return factors, -far, 0
    if mixed:
        factors = [
            round(c) if not linear.whole[v] else (-1 if c < 0 else 1) * ceil(abs(c) * scale)
            for v, c in zip(index, coefficient, strict=True)
        ]
        least = -far if np.isinf(low) else int(low * scale)
        return factors, least, far if np.isinf(high) else int(high * scale)
    least = -far if np.isinf(low) else round(low)
    return [round(c) for c in coefficient], least, far if np.isinf(high) else round(high)
