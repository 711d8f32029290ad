"""Placements for free shares that bear loads which turn out otherwise: GPUs chained by shared experts.

Replicated experts are the only slack that a placement has once it is made: tokens flow from a busy GPU to
others along the experts that they share. A closed chain of GPUs, each sharing an expert with the next,
gives nearly all the flexibility that sharing everything would (Jordan and Graves 1995). Experts of r
replicas take r neighbours on the chain, and begin where the one before ended; where replicas are left
after a lap, the next one takes the GPUs in another order. All other experts, heaviest first, go where
they leave the largest load over all scenarios least.

Two ways to say how many replicas: those that make the largest piece least, good for loads near the
scenarios; and two for as many experts as there are spare slots, good for loads that are far from them,
since the chain then has the most links.

References
----------
Jordan and Graves, "Principles on the benefits of manufacturing process flexibility", Management Science
41 (1995).
"""

from __future__ import annotations

import numpy as np

from moeless_opt.problems.arrays import FloatArray, IntArray, SlotArray

__all__ = ["chained"]


def chained(
    load_TLE: FloatArray,
    capacity_LG: IntArray,
    speed_G: FloatArray,
    *,
    pairs: bool,
    links_LE: FloatArray | None = None,
) -> SlotArray:
    """Place every expert, the replicated ones in a chain, shape [L, G, C].

    Parameters
    ----------
    load_TLE : array, shape [T, L, E]
        Tokens of every scenario.
    capacity_LG : array of int, shape [L, G]
        Slots of each GPU, in all at least E in every layer.
    speed_G : array, shape [G]
        Relative speeds.
    pairs : bool
        Two replicas for as many experts as there are spare slots; else for the least largest piece.
    links_LE : array, shape [L, E], optional
        Loads by which experts get replicas and chain the GPUs; by default the scenarios' mean.
    """
    _, layers, experts = load_TLE.shape
    gpus, wide = capacity_LG.shape[1], max(int(capacity_LG.max()), 1)
    slots_LGC = np.full((layers, gpus, wide), -1, dtype=np.int32)
    used_LG = np.zeros((layers, gpus), dtype=np.int64)
    mean_LE = load_TLE.mean(0)
    order_LE = np.argsort(-mean_LE, axis=1, kind="stable")
    time_TLG = np.zeros((len(load_TLE), layers, gpus))
    links_LE = mean_LE if links_LE is None else links_LE
    count_LE = _counts(links_LE, capacity_LG, pairs)
    hottest_LE = np.argsort(-links_LE, axis=1, kind="stable")
    for layer in range(layers):
        order_E = hottest_LE[layer][count_LE[layer][hottest_LE[layer]] > 1]
        turn_E = np.random.default_rng(layer).permutation(order_E)
        _lay_chain(turn_E, count_LE[layer], capacity_LG[layer], slots_LGC[layer], used_LG[layer], layer)
    filled = slots_LGC >= 0
    x, g, c = np.nonzero(filled)
    expert = slots_LGC[x, g, c]
    placed_LE = np.zeros((layers, experts), dtype=np.int64)
    np.add.at(placed_LE, (x, expert), 1)
    for load_LE, time_LG in zip(load_TLE, time_TLG, strict=True):
        np.add.at(time_LG, (x, g), load_LE[x, expert] / placed_LE[x, expert] / speed_G[g])
    row_L = np.arange(layers)
    for rank in range(experts):
        expert_L = order_LE[:, rank]
        rows = row_L[placed_LE[row_L, expert_L] == 0]
        one_R = expert_L[rows]
        more_TRG = load_TLE[:, rows, one_R][:, :, None] / speed_G
        key_RG = (time_TLG[:, rows] + more_TRG).max(0)
        gpu_R = np.where(used_LG[rows] < capacity_LG[rows], key_RG, np.inf).argmin(1)
        slots_LGC[rows, gpu_R, used_LG[rows, gpu_R]] = one_R
        used_LG[rows, gpu_R] += 1
        time_TLG[:, rows, gpu_R] += load_TLE[:, rows, one_R] / speed_G[gpu_R]
    return slots_LGC


def _counts(load_LE: FloatArray, capacity_LG: IntArray, pairs: bool) -> IntArray:
    """Replicas of every expert, shape [L, E]: all slots, none more than there are GPUs with any."""
    layers, experts = load_LE.shape
    count_LE = np.ones((layers, experts), dtype=np.int64)
    spare_L = np.minimum(capacity_LG, experts).sum(1) - experts
    most_L = (capacity_LG > 0).sum(1)
    if pairs:
        rank_LE = np.argsort(np.argsort(-load_LE, axis=1, kind="stable"), axis=1, kind="stable")
        count_LE += (rank_LE < spare_L[:, None]) & (most_L[:, None] > 1)
    for step in range(int(spare_L.max())):
        open_LE = (count_LE < most_L[:, None]) & (count_LE.sum(1) < spare_L + experts)[:, None]
        if not open_LE.any() or step > experts * int(most_L.max()):
            break
        piece_LE = np.where(open_LE, load_LE / count_LE, -1.0)
        best_L = piece_LE.argmax(1)
        rows = np.flatnonzero(open_LE.any(1))
        count_LE[rows, best_L[rows]] += 1
    return count_LE


def _lay_chain(
    turn_E: IntArray,
    count_E: IntArray,
    capacity_G: IntArray,
    slots_GC: SlotArray,
    used_G: IntArray,
    seed: int,
) -> None:
    """Put experts on neighbours of a chain, each from where the one before ended, in place.

    A GPU that is full, or has the expert already, is stepped over; where none is left a replica is left out.
    """
    rng = np.random.default_rng(seed)
    chain = np.flatnonzero(capacity_G > 0).tolist()
    at, links = 0, 0
    for expert in turn_E.tolist():
        for copy in range(int(count_E[expert])):
            if copy:
                at, links = at + 1, links + 1
                if links == len(chain):  # a lap: from here on other neighbours, the same GPU first
                    here = chain[at % len(chain)]
                    rest = [chain[i] for i in rng.permutation(len(chain)) if chain[i] != here]
                    chain, at, links = [here, *rest], 0, 0
            for skipped in range(len(chain)):
                gpu = chain[(at + skipped) % len(chain)]
                if used_G[gpu] < capacity_G[gpu] and expert not in slots_GC[gpu, : used_G[gpu]]:
                    slots_GC[gpu, used_G[gpu]] = expert
                    used_G[gpu] += 1
                    at += skipped
                    break
