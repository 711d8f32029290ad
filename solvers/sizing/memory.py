"""Bytes that all layers share: who gets how many slots on which GPU.

`budget` spends bytes as if they could go anywhere. Here each GPU's bytes are whole slots of layers of
different size. `slots_for_one_each` finds slots for one replica of each expert wherever there is a way: first
fit, the largest replicas first, and a proof by whole numbers where that gets stuck. `share_slots` then gives
the bytes left to layers, moves slots between GPUs and takes them from one layer for another, each step the
one that saves most time, until none does. Placements of changed layers are built anew, all in one call.

Where layers are few and small, the slots of all layers are then chosen at once (`_chosen`): a dynamic
programme over the bytes used, with lower bounds for the times that are not known, which are built only for
slots that the programme chooses, until it chooses slots whose times are all known.

Axes: L layers, E experts, G GPUs, C slots of a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from moeless_opt.problems.arrays import FloatArray, IntArray, SlotArray
from moeless_opt.problems.errors import InfeasibleError
from moeless_opt.solvers.core import LinearModel, Stop, solve_linear

__all__ = ["Build", "SizeBound", "share_slots", "slots_for_one_each"]

Build = Callable[[FloatArray, IntArray], tuple[SlotArray, FloatArray]]
"""Loads [L, E] and slots [L, G] to a placement [L, G, C] and its largest times [L]."""

SizeBound = Callable[[FloatArray, IntArray], FloatArray]
"""Loads [L, E] and slots [L, G] to times [L] that none can beat."""

_WORK = 400_000  # layers x experts x GPUs that are built at most
_BATCH = 2_000  # of them looked at in one step
_GAIN = 1e-9
_WAYS = 1_000  # slots that one layer may have, up to which all are looked at
_WAYS_TOGETHER = 1_000_000  # times those of the layers before it


def slots_for_one_each(size_L: IntArray, memory_G: IntArray, experts: int, stop: Stop) -> IntArray:
    """Return slots [L, G], `experts` of every layer, that keep to each GPU's bytes.

    Raises
    ------
    InfeasibleError
        There are none; or none were found before `stop`.
    """
    short = experts * int(size_L.sum()) - int(memory_G.sum())
    if short > 0:
        raise InfeasibleError(
            f"memory: one replica of every expert needs {short} bytes more than the GPUs have"
        )
    count_LG = np.zeros((len(size_L), len(memory_G)), dtype=np.int64)
    left_G = memory_G.astype(np.int64).copy()
    for layer in np.argsort(-size_L, kind="stable"):
        for _ in range(experts):
            gpu = int(np.where(count_LG[layer] < experts, left_G, -1).argmax())
            if left_G[gpu] < size_L[layer]:
                return _proven(size_L, memory_G, experts, stop)
            count_LG[layer, gpu] += 1
            left_G[gpu] -= size_L[layer]
    return count_LG


def _proven(size_L: IntArray, memory_G: IntArray, experts: int, stop: Stop) -> IntArray:
    """The same by a programme in whole numbers."""
    layers, gpus = len(size_L), len(memory_G)
    unit = int(np.gcd.reduce(size_L))
    model = LinearModel()
    for _ in range(layers * gpus):
        model.variable(0, experts, whole=True)
    for layer in range(layers):
        model.row([(layer * gpus + gpu, 1.0) for gpu in range(gpus)], experts, experts)
    for gpu in range(gpus):
        terms = [(layer * gpus + gpu, float(size_L[layer] // unit)) for layer in range(layers)]
        model.row(terms, 0, float(memory_G[gpu] // unit))
    answer = solve_linear(model, stop=stop)
    if answer.value_V is None:
        proven = "fit in no way" if answer.status == "infeasible" else "were not fitted in time"
        raise InfeasibleError(
            f"memory: one replica of every expert needs {experts * int(size_L.sum())} of the GPUs' "
            f"{int(memory_G.sum())} bytes, but they {proven}: what is left of each GPU is too small"
        )
    return np.asarray(np.rint(answer.value_V), dtype=np.int64).reshape(layers, gpus)


@dataclass(slots=True)
class _Layers:
    """What is known of layers by their slots: placements and times are built once."""

    load_LE: FloatArray
    build: Build
    work: int = 0
    known: dict[tuple[int, bytes], tuple[SlotArray, float]] = field(default_factory=dict)

    def times(self, wanted: list[tuple[int, IntArray]]) -> FloatArray:
        """Largest times of layers with such slots."""
        keys = [(layer, slots_G.tobytes()) for layer, slots_G in wanted]
        fresh = {key: i for i, key in enumerate(keys) if key not in self.known}
        if fresh:
            rows = list(fresh.values())
            slots_LG = np.array([wanted[i][1] for i in rows])
            placed, time = self.build(self.load_LE[[wanted[i][0] for i in rows]], slots_LG)
            for key, one, value in zip(fresh, placed, time, strict=True):
                self.known[key] = one, float(value)
            self.work += len(rows) * self.load_LE.shape[1] * slots_LG.shape[1]
        return np.array([self.known[key][1] for key in keys])

    def placement(self, slots_LG: IntArray) -> SlotArray:
        """The placement of all layers with such slots."""
        self.times(list(enumerate(slots_LG)))
        parts = [self.known[layer, slots_G.tobytes()][0] for layer, slots_G in enumerate(slots_LG)]
        width = max(1, *(int((part >= 0).sum(axis=1).max()) for part in parts))
        result = np.full((*slots_LG.shape, width), -1, dtype=np.int32)
        for layer, part in enumerate(parts):
            result[layer, :, : min(width, part.shape[1])] = part[:, :width]
        return result


def share_slots(
    load_LE: FloatArray,
    floor_L: FloatArray,
    size_L: IntArray,
    memory_G: IntArray,
    starts: list[IntArray],
    build: Build,
    bound: SizeBound,
    stop: Stop,
) -> SlotArray:
    """Improve slots step by step, from each start, and return the best placement.

    Parameters
    ----------
    load_LE : array of float, shape [L, E]
        Tokens.
    floor_L : array of float, shape [L]
        Times that no layer can beat: one that is there asks for nothing.
    size_L, memory_G : array of int
        Bytes of a replica of each layer, and of each GPU.
    starts : list of array of int, shape [L, G]
        Slots within the bytes.
    build : Build
        Places layers.
    bound : SizeBound
        Times that no placement beats.
    stop : Stop
        Asked before every step.

    Returns
    -------
    array of int32, shape [L, G, C]
        Placement.
    """
    layers = _Layers(load_LE, build)
    best: tuple[float, IntArray] | None = None
    for number, start in enumerate(starts):
        if best is not None and (layers.work >= _WORK or stop()):
            break
        slots_LG = start.copy()
        time_L = layers.times(list(enumerate(slots_LG)))
        limit = _WORK * (number + 1) // len(starts)
        while layers.work < limit and not stop():
            step = _best_step(layers, slots_LG, time_L, floor_L, size_L, memory_G)
            if step is None:
                break
            for layer, row in step:
                slots_LG[layer] = row
            time_L = layers.times(list(enumerate(slots_LG)))
        if best is None or time_L.sum() < best[0] * (1.0 - _GAIN):
            best = float(time_L.sum()), slots_LG
    assert best is not None
    return layers.placement(_chosen(layers, best[1], size_L, memory_G, bound, stop))


def _chosen(
    layers: _Layers, slots_LG: IntArray, size_L: IntArray, memory_G: IntArray, bound: SizeBound, stop: Stop
) -> IntArray:
    """The best slots of all layers, where they can be looked at; else what is given."""
    experts, gpus, count = layers.load_LE.shape[1], len(memory_G), len(size_L)
    ways = (experts + 1) ** gpus
    if ways > _WAYS:
        return slots_LG
    every_VG = np.stack(np.unravel_index(np.arange(ways), (experts + 1,) * gpus), axis=1)
    every_VG = every_VG[every_VG.sum(axis=1) >= experts]
    floor_LV = bound(np.repeat(layers.load_LE, len(every_VG), axis=0), np.tile(every_VG, (count, 1)))
    floor_LV = floor_LV.reshape(count, -1)
    number = {row.tobytes(): v for v, row in enumerate(every_VG)}
    known_LV = np.zeros(floor_LV.shape, dtype=np.bool_)
    for (layer, slots), (_, time) in layers.known.items():
        floor_LV[layer, number[slots]], known_LV[layer, number[slots]] = time, True
    limit = float(layers.times(list(enumerate(slots_LG))).sum()) * (1.0 - _GAIN)
    least_L = floor_LV.min(axis=1)
    while not stop():
        # What cannot be part of anything better is left out.
        use_LV = floor_LV - least_L[:, None] + least_L.sum() < limit
        rows = [np.flatnonzero(use_V) for use_V in use_LV]
        choice = _cheapest(
            [floor_LV[i, v] for i, v in enumerate(rows)], [every_VG[v] for v in rows], size_L, memory_G
        )
        if choice is None:
            return slots_LG
        chosen_L = np.array([v[k] for v, k in zip(rows, choice, strict=True)])
        all_L = np.arange(count)
        if floor_LV[all_L, chosen_L].sum() >= limit:
            return slots_LG
        new = [i for i in range(count) if not known_LV[i, chosen_L[i]]]
        if not new:
            return np.asarray(every_VG[chosen_L])
        time_N = layers.times([(i, every_VG[chosen_L[i]]) for i in new])
        floor_LV[new, chosen_L[new]], known_LV[new, chosen_L[new]] = time_N, True
    return slots_LG


def _cheapest(
    time_LV: list[FloatArray], slots_LVG: list[IntArray], size_L: IntArray, memory_G: IntArray
) -> list[int] | None:
    """For every layer which slots to have, for the least sum of times in the bytes; None: too many ways."""
    used_NG, total_N = np.zeros((1, len(memory_G)), dtype=np.int64), np.zeros(1)
    back: list[tuple[IntArray, IntArray]] = []
    for time_V, slots_VG, size in zip(time_LV, slots_LVG, size_L, strict=True):
        if not len(time_V) or len(used_NG) * len(time_V) > _WAYS_TOGETHER:
            return None
        after_NVG = used_NG[:, None, :] + int(size) * slots_VG
        n, v = np.nonzero((after_NVG <= memory_G).all(axis=2))
        if not len(n):
            return None
        used, total = after_NVG[n, v], total_N[n] + time_V[v]
        # Of ways that use the same bytes the quickest is kept.
        order = np.lexsort((v, n, total, *used.T))
        used = used[order]
        first = np.flatnonzero(np.r_[True, (used[1:] != used[:-1]).any(axis=1)])
        keep = order[first]
        used_NG, total_N = used[first], total[keep]
        back.append((n[keep], v[keep]))
    at = int(total_N.argmin())
    choice = []
    for n, v in reversed(back):
        choice.append(int(v[at]))
        at = int(n[at])
    return choice[::-1]


_Step = list[tuple[int, IntArray]]


def _best_step(
    layers: _Layers,
    slots_LG: IntArray,
    time_L: FloatArray,
    floor_L: FloatArray,
    size_L: IntArray,
    memory_G: IntArray,
) -> _Step | None:
    """The change of one or two layers' slots that saves most time; None if none saves any."""
    steps = _steps(slots_LG, time_L, floor_L, size_L, memory_G, layers.load_LE.shape[1])
    if not steps:
        return None
    flat = [change for step in steps for change in step]
    after = layers.times(flat)
    saved: FloatArray = time_L[[layer for layer, _ in flat]] - after
    ends = np.cumsum([len(step) for step in steps])
    saved_S = np.add.reduceat(saved, np.concatenate([[0], ends[:-1]]))
    pick = int(saved_S.argmax())
    return steps[pick] if saved_S[pick] > _GAIN * time_L.sum() else None


def _steps(
    slots_LG: IntArray,
    time_L: FloatArray,
    floor_L: FloatArray,
    size_L: IntArray,
    memory_G: IntArray,
    experts: int,
) -> list[_Step]:
    """Slots for the layers farthest from their floor: free ones, other layers', and moves between GPUs."""
    gpus = len(memory_G)
    left_G = memory_G - size_L @ slots_LG
    total_L = slots_LG.sum(axis=1)
    each = max(1, _BATCH * 50 // (experts * gpus))
    steps: list[_Step] = []
    for layer in np.argsort(floor_L - time_L, kind="stable"):
        if time_L[layer] <= floor_L[layer] * (1.0 + _GAIN) or len(steps) >= each:
            break
        size = int(size_L[layer])
        row = slots_LG[layer]
        room_G = row < experts
        free = np.flatnonzero(room_G & (left_G >= size))
        gained = [_added(row, gpu) for gpu in free]
        gained += [
            _added(one, gpu) for one, first in zip(gained, free, strict=True) for gpu in free[free > first]
        ]
        steps += [[(int(layer), one)] for one in gained]
        for gpu in np.flatnonzero(room_G):
            steps += [
                [(int(layer), _added(row, gpu, source))]
                for source in np.flatnonzero(row > 0)
                if source != gpu and left_G[gpu] >= size
            ]
            for other in np.flatnonzero(size_L > 0):
                lack = -(-(size - int(left_G[gpu])) // int(size_L[other]))
                if other == layer or lack < 1 or lack > slots_LG[other, gpu]:
                    continue
                given = slots_LG[other].copy()
                given[gpu] -= lack
                if total_L[other] - lack >= experts:
                    steps.append([(int(layer), _added(row, gpu)), (int(other), given)])
                # The other layer gets as many elsewhere: this layer's bytes there, or free ones.
                for source in np.flatnonzero((np.arange(gpus) != gpu) & (row > 0)):
                    if given[source] + lack <= experts and left_G[source] + size >= lack * size_L[other]:
                        moved = given.copy()
                        moved[source] += lack
                        steps.append([(int(layer), _added(row, gpu, source)), (int(other), moved)])
    return steps


def _added(row_G: IntArray, gpu: int | np.integer, source: int | np.integer | None = None) -> IntArray:
    """One slot more on a GPU, or one moved there."""
    result = row_G.copy()
    result[gpu] += 1
    if source is not None:
        result[source] -= 1
    return result
