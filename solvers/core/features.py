"""What a problem may ask for, and which solver offers it: one table, readable without importing a solver."""

from __future__ import annotations

import enum

from moeless_opt.problems.plan import order_of, usual_order
from moeless_opt.problems.spec import Fill, Problem
from moeless_opt.solvers.core.slack import only_moves, without_slack

__all__ = ["FEATURES", "PUBLISHED", "Feature", "bytes_alone", "required_features"]


class Feature(enum.StrEnum):
    """What a problem may ask for and a solver may offer."""

    EQUAL_SPLIT = "equal split"
    FRACTIONAL = "fractional split"
    NEAREST = "split by the nearest replica"
    MIGRATION = "starting from a live placement"
    MOVE_LIMITS = "limits on moves"
    HETEROGENEOUS = "GPUs of different speed or slots"
    MEMORY = "memory in bytes"
    SCENARIOS = "several load scenarios"
    SIGMA = "mean and deviation over scenarios"
    COVARIANCE = "covariance over scenarios"
    TIME_MODEL = "a time model with more than tokens"
    NODE_AWARE = "loads by source node"
    REPLICA_LIMITS = "limits on replicas"
    PAIRS = "pinned or forbidden pairs"
    SPREAD = "replicas spread over failure domains"
    SIZING_CV = "cv sizing"
    SIZING_MAKESPAN = "makespan sizing"
    SIZING_MEMORY = "memory sizing"
    FILL_DISTINCT = "every slot full, no expert twice on a GPU"
    FILL_COPIES = "every slot full, second copies on a GPU"
    FILL_EQUAL = "full slots without free shares"
    FILL_LIMITS = "full slots within limits on replicas, pairs or domains"
    PRIORITIES = "this order of priorities"
    COSTS = "costs of tokens between GPUs"
    GROUPS = "groups of experts kept on a node"
    NEARNESS = "priorities of groups and hops"
    BALANCE_THEN_NEAR = "balance and then traffic, groups or hops"
    SURVIVAL = "the priority of survival"
    SHARE_ENTRIES = "shares in whole entries of a dispatch table"
    CERTIFIES = "proofs of optimality"


_SPLITS = frozenset({Feature.EQUAL_SPLIT, Feature.FRACTIONAL})
_CONSTRUCT = _SPLITS | {
    Feature.NEAREST,
    Feature.MIGRATION,
    Feature.HETEROGENEOUS,
    Feature.MEMORY,
    Feature.SCENARIOS,
    Feature.SIGMA,
    Feature.COVARIANCE,
    Feature.NODE_AWARE,
}
_ENTRIES = frozenset({Feature.SHARE_ENTRIES})  # the base of the solvers rounds; what they prove must allow it
_FILL = frozenset({Feature.FILL_DISTINCT, Feature.FILL_COPIES})
_LIMITS = frozenset({Feature.REPLICA_LIMITS, Feature.PAIRS, Feature.SPREAD})
_FILL_ALL = _FILL | {Feature.FILL_EQUAL, Feature.FILL_LIMITS}
_REPLAN = _CONSTRUCT | _LIMITS | _ENTRIES | _FILL_ALL | {Feature.MOVE_LIMITS}
_EVEN_OR_FREE = _CONSTRUCT - {Feature.NEAREST}
_CONSTRAINED = _EVEN_OR_FREE | _LIMITS | _ENTRIES | {Feature.SIZING_CV}
_SIZED = (_EVEN_OR_FREE - {Feature.COVARIANCE}) | _ENTRIES | {Feature.SIZING_MAKESPAN, Feature.SIZING_MEMORY}
_ACTIVATION = (_EVEN_OR_FREE - {Feature.COVARIANCE}) | _ENTRIES | _FILL | {Feature.TIME_MODEL}
_LEXICOGRAPHIC = (
    _EVEN_OR_FREE | _LIMITS | {Feature.PRIORITIES, Feature.BALANCE_THEN_NEAR, Feature.SURVIVAL}
) - {
    Feature.SIGMA,
    Feature.COVARIANCE,
}
_LOCALITY = (_CONSTRUCT - {Feature.COVARIANCE}) | {
    Feature.SPREAD,
    Feature.BALANCE_THEN_NEAR,
    Feature.COSTS,
    Feature.GROUPS,
    Feature.NEARNESS,
    Feature.PAIRS,
    Feature.MOVE_LIMITS,
    Feature.REPLICA_LIMITS,
    Feature.FILL_DISTINCT,
    Feature.FILL_EQUAL,
}
_EXACT = _SPLITS | _FILL | {Feature.HETEROGENEOUS, Feature.MEMORY, Feature.CERTIFIES}
# The published methods ignore the live placement and all but the expected loads; their plans are valid and
# pay for it.
_PUBLISHED = _SPLITS | {
    Feature.NEAREST,
    Feature.MIGRATION,
    Feature.MEMORY,
    Feature.SCENARIOS,
    Feature.SIGMA,
    Feature.COVARIANCE,
    Feature.NODE_AWARE,
    Feature.TIME_MODEL,
    Feature.COSTS,
}

_PODS = {
    Feature.HETEROGENEOUS,
    Feature.MEMORY,
    Feature.SPREAD,
    Feature.SCENARIOS,
    Feature.SIGMA,
    Feature.COVARIANCE,
    Feature.NODE_AWARE,
}

PUBLISHED = frozenset({"static", "eplb", "eplb-hierarchical", "moeless"})
"""Methods as published: they know balance and nothing else, so `compare` shows them as they are."""

FEATURES: dict[str, frozenset[Feature]] = {
    "auto": _REPLAN | _CONSTRAINED | _SIZED | _ACTIVATION | _LEXICOGRAPHIC | _LOCALITY,
    "construct": _CONSTRUCT | _LIMITS | _FILL_ALL | _ENTRIES,
    "replan": _REPLAN,
    "cover": _REPLAN | {Feature.TIME_MODEL, Feature.SIZING_MEMORY},
    "min-moves": frozenset(
        {
            Feature.EQUAL_SPLIT,
            Feature.FRACTIONAL,
            Feature.MIGRATION,
            Feature.HETEROGENEOUS,
            Feature.MEMORY,
            Feature.CERTIFIES,
        }
    ),
    "constrained": _CONSTRAINED,
    "sized": _SIZED,
    "activation": _ACTIVATION,
    "lexicographic": _LEXICOGRAPHIC,
    "locality": _LOCALITY,
    "stay": _CONSTRUCT | _FILL | _ENTRIES | {Feature.MOVE_LIMITS, Feature.FILL_EQUAL},
    "static": _PUBLISHED | {Feature.HETEROGENEOUS},
    "eplb": _PUBLISHED | {Feature.FILL_COPIES, Feature.FILL_EQUAL},
    "eplb-hierarchical": _PUBLISHED | {Feature.FILL_COPIES, Feature.FILL_EQUAL},
    "moeless": _PUBLISHED | {Feature.HETEROGENEOUS, Feature.SIZING_CV},
    "lazarus": _SPLITS | _PODS,
    "portfolio": _EXACT,
    "patterns": _EXACT - {Feature.FRACTIONAL},
    "cpsat": _EXACT,
    "milp": _EXACT,
}
"""Solver -> what it honours. A feature that a problem needs and a solver lacks is refused by name."""

_NEAR = {"traffic", "groups", "hops"}
_NO_LIMITS = Problem.__dataclass_fields__["limits"].default
_EVERY_SLOT = ("slots", "fill")
_SPLIT = {"equal": Feature.EQUAL_SPLIT, "fractional": Feature.FRACTIONAL, "nearest": Feature.NEAREST}
_SIZING = {"cv": Feature.SIZING_CV, "makespan": Feature.SIZING_MAKESPAN, "memory": Feature.SIZING_MEMORY}


def bytes_alone(problem: Problem) -> bool:
    """Whether memory is the only limit on replicas, and nothing is live: fewer leave bytes to others."""
    topology = problem.topology
    return (
        topology.memory_G is not None
        and topology.slots_G is None
        and problem.current is None
        and problem.sizing.policy == "slots"
        and problem.fill == Fill.NONE
        and without_slack(problem).limits is _NO_LIMITS
        and not _more_than_tokens(problem)
    )


def required_features(problem: Problem) -> frozenset[Feature]:
    """The features without which a solver would have to ignore a part of the problem."""
    problem = without_slack(problem)
    topology, limits = problem.topology, problem.limits
    needs = {_SPLIT[problem.split]}
    capacity_LG = problem.capacity_LG
    if not topology.is_uniform or (capacity_LG != capacity_LG[:, :1]).any():
        needs.add(Feature.HETEROGENEOUS)
    if topology.memory_G is not None:
        needs.add(Feature.MEMORY)
    if problem.current is not None:
        needs.add(Feature.MIGRATION)
    if problem.loads.load_TLE.shape[0] > 1:
        needs.add(Feature.SCENARIOS)
        if problem.objective.risk == "sigma":
            needs.add(Feature.SIGMA)
        if problem.objective.risk == "covariance":
            needs.add(Feature.COVARIANCE)
    if problem.loads.load_TLNE is not None:
        needs.add(Feature.NODE_AWARE)
    if topology.cost_GG is not None and {"traffic", "hops"} & set(problem.objective.priorities):
        needs.add(Feature.COSTS)
    if problem.groups is not None and problem.groups.max_outside < 1 and topology.nodes > 1:
        needs.add(Feature.GROUPS)
    if problem.share_entries is not None:
        needs.add(Feature.SHARE_ENTRIES)
    if _more_than_tokens(problem):
        needs.add(Feature.TIME_MODEL)
    if problem.sizing.policy not in _EVERY_SLOT:
        needs.add(_SIZING[problem.sizing.policy])
    order = order_of(problem)
    if not usual_order(problem):
        near_first = order[0] == "balance" and "memory" not in order and _NEAR & set(order)
        needs.add(Feature.BALANCE_THEN_NEAR if near_first else Feature.PRIORITIES)
    if {"groups", "hops"} & set(order):
        needs.add(Feature.NEARNESS)
    if "survival" in order:
        needs.add(Feature.SURVIVAL)
    if problem.fill != Fill.NONE:
        needs.add(Feature.FILL_COPIES if problem.fill == Fill.COPIES else Feature.FILL_DISTINCT)
        if problem.split != "fractional":
            needs.add(Feature.FILL_EQUAL)
    if limits is _NO_LIMITS:
        return frozenset(needs)
    if limits.bounds_moves:
        needs.add(Feature.MOVE_LIMITS)
    if limits.min_replicas > 1 or limits.bounds_replicas:
        needs.add(Feature.REPLICA_LIMITS)
    if limits.pinned or limits.forbidden:
        needs.add(Feature.PAIRS)
    if limits.spread > 1:
        needs.add(Feature.SPREAD)
    if problem.fill != Fill.NONE and limits != only_moves(limits):
        needs.add(Feature.FILL_LIMITS)
    return frozenset(needs)


def _more_than_tokens(problem: Problem) -> bool:
    """Whether least tokens is not least time: a launch cost alone shifts all times alike on equal GPUs."""
    time = problem.time
    if time.has_curve or time.activation_cost > 0:
        return True
    return time.launch > 0 and not problem.topology.is_uniform
