"""The compiled kernels of `fast`; importing this module imports Numba."""

# mypy: disable-error-code="untyped-decorator"

from __future__ import annotations

from typing import Any, NamedTuple

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


class Pieces(NamedTuple):
    """What is to be packed on equal GPUs."""

    piece_LE: Any  # tokens of a replica
    replicas_LE: Any
    by_piece_LE: Any  # experts, largest piece first
    inverse_G: Any  # 1 / speed


class Line(NamedTuple):
    """Room for the work on one layer."""

    expert_S: Any  # the replicas, largest piece first, -1 behind them
    weight_S: Any
    part_CG: Any  # partial packings, each sorted: fullest GPU first
    place_CG: Any  # rank in its group of the piece at a position in the partial packing
    owner_C: Any  # the partial packing that a group is in
    spread_C: Any
    merged_G: Any
    was_G: Any
    order_G: Any
    spare_G: Any
    load_G: Any


@njit(cache=True)
def pack_layers(pieces: Pieces, slots_LGC: Any) -> None:  # pragma: no cover
    """Sorted, differenced, and swapped apart where an expert is twice on a GPU: see `packing`."""
    L, G, C = slots_LGC.shape
    line = Line(
        np.empty(G * C, dtype=np.int64),
        np.empty(G * C),
        np.empty((C, G)),
        np.empty((C, G), dtype=np.int64),
        np.empty(C, dtype=np.int64),
        np.empty(C),
        np.empty(G),
        np.empty(G, dtype=np.int64),
        np.empty(G, dtype=np.int64),
        np.empty(G, dtype=np.int64),
        np.empty(G),
    )
    for layer in range(L):
        line_up(pieces, layer, line)
        difference(line, slots_LGC[layer])
        swap_apart(pieces.piece_LE[layer], pieces.inverse_G, slots_LGC[layer], line.load_G)


@njit(cache=True)
def line_up(pieces: Pieces, layer: int, line: Line) -> None:  # pragma: no cover
    """The replicas of a layer, largest piece first."""
    piece, replicas = pieces.piece_LE[layer], pieces.replicas_LE[layer]
    at = 0
    for e in pieces.by_piece_LE[layer]:
        for _ in range(replicas[e]):
            line.expert_S[at], line.weight_S[at] = e, piece[e]
            at += 1
    line.expert_S[at:] = -1
    line.weight_S[at:] = 0.0


@njit(cache=True)
def difference(line: Line, slots_GC: Any) -> None:  # pragma: no cover
    """Balanced largest differencing of a layer's sorted pieces, on G equal GPUs of C slots."""
    G, C = slots_GC.shape
    part, place, owner, spread = line.part_CG, line.place_CG, line.owner_C, line.spread_C
    merged, was, order = line.merged_G, line.was_G, line.order_G
    for c in range(C):
        for g in range(G):
            part[c, g] = line.weight_S[c * G + g]
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
        rank_down(merged, order, line.spare_G)
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
            slots_GC[g, c] = line.expert_S[c * G + place[c, g]]


@njit(cache=True)
def holds(slots_C: Any, expert: int) -> Any:  # pragma: no cover
    """Whether a GPU holds an expert."""
    for other in slots_C:  # noqa: SIM110
        if other == expert:
            return True
    return False


@njit(cache=True)
def swap_apart(piece_E: Any, inverse_G: Any, slots_GC: Any, load_G: Any) -> None:  # pragma: no cover
    """Swap every second replica of an expert on a GPU away, where a swap can: see `packing._swap_apart`."""
    G, C = slots_GC.shape
    start = 0  # GPUs before this one hold no expert twice, and get none
    while True:
        gpu, slot = -1, -1
        for g in range(start, G):
            for c in range(1, C):
                if slots_GC[g, c] >= 0 and holds(slots_GC[g, :c], slots_GC[g, c]):
                    gpu, slot = g, c
                    break
            if gpu >= 0:
                break
        if gpu < 0:
            return
        start = gpu
        for g in range(G):
            total = 0.0
            for c in range(C):
                e = slots_GC[g, c]
                weight = piece_E[e] if e >= 0 else 0.0
                total = weight if c == 0 else total + weight
            load_G[g] = total
        expert = slots_GC[gpu, slot]
        to, at, least = -1, -1, np.inf
        for g in range(G):
            if holds(slots_GC[g], expert):
                continue
            for c in range(C):
                e = slots_GC[g, c]
                change = piece_E[expert] - (piece_E[e] if e >= 0 else 0.0)
                after = max((load_G[g] + change) * inverse_G[g], (load_G[gpu] - change) * inverse_G[gpu])
                if after < least and not (e >= 0 and holds(slots_GC[gpu], e)):
                    to, at, least = g, c, after
        if to < 0:
            return
        slots_GC[gpu, slot], slots_GC[to, at] = slots_GC[to, at], expert


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


class Swaps(NamedTuple):
    """Placements that are swapped in place, and how long."""

    slots_LGC: Any
    weight_LGC: Any
    time_LG: Any
    usable_LG: Any
    inverse_G: Any  # 1 / speed
    goal_L: Any
    near_L: Any  # times up to which the short pass is tried
    held_GE: Any  # all false; the last column is for empty slots
    first: int  # paired rounds of the short pass
    first_focus: int  # and its focused rounds
    rounds: int  # paired rounds of the long one; no more than of the short one: that is left out
    focus: int  # focused rounds of the long one


@njit(cache=True)
def swap_rounds(swaps: Swaps) -> None:  # pragma: no cover
    """A short pass over every layer, the long one where that is not enough: see `swaps`."""
    L, G, C = swaps.slots_LGC.shape
    held = swaps.held_GE
    order, spare = np.empty(G, dtype=np.int64), np.empty(G, dtype=np.int64)
    spare_GC, spare_weight_GC = np.empty((G, C), dtype=np.int32), np.empty((G, C))
    spare_time = np.empty(G)
    for layer in range(L):
        expert, weight, time = swaps.slots_LGC[layer], swaps.weight_LGC[layer], swaps.time_LG[layer]
        if time.max() <= swaps.goal_L[layer]:
            continue
        short = swaps.first < swaps.rounds and time.max() <= swaps.near_L[layer]
        if short:
            copy_layer(expert, weight, time, spare_GC, spare_weight_GC, spare_time)
            mark(expert, held, True)
            swap_pass(swaps, layer, swaps.first, min(swaps.focus, swaps.first_focus), order, spare)
            mark(expert, held, False)
            if time.max() <= swaps.goal_L[layer]:
                continue
            exchange(expert, weight, time, spare_GC, spare_weight_GC, spare_time)
        mark(expert, held, True)
        swap_pass(swaps, layer, swaps.rounds, swaps.focus, order, spare)
        mark(expert, held, False)
        if short and spare_time.max() < time.max():
            copy_layer(spare_GC, spare_weight_GC, spare_time, expert, weight, time)


@njit(cache=True)
def mark(expert: Any, held: Any, yes: bool) -> None:  # pragma: no cover
    """Note who holds what, or forget it."""
    for g in range(expert.shape[0]):
        for e in expert[g]:
            held[g, e] = yes and e >= 0


@njit(cache=True)
def copy_layer(
    expert: Any, weight: Any, time: Any, to_expert: Any, to_weight: Any, to_time: Any
) -> None:  # pragma: no cover
    """Copy a layer."""
    to_expert[:] = expert
    to_weight[:] = weight
    to_time[:] = time


@njit(cache=True)
def exchange(
    expert: Any, weight: Any, time: Any, to_expert: Any, to_weight: Any, to_time: Any
) -> None:  # pragma: no cover
    """Exchange two layers."""
    for g in range(expert.shape[0]):
        time[g], to_time[g] = to_time[g], time[g]
        for c in range(expert.shape[1]):
            expert[g, c], to_expert[g, c] = to_expert[g, c], expert[g, c]
            weight[g, c], to_weight[g, c] = to_weight[g, c], weight[g, c]


@njit(cache=True)
def swap_pass(
    swaps: Swaps, layer: int, rounds: int, focus: int, order: Any, spare: Any
) -> None:  # pragma: no cover
    """Paired rounds, then focused rounds, on one layer."""
    G = swaps.slots_LGC.shape[1]
    half = G // 2
    inverse, held = swaps.inverse_G, swaps.held_GE
    expert, weight = swaps.slots_LGC[layer], swaps.weight_LGC[layer]
    time, usable, goal = swaps.time_LG[layer], swaps.usable_LG[layer], swaps.goal_L[layer]
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
            # No swap ends before both end together; the hair is more than rounding.
            together = (time[a] * inverse[b] + time[b] * inverse[a]) / (inverse[a] + inverse[b])
            if together > soonest * (1.0 + 1e-12):
                continue
            i, j = best_swap(expert, weight, time, usable, held, inverse, a, b)
            if i >= 0:
                later = later_of(weight, time, inverse, a, b, i, j)
                if later < soonest:
                    at_b, at_i, at_j, soonest = b, i, j, later
        if at_b < 0:
            break
        swap(expert, weight, time, held, inverse, a, at_b, at_i, at_j)
