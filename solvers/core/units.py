"""Loads and speeds in usual units: what kernels take for nothing must not depend on what users count in."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from moeless_opt.problems.spec import Problem
from moeless_opt.solvers.core.finish import Built

__all__ = ["back_in_units", "in_usual_units"]

SPEEDS = (-10, 10)
LOADS = (-10, 40)
"""Powers of two between which the largest speed and load are left as they are."""


def in_usual_units(problem: Problem) -> tuple[Problem, float]:
    """The problem with loads and speeds of a usual size, and what its times are to be multiplied by.

    Powers of two alone: no bit of a mantissa changes. Problems whose times are seconds, or more than tokens,
    stay as they are.
    """
    if not problem.time.counts_tokens_only or problem.time.unit != "tokens":
        return problem, 1.0
    loads, topology = problem.loads, problem.topology
    load, speed = _shift(float(loads.load_TLE.max()), LOADS), _shift(float(topology.speed_G.max()), SPEEDS)
    if load == speed == 0:
        return problem, 1.0
    by_node, by_gpu = (
        None if array is None else np.ldexp(array, load) for array in (loads.load_TLNE, loads.load_TLGE)
    )
    scaled = loads.replace(load_TLE=np.ldexp(loads.load_TLE, load), load_TLNE=by_node, load_TLGE=by_gpu)
    faster = topology.replace(speed_G=np.ldexp(topology.speed_G, speed))
    return problem.replace(loads=scaled, topology=faster, known=None), math.ldexp(1.0, speed - load)


def _shift(largest: float, usual: tuple[int, int]) -> int:
    """The power of two that brings a number to 2^10 or below, 0 where it is of a usual size."""
    power = math.frexp(largest)[1]
    return 0 if usual[0] <= power <= usual[1] else min(10, usual[1]) - power


def back_in_units(built: Built, factor: float) -> Built:
    """What was built for `in_usual_units`, for the problem itself."""
    if factor == 1.0 or built.bound is None:
        return built
    return replace(built, bound=(built.bound[0] * factor, built.bound[1]))
