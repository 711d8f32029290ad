"""Limits that cannot bind, whatever the plan: without them the problem is the same, and so is its plan."""

from __future__ import annotations

from typing import Any, cast

import numpy as np

from moeless_opt.problems.spec import Fill, Limits, Problem

__all__ = ["but_moves", "only_moves", "without_slack"]

_NONE = cast(Limits, Problem.__dataclass_fields__["limits"].default)
_OF_MOVES = ("max_moves", "max_move_bytes", "max_move_seconds", "max_layer_moves")


def without_slack(problem: Problem) -> Problem:
    """The problem without the limits that every placement keeps; itself where there are none."""
    limits = problem.limits
    if limits is _NONE:
        return problem
    copies = problem.fill == Fill.COPIES
    capacity_LG = problem.capacity_LG if copies else np.minimum(problem.capacity_LG, problem.experts)
    gpus, room_L = int((capacity_LG > 0).sum(1).max()), capacity_LG.sum(1)
    size_L = problem.bytes_L
    drop: dict[str, Any] = {}

    def at_most(name: str, reached: float) -> None:
        limit = getattr(limits, name)
        if limit is not None and limit >= reached:
            drop[name] = None

    at_most("max_replicas", int(room_L.max()) - problem.experts + 1 if copies else gpus)
    at_most("max_layer_replicas", int(room_L.max()))
    at_most("max_total_replicas", int(room_L.sum()))
    at_most("max_total_bytes", int(room_L @ size_L))
    if problem.current is not None:
        at_most("max_moves", int(room_L.sum()))
        at_most("max_layer_moves", int(room_L.max()))
        if size_L.any():
            at_most("max_move_bytes", int(room_L @ size_L))
    domain_G = problem.topology.failure_domain_G
    alone = np.unique(domain_G).size == domain_G.size
    if limits.spread_experts is not None and (problem.spread_LE == limits.spread).all():
        drop["spread_experts"] = None  # it is for all of them
    if alone and 1 < limits.spread <= min(limits.min_replicas, gpus):
        drop |= {"spread": 1, "spread_experts": None}  # every replica is in a domain of its own
    if not drop and limits != _NONE:
        return problem
    loose = limits.replace(**drop)
    return problem.replace(limits=_NONE if loose == _NONE else loose)


def only_moves(limits: Limits) -> Limits:
    """The limits on moves alone; themselves where there are no others."""
    if limits is _NONE:
        return limits
    return _NONE.replace(**{name: getattr(limits, name) for name in _OF_MOVES})


def but_moves(limits: Limits) -> Limits:
    """The limits without those on moves."""
    return limits.replace(**dict.fromkeys(_OF_MOVES))
