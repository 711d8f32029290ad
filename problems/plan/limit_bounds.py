"""What limits on replicas, pairs and domains add to the lower bounds on a layer's largest GPU time.

========  ===============================================================================================
reach     experts that may be on the GPUs R alone load R
slots     a GPU serves no more than its pins and the heaviest experts that fit beside them and may be there
pieces    an expert with at most r replicas ends no sooner than on the r fastest GPUs that it may be on
pins      even shares: what is pinned to a GPU is served there, a share of at least one in most replicas
========  ===============================================================================================

All hold for any placement that keeps the limits. Axes: L layers, E experts, G GPUs.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from moeless_opt.problems.arrays import BoolArray, FloatArray, IntArray
from moeless_opt.problems.spec import Fill, Problem, Split

__all__ = ["ReplicaLimits", "least_and_most", "limit_bound", "replica_limits"]

_UNIONS = 8
"""Sets of GPUs of which all unions are looked at."""


class ReplicaLimits(NamedTuple):
    """How many replicas there may be.

    Attributes
    ----------
    least_LE, most_LE : arrays of int, shape [L, E]
        Of an expert: what limits, pins and failure domains ask for, and what limits and bans leave.
    room_L : array of int, shape [L]
        Of a layer, where every other layer has as few as it may.
    """

    least_LE: IntArray
    most_LE: IntArray
    room_L: IntArray


def least_and_most(problem: Problem) -> tuple[IntArray, IntArray]:
    """Replicas that each expert must have, and may have, shape [L, E] each: limits, pins, domains, bans."""
    limits = problem.limits
    pinned_LEG = problem.pairs_LEG("pinned")
    allowed_LEG = ~problem.pairs_LEG("forbidden") & (problem.capacity_LG > 0)[:, None, :]
    domain_G = problem.topology.failure_domain_G
    reached_LE = np.zeros(pinned_LEG.shape[:2], dtype=np.int64)
    for domain in np.unique(domain_G):
        reached_LE += pinned_LEG[:, :, domain_G == domain].any(2)
    # Pins in one domain leave the others to be reached by further replicas.
    needed_LE = pinned_LEG.sum(2) + np.maximum(problem.spread_LE - reached_LE, 0)
    most_LE = allowed_LEG.sum(2)
    if problem.fill == Fill.COPIES:  # they count as replicas
        most_LE = (allowed_LEG * problem.capacity_LG[:, None, :]).sum(2)
    if limits.max_replicas is not None:
        most_LE = np.minimum(most_LE, limits.max_replicas)
    return np.maximum(limits.min_replicas, needed_LE), most_LE


def replica_limits(problem: Problem) -> ReplicaLimits:
    """The limits on replicas of every expert and layer that follow from a problem's."""
    limits = problem.limits
    least_LE, most_LE = least_and_most(problem)
    copies = problem.fill == Fill.COPIES
    room_L = (problem.capacity_LG if copies else np.minimum(problem.capacity_LG, problem.experts)).sum(1)
    if limits.max_layer_replicas is not None:
        room_L = np.minimum(room_L, limits.max_layer_replicas)
    floor_L, size_L = least_LE.sum(1), problem.bytes_L
    if limits.max_total_replicas is not None:
        room_L = np.minimum(room_L, limits.max_total_replicas - floor_L.sum() + floor_L)
    if limits.max_total_bytes is not None and size_L.all():
        left = limits.max_total_bytes - int(floor_L @ size_L)
        room_L = np.minimum(room_L, (left + floor_L * size_L) // size_L)
    spare_L = np.maximum(room_L - floor_L, 0)
    most_LE = np.minimum(most_LE, least_LE + spare_L[:, None])
    if copies:  # on no more GPUs than there are, and two of them on one are no more than one to the bounds
        most_LE, least_LE = np.minimum(most_LE, problem.topology.gpus), np.ones_like(least_LE)
    return ReplicaLimits(least_LE, np.maximum(most_LE, 1), room_L)


def limit_bound(problem: Problem, load_LE: FloatArray, replicas: ReplicaLimits, split: str) -> FloatArray:
    """Least largest GPU time of some loads that pins and bans leave, in tokens over speed, shape [L]."""
    bound_L = np.zeros(problem.layers)
    pinned_LEG, forbidden_LEG = problem.pairs_LEG("pinned"), problem.pairs_LEG("forbidden")
    for layer in np.flatnonzero(pinned_LEG.any((1, 2)) | forbidden_LEG.any((1, 2))).tolist():
        capacity_G, load_E = problem.capacity_LG[layer], load_LE[layer]
        used_G = capacity_G > 0
        allowed_EG = ~forbidden_LEG[layer][:, used_G]
        pinned_EG, speed_G = pinned_LEG[layer][:, used_G], problem.topology.speed_G[used_G]
        if not allowed_EG.any(1).all():
            continue  # nothing keeps the limits
        least_E, most_E = replicas.least_LE[layer], replicas.most_LE[layer]
        bound_L[layer] = max(
            _reach(load_E, speed_G, allowed_EG),
            _slots(load_E, speed_G, allowed_EG, pinned_EG, capacity_G[used_G]),
            _pieces(load_E, speed_G, allowed_EG, least_E, most_E, split),
        )
        if split == Split.EQUAL:
            time_G = (load_E / most_E) @ pinned_EG / speed_G
            bound_L[layer] = max(bound_L[layer], float(time_G.max()))
    return bound_L


def _reach(load_E: FloatArray, speed_G: FloatArray, allowed_EG: BoolArray) -> float:
    """The largest load of experts confined to some GPUs, over their speed."""
    sets = [set_G for set_G in np.unique(allowed_EG, axis=0) if not set_G.all()]
    weight = [float(load_E[(allowed_EG == set_G).all(1)].sum() / speed_G[set_G].sum()) for set_G in sets]
    order = np.argsort(-np.array(weight), kind="stable").tolist()
    unions = [np.zeros(len(speed_G), dtype=np.bool_)]
    for place, at in enumerate(order):
        # The tightest in all ways together, the others by themselves and with all before.
        base = unions if place < _UNIONS else [unions[0], unions[-1]]
        unions = [*unions, *(one | sets[at] for one in base)]
    best = 0.0
    for set_G in unions[1:]:
        confined_E = ~(allowed_EG & ~set_G).any(1)
        best = max(best, float(load_E[confined_E].sum() / speed_G[set_G].sum()))
    return best


def _slots(
    load_E: FloatArray, speed_G: FloatArray, allowed_EG: BoolArray, pinned_EG: BoolArray, capacity_G: IntArray
) -> float:
    """The least T with ``sum over g of min(T * speed_g, most_g) >= total``, concave in T."""
    most_G = np.zeros(len(speed_G))
    for g, capacity in enumerate(capacity_G.tolist()):
        pins_E = pinned_EG[:, g]
        others = np.sort(load_E[allowed_EG[:, g] & ~pins_E])[::-1]
        most_G[g] = load_E[pins_E].sum() + others[: max(capacity - int(pins_E.sum()), 0)].sum()
    total = float(load_E.sum())
    order = np.argsort(most_G / speed_G, kind="stable")
    full_G, fast_G = most_G[order], speed_G[order]
    before_G = np.concatenate([[0.0], np.cumsum(full_G)[:-1]])
    rest_G = np.cumsum(fast_G[::-1])[::-1]
    # Every segment's line lies above the sum, so the largest of the lines' roots is the root.
    return float(((total - before_G) / rest_G).max())


def _pieces(
    load_E: FloatArray,
    speed_G: FloatArray,
    allowed_EG: BoolArray,
    least_E: IntArray,
    most_E: IntArray,
    split: str,
) -> float:
    """The largest of the experts' least times by themselves."""
    fast_EG = np.sort(np.where(allowed_EG, speed_G, 0.0), axis=1)[:, ::-1]
    count_G = np.arange(1, len(speed_G) + 1)
    allowed_E = allowed_EG.sum(1)
    open_EG = count_G <= np.minimum(most_E, allowed_E)[:, None]
    if split != Split.EQUAL:
        return float((load_E / np.where(open_EG, fast_EG, 0.0).sum(1)).max())
    open_EG &= count_G >= np.minimum(least_E, allowed_E)[:, None]
    time_EG = np.where(open_EG, load_E[:, None] / (count_G * np.where(open_EG, fast_EG, 1.0)), np.inf)
    least_time_E = time_EG.min(1)
    return float(np.where(np.isfinite(least_time_E), least_time_E, 0.0).max())
