"""From many placements the best by the order; and small changes, one priority after the other.

A priority's stage makes its figure smaller while those before it stay within what is allowed of them. All
layers are tried at once, each with a change of its own, and each takes or leaves it. Replicas are dropped
many at a time, half as many wherever that goes too far.

Axes: X candidates, L layers, E experts, G GPUs, C slots of a GPU.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import numpy as np

from moeless_opt.problems.arrays import BoolArray, FloatArray, IntArray, SlotArray
from moeless_opt.problems.spec import held_LGE
from moeless_opt.solvers.core import Stop, keeps_limits, random_change
from moeless_opt.solvers.lexicographic.figures import EQUAL, Figures

__all__ = ["Chosen", "best_by_order", "lower_in_turn"]

_STEPS = 400
_PAIRS = 8_000  # experts x GPUs x steps of a stage, about


@dataclass(slots=True)
class Chosen:
    """The best placement of every layer so far, and what the order allows.

    Parameters
    ----------
    slots_LGC : array of int32, shape [L, G, C]
        The placement.
    value : dict of arrays, shape [L]
        Figure of each priority.
    allowed : dict of arrays, shape [L]
        Up to which it may rise for the sake of later ones.
    """

    slots_LGC: SlotArray
    value: dict[str, FloatArray] = field(default_factory=dict)
    allowed: dict[str, FloatArray] = field(default_factory=dict)

    @property
    def limit_L(self) -> FloatArray | None:
        """Times that are allowed; None where balance is no priority."""
        return self.allowed.get("balance")


def best_by_order(figures: Figures, candidates: Iterable[SlotArray], tolerance: float, stop: Stop) -> Chosen:
    """Take, per layer, the best of several placements by the order, passing over those that break a limit.

    All are tables of the same width. Every layer needs a candidate that keeps the limits. Once `stop` says
    so, what was not looked at yet is no candidate any more.
    """
    slots = list(candidates)
    alive_XL = np.stack([keeps_limits(figures.problem, one) for one in slots])
    assert alive_XL.any(0).all()
    # A placement that breaks a limit may even lack an expert: its layer shows another's figures.
    layer_L = np.arange(figures.problem.layers)
    first = np.stack(slots)[alive_XL.argmax(0), layer_L]
    safe = [
        np.where(alive_L[:, None, None], one, first) for one, alive_L in zip(slots, alive_XL, strict=True)
    ]
    found, looked_at = Chosen(first), dict[str, FloatArray]()
    for place, name in enumerate(figures.order):
        value_XL = np.full(alive_XL.shape, np.inf)
        for x, one in enumerate(safe):
            if stop() and (alive_XL & np.isfinite(value_XL)).any(0).all():
                break
            value_XL[x] = figures.figure_L(name, one, found.limit_L)
        best_L = np.where(alive_XL, value_XL, np.inf).min(0)
        found.allowed[name] = allowance(figures, place, best_L, tolerance)
        looked_at[name] = value_XL
        alive_XL &= value_XL <= found.allowed[name] + _hair(found.allowed[name])
    index_L = alive_XL.argmax(0)
    found.slots_LGC = np.stack(slots)[index_L, layer_L]
    found.value = {name: value_XL[index_L, layer_L] for name, value_XL in looked_at.items()}
    return found


def allowance(figures: Figures, place: int, best_L: FloatArray, tolerance: float) -> FloatArray:
    """Up to which a priority may rise for those after it."""
    gives = figures.order[place] == "balance" and place + 1 < len(figures.order)
    return best_L * (1 + (tolerance if gives else 0.0))


def _hair(value_L: FloatArray) -> FloatArray:
    return np.asarray(EQUAL * np.abs(value_L))


def lower_in_turn(
    figures: Figures, chosen: Chosen, tolerance: float, open_L: BoolArray, *, stop: Stop, seed: int
) -> None:
    """Make the placement better, in place, in the layers that are open.

    Parameters
    ----------
    figures : Figures
        The problem and its order.
    chosen : Chosen
        Where to begin.
    tolerance : float
        Share by which balance may rise for those after it.
    open_L : array of bool, shape [L]
        Layers to work on.
    stop : Stop
        Asked before every step.
    seed : int
        For the changes that are drawn.
    """
    rng = np.random.default_rng(seed)
    problem = figures.problem
    steps = int(np.clip(_PAIRS // (problem.experts * problem.topology.gpus), 16, _STEPS))
    for place, name in enumerate(figures.order):
        if stop():
            return
        # A stage looks at its own priority and those before it alone; those after it are counted anew.
        chosen.value[name] = figures.figure_L(name, chosen.slots_LGC, chosen.limit_L)
        if name == "memory":
            _drop(figures, chosen, place, open_L, stop)
        gives = place + 1 < len(figures.order) and name == "balance"
        # What has a tolerance is searched aside: a better best only says what is allowed.
        aside = chosen
        if gives:
            value = {key: value_L.copy() for key, value_L in chosen.value.items()}
            aside = replace(chosen, slots_LGC=chosen.slots_LGC.copy(), value=value)
        for _ in range(steps):
            if stop() or not open_L.any():
                break
            trial = aside.slots_LGC.copy()
            for layer in np.flatnonzero(open_L):
                random_change(rng, trial[layer], problem.capacity_LG[layer], problem.experts)
            _take(figures, aside, place, trial, open_L)
        allowed_L = allowance(figures, place, aside.value[name], tolerance)
        if gives:
            allowed_L = np.minimum(chosen.allowed[name], allowed_L)
            late_L = open_L & (chosen.value[name] > allowed_L + _hair(allowed_L))
            chosen.slots_LGC[late_L], chosen.value[name][late_L] = (
                aside.slots_LGC[late_L],
                aside.value[name][late_L],
            )
        chosen.allowed[name] = np.where(open_L, allowed_L, chosen.allowed[name])
        if name == "survival" and figures.failures is not None and figures.failures.coupled:
            # What all layers together survive stays so; what one of them loses the others may lose, too.
            figures.failures.settle(chosen.slots_LGC)
            chosen.allowed[name] = np.zeros(problem.layers)


def _take(figures: Figures, chosen: Chosen, place: int, trial: SlotArray, open_L: BoolArray) -> BoolArray:
    """Take the layers of a trial that are better in a priority, and no worse than allowed before it."""
    good_L: BoolArray = (
        open_L & (trial != chosen.slots_LGC).any((1, 2)) & keeps_limits(figures.problem, trial)
    )
    value: dict[str, FloatArray] = {}
    # What costs nothing to count goes first; times and traffic only where there is something left to judge.
    for name in sorted(figures.order[: place + 1], key=lambda name: name in ("balance", "traffic")):
        rows = np.flatnonzero(good_L)
        if not len(rows):
            break
        limit_L = None if chosen.limit_L is None else chosen.limit_L[rows]
        value[name] = chosen.value[name].copy()
        value[name][rows] = figures.figure_L(name, trial[rows], limit_L, rows)
        if name == figures.order[place]:
            good_L &= value[name] < chosen.value[name] - _hair(chosen.value[name])
        else:
            good_L &= value[name] <= chosen.allowed[name] + _hair(chosen.allowed[name])
    rows = np.flatnonzero(good_L)
    chosen.slots_LGC[rows] = trial[rows]
    for name, value_L in value.items():
        chosen.value[name][rows] = value_L[rows]
    return np.asarray(good_L)


def _drop(figures: Figures, chosen: Chosen, place: int, open_L: BoolArray, stop: Stop) -> None:
    """Drop replicas while what comes before memory allows it: half of the spare ones, a quarter, ..."""
    problem = figures.problem
    least_LE = np.maximum(problem.spread_LE, problem.limits.min_replicas)
    live_LGE = None if figures.live_LGC is None else held_LGE(figures.live_LGC, problem.experts)
    part_L = np.full(problem.layers, 0.5)
    kept: list[set[tuple[int, int]]] = [set() for _ in range(problem.layers)]  # those that are needed
    todo_L = open_L.copy()
    while todo_L.any() and not stop():
        trial = chosen.slots_LGC.copy()
        gone: dict[int, list[tuple[int, int]]] = {}
        for layer in np.flatnonzero(todo_L).tolist():
            spare = _spare(trial[layer], problem.load_LE[layer], least_LE[layer], live_LGE, layer)
            spare = [pair for pair in spare if pair not in kept[layer]]
            if not spare:
                todo_L[layer] = False
                continue
            most = max(int(part_L[layer] * len(spare)), 1)
            gone[layer] = _dropped(trial[layer], spare, most, least_LE[layer])
        took_L = _take(figures, chosen, place, trial, todo_L)
        for layer, pairs in gone.items():
            if took_L[layer]:
                continue
            if len(pairs) == 1:
                kept[layer].add(pairs[0])
            part_L[layer] /= 2


def _spare(
    slots_GC: SlotArray, load_E: FloatArray, least_E: IntArray, live_LGE: BoolArray | None, layer: int
) -> list[tuple[int, int]]:
    """(GPU, expert) of replicas that could go: those to be loaded first, then light ones."""
    count_E = np.bincount(slots_GC[slots_GC >= 0], minlength=len(load_E))
    pairs = [(int(g), int(slots_GC[g, c])) for g, c in np.argwhere(slots_GC >= 0)]
    return sorted(
        (pair for pair in pairs if count_E[pair[1]] > least_E[pair[1]]),
        key=lambda p: (
            live_LGE is not None and bool(live_LGE[layer, p[0], p[1]]),
            load_E[p[1]] / count_E[p[1]],
            p,
        ),
    )


def _dropped(
    slots_GC: SlotArray, spare: list[tuple[int, int]], most: int, least_E: IntArray
) -> list[tuple[int, int]]:
    """Empty the slots of the first spare replicas, in place, as far as every expert keeps enough."""
    count_E = np.bincount(slots_GC[slots_GC >= 0])
    gone: list[tuple[int, int]] = []
    for gpu, expert in spare:
        if len(gone) == most:
            break
        if count_E[expert] > least_E[expert]:
            count_E[expert] -= 1
            slots_GC[gpu, slots_GC[gpu] == expert] = -1
            gone.append((gpu, expert))
    return gone
