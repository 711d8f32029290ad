"""Placements for tokens that go to the nearest replica: from a start, with few moves or with any number.

Local search on changes of one or two replicas (`state`), each judged by the loads that it makes. It runs
compiled where Numba is at hand, without the interpreter's lock, a few layers on each core; the plan is the
same without, and whatever the number of cores.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from moeless_opt.problems.arrays import BoolArray, FloatArray, IntArray, SlotArray
from moeless_opt.problems.plan import gpu_times
from moeless_opt.problems.spec import nearest_shares
from moeless_opt.solvers.core import NeverStop, Stop
from moeless_opt.solvers.limits import Rules
from moeless_opt.solvers.nearest import state as plain
from moeless_opt.solvers.nearest.state import NEAR_UNIT, NearLayers, NearSearch
from moeless_opt.solvers.pack import fast
from moeless_opt.solvers.twins import Asked, in_cache, until_stopped

__all__ = ["NearestFound", "NearestTask", "nearest_times", "search_nearest", "settle_nearest", "warm_nearest"]

_MUCH = 2e5  # experts of all layers times GPUs, from which on loading compiled code pays

Steps = Sequence[tuple[float, int]]
Worker = Callable[[NearLayers, NearSearch, Stop], None]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class NearestTask:
    """Layers to be searched, and where each starts.

    Parameters
    ----------
    load_LE : array of float, shape [L, E]
        Tokens.
    part_LNE : array of float, shape [L, N, E] or [L, N, 1]
        Part of them that comes from each node.
    node_G, speed_G : arrays, shape [G]
        Node and speed of each GPU.
    capacity_LG : array of int, shape [L, G]
        Slots.
    start_LGC : array of int, shape [L, G, C]
        A placement that keeps all rules.
    live_LGC : array of int, shape [L, G, C], optional
        What is live: every other replica is a move. Without, moves are free.
    base_LGC : array of int, shape [L, G, C], optional
        What is live, where it keeps all rules, or what was made of it; the start by default.
    rules : list of Rules, optional
        Limits of each layer.
    full : bool
        Slots that are full at the start stay full.
    first : bool
        Count each of several replicas on a node as the one that all its GPUs send to (see `state`).
    """

    load_LE: FloatArray
    part_LNE: FloatArray
    node_G: IntArray
    speed_G: FloatArray
    capacity_LG: IntArray
    start_LGC: SlotArray
    live_LGC: SlotArray | None = None
    base_LGC: SlotArray | None = None
    rules: list[Rules] | None = None
    full: bool = False
    first: bool = False

    @property
    def mean_L(self) -> FloatArray:
        """Load of each layer over the speed of all GPUs; 1 where there is none."""
        total_L = self.load_LE.sum(1)
        return np.where(total_L > 0, total_L / self.speed_G.sum(), 1.0)

    def rows(self, rows: IntArray) -> NearestTask:
        """Some of the layers."""
        cut: dict[str, Any] = {
            key: None if (value := getattr(self, key)) is None else value[rows]
            for key in ("load_LE", "part_LNE", "capacity_LG", "start_LGC", "live_LGC", "base_LGC")
        }
        return replace(self, **cut, rules=None if self.rules is None else [self.rules[row] for row in rows])


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class NearestFound:
    """What was found.

    Parameters
    ----------
    slots_LGC : array of int32, shape [L, G, C]
        Placement; what stays on a GPU stays in its slot.
    time_L : array, shape [L]
        Largest GPU times (tokens over speed).
    moves_L : array of int, shape [L]
        Replicas that are not live.
    cut_L : array of bool, shape [L]
        Layers that the search was stopped before or in the middle of.
    """

    slots_LGC: SlotArray
    time_L: FloatArray
    moves_L: IntArray
    cut_L: BoolArray


def search_nearest(
    task: NearestTask,
    goal_L: FloatArray,
    *,
    tries: int = 0,
    rounds: int = 0,
    seed: int = 0,
    backend: str = "auto",
    stop: Stop | None = None,
) -> NearestFound:
    """Bring every layer to a wanted time, or as near as the search gets.

    Parameters
    ----------
    task : NearestTask
        The layers.
    goal_L : array, shape [L]
        Wanted largest times.
    tries : int
        Perturbed descents, and then looser times, for layers that miss theirs.
    rounds : int
        Rounds of putting back and repairing, for fewer moves.
    seed : int
        Of these rounds.
    backend : {"auto", "numpy", "numba"}
        Which twin does the work; the plan is the same.
    stop : Stop
        When to end with what there is.
    """
    layers = _layers(task, goal_L, seed)
    L, E = task.load_LE.shape
    worker = _worker(backend, float(L * E * len(task.node_G)))
    worker(layers, NearSearch(task.full, tries, rounds), stop or NeverStop())
    return NearestFound(
        slots_LGC=layers.content_LGC.astype(np.int32),
        time_L=layers.goal_L * task.mean_L,
        moves_L=layers.price_L,
        cut_L=layers.cut_L,
    )


def settle_nearest(
    task: NearestTask,
    bound_L: FloatArray,
    *,
    steps: Steps,
    backend: str = "auto",
    stop: Stop | None = None,
) -> SlotArray:
    """The fastest placement that the search finds from a start, shape [L, G, C].

    Of those within a tolerance, one that is as fast where a node's tokens all go to its first replica.

    Parameters
    ----------
    task : NearestTask
        The layers.
    bound_L : array, shape [L]
        Lower bounds on their times.
    steps : sequence of (float, int)
        Tolerances above the bound that are tried one after the other, and how often each.
    stop : Stop, optional
        When to end with what there is.
    """
    slots_LGC = task.start_LGC
    open_L = np.ones(len(bound_L), dtype=np.bool_)
    for tolerance, tries in steps:
        rows = np.flatnonzero(open_L)
        if not len(rows):
            break
        slots_LGC = slots_LGC.copy()
        goal_L = bound_L * (1 + tolerance)
        for first in (True, False):
            part = replace(task.rows(rows), start_LGC=slots_LGC[rows], first=first)
            turns = 0 if first else tries
            found = search_nearest(part, goal_L[rows], tries=turns, backend=backend, stop=stop)
            was_R, now_R = (nearest_times(part, one) for one in (part.start_LGC, found.slots_LGC))
            better_R = now_R < was_R
            slots_LGC[rows[better_R]] = found.slots_LGC[better_R]
            late_R = np.minimum(was_R, now_R) > goal_L[rows] * (1 + 1e-9)
            rows = rows[late_R]
            if not len(rows):
                break
        open_L = nearest_times(task, slots_LGC) > bound_L * (1 + 1e-9)
    return slots_LGC


def nearest_times(task: NearestTask, slots_LGC: SlotArray) -> FloatArray:
    """Largest GPU time of each layer (tokens over speed) with a placement."""
    share_LGC = nearest_shares(slots_LGC, task.load_LE.shape[1], task.node_G, task.part_LNE)
    return np.asarray(gpu_times(task.load_LE, slots_LGC, share_LGC, task.speed_G).max(1))


def _layers(task: NearestTask, goal_L: FloatArray, seed: int) -> NearLayers:
    """The layers in whole numbers."""
    (L, E), G = task.load_LE.shape, len(task.node_G)
    unit_L = NEAR_UNIT / task.mean_L
    source_LNE = task.load_LE[:, None, :] * task.part_LNE * unit_L[:, None, None]
    one = np.ones((1, E, G), dtype=np.bool_)
    open_LEG, held_LEG = one, ~one
    least_LE, most_LE = np.ones((L, E), dtype=np.int64), np.full((L, E), G, dtype=np.int64)
    spread_LE, replicas_L = np.ones((L, E), dtype=np.int64), task.capacity_LG.sum(1).astype(np.int64)
    domain_G = np.zeros(G, dtype=np.int64)
    rules = task.rules
    if rules is not None and L:
        open_LEG, held_LEG = (
            np.stack([getattr(rule, key) for rule in rules]) for key in ("allowed_EG", "pinned_EG")
        )
        least_LE, most_LE = (
            np.array([getattr(rule, key) for rule in rules], dtype=np.int64) for key in ("least_E", "most_E")
        )
        spread_LE = np.array([rule.spread_E for rule in rules], dtype=np.int64)
        replicas_L = np.array([rule.total for rule in rules], dtype=np.int64)
        domain_G = np.array(rules[0].domain_G, dtype=np.int64)
    nodes = task.part_LNE.shape[1]
    senders_LN = np.zeros((L, nodes), dtype=np.int64)
    if task.first:
        senders_LN = (task.capacity_LG > 0).astype(np.int64) @ (task.node_G[:, None] == np.arange(nodes))
    live_LGC = np.zeros((L, G, 0), dtype=np.int64) if task.live_LGC is None else task.live_LGC
    return NearLayers(
        source_LEN=np.ascontiguousarray(np.rint(source_LNE).astype(np.int64).transpose(0, 2, 1)),
        senders_LN=np.array(senders_LN, dtype=np.int64, order="C"),
        content_LGC=np.array(task.start_LGC, dtype=np.int64, order="C"),
        capacity_LG=np.array(task.capacity_LG, dtype=np.int64, order="C"),
        least_LE=least_LE,
        most_LE=most_LE,
        base_LGC=np.array(
            task.start_LGC if task.base_LGC is None else task.base_LGC, dtype=np.int64, order="C"
        ),
        live_LGC=np.array(np.where(live_LGC < E, live_LGC, -1), dtype=np.int64, order="C"),
        cost_1=np.array([task.live_LGC is not None], dtype=np.int64, order="C"),
        open_LEG=open_LEG,
        held_LEG=held_LEG,
        node_G=np.array(task.node_G, dtype=np.int64, order="C"),
        domain_G=domain_G,
        speed_G=np.array(task.speed_G, dtype=np.float64, order="C"),
        spread_LE=spread_LE,
        replicas_L=replicas_L,
        seed_L=np.arange(L, dtype=np.int64) + 1000003 * (seed % 1000),
        goal_L=np.array(goal_L / task.mean_L, dtype=np.float64, order="C"),
        price_L=np.zeros(L, dtype=np.int64),
        cut_L=np.zeros(L, dtype=np.bool_),
    )


# -- the two twins ---------------------------------------------------------------------------------------


def _worker(backend: str, work: float) -> Worker:
    """The twin for a backend; "auto" is the compiled one where that costs little against the work."""
    if backend == "auto" and fast.available() and work > _MUCH and _compiled_before():
        return _compiled
    return _compiled if fast.choose_backend(backend) == "numba" else _plain


def _compiled_before() -> bool:
    """Whether the compiled twin is in this process or in Numba's cache."""
    return _kernel.cache_info().currsize > 0 or in_cache(plain.compiled_name(), Path(__file__))


def warm_nearest() -> bool:
    """Compile or load the compiled twin; returns whether it could be (whether Numba is there)."""
    if not fast.available():
        return False
    slots_LGC = np.array([[[0], [1]]])
    task = NearestTask(
        load_LE=np.ones((1, 2)),
        part_LNE=np.ones((1, 1, 1)),
        node_G=np.zeros(2, dtype=np.int64),
        speed_G=np.ones(2),
        capacity_LG=np.ones((1, 2), dtype=np.int64),
        start_LGC=slots_LGC,
        live_LGC=slots_LGC,
    )
    search_nearest(task, np.zeros(1), backend="numba")
    return True


def _plain(layers: NearLayers, search: NearSearch, stop: Stop) -> None:
    plain.search_near(layers, search, 0, 1, Asked(stop))


def _compiled(layers: NearLayers, search: NearSearch, stop: Stop) -> None:
    """Some layers on each core, none of them with the interpreter's lock."""
    count, told = len(layers.source_LEN), np.zeros(1, dtype=np.uint8)
    if count == 0:
        return
    kernel, step = _kernel(), min(count, os.cpu_count() or 1)
    until_stopped(
        [functools.partial(kernel, layers, search, first, step, told) for first in range(step)], told, stop
    )


@functools.cache
def _kernel() -> Any:
    from moeless_opt.solvers.nearest import _kernels

    return _kernels.search_near
