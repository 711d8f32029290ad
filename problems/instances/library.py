"""The shipped instances: by name, with their source, best known values and bounds.

Generated ones are recipes (family, shape, seed), not tables; ``tests/benchmarks/known_values.py`` solves them
all and records what it proved.
"""

from __future__ import annotations

import difflib
from functools import cache
from pathlib import Path

from moeless_opt.problems.errors import ProblemError
from moeless_opt.problems.io import load_problem
from moeless_opt.problems.plan import PROVEN
from moeless_opt.problems.spec import Problem

__all__ = ["INSTANCES", "instance_names", "instance_path", "instance_summary", "load_instance"]

INSTANCES = Path(__file__).parent


@cache
def instance_names() -> tuple[str, ...]:
    """Names of the shipped instances, sorted."""
    return tuple(sorted(path.stem for path in INSTANCES.glob("*.json")))


def instance_path(name: str) -> Path:
    """The JSON file of an instance.

    Raises
    ------
    ProblemError
        If there is none of that name.
    """
    if name not in instance_names():
        near = difflib.get_close_matches(name, instance_names(), n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(instance_names())}"
        raise ProblemError("instance", f"{name!r} is unknown; {hint}")
    return INSTANCES / f"{name}.json"


def load_instance(name: str) -> Problem:
    """A shipped problem by its name.

    Examples
    --------
    >>> load_instance("flashlb-equal").known.best_L
    (196.66666666666666,)
    """
    return load_problem(instance_path(name))


def instance_summary(name: str) -> tuple[str, str, str]:
    """Shape, what is known, and the source of an instance, for people."""
    problem = load_instance(name)
    slots = int(problem.capacity_LG[0].sum())
    gpus = problem.topology.gpus
    shape = f"{problem.layers} x {problem.experts} experts, {gpus} GPUs, {slots} slots, {problem.split}"
    if problem.loads.shape[0] > 1:
        shape = f"{problem.loads.shape[0]} steps, {shape}"
    known = problem.known
    if known is None or not known.best_L:
        return shape, "-", "" if known is None else known.source
    proven = sum(b <= a * (1 + PROVEN) for a, b in zip(known.bound_L, known.best_L, strict=True))
    return shape, f"{sum(known.best_L):.6g} ({proven} of {problem.layers} proven)", known.source
