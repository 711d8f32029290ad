"""Re-planning from the live placement with free token shares: move only what pays.

`replan_fractional` treats every layer as a flow problem with a wanted time (`replan_flow`), fills its
overflow with few new replicas (`replan_fill`), improves that by destroying and repairing while time is left
(`replan_lns`), and hands one budget to the layers that gain most (`replan_budget`). A layer that cannot
reach the wanted time gets the best time that the search attains. Shares are then re-solved exactly.

A *move* is a pair (expert, GPU) of the new placement that the live one lacks: weights that must be shipped.
Dropping a replica is free.
"""

from __future__ import annotations

import time as clock
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moeless_opt.problems.arrays import FloatArray, IntArray, SlotArray
from moeless_opt.problems.errors import InfeasibleError, ProblemError
from moeless_opt.problems.plan.bounds import best_bound
from moeless_opt.solvers.core.knapsack import choose_points
from moeless_opt.solvers.replan.fill import QUICK, Search, fill_overflow
from moeless_opt.solvers.replan.flow import UNIT, LayerFlow, least_time
from moeless_opt.solvers.replan.min_moves import flow_moves_bound
from moeless_opt.solvers.replan.relabel import seat_all
from moeless_opt.solvers.replan.shake import Shaker, count_moves
from moeless_opt.solvers.replan.wide import MANY, fill_wide
from moeless_opt.solvers.shares.flow import solve_shares

__all__ = ["Replan", "checked", "mend_content", "replan_fractional"]

Content = list[list[int]]

_BISECTIONS = 5  # wanted times tried for a layer that cannot reach the tolerance
_LADDER = (0.5, 0.25, 0.1)  # parts of the way to the wanted time where a budget may stop


@dataclass(frozen=True, slots=True, kw_only=True)
class Replan:
    """A re-plan of all layers.

    Attributes
    ----------
    slots_LGC : int32 array [layers, GPUs, slots]
        New placement. What stays keeps its slot wherever no empty slot would stand between full ones.
    share_LGC : float array [layers, GPUs, slots]
        Optimal token shares.
    time_L : float array [layers]
        Largest GPU time (tokens over speed).
    moves_L : int array [layers]
        Replicas to be shipped.
    forced_L : int array [layers]
        Those of them without which some expert would have no replica.
    bound_L : float array [layers]
        Lower bound on the time of any placement.
    target_L : float array [layers]
        Wanted time, ``(1 + tolerance) * bound``.
    least_moves_L : int array [layers]
        Proven least number of moves that any plan within the wanted time needs.
    """

    slots_LGC: SlotArray
    share_LGC: FloatArray
    time_L: FloatArray
    moves_L: IntArray
    forced_L: IntArray
    bound_L: FloatArray
    target_L: FloatArray
    least_moves_L: IntArray


@dataclass(slots=True)
class _Layer:
    """One layer's work: integer loads, the live placement, the way from there."""

    load: list[int]
    capacity: list[int]
    speed: list[float]
    live: list[frozenset[int]]
    start: Content
    content: Content
    target: float
    least: int = 0
    reached: bool = True
    shaker: Shaker | None = None

    def room(self, time: float) -> list[int]:
        """Tokens that each GPU may serve within a time in units of the mean, rounded in its favour."""
        return [int(time * UNIT * speed * (1.0 + 1e-10)) + 2 for speed in self.speed]

    def state(self, time: float) -> LayerFlow:
        return LayerFlow(self.load, self.start, self.capacity, self.room(time))


def replan_fractional(
    load_LE: Any,
    slots_LGC: Any,
    capacity_LG: Any,
    speed_G: Any = None,
    *,
    tolerance: float = 0.01,
    max_moves: int | None = None,
    cost_L: Sequence[int] | None = None,
    time_limit: float | None = None,
    rounds: int = 0,
    seed: int = 0,
    repair: bool = False,
    bound_L: Any = None,
    search: Search = QUICK,
) -> Replan:
    """Move few replicas so that the largest GPU time comes within a tolerance of the best bound.

    Parameters
    ----------
    load_LE : float array [layers, experts]
        Tokens, not negative.
    slots_LGC : int array [layers, GPUs, slots]
        Live placement, -1 where empty.
    capacity_LG : int array [layers, GPUs]
        SlotArray of each GPU (0 for a GPU that is lost).
    speed_G : float array [GPUs], optional
        Relative speeds, ones by default.
    tolerance : float
        Wanted: largest time at most ``(1 + tolerance) * bound`` in every layer.
    max_moves : int, optional
        Budget over all layers: replicas, or in units of `cost_L`. The summed largest time over the layers is
        made least within it; no layer is balanced further than wanted.
    cost_L : sequence of int, optional
        Cost of a move in each layer, e.g. bytes of a replica. Ones by default.
    time_limit : float, optional
        Seconds that the improvement may take over all layers (thorough mode). Results then depend on the
        machine's speed; `rounds` gives the same result anywhere.
    rounds : int
        Improvement rounds per layer (0: quick mode, unless a time limit is given).
    seed : int
        Seed of the improvement.
    repair : bool
        Mend a live placement that breaks the rules (too many replicas, unknown expert, duplicate, expert
        without a replica) by the least change, instead of refusing it.
    bound_L : float array [layers], optional
        Lower bound to measure against; by default the best known (`problems.bounds.best_bound`).
    search : Search
        How widely each step looks.

    Returns
    -------
    Replan
        Placement, shares, times, moves and bounds.

    Raises
    ------
    ProblemError
        An argument or the live placement is wrong.
    InfeasibleError
        The slots cannot hold every expert, or the budget cannot restore coverage.
    """
    started = clock.monotonic()
    load, slots, capacity, speed = checked(load_LE, slots_LGC, capacity_LG, speed_G)
    if not tolerance >= 0.0:
        raise ProblemError("tolerance", f"is {tolerance}, would need a number of at least 0")
    L = len(load)
    if bound_L is None:
        bound = best_bound(load, capacity, speed, "fractional")[0]
    else:
        bound = np.asarray(bound_L, dtype=np.float64)
    mean_L = load.sum(axis=1) / speed.sum()
    layers = []
    for layer in range(L):
        layers.append(_begin(load[layer], slots[layer], capacity[layer], speed, mean_L[layer], layer, repair))
        layers[layer].target = (1.0 + tolerance) * float(bound[layer] / (mean_L[layer] or 1.0))
    forced_L = np.array([count_moves(one.live, one.start) for one in layers], dtype=np.int64)
    price = [1] * L if cost_L is None else [int(one) for one in cost_L]
    if max_moves is not None:
        needed = int(sum(one * by for one, by in zip(forced_L.tolist(), price, strict=True)))
        if needed > max_moves:
            raise InfeasibleError(
                f"max_moves: {max_moves} cannot give every expert a replica; "
                f"the least budget that would is {needed}"
            )
    for one in layers:
        _plan_layer(one, search)
    _improve(layers, time_limit, rounds, seed, started)
    if max_moves is not None:
        _keep_to_budget(layers, price, max_moves, search)
    new = np.full_like(slots, -1)
    for layer, one in enumerate(layers):
        new[layer] = seat_all(slots[layer].tolist(), one.content)
    shares = solve_shares(load, new, speed)
    return Replan(
        slots_LGC=new,
        share_LGC=shares.share_LGC,
        time_L=shares.time_L,
        moves_L=np.array([count_moves(one.live, one.content) for one in layers], dtype=np.int64),
        forced_L=forced_L,
        bound_L=bound,
        target_L=(1.0 + tolerance) * bound,
        least_moves_L=np.array([one.least for one in layers], dtype=np.int64),
    )


# -- one layer -----------------------------------------------------------------------------------------


def _begin(
    load_E: FloatArray,
    slots_GC: NDArray[Any],
    capacity_G: IntArray,
    speed_G: FloatArray,
    mean: float,
    layer: int,
    repair: bool,
) -> _Layer:
    load = np.rint(load_E * (UNIT / mean)).astype(np.int64).tolist() if mean > 0.0 else [0] * len(load_E)
    capacity, speed = capacity_G.tolist(), speed_G.tolist()
    start = mend_content(load, slots_GC.tolist(), capacity, speed, layer, repair)
    live = [frozenset(expert for expert in row if 0 <= expert < len(load)) for row in slots_GC.tolist()]
    return _Layer(load, capacity, speed, live, start, start, 0.0)


def _plan_layer(one: _Layer, search: Search) -> None:
    """Reach the wanted time with few moves; else the least time that is found."""
    if len(one.capacity) > MANY:
        _plan_wide(one, search)
        return
    state = one.state(one.target)
    overflow = state.solve()
    one.least = forced = count_moves(one.live, one.start)
    if overflow <= 0:
        return
    if forced == 0:  # the bound counts from a placement that is live
        one.least = flow_moves_bound(state, state.cut())
    one.reached = fill_overflow(state, search) <= 0
    one.content = state.content
    if one.reached:
        return
    # Out of reach: bisect for a time that isn't.
    low, high = one.target, least_time(state, one.speed)
    for _ in range(_BISECTIONS):
        middle = 0.5 * (low + high)
        state = one.state(middle)
        if fill_overflow(state, search) <= 0:
            one.content, high = state.content, middle
        else:
            found = least_time(state, one.speed)
            if found < high:
                one.content, high = state.content, found
            low = middle
        if high - low < 1e-4 * high:
            break


def _plan_wide(one: _Layer, search: Search) -> None:
    """The same over many GPUs: many changes at once, then single ones where those end."""
    forced = count_moves(one.live, one.start)
    room = one.room(one.target)
    one.content, overflow = fill_wide(one.load, one.start, one.capacity, room)
    one.least = max(forced, int(one.content != one.start))
    if overflow <= 0:
        return
    state = LayerFlow(one.load, one.content, one.capacity, room)
    one.reached = fill_overflow(state, search) <= 0
    one.content = state.content


def _improve(layers: list[_Layer], time_limit: float | None, rounds: int, seed: int, started: float) -> None:
    """Destroy and repair, layer by layer in turn, until rounds or time run out."""
    if time_limit is None and rounds <= 0:
        return
    last = started + time_limit if time_limit is not None else np.inf
    for layer, one in enumerate(layers):
        if one.reached and one.content is not one.start:
            room = one.room(one.target)
            one.shaker = Shaker(
                one.load, one.live, one.content, one.capacity, room, least=one.least, seed=(seed, layer)
            )
    turn = 0
    active = [one for one in layers if one.shaker is not None and not one.shaker.done]
    while active and (time_limit is not None or turn < rounds) and (rounds <= 0 or turn < rounds):
        for one in active:
            if clock.monotonic() >= last:
                break
            assert one.shaker is not None
            one.shaker.round()
        turn += 1
        active = [one for one in active if one.shaker is not None and not one.shaker.done]
        if clock.monotonic() >= last:
            break
    for one in layers:
        if one.shaker is not None:
            one.content = one.shaker.content


# -- a budget over all layers --------------------------------------------------------------------------


def _keep_to_budget(layers: list[_Layer], price: list[int], budget: int, search: Search) -> None:
    """Where all wanted moves cost more than the budget, stop each layer where the whole gains most."""
    spent = sum(by * count_moves(one.live, one.content) for one, by in zip(layers, price, strict=True))
    if spent <= budget:
        return
    fronts = [_frontier(one, search) for one in layers]
    chosen = choose_points(
        [[point[0] for point in front] for front in fronts],
        [[point[1] * sum(one.load) for point in front] for front, one in zip(fronts, layers, strict=True)],
        price,
        budget,
    )
    for one, front, index in zip(layers, fronts, chosen, strict=True):
        one.content = front[index][2]


def _frontier(one: _Layer, search: Search) -> list[tuple[int, float, Content]]:
    """Points (moves, time, content) on the way to the wanted time, each with more moves and faster."""
    points: list[tuple[int, float, Content]] = []

    def note(state: LayerFlow) -> None:
        content = [list(row) for row in state.content]
        probe = LayerFlow(one.load, content, one.capacity, state.room)
        time = max(least_time(probe, one.speed), one.target)
        points.append((count_moves(one.live, content), time, content))

    note(one.state(one.target))
    if points[0][1] <= one.target:
        return points
    final = LayerFlow(one.load, one.content, one.capacity, one.room(one.target))
    note(final)
    first, last = points[0][1], points[1][1]
    for part in (*_LADDER, 0.0):
        state = one.state(last + part * (first - last))
        fill_overflow(state, search, trace=note)
    points.sort(key=lambda point: point[:2])
    front = points[:1]
    for point in points[1:]:
        if point[1] < front[-1][1] * (1.0 - 1e-9):
            if point[0] == front[-1][0]:
                front[-1] = point
            else:
                front.append(point)
    return front


# -- the live placement --------------------------------------------------------------------------------


def checked(
    load_LE: Any, slots_LGC: Any, capacity_LG: Any, speed_G: Any
) -> tuple[FloatArray, SlotArray, IntArray, FloatArray]:
    """Loads, live slots, capacities and speeds as arrays, or the error that names what is wrong."""
    load = np.asarray(load_LE, dtype=np.float64)
    slots = np.asarray(slots_LGC, dtype=np.int32)
    if load.ndim != 2:
        raise ProblemError("load_LE", f"has {load.ndim} axes, would need 2: layers, experts")
    if not np.isfinite(load).all() or (load < 0).any():
        raise ProblemError("load_LE", "has a negative or non-finite entry, would need tokens of at least 0")
    if slots.ndim != 3 or len(slots) != len(load):
        raise ProblemError("slots_LGC", f"has shape {slots.shape}, would need [{len(load)}, GPUs, slots]")
    L, G, C = slots.shape
    capacity = np.asarray(capacity_LG, dtype=np.int64)
    if capacity.shape != (L, G):
        raise ProblemError("capacity_LG", f"has shape {capacity.shape}, would need [{L}, {G}]")
    if (capacity < 0).any() or (capacity > C).any():
        raise ProblemError(
            "capacity_LG", f"has an entry outside 0..{C}, the slots of the live placement's array"
        )
    speed = np.ones(G) if speed_G is None else np.asarray(speed_G, dtype=np.float64)
    if speed.shape != (G,) or not (speed > 0).all() or not np.isfinite(speed).all():
        raise ProblemError("speed_G", f"would need {G} positive numbers")
    return load, slots, capacity, speed


def mend_content(
    load: list[int],
    slots: list[list[int]],
    capacity: list[int],
    speed: list[float],
    layer: int = 0,
    repair: bool = False,
) -> Content:
    """Contents of each GPU of a live placement, mended or refused where they break the rules.

    Parameters
    ----------
    load : list of int
        Tokens of each expert.
    slots : list of list of int
        Experts on each GPU; entries below 0 are empty.
    capacity : list of int
        SlotArray of each GPU.
    speed : list of float
        Speeds, to place what is missing on the GPU that is least busy for its speed.
    layer : int
        For messages.
    repair : bool
        Mend instead of refusing. Unknown experts and duplicates are dropped; a GPU over its slots drops
        replicas that others have, then its lightest experts; each expert left without a replica gets one,
        on a free slot or that of a replica that others have.

    Returns
    -------
    list of list of int
        Experts on each GPU.
    """
    experts = len(load)
    content: Content = []
    count = [0] * experts
    for gpu, row in enumerate(slots):
        kept: list[int] = []
        for expert in row:
            if expert < 0:
                continue
            wrong = "unknown" if expert >= experts else "held twice" if expert in kept else ""
            if not wrong:
                kept.append(expert)
            elif not repair:
                raise ProblemError(
                    f"slots_LGC[{layer}, {gpu}]",
                    f"expert {expert} is {wrong}; "
                    f"would need distinct experts below {experts} (or repair=True)",
                )
        content.append(kept)
        for expert in kept:
            count[expert] += 1
    for gpu, row in enumerate(content):
        if len(row) > capacity[gpu] and not repair:
            raise ProblemError(
                f"slots_LGC[{layer}, {gpu}]",
                f"holds {len(row)} experts, would need at most its {capacity[gpu]} slots (or repair=True)",
            )
        while len(row) > capacity[gpu]:
            yields = min(row, key=lambda expert: (count[expert] == 1, load[expert] / count[expert], expert))
            row.remove(yields)
            count[yields] -= 1
    missing = [expert for expert in range(experts) if count[expert] == 0]
    if missing and not repair:
        raise ProblemError(
            f"slots_LGC[{layer}]", f"expert {missing[0]} has no replica, would need one (or repair=True)"
        )
    if sum(min(slot, experts) for slot in capacity) < experts:
        raise InfeasibleError(
            f"capacity_LG[{layer}]: {sum(capacity)} slots in all cannot hold {experts} experts, "
            f"{experts - sum(capacity)} more would"
        )
    if not missing:
        return content
    busy = [
        sum(load[expert] / count[expert] for expert in row) / by
        for row, by in zip(content, speed, strict=True)
    ]
    for expert in sorted(missing, key=lambda expert: (-load[expert], expert)):
        gpu = min(
            (gpu for gpu in range(len(content)) if _has_place(content[gpu], capacity[gpu], count)),
            key=lambda gpu: (busy[gpu], gpu),
        )
        if len(content[gpu]) == capacity[gpu]:
            spare = [other for other in content[gpu] if count[other] > 1]
            yields = min(spare, key=lambda other: (load[other] / count[other], other))
            content[gpu].remove(yields)
            count[yields] -= 1
            busy[gpu] -= load[yields] / (count[yields] + 1) / speed[gpu]
        content[gpu].append(expert)
        count[expert] = 1
        busy[gpu] += load[expert] / speed[gpu]
    return content


def _has_place(row: list[int], capacity: int, count: list[int]) -> bool:
    return len(row) < capacity or any(count[expert] > 1 for expert in row)
