"""What a placement is worth under SGLang's static dispatch, by the letter."""

from __future__ import annotations

import random

import numpy as np
from numpy.typing import ArrayLike

from moeless_opt.problems.arrays import FloatArray, IntArray
from moeless_opt.problems.errors import ProblemError
from moeless_opt.problems.spec import Placement

__all__ = ["sglang_loads", "sglang_targets"]


def sglang_targets(slots_LGC: ArrayLike, experts: int, nodes: int, *, seed: int = 42) -> IntArray:
    """The GPU to which each source GPU sends all its tokens of an expert, shape [source GPUs, L, E].

    An expert of one replica leaves no choice. Else it is the source's own GPU, else the first slot on its
    node where the node holds some replicas but not all; the sources that are left draw from all replicas, as
    fairly as their number allows.

    Parameters
    ----------
    slots_LGC : array of int, shape [L, G, C]
        Expert in each slot.
    experts : int
        Experts per layer.
    nodes : int
        Nodes of equally many GPUs each, one after the other.
    seed : int
        Of the draws; SGLang's is 42.

    References
    ----------
    SGLang 0.5, ``eplb/expert_location.py``: ``compute_logical_to_rank_dispatch_physical_map``.
    """
    placement = Placement.of(slots_LGC, experts, "slots")
    layers, gpus, _ = placement.slots_LGC.shape
    if nodes < 1 or gpus % nodes:
        raise ProblemError("nodes", f"are {nodes}, {gpus} GPUs cannot be divided by that")
    draw, each = random.Random(seed), gpus // nodes
    held_LGE = placement.held_LGE
    target_GLE = np.empty((gpus, layers, experts), dtype=np.int64)
    for layer in range(layers):
        for expert in range(experts):
            holders = np.flatnonzero(held_LGE[layer, :, expert]).tolist()
            row = [_near(holders, gpu, each) for gpu in range(gpus)]
            left = [gpu for gpu, target in enumerate(row) if target < 0]
            whole, rest = divmod(len(left), len(holders))
            drawn = holders * whole + draw.sample(holders, k=rest)
            draw.shuffle(drawn)
            for gpu, target in zip(left, drawn, strict=True):
                row[gpu] = target
            target_GLE[:, layer, expert] = row
    return target_GLE


def _near(holders: list[int], gpu: int, each: int) -> int:
    """Where a source sends without drawing; -1 where it draws."""
    if len(holders) == 1:
        return holders[0]
    if gpu in holders:
        return gpu
    near = [holder for holder in holders if holder // each == gpu // each]
    return near[0] if near and len(near) < len(holders) else -1


def sglang_loads(
    load_LE: ArrayLike, slots_LGC: ArrayLike, nodes: int, *, seed: int = 42
) -> tuple[FloatArray, FloatArray]:
    """Tokens of each GPU under SGLang's static dispatch [L, G], and those that leave their node [L].

    Every source GPU has as many tokens of an expert as the others. Parameters are those of `sglang_targets`;
    `load_LE` has the tokens, shape [L, E]. A split by the nearest replica is the same but for the sources
    that have several replicas to choose from: there it divides evenly what SGLang sends to one of them.
    """
    load = np.asarray(load_LE, dtype=np.float64)
    if load.ndim != 2:
        raise ProblemError("load_LE", f"has {load.ndim} axes, must be [layers, experts]")
    target_GLE = sglang_targets(slots_LGC, load.shape[1], nodes, seed=seed)
    gpus, layers, _ = target_GLE.shape
    each = gpus // nodes
    part_LE = load / gpus
    tokens_LG, leave_L = np.zeros((layers, gpus)), np.zeros(layers)
    for source, target_LE in enumerate(target_GLE):
        np.add.at(tokens_LG, (np.arange(layers)[:, None], target_LE), part_LE)
        leave_L += np.where(target_LE // each != source // each, part_LE, 0.0).sum(1)
    return tokens_LG, leave_L
