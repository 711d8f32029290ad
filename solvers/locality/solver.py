"""Balance first, then nearness: traffic, groups of experts on nodes, and affinity between layers.

From a balanced placement (or a re-plan of what is live) a local search exchanges replicas as long as tokens
pay less for it, within the time that the tolerance of balance allows; shares then keep at home what they can.
Where tokens follow from layer to layer, every other layer is searched beside its neighbours, in turns.
Groups that are kept on a node get the best node of all ways there are, and every node is balanced for itself.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from moeless_opt.problems.arrays import BoolArray, FloatArray, IntArray, SlotArray
from moeless_opt.problems.errors import InfeasibleError, UnsupportedFeatureError
from moeless_opt.problems.plan import (
    Locality,
    Plan,
    hops_L,
    order_of,
    outside_L,
    traffic_L,
)
from moeless_opt.problems.spec import PRIORITIES, Loads, Problem
from moeless_opt.solvers.construct import Construct
from moeless_opt.solvers.core import Bound, Built, FirstOf, Heuristic, MaxTime, Task, one_of, widened
from moeless_opt.solvers.locality.costs import NEAR, Costs, traffic_bound
from moeless_opt.solvers.locality.exact import prove, size_of_model
from moeless_opt.solvers.locality.groups import GroupWays
from moeless_opt.solvers.locality.kept import broken_limit, kept_groups, moves_of
from moeless_opt.solvers.locality.search import LayerSearch, search_near_layers
from moeless_opt.solvers.locality.shares import near_shares, serving_slots, slowest_L
from moeless_opt.solvers.replan import Replan

__all__ = ["LocalityOptions", "LocalitySolver", "locality_of"]

_STEPS = {"quick": 2, "normal": 8, "thorough": 60}  # for each pair of an expert and a GPU
_MOST_STEPS = {"quick": 20_000, "normal": 60_000, "thorough": 500_000}
_LEAST_STEPS = 1_500
_FEW, _TRIES = 200, 8  # pairs of an expert and a GPU up to which a layer is searched several times
_HOTTER = 1.0, 4.0  # thresholds of those, in turns
_DEAR = 0.1  # what a move costs in some of those where moves come first
_STILL = 1  # times that all layers, in turns, stay as they are before more of them are left out
_TURNS = {"quick": 2, "normal": 4, "thorough": 10}  # of all layers, where they depend on each other
_FREE = 1 << 40  # moves, where they are not limited
_OUTSIDE = 1.0  # what a token outside its group's home pays where a limit is to be kept
_LATER = (
    1.002,
    1.01,
    1.02,
    1.035,
    1.055,
    1.08,
    1.12,
    1.18,
    1.3,
    1.6,
    2.2,
)  # times over the bound that are tried for that
_BOXES = 1.0, 1.06, 1.15  # times what each scenario took: in the search it may take more, by the risk not
_COOL, _STRICT = 0.3, 60.0  # threshold and price of lateness where a search ended late
_EQUAL = 1e-9
_ROUNDING = 1e-7  # part of a proven value that it gives up as a bound: the programmes' tolerance
_SMALL, _MIDDLE = 100, 400  # binary variables that are looked at without, and with a time limit
_TINY = 40  # without one, where hops tie the layers
_MANY, _NODES = 600, 900  # such variables of all layers, and nodes of their searches, without one
_LONG = 60.0  # seconds for it where nobody says how many


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalityOptions:
    """Options of `LocalitySolver`: how long to search."""

    effort: str = "normal"

    def __post_init__(self) -> None:
        one_of("effort", self.effort, tuple(_STEPS))


@dataclass(slots=True)
class _Search:
    """What the search of a problem goes by.

    Parameters
    ----------
    limit_L : array, shape [L]
        Tokens over speed that a GPU may have, over several scenarios by the risk.
    limit_TL : array, shape [T, L]
        The same in each scenario, as the search takes it.
    held_L : array of int, shape [L]
        Replicas of each layer.
    most_L : array of int, shape [L]
        Moves of each layer.
    move : float
        What one costs, as a share of a layer's tokens.
    outside : float
        What a token outside its group's home pays beside the order.
    allowed_LEG : array of bool, shape [L, E, G]
    """

    costs: Costs
    limit_L: FloatArray
    limit_TL: FloatArray
    held_L: IntArray
    most_L: IntArray
    move: float
    outside: float
    allowed_LEG: BoolArray

    def slowest_L(self, slots_LGC: SlotArray) -> FloatArray:
        """Largest tokens over speed of each layer, replicas outside the home of a kept group left aside."""
        problem = self.costs.problem
        return slowest_L(problem, serving_slots(problem, slots_LGC, self.costs.away_LEG))

    def shares(self, slots_LGC: SlotArray) -> FloatArray:
        """The shares that go with a placement."""
        return near_shares(self.costs.problem, self.costs, slots_LGC, self.limit_L, self.outside)


class LocalitySolver(Heuristic):
    """Nearness within the balance tolerance.

    Parameters
    ----------
    start_LGC : array, shape [L, G, C], optional
        Where the search begins, in place of the balanced placement; it may be late.
    searches : bool
        Whether there is a search beyond the balanced placement, its shares and what is proven.
    """

    name = "locality"
    summary = "balance, then traffic, groups on nodes and affinity between layers: local search, exact shares"
    Options = LocalityOptions

    def __init__(
        self, name: str | None = None, *, start_LGC: SlotArray | None = None, searches: bool = True
    ) -> None:
        super().__init__(name)
        self._least: dict[str, FloatArray] = {}
        self._start_LGC, self._searches = start_LGC, searches

    def build(self, task: Task[LocalityOptions]) -> Built:
        """Balance, then search."""
        problem = task.problem
        order = _order(problem)
        near = tuple(name for name in order if name in NEAR)
        ways = None if problem.groups is None else [GroupWays(problem, x) for x in range(problem.layers)]
        bound = None if ways is None else _group_bound(problem, ways)
        costs, base = self._base(task, order, near, ways)
        best = self._proven(task, order, costs, replace(base, bound=bound))
        if near and not best.proof and self._searches:
            search = self._limits(task, base, order, costs, ways)
            best, several = base, problem.loads.shape[0] > 1
            judged_by = tuple(name for name in order if name in (*near, "moves"))
            first = judged_by[0] == "moves" and problem.current is not None
            for start_LGC in self._starts(task, near, costs, ways, base):
                ways_on = itertools.product(
                    _rules(problem), _BOXES if several else _BOXES[:1], _tries(problem, near)
                )
                for even, looser, again in ways_on:
                    dear = _DEAR if first and again % 4 > 1 else search.move
                    boxed = replace(search, limit_TL=search.limit_TL * looser, move=dear)
                    found = self._searched(task, boxed, start_LGC, even, again=again)
                    best = _better(judged_by, best, found, search)
            best = replace(best, bound=bound)
        _check_groups(problem, best)
        _check_full(problem, best)
        _check_moves(problem, best)
        return replace(best, stopped_by=task.stop())

    def finished(self, problem: Problem, plan: Plan) -> Plan:
        """The plan with what it says of its locality."""
        return plan.replace(locality=locality_of(problem, plan, self._least))

    def _proven(self, task: Task[Any], order: tuple[str, ...], costs: Costs, best: Built) -> Built:
        """The same with small layers (where hops tie them, models) as the programme proves them best."""
        problem, stop = task.problem, task.stop
        tied = "hops" in order
        most = _MIDDLE if stop.remaining < _LONG else _TINY if tied else _SMALL
        sigma = problem.loads.shape[0] > 1 and problem.objective.risk == "sigma"  # is no linear programme
        if problem.split == "nearest" or sigma or _ties(problem) or _elsewhere(problem) or stop():
            return best
        size, nodes = size_of_model(problem, tied=tied), None
        if size > most:
            return best
        if stop.remaining == np.inf:  # as much work as a second or so, on any machine
            nodes = _NODES if tied else _NODES // problem.layers
            if size * (1 if tied else problem.layers) > _MANY:
                return best
        slots_LGC, share_LGC = best.slots_LGC.copy(), best.shares_LGC.copy()
        bound_L, names = (
            (np.zeros(problem.layers), ("none",) * problem.layers) if best.bound is None else best.bound
        )
        bound_L, name_L = bound_L.copy(), list(names)
        least = {name: np.zeros(problem.layers) for name in order}
        known_L = slowest_L(problem, slots_LGC) if _keeps_all(problem, slots_LGC) else None
        parts = [np.arange(problem.layers)] if tied else [np.array([x]) for x in range(problem.layers)]
        for done, rows in enumerate(parts):
            task.report(np.nan, 0.0, done=done / len(parts), note="proof")
            found = prove(
                problem,
                order,
                costs,
                rows,
                stop=FirstOf(stop, MaxTime(min(stop.remaining, _LONG) / (len(parts) - done))),
                nodes=nodes,
                known_X=None if known_L is None else known_L[rows],
            )
            if found is None:
                return best
            for i, x in enumerate(rows.tolist()):
                slots_LGC[x], share_LGC[x] = _as_slots(problem, x, found.held_XEG[i], found.share_XEG[i])
                name_L[x] = self.name
            launch = problem.time.launch / float(problem.topology.speed_G.max())
            bound_L[rows] = (found.time_X * problem.time.token_cost + launch) * (1 - _ROUNDING)
            for name, value in found.least.items():
                least[name][rows] = value / len(rows)
        self._least = {
            name: least[name] / (float(problem.load_LE.sum()) or 1.0)
            for name in ("traffic", "groups")
            if name in order
        }
        if tied:
            self._least["hops"] = least["hops"]
        text = f"{', '.join(order)}: no plan comes before this one in this order"
        return Built(
            slots_LGC=slots_LGC, share_LGC=share_LGC, bound=(bound_L, tuple(name_L)), message=text, proof=text
        )

    def _starts(
        self, task: Task[Any], near: tuple[str, ...], costs: Costs, ways: list[GroupWays] | None, base: Built
    ) -> list[SlotArray]:
        """Where the search begins: balanced; where groups count most, as well with each at home."""
        problem = task.problem
        if self._start_LGC is not None:
            return [self._start_LGC]
        free = problem.groups is not None and problem.groups.max_outside >= 1 and problem.current is None
        if near[0] != "groups" or not free or ways is None or not all(one.fits_W.any() for one in ways):
            return [base.slots_LGC]
        assert costs.away_LEG is not None
        at_home = kept_groups(task, self.name, _plain(problem, ("balance",)), ways, ("balance",))[0]
        return [base.slots_LGC, at_home]

    def _base(
        self, task: Task[Any], order: tuple[str, ...], near: tuple[str, ...], ways: list[GroupWays] | None
    ) -> tuple[Costs, Built]:
        """Costs, and a balanced placement that keeps the groups as they must be, and moves what it has to."""
        problem = task.problem
        plain = _plain(problem, ("balance", "moves") if "moves" in order else ("balance",))
        if ways is not None and problem.groups is not None and problem.groups.max_outside < 1:
            if problem.groups.max_outside > 0:
                return self._partly(task, plain, near, ways, order)
            slots_LGC, home_LK = kept_groups(task, self.name, plain, ways, order)
            costs = Costs(problem, near, home_LK)
            limit_L = slowest_L(problem, slots_LGC)
            if problem.split == "fractional":
                limit_L = np.zeros(problem.layers)
            return costs, Built(
                slots_LGC=slots_LGC, share_LGC=near_shares(problem, costs, slots_LGC, limit_L)
            )
        costs = Costs(problem, near, None if ways is None else _homes(problem, ways))
        slots_LGC = widened(self._plain_slots(task, plain, order), costs.wide)
        limit_L = slowest_L(problem, slots_LGC)
        return costs, Built(slots_LGC=slots_LGC, share_LGC=near_shares(problem, costs, slots_LGC, limit_L))

    def _plain_slots(self, task: Task[Any], plain: Problem, order: tuple[str, ...]) -> SlotArray:
        """Balanced, with few moves where they count."""
        solver: Heuristic = Construct(self.name)
        if plain.current is not None and ("moves" in order or plain.limits.bounds_moves):
            solver = Replan(self.name)
        return solver.placed(task, plain).slots_LGC

    def _partly(
        self,
        task: Task[Any],
        plain: Problem,
        near: tuple[str, ...],
        ways: list[GroupWays],
        order: tuple[str, ...],
    ) -> tuple[Costs, Built]:
        """Every node holds its groups, balanced for itself; then some tokens go elsewhere, as many as may.

        Where that is not to be had (no room, too many moves), or something is live, from a balanced one.
        """
        problem, groups = task.problem, task.problem.groups
        assert groups is not None
        home_LK, starts = _homes(problem, ways), list[SlotArray]()
        try:
            start_LGC, home_LK = kept_groups(task, self.name, plain, ways, order)
            starts.append(start_LGC)
        except InfeasibleError:
            pass
        costs = Costs(problem, near, home_LK)
        if not starts or problem.current is not None:
            starts.append(widened(self._plain_slots(task, plain, order), costs.wide))
        low_L = np.array([one.least_time(groups.max_outside) for one in ways])
        mean_L = problem.load_LE.sum(1) / np.where(problem.usable_LG, problem.topology.speed_G, 0.0).sum(1)
        low_L, most_L = np.maximum(low_L, mean_L), groups.max_outside * problem.load_LE.sum(1)
        aside = Costs(problem, ("groups",), None)
        aside.away_LEG = costs.away_LEG
        best_LGC = starts[0].copy()
        share_LGC = near_shares(problem, aside, best_LGC, np.zeros(problem.layers), _OUTSIDE)
        open_L = np.ones(problem.layers, dtype=np.bool_)
        sum_L = problem.load_LE.sum(1)
        part_TL = problem.loads.load_TLE.sum(2) / np.where(sum_L > 0, sum_L, 1.0)
        for factor in _LATER:
            for start_LGC in starts:
                free_L = _may_move(problem, moves_of(problem, start_LGC))
                limit_L = low_L * factor
                limits = _Search(
                    aside,
                    limit_L,
                    limit_L * part_TL,
                    _may_hold(problem, start_LGC),
                    free_L,
                    0.0,
                    _OUTSIDE,
                    _all(problem),
                )
                for even in _rules(problem):
                    trial = self._searched(task, limits, start_LGC, even, open_L)
                    trial_share = limits.shares(trial)
                    late_L = limits.slowest_L(trial) > limits.limit_L * (1 + 1e-7)
                    good_L = open_L & ~late_L
                    good_L &= outside_L(problem, trial, trial_share) <= most_L * (1 + _EQUAL)
                    best_LGC[good_L], share_LGC[good_L] = trial[good_L], trial_share[good_L]
                    open_L &= ~good_L
            if not open_L.any() or task.stop():
                break
        return costs, Built(slots_LGC=best_LGC, share_LGC=share_LGC)

    def _best_L(
        self, task: Task[Any], known_L: FloatArray, order: tuple[str, ...], ways: list[GroupWays] | None
    ) -> FloatArray:
        """Tokens over speed of the quickest placement known; few moves have used the tolerance already."""
        problem = task.problem
        if problem.current is None or "moves" not in order:
            return known_L
        groups, limits = problem.groups, problem.limits
        plain = _plain(problem, ("balance",)).replace(
            limits=limits.replace(max_moves=None, max_layer_moves=None, max_move_bytes=None)
        )
        if groups is None or groups.max_outside >= 1:
            slots_LGC = Construct(self.name).placed(task, plain).slots_LGC
        elif groups.max_outside <= 0:
            assert ways is not None
            slots_LGC, home_LK = kept_groups(task, self.name, plain, ways, ("balance",))
            slots_LGC = serving_slots(problem, slots_LGC, Costs(problem, (), home_LK).away_LEG)
        else:
            return known_L
        return np.minimum(known_L, slowest_L(problem, slots_LGC))

    def _limits(
        self,
        task: Task[Any],
        base: Built,
        order: tuple[str, ...],
        costs: Costs,
        ways: list[GroupWays] | None,
    ) -> _Search:
        """How slow a GPU may be, how much may move, and where experts may go."""
        problem, groups = task.problem, task.problem.groups
        whole = groups is not None and groups.max_outside <= 0
        more = 1 + problem.objective.balance_tolerance
        serving_LGC = serving_slots(problem, base.slots_LGC, costs.away_LEG)
        base_L = slowest_L(problem, serving_LGC)
        enough_L = self._best_L(task, base_L, order, ways) * more
        # What limits on moves keep from the tolerance is the best there is; else the base is late as it is.
        late = more if problem.limits.bounds_moves else 1.0
        limit_L = np.where(base_L <= enough_L * (1 + _EQUAL), enough_L, base_L * late)
        limit_TL = _tops(problem, serving_LGC) * np.divide(
            limit_L, base_L, out=np.full_like(limit_L, more), where=base_L > 0
        )
        near_first = min(order.index(name) for name in costs.order)
        move, most_L = 0.0, np.full(problem.layers, _FREE)
        if problem.current is not None:
            count_L = moves_of(problem, base.slots_LGC)
            if "moves" in order and order.index("moves") < near_first:
                most_L = count_L
            else:
                move = 1e-6 if "moves" in order else 0.0
                most_L = _may_move(problem, count_L)
        allowed_LEG = _all(problem) if not whole or costs.away_LEG is None else ~costs.away_LEG
        outside = _OUTSIDE if groups is not None and 0 < groups.max_outside < 1 else 0.0
        held_L = _may_hold(problem, base.slots_LGC)
        return _Search(costs, limit_L, limit_TL, held_L, most_L, move, outside, np.asarray(allowed_LEG))

    def _searched(
        self,
        task: Task[LocalityOptions],
        search: _Search,
        start_LGC: SlotArray,
        even: bool,
        open_L: BoolArray | None = None,
        again: int = 0,
    ) -> SlotArray:
        """The placement that the search ends with; layers that depend on each other in turns."""
        problem, costs, effort = task.problem, search.costs, task.options
        level = getattr(effort, "effort", "normal")
        pairs = problem.experts * problem.topology.gpus
        steps = int(np.clip(_STEPS[level] * pairs, _LEAST_STEPS, _MOST_STEPS[level]))
        slots_LGC = widened(start_LGC, costs.wide).copy()
        tied = "hops" in costs.order
        turns = [np.arange(problem.layers) if open_L is None else np.flatnonzero(open_L)]
        if tied:
            turns = [np.arange(k, problem.layers, 2) for k in (0, 1)] * _TURNS[level]
        same = 0  # turns in a row that changed nothing
        for turn, rows in enumerate(turns):
            if task.stop() or not len(rows) or same == 2 * _STILL:
                break
            share_LGE = None
            if tied:
                share_LGE = costs.shares_of(slots_LGC, search.shares(slots_LGC))
            layers = [_layer(search, x, slots_LGC, share_LGE, even) for x in rows.tolist()]
            hot, seed = _HOTTER[again % 2] if turn < 2 else 0.5, task.seed + turn * 31 + again * 1009
            found = search_near_layers(problem, layers, steps=steps, seed=seed, hot=hot, stop=task.stop)
            trial_LGC = slots_LGC.copy()
            trial_LGC[rows] = np.stack(found)
            late_L = search.slowest_L(trial_LGC) > search.limit_L * (1 + 1e-7)
            if not tied and late_L[rows].any():  # once more from there, with more weight on the limit
                rows = rows[late_L[rows]]
                layers = [_layer(search, x, trial_LGC, share_LGE, even) for x in rows.tolist()]
                trial_LGC[rows] = np.stack(
                    search_near_layers(
                        problem, layers, steps=steps, seed=task.seed, hot=_COOL, heavy=_STRICT, stop=task.stop
                    )
                )
            if tied:  # the next turn builds on layers that are in time
                trial_LGC[late_L] = slots_LGC[late_L]
            same = same + 1 if np.array_equal(trial_LGC, slots_LGC) else 0
            slots_LGC = trial_LGC
            task.report(np.nan, 0.0, done=(turn + 1) / len(turns), note="search")
        return slots_LGC


def _layer(
    search: _Search, row: int, slots_LGC: SlotArray, share_LGE: FloatArray | None, even: bool
) -> LayerSearch:
    costs, problem = search.costs, search.costs.problem
    return LayerSearch(
        row=row,
        start_GC=slots_LGC[row],
        sources=costs.sources(row, share_LGE),
        toll_EG=costs.toll_EG(row, slots_LGC, search.outside),
        allowed_EG=search.allowed_LEG[row],
        limit_T=search.limit_TL[:, row],
        most_held=int(search.held_L[row]),
        move=search.move * float(problem.load_LE[row].sum()),
        most_moves=int(search.most_L[row]),
        even=even,
    )


def _tries(problem: Problem, near: tuple[str, ...]) -> range:
    """How often small layers are searched: with few replicas, ways between good places are barred."""
    pairs = problem.experts * problem.topology.gpus
    return range(1 if "hops" in near or pairs > _FEW else _TRIES)


def _rules(problem: Problem) -> tuple[bool, ...]:
    """By which rules to search: free shares are between the even ones and those by the cheapest way."""
    return {"equal": (True,), "nearest": (False,)}.get(problem.split, (False, True))


def locality_of(problem: Problem, plan: Plan, least: Mapping[str, FloatArray] | None = None) -> Locality:
    """What a plan's tokens pay, and bounds on it.

    Parameters
    ----------
    least : mapping, optional
        What was proven: of traffic and groups as parts of all tokens, of hops as they are, shape [L].
    """
    given = problem, plan.slots_LGC, plan.share_LGC
    traffic, known, tokens = traffic_L(*given), dict(least or {}), float(problem.load_LE.sum())
    traffic_low = np.maximum(traffic_bound(problem), _lower(known.get("traffic"), tokens))
    outside = outside_low = hops = hops_low = None
    if problem.groups is not None:
        outside = outside_L(*given)
        time = problem.time
        launch = time.launch / float(problem.topology.speed_G.max())
        tokens_L = (plan.certificate.value_L - launch) / time.token_cost * (1 + _EQUAL)
        low_L = [
            GroupWays(problem, x).fewest_outside(float(tokens_L[x]), slots=bool(outside[x] > 0))
            for x in range(problem.layers)
        ]
        outside_low = np.minimum(np.maximum(low_L, _lower(known.get("groups"), tokens)), outside)
    if problem.loads.flow_LEE is not None:
        hops = hops_L(*given)
        total, low = float(hops.sum()), float(np.sum(_lower(known.get("hops"), 1.0)))
        hops_low = hops * (min(low / total, 1.0) if total > 0 else 0.0)
    return Locality(
        traffic_L=traffic,
        traffic_bound_L=np.minimum(traffic_low, traffic),
        outside_L=outside,
        outside_bound_L=outside_low,
        hops_L=hops,
        hops_bound_L=hops_low,
    )


def _lower(part_L: FloatArray | None, tokens: float) -> FloatArray | float:
    """A proven value as a bound: a little less, by the programmes' own tolerance."""
    return 0.0 if part_L is None else np.asarray(part_L * tokens * (1 - _ROUNDING))


def _as_slots(
    problem: Problem, row: int, held_EG: BoolArray, share_EG: FloatArray
) -> tuple[SlotArray, FloatArray]:
    """One layer's placement and shares by slot, both [G, C]."""
    gpus, wide = problem.topology.gpus, int(problem.capacity_LG.max())
    slots_GC, share_GC = np.full((gpus, wide), -1, dtype=np.int32), np.zeros((gpus, wide))
    for g in range(gpus):
        experts = np.flatnonzero(held_EG[:, g])
        slots_GC[g, : len(experts)] = experts
        share_GC[g, : len(experts)] = share_EG[experts, g]
    return slots_GC, share_GC


def _order(problem: Problem) -> tuple[str, ...]:
    """The priorities that make a difference here, checked to be ones that this search can follow."""
    order, limits = order_of(problem), problem.limits
    if problem.objective.priorities == PRIORITIES:  # memory is left to the sizing, as everywhere
        order = tuple(name for name in order if name != "memory")
    if order[0] != "balance" or "memory" in order:
        raise UnsupportedFeatureError(
            f"objective.priorities: {', '.join(order)} is not supported by solver 'locality', which takes "
            "balance first, then moves, traffic, groups and hops in any order"
        )
    if problem.objective.horizon is not None:
        raise UnsupportedFeatureError(
            "objective.horizon: is not supported by solver 'locality'; leave it out"
        )
    if limits.max_move_seconds is not None:
        raise UnsupportedFeatureError(
            "limits.max_move_seconds: is not supported by solver 'locality'; max_moves and max_move_bytes are"
        )
    groups, several = problem.groups, problem.loads.shape[0] > 1
    if several and groups is not None and 0 < groups.max_outside < 1 and problem.split == "fractional":
        raise UnsupportedFeatureError(
            "groups.max_outside: a share between 0 and 1 is not supported together with several scenarios "
            "and free shares, which are other ones in each scenario; 0 and 1 are"
        )
    return order


def _plain(problem: Problem, order: tuple[str, ...]) -> Problem:
    """The problem of balance, and moves, alone."""
    return problem.replace(
        groups=None,
        topology=problem.topology.replace(cost_GG=None),
        objective=problem.objective.replace(priorities=order),
        known=None,
    )


def _all(problem: Problem) -> BoolArray:
    return np.ones((problem.layers, problem.experts, problem.topology.gpus), dtype=np.bool_)


def _tops(problem: Problem, slots_LGC: SlotArray) -> FloatArray:
    """The same in each scenario, shape [T, L]; where the worst counts, that in all."""
    loads, value_L = problem.loads, slowest_L(problem, slots_LGC)
    if loads.shape[0] == 1:
        return value_L[None]
    if problem.objective.risk == "worst":
        return np.repeat(value_L[None], loads.shape[0], axis=0)
    found = []
    for t in range(loads.shape[0]):
        by_node = None if loads.load_TLNE is None else loads.load_TLNE[t : t + 1]
        one = Loads(load_TLE=loads.load_TLE[t : t + 1], layers=loads.layers, load_TLNE=by_node)
        plain = problem.objective.replace(priorities=("balance",))
        found.append(slowest_L(problem.replace(loads=one, objective=plain, known=None), slots_LGC))
    return np.stack(found)


def _ties(problem: Problem) -> bool:
    """Whether a limit is on several layers together: what each may use is not proven."""
    limits = problem.limits
    total = limits.max_moves, limits.max_move_bytes, limits.max_total_replicas, limits.max_total_bytes
    return problem.layers > 1 and any(limit is not None for limit in total)


def _keeps_all(problem: Problem, slots_LGC: SlotArray) -> bool:
    """Whether a balanced placement keeps all rules, so that the best time is not above its own."""
    return problem.groups is None and problem.loads.shape[0] == 1 and broken_limit(problem, slots_LGC) is None


def _elsewhere(problem: Problem) -> bool:
    """Whether kept groups may need replicas elsewhere, which in no scenario may serve: is not proven."""
    groups, limits = problem.groups, problem.limits
    if groups is None or groups.max_outside >= 1 or problem.loads.shape[0] == 1:
        return False
    return bool(limits.pinned or limits.spread > 1 or limits.min_replicas > 1 or problem.fill != "none")


def _may_hold(problem: Problem, slots_LGC: SlotArray) -> IntArray:
    """Replicas that each layer may hold: those of the base, and an even part of what the limits leave."""
    limits, size_L = problem.limits, problem.bytes_L
    held_L = (slots_LGC >= 0).sum((1, 2))
    most_L = problem.capacity_LG.sum(1)
    if limits.max_layer_replicas is not None:
        most_L = np.minimum(most_L, limits.max_layer_replicas)
    if limits.max_total_replicas is not None:
        spare = max(limits.max_total_replicas - int(held_L.sum()), 0)
        most_L = np.minimum(most_L, held_L + spare // problem.layers)
    if limits.max_total_bytes is not None and size_L.any():
        spare = max(limits.max_total_bytes - int(held_L @ size_L), 0)
        most_L = np.minimum(most_L, held_L + spare // int(size_L.sum()))
    return np.asarray(most_L, dtype=np.int64)


def _may_move(problem: Problem, count_L: IntArray) -> IntArray:
    """Moves that each layer may make: those of the base, and an even part of what the limits leave."""
    limits, layers = problem.limits, problem.layers
    left = [_FREE]
    if limits.max_moves is not None:
        left.append((limits.max_moves - int(count_L.sum())) // layers)
    if limits.max_move_bytes is not None and problem.bytes_L.any():
        left.append((limits.max_move_bytes - int(count_L @ problem.bytes_L)) // int(problem.bytes_L.sum()))
    most_L = count_L + max(min(left), 0)
    if limits.max_layer_moves is not None:
        most_L = np.minimum(most_L, limits.max_layer_moves)
    return np.asarray(most_L)


def _group_bound(problem: Problem, ways: list[GroupWays]) -> Bound | None:
    """Time that no plan beats which keeps the groups as the problem wants them."""
    groups, time = problem.groups, problem.time
    assert groups is not None
    if groups.max_outside >= 1:
        return None
    token_L = np.array([one.least_time(groups.max_outside) for one in ways])
    launch = time.launch / float(problem.topology.speed_G.max())
    return (token_L * time.token_cost + launch) * (1 - _EQUAL), ("groups",) * problem.layers


def _check_groups(problem: Problem, best: Built) -> None:
    """Refuse where more tokens are served outside their group's home than may be."""
    groups, total_L = problem.groups, problem.load_LE.sum(1)
    if groups is None or groups.max_outside >= 1:
        return
    part_L = outside_L(problem, best.slots_LGC, best.shares_LGC) / np.where(total_L > 0, total_L, 1.0)
    if (part_L > groups.max_outside + 1e-6).any():
        row = int(part_L.argmax())
        raise InfeasibleError(
            f"groups.max_outside: is {groups.max_outside:g}; in layer {problem.loads.layers[row]} the other "
            f"rules leave no plan with less than {part_L[row]:.4g} served outside, as far as was looked"
        )


def _check_full(problem: Problem, best: Built) -> None:
    """Refuse where only experts of other nodes are left for some slots, and would serve there."""
    groups, serves = problem.groups, problem.split != "fractional" or problem.loads.shape[0] > 1
    if problem.fill == "none" or not serves or groups is None or groups.max_outside > 0:
        return
    lacks_LG = problem.capacity_LG > (best.slots_LGC >= 0).sum(2)
    if problem.topology.nodes > 1 and lacks_LG.any():
        row, gpu = (int(i) for i in np.argwhere(lacks_LG)[0])
        raise InfeasibleError(
            f"fill: GPU {gpu} has more slots in layer {problem.loads.layers[row]} than groups at home on its "
            "node have experts for, as far as was looked; must be 'none', or groups.max_outside above 0"
        )


def _check_moves(problem: Problem, best: Built) -> None:
    """Refuse where groups that come home move more than may."""
    if problem.groups is None or problem.current is None or not problem.limits.bounds_moves:
        return
    over = broken_limit(problem, best.slots_LGC)
    if over is not None:
        raise InfeasibleError(
            f"limits.{over[0]}: is {getattr(problem.limits, over[0])}; with the groups kept on a node "
            f"{over[1]} are needed, as far as was looked"
        )


def _homes(problem: Problem, ways: list[GroupWays]) -> IntArray:
    """The node of each group by which the search goes, near what is live, shape [L, K]."""
    if problem.current is None:
        return np.stack([one.best(whole=False) for one in ways])
    fronts = [one.front(problem.objective.balance_tolerance) for one in ways]
    return np.stack(
        [
            front[-1].node_K if front else one.best(whole=False)
            for front, one in zip(fronts, ways, strict=True)
        ]
    )


def _better(order: tuple[str, ...], base: Built, found_LGC: SlotArray, search: _Search) -> Built:
    """What was found, in the layers where it is better by the order and in time; the base elsewhere.

    Layers that depend on each other are taken or left together.
    """
    problem = search.costs.problem
    figures: dict[str, Callable[[Problem, SlotArray, FloatArray], FloatArray]] = {
        "traffic": traffic_L,
        "groups": outside_L,
        "hops": hops_L,
        "moves": lambda problem, slots_LGC, _: moves_of(problem, slots_LGC).astype(np.float64),
    }
    found = Built(slots_LGC=found_LGC, share_LGC=search.shares(found_LGC))
    bad_L = search.slowest_L(found_LGC) > search.limit_L * (1 + 1e-7)
    if problem.groups is not None and problem.groups.max_outside < 1:
        most_L = problem.groups.max_outside * problem.load_LE.sum(1) + _EQUAL * problem.load_LE.sum(1)
        bad_L |= outside_L(problem, found.slots_LGC, found.shares_LGC) > most_L
    take_L, equal_L = np.zeros(problem.layers, dtype=np.bool_), ~bad_L
    for name in order:
        old_L, new_L = (figures[name](problem, one.slots_LGC, one.shares_LGC) for one in (base, found))
        if "hops" in order:
            if bad_L.any():
                return base
            old_L, new_L = (np.full_like(part, part.sum()) for part in (old_L, new_L))
        hair_L = _EQUAL * np.maximum(old_L, new_L)
        take_L |= equal_L & (new_L < old_L - hair_L)
        equal_L &= np.abs(new_L - old_L) <= hair_L
    pick = take_L[:, None, None]
    return Built(
        slots_LGC=np.where(pick, found.slots_LGC, base.slots_LGC),
        share_LGC=np.where(pick, found.shares_LGC, base.shares_LGC),
    )
