"""Re-planning as a solver of the registry: budgets, fallback, and whether a move pays.

The kernels (`fractional`, `equal`) find few moves for a wanted balance. Here the problem's limits become
their budgets; a fresh construction, its GPUs relabelled, takes over a layer where it moves less or balances
better; and with a horizon every layer stops on its way at the point where the next moves would cost more
than they save.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from moeless_opt.problems.arrays import FloatArray, IntArray, SlotArray, whole
from moeless_opt.problems.errors import InfeasibleError, ProblemError, UnsupportedFeatureError
from moeless_opt.problems.plan import Payback, Plan, Progress, ProgressCallback, gpu_times, move_seconds
from moeless_opt.problems.spec import Fill, Problem, replica_counts, without_copies
from moeless_opt.solvers.construct import Construct
from moeless_opt.solvers.core import (
    Built,
    Clock,
    Heuristic,
    NeverStop,
    Stop,
    Task,
    best_over_scenarios,
    but_moves,
    choose_points,
    descents,
    in_entries,
    keeps_limits,
    only_moves,
    part_of,
    risk_L,
    token_bound,
    widened,
)
from moeless_opt.solvers.limits import (
    Rules,
    counts_of,
    full_counts_within,
    full_within,
    rules_of,
    slots_counted,
)
from moeless_opt.solvers.migration import schedule_migration
from moeless_opt.solvers.replan.equal import replan_equal
from moeless_opt.solvers.replan.fractional import replan_fractional
from moeless_opt.solvers.replan.kept import TINY, besides_filling, search_small, shared_rules, within_all
from moeless_opt.solvers.replan.live import broken_moves, layer_moves, layer_problem, live_slots, part_problem
from moeless_opt.solvers.replan.min_moves import min_moves_bound
from moeless_opt.solvers.replan.nearest import replan_nearest
from moeless_opt.solvers.replan.relabel import on_live_gpus
from moeless_opt.solvers.replan.task import Replanned, ReplanTask, ReplanWish, Sources, front_of
from moeless_opt.solvers.replan.wide import MANY_GPUS
from moeless_opt.solvers.shares import best_shares

__all__ = ["Frontier", "Replan", "ReplanOptions", "frontier", "replan_within"]

LADDER = (0.01, 0.02, 0.035, 0.06, 0.1, 0.18, 0.35)
"""Tolerances above the bound at which a frontier looks for the fewest moves."""

_ANY = 1e9
"""A tolerance that any placement keeps."""

_MIDDLE = 256
"""As `TINY`, for even shares over several scenarios and for the nearest replica."""

_AMPLE = 0.9
"""Part of what may move that a search has to leave unused for the limit not to be what ended it."""

TIGHTER = (0.6, 0.3, 0.0)
"""Parts of the tolerance that layers are planned for which rounding to whole entries makes too slow."""

_KERNELS: dict[str, Callable[..., Replanned]] = {
    "equal": replan_equal,
    "fractional": replan_fractional,
    "nearest": replan_nearest,
}

DESCENTS = (2, 5, 10, 20, 40, 120)
"""Changes of a layer by which a re-plan with even shares is improved over several scenarios."""

SCRATCH_FROM = 0.3
"""Share of a layer's replicas whose move makes a fresh construction worth a look."""


@dataclass(frozen=True, slots=True)
class Frontier:
    """What balance costs in moves, layer by layer.

    Parameters
    ----------
    slots_KLGC : array of int32, shape [K, L, G, C]
        Placements.
    time_KL : array, shape [K, L]
        Largest GPU times (tokens over speed).
    moves_KL : array of int, shape [K, L]
        Replicas that move.
    """

    slots_KLGC: SlotArray
    time_KL: FloatArray
    moves_KL: IntArray


def replan_within(
    problem: Problem, wish: ReplanWish, *, rules: list[Rules] | None = None, stop: Stop | None = None
) -> Replanned:
    """Re-plan by the kernel of the problem's split, within its limits or narrower rules.

    Measured against the bound of the wish; where it has none, of the problem.
    """
    assert problem.current is not None
    if rules is None:
        rules = shared_rules(problem) if _limited(problem) else None
    speed_G = problem.topology.speed_G
    live_LGC, sources = live_slots(problem), None
    if problem.split == "nearest":
        live_LGC = without_copies(live_LGC)  # to senders two copies on a GPU are one place
        sources = Sources(
            part_LNE=problem.source_parts(),
            node_G=problem.topology.node_G,
            filled=partial(full_within, problem) if problem.fill == Fill.DISTINCT else None,
        )
    given = problem.load_LE, live_LGC, problem.capacity_LG, speed_G, rules
    task = ReplanTask(*given, Fill(problem.fill), sources)
    bound_L = token_bound(problem) if wish.bound_L is None else wish.bound_L
    wish = replace(wish, bound_L=bound_L, repair=problem.current.partial)
    return _KERNELS[problem.split](task, wish, stop=stop)


def frontier(
    problem: Problem,
    *,
    seed: int = 0,
    ladder: tuple[float, ...] = LADDER,
    rounds: int | None = None,
    stop: Stop | None = None,
    progress: ProgressCallback | None = None,
) -> Frontier:
    """Few-move placements at a ladder of tolerances, and the live one as it is.

    With an equal split each rung, from the loosest down, starts where the one above it ended. Rungs for which
    no time is left are left out.
    """
    stop, began = stop or NeverStop(), Clock.begin()
    live_LGC = live_slots(problem)
    # Something lost must come back, and limits be kept: then the cheapest point is not to stay.
    astray = _astray(problem, live_LGC)
    rungs = (*ladder, _ANY) if astray else ladder
    slots: list[SlotArray] = []
    for rung, tolerance in enumerate(rungs[::-1]):
        if slots and stop():
            break
        start_LGC = slots[-1] if slots and problem.split != "fractional" else None
        wish = ReplanWish(tolerance=tolerance, seed=seed, rounds=rounds, start_LGC=start_LGC)
        own = part_of(stop, 1.0 / (len(rungs) - rung))
        slots.append(full_within(problem, replan_within(problem, wish, stop=own).slots_LGC))
        if progress is not None:
            best, floor = float(risk_L(problem, slots[-1]).sum()), float(token_bound(problem).sum())
            note = f"{int(layer_moves(problem, slots[-1], live_LGC).sum())} moves"
            done = (rung + 1) / len(rungs)
            progress(Progress(seconds=began.seconds, best=best, bound=floor, done=done, note=note))
    slots.reverse()
    if not astray:
        slots.append(full_within(problem, live_LGC))
    return Frontier(
        np.stack(slots),
        np.stack([risk_L(problem, one) for one in slots]),
        np.stack([layer_moves(problem, one, live_LGC) for one in slots]),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplanOptions:
    """How a re-plan searches.

    Parameters
    ----------
    rounds : int, optional
        Rounds of destroying and repairing after the first descent; by default 0 with a fractional split, 8
        with others.
    """

    rounds: int | None = None

    def __post_init__(self) -> None:
        if self.rounds is not None:
            object.__setattr__(self, "rounds", whole("rounds", self.rounds))


class Replan(Heuristic):
    """Few moves from the live placement."""

    name = "replan"
    summary = (
        "few moves from the live placement to within the balance tolerance; budgets; stays if nothing pays"
    )
    Options = ReplanOptions

    def build(self, task: Task[ReplanOptions]) -> Built:
        """Re-plan within the limits; with a horizon, only as far as it pays."""
        asked, live_LGC = _balance_last(task.problem), live_slots(task.problem)
        problem = besides_filling(asked, live_LGC)
        try:
            return self._built(replace(task, problem=problem), asked, live_LGC)
        except InfeasibleError:
            if asked.fill == Fill.NONE or not asked.limits.bounds_moves or _more_missing(asked, live_LGC):
                raise
            least_LGC = _within_moves(asked, live_LGC, _least_full(asked, live_LGC))
        # It can be done. Experts without a replica come into empty slots: those moves were counted twice.
        problem = besides_filling(asked, live_LGC, covers=True)
        try:
            found = self._built(replace(task, problem=problem), asked, live_LGC)
            if _moves_kept(asked, found.slots_LGC, live_LGC):
                return found
        except InfeasibleError:
            pass
        share_LGC = _shares(asked, least_LGC)
        proof = _moves_proof(_moves_alone(asked), live_LGC, least_LGC, share_LGC, None)
        return Built(slots_LGC=least_LGC, share_LGC=share_LGC, proof=proof)

    def _built(self, task: Task[ReplanOptions], asked: Problem, live_LGC: SlotArray) -> Built:
        """A plan of the task's problem: `asked`, less what filling takes of the limits on moves."""
        problem = task.problem
        free = _moves_alone(problem)
        least: list[IntArray] = []
        slots_LGC = self._slots(replace(task, problem=free), live_LGC, least)
        if problem.share_entries is not None:
            slots_LGC = self._tightened(replace(task, problem=free), live_LGC, slots_LGC)
        if free is not problem:
            rules_of(problem)  # says what is impossible
            slots_LGC = self._full_kept(task, asked, live_LGC, slots_LGC)
        slots_LGC = full_within(problem, slots_LGC)
        share_LGC = _shares(problem, slots_LGC)
        known_L = least[0] if least and problem.loads.shape[0] == 1 else None
        several = problem.loads.shape[0] > 1 and problem.split == "equal"  # free shares level the rest
        most = _MIDDLE if several or problem.split == "nearest" else TINY
        if not problem.limits.bounds_moves:  # those of few pairs alone
            most = TINY if problem.loads.shape[0] > 1 and problem.split != "fractional" else 0
        if problem.experts * problem.topology.gpus <= most:
            slots_LGC = full_within(problem, self._tiny(task, live_LGC, slots_LGC))
            share_LGC = _shares(problem, slots_LGC)
        # What any plan needs, a plan within the limits needs as well.
        proof = _moves_proof(free, live_LGC, slots_LGC, share_LGC, known_L)
        return Built(slots_LGC=slots_LGC, share_LGC=share_LGC, proof=proof)

    def _full_kept(
        self, task: Task[ReplanOptions], asked: Problem, live_LGC: SlotArray, free_LGC: SlotArray
    ) -> SlotArray:
        """As `_kept`, and with full slots no more moves than `asked` allows, filling included."""
        problem = task.problem
        if problem.fill == Fill.NONE or not problem.limits.bounds_moves:
            return self._kept(task, live_LGC, free_LGC)
        try:
            slots_LGC = full_within(problem, self._kept(task, live_LGC, free_LGC))
        except InfeasibleError:  # to the search; what moves least decides
            slots_LGC = full_within(problem, live_LGC)
        return _within_moves(asked, live_LGC, slots_LGC)

    def _slots(self, task: Task[ReplanOptions], live_LGC: SlotArray, least: list[IntArray]) -> SlotArray:
        """Slots within the limits, with a horizon as far as it pays; `least` gets what moves are needed."""
        problem = task.problem
        horizon = problem.objective.horizon
        if horizon is not None:
            return self._while_it_pays(task, live_LGC, horizon)
        slots_LGC = best_over_scenarios(
            problem,
            lambda guise: self._within_limits(replace(task, problem=guise), live_LGC, least),
            stop=task.stop,
            moves=True,
        )
        return slots_LGC if problem.loads.shape[0] == 1 else _lowered(task, slots_LGC, live_LGC)

    def _tightened(self, task: Task[ReplanOptions], live_LGC: SlotArray, slots_LGC: SlotArray) -> SlotArray:
        """Layers that whole entries make too slow planned again, for ever shorter times, as limits allow.

        The tolerance is judged after the rounding. Of what is in time the first stays, which moves least.
        """
        problem, wish = task.problem, task.problem.objective
        wanted_L = token_bound(problem) * (1 + wish.balance_tolerance) * (1 + 1e-9)
        if wish.horizon is not None or problem.limits.max_move_seconds is not None:
            return slots_LGC
        alike = bool((problem.capacity_LG == problem.capacity_LG[0]).all())
        for part in TIGHTER:
            value_L = risk_L(problem, slots_LGC)
            rows = np.flatnonzero(value_L > wanted_L)
            if not len(rows) or task.stop():
                break
            tight = problem.replace(objective=wish.replace(balance_tolerance=wish.balance_tolerance * part))
            found_LGC, time_L = slots_LGC.copy(), value_L.copy()
            for some in [rows.tolist()] if alike else [[row] for row in rows.tolist()]:
                alone = part_problem(tight, some)
                found_LGC[some] = self._slots(replace(task, problem=alone), live_LGC[some], [])
                time_L[some] = risk_L(alone, found_LGC[some])
            for row in np.argsort(time_L / np.maximum(value_L, 1e-300), kind="stable").tolist():
                if time_L[row] < value_L[row] * (1 - 1e-9):
                    mixed_LGC = slots_LGC.copy()
                    mixed_LGC[row] = found_LGC[row]
                    if _moves_kept(problem, mixed_LGC, live_LGC):
                        slots_LGC = mixed_LGC
        return slots_LGC

    def _kept(self, task: Task[ReplanOptions], live_LGC: SlotArray, free_LGC: SlotArray) -> SlotArray:
        """What is planned without limits on replicas, pairs and domains where it keeps them, else within."""
        problem = task.problem
        keeps_L = keeps_limits(problem, free_LGC, tied=False)
        if keeps_L.all() and within_all(problem, free_LGC):
            return free_LGC
        alike = bool((problem.capacity_LG == problem.capacity_LG[0]).all())
        if alike and not keeps_L.all() and problem.limits.max_layer_moves is None and not _ties(problem):
            # The others are as they are: only what breaks a limit is planned again.
            rows = np.flatnonzero(~keeps_L).tolist()
            part = replace(task, problem=part_problem(problem, rows))
            found_LGC = self._searched(part, live_LGC[rows])
            wide = max(free_LGC.shape[2], found_LGC.shape[2])
            free_LGC = widened(free_LGC, wide)
            slots_LGC = free_LGC.copy()
            slots_LGC[rows] = widened(found_LGC, wide)
            one = problem.objective.horizon is None and problem.loads.shape[0] == 1
            if one and problem.split == "equal":
                slots_LGC[rows] = _or_mended(part, live_LGC[rows], slots_LGC[rows], free_LGC[rows])
            return slots_LGC
        slots_LGC = self._searched(task, live_LGC)
        if not _ties(problem):
            slots_LGC[keeps_L] = free_LGC[keeps_L]
        return slots_LGC

    def _tiny(self, task: Task[ReplanOptions], live_LGC: SlotArray, slots_LGC: SlotArray) -> SlotArray:
        """A re-plan of tiny layers whose limits on moves bind, or over scenarios, searched."""
        problem = task.problem
        if problem.objective.horizon is not None:
            return slots_LGC
        if problem.fill != Fill.NONE and (problem.split != "fractional" or _limited(problem)):
            return slots_LGC  # the search leaves slots empty, and what fills them changes even shares
        if problem.loads.shape[0] == 1 and problem.split != "nearest":
            loose = replace(task, problem=problem.replace(limits=type(problem.limits)()))
            if np.array_equal(self._slots(loose, live_LGC, []), slots_LGC):
                return slots_LGC  # what is found without limits is as good as any
        return search_small(problem, live_LGC, slots_LGC, task.stop)

    def _searched(self, task: Task[ReplanOptions], live_LGC: SlotArray) -> SlotArray:
        """Within the limits, and small layers searched."""
        problem, slots_LGC = task.problem, self._slots(task, live_LGC, [])
        if problem.objective.horizon is not None or problem.loads.shape[0] > 1 or problem.split == "nearest":
            return slots_LGC
        if problem.fill != Fill.NONE:  # as in `_tiny`
            return slots_LGC
        return search_small(problem, live_LGC, slots_LGC, task.stop)

    def finished(self, problem: Problem, plan: Plan) -> Plan:
        """The plan, with what its moves save and cost."""
        assert problem.current is not None
        if problem.time.unit != "s" or problem.current.partial:
            return plan
        return plan.replace(payback=payback_of(problem, plan, live_slots(problem)))

    def _within_limits(
        self, task: Task[ReplanOptions], live_LGC: SlotArray, least: list[IntArray]
    ) -> SlotArray:
        """A placement within the limits; to `least` goes what the first re-plan proved of its moves."""
        problem, limits = task.problem, task.problem.limits
        budget, cost_L = _budget(problem)
        staged = limits.max_layer_moves is not None or limits.max_move_seconds is not None

        def run(allowed: int | None, share: float = 0.3) -> Replanned:
            price_L = None if cost_L is None else cost_L.tolist()
            wish = _wish(task, max_moves=allowed, cost_L=price_L, limit=_scarcer(problem))
            # With a time limit the search goes on, unless other steps are to come.
            endless = not staged and task.options.rounds is None and task.stop.remaining < float("inf")
            wish = replace(wish, until_stopped=endless)
            return replan_within(problem, wish, stop=part_of(task.stop, share))

        first = run(budget, 0.4 if staged else 0.9)
        least.append(first.least_moves_L)
        slots_LGC = first.slots_LGC
        if limits.max_layer_moves is not None:
            slots_LGC = _cap_layers(task, live_LGC, slots_LGC, limits.max_layer_moves)
        if not limits.bounds_moves:
            return _best_of_scratch(task, slots_LGC, live_LGC, first)
        if limits.max_moves is not None and limits.max_move_bytes is not None:
            moves_L = layer_moves(problem, slots_LGC, live_LGC)
            while int(moves_L.sum()) > limits.max_moves:  # bytes bound first, replicas do not fit yet
                budget = int(moves_L @ problem.bytes_L) * limits.max_moves // int(moves_L.sum())
                slots_LGC = run(budget).slots_LGC
                moves_L = layer_moves(problem, slots_LGC, live_LGC)
        if limits.max_move_seconds is not None:
            slots_LGC = _within_seconds(
                task, live_LGC, slots_LGC, limits.max_move_seconds, cost_L, lambda most: run(most).slots_LGC
            )
        elif _moves_kept(problem, slots_LGC, live_LGC, _AMPLE):
            # What was allowed is not what ended the search: other plans may fit as well.
            looked = _best_of_scratch(task, slots_LGC, live_LGC, first)
            slots_LGC = looked if _moves_kept(problem, looked, live_LGC) else slots_LGC
        return slots_LGC

    def _while_it_pays(self, task: Task[ReplanOptions], live_LGC: SlotArray, horizon: float) -> SlotArray:
        """Of each layer's frontier, the point with the largest net gain over the horizon, within limits."""
        problem, limits = task.problem, task.problem.limits
        if problem.time.unit != "s":
            raise ProblemError(
                "objective.horizon",
                "needs times in seconds to weigh moves against them: give a TimeModel with unit='s'",
            )
        points = frontier(problem, seed=task.seed, rounds=task.options.rounds, stop=part_of(task.stop, 0.5))
        offers = _Offers.of(problem, points.slots_KLGC, live_LGC, horizon)
        slots_LGC = offers.best()
        budget, cost_L = _budget(problem)
        price_L = np.ones(problem.layers, dtype=np.int64) if cost_L is None else cost_L
        most = limits.max_layer_moves
        if most is not None and (layer_moves(problem, slots_LGC, live_LGC) > most).any():
            capped = _cap_layers(task, live_LGC, slots_LGC, most)
            offers = _Offers.of(problem, capped[None], live_LGC, horizon).joined(offers)

        def within(allowed: int | None) -> SlotArray:
            own = offers
            if allowed is not None:
                price = None if cost_L is None else price_L.tolist()
                wish = _wish(task, max_moves=allowed, cost_L=price, limit=_scarcer(problem))
                more = replan_within(problem, wish, stop=part_of(task.stop, 0.3)).slots_LGC
                own = _Offers.of(problem, more[None], live_LGC, horizon).joined(offers)
            return own.within(allowed, price_L, most)

        spent = int(layer_moves(problem, slots_LGC, live_LGC) @ price_L)
        if most is not None or (budget is not None and spent > budget):
            slots_LGC = within(budget)
        if limits.max_move_seconds is not None:
            seconds = limits.max_move_seconds
            slots_LGC = _within_seconds(task, live_LGC, slots_LGC, seconds, cost_L, within)
        return slots_LGC


@dataclass(frozen=True, slots=True)
class _Offers:
    """Placements that each layer may take, what it loses by each over the horizon, and replicas that move.

    Of equal ones the last is preferred: the frontier ends with staying.
    """

    slots_KLGC: SlotArray
    loss_KL: FloatArray
    moves_KL: IntArray

    @classmethod
    def of(cls, problem: Problem, slots_KLGC: SlotArray, live_LGC: SlotArray, horizon: float) -> _Offers:
        """Time over the horizon, and seconds of transfer."""
        topology, bytes_L = problem.topology, problem.bytes_L
        loss_KL = np.stack(
            [
                horizon * problem.time.token_cost * risk_L(problem, slots)
                + move_seconds(topology, slots, live_LGC, problem.experts, bytes_L)
                for slots in slots_KLGC
            ]
        )
        moves_KL = np.stack([layer_moves(problem, slots, live_LGC) for slots in slots_KLGC])
        return cls(slots_KLGC, loss_KL, moves_KL)

    def joined(self, others: _Offers) -> _Offers:
        """These, and others after them."""
        return _Offers(
            np.concatenate([self.slots_KLGC, others.slots_KLGC]),
            np.concatenate([self.loss_KL, others.loss_KL]),
            np.concatenate([self.moves_KL, others.moves_KL]),
        )

    def take(self, offer_L: IntArray) -> SlotArray:
        """The placement that takes these offers, one for each layer."""
        slots_LGC: SlotArray = self.slots_KLGC[offer_L, np.arange(len(offer_L))]
        return slots_LGC

    def best(self) -> SlotArray:
        """The least loss of each layer, without limits."""
        return self.take(len(self.loss_KL) - 1 - np.argmin(self.loss_KL[::-1], axis=0))

    def within(self, budget: int | None, price_L: IntArray, most: int | None) -> SlotArray:
        """The least loss of all layers together, within a budget and so many moves in each layer."""
        fronts = []
        for layer, (loss_K, moves_K) in enumerate(zip(self.loss_KL.T, self.moves_KL.T, strict=True)):
            points = [
                (int(moves_K[k]), float(loss_K[k]), k)
                for k in range(len(loss_K) - 1, -1, -1)
                if most is None or moves_K[k] <= most
            ]
            if not points:
                raise InfeasibleError(
                    f"limits.max_layer_moves: {most} cannot give every expert of row {layer} a replica; "
                    f"{int(moves_K.min())} would"
                )
            fronts.append(front_of(points))
        spent = sum(front[0][0] * price for front, price in zip(fronts, price_L.tolist(), strict=True))
        if budget is not None and spent > budget:
            raise InfeasibleError(f"limits: a budget of {budget} cannot give every expert a replica")
        chosen = choose_points(
            [[point[0] * price for point in front] for front, price in zip(fronts, price_L, strict=True)],
            [[point[1] for point in front] for front in fronts],
            sum(front[-1][0] * price for front, price in zip(fronts, price_L.tolist(), strict=True))
            if budget is None
            else budget,
        )
        return self.take(
            np.array([front[at][2] for front, at in zip(fronts, chosen.point_L.tolist(), strict=True)])
        )


def _or_mended(
    task: Task[ReplanOptions], live_LGC: SlotArray, slots_LGC: SlotArray, free_LGC: SlotArray
) -> SlotArray:
    """By layer a re-plan within the limits, or what becomes of one without them, where that moves less."""
    problem = task.problem
    other = replan_within(problem, _wish(task, start_LGC=free_LGC), stop=part_of(task.stop, 0.5))
    wanted_L = token_bound(problem) * (1 + problem.objective.balance_tolerance) * (1 + 1e-9)
    late_XL = np.maximum(np.stack([risk_L(problem, slots_LGC), other.time_L]), wanted_L)
    moves_XL = np.stack([layer_moves(problem, slots_LGC, live_LGC), other.moves_L])
    same_L = np.abs(late_XL[1] - late_XL[0]) <= 1e-9 * late_XL[0]
    better_L = np.where(same_L, moves_XL[1] < moves_XL[0], late_XL[1] < late_XL[0])
    return np.where(better_L[:, None, None], other.slots_LGC, slots_LGC)


def _shares(problem: Problem, slots_LGC: SlotArray) -> FloatArray:
    """The best shares on a placement, in whole entries where the problem wants them so."""
    return in_entries(problem, problem.load_LE, slots_LGC, best_shares(problem, slots_LGC))


def _astray(problem: Problem, live_LGC: SlotArray) -> bool:
    """Whether what is live lacks an expert or breaks a limit: it can't stay as it is."""
    assert problem.current is not None
    filled_L = (live_LGC >= 0).sum((1, 2))
    most, size = problem.limits.max_total_replicas, problem.limits.max_total_bytes
    return bool(
        problem.current.partial
        or not keeps_limits(problem, live_LGC).all()
        or (most is not None and filled_L.sum() > most)
        or (size is not None and filled_L @ problem.bytes_L > size)
    )


def _limited(problem: Problem) -> bool:
    """Whether anything but moves is limited."""
    return problem.limits != only_moves(problem.limits)


def _moves_alone(problem: Problem) -> Problem:
    """The problem with its limits on moves and no others."""
    moves = only_moves(problem.limits)
    return problem if moves == problem.limits else problem.replace(limits=moves)


def _more_missing(problem: Problem, live_LGC: SlotArray) -> bool:
    """Whether more experts lack a replica than may move: then no plan keeps the limits."""
    missing_L = (replica_counts(live_LGC, problem.experts) == 0).sum(1)
    most, most_L = problem.limits.max_moves, problem.limits.max_layer_moves
    return (most is not None and int(missing_L.sum()) > most) or (
        most_L is not None and int(missing_L.max()) > most_L
    )


def _least_full(problem: Problem, live_LGC: SlotArray) -> SlotArray:
    """Full slots within the limits that each layer reaches with the fewest moves from the live ones."""
    wide = max(int(problem.capacity_LG.max()), live_LGC.shape[2])
    least_LGC = np.full((*live_LGC.shape[:2], wide), -1, dtype=np.int32)
    for row, rules in enumerate(rules_of(problem)):
        live_EG = counts_of(live_LGC[row], problem.experts)
        count_EG = full_counts_within(
            rules, problem.load_LE[row], live_EG, copies=problem.fill == Fill.COPIES
        )
        least_LGC[row] = slots_counted(count_EG, wide)
    return least_LGC


def _within_moves(problem: Problem, live_LGC: SlotArray, slots_LGC: SlotArray) -> SlotArray:
    """Full slots within limits on moves as on others: where too many move, layers that move least.

    Raises
    ------
    InfeasibleError
        If they move too much as well.
    UnsupportedFeatureError
        If a limit on moves is not kept, and second copies or seconds leave it open whether it could be.
    """
    copies = problem.fill == Fill.COPIES
    if not _moves_kept(problem, slots_LGC, live_LGC):
        least_LGC = _least_full(problem, live_LGC)
        moves_2L = [layer_moves(problem, one, live_LGC) for one in (slots_LGC, least_LGC)]
        time_2L = [risk_L(problem, one) for one in (slots_LGC, least_LGC)]
        # Back to the fewer moves where that costs least, until the limits are kept.
        cost_L = (time_2L[1] - time_2L[0]) / np.maximum(moves_2L[0] - moves_2L[1], 1e-9)
        for row in np.argsort(cost_L, kind="stable").tolist():
            if _moves_kept(problem, slots_LGC, live_LGC):
                break
            slots_LGC = slots_LGC.copy()
            slots_LGC[row] = least_LGC[row]
    name, _ = broken_moves(problem, slots_LGC, live_LGC)
    if not name:
        return slots_LGC
    most = getattr(problem.limits, name)
    told = f"limits.{name}: is {most}; full slots within the limits (fill {problem.fill!r}) take more"
    if name == "max_move_seconds" or (copies and int(problem.capacity_LG.max()) > 1):
        raise UnsupportedFeatureError(f"{told} in every plan that was found")
    raise InfeasibleError(told)


def _ties(problem: Problem) -> bool:
    """Whether a limit is on all layers together."""
    limits = problem.limits
    names = (limits.max_moves, limits.max_move_bytes, limits.max_move_seconds)
    return any(one is not None for one in (*names, limits.max_total_replicas, limits.max_total_bytes))


def _balance_last(problem: Problem) -> Problem:
    """The problem without a tolerance where moves are no priority: nothing gains by worse balance."""
    wish = problem.objective
    if "moves" in wish.priorities or wish.balance_tolerance == 0:
        return problem
    return problem.replace(objective=wish.replace(balance_tolerance=0.0), known=None)


def _wish(task: Task[ReplanOptions], **more: Any) -> ReplanWish:
    """The problem's tolerance, the task's seed and rounds, and what else is wished for."""
    tolerance = task.problem.objective.balance_tolerance
    return ReplanWish(tolerance=tolerance, seed=task.seed, rounds=task.options.rounds, **more)


def _cap_layers(task: Task[ReplanOptions], live_LGC: SlotArray, slots_LGC: SlotArray, most: int) -> SlotArray:
    """Re-plan alone, with a budget of its own, every layer that moves too much."""
    slots_LGC = slots_LGC.copy()
    limits = task.problem.limits
    tied = limits.max_total_replicas is not None or limits.max_total_bytes is not None
    tolerance = task.problem.objective.balance_tolerance
    wish = ReplanWish(tolerance=tolerance, seed=task.seed, max_moves=most, limit="max_layer_moves")
    for layer in np.flatnonzero(layer_moves(task.problem, slots_LGC, live_LGC) > most):
        alone = layer_problem(task.problem, int(layer))
        if tied:  # what all layers may have together is shared out
            room = shared_rules(task.problem)[layer].total
            alone = alone.replace(limits=alone.limits.replace(max_layer_replicas=room))
        slots_LGC[layer] = replan_within(alone, wish, stop=part_of(task.stop, 0.9)).slots_LGC[0]
    return slots_LGC


def _moves_proof(
    problem: Problem,
    live_LGC: SlotArray,
    slots_LGC: SlotArray,
    share_LGC: FloatArray,
    known_L: IntArray | None,
) -> str:
    """How many moves any plan as balanced needs at least, as a sentence; `known_L`: within the tolerance."""
    assert problem.current is not None
    if problem.split == "equal" or problem.current.partial:
        return ""
    moves_L = layer_moves(problem, slots_LGC, live_LGC)
    wanted_L = token_bound(problem) * (1 + problem.objective.balance_tolerance)
    speed_G = problem.topology.speed_G
    if problem.loads.shape[0] > 1:  # what is as balanced over the scenarios is as balanced for their mean
        reached_L = np.maximum(wanted_L, risk_L(problem, slots_LGC))
    else:
        reached_L = np.maximum(wanted_L, gpu_times(problem.load_LE, slots_LGC, share_LGC, speed_G).max(1))
    least_L = min_moves_bound(problem.load_LE, live_LGC, speed_G, reached_L)
    if known_L is not None:
        least_L = np.maximum(least_L, np.where(reached_L <= wanted_L * (1 + 1e-9), known_L, 0))
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


def _scarcer(problem: Problem) -> str:
    """The limit that the budget of `_budget` comes from."""
    limits, bytes_L = problem.limits, problem.bytes_L
    if limits.max_move_bytes is None:
        return "max_moves"
    fits = limits.max_move_bytes // int(bytes_L.max())
    return "max_move_bytes" if limits.max_moves is None or fits < limits.max_moves else "max_moves"


def _moves_kept(problem: Problem, slots_LGC: SlotArray, live_LGC: SlotArray, part: float = 1.0) -> bool:
    """Whether a placement keeps a part of what may move: replicas in all and by layer, and bytes."""
    limits, moves_L = problem.limits, layer_moves(problem, slots_LGC, live_LGC)
    spent = (
        (limits.max_moves, int(moves_L.sum())),
        (limits.max_layer_moves, int(moves_L.max())),
        (limits.max_move_bytes, int(moves_L @ problem.bytes_L)),
    )
    return all(most is None or used <= part * most for most, used in spent)


def _within_seconds(
    task: Task[ReplanOptions],
    live_LGC: SlotArray,
    slots_LGC: SlotArray,
    most: float,
    cost_L: IntArray | None,
    run: Callable[[int | None], SlotArray],
) -> SlotArray:
    """Shrink the budget until the schedule of the moves takes at most `most` seconds."""
    problem = task.problem

    def seconds(slots: SlotArray) -> float:
        return schedule_migration(
            live_LGC, slots, problem.experts, problem.topology, bytes_L=problem.bytes_L
        ).seconds

    def cost(slots: SlotArray) -> int:
        moves_L = layer_moves(problem, slots, live_LGC)
        return int(moves_L.sum() if cost_L is None else moves_L @ cost_L)

    if seconds(slots_LGC) <= most:
        return slots_LGC
    low, high, best = 0, cost(slots_LGC), live_LGC
    if _astray(problem, live_LGC):
        best = replan_within(problem, ReplanWish(tolerance=_ANY)).slots_LGC
        low, least = cost(best), seconds(best)
        if least > most:
            raise InfeasibleError(
                f"limits.max_move_seconds: {most} cannot give every expert a replica where the limits "
                f"allow one; {least:.6g} would"
            )
    while high - low > max(1, high // 50) and not task.stop():
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
    task: Task[ReplanOptions], slots_LGC: SlotArray, live_LGC: SlotArray, first: Replanned
) -> SlotArray:
    """Per layer, a fresh construction with relabelled GPUs where it moves less or alone comes near.

    `first` is the re-plan that the slots are of, or come from. A layer of which its search for few moves was
    cut short is no reason to move all of it.
    """
    problem = task.problem
    moves_L = layer_moves(problem, slots_LGC, live_LGC)
    wanted_L = first.target_L * (1 + 1e-9)
    time_L = first.time_L if slots_LGC is first.slots_LGC else risk_L(problem, slots_LGC)
    filled_L = (slots_LGC >= 0).sum((1, 2))
    # Over many GPUs the look takes long, and what only fills free slots is no reason for it.
    fills_L = filled_L - (live_LGC >= 0).sum((1, 2)) if problem.topology.gpus > MANY_GPUS else 0
    doubtful = ((time_L > wanted_L) & ~first.cut_L) | (moves_L - fills_L > SCRATCH_FROM * filled_L)
    if not doubtful.any() or task.stop():
        return slots_LGC
    fresh = Construct().placed(task, problem.replace(current=None, limits=but_moves(problem.limits)))
    fresh_LGC = on_live_gpus(problem, widened(fresh.slots_LGC, slots_LGC.shape[2]))
    fresh_moves_L, fresh_time_L = layer_moves(problem, fresh_LGC, live_LGC), risk_L(problem, fresh_LGC)
    reaches, fresh_reaches = time_L <= wanted_L, fresh_time_L <= wanted_L
    better = np.where(
        reaches,
        fresh_reaches & (fresh_moves_L < moves_L),
        fresh_reaches | (fresh_time_L < time_L * (1 - problem.objective.balance_tolerance)),
    )
    mixed_LGC = slots_LGC.copy()
    mixed_LGC[doubtful & better] = fresh_LGC[doubtful & better]
    return mixed_LGC if within_all(problem, mixed_LGC) else slots_LGC


def _lowered(task: Task[ReplanOptions], slots_LGC: SlotArray, live_LGC: SlotArray) -> SlotArray:
    """A re-plan for single scenarios, changed further where that lowers the risk over all of them.

    With even shares a few changes, or more; and, where that is not enough, a fresh construction on the
    GPUs that hold most of it. Of what the limits on moves allow each layer takes the fewest moves within the
    tolerance of the best.
    """
    problem, wish = task.problem, task.problem.objective
    if problem.topology.gpus > MANY_GPUS or problem.split == "nearest" or problem.fill == Fill.COPIES:
        return slots_LGC
    wanted_L = token_bound(problem) * (1 + wish.balance_tolerance) * (1 + 1e-9)
    wide = max(int(problem.capacity_LG.max()), slots_LGC.shape[2])
    tables = [widened(slots_LGC, wide)]
    times = [risk_L(problem, slots_LGC)]

    def late() -> bool:
        return not task.stop() and bool((np.min(times, axis=0) > wanted_L).any())

    def offer(table_LGC: SlotArray) -> None:
        bad_L = ~keeps_limits(problem, table_LGC, tied=False)
        tables.append(widened(table_LGC, wide))
        times.append(np.where(bad_L, np.inf, risk_L(problem, table_LGC)))

    if problem.split == "equal" and late():
        for table_LGC in descents(problem, tables[0], DESCENTS, wish.balance_tolerance / 2, task.stop):
            offer(table_LGC)
    if late():
        fresh = problem.replace(current=None, limits=but_moves(problem.limits), known=None)
        with suppress(InfeasibleError):
            offer(on_live_gpus(problem, Construct().placed(task, fresh).slots_LGC))
    if len(tables) == 1:
        return slots_LGC
    allowed_L = np.min(times, axis=0) * (1 + wish.balance_tolerance)
    moves_KL = np.stack([layer_moves(problem, table, live_LGC) for table in tables])
    offers = _Offers(np.stack(tables), np.maximum(np.stack(times), allowed_L), moves_KL)
    budget, cost_L = _budget(problem)
    price_L = np.ones(problem.layers, dtype=np.int64) if cost_L is None else cost_L
    found_LGC = widened(offers.within(budget, price_L, problem.limits.max_layer_moves), slots_LGC.shape[2])
    kept = within_all(problem, found_LGC) and not broken_moves(problem, found_LGC, live_LGC)[0]
    return found_LGC if kept else slots_LGC


def payback_of(problem: Problem, plan: Plan, live_LGC: SlotArray) -> Payback:
    """What a re-plan saves per forward pass against staying, and what its moves cost."""
    stay_L = risk_L(problem, live_LGC)
    go_L = risk_L(problem, plan.slots_LGC)
    saved = problem.time.token_cost * float((stay_L - go_L).sum())
    schedule = schedule_migration(
        live_LGC, plan.slots_LGC, problem.experts, problem.topology, bytes_L=problem.bytes_L
    )
    cost = schedule.seconds if problem.bytes_L.any() else 0.0
    return Payback(saved_per_pass=saved, cost=cost)
