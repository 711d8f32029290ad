"""One layer's re-plan with free token shares: add the few replicas that let the overload out.

For a wanted time T the overflow of a layer (`flow`) must become zero. A replica of a captive expert
of a hot group on a cool GPU opens a way out; it usually takes the slot of some replica that the cool GPU can
spare. Each step

1. reads the groups from the minimum cut and ranks changes (expert, GPU, replica that yields) by what they
   should lower the overflow: the least of the expert's load, the group's excess and the room on the GPU, less
   the yielding replica's tokens that its other GPUs cannot take;
2. tries the best few exactly (one maximum flow each) and keeps the best. A change is not tried when its upper
   bound, least(load, excess, room of the cool group), is no better than what is already in hand;
3. where additions gain little, tries exchanges of a captive expert with an unreplicated one (two moves).

Pricing by the duals of the min-max programme looks only at the slowest set of GPUs; the overflow sees all
overloaded groups at once, and a move that empties one of them is worth the same whichever is slowest.

Under limits only changes that keep them are looked at, and where an expert may have no more replicas, or no
fewer, its replicas move and change places instead.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from moeless_opt.solvers.core import NeverStop, Stop
from moeless_opt.solvers.limits import Rules
from moeless_opt.solvers.replan.flow import Cut, ExpertGpu, LayerFlow

__all__ = ["LIGHT", "QUICK", "WIDE", "Change", "Search", "fill_overflow"]


@dataclass(frozen=True, slots=True)
class Change:
    """Pairs added and pairs dropped together, and the overflow that this leaves."""

    overflow: int
    adds: tuple[ExpertGpu, ...]
    drops: tuple[ExpertGpu, ...]


@dataclass(frozen=True, slots=True)
class Search:
    """How widely a step looks: the difference between quick and thorough.

    Attributes
    ----------
    groups, experts, targets : int
        Hot groups, experts of each and cool places that are ranked.
    trials : int
        Changes tried exactly per step (more, when none of them helps).
    exchanges : int
        Exchanges tried exactly per step.
    """

    groups: int = 1
    experts: int = 6
    targets: int = 20
    trials: int = 36
    exchanges: int = 12


QUICK = Search()
LIGHT = Search(experts=2, targets=4, trials=6)  # in rounds, where many cheap tries beat few good ones
WIDE = Search(groups=64, experts=6, targets=1 << 30, trials=60, exchanges=60)
_LARGE = Search(groups=8, experts=4, targets=64, trials=24, exchanges=24)  # where a flow takes a millisecond
_LARGE_FROM = 256  # GPUs


def fill_overflow(
    state: LayerFlow,
    search: Search = QUICK,
    *,
    rng: np.random.Generator | None = None,
    budget: int | None = None,
    trace: Callable[[LayerFlow], None] | None = None,
    stop: Stop | None = None,
) -> int:
    """Change the placement until no token overflows, or no change helps.

    Parameters
    ----------
    state : LayerFlow
        Changed in place.
    search : Search
        How widely to look.
    rng : numpy Generator, optional
        Perturbs the ranking (for restarts); without it the result is the same each time.
    budget : int, optional
        Pairs that may be added.
    trace : callable, optional
        Shown the state after every change.
    stop : Stop, optional
        Asked before every change.

    Returns
    -------
    int
        Overflow that is left.
    """
    stop = stop or NeverStop()
    overflow = state.solve()
    wide = WIDE if state.gpus <= _LARGE_FROM else _LARGE
    added = 0
    while overflow > 0 and not stop():
        cut = state.cut()
        best = _best_change(state, cut, overflow, search, rng)
        if best is None:
            if search is wide:
                break
            best = _best_change(state, cut, overflow, wide, rng)
            if best is None:
                break
        added += len(best.adds)
        if budget is not None and added > budget:
            break
        state.apply(best.adds, best.drops)
        if trace is not None:
            trace(state)
        overflow = state.solve()
    return overflow


def _best_change(
    state: LayerFlow, cut: Cut, overflow: int, search: Search, rng: np.random.Generator | None
) -> Change | None:
    hot = sorted(cut.excess, key=lambda name: (-cut.excess[name], name))[: search.groups]
    if not hot:
        return None
    ways = [(name, _heaviest(state, cut.captive[name], search.experts)) for name in hot]
    places = _places(state, cut, cut.excess[hot[0]])
    best = _best_addition(state, overflow, _rank(state, cut, ways, places, search, rng), search.trials)
    gain = overflow - best.overflow if best else 0
    # An exchange costs two moves: it must gain more than twice as much.
    if 3 * gain < cut.excess[hot[0]]:
        swap = _best_exchange(state, overflow, cut, ways, places, search, 2 * gain)
        if swap is not None:
            best = swap
            gain = overflow - best.overflow
        if state.rules is not None and 3 * gain < cut.excess[hot[0]]:
            best = _best_shift(state, state.rules, overflow, cut, ways, search, best)
    return best


def _heaviest(state: LayerFlow, experts: list[int], count: int) -> list[int]:
    load = state.load
    ranked = sorted([(-load[expert], expert) for expert in experts])[:count]
    return [expert for negative, expert in ranked if negative < 0]


Row = tuple[int, int, int, int, int, int, int]
_LIGHTEST = 3  # unreplicated experts of a GPU that may make way to a third GPU
_THIRDS = 6  # cool places offered to an expert that makes way


def _places(state: LayerFlow, cut: Cut, most: int) -> list[Row]:
    """Cool GPUs that can take a replica, best first, and the expert that yields (-1: a free slot)."""
    home, capacity = state.home, state.capacity
    flow, gpus, arc = cut.flow, state.gpus, state.arcs
    free = [room - used for room, used in zip(state.room, flow[gpus : 2 * gpus], strict=True)]
    places: list[Row] = []
    rules = state.rules
    for gpu, group in cut.group.items():
        own, behind, row = free[gpu], cut.slack[group], state.content[gpu]
        if len(row) < capacity[gpu]:
            places.append((-own if own < most else -most, -behind, -own, 0, own, gpu, -1))
            continue
        for expert in row:
            where = home[expert]
            if len(where) > 1 and (rules is None or rules.permits(home, (), ((expert, gpu),))):
                # What the yielding replica serves must fit on the expert's other GPUs.
                tokens = flow[arc[expert, gpu]]
                harm = 0
                if tokens:
                    harm = tokens + own
                    for other in where:
                        harm -= free[other]
                    if harm < 0:
                        harm = 0
                after = own + tokens
                places.append(
                    (
                        harm - (after if after < most else most),
                        -behind,
                        harm - after,
                        harm,
                        after,
                        gpu,
                        expert,
                    )
                )
    places.sort()
    return places


def _rank(
    state: LayerFlow,
    cut: Cut,
    ways: list[tuple[int, list[int]]],
    places: list[Row],
    search: Search,
    rng: np.random.Generator | None,
) -> list[Row]:
    """Additions, best first: (-gain, -upper bound, -room, -load, expert, GPU, yielding expert or -1)."""
    load, home = state.load, state.home
    places = places[: search.targets]
    rows: list[Row] = []
    for name, experts in ways:
        excess = cut.excess[name]
        for expert in experts:
            most = min(load[expert], excess)
            where = home[expert]
            for _, behind, spare, harm, after, gpu, yields in places:
                if gpu not in where and yields != expert and _permitted(state, expert, gpu, yields):
                    gain = most if most < after else after
                    bound = behind if -behind < most else -most
                    rows.append((harm - gain, bound, spare, -load[expert], expert, gpu, yields))
    if rng is not None and rows:
        factor = rng.uniform(0.7, 1.0, size=len(rows)).tolist()
        rows = [(int(row[0] * by), *row[1:]) for row, by in zip(rows, factor, strict=True)]
    rows.sort()
    return rows


def _permitted(state: LayerFlow, expert: int, gpu: int, yields: int) -> bool:
    """Whether an addition keeps the limits."""
    if state.rules is None:
        return True
    return state.rules.permits(state.home, ((expert, gpu),), ((yields, gpu),) if yields >= 0 else ())


def _best_addition(state: LayerFlow, overflow: int, rows: list[Row], trials: int) -> Change | None:
    best: Change | None = None
    gain = tried = 0
    for _, bound, _, _, expert, gpu, yields in rows:
        if -bound <= gain:
            continue
        if tried >= trials and gain > 0:
            break
        tried += 1
        adds = ((expert, gpu),)
        drops = ((yields, gpu),) if yields >= 0 else ()
        left = state.trial(adds, drops)
        if overflow - left > gain:
            gain, best = overflow - left, Change(left, adds, drops)
            if gain == overflow:
                break
        elif tried > 10 * trials:
            break
    return best


def _best_exchange(
    state: LayerFlow,
    overflow: int,
    cut: Cut,
    ways: list[tuple[int, list[int]]],
    places: list[Row],
    search: Search,
    gain: int,
) -> Change | None:
    """Let an unreplicated expert of a cool GPU make way: to the captive's own slot, or to a third GPU."""
    load, home = state.load, state.home
    thirds = places[:_THIRDS]
    roomy = sorted((-state.free(cut, gpu), gpu) for gpu in cut.group)[: search.targets // 3]
    rows: list[Row] = []
    for name, experts in ways:
        for expert in experts:
            most = min(load[expert], cut.excess[name])
            for free, gpu in roomy:
                own = -free
                bound = min(most, cut.slack[cut.group[gpu]])
                if gpu in home[expert] or bound <= gain:
                    continue
                singles = [(load[other], other) for other in state.content[gpu] if len(home[other]) == 1]
                singles.sort()
                for rank, (weight, other) in enumerate(singles):
                    reach = min(bound, own + weight)
                    for source in home[expert]:
                        if min(bound, load[expert] - weight) > gain:
                            hope = min(reach, load[expert] - weight)
                            rows.append((-hope, -bound, expert, gpu, other, source, expert))
                    if rank >= _LIGHTEST:
                        continue
                    for _, _, _, harm, after, third, yields in thirds:
                        if third != gpu and yields not in (expert, other):
                            hope = reach - harm - max(0, weight - after)
                            if hope > gain:
                                rows.append((-hope, -bound, expert, gpu, other, third, yields))
    # Without any addition to fall back on, look further.
    trials = search.exchanges if gain > 0 else 10 * search.exchanges
    best: Change | None = None
    tried = 0
    for _, bound, expert, gpu, other, third, yields in heapq.nsmallest(trials, rows):
        if -bound <= gain:
            continue
        if tried >= search.exchanges and best is not None:
            break
        tried += 1
        adds = ((expert, gpu), (other, third))
        drops = ((other, gpu), (yields, third)) if yields >= 0 else ((other, gpu),)
        if state.rules is not None and not state.rules.permits(home, adds, drops):
            tried -= 1
            continue
        left = state.trial(adds, drops)
        if overflow - left > gain:
            gain, best = overflow - left, Change(left, adds, drops)
    return best


def _best_shift(
    state: LayerFlow,
    rules: Rules,
    overflow: int,
    cut: Cut,
    ways: list[tuple[int, list[int]]],
    search: Search,
    best: Change | None,
) -> Change | None:
    """Move a replica from a hot GPU, or let it change places with one that may not yield.

    The ways that are left where counts are at their limits: an expert keeps its number of replicas.
    """
    load, home = state.load, state.home
    rows: list[tuple[int, tuple[ExpertGpu, ...], tuple[ExpertGpu, ...]]] = []
    for name, experts in ways:
        for expert in experts:
            most = min(load[expert], cut.excess[name])
            for gpu, group in cut.group.items():
                if gpu in home[expert]:
                    continue
                reach = min(most, cut.slack[group])
                for source in home[expert]:
                    out = (expert, source)
                    if len(state.content[gpu]) < state.capacity[gpu]:
                        rows.append((-reach, ((expert, gpu),), (out,)))
                    for other in state.content[gpu]:
                        if other == expert:
                            continue
                        rows.append((-reach, ((expert, gpu),), (out, (other, gpu))))
                        if source not in home[other]:
                            hope = min(most, max(load[expert] - load[other], 0))
                            back = ((expert, gpu), (other, source))
                            rows.append((-hope, back, (out, (other, gpu))))
    gain = 0 if best is None else (overflow - best.overflow) * 2 // len(best.adds)
    tried = 0
    for negative, adds, drops in sorted(rows):
        if tried >= 10 * search.exchanges:
            break
        if -negative * 2 // len(adds) <= gain or not rules.permits(home, adds, drops):
            continue
        tried += 1
        left = state.trial(adds, drops)
        if (overflow - left) * 2 // len(adds) > gain:
            gain, best = (overflow - left) * 2 // len(adds), Change(left, adds, drops)
    return best
