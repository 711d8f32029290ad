"""Alias packing: perfect balance for free token shares whenever each GPU has one slot to spare.

Every GPU first gets whole experts, one slot short of full, so that the GPUs come out uneven but none
stands alone. Then the remaining slot does what the second entry of Walker's alias table does: the GPU
furthest below the mean takes what it lacks from the largest expert of the GPU furthest above, and is done.
Each such step finishes one GPU, so G - 1 pieces suffice, and the largest time is the mean exactly. That
needs E <= G (c - 1) experts for c slots per GPU, and a donor with an expert large enough; `alias_pack` says
for each layer whether it got there, and leaves the others to other methods.

The plan is exact and brittle: it has few, long chains of shares, so it suffers most when the loads
turn out different. `moeless_opt.solvers.construct.fractional` uses it as the last resort.

References
----------
A. J. Walker: An efficient method for generating discrete random variables with general distributions
(1977). R. McNaughton: Scheduling with deadlines and loss functions (1959), whose wrap-around rule is the
same argument for pooled slots.
"""

from __future__ import annotations

from collections.abc import Iterator
from heapq import heapify, heappop, heappush, heapreplace
from typing import Any

import numpy as np

from moeless_opt.problems.arrays import FloatArray, SlotArray

__all__ = ["alias_applies", "alias_pack"]


_TINY = 1e-11  # of the mean load: a GPU this close to its target is done


def alias_applies(experts: int, capacity_G: Any) -> bool:
    """Whether alias packing is sure to work on equal GPUs: each keeps a slot free, ``E <= sum(c - 1)``."""
    capacity_G = np.asarray(capacity_G)
    return bool(experts <= int(np.maximum(capacity_G - 1, 0).sum()))


def alias_pack(load_E: FloatArray, capacity_G: Any, speed_G: Any) -> tuple[SlotArray, FloatArray] | None:
    """One layer's placement and shares with every GPU at the mean time.

    Parameters
    ----------
    load_E : array of float, shape [E]
        Tokens.
    capacity_G : array of int, shape [G]
        Slots.
    speed_G : array of float, shape [G]
        Relative speeds.

    Returns
    -------
    tuple of int32 array [GPUs, slots], float array [GPUs, slots], or None
        Placement (-1 last) and shares; None where the argument does not apply or a donor ran out of slots.
    """
    capacity = [int(c) for c in capacity_G]
    speed = [float(s) for s in speed_G]
    # One expert more often works too: the GPU that is levelled last needs no free slot.
    if not 0 < len(load_E) <= sum(max(c - 1, 0) for c in capacity) + 1 or max(capacity) == 0:
        return None
    total = float(load_E.sum())
    for tokens in _whole_experts(load_E, capacity, speed):
        if total <= 0.0 or _level(tokens, capacity, speed, total):
            break
    else:
        return None
    slots_GC = np.full((len(capacity), max(capacity)), -1, dtype=np.int32)
    share_GC = np.zeros(slots_GC.shape)
    sum_E = np.zeros(len(load_E))
    for held in tokens:
        for expert, amount in held.items():
            sum_E[expert] += amount
    for gpu, held in enumerate(tokens):
        for slot, (expert, amount) in enumerate(held.items()):
            slots_GC[gpu, slot] = expert
            share_GC[gpu, slot] = amount / sum_E[expert] if sum_E[expert] > 0.0 else 1.0
    return slots_GC, share_GC


def _whole_experts(
    load_E: FloatArray, capacity: list[int], speed: list[float]
) -> Iterator[list[dict[int, float]]]:
    """Largest expert first to the GPU that would finish first, each GPU kept one slot short of full.

    Where one expert is too many for that, it goes onto each GPU in turn, the fullest first.
    """
    tokens: list[dict[int, float]] = [{} for _ in capacity]
    load = [0.0] * len(capacity)
    order = np.argsort(-load_E, kind="stable").tolist()
    sure = sum(max(c - 1, 0) for c in capacity)
    tokens_E = load_E.tolist()
    # The GPU that would finish first, of those with room: each is in the heap once.
    room = [(0.0, g) for g in range(len(capacity)) if capacity[g] > 1]
    for expert in order[:sure]:
        gpu = room[0][1]
        tokens[gpu][expert] = tokens_E[expert]
        load[gpu] += tokens_E[expert]
        if len(tokens[gpu]) < capacity[gpu] - 1:
            heapreplace(room, (load[gpu] / speed[gpu], gpu))
        else:
            heappop(room)
    if len(order) <= sure:
        yield tokens
        return
    for gpu in sorted(range(len(capacity)), key=lambda g: (-load[g] / speed[g], g)):
        if capacity[gpu]:
            trial = [dict(held) for held in tokens]
            trial[gpu][order[sure]] = float(load_E[order[sure]])
            yield trial


def _level(tokens: list[dict[int, float]], capacity: list[int], speed: list[float], total: float) -> bool:
    """Let the emptiest GPU take what it lacks from the fullest, until all are at the mean."""
    mean = total / sum(speed)
    over = [sum(held.values()) - mean * s for held, s in zip(tokens, speed, strict=True)]
    tiny = _TINY * mean
    poor_first = [(lack, g) for g, lack in enumerate(over)]
    rich_first = [(-more, g) for g, more in enumerate(over) if more > tiny]
    heapify(poor_first)
    heapify(rich_first)
    for _ in range(2 * len(tokens)):
        while over[poor_first[0][1]] != poor_first[0][0]:  # has changed since
            heappop(poor_first)
        lack, poor = -poor_first[0][0], poor_first[0][1]
        if lack <= tiny:
            return True
        if len(tokens[poor]) >= capacity[poor]:
            return False
        donor = _donor(tokens, over, rich_first, poor, lack)
        if donor is None:
            return False
        gpu, expert = donor
        tokens[gpu][expert] -= lack
        tokens[poor][expert] = lack
        over[gpu] -= lack
        over[poor] = 0.0
        heappush(poor_first, (over[gpu], gpu))
        heappush(poor_first, (0.0, poor))
        if over[gpu] > tiny:
            heappush(rich_first, (-over[gpu], gpu))
    return False


def _donor(
    tokens: list[dict[int, float]],
    over: list[float],
    rich_first: list[tuple[float, int]],
    poor: int,
    lack: float,
) -> tuple[int, int] | None:
    """The fullest GPU with an expert of at least `lack` tokens that `poor` does not hold: its largest.

    Leaves the heap with all GPUs above the mean, and perhaps entries of before.
    """
    passed: list[tuple[float, int]] = []
    found = None
    while rich_first and found is None:
        entry = heappop(rich_first)
        gpu = entry[1]
        if over[gpu] != -entry[0]:
            continue
        fitting = [e for e, amount in tokens[gpu].items() if amount >= lack and e not in tokens[poor]]
        if fitting:
            found = gpu, max(fitting, key=lambda e: (tokens[gpu][e], -e))
        else:
            passed.append(entry)
    for entry in passed:
        heappush(rich_first, entry)
    return found
