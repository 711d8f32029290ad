"""Linear programmes solved in a process of their own, which can be told to go at any moment.

HiGHS inside MathOpt cannot be interrupted and CBC is a process anyway, so `linear` hands its programmes to a
helper: this file, run by path. It reads jobs from its standard input and answers on its standard output until
the input ends; then it takes itself down, and with it whatever its solvers have started. It imports nothing
of the package, so that it starts fast. Within the package `pulp_problem` is used to write files, too.

A job is a dictionary of arrays: ``low, high, whole, cost`` (and ``start`` or None) of the variables [V];
``row, column, factor`` of the entries, by row, and ``least, most`` of the rows [R]; ``engine``, ``threads``,
``gap``, ``seed`` (None: the solver's own), ``deadline`` on the monotonic clock.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import pickle
import queue
import shutil
import signal
import threading
import time as clock
import warnings
from typing import Any

__all__ = ["answer", "pulp_problem", "serve"]

Job = dict[str, Any]

_PULP_FIRST = ("HiGHS", "PULP_CBC_CMD", "COIN_CMD", "SCIP_CMD", "GLPK_CMD")
_CBC = ("PULP_CBC_CMD", "COIN_CMD")


class UnavailableError(Exception):
    """The engine is unknown, not installed, or refuses the programme."""


def serve(temporary: str) -> None:
    """Answer jobs until the input ends; files of solvers lie in the folder `temporary`."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    source, sink = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(null, 1)  # solvers like to print
    jobs: queue.SimpleQueue[Job] = queue.SimpleQueue()

    def work() -> None:
        while True:
            pickle.dump(answer(jobs.get()), sink)
            sink.flush()

    # The main thread goes on reading: its input's end is how it learns that nobody waits any more.
    threading.Thread(target=work, daemon=True).start()
    with contextlib.suppress(EOFError, OSError, pickle.UnpicklingError):
        while True:
            jobs.put(pickle.load(source))
    shutil.rmtree(temporary, ignore_errors=True)
    if hasattr(os, "killpg") and os.getpgrp() == os.getpid():
        os.killpg(0, signal.SIGKILL)
    os._exit(0)


def answer(job: Job) -> dict[str, Any]:
    """Solve a job: ``status, values, bound, message``, or ``error`` with the reason."""
    try:
        kind = _mathopt_kind(job["engine"])
        return _with_pulp(job) if kind is None else _with_mathopt(job, kind)
    except UnavailableError as error:
        return {"error": str(error)}
    except ImportError as error:
        return {"error": f"engine {job['engine']!r} needs a package that is missing: {error}"}
    except Exception as error:
        return {"error": f"engine {job['engine']!r} failed: {type(error).__name__}: {error}"}


def _mathopt_kind(engine: str) -> Any:
    if engine.lower().partition(":")[0] == "pulp":
        return None
    from ortools.math_opt.python import mathopt

    kinds = {kind.name.lower(): kind for kind in mathopt.SolverType}
    if engine.lower() not in kinds:
        known = ", ".join(sorted(kinds))
        raise UnavailableError(f"{engine!r} is unknown; it can be 'pulp', 'pulp:NAME', {known}")
    return kinds[engine.lower()]


def _left(job: Job) -> float:
    return max(float(job["deadline"]) - clock.monotonic(), 0.01)


def _with_mathopt(job: Job, kind: Any) -> dict[str, Any]:
    from ortools.math_opt.python import mathopt

    model = mathopt.Model.from_model_proto(_proto(job))
    variables = sorted(model.variables(), key=lambda variable: variable.id)
    # HiGHS inside one process must not change its number of threads, so it is left at its default there.
    parameters = mathopt.SolveParameters(
        threads=None if kind == mathopt.SolverType.HIGHS else job["threads"],
        relative_gap_tolerance=job["gap"],
        random_seed=job["seed"],
        node_limit=job["nodes"],
    )
    if _left(job) < float("inf"):
        parameters.time_limit = datetime.timedelta(seconds=_left(job))
    hints = mathopt.ModelSolveParameters()
    if job["start"] is not None and kind in (mathopt.SolverType.GSCIP, mathopt.SolverType.CP_SAT):
        start = dict(zip(variables, job["start"].tolist(), strict=True))
        hints.solution_hints.append(mathopt.SolutionHint(variable_values=start))
    try:
        found = mathopt.solve(model, kind, params=parameters, model_params=hints)
    except (ValueError, RuntimeError) as error:
        raise UnavailableError(f"MathOpt's {job['engine']} failed: {error}") from error
    reason, reasons = found.termination.reason, mathopt.TerminationReason
    values = None
    status = "infeasible" if reason == reasons.INFEASIBLE else "no_solution"
    if found.has_primal_feasible_solution():
        values = [float(value) for value in found.variable_values(variables)]
        status = "optimal" if reason == reasons.OPTIMAL else "feasible"
    bound = float(found.termination.objective_bounds.dual_bound)
    # Of an error nothing is worth having: HiGHS then tells an objective of 0.
    if reason not in (reasons.OPTIMAL, reasons.FEASIBLE, reasons.INFEASIBLE, reasons.NO_SOLUTION_FOUND):
        status, values, bound = "no_solution", None, -float("inf")
    words = f"{job['engine']}: {reason.name.lower()} {found.termination.detail}".strip()
    return {"status": status, "values": values, "bound": bound, "message": words}


def _proto(job: Job) -> Any:
    """The programme as MathOpt's message: row by row through its Python objects takes ten times as long."""
    from ortools.math_opt import model_pb2

    proto = model_pb2.ModelProto()
    columns, rows = proto.variables, proto.linear_constraints
    columns.ids.extend(range(len(job["low"])))
    columns.lower_bounds.extend(job["low"].tolist())
    columns.upper_bounds.extend(job["high"].tolist())
    columns.integers.extend(job["whole"].tolist())
    rows.ids.extend(range(len(job["least"])))
    rows.lower_bounds.extend(job["least"].tolist())
    rows.upper_bounds.extend(job["most"].tolist())
    entries = proto.linear_constraint_matrix
    entries.row_ids.extend(job["row"].tolist())
    entries.column_ids.extend(job["column"].tolist())
    entries.coefficients.extend(job["factor"].tolist())
    priced = job["cost"].nonzero()[0]
    proto.objective.linear_coefficients.ids.extend(priced.tolist())
    proto.objective.linear_coefficients.values.extend(job["cost"][priced].tolist())
    return proto


def _with_pulp(job: Job) -> dict[str, Any]:
    import pulp

    problem, variables = pulp_problem(job)
    solver = _pulp_solver(job)
    if job["start"] is not None:
        for variable, value in zip(variables, job["start"].tolist(), strict=True):
            variable.setInitialValue(value, check=False)
    try:
        problem.solve(solver)
    except pulp.PulpError as error:
        if clock.monotonic() >= job["deadline"]:  # CBC crashes where time runs out while it reads a start
            words = f"{solver.name}: failed as its time ran out"
            return {"status": "no_solution", "values": None, "bound": -float("inf"), "message": words}
        raise UnavailableError(f"PuLP's {solver.name} failed: {error}") from error
    # `status` says Optimal for what a time limit stopped, too; `sol_status` tells the difference.
    outcome, values, bound, status = problem.sol_status, None, -float("inf"), "no_solution"
    if outcome in (pulp.LpSolutionOptimal, pulp.LpSolutionIntegerFeasible):
        values = [float(variable.value() or 0.0) for variable in variables]
        status = "feasible"
        if outcome == pulp.LpSolutionOptimal:
            status = "optimal"
            # PuLP tells no bound: only a proven optimum gives one, within the gap that was allowed.
            best = float(job["cost"] @ values)
            bound = best - job["gap"] * abs(best)
    elif outcome == pulp.LpSolutionInfeasible and problem.status == pulp.LpStatusInfeasible:
        status = "infeasible"
    words = f"{solver.name}: {pulp.LpSolution[outcome].lower()}"
    return {"status": status, "values": values, "bound": bound, "message": words}


def pulp_problem(
    job: Job, names: list[str] | None = None, row_names: list[str] | None = None
) -> tuple[Any, list[Any]]:
    """The programme as PuLP has it, and its variables."""
    import pulp

    names = [f"v{v}" for v in range(len(job["low"]))] if names is None else names
    row_names = [f"r{r}" for r in range(len(job["least"]))] if row_names is None else row_names
    with warnings.catch_warnings():
        # 3.3 announces 4.0's way to make variables; before there is none but the old.
        warnings.simplefilter("ignore", DeprecationWarning)
        problem = pulp.LpProblem("programme", pulp.LpMinimize)
        make = getattr(problem, "add_variable", pulp.LpVariable)
        columns = zip(names, *(job[key].tolist() for key in ("low", "high", "whole")), strict=True)
        variables = [
            make(name, low, None if high == float("inf") else high, "Integer" if whole else "Continuous")
            for name, low, high, whole in columns
        ]
        priced = job["cost"].nonzero()[0].tolist()
        problem += pulp.LpAffineExpression([(variables[v], float(job["cost"][v])) for v in priced]), "cost"
        terms: list[list[Any]] = [[] for _ in row_names]
        entries = zip(*(job[key].tolist() for key in ("row", "column", "factor")), strict=True)
        for row, column, factor in entries:
            terms[row].append((variables[column], factor))
        limits = zip(row_names, terms, job["least"].tolist(), job["most"].tolist(), strict=True)
        for name, some, least, most in limits:
            total = pulp.LpAffineExpression(some)
            if least == most:
                problem += total == least, name
                continue
            if most < float("inf"):
                problem += total <= most, name
            if least > -float("inf"):
                problem += total >= least, f"{name}_low" if most < float("inf") else name
    return problem, variables


def _pulp_solver(job: Job) -> Any:
    import pulp

    name = job["engine"].lower().partition(":")[2]
    available = pulp.listSolvers(onlyAvailable=True)
    matching = [s for s in available if name in (s.lower(), s.lower().removesuffix("_cmd"))]
    if name in ("", "cbc"):
        matching = [s for s in (_CBC if name else _PULP_FIRST) if s in available]
    if not matching:
        wanted = f"cannot find {name!r}; it finds" if name else "finds no solver that we use, but"
        raise UnavailableError(f"PuLP {wanted} {', '.join(available) or 'none'}")
    settings: dict[str, Any] = {"msg": False, "gapRel": job["gap"]}
    if _left(job) < float("inf"):
        settings["timeLimit"] = _left(job)
    if matching[0] != "HiGHS":
        settings["threads"] = job["threads"]
    if matching[0] in _CBC:
        settings["warmStart"] = job["start"] is not None
    if matching[0] == "GLPK_CMD":  # takes neither
        settings = {key: settings[key] for key in ("msg", "timeLimit") if key in settings}
    with warnings.catch_warnings():
        # The bundled CBC goes away in PuLP 4; until then it is the one solver that every PuLP has.
        warnings.simplefilter("ignore", DeprecationWarning)
        return pulp.getSolver(matching[0], **settings)


if __name__ == "__main__":
    serve(os.environ["TMPDIR"])
