"""Tokens that go to the nearest replica: where they come from, and what share each replica then serves.

Every source GPU sends an expert's tokens to the replica on itself, else evenly to those on its node, else
evenly to all. The tokens of a node come evenly from its GPUs. So the own GPU does not change what a replica
serves: with u GPUs on a node, k of them with a replica, and a part f of the tokens, each replica serves
``f/u`` of its own and ``f (u - k) / (u k)`` of its neighbours', together ``f/k``; and of the part F that
comes from nodes without a replica, every one of r replicas serves ``F/r``.
"""

from __future__ import annotations

import numpy as np

from moeless_opt.problems.arrays import BoolArray, FloatArray, IntArray, SlotArray

__all__ = ["nearest_shares", "source_parts"]


def source_parts(node_G: IntArray, usable_LG: BoolArray, load_LNE: FloatArray | None = None) -> FloatArray:
    """Part of every expert's tokens that comes from each node, shape [L, N, E], or [L, N, 1] where alike.

    Parameters
    ----------
    node_G : array of int, shape [G]
        Node of each GPU.
    usable_LG : array of bool, shape [L, G]
        GPUs that are alive: a dead one is the source of no tokens.
    load_LNE : array, shape [L, N, E], optional
        Tokens by source node. Where unknown, and for experts without any, tokens come evenly from the
        live GPUs.
    """
    nodes = int(node_G.max()) + 1
    alive_LN = np.stack([usable_LG[:, node_G == node].sum(1) for node in range(nodes)], axis=1)
    even_LN1 = (alive_LN / np.maximum(alive_LN.sum(1, keepdims=True), 1))[:, :, None]
    if load_LNE is None:
        return np.asarray(even_LN1)
    total_L1E = load_LNE.sum(1, keepdims=True)
    some_L1E = total_L1E > 0
    return np.where(some_L1E, load_LNE / np.where(some_L1E, total_L1E, 1.0), even_LN1)


def nearest_shares(slots_LGC: SlotArray, experts: int, node_G: IntArray, part_LNE: FloatArray) -> FloatArray:
    """Token shares of slots whose tokens go to the nearest replica, shape [L, G, C].

    Parameters
    ----------
    slots_LGC : array of int, shape [L, G, C]
        Expert in each slot, -1 for an empty one. Several copies on one GPU are one place, whose tokens they
        divide evenly.
    experts : int
        Experts per layer.
    node_G : array of int, shape [G]
        Node of each GPU.
    part_LNE : array, shape [L, N, E] or [L, N, 1]
        Where the tokens come from (see `source_parts`).

    References
    ----------
    SGLang 0.5, ``eplb/expert_location.py``: its static dispatch is alike, but a source GPU sends all its
    tokens of an expert to one replica, the first on its node or else one drawn at random.
    """
    layers, gpus, _ = slots_LGC.shape
    copies_LGE = np.zeros((layers, gpus, experts + 1), dtype=np.int64)
    row_L, gpu_G = np.arange(layers)[:, None, None], np.arange(gpus)[None, :, None]
    np.add.at(copies_LGE, (row_L, gpu_G, slots_LGC), 1)  # -1 lands in the spare column
    held_LGE = copies_LGE[:, :, :experts] > 0
    nodes = part_LNE.shape[1]
    near_LNE = np.stack([held_LGE[:, node_G == node].sum(1) for node in range(nodes)], axis=1)
    far_LE = np.where(near_LNE == 0, part_LNE, 0.0).sum(1) / np.maximum(near_LNE.sum(1), 1)
    serves_LNE = part_LNE / np.maximum(near_LNE, 1) + far_LE[:, None, :]
    share_LGC = serves_LNE[row_L, node_G[None, :, None], slots_LGC]
    share_LGC /= np.maximum(copies_LGE[row_L, gpu_G, slots_LGC], 1)
    return np.where(slots_LGC >= 0, share_LGC, 0.0)
