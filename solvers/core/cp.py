"""CP-SAT, so that it can be stopped: on our terms, not on its own.

Its handler of Ctrl-C is off: it swallows the signal while it runs, and leaves the process without Python's
handler after. The solve runs in a thread, while the calling one asks `stop` and is open to signals.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

from moeless_opt.solvers.core.stopping import Stop

if TYPE_CHECKING:
    from ortools.sat.python import cp_model

__all__ = ["solve_cp"]

_LOOK = 0.02  # seconds between two looks at `stop`


def solve_cp(
    model: cp_model.CpModel, stop: Stop, **parameters: Any
) -> tuple[cp_model.CpSolver, cp_model.CpSolverStatus]:
    """Solve a model until it is done or `stop` says so.

    Parameters
    ----------
    model : CpModel
        The model.
    stop : Stop
        When to stop; its time limit, if any, is handed on.
    **parameters
        Of CP-SAT, by their names.

    Returns
    -------
    CpSolver, status
        As after ``CpSolver.solve``; stopped, it is FEASIBLE or UNKNOWN with the bound reached.
    """
    from ortools.sat.python import cp_model

    solver = cp_model.CpSolver()
    solver.parameters.catch_sigint_signal = False
    for name, value in parameters.items():
        setattr(solver.parameters, name, value)
    if stop.remaining < float("inf"):
        solver.parameters.max_time_in_seconds = max(stop.remaining, 0.01)
    outcome: list[Any] = []

    def run() -> None:
        try:
            outcome.append(solver.solve(model))
        except BaseException as error:
            outcome.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        while thread.is_alive() and not stop():
            thread.join(_LOOK)
    finally:
        # Told again and again: before the search has begun there is nobody to hear it.
        while thread.is_alive():
            solver.stop_search()
            thread.join(_LOOK)
    if isinstance(outcome[0], BaseException):
        raise outcome[0]
    return solver, outcome[0]
