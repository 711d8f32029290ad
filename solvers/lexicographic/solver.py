"""Any order of priorities: exact for small layers; for large ones the best of many starts, and changes."""

from __future__ import annotations

from typing import Any

import numpy as np

from moeless_opt.problems.arrays import BoolArray, FloatArray, SlotArray
from moeless_opt.problems.errors import InfeasibleError, UnsupportedFeatureError
from moeless_opt.problems.plan import PROVEN, Plan, StoppedBy, loss_chance, order_of
from moeless_opt.problems.spec import Problem
from moeless_opt.solvers.core import Built, FirstOf, Heuristic, MaxTime, Task, keeps_limits, widened
from moeless_opt.solvers.lexicographic.descend import Chosen, best_by_order, lower_in_turn
from moeless_opt.solvers.lexicographic.exact import Exact, ordered_layer, size_of, solve_in_order
from moeless_opt.solvers.lexicographic.figures import Figures
from moeless_opt.solvers.lexicographic.starts import lean_starts, starts
from moeless_opt.solvers.lexicographic.survival import Failures, families, loss_bound, on_bases
from moeless_opt.solvers.replan import live_slots, seat
from moeless_opt.solvers.shares import best_shares

__all__ = ["Lexicographic"]

ROUNDING = 1e-8
"""Share that a proven least time gives up as a bound: the programmes' tolerance."""
SMALL = 100
"""Binary variables up to which a layer is solved exactly: a few tenths of a second."""
MOST_TRIES = 250
"""Layers times failures up to which small layers that share their losses are solved for one more failure."""
MIDDLE = 400
"""Up to which it is tried where there is a time limit."""


class Lexicographic(Heuristic):
    """Priorities in any order, any of them left out."""

    name = "lexicographic"
    summary = "priorities in any order, each within its tolerance of the one before; exact for small layers"
    patience = 60.0
    _loss_bound = 0.0

    def build(self, task: Task[Any]) -> Built:
        """Start, solve small layers exactly, search in the others."""
        problem, stop = task.problem, task.stop
        limited = stop.remaining < self.patience - 0.5
        _refuse_coupled(problem)
        figures, tolerance = Figures(problem), problem.objective.balance_tolerance
        tables, trouble = _tables(figures, task)
        if figures.failures is not None:
            self._loss_bound = loss_bound(problem, figures.failures, stop)
            tables += _survivors(figures, figures.failures, tables, task)
        if stop() and keeps_limits(problem, tables[0]).all():  # no time to look at what else there is
            return Built(slots_LGC=tables[0], share_LGC=best_shares(problem, tables[0]))
        upper_L = np.full(problem.layers, np.inf)
        for table in tables:
            good_L = keeps_limits(problem, table)
            if good_L.all() and (first := figures.order[0]) in ("balance", "survival"):
                upper_L = np.minimum(upper_L, figures.figure_L(first, table, None))
        exact = self._exact(figures, upper_L, limited, task)
        if figures.failures is not None and figures.failures.coupled and len(exact) == problem.layers:
            exact = self._more_survived(figures, figures.failures, exact, upper_L, task)
        for i, found in exact.items():
            if found.held_EG is not None:
                tables.append(np.where(_only(i, problem.layers), _as_slots(problem, i, found.held_EG), -1))
            elif found.infeasible:
                raise trouble or InfeasibleError(
                    f"limits: no placement of layer {problem.loads.layers[i]} keeps them all"
                )
        if not np.any([keeps_limits(problem, table) for table in tables], axis=0).all():
            raise trouble or InfeasibleError("limits: no placement was found that keeps them all")
        chosen = best_by_order(figures, tables, tolerance, stop)
        if chosen.limit_L is not None and not stop():
            wide = int(problem.capacity_LG.max())
            tables += [widened(table, wide) for table in lean_starts(figures, chosen.limit_L)]
            chosen = best_by_order(figures, tables, tolerance, stop)
        proven_L = self._keep_proven(figures, chosen, exact)
        lower_in_turn(figures, chosen, tolerance, ~proven_L, stop=stop, seed=task.seed)
        return self._built(figures, chosen, proven_L, exact, stop())

    def finished(self, problem: Problem, plan: Plan) -> Plan:
        """The plan, with the probability of a loss where survival is a priority."""
        if "survival" not in order_of(problem):
            return plan
        loss = loss_chance(problem, plan.slots_LGC)
        told = plan.certificate.replace(loss=loss, loss_bound=min(self._loss_bound, loss))
        return plan.replace(certificate=told)

    def _exact(
        self, figures: Figures, upper_L: FloatArray, limited: bool, task: Task[Any]
    ) -> dict[int, Exact]:
        """Exact answers for the layers that are small enough, as far as the time goes."""
        problem, stop = figures.problem, task.stop
        if figures.near and problem.loads.shape[0] > 1:
            return {}  # shares that keep tokens near in every scenario are no part of the programme
        parts = [
            ordered_layer(problem, i, figures.source_LNE[i], figures.failures) for i in range(problem.layers)
        ]
        todo = [i for i, part in enumerate(parts) if size_of(part) <= (MIDDLE if limited else SMALL)]
        found: dict[int, Exact] = {}
        for done, i in enumerate(todo):
            if stop():
                break
            task.report(np.nan, 0.0, done=done / len(todo), note=f"layer {problem.loads.layers[i]}")
            found[i] = solve_in_order(
                parts[i],
                figures.order,
                problem.objective.balance_tolerance,
                stop=FirstOf(stop, MaxTime(stop.remaining / (len(todo) - done))),
                upper=float(upper_L[i]),
            )
        return found

    def _more_survived(
        self,
        figures: Figures,
        failures: Failures,
        exact: dict[int, Exact],
        upper_L: FloatArray,
        task: Task[Any],
    ) -> dict[int, Exact]:
        """Layers that are solved exactly, with each failure that all of them can survive besides."""
        lost = failures.chance(~failures.watched_F) + failures.sets.beyond
        least = lost <= self._loss_bound * (1 + PROVEN)
        if least or len(exact) * len(failures.sets.gone_FD) > MOST_TRIES:
            return exact
        for gone_D in failures.sets.gone_FD[~failures.watched_F]:
            before_F = failures.watched_F
            # Whoever survives a failure survives less of it, too.
            failures.watched_F = before_F | ~(failures.sets.gone_FD & ~gone_D).any(1)
            more = {} if task.stop() else self._exact(figures, upper_L, True, task)
            kept = [one.proven and one.best["survival"] <= 0 for one in more.values()]
            if len(kept) == len(exact) and all(kept):
                exact = more
            else:
                failures.watched_F = before_F
        return exact

    @staticmethod
    def _keep_proven(figures: Figures, chosen: Chosen, exact: dict[int, Exact]) -> BoolArray:
        """Put the proven placements of single layers in; where they are, shape [L]."""
        problem = figures.problem
        proven_L = np.zeros(problem.layers, dtype=np.bool_)
        for i, found in exact.items():
            if found.proven and found.held_EG is not None:
                proven_L[i] = True
                chosen.slots_LGC[i] = _as_slots(problem, i, found.held_EG)[0]
                if "balance" in chosen.allowed:
                    chosen.allowed["balance"][i] = found.limit
        return proven_L

    @staticmethod
    def _built(
        figures: Figures,
        chosen: Chosen,
        proven_L: BoolArray,
        exact: dict[int, Exact],
        stopped_by: StoppedBy,
    ) -> Built:
        problem = figures.problem
        bound = None
        if figures.order[0] == "balance" and problem.loads.shape[0] == 1 and proven_L.any():
            least = [exact[i].best["balance"] if proven_L[i] else 0.0 for i in range(problem.layers)]
            bound = (np.array(least) * (1 - ROUNDING), ("lexicographic",) * problem.layers)
        order = ", ".join(figures.order)
        text = f"{order}: proven in {int(proven_L.sum())} of {problem.layers} layers, searched in the others"
        if proven_L.all():
            text = f"{order}: no plan comes before this one in this order"
            if figures.failures is not None and figures.failures.coupled:
                text += " in any layer, among those that survive the same failures"
        return Built(
            slots_LGC=chosen.slots_LGC,
            share_LGC=figures.shares(chosen.slots_LGC, chosen.limit_L),
            bound=bound,
            stopped_by=stopped_by,
            message=text,
            proof=text,
        )


def _refuse_coupled(problem: Problem) -> None:
    """Refuse what ties layers together or weighs priorities against each other."""
    limits = problem.limits
    if problem.objective.horizon is not None:
        raise UnsupportedFeatureError(
            "objective.horizon: weighs moves against time, which no strict order of priorities does; "
            "leave it out, or keep the default priorities"
        )
    if problem.layers > 1:
        for key in ("max_total_replicas", "max_total_bytes"):
            if getattr(limits, key) is not None:
                raise UnsupportedFeatureError(
                    f"limits.{key}: ties layers together, which is not supported in the order "
                    f"{', '.join(problem.objective.priorities)}; max_layer_replicas is"
                )


def _tables(figures: Figures, task: Task[Any]) -> tuple[list[SlotArray], InfeasibleError | None]:
    """Placements to begin with, as wide as the GPUs have slots; and why there are no more, if they failed."""
    problem = task.problem
    wide = int(problem.capacity_LG.max())
    tables = [] if task.initial is None else [widened(task.initial.slots_LGC, wide)]
    trouble = None
    try:
        for table in starts(figures, task.seed, task.stop):
            tables.append(widened(table, wide))
            if task.stop():
                break
    except InfeasibleError as error:
        trouble = error
    return tables, trouble


def _survivors(
    figures: Figures, failures: Failures, tables: list[SlotArray], task: Task[Any]
) -> list[SlotArray]:
    """Placements that failures seldom break; with several layers, what they survive is chosen as well."""
    problem, stop = task.problem, task.stop
    found: list[SlotArray] = []
    for bases in families(problem, failures, figures.order, stop):
        for moves in (False, True)[: 1 + ("moves" in figures.order)]:
            layers = on_bases(problem, failures, bases, moves=moves)
            found += [np.stack(one) for one in zip(*layers, strict=True)]
        if stop():
            break
    if not failures.coupled:
        return found
    every = [*tables, *found]
    usable_XL = np.array([keeps_limits(problem, table) for table in every])
    whole = [failures.lost_F(table) for table, good_L in zip(every, usable_XL, strict=True) if good_L.all()]
    aims = {lost_F.tobytes(): lost_F for lost_F in reversed(whole)}
    if not usable_XL.any(0).all():
        return found
    after = figures.order[figures.order.index("survival") + 1 :]
    best: tuple[float, ...] = ()
    watched_F = failures.watched_F
    for lost_F in aims.values():
        failures.watched_F = ~lost_F
        chosen = best_by_order(figures, every, problem.objective.balance_tolerance, stop)
        worth = (
            round(failures.chance(failures.lost_F(chosen.slots_LGC)), 15),
            *(float(chosen.value[name].sum()) for name in after),
        )
        if not best or worth < best:
            best, watched_F = worth, failures.watched_F
        if stop():
            break
    failures.watched_F = watched_F
    failures.settle(best_by_order(figures, every, problem.objective.balance_tolerance, stop).slots_LGC)
    return found


def _only(layer: int, layers: int) -> BoolArray:
    return np.asarray(np.arange(layers) == layer)[:, None, None]


def _as_slots(problem: Problem, layer: int, held_EG: BoolArray) -> SlotArray:
    """One layer's placement as slots, what stays where it is, shape [1, G, C]."""
    gpus, wide = problem.topology.gpus, int(problem.capacity_LG.max())
    live = np.full((1, gpus, wide), -1, dtype=np.int32)
    if problem.current is not None:
        live = live_slots(problem)[layer : layer + 1]
    slots = np.full((1, gpus, wide), -1, dtype=np.int32)
    for gpu in range(gpus):
        slots[0, gpu] = seat(live[0, gpu].tolist(), np.flatnonzero(held_EG[:, gpu]).tolist())
    return slots
