"""What searches do with placements: see whether limits are kept, change them at random, widen the table."""

from __future__ import annotations

import numpy as np

from moeless_opt.problems.arrays import BoolArray, IntArray, SlotArray
from moeless_opt.problems.spec import Problem, held_LGE, replica_counts

__all__ = ["keeps_limits", "random_change", "widened"]


def keeps_limits(problem: Problem, slots_LGC: SlotArray, *, tied: bool = True) -> BoolArray:
    """Layers of a placement that keep the slots and the limits on replicas, pairs and domains, shape [L].

    Limits on all layers in all are taken for every layer alone, or with ``tied=False`` not at all.
    """
    limits, topology = problem.limits, problem.topology
    count_LE = replica_counts(slots_LGC, problem.experts)
    good_L = (count_LE >= max(limits.min_replicas, 1)).all(1)
    good_L &= ((slots_LGC >= 0).sum(2) <= problem.capacity_LG).all(1)
    if limits.max_replicas is not None:
        good_L &= (count_LE <= limits.max_replicas).all(1)
    if limits.max_layer_replicas is not None:
        good_L &= count_LE.sum(1) <= limits.max_layer_replicas
    if tied and limits.max_total_replicas is not None:
        good_L &= count_LE.sum(1) <= limits.max_total_replicas
    if tied and limits.max_total_bytes is not None:
        good_L &= count_LE.sum(1) * problem.bytes_L <= limits.max_total_bytes
    if limits.pinned or limits.forbidden or limits.spread > 1:
        held_LEG = held_LGE(slots_LGC, problem.experts).transpose(0, 2, 1)
        good_L &= ~(problem.pairs_LEG("pinned") & ~held_LEG).any((1, 2))
        good_L &= ~(problem.pairs_LEG("forbidden") & held_LEG).any((1, 2))
        domains = [held_LEG[:, :, topology.failure_domain_G == d].any(2) for d in _domains(problem)]
        good_L &= (np.sum(domains, axis=0) >= problem.spread_LE).all(1)
    return np.asarray(good_L)


def _domains(problem: Problem) -> list[int]:
    return [int(d) for d in np.unique(problem.topology.failure_domain_G)]


def widened(slots_LGC: SlotArray, wide: int) -> SlotArray:
    """A placement in a table of `wide` slots per GPU; filled slots come first where it is wider."""
    if slots_LGC.shape[2] > wide:
        order = np.argsort(slots_LGC < 0, axis=2, kind="stable")
        slots_LGC = np.take_along_axis(slots_LGC, order, axis=2)[:, :, :wide]
    out = np.full((*slots_LGC.shape[:2], wide), -1, dtype=np.int32)
    out[:, :, : slots_LGC.shape[2]] = slots_LGC
    return out


def random_change(rng: np.random.Generator, slots_GC: SlotArray, capacity_G: IntArray, experts: int) -> None:
    """One random change of a layer, in place: a replica goes, comes, moves, or trades places."""
    gpus = len(slots_GC)
    kind = rng.integers(4)
    a = int(rng.choice(np.flatnonzero(capacity_G > 0)))
    b = int(rng.integers(gpus))
    held_a, held_b = slots_GC[a] >= 0, slots_GC[b] >= 0
    slot_a = int(rng.integers(max(int(capacity_G[a]), 1)))
    one = int(slots_GC[a, slot_a])
    if kind == 0:  # this slot holds something else, or nothing
        other = int(rng.integers(-1, experts))
        if other not in slots_GC[a][held_a]:
            slots_GC[a, slot_a] = other
        return
    if a == b or one < 0 or one in slots_GC[b][held_b] or not capacity_G[b]:
        return
    slot_b = int(rng.integers(int(capacity_G[b])))
    other = int(slots_GC[b, slot_b])
    if kind == 1 or other < 0:  # the replica moves; what was there goes
        slots_GC[a, slot_a], slots_GC[b, slot_b] = -1, one
    elif other not in slots_GC[a][held_a]:  # the two trade places
        slots_GC[a, slot_a], slots_GC[b, slot_b] = other, one
