"""The exact model of a layer as a mixed-integer programme: HiGHS and whatever else `core.linear` finds."""

from __future__ import annotations

from os import PathLike

import numpy as np

from moeless_opt.solvers.core import GAP, Stop, solve_linear, write_linear
from moeless_opt.solvers.exact.layer import ExactLayer, ExactResult, build, read_back, result_of

__all__ = ["solve_milp", "write_model"]


def solve_milp(
    layer: ExactLayer,
    engine: str = "highs",
    *,
    stop: Stop | None = None,
    threads: int = 1,
    gap: float = GAP,
    seed: int = 1,
) -> ExactResult:
    """Solve one layer by a mixed-integer solver.

    Parameters
    ----------
    layer : ExactLayer
        From `layer.layer_of`.
    engine, threads, gap, seed
        As in `core.linear.solve_linear`: ``"highs"``, ``"pulp"``, ...
    stop : Stop, optional
        When to stop; asked while the model is written and all along the search.

    Raises
    ------
    SolverUnavailableError
        If nobody knows the engine, or it fails.
    """
    linear = build(layer, stop)
    if linear is None:
        return result_of(layer, None, -np.inf, f"{engine}: stopped before its model was written")
    warm = layer.slots_GC is not None
    found = solve_linear(linear, engine, stop=stop, threads=threads, gap=gap, seed=seed, warm=warm)
    plan = None if found.value_V is None else read_back(layer, linear, found.value_V)
    infeasible = found.status == "infeasible"
    bound = -np.inf if infeasible else found.bound * layer.scale
    return result_of(layer, plan, bound, found.message, infeasible=infeasible)


def write_model(layer: ExactLayer, path: str | PathLike[str]) -> None:
    """Write the layer's model as ``.lp`` or ``.mps``, for any solver.

    Parameters
    ----------
    layer : ExactLayer
        From `layer.layer_of`. Times in the file are in units of the layer's lower bound.
    path : path
        Where to; its suffix tells the format.

    Raises
    ------
    FormatError
        If the suffix is neither, or the file cannot be written.
    """
    model = build(layer)
    assert model is not None
    write_linear(model, path)
