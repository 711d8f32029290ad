"""Several load scenarios: what a placement is worth over all of them, and the best of several placements.

Shares follow the traffic, and move no weights: a placement is judged by the best shares in every scenario,
and the times are taken together by the problem's risk measure.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import combinations, combinations_with_replacement
from math import comb

import numpy as np

from moeless_opt.problems.arrays import BoolArray, FloatArray, IntArray, SlotArray
from moeless_opt.problems.errors import InfeasibleError
from moeless_opt.problems.plan import gpu_risk, gpu_times, new_replicas, risk
from moeless_opt.problems.spec import (
    TOKENS,
    Fill,
    Limits,
    Loads,
    Problem,
    Risk,
    equal_shares,
    nearest_shares,
)
from moeless_opt.solvers.core.chain import chained
from moeless_opt.solvers.core.entries import in_entries
from moeless_opt.solvers.core.placing import keeps_limits, random_change, widened
from moeless_opt.solvers.core.risk_descent import STEPS as STEPS_DOWN
from moeless_opt.solvers.core.risk_descent import descend_even
from moeless_opt.solvers.core.slack import without_slack
from moeless_opt.solvers.core.stopping import Stop
from moeless_opt.solvers.shares import ReplicaGraph, covariance_shares, solve_shares

__all__ = [
    "MOST_SCENARIOS",
    "best_over_scenarios",
    "descents",
    "guises",
    "one_split",
    "perfect_tokens",
    "risk_L",
    "scenario_shares",
    "scenario_split",
    "settle_small",
]

MOST_SCENARIOS = 8
"""Scenarios that a placement of their own is made for, the heaviest first."""

SMALL = 128
"""Experts x GPUs of a layer up to which the risk itself is searched."""
STEPS = {"fractional": 300, "equal": 600, "nearest": 600}
"""Changes tried of each such layer: shares that are free take longer to find."""
NEAR = {"fractional": 1e-2, "equal": 2e-3, "nearest": 1e-2}
"""Distance from a perfect balance at which a layer is descended no further; free shares level the rest."""
THRESHOLD = 0.2
"""Share by which a first change may raise the risk."""

ALL = slice(None)
FEW = 20_000
"""Placements of a layer up to which all of them are looked at, with even shares on GPUs that are alike."""
_NEAR = 1e-3
_EQUAL = 1e-9


def risk_L(problem: Problem, slots_LGC: SlotArray, rows: IntArray | slice = ALL) -> FloatArray:
    """Largest tokens over speed with the best shares in every scenario, by the problem's risk, shape [L].

    By the covariance with the best shares for all scenarios together.

    Parameters
    ----------
    problem : Problem
        Loads, speeds, split and risk.
    slots_LGC : array of int32, shape [L, G, C]
        A placement of some of its layers.
    rows : array of int or slice
        Which ones; all by default.
    """
    speed_G, load_TLE = problem.topology.speed_G, problem.loads.load_TLE[:, rows]
    weight_T, wish = problem.loads.weight_T, problem.objective
    if problem.split != "fractional" or one_split(problem):
        if problem.split == "nearest":
            each = [_near(problem, slots_LGC, t, rows) for t in range(len(load_TLE))]
        elif problem.split == "equal":
            each = [equal_shares(slots_LGC, problem.experts)] * len(load_TLE)
        else:
            each = [scenario_split(problem, slots_LGC, rows)] * len(load_TLE)
        pairs = zip(load_TLE, each, strict=True)
        time_TLG = np.array([gpu_times(load_LE, slots_LGC, one, speed_G) for load_LE, one in pairs])
        top_TL = gpu_risk(time_TLG, weight_T, wish).max(2)
    else:
        graph = ReplicaGraph(slots_LGC, speed_G, problem.experts)
        found = [solve_shares(load_LE, graph) for load_LE in load_TLE]
        top_TL = np.array([one.time_L for one in found])
        if problem.share_entries is not None:
            plain = problem.replace(time=TOKENS)
            share_TLGC = [
                in_entries(plain, load_LE, slots_LGC, one.share_LGC)
                for load_LE, one in zip(load_TLE, found, strict=True)
            ]
            pairs = zip(load_TLE, share_TLGC, strict=True)
            top_TL = np.array([gpu_times(load_LE, slots_LGC, one, speed_G).max(1) for load_LE, one in pairs])
    return risk(top_TL, weight_T, wish)


def one_split(problem: Problem) -> bool:
    """Whether free shares are the same in all scenarios: how far a GPU strays is asked of given shares."""
    return problem.loads.shape[0] > 1 and problem.objective.risk == Risk.COVARIANCE


def scenario_split(problem: Problem, slots_LGC: SlotArray, rows: IntArray | slice = ALL) -> FloatArray:
    """Free shares for all scenarios together, of least covariance risk, of some layers: shape [L, G, C]."""
    load_TLE, speed_G = problem.loads.load_TLE[:, rows], problem.topology.speed_G
    sigma = problem.objective.sigma
    share_LGC = covariance_shares(load_TLE, slots_LGC, speed_G, problem.loads.weight_T, sigma)
    if problem.share_entries is None:
        return share_LGC
    return in_entries(problem.replace(time=TOKENS), problem.load_LE[rows], slots_LGC, share_LGC)


def scenario_shares(problem: Problem, slots_LGC: SlotArray, share_LGC: FloatArray) -> FloatArray | None:
    """The shares of every scenario by which a placement is judged, shape [T, L, G, C].

    None where there is one scenario, an even split, one for all scenarios, or one by the nearest replica
    whose tokens come from the same places in every scenario. Least are the tokens over speed; where time is
    more than tokens, a layer keeps the plan's own shares in a scenario where they are faster.
    """
    loads, speed_G, time = problem.loads, problem.topology.speed_G, problem.time
    if loads.shape[0] == 1 or problem.split == "equal" or (problem.split != "nearest" and one_split(problem)):
        return None
    if problem.split == "nearest":
        if loads.load_TLNE is None:
            return None
        return np.array([_near(problem, slots_LGC, t) for t in range(loads.shape[0])])
    graph = ReplicaGraph(slots_LGC, speed_G, problem.experts)
    share_TLGC = np.array([solve_shares(load_LE, graph).share_LGC for load_LE in loads.load_TLE])
    if not time.counts_tokens_only:
        for load_LE, best_LGC in zip(loads.load_TLE, share_TLGC, strict=True):
            own_L, best_L = (
                gpu_times(load_LE, slots_LGC, part, speed_G, time).max(1) for part in (share_LGC, best_LGC)
            )
            best_LGC[own_L < best_L] = share_LGC[own_L < best_L]
    return share_TLGC


def _near(problem: Problem, slots_LGC: SlotArray, scenario: int, rows: IntArray | slice = ALL) -> FloatArray:
    """Shares by the nearest replica in a scenario, of some of the layers."""
    part_LNE = problem.source_parts(scenario)[rows]
    return nearest_shares(slots_LGC, problem.experts, problem.topology.node_G, part_LNE)


def perfect_tokens(problem: Problem) -> FloatArray:
    """Tokens over speed of a perfect balance, by the problem's risk, shape [L]; dead GPUs serve none."""
    loads = problem.loads
    speed_L = problem.usable_LG @ problem.topology.speed_G
    return risk(loads.load_TLE.sum(2) / speed_L, loads.weight_T, problem.objective)


def guises(problem: Problem) -> Iterator[Problem]:
    """The problem with one scenario at a time: expected loads, the envelope, then the heaviest ones.

    By the covariance also every expert's mean and so many deviations of its own.

    A problem of one scenario is its own guise.
    """
    loads = problem.loads
    if loads.shape[0] == 1:
        yield problem
        return
    limits = problem.limits
    if isinstance(limits.spread_experts, int):  # the hottest by all scenarios, whatever one of them says
        hot = np.argwhere(problem.spread_LE > 1).tolist()
        limits = limits.replace(spread_experts=tuple((loads.layers[x], e) for x, e in hot))
    weight_T = np.ones(loads.shape[0]) if loads.weight_T is None else loads.weight_T
    heaviest = np.argsort(-weight_T, kind="stable")[:MOST_SCENARIOS]
    for t, load_LE in (
        (None, loads.load_LE),
        (None, loads.load_TLE.max(0)),
        *([(None, _strayed(problem))] if one_split(problem) else []),
        *((int(t), loads.load_TLE[t]) for t in heaviest),
    ):
        if load_LE.any() or (t is None and not loads.load_TLE.any()):  # of idle scenarios one stands for all
            by_node = None
            if problem.split == "nearest" and loads.load_TLNE is not None:
                by_node = (problem.source_parts(t) * load_LE[:, None, :])[None]
            one = Loads(
                load_TLE=load_LE[None],
                layers=loads.layers,
                skipped=loads.skipped,
                load_TLNE=by_node,
                flow_LEE=loads.flow_LEE,
            )
            yield problem.replace(loads=one, known=None, limits=limits)


def _strayed(problem: Problem) -> FloatArray:
    """Every expert's risk by itself, shape [L, E]."""
    loads = problem.loads
    flat_TX = loads.load_TLE.reshape(loads.shape[0], -1)
    return risk(flat_TX, loads.weight_T, problem.objective).reshape(loads.shape[1:])


def best_over_scenarios(
    problem: Problem, build: Callable[[Problem], SlotArray], *, stop: Stop, moves: bool = False
) -> SlotArray:
    """The best, by the problem's risk, of the placements that are built for each of its guises.

    Parameters
    ----------
    problem : Problem
        With one scenario or several; of one, what is built is returned.
    build : callable
        Guise -> placement, shape [L, G, C]; where it is infeasible for a guise it is passed over.
    stop : Stop
        Asked between guises.
    moves : bool
        Whether, within the balance tolerance of the best, fewer moves from what is live are better.

    Returns
    -------
    array of int32, shape [L, G, C]
        Per layer the best; where limits tie the layers together, the one that is best as a whole.
    """
    live = problem.current if moves else None
    several = problem.loads.shape[0] > 1
    free = several and live is None and not _coupled(problem) and problem.sizing.policy in ("slots", "fill")
    chains: list[SlotArray] = []
    near_XL = np.zeros((0, problem.layers), dtype=np.bool_)
    if free and problem.split == "fractional" and not stop():
        chains, near_XL = _chained(problem)
        if near_XL.any(0).all():  # nothing is better by more than a hair, nor bears other loads as well
            slots_LGC = np.asarray(np.stack(chains)[near_XL.argmax(0), np.arange(problem.layers)])
            settle_small(problem, slots_LGC, stop)
            return slots_LGC
    if free and problem.split == "equal" and (tiny_LGC := _enumerated(problem, stop)) is not None:
        return tiny_LGC
    tables = _built(guises(problem), build, stop)
    if not several:
        return tables[0]
    if free and problem.split != "nearest":
        even = problem.replace(split="equal", share_entries=None, known=None)
        more = tables if problem.split == "equal" else _built(guises(even), build, stop, at_least=0)
        tables += _descended(even, more, NEAR[problem.split], stop)
    if live is not None and _may_stay(problem):
        tables.append(live.slots_LGC)
    for chain_LGC in chains:  # layers in which it breaks a limit as in another placement
        broken_L = ~keeps_limits(problem, chain_LGC)
        chain_LGC[broken_L] = widened(tables[0], chain_LGC.shape[2])[broken_L]
    tables = chains + tables
    wide = max(table.shape[2] for table in tables)
    slots_XLGC = np.stack(
        [np.pad(table, ((0, 0), (0, 0), (0, wide - table.shape[2])), constant_values=-1) for table in tables]
    )
    value_XL = np.stack([risk_L(problem, slots_LGC) for slots_LGC in slots_XLGC])
    moved_XL = np.zeros(value_XL.shape)
    if live is not None:
        moved_XL = np.stack(
            [new_replicas(one, live.slots_LGC, problem.experts).sum((1, 2)) for one in slots_XLGC]
        )
    if _coupled(problem):
        value_XL, moved_XL = value_XL.sum(1, keepdims=True), moved_XL.sum(1, keepdims=True)
    allowed_L = value_XL.min(0) * (1 + (0.0 if live is None else problem.objective.balance_tolerance))
    enough_XL = value_XL <= allowed_L * (1 + _EQUAL)
    rank_XL = np.where(enough_XL, moved_XL, np.inf)
    # Of equals the fastest, and of those the first: it is made for the expected loads.
    fastest_L = np.where(rank_XL == rank_XL.min(0), value_XL, np.inf).min(0)
    index_L = ((rank_XL == rank_XL.min(0)) & (value_XL <= fastest_L * (1 + _EQUAL))).argmax(0)
    if chains:
        index_L = np.where(near_XL.any(0), near_XL.argmax(0), index_L)
    slots_LGC = np.asarray(slots_XLGC[index_L, np.arange(problem.layers)])
    if free:
        settle_small(problem, slots_LGC, stop)
    return slots_LGC


def _built(
    parts: Iterator[Problem], build: Callable[[Problem], SlotArray], stop: Stop, *, at_least: int = 1
) -> list[SlotArray]:
    """What is built for every guise, until told to stop; where a guise is infeasible it is passed over."""
    tables: list[SlotArray] = []
    for guise in parts:
        if len(tables) >= at_least and stop():
            break
        try:
            tables.append(build(guise))
        except InfeasibleError:
            if len(tables) < at_least:
                raise
    return tables


def _enumerated(problem: Problem, stop: Stop) -> SlotArray | None:
    """The best of all placements with even shares, where GPUs are alike and there are few; else None."""
    slots_G, experts = problem.capacity_LG[0], problem.experts
    alike = bool((problem.capacity_LG == slots_G[0]).all()) and problem.topology.is_uniform
    if not alike or without_slack(problem).limits != Limits() or problem.fill != Fill.NONE or stop():
        return None
    gpus, slots = len(slots_G), int(slots_G[0])
    rows = sum(comb(experts, held) for held in range(1, slots + 1))
    if comb(rows + gpus - 1, gpus) > FEW:
        return None
    held = [part for size in range(1, slots + 1) for part in combinations(range(experts), size)]
    every = [one for one in combinations_with_replacement(held, gpus) if len(set().union(*one)) == experts]
    slots_XGC = np.full((len(every), gpus, slots), -1, dtype=np.int32)
    for choice_GC, one in zip(slots_XGC, every, strict=True):
        for row_C, part in zip(choice_GC, one, strict=True):
            row_C[: len(part)] = part
    share_XGC = equal_shares(slots_XGC, experts)
    best_LGC = np.empty((problem.layers, gpus, slots), dtype=np.int32)
    for layer in range(problem.layers):
        if stop():
            return None
        time_TXG = [
            gpu_times(np.tile(load_E, (len(every), 1)), slots_XGC, share_XGC, problem.topology.speed_G)
            for load_E in problem.loads.load_TLE[:, layer]
        ]
        top_TX = gpu_risk(np.array(time_TXG), problem.loads.weight_T, problem.objective).max(2)
        best_LGC[layer] = slots_XGC[risk(top_TX, problem.loads.weight_T, problem.objective).argmin()]
    return best_LGC


def _chained(problem: Problem) -> tuple[list[SlotArray], BoolArray]:
    """Placements whose shared experts chain the GPUs; and where each is as good as perfect, [X, L]."""
    given = problem.loads.load_TLE, problem.capacity_LG, problem.topology.speed_G
    found = [chained(*given, pairs=pairs) for pairs in (False, True)]
    enough_L = perfect_tokens(problem) * (1 + _NEAR)
    near_XL = [keeps_limits(problem, one) & (risk_L(problem, one) <= enough_L) for one in found]
    return found, np.array(near_XL)


def _descended(even: Problem, tables: list[SlotArray], near: float, stop: Stop) -> list[SlotArray]:
    """The best of some placements with even shares, each layer descended by the risk; none of none."""
    if not tables:
        return []
    wide = max(int(even.capacity_LG.max()), *(table.shape[2] for table in tables))
    tables = [widened(table, wide) for table in tables]
    best_L = np.stack([risk_L(even, table) for table in tables]).argmin(0)
    start_LGC = np.array([tables[x][layer] for layer, x in enumerate(best_L)])
    return descents(even, start_LGC, (STEPS_DOWN,), near, stop)


def descents(
    even: Problem, start_LGC: SlotArray, ladder: tuple[int, ...], near: float, stop: Stop
) -> list[SlotArray]:
    """What so many changes make of a placement with even shares, each of them lowering the risk most.

    Parameters
    ----------
    even : Problem
        With an equal split.
    start_LGC : array of int32, shape [L, G, C]
        As wide as the problem's slots.
    ladder : tuple of int
        Changes of a layer, rising: one placement for each.
    near : float
        Distance from a perfect balance at which a layer is descended no further.
    stop : Stop
        Asked before every change.
    """
    found, now_LGC, loads = [], start_LGC.copy(), even.loads
    enough_L = perfect_tokens(even) * (1 + near)

    def measure(top_TK: FloatArray) -> FloatArray:
        return risk(top_TK, loads.weight_T, even.objective)

    def each_gpu(time_TX: FloatArray) -> FloatArray:
        return gpu_risk(time_TX, loads.weight_T, even.objective)

    for before, steps in zip((0, *ladder), ladder, strict=False):
        for layer, slots_GC in enumerate(now_LGC):
            descend_even(
                loads.load_TLE[:, layer],
                slots_GC,
                even.capacity_LG[layer],
                even.topology.speed_G,
                measure,
                each_gpu,
                enough=float(enough_L[layer]),
                stop=stop,
                steps=steps - before,
            )
        kept_LGC, broken_L = now_LGC.copy(), ~keeps_limits(even, now_LGC)
        kept_LGC[broken_L] = start_LGC[broken_L]
        found.append(kept_LGC)
    return found


def settle_small(problem: Problem, slots_LGC: SlotArray, stop: Stop) -> None:
    """Random changes of small layers, in place, that lower the risk itself: threshold accepting.

    A change may raise the risk by a share that falls to nothing on the way; the best that was seen is kept
    (Dueck and Scheuer 1990).
    """
    if problem.experts * problem.topology.gpus > SMALL or _coupled(problem):
        return
    rng = np.random.default_rng(0)
    floor_L = perfect_tokens(problem)
    best_L = risk_L(problem, slots_LGC)
    now_LGC, now_L = slots_LGC.copy(), best_L.copy()
    steps = STEPS[problem.split]
    for step in range(steps):
        open_L = best_L > floor_L * (1 + _NEAR)
        if stop() or not open_L.any():
            return
        trial = now_LGC.copy()
        for layer in np.flatnonzero(open_L):
            random_change(rng, trial[layer], problem.capacity_LG[layer], problem.experts)
        rows = np.flatnonzero((trial != now_LGC).any((1, 2)) & keeps_limits(problem, trial))
        if not len(rows):
            continue
        value_R = risk_L(problem, trial[rows], rows)
        taken_R = value_R <= now_L[rows] * (1 + THRESHOLD * (1 - step / steps) ** 2)
        now_LGC[rows[taken_R]], now_L[rows[taken_R]] = trial[rows[taken_R]], value_R[taken_R]
        better_R = value_R < best_L[rows] * (1 - _EQUAL)
        slots_LGC[rows[better_R]], best_L[rows[better_R]] = trial[rows[better_R]], value_R[better_R]


def _may_stay(problem: Problem) -> bool:
    """Whether the live placement is one to be looked at: few changes for one scenario may harm another."""
    live = problem.current
    if live is None or problem.split != "nearest" or live.partial or problem.fill != "none":
        return False
    return bool(keeps_limits(problem, live.slots_LGC).all())


def _coupled(problem: Problem) -> bool:
    """Whether something ties the layers together, so that layers of two plans cannot be mixed."""
    limits = problem.limits
    ties = (
        limits.max_total_replicas,
        limits.max_total_bytes,
        limits.max_moves,
        limits.max_move_bytes,
        limits.max_move_seconds,
    )
    return problem.sizing.policy == "memory" or any(tie is not None for tie in ties)
