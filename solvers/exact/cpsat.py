"""The exact model in CP-SAT, which is strong where counts and exclusions matter more than fractions.

The same rows as in `layer`, in whole numbers: loads are rounded *down* to units of a ten-billionth of
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

from moeless_opt.solvers.core import FirstOf, MaxTime, NeverStop, Stop, solve_cp
from moeless_opt.solvers.exact.layer import ExactLayer, ExactResult, LayerModel, build, read_back, result_of

__all__ = ["solve_cpsat"]

_UNITS = {"equal": 10**10, "fractional": 10**7}  # to the lower bound; products of two stay in 64 bits
_SPEED_UNITS = 1_000_000
_LARGE = 5_000  # variables from which a start is worth more than symmetry
_DEAF = 4e-6  # seconds per variable
_OFTEN = 256  # variables or rows between two looks at `stop`


def solve_cpsat(
    layer: ExactLayer, *, stop: Stop | None = None, threads: int = 1, seed: int = 0, gap: float = 0.0
) -> ExactResult:
    """Solve one layer by CP-SAT.

    Parameters
    ----------
    layer : ExactLayer
        From `layer.layer_of`.
    stop : Stop, optional
        When to stop; asked while the model is written and all along the search.
    threads : int
        Workers. One is deterministic for a given seed unless time runs out.
    seed : int
        Random seed.
    gap : float
        Relative gap at which it may stop.

    Returns
    -------
    ExactResult
        Status FEASIBLE, not OPTIMAL, where only `stop` ended the search.
    """
    from ortools.sat.python import cp_model

    stop = NeverStop() if stop is None else stop
    # A fractional plan rounded to whole units may put one unit more than it had into each slot of a GPU.
    slop = int(layer.capacity_G.max()) if layer.split == "fractional" else 0
    linear = build(layer, stop)
    written = None if linear is None else _write(layer, linear, slop, stop)
    # To take in a large model and to let go of it takes CP-SAT a while, in which it hears nothing.
    stop = FirstOf(stop, MaxTime(stop.remaining - _DEAF * (0 if linear is None else len(linear.names))))
    if linear is None or written is None or stop():
        return result_of(layer, None, -np.inf, "cp-sat: stopped before its model was written")
    model, variables = written
    large = layer.slots_GC is not None and len(variables) > _LARGE
    solver, status = solve_cp(
        model,
        stop,
        num_workers=threads,
        random_seed=seed,
        relative_gap_limit=gap,
        **({"symmetry_level": 0} if large else {}),
    )
    plan, bound = None, -np.inf
    if status in (cp_model.OPTIMAL, cp_model.FEASIBLE):
        plan = read_back(layer, linear, np.array([float(solver.value(v)) for v in variables]))
    if status in (cp_model.OPTIMAL, cp_model.FEASIBLE, cp_model.UNKNOWN):
        bound = (solver.best_objective_bound - slop) / _UNITS[layer.split] * layer.scale
    return result_of(
        layer,
        plan,
        bound,
        f"cp-sat: {solver.status_name(status).lower()}",
        infeasible=status == cp_model.INFEASIBLE,
    )


def _write(layer: ExactLayer, linear: LayerModel, slop: int, stop: Stop) -> tuple[Any, list[Any]] | None:
    """The model in whole numbers, with the known plan as a hint, and its variables; None if told to stop."""
    from ortools.sat.python import cp_model

    model, scale = cp_model.CpModel(), _UNITS[layer.split]
    variables: list[Any] = []
    columns = zip(linear.names, linear.low, linear.high, linear.whole, strict=True)
    for number, (name, low, high, whole) in enumerate(columns):
        if number % _OFTEN == 0 and stop():
            return None
        if whole:
            variables.append(model.new_bool_var(name))
            if layer.slots_GC is not None:
                model.add_hint(variables[-1], round(linear.start[number]))
        else:
            top = 2.0**16 if np.isinf(high) else high
            # The known plan's time must stay reachable after rounding.
            units = ceil(top * scale) + (slop + 1 if number == linear.objective else 0)
            variables.append(model.new_int_var(int(low * scale), units, name))
    for number, (_, index, coefficient, least, most) in enumerate(linear.rows):
        if number % _OFTEN == 0 and stop():
            return None
        factors, bottom, ceiling = _whole_row(linear, scale, index, coefficient, least, most)
        total = cp_model.LinearExpr.weighted_sum([variables[v] for v in index], factors)
        model.add_linear_constraint(total, bottom, ceiling)
    model.minimize(variables[linear.objective])
    return model, variables


def _whole_row(
    linear: LayerModel, scale: int, index: list[int], coefficient: list[float], low: float, high: float
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
