"""The default solver: a chain of methods, the first that accepts the problem solves it."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from moeless_opt.problems.errors import ProblemError, UnsupportedFeatureError
from moeless_opt.problems.plan import Plan, ProgressCallback, Result, order_of, usual_order
from moeless_opt.problems.spec import PRIORITIES, Problem
from moeless_opt.solvers.core import (
    FEATURES,
    SOLVERS,
    Heuristic,
    Stop,
    bytes_alone,
    option_names,
    required_features,
)

__all__ = ["CHAIN", "Auto", "choose"]

_PROVEN = 100  # pairs of an expert and a GPU up to which any order is proven


def _is_live(problem: Problem, limited: bool) -> bool:
    return problem.current is not None and "moves" in problem.objective.priorities


def _orders(problem: Problem, limited: bool) -> bool:
    """An order of its own: neither the default nor balance alone, nor one that a horizon weighs."""
    wish = problem.objective
    if usual_order(problem) and wish.horizon is not None:
        return False
    return wish.priorities != PRIORITIES and order_of(problem) != ("balance",)


def _has_time_to_prove(problem: Problem, limited: bool) -> bool:
    return limited and not _is_live(problem, limited)


def _need_not_fill(problem: Problem, limited: bool) -> bool:
    """Bytes alone limit the replicas, and memory counts: no more than the balance tolerance asks for."""
    return bytes_alone(problem) and "memory" in problem.objective.priorities


def _always(problem: Problem, limited: bool) -> bool:
    return True


def _near(problem: Problem, limited: bool) -> bool:
    """Balance, then where tokens are served; what `lexicographic` proves in no time is left to it."""
    order = order_of(problem)
    return (
        _orders(problem, limited)
        and order[0] == "balance"
        and "memory" not in order
        and bool({"traffic", "groups", "hops"} & set(order))
        and (problem.experts * problem.topology.gpus > _PROVEN or problem.split == "nearest")
    )


CHAIN: tuple[tuple[str, Callable[[Problem, bool], bool]], ...] = (
    ("locality", _near),
    ("lexicographic", _orders),
    ("sized", _need_not_fill),
    ("replan", _is_live),
    ("portfolio", _has_time_to_prove),
    ("construct", _always),
    ("constrained", _always),
    ("sized", _always),
    ("activation", _always),
    ("locality", _always),
)
"""Solver, and what it is meant for, besides its features; from the fastest to the most particular."""


def choose(problem: Problem, *, limited: bool) -> str:
    """Name of the first of the chain that takes all of the problem.

    Parameters
    ----------
    problem : Problem
        What is to be solved.
    limited : bool
        Whether there is a time limit, which leaves time to prove.

    Raises
    ------
    UnsupportedFeatureError
        If none does.
    """
    needs = required_features(problem)
    for name, accepts in CHAIN:
        if needs <= FEATURES[name] and accepts(problem, limited):
            return name
    base = FEATURES["replan" if _is_live(problem, limited) else "construct"]
    lacking = ", ".join(sorted(feature.value for feature in needs - base))
    raise UnsupportedFeatureError(f"solver 'auto': no one method takes all of: {lacking}")


class Auto:
    """Construct where nothing is live; re-plan where something is; prove where there is time."""

    name = "auto"
    summary = "the default: constructs, or re-plans what is live; with a time limit, proves small layers"
    features = FEATURES["auto"]

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
        """Choose and solve.

        Raises
        ------
        ProblemError
            If an option is none of the chosen solver's.
        UnsupportedFeatureError
            If no one method takes all of the problem.
        """
        if options and bytes_alone(problem):  # options are those of a construction
            problem = problem.replace(sizing=problem.sizing.replace(policy="fill"))
        chosen = choose(problem, limited=stop.remaining < float("inf"))
        module, _, attribute = SOLVERS[chosen].partition(":")
        solver: Heuristic = getattr(importlib.import_module(module), attribute)(self.name)
        names = option_names(solver.Options)
        unknown = [name for name in options if name not in names]
        if unknown:
            has = ", ".join(names) or "none"
            raise ProblemError(
                min(unknown), f"is no option of {chosen!r}, which solver 'auto' takes here (it has: {has})"
            )
        return solver.solve(problem, stop=stop, seed=seed, initial=initial, progress=progress, **options)
