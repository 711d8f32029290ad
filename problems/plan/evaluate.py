"""The one truth about a plan's loads, times, moves, traffic and memory; every solver and report asks here."""

from __future__ import annotations

import numpy as np

from moeless_opt.problems.arrays import BoolArray, FloatArray, IntArray, SlotArray
from moeless_opt.problems.spec import TimeModel, Topology, replica_counts, second_copies, without_copies

__all__ = [
    "activated",
    "even_pieces",
    "even_times",
    "gpu_times",
    "gpu_tokens",
    "imbalance",
    "move_seconds",
    "new_replicas",
    "node_traffic",
    "over_perfect",
    "perfect_times",
    "served_tokens",
    "slot_sums",
]


def gpu_tokens(load_LE: FloatArray, slots_LGC: SlotArray, share_LGC: FloatArray) -> FloatArray:
    """Tokens that each GPU serves, shape [L, G]."""
    # an empty slot (-1) reads some other expert's load, and its share is 0
    return np.asarray(np.einsum("lgc,lgc->lg", _slot_loads(load_LE, slots_LGC), share_LGC))


def served_tokens(load_LE: FloatArray, slots_LGC: SlotArray, share_LGC: FloatArray) -> FloatArray:
    """Tokens that each slot serves, shape [L, G, C]; of an expert's copies on a GPU the first has all."""
    tokens_LGC = np.where(slots_LGC >= 0, _slot_loads(load_LE, slots_LGC) * share_LGC, 0.0)
    if second_copies(slots_LGC).any():
        for first in range(slots_LGC.shape[2] - 1):
            same = slots_LGC[:, :, first + 1 :] == slots_LGC[:, :, first, None]
            tokens_LGC[:, :, first] += np.where(same, tokens_LGC[:, :, first + 1 :], 0.0).sum(2)
            tokens_LGC[:, :, first + 1 :][same] = 0.0
    return np.asarray(tokens_LGC)


def _slot_loads(load_LE: FloatArray, slots_LGC: SlotArray) -> FloatArray:
    """Load of the expert in each slot, shape [L, G, C]; anything where the slot is empty."""
    layers, experts = load_LE.shape
    if layers == 1:
        return np.asarray(load_LE[0][slots_LGC])
    return np.asarray(load_LE.ravel()[slots_LGC + (np.arange(layers) * experts)[:, None, None]])


def activated(load_LE: FloatArray, slots_LGC: SlotArray, share_LGC: FloatArray) -> IntArray:
    """Experts of each GPU that serve tokens, shape [L, G]; of several copies on a GPU one counts."""
    load = _slot_loads(load_LE, slots_LGC)
    serves_LGC = (load > 0) & (share_LGC > 0) & (slots_LGC >= 0)
    return np.asarray((without_copies(np.where(serves_LGC, slots_LGC, np.int32(-1))) >= 0).sum(2))


def gpu_times(
    load_LE: FloatArray,
    slots_LGC: SlotArray,
    share_LGC: FloatArray,
    speed_G: FloatArray,
    time: TimeModel | None = None,
) -> FloatArray:
    """Time of each GPU in each layer, shape [L, G], in the time model's unit.

    Parameters
    ----------
    load_LE : array, shape [L, E]
        Tokens per expert.
    slots_LGC, share_LGC : arrays, shape [L, G, C]
        Expert in each slot (-1 empty), and the share of its tokens that the slot serves.
    speed_G : array, shape [G]
        Relative speeds.
    time : TimeModel, optional
        Tokens only by default.
    """
    tokens_LG = gpu_tokens(load_LE, slots_LGC, share_LGC)
    if time is None or time.counts_tokens_only:
        scale = 1.0 if time is None else time.token_cost
        return np.asarray(tokens_LG / speed_G if scale == 1.0 else tokens_LG * scale / speed_G)
    return time.time(tokens_LG, activated(load_LE, slots_LGC, share_LGC), speed_G)


def even_pieces(load_LE: FloatArray, slots_LGC: SlotArray) -> FloatArray:
    """Tokens that each slot serves under an equal split, shape [L, G, C]; 0 where it is empty."""
    layers, experts = load_LE.shape
    # One column more, for the empty slots: index -1 is that column.
    piece_LE = np.zeros((layers, experts + 1))
    piece_LE[:, :experts] = load_LE / np.maximum(replica_counts(slots_LGC, experts), 1)
    flat_LP = slots_LGC.reshape(layers, -1)
    return piece_LE[np.arange(layers)[:, None], flat_LP].reshape(slots_LGC.shape)


def slot_sums(piece_LGC: FloatArray) -> FloatArray:
    """Sums over the slots, shape [L, G], first to last: the order is part of the result."""
    total_LG = piece_LGC[:, :, 0].copy()
    for slot in range(1, piece_LGC.shape[2]):
        total_LG += piece_LGC[:, :, slot]
    return total_LG


def even_times(load_LE: FloatArray, slots_LGC: SlotArray, speed_G: FloatArray) -> FloatArray:
    """`gpu_times` of an equal split where time is tokens, quicker: shape [L, G]."""
    return np.asarray(slot_sums(even_pieces(load_LE, slots_LGC)) * (1.0 / speed_G))


def perfect_times(time_LG: FloatArray, speed_G: FloatArray, usable_LG: BoolArray | None = None) -> FloatArray:
    """Time of a perfect balance of the same work, shape [L]: the mean weighted by speed.

    Parameters
    ----------
    time_LG : array, shape [L, G]
        Time of each GPU.
    speed_G : array, shape [G]
        Relative speeds.
    usable_LG : array of bool, shape [L, G], optional
        GPUs that can hold an expert; all by default. The others count nowhere.
    """
    weight_G = speed_G / speed_G.max()  # of the largest finite speeds the sum is none
    if usable_LG is None or usable_LG.all():
        return np.asarray(time_LG @ (weight_G / weight_G.sum()))
    weight_LG = np.where(usable_LG, weight_G, 0.0)
    total_L = weight_LG.sum(1)
    return np.asarray((time_LG * weight_LG).sum(1) / np.where(total_L > 0, total_L, 1.0))


def imbalance(time_LG: FloatArray, speed_G: FloatArray, usable_LG: BoolArray | None = None) -> FloatArray:
    """max / mean GPU time of each layer, shape [L]; 1 is perfect.

    The mean is that of `perfect_times` (with equal speeds, the plain mean of the GPUs that can hold an
    expert). A layer without any time counts as 1.
    """
    return over_perfect(time_LG.max(1), perfect_times(time_LG, speed_G, usable_LG))


def over_perfect(top_L: FloatArray, perfect_L: FloatArray) -> FloatArray:
    """The largest time over the time of a perfect balance, shape [L]; 1 where there is no work."""
    return np.asarray(np.divide(top_L, perfect_L, out=np.ones_like(top_L), where=perfect_L > 0))


def new_replicas(slots_LGC: SlotArray, before_LGC: SlotArray, experts: int) -> BoolArray:
    """Slots whose expert the GPU did not hold before, shape [L, G, C].

    A second copy comes from the first one on the same GPU, over no link: of several only the first is new.
    """
    gpus = np.arange(slots_LGC.shape[0] * slots_LGC.shape[1]).reshape(*slots_LGC.shape[:2], 1) * experts
    fresh = np.ones(gpus.size * experts, dtype=np.bool_)
    fresh[(gpus + before_LGC)[before_LGC >= 0]] = False
    filled_LGC = slots_LGC >= 0
    new_LGC = np.zeros(slots_LGC.shape, dtype=np.bool_)
    key_P = (gpus + slots_LGC)[filled_LGC]
    new_P = fresh[key_P]
    came = np.flatnonzero(new_P)
    first = np.unique(key_P[came], return_index=True)[1]
    if len(first) < len(came):
        new_P[np.delete(came, first)] = False
    new_LGC[filled_LGC] = new_P
    return new_LGC


def move_seconds(
    topology: Topology, slots_LGC: SlotArray, before_LGC: SlotArray, experts: int, bytes_L: IntArray
) -> FloatArray:
    """Seconds of transfer of each layer's new replicas, each over the nearest link, one after the other [L].

    A replica comes from its own node if that held the expert, else from another node, else from the host.
    """
    layer, gpu, slot = np.nonzero(new_replicas(slots_LGC, before_LGC, experts))
    expert = slots_LGC[layer, gpu, slot]
    in_node_LNE = np.zeros((len(slots_LGC), topology.nodes, experts), dtype=np.bool_)
    x, g, c = np.nonzero(before_LGC >= 0)
    in_node_LNE[x, topology.node_G[g], before_LGC[x, g, c]] = True
    near = in_node_LNE[layer, topology.node_G[gpu], expert]
    anywhere = in_node_LNE[layer, :, expert].any(1)
    links = topology.links
    rate = np.where(near, links.intra_node, np.where(anywhere, links.inter_node, links.host))
    seconds = links.latency + bytes_L[layer] / rate
    return np.asarray(np.bincount(layer, weights=seconds, minlength=len(slots_LGC)), dtype=np.float64)


def node_traffic(
    load_LE: FloatArray,
    slots_LGC: SlotArray,
    share_LGC: FloatArray,
    node_G: IntArray,
    load_LNE: FloatArray | None = None,
) -> FloatArray:
    """Tokens of each layer that must leave their node, shape [L].

    A node keeps as many of an expert's tokens as its own replicas serve; the rest crosses.

    Parameters
    ----------
    load_LE : array, shape [L, E]
        Tokens per expert.
    slots_LGC, share_LGC : arrays, shape [L, G, C]
        The plan.
    node_G : array of int, shape [G]
        Node of each GPU.
    load_LNE : array, shape [L, N, E], optional
        Tokens by source node; spread evenly over the nodes if unknown.
    """
    layers, experts = load_LE.shape
    nodes = int(node_G.max()) + 1
    served = np.zeros((layers, nodes, experts + 1))
    row_L = np.arange(layers)[:, None, None]
    np.add.at(served, (row_L, node_G[None, :, None], slots_LGC), share_LGC)  # -1 lands in the spare column
    served_LNE = served[:, :, :experts] * load_LE[:, None, :]
    source_LNE = load_LE[:, None, :] / nodes if load_LNE is None else load_LNE
    stays_L = np.minimum(served_LNE, source_LNE).sum((1, 2))
    return np.asarray(np.maximum(load_LE.sum(1) - stays_L, 0.0))
