"""Re-planning as a solver of the registry: budgets, fallback, and whether a move pays.

The kernels (`replan`, `replan_equal`) find few moves for a wanted balance. Here the problem's limits become
their budgets; a fresh construction, its GPUs relabelled, takes over a layer where it moves less or balances
better; and with a horizon every layer stops on its way at the point where the next moves would cost more
than they save.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from moeless_opt.problems.arrays import FloatArray, IntArray, SlotArray, whole
from moeless_opt.problems.errors import InfeasibleError, ProblemError
from moeless_opt.problems.plan.evaluate import gpu_times, move_seconds
from moeless_opt.problems.plan.plan import Payback, Plan
from moeless_opt.problems.spec.problem import Problem
from moeless_opt.solvers.construct.solver import Construct
from moeless_opt.solvers.core.finish import Built, token_bound
from moeless_opt.solvers.core.solver import Heuristic, Task
from moeless_opt.solvers.migration.schedule import schedule_migration
from moeless_opt.solvers.replan.fractional import Replan as Replanned
from moeless_opt.solvers.replan.fractional import replan_fractional
from moeless_opt.solvers.replan.layers import (
    layer_moves,
    layer_problem,
    layer_times,
    live_slots,
)
from moeless_opt.solvers.replan.min_moves import min_moves_bound
from moeless_opt.solvers.replan.relabel import relabel
from moeless_opt.solvers.replan.wide import MANY
from moeless_opt.solvers.shares.best import best_shares

__all__ = ["Frontier", "Replan", "ReplanOptions", "frontier", "replan_to", "replan_within"]

LADDER = (0.01, 0.02, 0.035, 0.06, 0.1, 0.18, 0.35)
"""Tolerances above the bound at which a frontier looks for the fewest moves."""

_ANY = 1e9
"""A tolerance that any placement keeps."""

SCRATCH_FROM = 0.3
"""Share of a layer's replicas whose move makes a fresh construction worth a look."""


@dataclass(frozen=True, slots=True)
class Frontier:
    """What balance costs in moves, layer by layer.

    Parameters
    ----------
    tolerance_K : tuple of float
        Wanted distance from the bound of each point; the last is infinite: stay.
    slots_KLGC : array of int32, shape [K, L, G, C]
        Placements.
    time_KL : array, shape [K, L]
        Largest GPU times (tokens over speed).
    moves_KL : array of int, shape [K, L]
        Replicas that move.
    """

    tolerance_K: tuple[float, ...]
    slots_KLGC: SlotArray
    time_KL: FloatArray
    moves_KL: IntArray


def replan_to(problem: Problem, tolerance: float, **options: Any) -> SlotArray:
    """Placement with few moves whose times are within `tolerance` of the bound; see `replan_within`."""
    return replan_within(problem, tolerance, **options).slots_LGC


def replan_within(
    problem: Problem,
    tolerance: float,
    *,
    max_moves: int | None = None,
    cost_L: IntArray | None = None,
    time_limit: float | None = None,
    seed: int = 0,
    **options: Any,
) -> Replanned:
    """Re-plan by the kernel of the problem's split."""
    live_LGC = live_slots(problem)
    common: dict[str, Any] = {
        "tolerance": tolerance,
        "max_moves": max_moves,
        "cost_L": None if cost_L is None else cost_L.tolist(),
        "time_limit": time_limit,
        "seed": seed,
        "repair": problem.current is not None and problem.current.partial,
    }
    speed_G, capacity_LG = problem.topology.speed_G, problem.capacity_LG
    if problem.split == "equal":
        from moeless_opt.solvers.replan.equal import replan_equal

        return replan_equal(
            problem.load_LE,
            live_LGC,
            capacity_LG,
            speed_G,
            bound_L=token_bound(problem),
            **common,
            **options,
        )
    return replan_fractional(
        problem.load_LE, live_LGC, capacity_LG, speed_G, bound_L=token_bound(problem), **common, **options
    )


def frontier(
    problem: Problem, *, seed: int = 0, ladder: tuple[float, ...] = LADDER, rounds: int | None = None
) -> Frontier:
    """Few-move placements at a ladder of tolerances, and the live one as it is."""
    live_LGC = live_slots(problem)
    options = ReplanOptions(rounds=rounds).given()
    slots = [replan_to(problem, tolerance, seed=seed, **options) for tolerance in ladder]
    assert problem.current is not None
    # Something lost must come back: then the cheapest point is not to stay.
    slots.append(replan_to(problem, _ANY, seed=seed, **options) if problem.current.partial else live_LGC)
    return Frontier(
        (*ladder, float("inf")),
        np.stack(slots),
        np.stack([layer_times(problem, one) for one in slots]),
        np.stack([layer_moves(problem, one, live_LGC) for one in slots]),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplanOptions:
    """How a re-plan searches.

    Parameters
    ----------
    rounds : int, optional
        Rounds of destroying and repairing after the first descent; by default 0 with a fractional split, 8
        with an equal one.
    """

    rounds: int | None = None

    def __post_init__(self) -> None:
        if self.rounds is not None:
            object.__setattr__(self, "rounds", whole("rounds", self.rounds))

    def given(self) -> dict[str, int]:
        """What the kernels are told."""
        return {} if self.rounds is None else {"rounds": self.rounds}


class Replan(Heuristic):
    """Few moves from the live placement."""

    name = "replan"
    summary = (
        "few moves from the live placement to within the balance tolerance; budgets; stays if nothing pays"
    )
    Options = ReplanOptions

    def build(self, task: Task[ReplanOptions]) -> Built:
        """Re-plan within the limits; with a horizon, only as far as it pays."""
        problem = task.problem
        live_LGC = live_slots(problem)
        horizon = problem.objective.horizon
        if horizon is not None:
            slots_LGC = self._while_it_pays(task, live_LGC, horizon)
        else:
            slots_LGC = self._within_limits(task, live_LGC)
        share_LGC = best_shares(problem, slots_LGC)
        proof = _moves_proof(problem, live_LGC, slots_LGC, share_LGC)
        return Built(slots_LGC=slots_LGC, share_LGC=share_LGC, proof=proof)

    def finished(self, problem: Problem, plan: Plan) -> Plan:
        """The plan, with what its moves save and cost."""
        assert problem.current is not None
        if problem.time.unit != "s" or problem.current.partial:
            return plan
        return plan.replace(payback=payback_of(problem, plan, live_slots(problem)))

    def _within_limits(self, task: Task[ReplanOptions], live_LGC: SlotArray) -> SlotArray:
        problem, seed = task.problem, task.seed
        limits, tolerance = problem.limits, problem.objective.balance_tolerance
        budget, cost_L = _budget(problem)
        remaining = task.stop.remaining
        time_limit = None if remaining == float("inf") else max(0.9 * remaining, 0.01)

        def replanned(allowed: int | None) -> Replanned:
            return replan_within(
                problem,
                tolerance,
                max_moves=allowed,
                cost_L=cost_L,
                time_limit=time_limit,
                seed=seed,
                **task.options.given(),
            )

        def run(allowed: int | None) -> SlotArray:
            return replanned(allowed).slots_LGC

        first = replanned(budget)
        slots_LGC = first.slots_LGC
        if limits.max_layer_moves is not None:
            slots_LGC = self._cap_layers(problem, live_LGC, slots_LGC, limits.max_layer_moves, seed)
        if not limits.bounds_moves:
            same = slots_LGC is first.slots_LGC
            return _best_of_scratch(task, slots_LGC, live_LGC, first.time_L if same else None)
        if limits.max_moves is not None and limits.max_move_bytes is not None:
            moves_L = layer_moves(problem, slots_LGC, live_LGC)
            while int(moves_L.sum()) > limits.max_moves:  # bytes bound first, replicas do not fit yet
                budget = int(moves_L @ problem.bytes_L) * limits.max_moves // int(moves_L.sum())
                slots_LGC = run(budget)
                moves_L = layer_moves(problem, slots_LGC, live_LGC)
        if limits.max_move_seconds is not None:
            slots_LGC = _within_seconds(problem, live_LGC, slots_LGC, limits.max_move_seconds, cost_L, run)
        return slots_LGC

    @staticmethod
    def _cap_layers(
        problem: Problem, live_LGC: SlotArray, slots_LGC: SlotArray, most: int, seed: int
    ) -> SlotArray:
        """Re-plan alone, with a budget of its own, every layer that moves too much."""
        slots_LGC = slots_LGC.copy()
        for layer in np.flatnonzero(layer_moves(problem, slots_LGC, live_LGC) > most):
            alone = layer_problem(problem, int(layer))
            slots_LGC[layer] = replan_to(
                alone, problem.objective.balance_tolerance, max_moves=most, seed=seed
            )[0]
        return slots_LGC

    @staticmethod
    def _while_it_pays(task: Task[ReplanOptions], live_LGC: SlotArray, horizon: float) -> SlotArray:
        """Of each layer's frontier, the point with the largest net gain over the horizon."""
        problem, seed = task.problem, task.seed
        if problem.time.unit != "s":
            raise ProblemError(
                "objective.horizon",
                "needs times in seconds to weigh moves against them: give a TimeModel with unit='s'",
            )
        points = frontier(problem, seed=seed, rounds=task.options.rounds)
        cost_KL = np.stack(
            [
                move_seconds(problem.topology, slots, live_LGC, problem.experts, problem.bytes_L)
                for slots in points.slots_KLGC
            ]
        )
        net_KL = -horizon * problem.time.token_cost * points.time_KL - cost_KL
        # Of equal points the one with fewer moves: the ladder ends with staying.
        best_L = net_KL.shape[0] - 1 - np.argmax(net_KL[::-1], axis=0)
        slots_LGC: SlotArray = points.slots_KLGC[best_L, np.arange(len(best_L))]
        moves_L = layer_moves(problem, slots_LGC, live_LGC)
        budget, cost_L = _budget(problem)
        spent = int(moves_L.sum() if cost_L is None else moves_L @ cost_L)
        if budget is None or spent <= budget:
            return slots_LGC
        return replan_to(
            problem,
            problem.objective.balance_tolerance,
            max_moves=budget,
            cost_L=cost_L,
            seed=seed,
            **task.options.given(),
        )


def _moves_proof(problem: Problem, live_LGC: SlotArray, slots_LGC: SlotArray, share_LGC: FloatArray) -> str:
    """How many moves any plan as balanced needs at least, as a sentence."""
    assert problem.current is not None
    if problem.split == "equal" or problem.current.partial:
        return ""
    moves_L = layer_moves(problem, slots_LGC, live_LGC)
    wanted_L = token_bound(problem) * (1 + problem.objective.balance_tolerance)
    speed_G = problem.topology.speed_G
    reached_L = np.maximum(wanted_L, gpu_times(problem.load_LE, slots_LGC, share_LGC, speed_G).max(1))
    least_L = min_moves_bound(problem.load_LE, live_LGC, speed_G, reached_L)
    return f"{int(moves_L.sum())} replicas move; any plan as balanced moves at least {int(least_L.sum())}"


def _budget(problem: Problem) -> tuple[int | None, IntArray | None]:
    """The limit on moves as a budget, and what a move costs in each layer (None: 1)."""
    limits, bytes_L = problem.limits, problem.bytes_L
    if limits.max_move_bytes is None:
        return limits.max_moves, None
    if not bytes_L.any():
        raise ProblemError(
            "limits.max_move_bytes", "needs the size of an expert: give model=... or expert_bytes=..."
        )
    if (bytes_L == bytes_L[0]).all():
        by_bytes = limits.max_move_bytes // int(bytes_L[0])
        return by_bytes if limits.max_moves is None else min(by_bytes, limits.max_moves), None
    return limits.max_move_bytes, bytes_L


def _within_seconds(
    problem: Problem,
    live_LGC: SlotArray,
    slots_LGC: SlotArray,
    most: float,
    cost_L: IntArray | None,
    run: Callable[[int | None], SlotArray],
) -> SlotArray:
    """Shrink the budget until the schedule of the moves takes at most `most` seconds."""

    def seconds(slots: SlotArray) -> float:
        return schedule_migration(
            live_LGC, slots, problem.experts, problem.topology, bytes_L=problem.bytes_L
        ).seconds

    def cost(slots: SlotArray) -> int:
        moves_L = layer_moves(problem, slots, live_LGC)
        return int(moves_L.sum() if cost_L is None else moves_L @ cost_L)

    low, high, best = 0, cost(slots_LGC), live_LGC
    if seconds(slots_LGC) <= most:
        return slots_LGC
    while high - low > max(1, high // 50):
        middle = (low + high) // 2
        try:
            tried = run(middle)
        except InfeasibleError:
            low = middle
            continue
        if seconds(tried) <= most:
            low, best = middle, tried
        else:
            high = middle
    return best


def _best_of_scratch(
    task: Task[ReplanOptions], slots_LGC: SlotArray, live_LGC: SlotArray, time_L: FloatArray | None
) -> SlotArray:
    """Per layer, a fresh construction with relabelled GPUs where it moves less or alone comes near."""
    problem = task.problem
    moves_L = layer_moves(problem, slots_LGC, live_LGC)
    wanted_L = token_bound(problem) * (1 + problem.objective.balance_tolerance) * (1 + 1e-9)
    time_L = layer_times(problem, slots_LGC) if time_L is None else time_L
    filled_L = (slots_LGC >= 0).sum((1, 2))
    # Over many GPUs the look takes long, and what only fills free slots is no reason for it.
    fills_L = filled_L - (live_LGC >= 0).sum((1, 2)) if problem.topology.gpus > MANY else 0
    doubtful = (time_L > wanted_L) | (moves_L - fills_L > SCRATCH_FROM * filled_L)
    if not doubtful.any():
        return slots_LGC
    fresh = Construct().placed(task, problem.replace(current=None))
    wide = np.full_like(slots_LGC, -1)
    wide[:, :, : fresh.slots_LGC.shape[2]] = fresh.slots_LGC[:, :, : wide.shape[2]]
    topology = problem.topology
    fresh_LGC = relabel(
        live_LGC,
        wide,
        experts=problem.experts,
        speed_G=topology.speed_G,
        capacity_LG=problem.capacity_LG,
        node_G=topology.node_G,
    )
    fresh_moves_L, fresh_time_L = layer_moves(problem, fresh_LGC, live_LGC), layer_times(problem, fresh_LGC)
    reaches, fresh_reaches = time_L <= wanted_L, fresh_time_L <= wanted_L
    better = np.where(
        reaches,
        fresh_reaches & (fresh_moves_L < moves_L),
        fresh_reaches | (fresh_time_L < time_L * (1 - problem.objective.balance_tolerance)),
    )
    slots_LGC = slots_LGC.copy()
    slots_LGC[doubtful & better] = fresh_LGC[doubtful & better]
    return slots_LGC


def payback_of(problem: Problem, plan: Plan, live_LGC: SlotArray) -> Payback:
    """What a re-plan saves per forward pass against staying, and what its moves cost."""
    stay_L = layer_times(problem, live_LGC)
    go_L = layer_times(problem, plan.slots_LGC)
    saved = problem.time.token_cost * float((stay_L - go_L).sum())
    schedule = schedule_migration(
        live_LGC, plan.slots_LGC, problem.experts, problem.topology, bytes_L=problem.bytes_L
    )
    cost = schedule.seconds if problem.bytes_L.any() else 0.0
    return Payback(saved_per_pass=saved, cost=cost)
