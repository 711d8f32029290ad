"""Shares that put every GPU at the mean, as near to the equal split as can be (step 4 of `fractional`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moeless_opt.problems.arrays import FloatArray, IntArray, SlotArray

__all__ = ["PERFECT", "level"]

PERFECT = 1e-10
"""Relative distance from the mean that counts as none."""

_SINGULAR = 1e5  # potentials beyond this, in units of the mean load over a piece, mean a singular system


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
    # Constant vectors are in the kernel: ground it. A GPU without links gets a potential of its own.
    unit_L = np.where(mean_L > 0.0, mean_L, 1.0)[:, None, None]
    links = _Links(layer, gpu, column, weight, count, (L, X, G))
    solve = _by_experts if 2 * (X + 1) <= G else _by_gpus
    potential, average = solve(links, excess_LG / unit_L[..., 0], unit_L)
    moved = weight * (average[layer, column] / count - potential[layer, gpu])
    token = weight + moved
    token_LGC = piece_LGC.copy()
    token_LGC[layer, gpu, slot] = token
    time_L = (token_LGC.sum(axis=2) / speed_G).max(axis=1)
    negative_L = np.zeros(L, dtype=bool)
    negative_L[layer[token < -1e-12 * unit_L[layer, 0, 0]]] = True
    # GPUs that are not joined make the system singular, and its potentials huge and worthless.
    sound_L = np.isfinite(potential).all(axis=1) & (np.abs(potential).max(axis=1) < _SINGULAR)
    good_L = sound_L & ~negative_L & (time_L <= equal_L * (1.0 + PERFECT))
    load = load_LE[layer, expert[layer, gpu, slot]]
    new = np.where(load > 0.0, np.maximum(token, 0.0) / np.where(load > 0.0, load, 1.0), 1.0 / count)
    keep = good_L[layer]
    share[layer[keep], gpu[keep], slot[keep]] = new[keep]
    return share, np.where(good_L, time_L, equal_L)


@dataclass(frozen=True, slots=True)
class _Links:
    """Replicas of replicated experts, one entry each: layer, GPU, column of the expert, piece, replicas."""

    layer: IntArray
    gpu: IntArray
    column: IntArray
    weight: FloatArray
    count: NDArray[Any]
    shape: tuple[int, int, int]  # layers, experts with replicas, GPUs


def _by_gpus(links: _Links, excess_LG: FloatArray, unit_L: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Potentials of the GPUs, and their sums over each expert's GPUs, from a system over the GPUs."""
    L, X, G = links.shape
    layer, gpu, column = links.layer, links.gpu, links.column
    incidence = np.zeros((L, X, G))
    incidence[layer, column, gpu] = 1.0
    scaled = np.zeros((L, X, G))
    scaled[layer, column, gpu] = links.weight / links.count
    laplacian = -np.matmul(scaled.transpose(0, 2, 1), incidence)
    index = np.arange(G)
    laplacian[:, index, index] += _total(links)
    potential = np.linalg.solve(laplacian / unit_L + 1.0 / G + np.eye(G) * 1e-13, excess_LG[..., None])[
        ..., 0
    ]
    return potential, np.matmul(incidence, potential[..., None])[..., 0]


def _by_experts(links: _Links, excess_LG: FloatArray, unit_L: FloatArray) -> tuple[FloatArray, FloatArray]:
    """The same from a system over the experts, of which there are fewer (Woodbury's identity).

    With D the GPUs' linked tokens, B who is where, S the pieces over the replicas and u = 1 / sqrt(GPUs), the
    system over the GPUs is ``(D - B' S B + u u') p = excess``. The unknowns here are ``B p`` and ``u' p``.
    """
    L, X, G = links.shape
    layer, gpu, column = links.layer, links.gpu, links.column
    unit = unit_L[:, 0, 0]
    inverse_LG = 1.0 / (_total(links) / unit[:, None] + 1e-13)
    scale_LX = np.zeros((L, X))
    scale_LX[layer, column] = links.weight / links.count / unit[layer]

    def over_experts(value_LG: FloatArray) -> FloatArray:
        values = value_LG[layer, gpu]
        sums: FloatArray = np.bincount(layer * X + column, weights=values, minlength=L * X).astype(np.float64)
        return sums.reshape(L, X)

    # Entries of every pair of replicas on one GPU: B D^-1 B'.
    order = np.argsort(layer * G + gpu, kind="stable")
    cell = (layer * G + gpu)[order]
    start = np.searchsorted(cell, cell)
    met_LXX = np.zeros(L * X * X)
    for step in range(int(np.bincount(cell).max())):
        other = start + step
        valid = other < len(cell)
        valid[valid] = cell[other[valid]] == cell[valid]
        a, b = order[valid], order[other[valid]]
        key = (layer[a] * X + column[a]) * X + column[b]
        met_LXX += np.bincount(key, weights=inverse_LG[layer[a], gpu[a]], minlength=L * X * X)
    ground = 1.0 / np.sqrt(G)
    system = np.zeros((L, X + 1, X + 1))
    system[:, :X, :X] = np.eye(X) - met_LXX.reshape(L, X, X) * scale_LX[:, None, :]
    system[:, :X, X] = over_experts(inverse_LG) * ground
    system[:, X, :X] = -system[:, :X, X] * scale_LX
    system[:, X, X] = 1.0 + inverse_LG.sum(axis=1) / G
    right = np.zeros((L, X + 1))
    right[:, :X] = over_experts(inverse_LG * excess_LG)
    right[:, X] = (inverse_LG * excess_LG).sum(axis=1) * ground
    found = _solved(system, right)
    back = np.bincount(
        layer * G + gpu, weights=(found[:, :X] * scale_LX)[layer, column], minlength=L * G
    ).reshape(L, G)
    potential = inverse_LG * (excess_LG + back - ground * found[:, X:])
    return potential, over_experts(potential)


def _solved(system_LNN: FloatArray, right_LN: FloatArray) -> FloatArray:
    """Solutions, shape [L, N]; not a number in layers whose system is singular (GPUs that nothing joins)."""
    try:
        return np.asarray(np.linalg.solve(system_LNN, right_LN[..., None])[..., 0], dtype=np.float64)
    except np.linalg.LinAlgError:
        if len(system_LNN) == 1:
            return np.full(right_LN.shape, np.nan)
        parts = zip(system_LNN, right_LN, strict=True)
        return np.concatenate([_solved(system[None], right[None]) for system, right in parts])


def _total(links: _Links) -> FloatArray:
    """Tokens of the replicated experts on each GPU, shape [L, G]."""
    L, _, G = links.shape
    total: FloatArray = np.bincount(
        links.layer * G + links.gpu, weights=links.weight, minlength=L * G
    ).astype(float)
    return total.reshape(L, G)
