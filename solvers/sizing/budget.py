"""One budget of replicas over all layers: memory goes to the layers where it buys most.

A replica is worth different amounts in different layers. With ``value[l, k]`` the time of layer l with k
spare replicas, the best way to spend a budget is a multiple-choice knapsack: one k per layer, the smallest
sum of values within the bytes. A dynamic programme over the budget solves it exactly, for curves of any
shape and for layers of different expert size; if all curves are convex and sizes are equal, taking the best
next replica anywhere is exact too, and is used instead.

What a replica really buys is only known once it is packed, and packing every layer with every k would be
slow. The bound max(mean, tau(k)) is known for all k at once (`bounds.tau_curve`) and never too high. So the
programme runs on the bounds, its choice is packed, the bounds at those k are replaced by what was measured,
and so on until it chooses what is measured already: optimism that corrects itself, as in A*. The first
run's optimum is a lower bound for the whole model, whatever the layers get.

Axes: L layers, E experts, G GPUs, C slots of a GPU, K spare replicas, B units of budget.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from moeless_opt.problems.arrays import FloatArray, IntArray, SlotArray
from moeless_opt.problems.errors import InfeasibleError, ProblemError
from moeless_opt.problems.plan import Progress, ProgressCallback, even_times, tau_curve
from moeless_opt.solvers.core import Clock, Stop, choose_points
from moeless_opt.solvers.pack import apportion, improve, pack, trim

__all__ = [
    "BudgetPlan",
    "Redundancy",
    "Spending",
    "bound_curves",
    "plan_budget",
    "redundancy_rows",
    "spend",
]


_ROUNDS = 6

REACHED = 1e-3
"""Distance from perfect balance within which no larger budget is looked at."""


@dataclass(frozen=True, slots=True)
class Spending:
    """How a budget is spent.

    Parameters
    ----------
    spare_L : array of int, shape [L]
        Choice of each layer: its spare replicas.
    value : float
        Sum of the chosen values.
    spent : int
        Cost of the choices.
    exact : bool
        Whether no other spending is better (False only if the budget had to be counted in coarse units).
    """

    spare_L: IntArray
    value: float
    spent: int
    exact: bool


@dataclass(frozen=True, slots=True)
class BudgetPlan:
    """A placement of all layers under one budget.

    Parameters
    ----------
    spare_L : array of int, shape [L]
        Replicas of each layer beyond one per expert.
    slots_LGC : array of int32, shape [L, G, C]
        The placement, -1 in empty slots.
    time_L : array of float, shape [L]
        Largest GPU time of each layer with equal split.
    bound : float
        No placement within the budget has a smaller sum of `time_L`.
    rounds : int
        Runs of the knapsack.
    """

    spare_L: IntArray
    slots_LGC: SlotArray
    time_L: FloatArray
    bound: float
    rounds: int


@dataclass(frozen=True, slots=True)
class Redundancy:
    """One row of a recommendation.

    Parameters
    ----------
    spare : int
        Spare replicas over all layers.
    spare_L : array of int, shape [L]
        Where they go.
    gib : float
        Their memory in GiB, over all GPUs.
    imbalance : float
        Sum of the layers' largest GPU times over the sum of their means: 1 is perfect.
    bound : float
        The least imbalance that any placement within this budget could have.
    uniform : float
        The imbalance with the same spare replicas spent evenly, as engines do; NaN if they can't be.
    """

    spare: int
    spare_L: IntArray
    gib: float
    imbalance: float
    bound: float
    uniform: float


def spend(
    value_LK: FloatArray, budget: int, cost_L: ArrayLike | None = None, *, stop: Stop | None = None
) -> Spending:
    """Choose one k per layer: the least sum of values with ``sum of cost * k`` within the budget.

    Parameters
    ----------
    value_LK : array of float, shape [L, K + 1]
        Value of each layer with 0 to K spare replicas; infinite where impossible. More is no worse: a value
        above one to its left counts as that one.
    budget : int
        Units in all (replicas, or bytes).
    cost_L : array of int, shape [L], optional
        Units per replica of each layer (default 1).
    stop : Stop, optional
        When to be content with a good spending.

    Returns
    -------
    Spending

    Raises
    ------
    InfeasibleError
        If no choice is within the budget.
    """
    L = len(value_LK)
    cost = np.ones(L, dtype=np.int64) if cost_L is None else np.asarray(cost_L, dtype=np.int64)
    if (cost < 1).any():
        raise ProblemError("cost_L", f"has {int(cost.min())}, must be at least 1 in every layer")
    lowest_LK = np.minimum.accumulate(value_LK, axis=1)
    count_K = np.arange(lowest_LK.shape[1])
    found = choose_points([one * count_K for one in cost], list(lowest_LK), int(budget), stop=stop)
    # The least k that has the value chosen: replicas that buy nothing are not bought.
    chosen_L = lowest_LK[np.arange(L), found.point_L]
    spare_L = (lowest_LK <= chosen_L[:, None]).argmax(axis=1)
    return Spending(spare_L, float(chosen_L.sum()), int(cost @ spare_L), found.exact)


def bound_curves(load_LE: ArrayLike, speed_G: ArrayLike, most: int) -> FloatArray:
    """Return the best time each layer could have with 0 to ``most`` spare replicas, shape [L, most + 1]."""
    load = np.asarray(load_LE, dtype=np.float64)
    speed = np.asarray(speed_G, dtype=np.float64)
    mean_L1 = load.sum(axis=1, keepdims=True) / speed.sum()
    curve_LK: FloatArray = np.maximum(tau_curve(load, speed, most, "fractional"), mean_L1)
    return curve_LK


def plan_budget(
    load_LE: ArrayLike,
    speed_G: ArrayLike,
    budget: int,
    *,
    bytes_L: ArrayLike | None = None,
    memory_G: ArrayLike | None = None,
    rounds: int = _ROUNDS,
    tolerance: float = 5e-4,
    stop: Stop | None = None,
) -> BudgetPlan:
    """Spend one budget of spare replicas over all layers, and place them all.

    Parameters
    ----------
    load_LE : array of float, shape [L, E]
        Tokens.
    speed_G : array of float, shape [G]
        Relative speeds.
    budget : int
        Spare replicas in all, or bytes of them if `bytes_L` is given.
    bytes_L : array of int, shape [L], optional
        Bytes of one replica in each layer.
    memory_G : array of int, shape [G], optional
        Bytes of each GPU for all its replicas (after weights of other parts and the KV reserve). Without it
        each GPU gets its even part of the replicas.
    rounds : int
        Most runs of the knapsack.
    tolerance : float
        Stop once the sum of times is within this share of its bound.
    stop : Stop, optional
        When to be content with what is placed; one spending is in any case.

    Returns
    -------
    BudgetPlan

    Raises
    ------
    InfeasibleError
        If one replica of each expert is too much already.
    """
    load = np.ascontiguousarray(load_LE, dtype=np.float64)
    speed = np.asarray(speed_G, dtype=np.float64)
    (L, E), G = load.shape, len(speed)
    size_L = np.ones(L, dtype=np.int64) if bytes_L is None else np.asarray(bytes_L, dtype=np.int64)
    most = int(min(E * (G - 1), 4 * E, budget // int(size_L.min())))
    value_LK = _useful(bound_curves(load, speed, most), G, budget // int(size_L.sum()))
    measured_LK = np.full(value_LK.shape, np.inf)
    memory = None if memory_G is None else np.asarray(memory_G, dtype=np.int64)
    kept: dict[tuple[int, int], SlotArray] = {}
    choice = spend(value_LK, budget, size_L, stop=stop)
    bound = choice.value if choice.exact else float(value_LK.min(axis=1).sum())
    everything = np.minimum(budget // int(size_L.sum()), value_LK.shape[1] - 1)
    run = 0
    for run in range(1, rounds + 1):
        # The last run spends evenly what is left: more to choose from for the packing.
        spare_L = choice.spare_L if run < rounds else np.full(L, everything)
        fresh_L = ~np.isfinite(measured_LK[np.arange(L), spare_L])
        if fresh_L.any():
            slots, time_L = _place(load, speed, spare_L, size_L, memory)
            for layer in np.flatnonzero(fresh_L):
                kept[int(layer), int(spare_L[layer])] = slots[layer]
            measured_LK[np.arange(L), spare_L] = np.minimum(measured_LK[np.arange(L), spare_L], time_L)
            value_LK[np.arange(L), spare_L] = np.maximum(time_L, value_LK[np.arange(L), spare_L])
        best = spend(measured_LK, budget, size_L, stop=stop)
        if best.value <= bound * (1 + tolerance) or not fresh_L.any() or (stop is not None and stop()):
            break
        choice = spend(value_LK, budget, size_L, stop=stop)
    slots, time_L = _assembled(load, speed, best.spare_L, kept, size_L, memory)
    return BudgetPlan(best.spare_L, slots, time_L, bound, run)


def _useful(value_LK: FloatArray, more: int, most: int) -> FloatArray:
    """The curves as far as they fall, and a little on: packing may like a few more to choose from."""
    useful = int((value_LK > value_LK[:, -1:] * (1 + 1e-12)).sum(axis=1).max()) + more
    return value_LK[:, : max(useful, most) + 1].copy()


def _place(
    load: FloatArray, speed: FloatArray, spare_L: IntArray, size_L: IntArray, memory: IntArray | None
) -> tuple[SlotArray, FloatArray]:
    """Pack all layers with so many spare replicas, and keep every GPU within its bytes."""
    (L, E), G = load.shape, len(speed)
    total_L = E + spare_L
    alike = bool((speed == speed[0]).all()) and (memory is None or bool((memory == memory[0]).all()))
    if alike:
        capacity = np.broadcast_to(-(-total_L // G)[:, None], (L, G))
        slots = _packed(load, total_L, capacity, speed)
        slots = _relabelled(slots, size_L)
        used_G = ((slots >= 0).sum(axis=2) * size_L[:, None]).sum(axis=0)
        if memory is None or bool((used_G <= memory).all()):
            return slots, even_times(load, slots, speed).max(axis=1)
    capacity = _slots_by_memory(total_L, size_L, memory if memory is not None else np.full(G, 1 << 62), E)
    slots = _packed(load, total_L, capacity, speed)
    return slots, even_times(load, slots, speed).max(axis=1)


def _assembled(
    load: FloatArray,
    speed: FloatArray,
    spare_L: IntArray,
    kept: dict[tuple[int, int], SlotArray],
    size_L: IntArray,
    memory: IntArray | None,
) -> tuple[SlotArray, FloatArray]:
    """Put the chosen layers of several runs together; pack anew if their bytes do not fit that way."""
    L, G = len(load), len(speed)
    chosen = [kept[layer, int(k)] for layer, k in enumerate(spare_L)]
    slots = np.full((L, G, max(c.shape[1] for c in chosen)), -1, dtype=np.int32)
    for layer, part in enumerate(chosen):
        slots[layer, :, : part.shape[1]] = part
    if bool((speed == speed[0]).all()):
        slots = _relabelled(slots, size_L)
    used_G = ((slots >= 0).sum(axis=2) * size_L[:, None]).sum(axis=0)
    if memory is not None and bool((used_G > memory).any()):
        return _place(load, speed, spare_L, size_L, memory)
    slots = slots[:, :, : max(1, int((slots >= 0).sum(axis=2).max()))]
    return slots, even_times(load, slots, speed).max(axis=1)


def _packed(load: FloatArray, total_L: IntArray, capacity: IntArray, speed: FloatArray) -> SlotArray:
    replicas = trim(load, apportion(load, total_L, (capacity > 0).sum(axis=1)[:, None]), capacity)
    slots = pack(load, replicas, capacity, speed)
    return improve(load, slots, capacity, speed, target=1.0005)


def _relabelled(slots: SlotArray, size_L: IntArray) -> SlotArray:
    """Permute the (equal) GPUs of each layer so that their bytes over all layers are even."""
    used_LG = (slots >= 0).sum(axis=2)
    total_G = np.zeros(used_LG.shape[1], dtype=np.int64)
    result = np.empty_like(slots)
    for layer in np.argsort(-size_L, kind="stable"):
        full = np.argsort(-used_LG[layer], kind="stable")
        free = np.argsort(total_G, kind="stable")
        result[layer, free] = slots[layer, full]
        total_G[free] += used_LG[layer, full] * size_L[layer]
    return result


def _slots_by_memory(total_L: IntArray, size_L: IntArray, memory: IntArray, experts: int) -> IntArray:
    """Share the slots of each layer out by the bytes that the GPUs have left, largest replicas first."""
    L, G = len(total_L), len(memory)
    left_G = memory.astype(np.float64).copy()
    capacity = np.zeros((L, G), dtype=np.int64)
    for layer in np.argsort(-size_L, kind="stable"):
        # Every layer takes the same part of what is left, so the last one still finds room everywhere.
        ideal_G = total_L[layer] * left_G / max(left_G.sum(), 1.0)
        room_G = np.minimum((left_G // size_L[layer]).astype(np.int64), experts)
        take_G = np.minimum(np.floor(ideal_G).astype(np.int64), room_G)
        while take_G.sum() < total_L[layer]:
            wish_G = np.where(take_G < room_G, ideal_G - take_G, -np.inf)
            if not np.isfinite(wish_G.max()):
                short = int((total_L[layer] - take_G.sum()) * size_L[layer])
                raise InfeasibleError(f"memory: a layer needs {short} bytes more than the GPUs have left")
            take_G[int(wish_G.argmax())] += 1
        capacity[layer] = take_G
        left_G -= take_G * size_L[layer]
    return capacity


def redundancy_rows(
    load_LE: ArrayLike,
    speed_G: ArrayLike,
    *,
    bytes_L: ArrayLike | None = None,
    totals: ArrayLike | None = None,
    uniform: bool = True,
    stop: Stop | None = None,
    progress: ProgressCallback | None = None,
) -> list[Redundancy]:
    """Answer how many spare replicas a model is worth, in which layers, and what for.

    Parameters
    ----------
    load_LE : array of float, shape [L, E]
        Tokens.
    speed_G : array of float, shape [G]
        Relative speeds.
    bytes_L : array of int, shape [L], optional
        Bytes of one replica in each layer, for the memory column. All layers alike count replicas.
    totals : array of int, optional
        Totals of spare replicas to look at (default: 0, then half a replica per layer, doubling up to one per
        expert or, within `REACHED`, perfect balance).
    uniform : bool
        Whether to compare with the same number in every layer.
    stop : Stop, optional
        When to be content with the totals looked at so far; one is in any case.
    progress : callable, optional
        Told after each total.

    Returns
    -------
    list of Redundancy
        One row per total, in rising order; none is worse than one with less.
    """
    load = np.ascontiguousarray(load_LE, dtype=np.float64)
    speed = np.asarray(speed_G, dtype=np.float64)
    L, E = load.shape
    size_L = np.ones(L, dtype=np.int64) if bytes_L is None else np.asarray(bytes_L, dtype=np.int64)
    if totals is None:
        half = max(L // 2, 1)
        counts = [0] + [half << i for i in range(20) if half << i <= L * E]
    else:
        counts = sorted(int(t) for t in np.atleast_1d(np.asarray(totals)))
    mean = float(load.sum() / speed.sum()) or 1.0
    rows: list[Redundancy] = []
    began = Clock.begin()
    for total in counts:
        if rows and stop is not None and stop():
            break
        # Replicas are what is counted, so a layer's size does not enter the choice here.
        plan = plan_budget(load, speed, total, stop=stop)
        spare_L, imbalance, even = plan.spare_L, float(plan.time_L.sum()) / mean, np.nan
        if uniform and not (stop is not None and stop()) and total % L == 0:
            even = float(_place(load, speed, np.full(L, total // L), size_L, None)[1].sum()) / mean
            if even < imbalance:
                spare_L, imbalance = np.full(L, total // L), even
        if rows and rows[-1].imbalance <= imbalance:  # a larger budget need not be spent
            spare_L, imbalance = rows[-1].spare_L, rows[-1].imbalance
        rows.append(
            Redundancy(
                total,
                spare_L,
                float(spare_L @ size_L) / 2**30 if bytes_L is not None else float("nan"),
                imbalance,
                plan.bound / mean,
                even,
            )
        )
        if progress is not None:
            time, done = imbalance * mean, len(rows) / len(counts)
            note = f"{total} spare replicas"
            progress(Progress(seconds=began.seconds, best=time, bound=plan.bound, done=done, note=note))
        if totals is None and imbalance <= 1 + REACHED:
            break
    return rows
