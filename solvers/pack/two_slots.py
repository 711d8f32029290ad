"""Layers whose GPUs all have two slots: exact, by folding.

With two slots per GPU and the replicas counted, the best packing is known: sort the pieces and fold the
list, so that the largest meets the smallest. Only an expert that lies across the middle would meet itself
there. If it has r replicas of weight w, then its copies must go to r GPUs, the G - r others can't keep all
of the G - r + 1 largest pieces apart, so that one of these shares a GPU with a copy or with its like: no
packing does better than ``w + piece[G - r]``, and taking the copies apart just there attains it.

What is left is to try the replica counts. A plan better than T needs at least ``load / T`` replicas of each
expert, which leaves few slots to hand out freely once T is good: a few hundred to a few thousand ways for 8
experts on 8 GPUs, all folded at once. Where there are more, one replica at a time is moved from an expert
to another while it helps.

A last expert without load stands for the slots that are left empty.
"""

from __future__ import annotations

import functools
import math

import numpy as np

from moeless_opt.problems.arrays import BoolArray, FloatArray, IntArray, SlotArray
from moeless_opt.solvers.core import Stop

__all__ = ["best_counts", "fold", "fold_value", "quick_fold"]


def fold_value(load_NE: FloatArray, counts_NE: IntArray, G: int) -> FloatArray:
    """The lowest possible largest GPU load, for given replica counts, on G equal GPUs of two slots.

    Parameters
    ----------
    load_NE : array of float, shape [N, E]
        Tokens of each expert, in N cases.
    counts_NE : array of int, shape [N, E]
        Replicas, from 1 to G each and at most 2 G in all.
    G : int
        GPUs.

    Returns
    -------
    array of float, shape [N]
    """
    expert, weight = _line_up(load_NE, counts_NE, G)
    top: FloatArray = (weight[:, :G] + weight[:, : G - 1 : -1]).max(axis=1)
    rows = np.flatnonzero((expert[:, G - 1] == expert[:, G]) & (expert[:, G] >= 0))
    middle = expert[rows, G]
    apart = weight[rows, G] + weight[rows, G - counts_NE[rows, middle]]
    top[rows] = np.maximum(top[rows], apart)
    return top


def fold(load_LE: FloatArray, counts_LE: IntArray, G: int) -> SlotArray:
    """The packing that attains `fold_value`.

    Parameters
    ----------
    load_LE : array of float, shape [L, E]
    counts_LE : array of int, shape [L, E]
    G : int

    Returns
    -------
    array of int32, shape [L, G, 2]
        Expert in each slot, -1 (last) where empty.
    """
    expert, _ = _line_up(load_LE, counts_LE, G)
    slots = np.stack([expert[:, :G], expert[:, : G - 1 : -1]], axis=2).astype(np.int32)
    for layer in np.flatnonzero((expert[:, G - 1] == expert[:, G]) & (expert[:, G] >= 0)):
        middle = expert[layer, G]
        meets_itself = np.flatnonzero((slots[layer] == middle).all(axis=1))
        without = np.flatnonzero((slots[layer] != middle).all(axis=1))[::-1]
        for gpu, other in zip(meets_itself, without, strict=False):
            slots[layer, gpu, 1], slots[layer, other, 0] = slots[layer, other, 0], slots[layer, gpu, 1]
    turned = slots[:, :, 0] < 0
    slots[turned] = slots[turned][:, ::-1]
    return slots


def _line_up(load_NE: FloatArray, counts_NE: IntArray, G: int) -> tuple[IntArray, FloatArray]:
    """All pieces of each case, largest first, with their experts; empty slots (-1) behind."""
    N, E = load_NE.shape
    piece = np.zeros((N, E + 1))
    np.divide(load_NE, counts_NE, out=piece[:, :E])
    order = np.empty((N, E + 1), dtype=np.int64)
    order[:, :E] = np.argsort(-piece[:, :E], axis=1, kind="stable")
    order[:, E] = -1
    counts = np.empty((N, E + 1), dtype=np.int64)
    counts[:, :E] = np.take_along_axis(counts_NE, order[:, :E], axis=1)
    counts[:, E] = 2 * G - counts[:, :E].sum(axis=1)
    expert = np.repeat(order.ravel(), counts.ravel()).reshape(N, 2 * G)
    return expert, piece[np.arange(N)[:, None], expert]


@functools.lru_cache(maxsize=64)
def _ways(slots: int, experts: int) -> IntArray:
    """All ways of handing out at most `slots` slots to the experts, one per row."""
    if experts == 1:
        return np.arange(slots + 1, dtype=np.int64)[:, None]
    blocks = []
    for first in range(slots + 1):
        rest = _ways(slots - first, experts - 1)
        blocks.append(np.hstack([np.full((len(rest), 1), first, dtype=np.int64), rest]))
    table = np.vstack(blocks)
    table.flags.writeable = False
    return table


def best_counts(
    load_LE: FloatArray,
    counts_LE: IntArray,
    G: int,
    *,
    target: float = 1.0,
    ways: int = 20_000,
    stop: Stop | None = None,
) -> tuple[IntArray, BoolArray]:
    """The replica counts with the lowest `fold_value`, from given ones on.

    Parameters
    ----------
    load_LE : array of float, shape [L, E]
        Tokens of each expert.
    counts_LE : array of int, shape [L, E]
        Counts to start from.
    G : int
        GPUs.
    target : float
        Enough: a largest load of `target` times the mean.
    ways : int
        Most ways of handing out a layer's free slots that are all tried.
    stop : Stop, optional
        When to be content with what is found.

    Returns
    -------
    counts_LE : array of int, shape [L, E]
    proven : array of bool, shape [L]
        Layers whose counts are proven to be optimal.
    """
    L, E = load_LE.shape
    counts = np.array(counts_LE, dtype=np.int64)
    proven = np.zeros(L, dtype=bool)
    value = fold_value(load_LE, counts, G)
    goal = target * load_LE.sum(axis=1) / G
    for layer in np.flatnonzero(value > goal):
        if stop is not None and stop():
            break
        value[layer] = _descend(load_LE[layer], counts[layer], value[layer], G)
        if value[layer] <= goal[layer]:
            continue
        # Whoever is to beat `value` needs these; the hair keeps equal values out.
        need = np.ceil(load_LE[layer] / (value[layer] * (1.0 - 1e-12))).astype(np.int64)
        need = np.maximum(need, 1)
        free = 2 * G - int(need.sum())
        if free >= 0 and (need <= G).all():
            if math.comb(free + E, E) > ways:
                continue
            tried = need + _ways(free, E)
            tried = tried[(tried <= G).all(axis=1)]
            values = fold_value(np.broadcast_to(load_LE[layer], tried.shape), tried, G)
            best = int(values.argmin())
            if values[best] < value[layer]:
                counts[layer], value[layer] = tried[best], values[best]
        proven[layer] = True
    return counts, proven


def _descend(load_E: FloatArray, counts_E: IntArray, value: float, G: int) -> float:
    """Move one replica at a time from an expert to another, the best such move, while it helps."""
    E = len(load_E)
    giver, taker = np.nonzero(~np.eye(E, dtype=bool))
    step = np.zeros((len(giver), E), dtype=np.int64)
    step[np.arange(len(giver)), giver] = -1
    step[np.arange(len(taker)), taker] = 1
    while True:
        allowed = (counts_E[giver] > 1) & (counts_E[taker] < G)
        if not allowed.any():
            return value
        tried = counts_E + step[allowed]
        values = fold_value(np.broadcast_to(load_E, tried.shape), tried, G)
        best = int(values.argmin())
        if not values[best] < value:
            return value
        counts_E[:], value = tried[best], float(values[best])


def quick_fold(load_E: list[float], G: int, *, target: float = 1.0, tries: int = 12) -> list[tuple[int, int]]:
    """A good packing of one small layer in about a tenth of a millisecond, on plain lists.

    For a handful of experts NumPy spends its time on being called. Greedy counts, then a few attempts to
    give one of the two experts on the fullest GPU another replica, each time from the expert that makes the
    best of it.

    Parameters
    ----------
    load_E : list of float [E]
        Tokens of each expert; at most 2 G of them.
    G : int
        GPUs, of two slots each.
    target : float
        Enough: a largest load of `target` times the mean.
    tries : int
        Most counts tried besides the greedy ones.

    Returns
    -------
    list [G] of (int, int)
        Expert in each slot, -1 where empty.
    """
    counts = _apportion_list(load_E, 2 * G, G)
    piece = [load / count for load, count in zip(load_E, counts, strict=True)]
    goal = target * sum(load_E) / G
    value, pairs = _fold_list(piece, counts, G)
    while value > goal and tries > 0:
        lightest = min(piece)
        best = None
        for taker in max(pairs, key=lambda pair: (piece[pair[0]] + piece[pair[1]]) if pair[1] >= 0 else 0.0):
            for giver, load in enumerate(load_E):
                if giver == taker or counts[giver] == 1 or counts[taker] == G or tries == 0:
                    continue
                grown = load / (counts[giver] - 1)
                if grown + lightest >= value:
                    continue
                tries -= 1
                case = counts.copy(), piece.copy()
                case[0][giver] -= 1
                case[0][taker] += 1
                case[1][giver], case[1][taker] = grown, load_E[taker] / case[0][taker]
                folded = _fold_list(case[1], case[0], G)
                if folded[0] < value:
                    value, best = folded[0], (case, folded[1])
        if best is None:
            break
        (counts, piece), pairs = best
    return pairs


def _apportion_list(load_E: list[float], total: int, cap: int) -> list[int]:
    """Like `sizing.apportion`, for one layer, on lists."""
    counts = [1] * len(load_E)
    piece = list(load_E) if cap > 1 else [-1.0] * len(load_E)
    for _ in range(total - len(load_E)):
        largest = max(piece)
        if largest < 0.0:
            break
        expert = piece.index(largest)
        counts[expert] += 1
        piece[expert] = load_E[expert] / counts[expert] if counts[expert] < cap else -1.0
    return counts


def _fold_list(piece_E: list[float], counts_E: list[int], G: int) -> tuple[float, list[tuple[int, int]]]:
    """Value and packing of `fold`, for one layer, on lists."""
    line: list[int] = []
    for expert in sorted(range(len(piece_E)), key=piece_E.__getitem__, reverse=True):
        line += [expert] * counts_E[expert]
    line += [-1] * (2 * G - len(line))
    first, second = line[:G], line[: G - 1 : -1]
    middle = first[-1]
    if middle >= 0 and second[-1] == middle:
        other = G - counts_E[middle]
        for gpu in range(G):
            if first[gpu] == second[gpu] == middle:
                second[gpu], first[other] = first[other], middle
                other += 1
    weight = [*piece_E, 0.0]
    value = max([weight[a] + weight[b] for a, b in zip(first, second, strict=True)])
    return value, list(zip(first, second, strict=True))
