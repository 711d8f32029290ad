"""Solvers by name. Ours are imported when first asked for; others come in by entry point."""

from __future__ import annotations

import difflib
import importlib
import warnings
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass, is_dataclass
from functools import lru_cache
from importlib.metadata import entry_points
from inspect import Parameter, signature
from types import MethodType

from moeless_opt.problems.errors import SolverUnavailableError, UnsupportedFeatureError
from moeless_opt.problems.spec import Problem
from moeless_opt.solvers.core.features import FEATURES, Feature, required_features
from moeless_opt.solvers.core.options import option_names
from moeless_opt.solvers.core.solver import Solver

__all__ = ["SOLVERS", "SolverInfo", "contract_gaps", "get_solver", "list_solvers", "require", "solver_names"]

ENTRY_POINTS = "moeless_opt.solvers"

SOLVERS: dict[str, str] = {
    "auto": "moeless_opt.solvers.auto:Auto",
    "construct": "moeless_opt.solvers.construct.solver:Construct",
    "replan": "moeless_opt.solvers.replan.solver:Replan",
    "cover": "moeless_opt.solvers.replan.cover:Cover",
    "min-moves": "moeless_opt.solvers.replan.prove:MinMoves",
    "constrained": "moeless_opt.solvers.sizing.limits:Constrained",
    "sized": "moeless_opt.solvers.sizing.solver:Sized",
    "activation": "moeless_opt.solvers.timed.solver:ActivationAware",
    "lexicographic": "moeless_opt.solvers.lexicographic.solver:Lexicographic",
    "locality": "moeless_opt.solvers.locality.solver:LocalitySolver",
    "stay": "moeless_opt.solvers.construct.solver:Stay",
    "static": "moeless_opt.solvers.baselines.solver:Static",
    "eplb": "moeless_opt.solvers.baselines.solver:Eplb",
    "eplb-hierarchical": "moeless_opt.solvers.baselines.solver:EplbHierarchical",
    "moeless": "moeless_opt.solvers.baselines.solver:MoEless",
    "lazarus": "moeless_opt.solvers.baselines.lazarus:Lazarus",
    "portfolio": "moeless_opt.solvers.exact.solver:Portfolio",
    "patterns": "moeless_opt.solvers.exact.solver:Patterns",
    "cpsat": "moeless_opt.solvers.exact.solver:CpSat",
    "milp": "moeless_opt.solvers.exact.solver:Milp",
}
"""Name -> ``module:class`` of the solvers that ship with the package."""


def solver_names() -> list[str]:
    """Names of all solvers, ours first."""
    others = sorted({entry.name for entry in entry_points(group=ENTRY_POINTS)} - set(SOLVERS))
    return [*SOLVERS, *others]


def get_solver(name: str) -> Solver:
    """A solver by its name.

    Raises
    ------
    SolverUnavailableError
        If there is none of that name, its package is missing, or it does not keep the contract.
    """
    target = SOLVERS.get(name)
    if target is None:
        found = [entry for entry in entry_points(group=ENTRY_POINTS) if entry.name == name]
        if not found:
            near = difflib.get_close_matches(name, solver_names(), n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(solver_names())}"
            raise SolverUnavailableError(f"solver: {name!r} is unknown; {hint}")
        target = found[0].value
    module, _, attribute = target.partition(":")
    try:
        loaded: object = importlib.import_module(module)
        for part in attribute.split("."):
            loaded = getattr(loaded, part)
        solver = loaded() if callable(loaded) else loaded
    except ImportError as error:
        raise SolverUnavailableError(f"solver: {name!r} needs a package that is missing: {error}") from error
    except Exception as error:  # a stranger's code may raise anything
        raise SolverUnavailableError(
            f"solver: {name!r} ({target}) cannot be loaded: {type(error).__name__}: {error}"
        ) from error
    if lacking := contract_gaps(solver):
        raise SolverUnavailableError(f"solver: {name!r} ({target}) {'; '.join(lacking)}")
    assert isinstance(solver, Solver)
    return solver


def contract_gaps(solver: object) -> list[str]:
    """What an object lacks to be a solver; empty if nothing."""
    gaps = []
    for key in ("name", "summary"):
        if not isinstance(getattr(solver, key, None), str):
            gaps.append(f"has no {key!r} (a text)")
    features = getattr(solver, "features", None)
    if not isinstance(features, Set) or not all(isinstance(one, Feature) for one in features):
        gaps.append("has no 'features' (a frozenset of Feature)")
    solve = getattr(solver, "solve", None)
    if not callable(solve):
        return [*gaps, "has no 'solve'"]
    takes = _parameters(solve.__func__) if isinstance(solve, MethodType) else signature(solve).parameters
    if not any(one.kind is one.VAR_KEYWORD for one in takes.values()):
        lacking = [key for key in ("stop", "seed", "initial", "progress") if key not in takes]
        if lacking:
            gaps.append(f"has a 'solve' without {', '.join(lacking)}")
    return gaps


@lru_cache(maxsize=64)
def _parameters(function: Callable[..., object]) -> Mapping[str, Parameter]:
    """Parameters of a method, which take longer to find out than a small layer to plan."""
    return signature(function).parameters


@dataclass(frozen=True, slots=True)
class SolverInfo:
    """A row of the list of solvers.

    Parameters
    ----------
    name, summary : str
        As the solver says.
    features : frozenset of Feature
        What it honours.
    options : tuple of str
        What may be given to it by keyword.
    problem : str
        Why it cannot be used; empty if it can.
    """

    name: str
    summary: str = ""
    features: frozenset[Feature] = frozenset()
    options: tuple[str, ...] = ()
    problem: str = ""


def list_solvers() -> list[SolverInfo]:
    """All solvers, those that cannot be used too: their row says why, and a warning does.

    Warns
    -----
    RuntimeWarning
        For a plug-in that fails to import or lacks a part of the contract.
    """
    rows = []
    for name in solver_names():
        try:
            solver = get_solver(name)
        except SolverUnavailableError as error:
            warnings.warn(str(error), RuntimeWarning, stacklevel=2)
            rows.append(SolverInfo(name, problem=str(error)))
            continue
        options = getattr(solver, "Options", None)
        names = option_names(options) if is_dataclass(options) and isinstance(options, type) else ()
        rows.append(SolverInfo(name, solver.summary, frozenset(solver.features), names))
    return rows


def require(solver: Solver, problem: Problem) -> None:
    """Refuse a problem that asks for what the solver lacks.

    Raises
    ------
    UnsupportedFeatureError
        Naming the features.
    """
    needs = required_features(problem)
    lacking = needs - solver.features
    if lacking:
        names = ", ".join(sorted(feature.value for feature in lacking))
        able = [name for name, has in FEATURES.items() if needs <= has]
        hint = f"; solvers that have it: {', '.join(able)}" if able else ""
        raise UnsupportedFeatureError(f"solver {solver.name!r} does not support {names}{hint}")
