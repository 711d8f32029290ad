"""Placement for free token shares: perfect on the given loads, and sturdy when they turn out different.

Tokens can move between two GPUs when they hold replicas of a common expert. Take that graph: GPUs joined by
replicated experts. Where it is connected, and the shares that level all GPUs are not negative, every
GPU comes out at the mean exactly. S slots for E experts leave S - E spare replicas, and a spanning tree needs
G - 1 of them: the familiar condition E <= G (c - 1) leaves just enough. So the spare replicas are
spent on joining, never on linking GPUs twice:

1. Count replicas by largest ``load / (replicas + 1/2)``, which favours the heavy experts: they fluctuate
most,
   in tokens, and make the widest links.
2. Place the replicas of replicated experts, heaviest first, each on the least loaded GPU among those in
   components that the expert does not reach yet.
3. Fill up with the other experts, heaviest first, always onto the emptiest GPUs.
4. Level: the shares that solve the graph's Laplacian system move as little as possible away from the equal
   split. Where one would be negative, the exact share solver decides.

A layer that misses the mean is tried with other replica counts, then with alias packing, which is brittle;
whoever is first at the mean wins. Where the slots are too few to join all GPUs (E > G (c - 1)) or the GPUs
too unequal, groups of GPUs are joined instead (see `groups`), and the best of these and of the equal-split
construction wins, so that free shares are never worse than equal ones. Tiny layers that miss their bound even
so are searched for the best there is (see `tiny`).

Why it is sturdy: with the loads off by a factor, what counts is how much captive load a set of GPUs
has (see `bounds.density_bound`). A tree of wide links leaves few sets with much captive load; the same spare
replicas placed for balance alone leave many GPUs linked to nobody.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moeless_opt.problems.arrays import BoolArray, FloatArray, IntArray, SlotArray
from moeless_opt.problems.plan import TimeTable, best_bound, gpu_times
from moeless_opt.problems.spec import TOKENS
from moeless_opt.solvers.construct.alias import alias_pack
from moeless_opt.solvers.construct.equal import construct_equal
from moeless_opt.solvers.construct.groups import pack_groups
from moeless_opt.solvers.construct.join import connect
from moeless_opt.solvers.construct.level import PERFECT, level
from moeless_opt.solvers.construct.pools import group_pack
from moeless_opt.solvers.construct.small import join_layer
from moeless_opt.solvers.construct.tiny import search_tiny, widths_for
from moeless_opt.solvers.core import NeverStop, Stop
from moeless_opt.solvers.pack import apportion, trim
from moeless_opt.solvers.shares import ReplicaGraph, solve_shares

__all__ = ["construct_fractional"]


LEAN = 0.5  # of the first try; see `sizing.apportion`
OTHER_LEANS = (0.25, 0.0, -0.25, -0.5, -0.75)  # ever fewer replicas for the heaviest, more links elsewhere
THOROUGH_LEANS = (0.0, 0.25, 0.75, 1.0)
NOISE = 0.2  # of the scenarios that a thorough construction is judged by (standard deviation of the log)
SCENARIOS = 6
_SEARCH_PAIRS = 400  # experts x GPUs up to which a layer is worth a local search
_SMALL = 512  # layers x experts x GPUs up to which plain Python is faster than NumPy


def construct_fractional(
    load_LE: FloatArray,
    capacity_LG: Any,
    speed_G: Any,
    *,
    seed: int = 0,
    effort: str = "normal",
    stop: Stop | None = None,
    enough_L: FloatArray | None = None,
) -> tuple[SlotArray, FloatArray]:
    """Place the replicas of every layer, and split the tokens, for the least largest GPU time.

    Parameters
    ----------
    load_LE : array of float, shape [L, E]
        Tokens, not negative.
    capacity_LG : array of int, shape [L, G]
        Slots.
    speed_G : array of float, shape [G]
        Relative speeds.
    seed : int
        For the scenarios of ``effort="thorough"``; otherwise nothing is random.
    effort : {"normal", "thorough"}
        Thorough also builds every variant and keeps, among those at the best time, the one that fares best on
        loads with lognormal noise, shares re-solved.
    stop : Stop, optional
        When to end with the best that was built; every layer is built once in any case.
    enough_L : array of float, shape [L], optional
        Times that will do: layers that keep them are spared the slower constructions, and the slowest of all,
        an equal split, only places what nothing else could.

    Returns
    -------
    slots_LGC : array of int32, shape [L, G, C]
        Expert in each slot, -1 (last) where empty; no expert twice on a GPU.
    share_LGC : array of float, shape [L, G, C]
        Fraction of its expert's tokens served by the slot; they sum to 1 per expert.

    Raises
    ------
    InfeasibleError
        The slots can't hold one replica of every expert.

    Examples
    --------
    >>> import numpy as np
    >>> load = np.array([[600.0, 560, 120, 120, 20, 10, 10, 10]])
    >>> slots, share = construct_fractional(load, np.full((1, 8), 2), np.ones(8))
    >>> tokens = np.where(slots >= 0, load[0][slots] * share, 0.0)
    >>> float(tokens.sum(axis=2).max().round(6))
    181.25
    """
    load = np.ascontiguousarray(load_LE, dtype=np.float64)
    capacity = np.ascontiguousarray(capacity_LG, dtype=np.int64)
    speed = np.ascontiguousarray(speed_G, dtype=np.float64)
    alive_G = (capacity > 0).any(axis=0)
    if alive_G.any() and not alive_G.all():  # those that are left may be alike
        settings: dict[str, Any] = {"seed": seed, "effort": effort, "stop": stop, "enough_L": enough_L}
        own, own_share = construct_fractional(load, capacity[:, alive_G], speed[alive_G], **settings)
        slots = np.full((*capacity.shape, own.shape[2]), -1, dtype=np.int32)
        share = np.zeros(slots.shape)
        slots[:, alive_G], share[:, alive_G] = own, own_share
        return slots, share
    if load.size * len(speed) <= _SMALL and effort == "normal":
        small = _small(load, capacity, speed)
        if small is not None:
            return small
    stop = stop or NeverStop()
    slots, share, time_L = _best_of_all(load, capacity, speed, seed, stop, enough_L)
    if effort == "thorough":
        _sturdiest(load, capacity, speed, (slots, share, time_L), seed, stop)
    return slots, share


Built = tuple[SlotArray, FloatArray, FloatArray]


def _small(
    load_LE: FloatArray, capacity_LG: IntArray, speed_G: FloatArray
) -> tuple[SlotArray, FloatArray] | None:
    """Small problems in plain Python; None where a layer needs more than the first construction."""
    speed = speed_G.tolist()
    all_slots, all_share = [], []
    C = int(capacity_LG.max())
    for load, capacity in zip(load_LE.tolist(), capacity_LG.tolist(), strict=True):
        joined = join_layer(load, capacity, speed, lean=LEAN)
        if joined is None:
            return None
        all_slots.append([row + [-1] * (C - len(row)) for row in joined[0]])
        all_share.append([row + [0.0] * (C - len(row)) for row in joined[1]])
    return np.array(all_slots, dtype=np.int32), np.array(all_share)


def _joined(
    load_LE: FloatArray,
    capacity_LG: IntArray,
    speed_G: FloatArray,
    lean: float,
    worth_L: FloatArray | None = None,
) -> Built:
    """Steps 1 to 4: placement, shares, largest times; infinite time where a layer can't be packed so.

    The shares of layers that can't keep the times in `worth_L` may be rough.
    """
    total = np.minimum(capacity_LG, load_LE.shape[1]).sum(axis=1)
    cap = (capacity_LG > 0).sum(axis=1)[:, None]
    replicas = trim(load_LE, apportion(load_LE, total, cap, lean=lean), capacity_LG)
    slots, ok_L = connect(load_LE, replicas, capacity_LG, speed_G)
    share, time_L = _share(load_LE, slots, speed_G, ok_L, replicas, worth_L)
    return slots, share, time_L


def _share(
    load_LE: FloatArray,
    slots_LGC: SlotArray,
    speed_G: FloatArray,
    ok_L: BoolArray,
    replicas_LE: NDArray[Any],
    worth_L: FloatArray | None,
) -> tuple[FloatArray, FloatArray]:
    """Level the layers in `ok_L`, exactly where levelling would need negative shares."""
    mean_L = load_LE.sum(axis=1) / speed_G.sum()
    share, time_L = level(load_LE, slots_LGC, speed_G, replicas_LE)
    time_L[~ok_L] = np.inf
    open_L = np.flatnonzero(ok_L & (time_L > mean_L * (1.0 + PERFECT)))
    if len(open_L):
        worth = None if worth_L is None else worth_L[open_L]
        found = solve_shares(load_LE[open_L], slots_LGC[open_L], speed_G, worth_L=worth)
        share[open_L], time_L[open_L] = found.share_LGC, found.time_L
    return share, time_L


def _best_of_all(
    load_LE: FloatArray,
    capacity_LG: IntArray,
    speed_G: FloatArray,
    seed: int,
    stop: Stop,
    enough_L: FloatArray | None,
) -> Built:
    """Steps 1 to 4, and other constructions for layers that miss the mean, until one is as good as can be.

    Where none reaches the mean, groups of GPUs are packed; then the shares of what was joined so far are
    solved to the end, as far as that can be better. The equal-split construction comes last, its shares
    re-solved: an equal split is a choice of shares, too.
    """
    mean_L = load_LE.sum(axis=1) / speed_G.sum()
    perfect_L = mean_L * (1.0 + PERFECT)
    leans = [LEAN]
    # Where slots are too few to join all GPUs in some layer, no tree will do.
    if load_LE.shape[1] <= int(np.maximum(capacity_LG - 1, 0).sum(axis=1).min()):
        leans += OTHER_LEANS
    search = _Search(load_LE, capacity_LG, np.full(len(load_LE), np.inf), stop)
    joined: list[tuple[IntArray, SlotArray]] = []
    for lean in leans:
        open_L = search.open(mean_L)
        if not len(open_L) or (joined and stop()):
            break
        built = _joined(load_LE[open_L], capacity_LG[open_L], speed_G, lean, perfect_L[open_L])
        joined.append((open_L[np.isfinite(built[2])], built[0][np.isfinite(built[2])]))
        search.keep(open_L, built)
    search.run(lambda load, capacity, _: _aliased(load, capacity, speed_G, stop), mean_L)
    open_L = search.open(mean_L)
    if not len(open_L):
        return search.slots, search.share, search.time_L
    goal_L = mean_L.copy()
    goal_L[open_L], _ = best_bound(load_LE[open_L], capacity_LG[open_L], speed_G, "fractional")
    if enough_L is not None:
        goal_L = np.maximum(goal_L, enough_L)
    search.run(lambda load, capacity, goal: pack_groups(load, capacity, speed_G, goal, stop=stop), goal_L)
    if load_LE.shape[1] * len(speed_G) <= _SEARCH_PAIRS:
        search.run(lambda load, capacity, _: _pooled(load, capacity, speed_G, seed, stop), goal_L)
    for rows, slots in joined:
        search.solve(rows, slots, speed_G, goal_L)
    search.finish(lambda load, capacity, _: _evenly(load, capacity, speed_G, stop), goal_L, enough_L is None)
    _exactly(search, speed_G, goal_L)
    return search.slots, search.share, search.time_L


def _exactly(search: _Search, speed_G: FloatArray, goal_L: FloatArray) -> None:
    """Tiny layers that miss their goal even so are searched for the best there is."""
    load_LE, capacity_LG, stop = search.load_LE, search.capacity_LG, search.stop
    widths, table = (
        widths_for(load_LE.shape[1] * len(speed_G), len(load_LE), False, stop),
        TimeTable.of(TOKENS, 1),
    )
    for layer in search.open(goal_L) if widths else ():
        if stop():
            return
        found = search_tiny(
            load_LE[layer],
            capacity_LG[layer],
            speed_G,
            table,
            float(search.time_L[layer]),
            equal=False,
            widths=widths,
            stop=stop,
        )
        if found.slots_GC is not None and found.share_GC is not None:
            slots, share = found.slots_GC[None], found.share_GC[None]
            search.keep(
                np.array([layer]),
                (slots, share, gpu_times(load_LE[layer][None], slots, share, speed_G).max(1)),
            )


_Build = Callable[[FloatArray, IntArray, FloatArray], Built]


class _Search:
    """The best plan of every layer so far."""

    def __init__(self, load_LE: FloatArray, capacity_LG: IntArray, time_L: FloatArray, stop: Stop) -> None:
        self.load_LE, self.capacity_LG, self.time_L, self.stop = load_LE, capacity_LG, time_L, stop
        shape = (*capacity_LG.shape, int(capacity_LG.max(initial=1)))
        self.slots: SlotArray = np.full(shape, -1, dtype=np.int32)
        self.share: FloatArray = np.zeros(shape)

    def open(self, goal_L: FloatArray) -> IntArray:
        """Layers that miss their goal."""
        return np.flatnonzero(self.time_L > goal_L * (1.0 + PERFECT))

    def keep(self, rows: IntArray, built: Built) -> None:
        """Take what is better."""
        slots, share, time = built
        better = time < self.time_L[rows] * (1.0 - 1e-12)
        layers, width = rows[better], slots.shape[2]  # others may have more slots
        self.slots[layers], self.share[layers], self.time_L[layers] = -1, 0.0, time[better]
        self.slots[layers, :, :width], self.share[layers, :, :width] = slots[better], share[better]

    def run(self, build: _Build, goal_L: FloatArray, rows: IntArray | None = None) -> None:
        """Build the layers that miss their goal, or those that are named, unless time is up."""
        rows = (np.zeros(0, dtype=np.int64) if self.stop() else self.open(goal_L)) if rows is None else rows
        if len(rows):
            self.keep(rows, build(self.load_LE[rows], self.capacity_LG[rows], goal_L[rows]))

    def solve(self, rows: IntArray, slots: SlotArray, speed_G: FloatArray, goal_L: FloatArray) -> None:
        """Solve the shares of placements for layers that miss their goal, where they may be better."""
        useful = np.flatnonzero(self.time_L[rows] > goal_L[rows] * (1.0 + PERFECT))
        if not len(useful) or self.stop():
            return
        rows, slots = rows[useful], slots[useful]
        worth = self.time_L[rows] * (1.0 - 1e-12)
        found = solve_shares(self.load_LE[rows], slots, speed_G, worth_L=worth)
        self.keep(rows, (slots, found.share_LGC, found.time_L))

    def finish(self, build: _Build, goal_L: FloatArray, whole: bool) -> None:
        """The last construction: all layers that miss their goal; else those that have no plan at all."""
        rows = None if whole and not self.stop() else np.flatnonzero(np.isinf(self.time_L))
        self.run(build, goal_L, rows)


def _aliased(load_LE: FloatArray, capacity_LG: IntArray, speed_G: FloatArray, stop: Stop) -> Built:
    """Alias packing of every layer that it can do."""
    return _each(
        load_LE, capacity_LG, speed_G, lambda load, capacity: alias_pack(load, capacity, speed_G), stop
    )


def _pooled(load_LE: FloatArray, capacity_LG: IntArray, speed_G: FloatArray, seed: int, stop: Stop) -> Built:
    """The best pools of every layer with equal GPUs; see `pools`."""

    def one(load_E: FloatArray, capacity_G: IntArray) -> tuple[SlotArray, FloatArray] | None:
        if (capacity_G != capacity_G[0]).any() or (speed_G != speed_G[0]).any():
            return None
        return group_pack(load_E, len(capacity_G), int(capacity_G[0]), seed=seed)

    return _each(load_LE, capacity_LG, speed_G, one, stop)


def _each(
    load_LE: FloatArray,
    capacity_LG: IntArray,
    speed_G: FloatArray,
    build: Callable[[FloatArray, IntArray], tuple[SlotArray, FloatArray] | None],
    stop: Stop,
) -> Built:
    """A construction of single layers over all of them; infinite time where it found nothing in time."""
    L, G = capacity_LG.shape
    C = int(capacity_LG.max(initial=1))
    slots = np.full((L, G, C), -1, dtype=np.int32)
    share, time_L = np.zeros((L, G, C)), np.full(L, np.inf)
    for layer in range(L):
        if stop():
            break
        found = build(load_LE[layer], capacity_LG[layer])
        if found is not None:
            c = found[0].shape[1]
            slots[layer, :, :c], share[layer, :, :c] = found
            one = found[0][None], found[1][None]
            time_L[layer] = gpu_times(load_LE[layer][None], *one, speed_G).max()
    return slots, share, time_L


def _evenly(load_LE: FloatArray, capacity_LG: IntArray, speed_G: FloatArray, stop: Stop) -> Built:
    """The equal-split construction with its shares re-solved."""
    slots = construct_equal(load_LE, capacity_LG, speed_G, stop=stop)
    found = solve_shares(load_LE, slots, speed_G)
    return slots, found.share_LGC, found.time_L


def _sturdiest(
    load_LE: FloatArray,
    capacity_LG: IntArray,
    speed_G: FloatArray,
    best: Built,
    seed: int,
    stop: Stop,
) -> None:
    """Among placements of equal time, the one that fares best when the loads turn out different; in place."""
    slots, share, time_L = best
    rng = np.random.default_rng(seed)
    noise = [np.exp(rng.normal(0.0, NOISE, load_LE.shape)) for _ in range(SCENARIOS)]

    def fares(slots_LGC: SlotArray) -> FloatArray:
        graph = ReplicaGraph(slots_LGC, speed_G, load_LE.shape[1])
        mean = [np.maximum((load_LE * factor).sum(axis=1), 1e-300) / speed_G.sum() for factor in noise]
        times = [solve_shares(load_LE * factor, graph).time_L for factor in noise]
        total: FloatArray = sum(time / m for time, m in zip(times, mean, strict=True)) / len(noise)
        return total

    if stop():
        return
    score_L = fares(slots)
    for lean in THOROUGH_LEANS:
        if stop():
            return
        new_slots, new_share, new_time = _joined(load_LE, capacity_LG, speed_G, lean)
        level_L = np.flatnonzero(new_time <= time_L * (1.0 + PERFECT))
        if not len(level_L):
            continue
        new_score = np.full(len(load_LE), np.inf)
        complete = slots.copy()  # layers that can't be packed so keep what they have
        complete[level_L] = new_slots[level_L]
        new_score[level_L] = fares(complete)[level_L]
        better = new_score < score_L
        slots[better], share[better] = new_slots[better], new_share[better]
        score_L = np.where(better, new_score, score_L)
