"""Which GPU each replica goes to, once the replicas are counted.

Equal GPUs: balanced largest differencing. The pieces, sorted, are cut into one group of G per slot; each
group is a partial packing with one piece on every GPU. The two partial packings of largest spread are
merged, fullest against emptiest, until one is left. It leaves a fraction of the gap of LPT and is a handful
of sorts for all layers at once.

Unequal GPUs: LPT, the largest piece first, each to the GPU that would be done with it first.

Neither looks far enough ahead to keep two replicas of an expert apart always. Where they fail, a swap
repairs it, and where no swap does, the layer is packed by room instead: each expert to the GPUs with most
room, which finds a packing whenever there is one (the constructive proof of the Gale-Ryser theorem).

References
----------
W. Michiels, J. Korst, E. Aarts, J. van Leeuwen: Performance ratios of the differencing method applied to the
balanced number partitioning problem (2003), after N. Karmarkar and R. Karp (1982).
R. L. Graham: Bounds on multiprocessing timing anomalies (1969): LPT.
H. J. Ryser: Combinatorial properties of matrices of zeros and ones (1957).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from moeless_opt.problems.arrays import BoolArray, FloatArray, IntArray, SlotArray
from moeless_opt.problems.errors import InfeasibleError
from moeless_opt.problems.plan import slot_sums
from moeless_opt.solvers.pack import fast

__all__ = ["empties_last", "pack"]


def pack(
    load_LE: FloatArray, replicas_LE: Any, capacity_LG: Any, speed_G: Any, *, backend: str = "numpy"
) -> SlotArray:
    """Place the replicas of every layer so that the GPUs finish close together, split equally.

    Parameters
    ----------
    load_LE : array of float, shape [L, E]
        Tokens of each expert.
    replicas_LE : array of int, shape [L, E]
        Replicas of each expert, at least 1.
    capacity_LG : array of int, shape [L, G]
        Slots of each GPU.
    speed_G : array of float, shape [G]
        Relative speeds.
    backend : {"numpy", "numba"}
        Which of the two twins does the work; the result is the same.

    Returns
    -------
    array of int32, shape [L, G, C]
        Expert in each slot, -1 (last) where empty; C is the largest capacity. No GPU holds an expert twice.

    Raises
    ------
    InfeasibleError
        Where no packing exists: more replicas than slots, or more of one expert than GPUs with room.
    """
    load_LE = np.ascontiguousarray(load_LE, dtype=np.float64)
    replicas = np.asarray(replicas_LE, dtype=np.int64)
    capacity = np.asarray(capacity_LG, dtype=np.int64)
    speed = np.asarray(speed_G, dtype=np.float64)
    piece = load_LE / replicas
    excess = replicas.sum(axis=1) - capacity.sum(axis=1)
    if (excess > 0).any():
        layer = int(excess.argmax())
        raise InfeasibleError(f"layer {layer}: {int(excess[layer])} replicas more than the GPUs have slots")
    slots = _start(piece, replicas, capacity, speed, backend)
    rows = _faulty(slots, replicas)
    if len(rows):
        slots[rows] = _mend(slots[rows], piece[rows], replicas[rows], capacity[rows], speed, rows)
    return empties_last(slots)


def _start(
    piece_LE: FloatArray, replicas: IntArray, capacity: IntArray, speed: FloatArray, backend: str
) -> SlotArray:
    """A first packing: differencing for the layers of equal GPUs, LPT for the others."""
    L, G = capacity.shape
    size_L = capacity[:, 0]
    equal_L = (capacity == size_L[:, None]).all(axis=1) & bool((speed == speed[0]).all())
    C = int(capacity.max(initial=1))
    slots = np.full((L, G, C), -1, dtype=np.int32)
    for size in np.unique(size_L[equal_L]):
        rows = np.flatnonzero(equal_L & (size_L == size))
        piece, counts = (piece_LE, replicas) if len(rows) == L else (piece_LE[rows], replicas[rows])
        if backend == "numba":  # which swaps apart as well
            packed = fast.pack_layers(piece, counts, _by_piece(piece), 1.0 / speed, int(size))
        else:
            packed = _difference(*_sequence(piece, counts, G * int(size)), G, int(size))
        if len(rows) == L:
            return packed
        slots[rows, :, :size] = packed
    rows = np.flatnonzero(~equal_L)
    if len(rows):
        slots[rows] = _lpt(piece_LE[rows], replicas[rows], capacity[rows], speed, C)
    return slots


def _by_piece(piece_LE: FloatArray) -> IntArray:
    """Each layer's experts, largest piece first, then by index."""
    falling = -piece_LE
    order = np.argsort(falling, axis=1)  # several times quicker than a stable sort; without ties the same
    ordered = np.take_along_axis(falling, order, axis=1)
    tied = (ordered[:, 1:] == ordered[:, :-1]).any(axis=1)
    if tied.any():
        order[tied] = np.argsort(falling[tied], axis=1, kind="stable")
    return order


def _sequence(piece_LE: FloatArray, replicas_LE: IntArray, length: int) -> tuple[IntArray, FloatArray]:
    """Each layer's replicas, largest piece first (then lowest expert), filled up with -1 to `length`."""
    L, E = piece_LE.shape
    order = np.empty((L, E + 1), dtype=np.int64)
    order[:, :E] = _by_piece(piece_LE)
    order[:, E] = -1
    counts = np.empty((L, E + 1), dtype=np.int64)
    counts[:, :E] = np.take_along_axis(replicas_LE, order[:, :E], axis=1)
    counts[:, E] = length - counts[:, :E].sum(axis=1)
    expert_LS = np.repeat(order.ravel(), counts.ravel()).reshape(L, length)
    padded = np.zeros((L, E + 1))
    padded[:, :E] = piece_LE
    return expert_LS, padded[np.arange(L)[:, None], expert_LS]


def _difference(expert_LS: IntArray, weight_LS: FloatArray, G: int, C: int) -> SlotArray:
    """Balanced largest differencing of sorted pieces, on G equal GPUs of C slots."""
    L = len(expert_LS)
    rows = np.arange(L)
    expert_LCG = expert_LS.reshape(L, C, G)
    part_LCG = weight_LS.reshape(L, C, G)  # partial packings, each sorted: fullest GPU first
    owner_LC = np.tile(np.arange(C), (L, 1))  # the partial packing that a group is in
    spread_LC = part_LCG[:, :, 0] - part_LCG[:, :, -1]
    for _ in range(C - 1):
        keep = spread_LC.argmax(axis=1)
        spread = spread_LC.copy()
        spread[rows, keep] = -1.0
        gone = spread.argmax(axis=1)
        merged = part_LCG[rows, keep] + part_LCG[rows, gone, ::-1]
        by_load = np.argsort(-merged, axis=1, kind="stable")
        index = np.broadcast_to(np.arange(G), (L, C, G)).copy()
        np.copyto(index, by_load[:, None, :], where=(owner_LC == keep[:, None])[:, :, None])
        np.copyto(index, G - 1 - by_load[:, None, :], where=(owner_LC == gone[:, None])[:, :, None])
        expert_LCG = np.take_along_axis(expert_LCG, index, axis=2)
        owner_LC = np.where(owner_LC == gone[:, None], keep[:, None], owner_LC)
        merged = np.take_along_axis(merged, by_load, axis=1)
        part_LCG[rows, keep] = merged
        spread_LC[rows, keep] = merged[:, 0] - merged[:, -1]
        spread_LC[rows, gone] = -1.0
    return np.ascontiguousarray(expert_LCG.transpose(0, 2, 1), dtype=np.int32)


def _lpt(
    piece_LE: FloatArray, replicas_LE: IntArray, capacity_LG: IntArray, speed_G: FloatArray, C: int
) -> SlotArray:
    """Largest piece first, to the GPU done with it first among those with room and without that expert.

    A replica that finds no GPU is left out, for the repair.
    """
    L, E = piece_LE.shape
    G = capacity_LG.shape[1]
    rows = np.arange(L)
    expert_LS, weight_LS = _sequence(piece_LE, replicas_LE, int(replicas_LE.sum(axis=1).max(initial=0)))
    slots = np.full((L, G, C), -1, dtype=np.int32)
    used_LG = np.zeros((L, G), dtype=np.int64)
    time_LG = np.zeros((L, G))
    held = np.zeros((L, E + 1, G), dtype=bool)
    for rank in range(expert_LS.shape[1]):
        expert, weight = expert_LS[:, rank], weight_LS[:, rank]
        finish = time_LG + weight[:, None] / speed_G
        finish[held[rows, expert] | (used_LG >= capacity_LG)] = np.inf
        gpu = finish.argmin(axis=1)
        put = np.flatnonzero((finish[rows, gpu] < np.inf) & (expert >= 0))
        gpu, expert = gpu[put], expert[put]
        slots[put, gpu, used_LG[put, gpu]] = expert
        time_LG[put, gpu] = finish[put, gpu]
        used_LG[put, gpu] += 1
        held[put, expert, gpu] = True
    return slots


def _faulty(slots_LGC: SlotArray, replicas_LE: IntArray) -> IntArray:
    """Layers with an expert twice on a GPU, or with a replica left out."""
    ordered = np.sort(slots_LGC, axis=2)
    twice = ((ordered[:, :, 1:] == ordered[:, :, :-1]) & (ordered[:, :, 1:] >= 0)).any(axis=(1, 2))
    missing = (slots_LGC >= 0).sum(axis=(1, 2)) < replicas_LE.sum(axis=1)
    return np.flatnonzero(twice | missing)


def _mend(
    slots_LGC: SlotArray,
    piece_LE: FloatArray,
    replicas_LE: IntArray,
    capacity_LG: IntArray,
    speed_G: FloatArray,
    layers: IntArray,
) -> SlotArray:
    """Layers without duplicates and complete: by swaps, or packed anew by room."""
    stuck = _swap_apart(slots_LGC, piece_LE, capacity_LG, speed_G)
    stuck |= (slots_LGC >= 0).sum(axis=(1, 2)) < replicas_LE.sum(axis=1)
    C = slots_LGC.shape[2]
    for i in np.flatnonzero(stuck):
        slots_LGC[i] = _by_room(piece_LE[i], replicas_LE[i], capacity_LG[i], speed_G, C, int(layers[i]))
    return slots_LGC


def _swap_apart(
    slots_LGC: SlotArray, piece_LE: FloatArray, capacity_LG: IntArray, speed_G: FloatArray
) -> BoolArray:
    """Swap every second replica of an expert on a GPU away, one in every layer at a time, in place.

    Each goes where the two GPUs' later finish is earliest (first such slot). Returns where a layer got stuck.
    """
    L, _, C = slots_LGC.shape
    padded_LE = np.hstack([piece_LE, np.zeros((L, 1))])  # the last for the empty slots, index -1
    inverse_G = 1.0 / speed_G
    beyond = np.arange(C) >= capacity_LG[:, :, None]
    earlier = np.tri(C, k=-1, dtype=bool)
    stuck = np.zeros(L, dtype=bool)
    rows = np.arange(L)
    while len(rows):
        held = slots_LGC[rows]
        twice = ((held[:, :, :, None] == held[:, :, None, :]) & earlier).any(axis=3) & (held >= 0)
        twice = twice.reshape(len(rows), twice.shape[1] * C)
        faulty = twice.any(axis=1)
        rows, held, twice = rows[faulty], held[faulty], twice[faulty]
        each = np.arange(len(rows))
        gpu, slot = np.divmod(twice.argmax(axis=1), C)
        expert = held[each, gpu, slot]
        weight = padded_LE[rows[:, None, None], held]
        load = slot_sums(weight)
        change = padded_LE[rows, expert][:, None, None] - weight
        there = (load[:, :, None] + change) * inverse_G[:, None]
        here = (load[each, gpu][:, None, None] - change) * inverse_G[gpu][:, None, None]
        after = np.maximum(there, here)
        after[(held == expert[:, None, None]).any(axis=2)] = np.inf
        known = (held[:, :, :, None] == held[each, gpu][:, None, None, :]).any(axis=3) & (held >= 0)
        after[known | beyond[rows]] = np.inf
        best = after.reshape(len(rows), after.shape[1] * C).argmin(axis=1)
        to, at = np.divmod(best, C)
        swap = np.flatnonzero(after[each, to, at] < np.inf)
        slots_LGC[rows[swap], gpu[swap], slot[swap]] = held[swap, to[swap], at[swap]]
        slots_LGC[rows[swap], to[swap], at[swap]] = expert[swap]
        stuck[np.delete(rows, swap)] = True
        rows = rows[swap]
    return stuck


def _by_room(
    piece_E: FloatArray, replicas_E: IntArray, capacity_G: IntArray, speed_G: FloatArray, C: int, layer: int
) -> SlotArray:
    """Each expert, largest piece first, to the GPUs with most room (then least time, then lowest index)."""
    G = len(capacity_G)
    slots = np.full((G, C), -1, dtype=np.int32)
    used = np.zeros(G, dtype=np.int64)
    time = np.zeros(G)
    for expert in np.argsort(-piece_E, kind="stable"):
        count = int(replicas_E[expert])
        gpus = np.lexsort((time, used - capacity_G))[:count]
        if len(gpus) < count or (used[gpus] >= capacity_G[gpus]).any():
            raise InfeasibleError(
                f"layer {layer}: no placement keeps the replicas of an expert on different GPUs; "
                f"the {count} replicas of expert {int(expert)} find no {count} GPUs with room"
            )
        slots[gpus, used[gpus]] = expert
        used[gpus] += 1
        time[gpus] += piece_E[expert] / speed_G[gpus]
    return slots


def empties_last(slots_LGC: SlotArray) -> SlotArray:
    """Move the empty slots of every GPU behind the others, which keep their order."""
    empty = slots_LGC < 0
    if not (empty[:, :, :-1] & ~empty[:, :, 1:]).any():
        return slots_LGC
    return np.take_along_axis(slots_LGC, np.argsort(empty, axis=2, kind="stable"), axis=2)
