"""Pools of GPUs, for when the spare slots are too few to join all GPUs into one.

With free shares, GPUs that a tree of shared experts joins act as one pooled machine. A tree over k GPUs costs
k - 1 of the pool's c k slots, so the pool holds (c - 1) k + 1 experts and finishes at its load over k. S
slots for E experts on G GPUs leave at least m = G + E - S pools, and with exactly m every slot is used. The
placement problem is then a partition: experts into m pools of chosen sizes, the slowest pool as fast as
possible. That space is much smaller than that of placements.

The search re-splits the slowest pool with each other one, optimally over all sizes and subsets, until no
pair gives anything, from several seeded starts. Each pool is then packed by alias packing on its own GPUs.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import combinations
from math import comb

import numpy as np

from moeless_opt.problems.arrays import FloatArray, IntArray, SlotArray
from moeless_opt.solvers.construct.alias import alias_pack

__all__ = ["group_pack"]

Pool = tuple[int, tuple[int, ...]]  # GPUs, experts

_SUBSETS = 5000  # a pair of pools with more splits than this is left as it is


def group_pack(
    load_E: FloatArray, gpus: int, slots: int, *, seed: int = 0, starts: int = 4
) -> tuple[SlotArray, FloatArray] | None:
    """One layer's placement and shares on equal GPUs, where E > G (c - 1).

    Parameters
    ----------
    load_E : array of float, shape [E]
        Tokens.
    gpus, slots : int
        Number of GPUs, slots of each.
    seed : int
        Of the starts after the first.
    starts : int
        How many starts.

    Returns
    -------
    tuple of int32 array [GPUs, slots], float array [GPUs, slots], or None
        Placement and shares of the best partition that could be packed; None where there is none, or where
        all GPUs can be one pool (`alias.alias_pack` is for that).
    """
    spare = gpus * slots - len(load_E)
    pools = gpus - spare
    if spare < 1 or pools < 2:
        return None
    rng = np.random.default_rng(seed)
    found: list[tuple[float, list[Pool]]] = []
    for start in range(starts):
        weight_E = load_E if start == 0 else load_E * np.exp(rng.normal(0.0, 0.5, len(load_E)))
        partition = _descend(load_E, _start(load_E, weight_E, gpus, slots, pools), slots)
        found.append((_slowest(load_E, partition), partition))
    for _, partition in sorted(found, key=lambda entry: entry[0]):
        packed = _pack(load_E, partition, gpus, slots)
        if packed is not None:
            return packed
    return None


def _start(load_E: FloatArray, weight_E: FloatArray, gpus: int, slots: int, pools: int) -> list[Pool]:
    """Pools of even size; heaviest expert first into the pool that is fastest so far."""
    size = [gpus // pools + (p < gpus % pools) for p in range(pools)]
    held: list[list[int]] = [[] for _ in size]
    load = [0.0] * pools
    for expert in np.argsort(-weight_E, kind="stable").tolist():
        open_pools = [p for p in range(pools) if len(held[p]) < (slots - 1) * size[p] + 1]
        pool = min(open_pools, key=lambda p: (load[p] / size[p], p))
        held[pool].append(expert)
        load[pool] += float(load_E[expert])
    return [(k, tuple(experts)) for k, experts in zip(size, held, strict=True)]


def _slowest(load_E: FloatArray, partition: list[Pool]) -> float:
    return max(float(load_E[list(experts)].sum()) / k for k, experts in partition)


def _descend(load_E: FloatArray, partition: list[Pool], slots: int) -> list[Pool]:
    """Re-split the slowest pool with the others, fastest partner first, while that helps."""
    partition = list(partition)
    while True:
        time = [float(load_E[list(experts)].sum()) / k for k, experts in partition]
        worst = max(range(len(time)), key=lambda p: (time[p], -p))
        for other in sorted(range(len(time)), key=lambda p: (time[p], p)):
            if other == worst:
                continue
            split = _best_split(load_E, partition[worst], partition[other], slots)
            if split is not None and split[0] < time[worst] * (1.0 - 1e-12):
                partition[worst], partition[other] = split[1], split[2]
                break
        else:
            return partition


@lru_cache(maxsize=64)
def _subsets(n: int, k: int) -> IntArray:
    return np.array(list(combinations(range(n), k)), dtype=np.int64).reshape(-1, k)


def _best_split(load_E: FloatArray, one: Pool, two: Pool, slots: int) -> tuple[float, Pool, Pool] | None:
    """The best of all ways to divide two pools' GPUs and experts between them."""
    experts = sorted(one[1] + two[1])
    load_U = load_E[experts]
    total, gpus = float(load_U.sum()), one[0] + two[0]
    best: tuple[float, int, IntArray] | None = None
    for k in range(1, gpus // 2 + 1):
        count = (slots - 1) * k + 1
        if count >= len(experts) or comb(len(experts), count) > _SUBSETS:
            continue
        subset_MU = _subsets(len(experts), count)
        load_M = load_U[subset_MU].sum(axis=1)
        time_M = np.maximum(load_M / k, (total - load_M) / (gpus - k))
        at = int(time_M.argmin())
        if best is None or float(time_M[at]) < best[0]:
            best = float(time_M[at]), k, subset_MU[at]
    if best is None:
        return None
    chosen = set(best[2].tolist())
    inside = tuple(e for i, e in enumerate(experts) if i in chosen)
    outside = tuple(e for i, e in enumerate(experts) if i not in chosen)
    return best[0], (best[1], inside), (gpus - best[1], outside)


def _pack(
    load_E: FloatArray, partition: list[Pool], gpus: int, slots: int
) -> tuple[SlotArray, FloatArray] | None:
    """Alias packing of each pool on its own GPUs; None if one pool defies it."""
    slots_GC = np.full((gpus, slots), -1, dtype=np.int32)
    share_GC = np.zeros((gpus, slots))
    first = 0
    for k, experts in partition:
        names = np.array(experts, dtype=np.int32)
        packed = alias_pack(load_E[names], np.full(k, slots), np.ones(k))
        if packed is None:
            return None
        filled = packed[0] >= 0
        slots_GC[first : first + k] = np.where(filled, names[packed[0]], -1)
        share_GC[first : first + k] = packed[1]
        first += k
    return slots_GC, share_GC
