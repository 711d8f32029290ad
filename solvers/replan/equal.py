"""Re-planning for engines that split an expert's tokens evenly over its replicas: local search on few moves.

With an equal split every replica of expert e carries w[e] / r[e], so that changing the number of replicas
changes the load of all GPUs that hold one. The search (`equal_state`) lowers the *overflow*, the tokens
above a wanted time summed over the GPUs, by the change that lowers it most per replica moved, and then
destroys and repairs, as in `shake`, to remove moves that turned out needless. What was live at a place
before costs nothing to put back.

It runs in whole numbers, and compiled where Numba is at hand: without the interpreter's lock, a few layers
on each core, the same plan whatever their number.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from moeless_opt.problems.arrays import BoolArray, FloatArray, IntArray, SlotArray
from moeless_opt.problems.plan import best_bound, even_times, new_replicas
from moeless_opt.problems.spec import (
    Fill,
    equal_shares,
    replica_counts,
    seat_in_place,
    second_copies,
    without_copies,
)
from moeless_opt.solvers.core import FirstOf, NeverStop, Stop
from moeless_opt.solvers.limits import Rules, counts_of, full_counts_within, mended_within, slots_counted
from moeless_opt.solvers.pack import fast
from moeless_opt.solvers.replan import equal_state
from moeless_opt.solvers.replan.equal_state import (
    FILL,
    LOAD_UNIT,
    REACH,
    ROUNDS,
    STEP,
    EqualSearch,
    Layers,
)
from moeless_opt.solvers.replan.equal_wide import MANY_PAIRS, replan_equal_wide
from moeless_opt.solvers.replan.live import mend_content, mend_within
from moeless_opt.solvers.replan.task import Replanned, ReplanTask, ReplanWish, front_of, spread_budget
from moeless_opt.solvers.twins import Asked, in_cache, until_stopped

__all__ = ["replan_equal", "warm_equal"]

_LATEST = (
    2.0**61 / LOAD_UNIT
)  # of the mean: what a GPU of speed 1 carries by then is still counted in 64 bits
_ROUNDS = 20  # of destroying and repairing, where none are wished for
_MOST_BACK = 4  # GPUs put back in one of them
_TRIES = 6  # wanted times tried for a layer that cannot reach its own
_PARTS = (0.5, 0.25, 0.1, 0.0)  # of the way to the wanted time, where a budget may end
_MUCH = 1e5  # slots of all layers and rounds, from which on loading compiled code pays


def replan_equal(
    task: ReplanTask, wish: ReplanWish | None = None, *, stop: Stop | None = None, backend: str = "auto"
) -> Replanned:
    """Move few replicas until, tokens split evenly, the largest GPU time is within a tolerance of the bound.

    Parameters and errors are those of `fractional.replan_fractional`; 20 rounds of destroying and repairing
    run for each layer if the wish names no other number.

    Parameters
    ----------
    backend : {"auto", "numpy", "numba"}
        Which twin does the work; the plan is the same (see `pack.fast.choose_backend`).

    Returns
    -------
    Replanned
        Placement, equal shares, times, moves and bounds. A layer that the search cannot bring to the wanted
        time has the best time that it found.
    """
    wish, stop = wish or ReplanWish(), stop or NeverStop()
    if task.load_LE.shape[1] * len(task.speed_G) >= MANY_PAIRS:
        task = replace(task, live_LGC=without_copies(task.live_LGC), fill=Fill.NONE)
        if task.rules is None:
            return replan_equal_wide(task, wish, stop=stop)
        if wish.max_moves is None:
            return _wide_within(task, task.rules, wish, stop)
    load, speed = task.load_LE, task.speed_G
    L, E = load.shape
    if wish.bound_L is None:
        split = "fractional" if task.fill == Fill.COPIES else "equal"  # copies are weights
        bound = best_bound(load, task.capacity_LG, speed, split)[0]
    else:
        bound = np.asarray(wish.bound_L, dtype=np.float64)
    target_L = (1.0 + wish.tolerance) * bound
    rounds = wish.most_rounds(_ROUNDS)
    work = float(L) * float(task.capacity_LG.max()) * len(speed) * (1.0 + rounds)
    worker = _worker(backend, work, stop)
    base = _mended(task, task.live_LGC, wish.repair)
    base = _filled(task, wish, base, target_L, worker)
    start = base
    if wish.start_LGC is not None:
        start = _filled(task, wish, _mended(task, wish.start_LGC, wish.repair), target_L, worker)
    forced_L = _moves(task, start)
    wish.check_budget(forced_L)
    begun_L = even_times(load, start, speed).max(axis=1)
    late_L = begun_L > target_L * (1.0 + 1e-9)
    # The worst first: who knows for how many there is time.
    rows = np.argsort((target_L - begun_L) / np.maximum(bound, 1e-300), kind="stable")
    search = _Search.of(task, wish, (base, start), rows[late_L[rows]], target_L, worker, stop)
    search.run(rounds)
    slots = search.contents(start)
    if wish.max_moves is not None:
        price = wish.price_L(L)
        if sum(by * moves for by, moves in zip(price, _moves(task, slots).tolist(), strict=True)) > (
            wish.max_moves
        ):
            fronts = search.fronts(task, start, slots)
            weights = (load.sum(axis=1) / search.mean_L).tolist()
            chosen = spread_budget(fronts, weights, price, wish.max_moves)
            slots = np.stack(chosen)
    order = seat_in_place(slots, task.live_LGC, task.capacity_LG)
    slots = np.take_along_axis(slots, order, axis=2).astype(np.int32)
    return Replanned(
        slots_LGC=slots,
        share_LGC=equal_shares(slots, E),
        time_L=even_times(load, slots, speed).max(axis=1),
        moves_L=_moves(task, slots),
        forced_L=forced_L,
        bound_L=bound,
        target_L=target_L,
        least_moves_L=np.zeros(L, dtype=np.int64),
        cut_L=search.cut_L,
    )


def _wide_within(task: ReplanTask, rules: list[Rules], wish: ReplanWish, stop: Stop) -> Replanned:
    """Over many GPUs: as without limits, then mended where that breaks one."""
    found = replan_equal_wide(replace(task, rules=None), wish, stop=stop)
    load, speed = task.load_LE, task.speed_G
    slots = np.full_like(task.live_LGC, -1)
    for row, one in enumerate(rules):
        content = [[e for e in held if e >= 0] for held in found.slots_LGC[row].tolist()]
        _write(slots[row], mended_within(one, load[row], content, speed))
    new = np.take_along_axis(slots, seat_in_place(slots, task.live_LGC, task.capacity_LG), axis=2)
    return replace(
        found,
        slots_LGC=new,
        share_LGC=equal_shares(new, load.shape[1]),
        time_L=even_times(load, new, speed).max(axis=1),
        moves_L=_moves(task, new),
    )


def _write(slots_GC: SlotArray, content: list[list[int]]) -> None:
    """Put contents into slots, the empty ones last."""
    slots_GC[:] = -1
    for row, held in zip(slots_GC, content, strict=True):
        row[: len(held)] = held


def _mended(task: ReplanTask, slots_LGC: SlotArray, repair: bool) -> SlotArray:
    """A placement, mended or refused where it breaks the rules; experts in the first slots of a GPU."""
    L, E = task.load_LE.shape
    empty = slots_LGC < 0
    slots = np.take_along_axis(slots_LGC, np.argsort(empty, axis=2, kind="stable"), axis=2)
    fits_L = (slots < E).all(axis=(1, 2)) & ((~empty).sum(axis=2) <= task.capacity_LG).all(axis=1)
    fits_L &= (replica_counts(np.where(slots < E, slots, -1), E) > 0).all(axis=1)
    if task.fill != Fill.COPIES:
        fits_L &= ~second_copies(slots).any(axis=(1, 2))
    for layer in np.flatnonzero(~fits_L).tolist():
        given = slots_LGC[layer].tolist(), task.capacity_LG[layer].tolist(), task.speed_G.tolist()
        copies = task.fill == Fill.COPIES
        _write(slots[layer], mend_content(task.load_LE[layer].tolist(), *given, layer, repair, copies))
    for layer in range(L if task.rules is not None else 0):
        assert task.rules is not None
        if task.fill != Fill.NONE:
            if not task.rules[layer].keeps(counts_of(slots[layer], E)):
                _fill_within(task, layer, slots[layer], slots[layer])
            continue
        content = [[e for e in held if e >= 0] for held in slots[layer].tolist()]
        given = slots_LGC[layer], content, task.speed_G
        _write(slots[layer], mend_within(task.rules[layer], task.load_LE[layer], *given))
    return slots


def _fill_within(task: ReplanTask, layer: int, from_GC: SlotArray, into_GC: SlotArray) -> None:
    """All slots of a layer full within the limits, with as much of what they are made from as can stay."""
    assert task.rules is not None
    there_EG = counts_of(from_GC, task.load_LE.shape[1])
    found_EG = full_counts_within(
        task.rules[layer], task.load_LE[layer], there_EG, copies=task.fill == Fill.COPIES
    )
    into_GC[:] = slots_counted(found_EG, into_GC.shape[1])


def _filled(
    task: ReplanTask, wish: ReplanWish, slots_LGC: SlotArray, target_L: FloatArray, worker: Worker
) -> SlotArray:
    """A placement with every slot full, where that is asked for."""
    rows = np.flatnonzero(((slots_LGC >= 0).sum(axis=2) < task.capacity_LG).any(axis=1))
    if task.fill == Fill.NONE or len(rows) == 0:
        return slots_LGC
    search = _Search.of(task, wish, (slots_LGC, slots_LGC), rows, target_L, worker, NeverStop())
    worker(search.layers, search.settings, FILL, NeverStop())
    found = search.contents(slots_LGC)
    short_L = ((found >= 0).sum(axis=2) < task.capacity_LG).any(axis=1)
    for layer in np.flatnonzero(short_L).tolist() if task.rules is not None else ():
        _fill_within(task, layer, slots_LGC[layer], found[layer])  # one by one they did not fit
    return found


def _moves(task: ReplanTask, slots_LGC: SlotArray) -> IntArray:
    """Replicas of each layer that are not live."""
    new_LGC = new_replicas(slots_LGC, task.live_LGC, task.load_LE.shape[1])
    return np.asarray(new_LGC.sum(axis=(1, 2)))


# -- the search, layer by layer --------------------------------------------------------------------------


Worker = Callable[[Layers, EqualSearch, int, Stop], None]


def _worker(backend: str, work: float, stop: Stop) -> Worker:
    """The twin for a backend; "auto" is the compiled one where it is loaded, or that costs little."""
    if backend == "auto" and fast.available():
        ready = _kernel.cache_info().currsize > 0  # then it is quicker however little there is to do
        if (ready and (work > _MUCH or _endless(stop))) or (
            work > _MUCH and in_cache(equal_state.compiled_name(), Path(__file__))
        ):
            return _compiled
    return _compiled if fast.choose_backend(backend) == "numba" else _plain


def warm_equal() -> bool:
    """Compile or load the compiled twin; returns whether it could be (whether Numba is there).

    Half a minute at the first call in an installation, a second in later processes. Afterwards, where there
    is much to search, the backend "auto" uses it.
    """
    if not fast.available():
        return False
    task = ReplanTask(np.ones((1, 2)), np.array([[[0], [1]]]), np.ones((1, 2), dtype=np.int64))
    replan_equal(task, ReplanWish(tolerance=0.0, rounds=0, bound_L=np.array([0.5])), backend="numba")
    return True


def _plain(layers: Layers, search: EqualSearch, task: int, stop: Stop) -> None:
    equal_state.search_layers(layers, search, task, np.zeros(2, dtype=np.int64), Asked(stop), False)


def _compiled(layers: Layers, search: EqualSearch, task: int, stop: Stop) -> None:
    """Each core takes the next layer that nobody has, none of them with the interpreter's lock.

    Where nothing can stop it this thread works as well, and comes back when all is done: beside busy threads
    every other thread may wait long for the lock, and this one waits for it once.
    """
    count, told = len(layers.load_LE), np.zeros(1, dtype=np.uint8)
    if count == 0:
        return
    kernel, cores, turns = _kernel(), min(count, os.cpu_count() or 1), np.zeros(2, dtype=np.int64)
    if _endless(stop):
        for _ in range(cores - 1):
            _helpers().submit(kernel, layers, search, task, turns, told, False)
        kernel(layers, search, task, turns, told, True)
        return
    until_stopped([functools.partial(kernel, layers, search, task, turns, told, False)] * cores, told, stop)


def _endless(stop: Stop) -> bool:
    """Whether a stop never says so."""
    return isinstance(stop, NeverStop) or (isinstance(stop, FirstOf) and all(map(_endless, stop.stops)))


@functools.cache
def _helpers() -> ThreadPoolExecutor:
    """Threads that stay: to start one beside busy threads takes long. A forked process needs its own."""
    return ThreadPoolExecutor(max_workers=64, thread_name_prefix="moeless-replan")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_helpers.cache_clear)


@functools.cache
def _kernel() -> Any:
    from moeless_opt.solvers.replan import _equal_kernels

    return _equal_kernels.search_layers


@dataclass(slots=True)
class _Search:
    """The layers of a task that are searched."""

    rows: IntArray
    layers: Layers
    mean_L: FloatArray
    cut_L: BoolArray
    settings: EqualSearch
    worker: Worker
    stop: Stop

    @classmethod
    def of(
        cls,
        task: ReplanTask,
        wish: ReplanWish,
        begin: tuple[SlotArray, SlotArray],
        rows: IntArray,
        target_L: FloatArray,
        worker: Worker,
        stop: Stop,
    ) -> _Search:
        """Those rows, each to its wanted time: what rounds put back, and where the search starts."""
        load, speed = task.load_LE, task.speed_G
        (_, G, C), E, n = task.live_LGC.shape, load.shape[1], len(rows)
        total_L = load.sum(axis=1)
        mean_L = np.where(total_L > 0.0, total_L / speed.sum(), 1.0)
        base, slots = (one[rows].astype(np.int64) for one in begin)
        live = task.live_LGC[rows].astype(np.int64)
        full, copies = task.fill != Fill.NONE, task.fill == Fill.COPIES
        layers = Layers(
            load_LE=np.rint(load[rows] / mean_L[rows, None] * LOAD_UNIT).astype(np.int64),
            content_LGC=slots,
            capacity_LG=np.ascontiguousarray(task.capacity_LG[rows]),
            least_LE=np.ones((n, E), dtype=np.int64),
            most_LE=np.full((n, E), G * C if copies else G),
            live_LGC=np.where(live < E, live, -1),
            price_LEG=np.ones((1, E, G), dtype=np.int64),
            open_LEG=np.ones((1, E, G), dtype=np.bool_),
            held_LEG=np.zeros((1, E, G), dtype=np.bool_),
            speed_G=speed.copy(),  # arrays that may not be written to are another type, and compiled anew
            domain_G=np.zeros(G, dtype=np.int64),
            spread_LE=np.ones((n, E), dtype=np.int64),
            replicas_L=task.capacity_LG[rows].sum(axis=1),
            word_L=np.array(
                [equal_state.first_word(wish.seed, row) for row in rows.tolist()], dtype=np.uint64
            ),
            base_LGC=base,
            goal_L=np.minimum(target_L[rows] / mean_L[rows], _LATEST / speed.max()),
            price_L=np.zeros(n, dtype=np.int64),
            reached_L=np.zeros(n, dtype=np.bool_),
            cut_L=np.zeros(n, dtype=np.bool_),
        )
        if task.rules is not None and n > 0:
            rules = [task.rules[row] for row in rows.tolist()]
            layers = layers._replace(
                least_LE=np.array([rule.least_E for rule in rules], dtype=np.int64),
                most_LE=np.array([rule.most_E for rule in rules], dtype=np.int64),
                open_LEG=np.stack([rule.allowed_EG for rule in rules]),
                held_LEG=np.stack([rule.pinned_EG for rule in rules]),
                domain_G=np.array(rules[0].domain_G, dtype=np.int64),
                spread_LE=np.array([rule.spread_E for rule in rules], dtype=np.int64),
                replicas_L=np.array([rule.total for rule in rules], dtype=np.int64),
            )
        settings = EqualSearch(full, copies, 0, _MOST_BACK, _TRIES, 0)
        cut_L = np.zeros(len(load), dtype=np.bool_)
        return cls(rows, layers, mean_L, cut_L, settings, worker, stop)

    def run(self, rounds: float) -> None:
        """Reach the wanted times, then so many rounds of destroying and repairing, or until told to stop."""
        task = REACH
        while True:
            now = int(min(rounds, _ROUNDS))
            self.worker(self.layers, self.settings._replace(rounds=now), task, self.stop)
            rounds -= now
            if task == REACH:
                self.cut_L[self.rows] = self.layers.cut_L
            if rounds <= 0 or not self.layers.price_L.any() or self.stop():
                break
            task = ROUNDS

    def contents(self, start: SlotArray) -> SlotArray:
        """Slots: of the layers that were searched what was found, else the start."""
        found = start.copy()
        found[self.rows] = self.layers.content_LGC
        return found

    def fronts(
        self, task: ReplanTask, start: SlotArray, finished: SlotArray
    ) -> list[list[tuple[int, float, SlotArray]]]:
        """Points of each layer between start and end, each with more moves and faster than the last."""
        layers, rows = self.layers, self.rows
        target_L = layers.goal_L.copy()
        points: list[list[tuple[int, float, SlotArray]]] = [
            [(moves, 0.0, slots)] for moves, slots in zip(_moves(task, start).tolist(), start, strict=True)
        ]
        if len(rows) == 0:
            return points

        def times(slots: SlotArray) -> FloatArray:
            return np.asarray(even_times(layers.load_LE / LOAD_UNIT, slots[rows], layers.speed_G).max(1))

        def note(time_L: FloatArray, slots: SlotArray, changed_L: BoolArray) -> None:
            moves_L = _moves(task, slots)
            for x in np.flatnonzero(changed_L).tolist():
                row = int(rows[x])
                points[row].append((int(moves_L[row]), max(float(time_L[x]), float(target_L[x])), slots[row]))

        first_L, last_L = times(start), times(finished)
        for row in rows.tolist():
            points[row].clear()
        every_L = np.ones(len(rows), dtype=np.bool_)
        note(first_L, start, every_L)
        note(last_L, finished, every_L)
        settings = self.settings._replace(steps=1)
        for part in _PARTS:
            layers.content_LGC[:] = start[rows]
            layers.reached_L[:] = True
            goal_L = last_L + part * (first_L - last_L)
            while layers.reached_L.any() and not self.stop():
                layers.goal_L[:] = goal_L
                self.worker(layers, settings, STEP, self.stop)
                note(layers.goal_L, self.contents(start), layers.reached_L)
        return [front_of(one) for one in points]
