"""What balance costs: Pareto fronts in one call and one picture, and the schedule of a plan's moves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moeless_opt.plots import picture, plain_title
from moeless_opt.problems.arrays import FloatArray, IntArray, SlotArray
from moeless_opt.problems.errors import InvalidPlanError, ProblemError, UnsupportedFeatureError
from moeless_opt.problems.plan import (
    Migration,
    Plan,
    Progress,
    ProgressCallback,
    gpu_times,
    migration_violations,
    objective_vector,
)
from moeless_opt.problems.plan.verify import verify
from moeless_opt.problems.spec import PRIORITIES, Problem
from moeless_opt.problems.text import bytes_text, html_table
from moeless_opt.report import ratio_text, table, terminal_width
from moeless_opt.solvers.construct import construct_equal, construct_fractional
from moeless_opt.solvers.core import Clock, Stop, hull_steps, lower_bound, risk_L
from moeless_opt.solvers.core.finish import Built, finish
from moeless_opt.solvers.migration import schedule_migration, staging_limit
from moeless_opt.solvers.replan import frontier
from moeless_opt.solvers.shares import best_shares

__all__ = ["ParetoFront", "checked_schedule", "migration", "pareto"]

SIZES = 8
"""Replica counts per layer, from one each to full slots, that the front of balance against memory tries."""


@dataclass(frozen=True, slots=True)
class ParetoFront:
    """Plans of which none is better in both objectives, cheapest first.

    Parameters
    ----------
    problem : Problem
        What was solved.
    objectives : (str, str)
        ``"balance"`` and what it is traded against.
    plans : tuple of Plan
        Verified plans.
    values : tuple of (float, float)
        Of each plan: mean over the layers of max/mean GPU time, and the other objective
        (bytes; replicas where sizes are unknown).
    """

    problem: Problem
    objectives: tuple[str, str]
    plans: tuple[Plan, ...]
    values: tuple[tuple[float, float], ...]

    def __str__(self) -> str:
        return table(self._head, self._rows(), words_last=False, width=terminal_width())

    def __repr__(self) -> str:
        (first, cheap), (last, dear) = self.values[0], self.values[-1]
        return (
            f"ParetoFront({len(self.plans)} plans, imbalance {first:.4f} for {self._cost_text(cheap)} to "
            f"{last:.4f} for {self._cost_text(dear)} of {self.objectives[1]})"
        )

    def _repr_html_(self) -> str:
        return html_table(
            self._head, self._rows(), f"{self.problem.name}: balance against {self.objectives[1]}"
        )

    @property
    def _head(self) -> tuple[str, ...]:
        counted, cost = ("moves", "moved") if self.objectives[1] == "moves" else ("replicas", "memory")
        return ("imbalance", "worst", counted, cost)

    def _rows(self) -> list[list[str]]:
        return [
            [
                ratio_text(balance),
                ratio_text(plan.imbalance_L.max()),
                str(plan.moves.count) if self.objectives[1] == "moves" else str(plan.replicas),
                self._cost_text(cost),
            ]
            for plan, (balance, cost) in zip(self.plans, self.values, strict=True)
        ]

    def _cost_text(self, cost: float) -> str:
        return bytes_text(cost) if self.problem.bytes_L.any() else f"{cost:.0f} replicas"

    def plot(self, *, form: str = "png") -> bytes:
        """Draw the front.

        Parameters
        ----------
        form : {"png", "svg", "pdf"}
            Format of the picture.

        Returns
        -------
        bytes
            The picture.
        """
        from matplotlib.figure import Figure

        figure = Figure(figsize=(6, 4), layout="constrained")
        axes = figure.subplots()
        sized = bool(self.problem.bytes_L.any())
        scale = 1e9 if sized else 1.0
        axes.step(
            [cost / scale for _, cost in self.values], [b for b, _ in self.values], where="post", marker="o"
        )
        axes.set_xlabel(f"{self.objectives[1]} ({'GB' if sized else 'replicas'})")
        axes.set_ylabel("imbalance (max/mean, mean over layers)")
        axes.set_title(plain_title(self.problem.name) or "balance against " + self.objectives[1])
        axes.grid(alpha=0.3)
        return picture(figure, form, dpi=120)


def pareto(
    problem: Problem,
    objectives: Sequence[str] = ("balance", "moves"),
    *,
    points: int = 12,
    seed: int = 0,
    stop: Stop | None = None,
    progress: ProgressCallback | None = None,
) -> ParetoFront:
    """Trade balance against moves, or against memory.

    Every layer offers a few placements of its own (re-plans to a ladder of tolerances; or constructions
    with fewer replicas); along the lower convex hull of each, the steps that gain most time for their cost
    come first, over all layers.

    Parameters
    ----------
    problem : Problem
        With a live placement for ``moves``.
    objectives : ("balance", "moves") or ("balance", "memory")
        What to trade.
    points : int
        Plans wanted, at most.
    seed : int
        Random seed.
    stop : Stop, optional
        When to be content with the points found.
    progress : callable, optional
        Called with `Progress` objects.

    Returns
    -------
    ParetoFront

    Raises
    ------
    ProblemError
        If an objective is unknown, or nothing is live to move from.
    UnsupportedFeatureError
        If the pair cannot be traded.

    Notes
    -----
    Merging hulls by slope is the greedy of the multiple-choice knapsack (Sinha and Zoltners, 1979): exact at
    the points that it stops at, for the placements that the layers offer.
    """
    names = _pair_of(problem, objectives, points)
    problem.check_feasible()
    began = Clock.begin()
    if names[1] == "moves":
        if problem.current is None:
            raise ProblemError("current", "is missing: without a live placement every replica moves")
        # A rung starts where the one above it ended: needless moves are few, and not looked for.
        rounds = None if problem.split == "fractional" else 0
        found = frontier(problem, seed=seed, rounds=rounds, stop=stop, progress=progress)
        slots_KLGC, time_KL, count_KL = found.slots_KLGC, found.time_KL, found.moves_KL
    else:
        slots_KLGC, time_KL = _by_size(problem, seed, stop, progress)
        count_KL = (slots_KLGC >= 0).sum((2, 3))
    unit_L = problem.bytes_L if problem.bytes_L.any() else np.ones(problem.layers, dtype=np.int64)
    chosen = _merge(time_KL, np.asarray(count_KL * unit_L, dtype=np.float64), points)
    plans, bound = [], lower_bound(problem)
    for index_L in chosen:
        slots_LGC = slots_KLGC[index_L, np.arange(problem.layers)]
        built = Built(slots_LGC=slots_LGC, share_LGC=best_shares(problem, slots_LGC), bound=bound)
        plan = finish(problem, built, solver="pareto", began=began, certify=False)
        verify(problem, plan)
        plans.append(plan)
    values = [(float(plan.imbalance_L.mean()), objective_vector(problem, plan)[names[1]]) for plan in plans]
    return ParetoFront(problem, ("balance", names[1]), tuple(plans), tuple(values))


def _pair_of(problem: Problem, objectives: Sequence[str], points: int) -> tuple[str, ...]:
    """The two objectives, where they can be traded."""
    names = tuple(objectives)
    unknown = [name for name in names if name not in PRIORITIES]
    if unknown or len(names) != 2:
        raise ProblemError("objectives", f"are {names}, must be two of {PRIORITIES}")
    if isinstance(points, bool) or points < 2:
        raise ProblemError("points", f"is {points!r}, must be at least 2")
    if names not in (("balance", "moves"), ("balance", "memory")):
        raise UnsupportedFeatureError(
            f"pareto: {names} is not supported; ('balance', 'moves') and ('balance', 'memory') are"
        )
    if names[1] == "memory" and problem.fill != "none":
        raise UnsupportedFeatureError(
            f"pareto: with fill {problem.fill!r} every plan holds every slot: there is no memory to trade"
        )
    return names


def migration(
    problem: Problem, plan: Plan, *, staging: int | None = None, max_step_bytes: int | None = None
) -> Migration:
    """The ordered schedule that brings the live placement to a plan.

    Parameters
    ----------
    problem : Problem
        With the live placement.
    plan : Plan
        Where to.
    staging : int, optional
        Bytes that a GPU may hold beyond its slots while replicas arrive (one replica by default); where the
        GPUs' memory is known, that is the limit.
    max_step_bytes : int, optional
        Bytes of all transfers of one step.

    Returns
    -------
    Migration
        Checked by an independent replay. Its layers carry the model's own numbers.

    Raises
    ------
    ProblemError
        If nothing is live.
    InfeasibleError
        If the replicas wait for each other and no memory is left to break the cycle.
    """
    if problem.current is None:
        raise ProblemError("current", "is missing: a migration starts from a live placement")
    given = problem.current.slots_LGC, plan.slots_LGC
    schedule = checked_schedule(problem, *given, staging=staging, max_step_bytes=max_step_bytes)
    return schedule.named(problem.loads.layers)


def checked_schedule(
    problem: Problem,
    before_LGC: SlotArray,
    after_LGC: SlotArray,
    *,
    staging: int | None = None,
    max_step_bytes: int | None = None,
) -> Migration:
    """The schedule from one placement to another on a problem's GPUs, by rows, replayed independently."""
    topology, size_L, experts = problem.topology, problem.bytes_L, problem.experts
    unit_L = size_L if size_L.any() else np.ones(problem.layers, dtype=np.int64)
    limit_G = staging_limit(topology, unit_L, problem.capacity_LG, staging)
    schedule = schedule_migration(
        before_LGC,
        after_LGC,
        experts,
        topology,
        bytes_L=size_L,
        limit_G=limit_G,
        max_step_bytes=max_step_bytes,
    )
    found = migration_violations(
        schedule, before_LGC, after_LGC, experts, topology, bytes_L=size_L, limit_G=limit_G
    )
    if found:
        raise InvalidPlanError(found)
    return schedule


def _by_size(
    problem: Problem, seed: int, stop: Stop | None, progress: ProgressCallback | None
) -> tuple[SlotArray, FloatArray]:
    """Constructions with from one to all slots' replicas, and their largest times: [K, L, G, C], [K, L]."""
    load_LE, speed_G, capacity_LG = problem.load_LE, problem.topology.speed_G, problem.capacity_LG
    wide = int(capacity_LG.max())
    began, floor = Clock.begin(), float(lower_bound(problem)[0].sum())
    slots: list[SlotArray] = []
    times: list[FloatArray] = []
    room_L = np.minimum(capacity_LG, problem.experts).sum(1)
    for part in np.linspace(0.0, 1.0, SIZES):
        if slots and stop is not None and stop():
            break
        want_L = np.rint(problem.experts + part * (room_L - problem.experts)).astype(np.int64)
        less_LG = _shrink(capacity_LG, want_L)
        if problem.split != "fractional":
            one = construct_equal(load_LE, less_LG, speed_G, seed=seed, stop=stop)
            share = best_shares(problem, one)
        else:
            one, share = construct_fractional(load_LE, less_LG, speed_G, seed=seed)
        several = problem.loads.shape[0] > 1 or problem.share_entries is not None
        times.append(risk_L(problem, one) if several else gpu_times(load_LE, one, share, speed_G).max(1))
        padded = np.full((*one.shape[:2], wide), -1, dtype=np.int32)
        padded[:, :, : one.shape[2]] = one
        slots.append(padded)
        if progress is not None:
            best, note = float(times[-1].sum()), f"{int(want_L.sum())} replicas"
            progress(
                Progress(seconds=began.seconds, best=best, bound=floor, done=len(slots) / SIZES, note=note)
            )
    return np.stack(slots), np.stack(times)


def _shrink(capacity_LG: IntArray, want_L: IntArray) -> IntArray:
    """Take slots away, from the GPUs with most first, until each layer has `want_L`."""
    less_LG = capacity_LG.copy()
    for layer, want in enumerate(want_L):
        for _ in range(int(less_LG[layer].sum()) - int(want)):
            row = less_LG[layer]
            row[len(row) - 1 - int(np.argmax(row[::-1]))] -= 1
    return less_LG


def _merge(time_KL: FloatArray, cost_KL: FloatArray, points: int) -> list[IntArray]:
    """Choices of a point per layer along the merged hulls, cheapest first."""
    at_L, steps = hull_steps(list(cost_KL.T), list(time_KL.T))
    states = [at_L.copy()]
    for layer, point in steps:
        at_L[layer] = point
        states.append(at_L.copy())
    keep = np.unique(np.rint(np.linspace(0, len(states) - 1, min(points, len(states)))).astype(np.int64))
    return [states[i] for i in keep]
