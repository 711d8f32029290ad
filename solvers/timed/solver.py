"""Time models beyond tokens, as a solver of the registry.

`ActivationAware` plans for a time model in which a used replica costs something whatever its tokens, as in
decode.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from moeless_opt.problems.arrays import FloatArray, SlotArray, whole
from moeless_opt.problems.errors import ProblemError
from moeless_opt.problems.plan import TimeTable, gpu_times, new_replicas, risk
from moeless_opt.problems.spec import TOKENS, Problem, TimeModel, equal_shares
from moeless_opt.solvers.construct import Construct, search_tiny, widths_for
from moeless_opt.solvers.core import Bound, Built, Heuristic, Task, guises, lower_bound
from moeless_opt.solvers.replan import Replan, live_slots, relabel
from moeless_opt.solvers.timed.activation import shares_of_one, worthwhile_replicas
from moeless_opt.solvers.timed.search import Timed, kicks_for, timed_plan, timed_shares

__all__ = ["ActivationAware", "ActivationOptions"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ActivationOptions:
    """How long the search by the time itself goes on.

    Parameters
    ----------
    kicks : int, optional
        Kicks out of a local optimum per layer (fractional split); by default by the number of experts.
    """

    kicks: int | None = None

    def __post_init__(self) -> None:
        if self.kicks is not None:
            object.__setattr__(self, "kicks", whole("kicks", self.kicks))


class ActivationAware(Heuristic):
    """Plans for time models with a cost per used replica: more replicas can be slower."""

    name = "activation"
    summary = "for time models with activation cost or a measured curve: which replicas to have, and to use"
    Options = ActivationOptions

    def unused(self, problem: Problem) -> Mapping[str, str]:
        """Only the fractional split is searched."""
        return {"kicks": "with an equal split"} if problem.split == "equal" else {}

    def build(self, task: Task[ActivationOptions]) -> Built:
        """Per layer the fastest, by the problem's own time model, of lean and balanced placements."""
        problem = task.problem
        candidates: list[tuple[SlotArray, FloatArray]] = []
        for guise in guises(problem):
            if candidates and task.stop():
                break
            candidates += self._candidates(task, guise)
        bound = None
        if problem.loads.shape[0] == 1:
            exact, bound = _exact(task, candidates)
            candidates += exact
        slots_LGC, share_LGC = _best(problem, candidates)
        each = None
        if problem.loads.shape[0] > 1 and problem.split == "fractional":
            each = np.array([_shares(problem, load_LE, slots_LGC)[0] for load_LE in problem.loads.load_TLE])
        return Built(slots_LGC=slots_LGC, share_LGC=share_LGC, scenario_share_TLGC=each, bound=bound)

    def _candidates(
        self, task: Task[ActivationOptions], problem: Problem
    ) -> list[tuple[SlotArray, FloatArray]]:
        """Placements with shares for a problem of one scenario."""
        fresh = Replan() if problem.current is not None else Construct()
        # Whether a move pays is told by the problem's own time, not by tokens.
        freely = problem.objective.replace(horizon=None)
        base = fresh.placed(task, problem.replace(time=TOKENS, known=None, objective=freely))
        if problem.split == "fractional":
            return _by_time(replace(task, problem=problem), base)
        placements = [base.slots_LGC]
        if problem.current is None:
            lean, _ = worthwhile_replicas(
                problem.load_LE, problem.capacity_LG, problem.topology.speed_G, _linear(problem)
            )
            placements.append(lean)
        elif not problem.current.partial:
            placements.append(live_slots(problem))
        return [(slots_LGC, equal_shares(slots_LGC, problem.experts)) for slots_LGC in placements]


def _by_time(task: Task[ActivationOptions], base: Built) -> list[tuple[SlotArray, FloatArray]]:
    """From the balanced placement and from what is live; there a move has to pay or to be needed."""
    problem, stop = task.problem, task.stop
    load_LE, capacity_LG, speed_G = problem.load_LE, problem.capacity_LG, problem.topology.speed_G
    kicks = 4 * kicks_for(problem.experts) if task.options.kicks is None else task.options.kicks
    table = TimeTable.of(problem.time, min(int(capacity_LG.max()), problem.experts))
    free_G = np.zeros(len(speed_G))

    def planned(slots_LGC: SlotArray, price_L: FloatArray | None = None) -> Timed:
        # Told to stop, it still descends, but is not shaken.
        return timed_plan(
            load_LE,
            slots_LGC,
            capacity_LG,
            speed_G,
            table,
            load_G=free_G,
            price_L=price_L,
            kicks=0 if stop() else kicks,
            stop=stop,
        )

    if problem.current is None or problem.current.partial:
        fresh = planned(base.slots_LGC)
        alone_LGC = shares_of_one(load_LE, fresh.slots_LGC, speed_G)
        return [
            (base.slots_LGC, base.shares_LGC),
            (fresh.slots_LGC, fresh.share_LGC),
            (fresh.slots_LGC, alone_LGC),
        ]
    live_LGC = live_slots(problem)
    if problem.objective.horizon is not None:
        paid = planned(live_LGC, _price(problem, problem.objective.horizon))
        return [
            (live_LGC, timed_shares(load_LE, live_LGC, speed_G, table, stop=stop)[0]),
            (paid.slots_LGC, paid.share_LGC),
        ]
    found = [(base.slots_LGC, base.shares_LGC), (live_LGC, shares_of_one(load_LE, live_LGC, speed_G))]
    best_L = np.full(problem.layers, np.inf)
    for start_LGC in (base.slots_LGC, live_LGC):
        if stop():
            return found
        plan = planned(start_LGC)
        best_L = np.minimum(best_L, plan.value_L)
        found.insert(len(found) - 1, (plan.slots_LGC, plan.share_LGC))
    for part in (0.1, 1.0):
        if stop():
            break
        priced = planned(live_LGC, part * problem.objective.balance_tolerance * best_L)
        found.append((priced.slots_LGC, priced.share_LGC))
    return found


def _price(problem: Problem, horizon: float) -> FloatArray:
    """What a move must save in every pass until the next plan, in seconds, shape [L].

    Raises
    ------
    ProblemError
        Times are not in seconds.
    """
    if problem.time.unit != "s":
        raise ProblemError(
            "objective.horizon",
            "needs times in seconds to weigh moves against them: give a TimeModel with unit='s'",
        )
    links = problem.topology.links
    slowest = links.inter_node if problem.topology.nodes > 1 else links.intra_node
    return np.asarray((links.latency + problem.bytes_L / slowest) / horizon)


def _exact(
    task: Task[ActivationOptions], candidates: list[tuple[SlotArray, FloatArray]]
) -> tuple[list[tuple[SlotArray, FloatArray]], Bound]:
    """A better placement of small layers, where there is one, and what is proven of them."""
    problem, stop = task.problem, task.stop
    capacity_LG, speed_G, experts = problem.capacity_LG, problem.topology.speed_G, problem.experts
    widths = widths_for(experts * len(speed_G), problem.layers, problem.split == "equal", stop)
    time_XL = np.array([_risk_L(problem, *candidate) for candidate in candidates])
    floor_L, known_L = lower_bound(problem)[0], time_XL.min(0)
    table = TimeTable.of(problem.time, min(int(capacity_LG.max()), experts))
    bound_L, names = np.zeros(problem.layers), ["none"] * problem.layers
    wide = max(int(capacity_LG.max()), candidates[0][0].shape[2])
    slots_LGC = np.full((*capacity_LG.shape, wide), -1, dtype=np.int32)
    share_LGC = np.zeros(slots_LGC.shape)
    first_LGC, first_share = candidates[0]
    slots_LGC[:, :, : first_LGC.shape[2]], share_LGC[:, :, : first_LGC.shape[2]] = first_LGC, first_share
    better = False
    for layer in np.flatnonzero(known_L > floor_L * (1 + 1e-9)).tolist():
        if stop() or not widths:
            break
        found = search_tiny(
            problem.load_LE[layer],
            capacity_LG[layer],
            speed_G,
            table,
            float(known_L[layer]),
            equal=problem.split == "equal",
            widths=widths,
            stop=stop,
        )
        bound_L[layer], names[layer] = found.bound, "enumeration"
        if found.slots_GC is not None and found.share_GC is not None:
            better = True
            width = found.slots_GC.shape[1]
            slots_LGC[layer], share_LGC[layer] = -1, 0.0
            slots_LGC[layer, :, :width], share_LGC[layer, :, :width] = _near_live(
                problem, layer, found.slots_GC, found.share_GC
            )
    return [(slots_LGC, share_LGC)] if better else [], (bound_L, tuple(names))


def _near_live(
    problem: Problem, layer: int, slots_GC: SlotArray, share_GC: FloatArray
) -> tuple[SlotArray, FloatArray]:
    """What alike GPUs hold, traded so that most of what is live stays."""
    if problem.current is None:
        return slots_GC, share_GC
    live_GC = np.full(slots_GC.shape, -1, dtype=np.int32)
    for gpu, row in enumerate(problem.current.slots_LGC[layer].tolist()):
        held = [expert for expert in row if expert >= 0][: len(slots_GC[gpu])]
        live_GC[gpu, : len(held)] = held
    capacity_G, speed_G = problem.capacity_LG[layer], problem.topology.speed_G
    moved_LGC: SlotArray = relabel.relabel(
        live_GC[None],
        slots_GC[None],
        experts=problem.experts,
        speed_G=speed_G,
        capacity_LG=capacity_G[None],
    )
    moved_GC = moved_LGC[0]
    left = list(range(len(speed_G)))
    moved_share = np.zeros(share_GC.shape)
    rows, shares = slots_GC.tolist(), share_GC.tolist()
    for gpu, row in enumerate(moved_GC.tolist()):
        kind = speed_G[gpu], capacity_G[gpu], sorted(row)
        at = next(g for g in left if (speed_G[g], capacity_G[g], sorted(rows[g])) == kind)
        left.remove(at)
        share_of = dict(zip(rows[at], shares[at], strict=True))
        moved_share[gpu] = [share_of[expert] if expert >= 0 else 0.0 for expert in row]
    return moved_GC, moved_share


def _linear(problem: Problem) -> TimeModel:
    """The problem's time model, or the linear one nearest to its curve where the loads are."""
    near = problem.time.linear(2 * float(problem.load_LE.sum(1).max()) / problem.topology.gpus)
    return near if near.token_cost >= 1e-12 else near.replace(token_cost=1e-12)


def _best(problem: Problem, candidates: list[tuple[SlotArray, FloatArray]]) -> tuple[SlotArray, FloatArray]:
    """Per layer the fastest candidate; where something is live, of those within the tolerance the nearest."""
    wide = max(slots.shape[2] for slots, _ in candidates)
    shape = (*candidates[0][0].shape[:2], wide)
    rank_XL = _rank_XL(problem, candidates)
    best_LGC, best_share = np.full(shape, -1, dtype=np.int32), np.zeros(shape)
    for layer, x in enumerate(rank_XL.argmin(0)):
        slots_LGC, share_LGC = candidates[x]
        best_LGC[layer, :, : slots_LGC.shape[2]] = slots_LGC[layer]
        best_share[layer, :, : slots_LGC.shape[2]] = share_LGC[layer]
    if problem.loads.shape[0] > 1:  # a candidate's shares are for the scenario that it was made for
        best_share = _shares(problem, problem.load_LE, best_LGC)[0]
    return best_LGC, best_share


def _rank_XL(problem: Problem, candidates: list[tuple[SlotArray, FloatArray]]) -> FloatArray:
    """The candidates of every layer by time, by moves within the tolerance, or by what moves save."""
    time_XL = np.array([_risk_L(problem, *candidate) for candidate in candidates])
    current = problem.current
    if current is not None and "moves" in problem.objective.priorities:
        moves_XL = np.array(
            [new_replicas(slots, current.slots_LGC, problem.experts).sum((1, 2)) for slots, _ in candidates]
        )
        if problem.objective.horizon is not None:
            return time_XL + moves_XL * _price(problem, problem.objective.horizon)
        least_L = time_XL.min(0)
        near_XL = time_XL <= least_L * (1 + problem.objective.balance_tolerance) + 1e-300
        # Moves are whole numbers; the time decides between equals.
        return np.asarray(
            np.where(near_XL, moves_XL + 0.5 * time_XL / np.maximum(time_XL.max(0), 1e-300), np.inf)
        )
    return time_XL


def _risk_L(problem: Problem, slots_LGC: SlotArray, share_LGC: FloatArray) -> FloatArray:
    """Largest GPU time of a candidate, shape [L]; over several scenarios with shares of their own."""
    loads = problem.loads
    if loads.shape[0] == 1:
        speed_G = problem.topology.speed_G
        return np.asarray(gpu_times(problem.load_LE, slots_LGC, share_LGC, speed_G, problem.time).max(1))
    top_TL = np.array([_shares(problem, load_LE, slots_LGC)[1] for load_LE in loads.load_TLE])
    return risk(top_TL, loads.weight_T, problem.objective)


def _shares(problem: Problem, load_LE: FloatArray, slots_LGC: SlotArray) -> tuple[FloatArray, FloatArray]:
    """The shares of some loads on a placement, by the problem's time model, and the largest times [L]."""
    speed_G = problem.topology.speed_G
    if problem.split == "fractional":
        table = TimeTable.of(problem.time, min(int(problem.capacity_LG.max()), problem.experts))
        share_LGC, _ = timed_shares(load_LE, slots_LGC, speed_G, table)
    else:
        share_LGC = equal_shares(slots_LGC, problem.experts)
    return share_LGC, np.asarray(gpu_times(load_LE, slots_LGC, share_LGC, speed_G, problem.time).max(1))
