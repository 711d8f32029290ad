"""Re-planning from the live placement with free token shares: move only what pays.

`replan_fractional` treats every layer as a flow problem with a wanted time (`flow`), fills its overflow with
few new replicas (`fill`), improves that by destroying and repairing (`shake`), and hands one budget to the
layers that gain most (`core.knapsack`). A layer that cannot reach the wanted time gets the best time that the
search attains; one whose turn did not come before the search was stopped stays as it is live. Shares are then
re-solved exactly.

A *move* is a pair (expert, GPU) of the new placement that the live one lacks: weights that must be shipped.
Dropping a replica is free.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moeless_opt.problems.errors import SolverUnavailableError
from moeless_opt.problems.plan import best_bound
from moeless_opt.solvers.core import NeverStop, Stop, part_of
from moeless_opt.solvers.limits import Rules, mended_within, rows_of
from moeless_opt.solvers.replan.fill import LIGHT, QUICK, Search, fill_overflow
from moeless_opt.solvers.replan.flow import UNIT, LayerFlow, least_time
from moeless_opt.solvers.replan.live import Content, mend_content, mend_within, moves_between
from moeless_opt.solvers.replan.min_moves import close_moves_bound, flow_moves_bound, min_moves
from moeless_opt.solvers.replan.shake import Shaker
from moeless_opt.solvers.replan.task import (
    Point,
    Replanned,
    ReplanTask,
    ReplanWish,
    front_of,
    seated,
    spread_budget,
)
from moeless_opt.solvers.replan.wide import MANY_GPUS, fill_wide
from moeless_opt.solvers.shares import solve_shares

__all__ = ["replan_fractional"]

_MOST_ROOM = 2.0**60  # more than all tokens; flows are counted in 64 bits
_BISECTIONS = 5  # wanted times tried for a layer that cannot reach the tolerance
_CLOSE = 64  # GPUs up to which every layer gets the closer bound: half a millisecond at 32
_LEAST_TIME = 1.0  # seconds: with less, programmes are not worth the start of their process
_SHAKING = 0.3  # share of the time for rounds before the programmes
_COUNTING = 0.8  # share of what is left then for the first programmes, and again for the second
_FAIR = 3.0  # a layer may take so many times its even share of that
_LADDER = (0.5, 0.25, 0.1)  # parts of the way to the wanted time where a budget may stop


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
    cut: bool = False
    shaker: Shaker | None = None
    rules: Rules | None = None

    def room(self, time: float) -> list[int]:
        """Tokens that each GPU may serve within a time in units of the mean, rounded in its favour."""
        return [int(min(time * UNIT * speed * (1.0 + 1e-10), _MOST_ROOM)) + 2 for speed in self.speed]

    def state(self, time: float) -> LayerFlow:
        return LayerFlow(self.load, self.start, self.capacity, self.room(time), self.rules)


def replan_fractional(
    task: ReplanTask, wish: ReplanWish | None = None, *, search: Search = QUICK, stop: Stop | None = None
) -> Replanned:
    """Move few replicas so that the largest GPU time comes within a tolerance of the best bound.

    Parameters
    ----------
    task : ReplanTask
        Loads and what is live.
    wish : ReplanWish, optional
        Wanted balance, budget and effort.
    search : Search
        How widely each step looks.
    stop : Stop, optional
        When to end with what is there.

    Returns
    -------
    Replanned
        Placement, shares, times, moves and bounds.

    Raises
    ------
    ProblemError
        The live placement breaks a rule and is not to be mended.
    InfeasibleError
        The slots cannot hold every expert, or the budget cannot restore coverage.
    """
    wish, stop = wish or ReplanWish(), stop or NeverStop()
    load, speed = task.load_LE, task.speed_G
    if wish.bound_L is None:
        bound = best_bound(load, task.capacity_LG, speed, "fractional")[0]
    else:
        bound = np.asarray(wish.bound_L, dtype=np.float64)
    mean_L = load.sum(axis=1) / speed.sum()
    layers = []
    for layer in range(len(load)):
        layers.append(_begin(task, layer, mean_L[layer], wish.repair))
        layers[layer].target = (1.0 + wish.tolerance) * float(bound[layer] / (mean_L[layer] or 1.0))
    forced_L = np.array([moves_between(one.live, one.start) for one in layers], dtype=np.int64)
    wish.check_budget(forced_L)
    for one in layers:
        _plan_layer(one, search, stop)
    _improve(layers, wish, stop)
    if wish.max_moves is not None:
        _keep_to_budget(layers, wish.price_L(len(layers)), wish.max_moves, search, stop)
    new = seated(task, [one.content for one in layers])
    shares = solve_shares(load, new, speed)
    return Replanned(
        slots_LGC=new,
        share_LGC=shares.share_LGC,
        time_L=shares.time_L,
        moves_L=np.array([moves_between(one.live, one.content) for one in layers], dtype=np.int64),
        forced_L=forced_L,
        bound_L=bound,
        target_L=(1.0 + wish.tolerance) * bound,
        least_moves_L=np.array([one.least for one in layers], dtype=np.int64),
        cut_L=np.array([one.cut for one in layers]),
    )


# -- one layer -----------------------------------------------------------------------------------------


def _begin(task: ReplanTask, layer: int, mean: float, repair: bool) -> _Layer:
    load_E, slots = task.load_LE[layer], task.live_LGC[layer].tolist()
    load = np.rint(load_E * (UNIT / mean)).astype(np.int64).tolist() if mean > 0.0 else [0] * len(load_E)
    capacity, speed = task.capacity_LG[layer].tolist(), task.speed_G.tolist()
    rules = None if task.rules is None else task.rules[layer]
    start = mend_content(load, slots, capacity, speed, layer, repair)
    if rules is not None:
        start = mend_within(rules, load_E, task.live_LGC[layer], start, task.speed_G)
    live = [frozenset(expert for expert in row if 0 <= expert < len(load)) for row in slots]
    return _Layer(load, capacity, speed, live, start, start, 0.0, rules=rules)


def _plan_layer(one: _Layer, search: Search, stop: Stop) -> None:
    """Reach the wanted time with few moves; else the least time that is found."""
    if stop():
        one.reached, one.cut, one.least = False, True, moves_between(one.live, one.start)
        return
    if len(one.capacity) > MANY_GPUS:
        _plan_wide(one, stop)
        return
    state = one.state(one.target)
    overflow = state.solve()
    one.least = forced = moves_between(one.live, one.start)
    if overflow <= 0:
        return
    if forced == 0:  # the bound counts from a placement that is live
        one.least = flow_moves_bound(state, state.cut())
    one.reached = fill_overflow(state, search, stop=stop) <= 0
    one.content = state.content
    if one.reached:
        if forced == 0 and moves_between(one.live, one.content) > one.least and len(one.speed) <= _CLOSE:
            state = one.state(one.target)
            overflow = state.solve()
            one.least = max(one.least, close_moves_bound(state, state.cut(), overflow))
        return
    # Out of reach: bisect for a time that isn't.
    low, high = one.target, least_time(state, one.speed)
    for _ in range(_BISECTIONS):
        if stop():
            break
        middle = 0.5 * (low + high)
        state = one.state(middle)
        if fill_overflow(state, search, stop=stop) <= 0:
            one.content, high = state.content, middle
        else:
            found = least_time(state, one.speed)
            if found < high:
                one.content, high = state.content, found
            low = middle
        if high - low < 1e-4 * high:
            break
    if stop():
        _cut(one, high)


def _plan_wide(one: _Layer, stop: Stop) -> None:
    """The same over many GPUs: many changes at once, then single ones where those end."""
    forced = moves_between(one.live, one.start)
    room = one.room(one.target)
    one.content, overflow = fill_wide(one.load, one.start, one.capacity, room, stop=stop)
    one.least = max(forced, int(one.content != one.start))
    if one.rules is not None:
        load_E = np.array(one.load, dtype=np.float64)
        one.content = mended_within(one.rules, load_E, one.content, np.array(one.speed))
    elif overflow <= 0:
        return
    state = LayerFlow(one.load, one.content, one.capacity, room, one.rules)
    one.reached = fill_overflow(state, LIGHT, stop=stop) <= 0
    one.content = state.content
    if not one.reached and stop():
        _cut(one, least_time(state, one.speed))


def _cut(one: _Layer, time: float) -> None:
    """Take the moves of a search that was cut short back, where they do not pay yet."""
    one.cut = True
    if time >= least_time(one.state(one.target), one.speed) * (1.0 - 1e-9):
        one.content = one.start


def _improve(layers: list[_Layer], wish: ReplanWish, stop: Stop) -> None:
    """Fewer moves: rounds of destroying and repairing; with time for them, programmes in between."""
    if wish.until_stopped and _LEAST_TIME < stop.remaining < float("inf"):
        _shake(layers, wish.most_rounds(0), wish.seed, part_of(stop, _SHAKING))
        for steps in (1, 2):
            _count(layers, steps, part_of(stop, _COUNTING))
    _shake(layers, wish.most_rounds(0), wish.seed, stop)


def _count(layers: list[_Layer], steps: int, stop: Stop) -> None:
    """Bounds, and plans with fewer moves, by the programme of counts; layers with few moves first."""
    open_ = [one for one in layers if one.reached and moves_between(one.live, one.content) > one.least]
    open_.sort(key=lambda one: moves_between(one.live, one.content))
    for done, one in enumerate(open_):
        if stop():
            return
        wide = max(1, *(len(held) for held in one.live))
        slots = [[*sorted(held), *[-1] * (wide - len(held))] for held in one.live]
        load = np.array(one.load, dtype=np.float64) / UNIT
        try:
            found = min_moves(
                load,
                slots,
                one.capacity,
                np.array(one.speed),
                one.target,
                known=one.content,
                stop=part_of(stop, min(1.0, _FAIR / (len(open_) - done))),
                least=one.least,
                steps=steps,
            )
        except SolverUnavailableError:
            return
        one.least, one.shaker = found.bound, None
        if found.content is not None and found.moves is not None:
            if one.rules is not None and not one.rules.keeps(rows_of(found.content, len(one.load))):
                continue
            state = LayerFlow(one.load, found.content, one.capacity, one.room(one.target))
            if state.solve() <= 0:  # the programme's tolerance is wider than ours
                one.content = found.content


def _shake(layers: list[_Layer], rounds: float, seed: int, stop: Stop) -> None:
    """Destroy and repair, layer by layer in turn, so many rounds or until stopped."""
    if rounds <= 0:
        return
    for layer, one in enumerate(layers):
        if one.reached and one.content is not one.start and one.shaker is None:
            room = one.room(one.target)
            one.shaker = Shaker(
                one.load,
                one.live,
                one.content,
                one.capacity,
                room,
                least=one.least,
                seed=(seed, layer),
                rules=one.rules,
            )
    turn = 0
    active = [one for one in layers if one.shaker is not None and not one.shaker.done]
    while active and turn < rounds and not stop():
        for one in active:
            if stop():
                break
            assert one.shaker is not None
            one.shaker.round(stop)
        turn += 1
        active = [one for one in active if one.shaker is not None and not one.shaker.done]
    for one in layers:
        if one.shaker is not None:
            one.content = one.shaker.content


# -- a budget over all layers --------------------------------------------------------------------------


def _keep_to_budget(layers: list[_Layer], price: list[int], budget: int, search: Search, stop: Stop) -> None:
    """Where all wanted moves cost more than the budget, stop each layer where the whole gains most."""
    spent = sum(by * moves_between(one.live, one.content) for one, by in zip(layers, price, strict=True))
    if spent <= budget:
        return
    fronts = [_frontier(one, search, stop) for one in layers]
    contents = spread_budget(fronts, [sum(one.load) for one in layers], price, budget)
    for one, content in zip(layers, contents, strict=True):
        one.content = content


def _frontier(one: _Layer, search: Search, stop: Stop) -> list[Point]:
    """Points on the way to the wanted time, each with more moves and faster."""
    points: list[Point] = []

    def note(state: LayerFlow) -> None:
        content = [list(row) for row in state.content]
        probe = LayerFlow(one.load, content, one.capacity, state.room)
        time = max(least_time(probe, one.speed), one.target)
        points.append((moves_between(one.live, content), time, content))

    note(one.state(one.target))
    if points[0][1] <= one.target:
        return points
    note(LayerFlow(one.load, one.content, one.capacity, one.room(one.target), one.rules))
    first, last = points[0][1], points[1][1]
    for part in (*_LADDER, 0.0):
        if stop():
            break
        state = one.state(last + part * (first - last))
        fill_overflow(state, search, trace=note, stop=stop)
    return front_of(points)
