"""Small layers, expert by expert: every set of GPUs for each, and of the partial placements the best."""

from __future__ import annotations

import numpy as np

from moeless_opt.problems.arrays import BoolArray, FloatArray, IntArray, SlotArray
from moeless_opt.problems.spec import nearest_shares
from moeless_opt.solvers.limits import Rules

__all__ = ["FEW_GPUS", "beam_layers"]

FEW_GPUS = 6
"""GPUs of a layer whose sets are listed."""
_EXPERTS = 24
_WIDE = 3000  # partial placements that are kept


def beam_layers(
    load_LE: FloatArray, part_LNE: FloatArray, node_G: IntArray, speed_G: FloatArray, rules: list[Rules]
) -> list[SlotArray | None]:
    """Place layers of up to `FEW_GPUS` GPUs; None for a layer that is too large, or that finds no room.

    Parameters
    ----------
    load_LE : array, shape [L, E]
        Tokens.
    part_LNE : array, shape [L, N, E] or [L, N, 1]
        Part of them that comes from each node.
    node_G, speed_G : arrays, shape [G]
        Node and speed of each GPU.
    rules : list of Rules
        Limits of each layer.
    """
    G, E = len(node_G), load_LE.shape[1]
    if G > FEW_GPUS or E > _EXPERTS:
        return [None] * len(load_LE)
    sets_SG = (np.arange(1, 1 << G)[:, None] >> np.arange(G)) % 2 > 0
    return [
        _beam(load_E, _served(sets_SG, part_NE, E, node_G), sets_SG, speed_G, rule)
        for load_E, part_NE, rule in zip(load_LE, part_LNE, rules, strict=True)
    ]


def _beam(
    load_E: FloatArray, serves_ESG: FloatArray, sets_SG: BoolArray, speed_G: FloatArray, rules: Rules
) -> SlotArray | None:
    """Place a layer, the heaviest expert first, keeping the partial placements with the least largest times.

    Exact where no more than 3,000 of them are there at a time. `serves_ESG` has the share of an expert that
    each GPU serves where the expert is on a set of GPUs.
    """
    G = sets_SG.shape[1]
    size_S = sets_SG.sum(1)
    order_E = np.argsort(-load_E, kind="stable")
    least_E = rules.least_E[order_E]
    after_E = np.append(np.cumsum(least_E[::-1])[::-1], 0)  # replicas that those to come need
    load_WG, used_WG = np.zeros((1, G)), np.zeros((1, G), dtype=np.int64)
    chosen: list[tuple[IntArray, IntArray]] = []
    room_G = rules.capacity_G
    slots = min(int(room_G.sum()), rules.total)
    for step, e in enumerate(order_E.tolist()):
        may_S = ~(sets_SG & ~rules.allowed_EG[e]).any(1) & ~(rules.pinned_EG[e] & ~sets_SG).any(1)
        may_S &= (size_S >= rules.least_E[e]) & (size_S <= rules.most_E[e])
        may_S &= np.array([len(set(rules.domain_G[row].tolist())) >= rules.spread_E[e] for row in sets_SG])
        some_S = np.flatnonzero(may_S)
        used_WSG = used_WG[:, None, :] + sets_SG[some_S]
        fits = (used_WSG <= room_G).all(2) & (used_WSG.sum(2) + after_E[step + 1] <= slots)
        w_X, s_X = np.nonzero(fits)
        if not len(w_X):
            return None
        load_XG = load_WG[w_X] + load_E[e] * serves_ESG[e, some_S[s_X]]
        time_XG = load_XG / speed_G
        best_X = np.lexsort(((time_XG**2).sum(1), time_XG.max(1)))[:_WIDE]
        load_WG, used_WG = load_XG[best_X], used_WSG[w_X[best_X], s_X[best_X]]
        chosen.append((w_X[best_X], some_S[s_X[best_X]]))
    slots_GC = np.full((G, max(int(room_G.max()), 1)), -1, dtype=np.int32)
    at, fill_G = 0, np.zeros(G, dtype=np.int64)
    for e, (from_W, set_W) in zip(order_E[::-1].tolist(), chosen[::-1], strict=True):
        for g in np.flatnonzero(sets_SG[set_W[at]]).tolist():
            slots_GC[g, fill_G[g]] = e
            fill_G[g] += 1
        at = int(from_W[at])
    return slots_GC


def _served(sets_SG: BoolArray, part_NE: FloatArray, experts: int, node_G: IntArray) -> FloatArray:
    """Share of every expert that each GPU of a set serves, shape [E, S, G]."""
    count, gpus = sets_SG.shape
    slots_SG1 = np.where(sets_SG, 0, -1)[:, :, None]
    wide_NE = np.broadcast_to(part_NE, (len(part_NE), experts))
    serves = np.empty((experts, count, gpus))
    for e in range(experts):
        part_SN1 = np.broadcast_to(wide_NE[None, :, e : e + 1], (count, len(wide_NE), 1))
        serves[e] = nearest_shares(slots_SG1, 1, node_G, part_SN1)[:, :, 0]
    return serves
