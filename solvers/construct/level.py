"""Shares that put every GPU at the mean, as near to the equal split as can be (step 4 of `fractional`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moeless_opt.problems.arrays import BoolArray, FloatArray, IntArray, SlotArray

__all__ = ["PERFECT", "level"]

PERFECT = 1e-10
"""Relative distance from the mean that counts as none."""

_RESIDUE = 1e-13  # of the mean load: what the gradients may leave on a GPU
_STRAY = 1e-11  # of the mean load: what may be left on a GPU or an expert without an open replica
_MOST_STEPS = 400  # of the gradients
_FEATHER = 1e-9  # of the mean load: a lighter piece links nothing


def level(
    load_LE: FloatArray, slots_LGC: SlotArray, speed_G: FloatArray, replicas_LE: NDArray[Any]
) -> tuple[FloatArray, FloatArray]:
    """Step 4: the shares nearest to the equal split that put every GPU at the mean, where they exist.

    Each replica of an expert moves ``piece * (average potential of its GPUs - potential of this GPU)`` tokens
    onto this GPU; the potentials solve a Laplacian system over the GPUs.

    Parameters
    ----------
    load_LE : array of float, shape [L, E]
        Tokens.
    slots_LGC : array of int, shape [L, G, C]
        Placement.
    speed_G : array of float, shape [G]
        Relative speeds.
    replicas_LE : array of int, shape [L, E]
        Replicas of each expert in the placement.

    Returns
    -------
    share_LGC : array of float, shape [L, G, C]
        Shares; the equal split in layers where levelling would make one negative.
    time_L : array of float, shape [L]
        Largest GPU times under them.
    """
    L, G, _ = slots_LGC.shape
    E = load_LE.shape[1]
    rows = np.arange(L)[:, None, None]
    filled = slots_LGC >= 0
    expert = np.where(filled, slots_LGC, 0)
    count_LGC = replicas_LE[rows, expert]
    piece_LGC = np.where(filled, (load_LE / replicas_LE)[rows, expert], 0.0)
    share = np.where(filled, 1.0 / count_LGC, 0.0)
    excess_LG = piece_LGC.sum(axis=2)
    mean_L = load_LE.sum(axis=1) / speed_G.sum()
    equal_L = (excess_LG / speed_G).max(axis=1)
    excess_LG = excess_LG - mean_L[:, None] * speed_G
    linked = filled & (count_LGC > 1)
    layer, gpu, slot = np.nonzero(linked)
    if not len(layer):
        return share, equal_L
    # Links of each layer in a row: X experts, incidence [L, X, G].
    key = layer * E + expert[layer, gpu, slot]
    is_link = np.zeros(L * E, dtype=bool)
    is_link[key] = True
    number = np.cumsum(is_link.reshape(L, E), axis=1) - 1
    X = int(number.max()) + 1
    column = number.reshape(-1)[key]
    weight = piece_LGC[layer, gpu, slot]
    count = count_LGC[layer, gpu, slot]
    unit_L = np.where(mean_L > 0.0, mean_L, 1.0)
    links = _Links(layer, gpu, column, weight, (L, X, G))
    moved, sound_L = _by_leaves(links, excess_LG, unit_L)
    token = weight + moved
    token_LGC = piece_LGC.copy()
    token_LGC[layer, gpu, slot] = token
    time_L = (token_LGC.sum(axis=2) / speed_G).max(axis=1)
    negative_L = np.zeros(L, dtype=bool)
    negative_L[layer[token < -1e-12 * unit_L[layer]]] = True
    good_L = sound_L & ~negative_L & (time_L <= equal_L * (1.0 + PERFECT))
    load = load_LE[layer, expert[layer, gpu, slot]]
    new = np.where(load > 0.0, np.maximum(token, 0.0) / np.where(load > 0.0, load, 1.0), 1.0 / count)
    keep = good_L[layer]
    share[layer[keep], gpu[keep], slot[keep]] = new[keep]
    return share, np.where(good_L, time_L, equal_L)


@dataclass(frozen=True, slots=True)
class _Links:
    """Replicas of replicated experts, one entry each: layer, GPU, column of the expert, piece."""

    layer: IntArray
    gpu: IntArray
    column: IntArray
    weight: FloatArray
    shape: tuple[int, int, int]  # layers, experts with replicas, GPUs


def _by_leaves(links: _Links, excess_LG: FloatArray, unit_L: FloatArray) -> tuple[FloatArray, BoolArray]:
    """Tokens that each replica takes on, and layers where that is sound: leaf by leaf, then the cycles.

    What a GPU or an expert with one open replica must move there is settled; that closes the replica, and may
    make a leaf of its other end. In a tree nothing is left then. With a few slots more there are a
    few cycles, with many they are as good as random graphs: either way conjugate gradients converge in some
    tens of steps, where a dense system takes the cube of the GPUs.
    """
    L, X, G = links.shape
    one, two = links.layer * G + links.gpu, links.layer * X + links.column
    moved = np.zeros(len(one))
    left = np.flatnonzero(links.weight > _FEATHER * unit_L[links.layer])
    open_1 = np.bincount(one[left], minlength=L * G)
    open_2 = np.bincount(two[left], minlength=L * X)
    due_1, due_2 = -excess_LG.reshape(-1), np.zeros(L * X)
    while True:
        leaf_1, leaf_2 = open_1[one[left]] == 1, open_2[two[left]] == 1
        leaf = leaf_1 | leaf_2
        if not leaf.any():
            break
        now = left[leaf]
        moved[now] = np.where(leaf_1[leaf], due_1[one[now]], due_2[two[now]])
        np.subtract.at(due_1, one[now], moved[now])
        np.subtract.at(due_2, two[now], moved[now])
        np.subtract.at(open_1, one[now], 1)
        np.subtract.at(open_2, two[now], 1)
        left = left[~leaf]
    tiny_L = _STRAY * unit_L
    stray_1 = (np.abs(due_1.reshape(L, G)) > tiny_L[:, None]) & (open_1.reshape(L, G) == 0)
    stray_2 = (np.abs(due_2.reshape(L, X)) > tiny_L[:, None]) & (open_2.reshape(L, X) == 0)
    sound_L = ~(stray_1.any(axis=1) | stray_2.any(axis=1))
    if len(left):
        moved[left], converged_L = _gradients(links, left, due_1, due_2, unit_L)
        sound_L &= converged_L
    return moved, sound_L


def _gradients(
    links: _Links, left: IntArray, due_1: FloatArray, due_2: FloatArray, unit_L: FloatArray
) -> tuple[FloatArray, BoolArray]:
    """Least squares of what the open replicas move over their pieces, all layers at once.

    A replica moves ``piece * (b of its expert - a of its GPU)``. The experts' equations give b; the GPUs' are
    a Laplacian system for a.

    References
    ----------
    M. R. Hestenes, E. Stiefel: Methods of conjugate gradients for solving linear systems (1952).
    """
    L, X, G = links.shape
    one, two = links.layer[left] * G + links.gpu[left], links.layer[left] * X + links.column[left]
    weight = links.weight[left]
    at_1, one = np.unique(one, return_inverse=True)
    at_2, two = np.unique(two, return_inverse=True)
    layer_1 = at_1 // G

    def onto_1(value: FloatArray) -> FloatArray:
        return np.asarray(np.bincount(one, weights=value, minlength=len(at_1)))

    def by_layer(value_1: FloatArray) -> FloatArray:
        return np.asarray(np.bincount(layer_1, weights=value_1, minlength=L))

    total_1 = onto_1(weight)
    total_2 = np.bincount(two, weights=weight, minlength=len(at_2))
    inner_2 = due_2[at_2] / total_2
    rest = onto_1(weight * inner_2[two]) - due_1[at_1]
    potential = np.zeros(len(at_1))
    limit_L = _RESIDUE * unit_L
    held_L, start = np.unique(layer_1, return_index=True)
    still_L = np.zeros(L, dtype=bool)
    step = rest / total_1
    slope_L = by_layer(rest * step)
    for _ in range(_MOST_STEPS):
        still_L[held_L] = np.maximum.reduceat(np.abs(rest), start) > limit_L[held_L]
        if not still_L.any():
            break
        average = np.bincount(two, weights=weight * step[one], minlength=len(at_2)) / total_2
        image = total_1 * step - onto_1(weight * average[two])
        curve_L = by_layer(step * image)
        length_L = np.where(still_L & (curve_L > 0.0), slope_L / np.where(curve_L > 0.0, curve_L, 1.0), 0.0)
        potential += length_L[layer_1] * step
        rest -= length_L[layer_1] * image
        scaled = rest / total_1
        now_L = by_layer(rest * scaled)
        step = scaled + (now_L / np.where(slope_L > 0.0, slope_L, 1.0))[layer_1] * step
        slope_L = now_L
    average = inner_2 + np.bincount(two, weights=weight * potential[one], minlength=len(at_2)) / total_2
    return weight * (average[two] - potential[one]), ~still_L
