"""The exact model as a mixed-integer programme, through PuLP or through ortools' MathOpt.

The model is written once (`exact_model`) and handed over row by row: to PuLP, which knows CBC, HiGHS,
Gurobi, CPLEX and others by name and writes ``.lp`` and ``.mps`` files; or to MathOpt, which carries HiGHS,
SCIP and CP-SAT inside ortools and so is always there.

Statuses are not taken on trust. PuLP 3 reports "Optimal" for what a time limit stopped, so ``sol_status``
decides; a bound is claimed only where the solver proved one.
"""

from __future__ import annotations

import datetime
import warnings
from os import PathLike, fspath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moeless_opt.problems.errors import ProblemError, SolverUnavailableError
from moeless_opt.solvers.exact.layer import ExactLayer, ExactResult, LinearModel, build, read_back, result_of

__all__ = ["solve_mathopt", "solve_pulp", "write_model"]

Float = NDArray[np.float64]

_GAP = 1e-7  # asked of the solvers; below what is claimed as proven


def solve_mathopt(
    layer: ExactLayer, solver: str = "highs", *, seconds: float = np.inf, threads: int = 1, gap: float = _GAP
) -> ExactResult:
    """Solve one layer through ortools' MathOpt.

    Parameters
    ----------
    layer : ExactLayer
        From `exact_model.layer_of`.
    solver : str
        ``"highs"``, ``"gscip"``, ``"cp_sat"`` or another of MathOpt's mixed-integer solvers, in any case.
    seconds : float
        Time limit.
    threads : int
        Threads of the solver.
    gap : float
        Relative gap at which it may stop.

    Raises
    ------
    SolverUnavailableError
        If MathOpt does not know the solver, or was built without it.
    """
    from ortools.math_opt.python import mathopt

    kinds = {kind.name.lower(): kind for kind in mathopt.SolverType}
    if solver.lower() not in kinds:
        raise SolverUnavailableError(f"solver: MathOpt has no {solver!r}; it has {', '.join(sorted(kinds))}")
    kind = kinds[solver.lower()]
    linear = build(layer)
    model = mathopt.Model(name="layer")
    variables = [
        model.add_variable(lb=low, ub=high, is_integer=whole, name=name)
        for name, low, high, whole in zip(linear.names, linear.low, linear.high, linear.whole, strict=True)
    ]
    for name, index, coefficient, low, high in linear.rows:
        row = model.add_linear_constraint(lb=low, ub=high, name=name)
        for v, c in zip(index, coefficient, strict=True):
            row.set_coefficient(variables[v], c)
    model.minimize(variables[linear.objective])
    # HiGHS inside one process must not change its number of threads, so it is left at its default there.
    parameters = mathopt.SolveParameters(
        threads=None if kind == mathopt.SolverType.HIGHS else threads,
        relative_gap_tolerance=gap,
        random_seed=1,
    )
    if np.isfinite(seconds):
        parameters.time_limit = datetime.timedelta(seconds=max(seconds, 0.01))
    hints = mathopt.ModelSolveParameters()
    if layer.slots_GC is not None and kind in (mathopt.SolverType.GSCIP, mathopt.SolverType.CP_SAT):
        values = dict(zip(variables, linear.start, strict=True))
        hints.solution_hints.append(mathopt.SolutionHint(variable_values=values))
    try:
        found = mathopt.solve(model, kind, params=parameters, model_params=hints)
    except (ValueError, RuntimeError) as error:
        raise SolverUnavailableError(f"solver: MathOpt's {solver} failed: {error}") from error
    reason = mathopt.TerminationReason
    plan = None
    if found.has_primal_feasible_solution():
        values = found.variable_values()
        plan = read_back(layer, linear, np.array([values[v] for v in variables]))
    bound = found.termination.objective_bounds.dual_bound * layer.scale
    return result_of(
        layer,
        plan,
        bound if np.isfinite(bound) else -np.inf,
        f"{solver}: {found.termination.reason.name.lower()} {found.termination.detail}".strip(),
        infeasible=found.termination.reason == reason.INFEASIBLE,
    )


def solve_pulp(
    layer: ExactLayer,
    solver: str | Any = None,
    *,
    seconds: float = np.inf,
    threads: int = 1,
    gap: float = _GAP,
    **options: Any,
) -> ExactResult:
    """Solve one layer through PuLP.

    Parameters
    ----------
    layer : ExactLayer
        From `exact_model.layer_of`.
    solver : str or PuLP solver, optional
        A name from ``pulp.listSolvers(onlyAvailable=True)``, a ready solver object, or nothing for the first
        available of HiGHS, CBC and SCIP.
    seconds, threads, gap
        As in `solve_mathopt`.
    **options
        Handed to the PuLP solver.

    Raises
    ------
    SolverUnavailableError
        If PuLP cannot find the solver.
    """
    import pulp

    linear = build(layer)
    problem, variables = _pulp(linear)
    if solver is None or isinstance(solver, str):
        solver = _pulp_solver(solver, seconds, threads, gap, layer.slots_GC is not None, options)
    if layer.slots_GC is not None:
        for variable, value in zip(variables, linear.start, strict=True):
            variable.setInitialValue(value, check=False)
    try:
        problem.solve(solver)
    except pulp.PulpError as error:
        raise SolverUnavailableError(f"solver: PuLP's {solver.name} failed: {error}") from error
    outcome = problem.sol_status
    plan = None
    if outcome in (pulp.LpSolutionOptimal, pulp.LpSolutionIntegerFeasible):
        values = np.array([0.0 if v.value() is None else v.value() for v in variables])
        plan = read_back(layer, linear, values)
    # PuLP tells no bound: only a proven optimum gives one, within the gap that the solver was allowed.
    bound = -np.inf
    if outcome == pulp.LpSolutionOptimal and plan is not None:
        bound = float(variables[linear.objective].value()) * (1 - gap) * layer.scale
    return result_of(
        layer,
        plan,
        bound,
        f"{solver.name}: {pulp.LpSolution[outcome].lower()}",
        infeasible=outcome == pulp.LpSolutionInfeasible and problem.status == pulp.LpStatusInfeasible,
    )


def _pulp(linear: LinearModel) -> tuple[Any, list[Any]]:
    import pulp

    problem = pulp.LpProblem("layer", pulp.LpMinimize)
    # PuLP 4 makes variables through the problem; before 3.3 there was no such method.
    make = getattr(problem, "add_variable", pulp.LpVariable)
    variables = [
        make(name, low, None if np.isinf(high) else high, pulp.LpInteger if whole else pulp.LpContinuous)
        for name, low, high, whole in zip(linear.names, linear.low, linear.high, linear.whole, strict=True)
    ]
    problem += variables[linear.objective], "largest_time"
    for name, index, coefficient, low, high in linear.rows:
        total = pulp.LpAffineExpression([(variables[v], c) for v, c in zip(index, coefficient, strict=True)])
        if low == high:
            problem += total == low, name
        elif np.isfinite(high):
            problem += total <= high, name
            if np.isfinite(low):
                problem += total >= low, f"{name}_low"
        else:
            problem += total >= low, name
    return problem, variables


def _pulp_solver(
    name: str | None, seconds: float, threads: int, gap: float, warm: bool, options: dict[str, Any]
) -> Any:
    import pulp

    available = pulp.listSolvers(onlyAvailable=True)
    if name is None:
        wanted = [s for s in ("HiGHS", "PULP_CBC_CMD", "COIN_CMD", "SCIP_CMD") if s in available]
        name = (wanted or available or ["none"])[0]
    matching = [s for s in available if name.lower() in (s.lower(), s.lower().removesuffix("_cmd"))]
    matching += [s for s in available if name.lower() == "cbc" and s in ("PULP_CBC_CMD", "COIN_CMD")]
    if not matching:
        raise SolverUnavailableError(
            f"solver: PuLP cannot find {name!r}; it finds {', '.join(available) or 'none'}"
        )
    settings: dict[str, Any] = {"msg": False, "gapRel": gap}
    if np.isfinite(seconds):
        settings["timeLimit"] = max(seconds, 0.01)
    if matching[0] != "HiGHS":
        settings["threads"] = threads
    if matching[0] in ("PULP_CBC_CMD", "COIN_CMD"):
        settings["warmStart"] = warm
    with warnings.catch_warnings():
        # The bundled CBC goes away in PuLP 4; until then it is the one solver that every PuLP has.
        warnings.simplefilter("ignore", DeprecationWarning)
        return pulp.getSolver(matching[0], **(settings | options))


def write_model(layer: ExactLayer, path: str | PathLike[str]) -> None:
    """Write the layer's model as ``.lp`` or ``.mps``, for any solver.

    Parameters
    ----------
    layer : ExactLayer
        From `exact_model.layer_of`. Times in the file are in units of the layer's lower bound.
    path : path
        Where to; its suffix tells the format.

    Raises
    ------
    ProblemError
        If the suffix is neither.
    """
    name = fspath(path)
    problem, _ = _pulp(build(layer))
    if name.lower().endswith(".lp"):
        problem.writeLP(name)
    elif name.lower().endswith(".mps"):
        problem.writeMPS(name)
    else:
        raise ProblemError("path", f"is {name!r}, must end in .lp or .mps")
