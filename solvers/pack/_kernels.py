"""The compiled kernels of `fast`; importing this module imports Numba."""

# mypy: disable-error-code="untyped-decorator"

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit


@njit(cache=True)
def rank_down(key: Any, order: Any, spare: Any) -> None:  # pragma: no cover
    """Indices of `key`, largest first, equal ones by index: a bottom-up merge sort over runs of eight."""
    n = len(key)
    run = 8
    for start in range(0, n, run):
        for i in range(start, min(start + run, n)):
            j = i - 1
            while j >= start and key[order[j]] < key[i]:
                order[j + 1] = order[j]
                j -= 1
            order[j + 1] = i
    while run < n:
        for start in range(0, n, 2 * run):
            middle, end = min(start + run, n), min(start + 2 * run, n)
            if middle >= end or key[order[middle - 1]] >= key[order[middle]]:
                continue
            for i in range(start, middle):
                spare[i] = order[i]
            i, j, k = start, middle, start
            while i < middle:
                if j < end and key[order[j]] > key[spare[i]]:
                    order[k] = order[j]
                    j += 1
                else:
                    order[k] = spare[i]
                    i += 1
                k += 1
        run *= 2


@njit(cache=True)
def hand_out(load_LE: Any, replicas: Any, high: Any, left: Any, lean: float) -> None:  # pragma: no cover
    """Give the slots that are left, each to the largest key (the first such)."""
    L, E = load_LE.shape
    key = np.empty(E)
    for layer in range(L):
        for e in range(E):
            key[e] = (
                load_LE[layer, e] / (replicas[layer, e] + lean)
                if replicas[layer, e] < high[layer, e]
                else -1.0
            )
        for _ in range(left[layer]):
            pick = 0
            for e in range(1, E):
                if key[e] > key[pick]:
                    pick = e
            replicas[layer, pick] += 1
            grown = replicas[layer, pick]
            key[pick] = load_LE[layer, pick] / (grown + lean) if grown < high[layer, pick] else -1.0


@njit(cache=True)
def difference(expert_LS: Any, weight_LS: Any, G: int, C: int) -> Any:  # pragma: no cover
    """Balanced largest differencing of each layer's sorted pieces, on G equal GPUs of C slots."""
    L = expert_LS.shape[0]
    slots = np.empty((L, G, C), dtype=np.int32)
    part = np.empty((C, G))
    spread = np.empty(C)
    owner = np.empty(C, dtype=np.int64)
    place = np.empty(
        (C, G), dtype=np.int64
    )  # place[group, position in the partial packing]: rank in the group
    merged, was = np.empty(G), np.empty(G, dtype=np.int64)
    order, spare = np.empty(G, dtype=np.int64), np.empty(G, dtype=np.int64)
    for layer in range(L):
        for c in range(C):
            for g in range(G):
                part[c, g] = weight_LS[layer, c * G + g]
                place[c, g] = g
            owner[c] = c
            spread[c] = part[c, 0] - part[c, G - 1]
        for _ in range(C - 1):
            keep = 0
            for c in range(1, C):
                if spread[c] > spread[keep]:
                    keep = c
            gone = 1 if keep == 0 else 0
            for c in range(gone + 1, C):
                if c != keep and spread[c] > spread[gone]:
                    gone = c
            for g in range(G):
                merged[g] = part[keep, g] + part[gone, G - 1 - g]
            rank_down(merged, order, spare)
            for g in range(G):
                part[keep, g] = merged[order[g]]
            for c in range(C):
                if owner[c] == keep or owner[c] == gone:
                    for g in range(G):
                        was[g] = place[c, g]
                    if owner[c] == keep:
                        for g in range(G):
                            place[c, g] = was[order[g]]
                    else:
                        for g in range(G):
                            place[c, g] = was[G - 1 - order[g]]
                        owner[c] = keep
            spread[keep] = part[keep, 0] - part[keep, G - 1]
            spread[gone] = -1.0
        for c in range(C):
            for g in range(G):
                slots[layer, g, c] = expert_LS[layer, c * G + place[c, g]]
    return slots


@njit(cache=True)
def best_swap(
    expert: Any, weight: Any, time: Any, usable: Any, held: Any, inverse: Any, a: int, b: int
) -> Any:
    """The swap between GPUs a and b that comes closest to level: the two slots, -1 if all is barred."""
    level = (time[a] - time[b]) / (inverse[a] + inverse[b])
    at_i, at_j, least = -1, -1, np.inf
    for i in range(usable[a]):
        if held[b, expert[a, i]]:
            continue
        give = weight[a, i] - level
        for j in range(usable[b]):
            miss = abs(give - weight[b, j])
            if miss < least and not held[a, expert[b, j]]:
                at_i, at_j, least = i, j, miss
    return at_i, at_j


@njit(cache=True)
def swap(
    expert: Any, weight: Any, time: Any, held: Any, inverse: Any, a: int, b: int, i: int, j: int
) -> None:
    """Make the swap."""
    out, into = expert[a, i], expert[b, j]
    shift = weight[a, i] - weight[b, j]
    time[a] -= shift * inverse[a]
    time[b] += shift * inverse[b]
    expert[a, i], expert[b, j] = into, out
    weight[a, i], weight[b, j] = weight[b, j], weight[a, i]
    held[a, out] = held[b, into] = False
    held[a, into] = held[b, out] = True
    held[a, -1] = held[b, -1] = False


@njit(cache=True)
def later_of(weight: Any, time: Any, inverse: Any, a: int, b: int, i: int, j: int) -> Any:  # pragma: no cover
    """When the later of the two GPUs would be done after the swap."""
    shift = weight[a, i] - weight[b, j]
    return max(time[a] - shift * inverse[a], time[b] + shift * inverse[b])


@njit(cache=True)
def swap_rounds(
    slots: Any,
    weights: Any,
    times: Any,
    usables: Any,
    inverse: Any,
    goals: Any,
    E: int,
    rounds: int,
    focus: int,
) -> None:  # pragma: no cover
    """Paired rounds, then focused rounds, layer by layer: see `search`."""
    L, G, C = slots.shape
    half = G // 2
    held = np.zeros((G, E + 1), dtype=np.bool_)
    order, spare = np.empty(G, dtype=np.int64), np.empty(G, dtype=np.int64)
    for layer in range(L):
        expert, weight, time, usable = slots[layer], weights[layer], times[layer], usables[layer]
        goal = goals[layer]
        for g in range(G):
            for c in range(C):
                held[g, expert[g, c]] = expert[g, c] >= 0
        stale = 0
        for step in range(rounds):
            if stale >= half or time.max() <= goal:
                break
            rank_down(time, order, spare)
            stale += 1
            for k in range(half):
                a, b = order[k], order[G - 1 - (k + step) % half]
                i, j = best_swap(expert, weight, time, usable, held, inverse, a, b)
                if i >= 0 and later_of(weight, time, inverse, a, b, i, j) < time[a]:
                    swap(expert, weight, time, held, inverse, a, b, i, j)
                    stale = 0
        for _ in range(focus):
            if time.max() <= goal:
                break
            a = time.argmax()
            at_b, at_i, at_j, soonest = -1, -1, -1, time[a]
            for b in range(G):
                i, j = best_swap(expert, weight, time, usable, held, inverse, a, b)
                if i >= 0:
                    later = later_of(weight, time, inverse, a, b, i, j)
                    if later < soonest:
                        at_b, at_i, at_j, soonest = b, i, j, later
            if at_b < 0:
                break
            swap(expert, weight, time, held, inverse, a, at_b, at_i, at_j)
        for g in range(G):
            for c in range(C):
                held[g, expert[g, c]] = False
