"""Solvers by name. Ours are imported when first asked for; others come in by entry point."""

from __future__ import annotations

import difflib
import importlib
from importlib.metadata import entry_points

from moeless_opt.problems.errors import SolverUnavailableError, UnsupportedFeatureError
from moeless_opt.problems.spec.problem import Problem
from moeless_opt.solvers.core.finish import Solver, required_features

__all__ = ["BUILT_IN", "get_solver", "list_solvers", "require", "solver_names"]

ENTRY_POINTS = "moeless_opt.solvers"

BUILT_IN: dict[str, str] = {
    "auto": "moeless_opt.solvers.auto:Auto",
    "construct": "moeless_opt.solvers.construct.solver:Construct",
    "replan": "moeless_opt.solvers.replan.solver:Replan",
    "min-moves": "moeless_opt.solvers.replan.solver:MinMoves",
    "constrained": "moeless_opt.solvers.sizing.limits:Constrained",
    "sized": "moeless_opt.solvers.sizing.solver:Sized",
    "activation": "moeless_opt.solvers.sizing.solver:ActivationAware",
    "stay": "moeless_opt.solvers.construct.solver:Stay",
    "static": "moeless_opt.solvers.baselines.solver:Static",
    "eplb": "moeless_opt.solvers.baselines.solver:Eplb",
    "eplb-hierarchical": "moeless_opt.solvers.baselines.solver:EplbHierarchical",
    "moeless": "moeless_opt.solvers.baselines.solver:MoEless",
    "oracle": "moeless_opt.solvers.baselines.solver:Oracle",
    "portfolio": "moeless_opt.solvers.exact.solver:Portfolio",
    "patterns": "moeless_opt.solvers.exact.solver:Patterns",
    "cpsat": "moeless_opt.solvers.exact.solver:CpSat",
    "milp": "moeless_opt.solvers.exact.solver:Milp",
}
"""Name -> ``module:class`` of the solvers that ship with the package."""


def solver_names() -> list[str]:
    """Names of all solvers, ours first."""
    others = sorted({entry.name for entry in entry_points(group=ENTRY_POINTS)} - set(BUILT_IN))
    return [*BUILT_IN, *others]


def get_solver(name: str) -> Solver:
    """A solver by its name.

    Raises
    ------
    SolverUnavailableError
        If there is none of that name, or its package is missing.
    """
    target = BUILT_IN.get(name)
    if target is None:
        found = [entry for entry in entry_points(group=ENTRY_POINTS) if entry.name == name]
        if not found:
            near = difflib.get_close_matches(name, solver_names(), n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(solver_names())}"
            raise SolverUnavailableError(f"solver: {name!r} is unknown; {hint}")
        target = found[0].value
    module, _, attribute = target.partition(":")
    try:
        factory = getattr(importlib.import_module(module), attribute)
    except ImportError as error:
        raise SolverUnavailableError(f"solver: {name!r} needs a package that is missing: {error}") from error
    solver: Solver = factory()
    return solver


def list_solvers() -> list[Solver]:
    """All solvers whose packages are installed."""
    solvers = []
    for name in solver_names():
        try:
            solvers.append(get_solver(name))
        except SolverUnavailableError:
            continue
    return solvers


def require(solver: Solver, problem: Problem) -> None:
    """Refuse a problem that asks for what the solver lacks.

    Raises
    ------
    UnsupportedFeatureError
        Naming the features.
    """
    lacking = required_features(problem) - solver.features
    if lacking:
        names = ", ".join(sorted(feature.value for feature in lacking))
        able = [
            s.name
            for s in list_solvers()
            if s.name != "oracle" and not required_features(problem) - s.features
        ]
        hint = f"; solvers that have it: {', '.join(able)}" if able else ""
        raise UnsupportedFeatureError(f"solver {solver.name!r} does not support {names}{hint}")
