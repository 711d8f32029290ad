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
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from moeless_opt.problems.arrays import BoolArray, FloatArray, IntArray, SlotArray
from moeless_opt.problems.plan import best_bound, even_times, new_replicas
from moeless_opt.problems.spec import equal_shares
from moeless_opt.solvers.core import NeverStop, Stop
from moeless_opt.solvers.limits import Rules, mended_within
from moeless_opt.solvers.pack import fast
from moeless_opt.solvers.replan import equal_state
from moeless_opt.solvers.replan.equal_state import LOAD_UNIT, REACH, ROUNDS, STEP, EqualSearch, Layers
from moeless_opt.solvers.replan.equal_wide import MANY_PAIRS, replan_equal_wide
from moeless_opt.solvers.replan.live import Content, mend_content, moves_between
from moeless_opt.solvers.replan.task import (
    Point,
    Replanned,
    ReplanTask,
    ReplanWish,
    front_of,
    seated,
    spread_budget,
)

__all__ = ["replan_equal", "warm_equal"]

_ROUNDS = 20  # of destroying and repairing, where none are wished for
_MOST_BACK = 4  # GPUs put back in one of them
_TRIES = 6  # wanted times tried for a layer that cannot reach its own
_PARTS = (0.5, 0.25, 0.1, 0.0)  # of the way to the wanted time, where a budget may end
_ASK = 0.02  # seconds between two questions whether to stop
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
        time has the best time that it found; ``least_moves_L`` is one where the live placement misses it.
    """
    wish, stop = wish or ReplanWish(), stop or NeverStop()
    if task.load_LE.shape[1] * len(task.speed_G) >= MANY_PAIRS:
        if task.rules is None:
            return replan_equal_wide(task, wish, stop=stop)
        if wish.max_moves is None:
            return _wide_within(task, task.rules, wish, stop)
    load, speed = task.load_LE, task.speed_G
    L, E = load.shape
    if wish.bound_L is None:
        bound = best_bound(load, task.capacity_LG, speed, "equal")[0]
    else:
        bound = np.asarray(wish.bound_L, dtype=np.float64)
    base = _mended(task, task.live_LGC, wish.repair)
    start = base if wish.start_LGC is None else _mended(task, wish.start_LGC, wish.repair)
    live = [[frozenset(e for e in row if 0 <= e < E) for row in rows] for rows in task.live_LGC.tolist()]
    forced_L = _moves(live, start)
    wish.check_budget(forced_L)
    target_L = (1.0 + wish.tolerance) * bound
    begun_L = _times(task, start)
    late_L = begun_L > target_L * (1.0 + 1e-9)
    # The worst first: who knows for how many there is time.
    rows = np.argsort((target_L - begun_L) / np.maximum(bound, 1e-300), kind="stable")
    rounds = wish.most_rounds(_ROUNDS)
    worker = _worker(backend, int(late_L.sum()) * float(task.capacity_LG.max()) * len(speed) * (1.0 + rounds))
    search = _Search.of(task, wish, (base, start), rows[late_L[rows]], target_L, worker, stop)
    search.run(rounds)
    contents = search.contents(start)
    if wish.max_moves is not None:
        price = wish.price_L(L)
        if (
            sum(by * moves for by, moves in zip(price, _moves(live, contents).tolist(), strict=True))
            > wish.max_moves
        ):
            fronts = search.fronts(live, start, contents)
            weights = (load.sum(axis=1) / search.mean_L).tolist()
            contents = spread_budget(fronts, weights, price, wish.max_moves)
    return Replanned(
        slots_LGC=(new := seated(task, contents)),
        share_LGC=equal_shares(new, E),
        time_L=_times(task, contents),
        moves_L=_moves(live, contents),
        forced_L=forced_L,
        bound_L=bound,
        target_L=target_L,
        least_moves_L=late_L.astype(np.int64),
        cut_L=search.cut_L,
    )


def _wide_within(task: ReplanTask, rules: list[Rules], wish: ReplanWish, stop: Stop) -> Replanned:
    """Over many GPUs: as without limits, then mended where that breaks one."""
    found = replan_equal_wide(replace(task, rules=None), wish, stop=stop)
    load, speed = task.load_LE, task.speed_G
    contents = [
        mended_within(one, load_E, [[e for e in row if e >= 0] for row in rows], speed)
        for one, load_E, rows in zip(rules, load, found.slots_LGC.tolist(), strict=True)
    ]
    new = seated(task, contents)
    return replace(
        found,
        slots_LGC=new,
        share_LGC=equal_shares(new, load.shape[1]),
        time_L=even_times(load, new, speed).max(axis=1),
        moves_L=new_replicas(new, task.live_LGC, load.shape[1]).sum(axis=(1, 2)),
    )


def _mended(task: ReplanTask, slots_LGC: SlotArray, repair: bool) -> list[Content]:
    """Contents of all layers, mended or refused where they break the rules."""
    speed = task.speed_G.tolist()
    contents = [
        mend_content(load.tolist(), rows.tolist(), room.tolist(), speed, layer, repair)
        for layer, (load, rows, room) in enumerate(
            zip(task.load_LE, slots_LGC, task.capacity_LG, strict=True)
        )
    ]
    if task.rules is None:
        return contents
    return [
        mended_within(rules, load, content, task.speed_G)
        for rules, load, content in zip(task.rules, task.load_LE, contents, strict=True)
    ]


def _free(experts: int, capacity_G: IntArray) -> Rules:
    """The rules of a layer without limits."""
    gpus = len(capacity_G)
    return Rules(
        number=0,
        allowed_EG=np.ones((experts, gpus), dtype=np.bool_),
        pinned_EG=np.zeros((experts, gpus), dtype=np.bool_),
        least_E=np.ones(experts, dtype=np.int64),
        most_E=np.full(experts, gpus),
        total=int(capacity_G.sum()),
        capacity_G=capacity_G,
        domain_G=np.zeros(gpus, dtype=np.int64),
        spread=1,
    )


def _moves(live: Sequence[Sequence[frozenset[int]]], contents: Sequence[Content]) -> IntArray:
    return np.array([moves_between(a, b) for a, b in zip(live, contents, strict=True)], dtype=np.int64)


def _times(task: ReplanTask, contents: Sequence[Content]) -> FloatArray:
    """Largest GPU time of each layer (tokens over speed)."""
    slots = np.stack([_padded(content, task.live_LGC.shape[2]) for content in contents])
    return np.asarray(even_times(task.load_LE, slots, task.speed_G).max(1))


def _padded(content: Content, width: int) -> Any:
    return np.array([[*row, *[-1] * (width - len(row))] for row in content], dtype=np.int32)


# -- the search, layer by layer --------------------------------------------------------------------------


class _Asked:
    """A stop as the plain twin sees it."""

    def __init__(self, stop: Stop) -> None:
        self._stop = stop

    def __getitem__(self, _: int) -> int:
        return int(bool(self._stop()))


Worker = Callable[[Layers, EqualSearch, int, Stop], None]


def _worker(backend: str, work: float) -> Worker:
    """The twin for a backend; "auto" is the compiled one where that costs little against the work."""
    if backend == "auto" and work > _MUCH and fast.available() and _compiled_before():
        return _compiled
    return _compiled if fast.choose_backend(backend) == "numba" else _plain


def _compiled_before() -> bool:
    """Whether the compiled twin is in this process, or in Numba's cache beside its source."""
    folder = Path(os.environ.get("NUMBA_CACHE_DIR") or Path(__file__).parent / "__pycache__")
    return _kernel.cache_info().currsize > 0 or any(folder.rglob(f"*{equal_state.compiled_name()}*.nbc"))


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
    equal_state.search_layers(layers, search, task, 0, 1, _Asked(stop))


def _compiled(layers: Layers, search: EqualSearch, task: int, stop: Stop) -> None:
    """Some layers on each core, none of them with the interpreter's lock."""
    count, told = len(layers.load_LE), np.zeros(1, dtype=np.uint8)
    if count == 0:
        return
    kernel, cores = _kernel(), os.cpu_count() or 1
    step = min(count, cores)
    with ThreadPoolExecutor(max_workers=cores) as pool:
        try:
            told[0] = bool(stop())
            left = {pool.submit(kernel, layers, search, task, first, step, told) for first in range(step)}
            while left:
                done, left = wait(left, timeout=_ASK)
                for one in done:
                    one.result()
                told[0] = told[0] or bool(stop())
        except BaseException:
            told[0] = 1
            raise


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
        begin: tuple[list[Content], list[Content]],
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
        base, slots = (
            np.array([_padded(one[row], C) for row in rows], dtype=np.int64).reshape(n, G, C) for one in begin
        )
        live = task.live_LGC[rows].astype(np.int64)
        free = [_free(E, room_G) for room_G in task.capacity_LG[rows]]
        rules = free if task.rules is None else [task.rules[row] for row in rows]
        # Without limits one table is enough for all layers.
        one_or_all = [_free(E, task.capacity_LG[0])] if task.rules is None or n == 0 else rules
        layers = Layers(
            load_LE=np.rint(load[rows] / mean_L[rows, None] * LOAD_UNIT).astype(np.int64),
            content_LGC=slots,
            capacity_LG=np.ascontiguousarray(task.capacity_LG[rows]),
            least_LE=np.array([rule.least_E for rule in rules], dtype=np.int64).reshape(n, E),
            most_LE=np.array([rule.most_E for rule in rules], dtype=np.int64).reshape(n, E),
            live_LGC=np.where(live < E, live, -1),
            price_LEG=np.ones((1, E, G), dtype=np.int64),
            open_LEG=np.stack([rule.allowed_EG for rule in one_or_all]),
            held_LEG=np.stack([rule.pinned_EG for rule in one_or_all]),
            speed_G=speed.copy(),  # arrays that may not be written to are another type, and compiled anew
            domain_G=np.array(one_or_all[0].domain_G, dtype=np.int64),
            spread_L=np.array([rule.spread for rule in rules], dtype=np.int64),
            replicas_L=np.array([rule.total for rule in rules], dtype=np.int64),
            word_L=np.array([equal_state.first_word(wish.seed, int(row)) for row in rows], dtype=np.uint64),
            base_LGC=base,
            goal_L=target_L[rows] / mean_L[rows],
            price_L=np.zeros(n, dtype=np.int64),
            reached_L=np.zeros(n, dtype=np.bool_),
            cut_L=np.zeros(n, dtype=np.bool_),
        )
        settings = EqualSearch(False, False, 0, _MOST_BACK, _TRIES, 0)
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

    def contents(self, start: list[Content]) -> list[Content]:
        """Experts on each GPU: of the layers that were searched what was found, else the start."""
        found = list(start)
        for row, slots in zip(self.rows.tolist(), self.layers.content_LGC.tolist(), strict=True):
            found[row] = [[e for e in content if e >= 0] for content in slots]
        return found

    def fronts(
        self, live: list[list[frozenset[int]]], start: list[Content], finished: list[Content]
    ) -> list[list[Point]]:
        """Points of each layer between start and end, each with more moves and faster than the last."""
        layers = self.layers
        target_L, speed_G = layers.goal_L.copy(), layers.speed_G
        points: list[list[Point]] = [[] for _ in start]

        def note(x: int, time: float, content: Content) -> None:
            row = int(self.rows[x])
            points[row].append((moves_between(live[row], content), max(time, float(target_L[x])), content))

        def times(contents: list[Content]) -> FloatArray:
            slots = np.array([_padded(contents[row], layers.content_LGC.shape[2]) for row in self.rows])
            return np.asarray(even_times(layers.load_LE / LOAD_UNIT, slots, speed_G).max(1))

        for row, content in enumerate(start):
            points[row] = [(moves_between(live[row], content), 0.0, content)]
        if len(self.rows) == 0:
            return points
        first_L, last_L = times(start), times(finished)
        for x, row in enumerate(self.rows.tolist()):
            points[row].clear()
            note(x, float(first_L[x]), start[row])
            note(x, float(last_L[x]), finished[row])
        settings = self.settings._replace(steps=1)
        begun = np.array([_padded(start[row], layers.content_LGC.shape[2]) for row in self.rows])
        for part in _PARTS:
            layers.content_LGC[:] = begun
            layers.reached_L[:] = True
            goal_L = last_L + part * (first_L - last_L)
            while layers.reached_L.any() and not self.stop():
                layers.goal_L[:] = goal_L
                self.worker(layers, settings, STEP, self.stop)
                contents = self.contents(start)
                for x in np.flatnonzero(layers.reached_L).tolist():
                    note(x, float(layers.goal_L[x]), contents[int(self.rows[x])])
        return [front_of(one) for one in points]
