"""The equal-split construction: count the replicas, pack them, swap, and count again where that isn't enough.

Every layer gets greedy counts, balanced differencing and rounds of swaps; that ends within a thousandth of
the mean for 64 experts and more. Layers that stay far above their bound, small ones mostly, go on: those
with two slots per GPU are solved by folding, usually to proven optimality, and for the others the replica
counts are searched. The best of what was found is returned. Nothing is drawn at random.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from moeless_opt.problems.arrays import FloatArray, IntArray, SlotArray
from moeless_opt.problems.errors import ProblemError
from moeless_opt.problems.plan import best_bound, even_times
from moeless_opt.solvers.construct.groups import pack_groups, pack_whole
from moeless_opt.solvers.core import FirstOf, MaxTime, Stop
from moeless_opt.solvers.pack import (
    apportion,
    best_counts,
    fast,
    fold,
    improve,
    largest_piece,
    pack,
    quick_fold,
    resize,
    solve_patterns,
    trim,
)

__all__ = ["EFFORTS", "Effort", "construct_equal"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Effort:
    """How long to search.

    Attributes
    ----------
    target : float
        A layer is done when its slowest GPU's time is at most this many times its lower bound.
    rounds, focus : int
        Rounds of swaps, see `search.improve`.
    suspect : float
        Layers above this many times their bound after the swaps have their replica counts searched.
    worst : int
        So many of the worst layers have them searched, too, unless they are near the target.
    pairs : int
        Experts x GPUs up to which they do; beyond, it would take longer than all else.
    steps, width : int
        Steps of that search, and counts tried in each, see `resizing.resize`.
    ways : int
        Most replica counts that are enumerated for a layer of two slots per GPU, see `two_slots.best_counts`.
    tiny : int
        Experts x GPUs up to which a layer is solved to optimality, see `exact_patterns`: a few milliseconds.
    full : int
        Changes of a layer whose slots must all be full, see `full.best_full`.
    """

    target: float
    rounds: int
    focus: int
    suspect: float
    worst: int
    pairs: int
    steps: int
    width: int
    ways: int
    tiny: int
    full: int


_TINY_SECONDS = 30.0  # never reached at this size: the result does not depend on the clock
_SCARCE_GAP = 1e-3  # above the bound, where few slots are spare: groups of GPUs may do better
_NEAR = 1e-4  # above the target, where other counts are not worth their search

EFFORTS = {
    "quick": Effort(
        target=1.001,
        rounds=8,
        focus=24,
        suspect=np.inf,
        worst=0,
        pairs=0,
        steps=0,
        width=0,
        ways=0,
        tiny=0,
        full=8,
    ),
    "normal": Effort(
        target=1.00035,
        rounds=24,
        focus=64,
        suspect=1.005,
        worst=2,
        pairs=10_000,
        steps=8,
        width=32,
        ways=20_000,
        tiny=40,
        full=48,
    ),
    "thorough": Effort(
        target=1.0001,
        rounds=32,
        focus=200,
        suspect=1.001,
        worst=8,
        pairs=10**9,
        steps=32,
        width=256,
        ways=400_000,
        tiny=64,
        full=512,
    ),
}


def construct_equal(
    load_LE: FloatArray,
    capacity_LG: Any,
    speed_G: Any,
    *,
    seed: int = 0,
    effort: str = "normal",
    backend: str = "auto",
    stop: Stop | None = None,
) -> SlotArray:
    """Place replicas for an equal split of each expert's tokens over its replicas.

    Parameters
    ----------
    load_LE : array of float, shape [L, E]
        Tokens of each expert, not negative.
    capacity_LG : array of int, shape [L, G]
        Slots of each GPU in each layer; GPUs and layers may differ.
    speed_G : array of float, shape [G]
        Relative speeds.
    seed : int
        Taken so that all constructions can be called alike; this one draws nothing at random.
    effort : {"quick", "normal", "thorough"}
        How long to search, see `EFFORTS`. Quick takes a tenth of a millisecond for 8 experts on 8 GPUs of two
        slots; normal solves such a layer to optimality in about one millisecond, and may spend about 10 ms on
        a layer that swaps can't bring near its bound.
    backend : {"auto", "numpy", "numba"}
        The plan is the same, bit for bit. "auto" uses the compiled kernels once they are in the process
        (after `fast.warm` or a call with "numba"): loading them takes longer than most plans do.
    stop : Stop, optional
        When to be content with what is found.

    Returns
    -------
    array of int32, shape [L, G, C]
        Expert in each slot, -1 (last) where empty; C is the largest capacity. No GPU holds an expert twice,
        and every expert has a replica.

    Raises
    ------
    InfeasibleError
        Where the slots don't suffice for one replica of each expert.
    """
    load_LE = np.ascontiguousarray(load_LE, dtype=np.float64)
    capacity = np.asarray(capacity_LG, dtype=np.int64)
    speed = np.asarray(speed_G, dtype=np.float64)
    if effort not in EFFORTS:
        raise ProblemError("effort", f"is {effort!r}; it can be " + ", ".join(map(repr, EFFORTS)))
    E = load_LE.shape[1]
    G = capacity.shape[1]
    alive_G = (capacity > 0).any(axis=0)
    if alive_G.any() and not alive_G.all():  # those that are left may be alike
        slots = np.full((*capacity.shape, int(capacity.max())), -1, dtype=np.int32)
        slots[:, alive_G] = construct_equal(
            load_LE, capacity[:, alive_G], speed[alive_G], effort=effort, backend=backend, stop=stop
        )
        return slots
    backend = fast.choose_backend(backend)
    same_speed = bool((speed == speed[0]).all())
    if same_speed and E <= 2 * G and E <= 32 and G > 1 and (capacity == 2).all():
        return _two_slots(load_LE, G, EFFORTS[effort], stop)
    slots = _general(load_LE, capacity, speed, EFFORTS[effort], backend, stop)
    if EFFORTS[effort].tiny >= E * G:
        return _proven(load_LE, capacity, speed, slots, stop)
    if same_speed and E <= 2 * G and E <= 32 and G > 1 and slots.shape[2] >= 2:
        rows = np.flatnonzero((capacity == 2).all(axis=1))
        if len(rows):
            slots[rows, :, :2] = _two_slots(load_LE[rows], G, EFFORTS[effort], stop)
    return slots


def _two_slots(load_LE: FloatArray, G: int, effort: Effort, stop: Stop | None) -> SlotArray:
    """Layers of two slots on equal GPUs, by folding."""
    if effort.ways == 0:
        pairs = [quick_fold(load_E, G, target=effort.target) for load_E in load_LE.tolist()]
        return np.array(pairs, dtype=np.int32).reshape(len(pairs), G, 2)
    counts = apportion(load_LE, 2 * G, G).astype(np.int64)
    counts, _ = best_counts(load_LE, counts, G, target=effort.target, ways=effort.ways, stop=stop)
    return fold(load_LE, counts, G)


def _proven(
    load_LE: FloatArray, capacity: IntArray, speed: FloatArray, slots: SlotArray, stop: Stop | None
) -> SlotArray:
    """Tiny layers to optimality by dynamic programming, where the search left a gap."""
    value_L = even_times(load_LE, slots, speed).max(axis=1)
    for layer in np.flatnonzero(value_L > load_LE.sum(axis=1) / speed.sum() * (1.0 + 1e-9)):
        found = solve_patterns(
            load_LE[layer],
            capacity[layer],
            speed,
            upper=float(value_L[layer]),
            gap=1e-9,
            stop=MaxTime(_TINY_SECONDS) if stop is None else FirstOf(stop, MaxTime(_TINY_SECONDS)),
        ).slots_GC
        if found is not None and even_times(load_LE[layer][None], found[None], speed).max() < value_L[layer]:
            slots[layer] = -1
            slots[layer, :, : found.shape[1]] = found
    return slots


def _general(
    load_LE: FloatArray,
    capacity: IntArray,
    speed: FloatArray,
    effort: Effort,
    backend: str,
    stop: Stop | None,
) -> SlotArray:
    """Any layer: counts, packing, swaps, and other counts where these end far above the bound."""
    E = load_LE.shape[1]
    total = np.minimum(capacity, E).sum(axis=1)
    greedy = apportion(load_LE, total, (capacity > 0).sum(axis=1)[:, None], backend=backend)
    bound = np.maximum(load_LE.sum(axis=1) / speed.sum(), largest_piece(load_LE, greedy) / speed.max())
    slots = pack(load_LE, trim(load_LE, greedy, capacity), capacity, speed, backend=backend)
    swaps: dict[str, Any] = {"rounds": effort.rounds, "focus": effort.focus, "backend": backend, "stop": stop}
    slots = improve(load_LE, slots, capacity, speed, target=effort.target, **swaps)
    if not effort.steps or (stop is not None and stop()):
        return slots
    over = even_times(load_LE, slots, speed).max(axis=1) / np.where(bound > 0.0, bound, 1.0)
    suspects = np.flatnonzero(over > effort.suspect)
    if len(suspects):
        known, _ = best_bound(load_LE[suspects], capacity[suspects], speed)
        bound[suspects] = np.maximum(bound[suspects], known)
        _undivided(load_LE, capacity, speed, slots, bound, suspects, stop)
        time = even_times(load_LE[suspects], slots[suspects], speed).max(axis=1)
        over[suspects] = time / np.where(bound[suspects] > 0.0, bound[suspects], 1.0)
    _grouped(load_LE, capacity, speed, slots, bound, over, swaps)
    few = effort.worst if load_LE.shape[1] * len(speed) <= effort.pairs else 0
    worst = np.argsort(-over, kind="stable")[:few]
    rows = np.union1d(np.flatnonzero(over > effort.suspect), worst[over[worst] > effort.target + _NEAR])
    if not len(rows):
        return slots
    load, room = load_LE[rows], capacity[rows]
    wanted = np.where(over[rows] > effort.suspect, (effort.suspect + effort.target) / 2.0, effort.target)
    better = resize(
        load,
        slots[rows],
        room,
        speed,
        goal_L=bound[rows] * wanted,
        steps=effort.steps,
        width=effort.width,
        backend=backend,
        stop=stop,
    )
    better = improve(load, better, room, speed, target=effort.target, **swaps)
    gains = even_times(load, better, speed).max(axis=1) < even_times(load, slots[rows], speed).max(axis=1)
    slots[rows[gains]] = better[gains]
    return slots


def _grouped(
    load_LE: FloatArray,
    capacity: IntArray,
    speed: FloatArray,
    slots: SlotArray,
    bound: FloatArray,
    over: FloatArray,
    swaps: dict[str, Any],
) -> None:
    """Where few slots are spare: the groups of GPUs that would share freely, evenly and mended; in place.

    `over` is what the layers take over their bound, and is brought up to date.
    """
    spare = np.minimum(capacity, load_LE.shape[1]).sum(axis=1) - load_LE.shape[1]
    rows = np.flatnonzero((spare > 0) & (spare < capacity.shape[1]) & (over > 1.0 + _SCARCE_GAP))
    if not len(rows):
        return
    load, room = load_LE[rows], capacity[rows]
    found, _, time = pack_groups(load, room, speed, bound[rows], stop=swaps["stop"])
    good = np.flatnonzero(np.isfinite(time))
    rows, load, room = rows[good], load[good], room[good]
    if not len(rows):
        return
    longer = swaps | {"rounds": 3 * swaps["rounds"], "focus": 4 * swaps["focus"]}
    found = improve(load, found[good], room, speed, goal_L=bound[rows], **longer)
    now = even_times(load, found, speed).max(axis=1) / np.where(bound[rows] > 0.0, bound[rows], 1.0)
    gains = now < over[rows]
    slots[rows[gains]], over[rows[gains]] = -1, now[gains]
    slots[rows[gains], :, : found.shape[2]] = found[gains]


def _undivided(
    load_LE: FloatArray,
    capacity: IntArray,
    speed: FloatArray,
    slots: SlotArray,
    bound: FloatArray,
    rows: IntArray,
    stop: Stop | None,
) -> None:
    """Where few slots are spare, or GPUs unlike, empty slots may do better than replicas; in place."""
    spare = np.minimum(capacity[rows], load_LE.shape[1]).sum(axis=1) - load_LE.shape[1]
    unlike = (capacity[rows] != capacity[rows, :1]).any(axis=1) | bool((speed != speed[0]).any())
    rows = rows[unlike | (spare < capacity.shape[1])]
    if not len(rows):
        return
    load = load_LE[rows]
    whole, time = pack_whole(load, capacity[rows], speed, bound[rows], stop=stop)
    gains = time < even_times(load, slots[rows], speed).max(axis=1) * (1.0 - 1e-12)
    slots[rows[gains]] = -1
    slots[rows[gains], :, : whole.shape[2]] = whole[gains]
