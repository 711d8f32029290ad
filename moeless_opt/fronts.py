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
    failure_sets,
    gpu_times,
    migration_violations,
    objective_vector,
    outside_L,
    traffic_L,
)
from moeless_opt.problems.plan.verify import verify
from moeless_opt.problems.spec import EVERY_PRIORITY, Problem
from moeless_opt.problems.text import bytes_text, html_table
from moeless_opt.report import ratio_text, table, terminal_width
from moeless_opt.solvers.construct import construct_equal, construct_fractional
from moeless_opt.solvers.core import (
    Clock,
    NeverStop,
    Stop,
    get_solver,
    hull_steps,
    lower_bound,
    require,
    risk_L,
)
from moeless_opt.solvers.core.finish import Built, finish
from moeless_opt.solvers.locality import GroupWays, LocalitySolver, locality_of
from moeless_opt.solvers.migration import schedule_migration, staging_limit
from moeless_opt.solvers.replan import frontier
from moeless_opt.solvers.shares import best_shares

__all__ = ["ParetoFront", "checked_schedule", "migration", "pareto"]

NEAR = ("traffic", "groups", "hops")
SHARES = (*NEAR, "survival")
"""What is told as a share: of the tokens, or a probability; traded by a ladder of balance tolerances."""
_TOLERANCES = (0.0, 0.002, 0.005, 0.01, 0.02, 0.035, 0.05, 0.08, 0.12, 0.2, 0.35, 0.6, 1.0)

_LAYERS, _PAIRS = 8, 8192  # layers, and pairs of an expert and a GPU of each, from which on fronts are merged
_SEARCHED = 6  # tolerances that are searched then
_TIGHT = 0.01  # tolerance up to which that takes a longer search
_TABLES = "slots_LGC", "share_LGC"

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
        ``"balance"`` and what it is traded against; or ``"traffic"`` and ``"moves"``.
    plans : tuple of Plan
        Verified plans.
    values : tuple of (float, float)
        Of each plan: mean over the layers of max/mean GPU time (or the traffic, in tokens), and the other
        objective (bytes; replicas where sizes are unknown; tokens).
    """

    problem: Problem
    objectives: tuple[str, str]
    plans: tuple[Plan, ...]
    values: tuple[tuple[float, float], ...]

    def __str__(self) -> str:
        return table(self._head, self._rows(), words_last=False, width=terminal_width())

    def __repr__(self) -> str:
        (first, cheap), (last, dear) = self.values[0], self.values[-1]
        what = "imbalance" if self.objectives[0] == "balance" else self.objectives[0]
        return (
            f"ParetoFront({len(self.plans)} plans, {what} {self._first_text(first)} for "
            f"{self._cost_text(cheap)} to {self._first_text(last)} for {self._cost_text(dear)} of "
            f"{self.objectives[1]})"
        )

    def _repr_html_(self) -> str:
        title = f"{self.problem.name}: {self.objectives[0]} against {self.objectives[1]}"
        return html_table(self._head, self._rows(), title)

    @property
    def _head(self) -> tuple[str, ...]:
        first, second = self.objectives
        start = ("imbalance", "worst") if first == "balance" else (first, "imbalance")
        if second == "survival":
            return (*start, "loss", "probability")
        if second in NEAR:
            return (*start, second, "of all")
        return (*start, *(("moves", "moved") if second == "moves" else ("replicas", "memory")))

    def _rows(self) -> list[list[str]]:
        rows = []
        for plan, (first, cost) in zip(self.plans, self.values, strict=True):
            shape = plan.imbalance_L.max() if self.objectives[0] == "balance" else plan.imbalance_L.mean()
            counted = str(plan.moves.count) if self.objectives[1] == "moves" else str(plan.replicas)
            last = [counted, self._cost_text(cost)]
            if self.objectives[1] in SHARES:
                last = [f"{cost:.6g}", self._cost_text(cost)]
            rows.append([self._first_text(first), ratio_text(shape), *last])
        return rows

    @property
    def _all(self) -> float:
        """Tokens that there are, or hops; 1 where it is a probability."""
        if self.objectives[1] == "survival":
            return 1.0
        flow_LEE = self.problem.loads.flow_LEE
        hops = self.objectives[1] == "hops" and flow_LEE is not None
        return float((flow_LEE if hops and flow_LEE is not None else self.problem.load_LE).sum()) or 1.0

    def _first_text(self, value: float) -> str:
        return ratio_text(value) if self.objectives[0] == "balance" else f"{value / self._all:.2%}"

    def _cost_text(self, cost: float) -> str:
        if self.objectives[1] in SHARES:
            return f"{cost / self._all:.2{'g' if cost < 1e-4 * self._all else '%'}}"
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
        near = self.objectives[1] in SHARES
        sized = bool(self.problem.bytes_L.any()) and not near
        scale = 1e9 if sized else self._all / 100 if near else 1.0
        axes.step(
            [cost / scale for _, cost in self.values], [b for b, _ in self.values], where="post", marker="o"
        )
        unit = "GB" if sized else "% of the tokens" if near else "replicas"
        label = f"{self.objectives[1]} ({unit})"
        axes.set_xlabel("loss of an expert (%)" if self.objectives[1] == "survival" else label)
        balance = self.objectives[0] == "balance"
        axes.set_ylabel(
            "imbalance (max/mean, mean over layers)" if balance else f"{self.objectives[0]} (tokens)"
        )
        title = f"{self.objectives[0]} against {self.objectives[1]}"
        axes.set_title(plain_title(self.problem.name) or title)
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
    """Trade balance against moves, memory, traffic, groups, hops or survival; or traffic against moves.

    Every layer offers a few placements of its own (re-plans to a ladder of tolerances; or constructions
    with fewer replicas); along the lower convex hull of each, the steps that gain most time for their cost
    come first, over all layers. Where tokens are served (traffic, groups, hops), and the probability that
    failures lose an expert (survival), is traded by a ladder of balance tolerances: of traffic and groups
    over many large layers by a short one, the steps merged as above. Traffic against moves is traded by a
    ladder of limits on moves.

    Parameters
    ----------
    problem : Problem
        With a live placement for ``moves``.
    objectives : ("balance", ...) or ("traffic", "moves")
        What to trade; balance against any other priority.
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
    if names[1] in SHARES or names[0] == "traffic":
        return _near_front(problem, names, points, seed, stop, progress)
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
    unknown = [name for name in names if name not in EVERY_PRIORITY]
    if unknown or len(names) != 2:
        raise ProblemError("objectives", f"are {names}, must be two of {EVERY_PRIORITY}")
    if isinstance(points, bool) or points < 2:
        raise ProblemError("points", f"is {points!r}, must be at least 2")
    pairs = (*(("balance", name) for name in ("moves", "memory", *SHARES)), ("traffic", "moves"))
    if names not in pairs:
        raise UnsupportedFeatureError(
            f"pareto: {names} is not supported; ('balance', ...) and ('traffic', 'moves') are"
        )
    if names[1] == "memory" and problem.fill != "none":
        raise UnsupportedFeatureError(
            f"pareto: with fill {problem.fill!r} every plan holds every slot: there is no memory to trade"
        )
    return names


def _near_front(
    problem: Problem,
    names: tuple[str, ...],
    points: int,
    seed: int,
    stop: Stop | None,
    progress: ProgressCallback | None,
) -> ParetoFront:
    """Plans by a ladder of balance tolerances, or of limits on moves, without those that others beat."""
    began, found = Clock.begin(), list[tuple[float, float, Plan]]()
    if _is_large(problem, names):
        return _merged_front(problem, names, points, seed, stop, progress)
    ladder = _rungs(problem, names, points)
    solver = get_solver("lexicographic" if names[1] == "survival" else "locality")
    for done, rung in enumerate(ladder):
        if found and stop is not None and stop():
            break
        require(solver, rung)
        plan = solver.solve(rung, stop=stop or NeverStop(), seed=seed).plan
        if plan is None:
            continue
        kept = problem if problem.groups is None else problem.replace(groups=rung.groups)
        plan = plan.replace(made_for=kept)
        verify(kept, plan)
        vector = objective_vector(rung, plan)
        first = float(plan.imbalance_L.mean()) if names[0] == "balance" else vector["traffic"]
        found.append((first, vector[names[1]], plan))
        if progress is not None:
            progress(_reached(began, plan, (done + 1) / len(ladder)))
    return _unbeaten(problem, names, found)


def _reached(began: Clock, plan: Plan, done: float) -> Progress:
    """What is told of a rung's plan."""
    best, note = float(plan.certificate.value_L.sum()), f"imbalance {plan.imbalance_L.mean():.4f}"
    return Progress(seconds=began.seconds, best=best, bound=0.0, done=done, note=note)


def _unbeaten(
    problem: Problem, names: tuple[str, ...], found: list[tuple[float, float, Plan]]
) -> ParetoFront:
    """The front of some plans, each with both its objectives."""
    # What differs by rounding alone is one cost, and of one cost the better balance comes first.
    unit = 1e-9 * max((cost for _, cost, _ in found), default=0.0) or 1.0
    found = [(first, cost if cost > unit else 0.0, plan) for first, cost, plan in found]
    found.sort(key=lambda one: (round(one[1] / unit), one[0]))
    kept_plans: list[tuple[float, float, Plan]] = []
    for one in found:
        if not kept_plans or one[0] < kept_plans[-1][0] * (1 - 1e-9):
            kept_plans.append(one)
    return ParetoFront(
        problem,
        (names[0], names[1]),
        tuple(plan for _, _, plan in kept_plans),
        tuple((first, cost) for first, cost, _ in kept_plans),
    )


def _is_large(problem: Problem, names: tuple[str, ...]) -> bool:
    """Whether layers are many, and large enough to be searched at few tolerances, and apart."""
    limits = problem.limits
    total = limits.max_moves, limits.max_move_bytes, limits.max_total_replicas, limits.max_total_bytes
    alone = names[1] in ("traffic", "groups") and names[0] == "balance" and problem.loads.shape[0] == 1
    many = problem.layers >= _LAYERS and problem.experts * problem.topology.gpus >= _PAIRS
    return alone and many and all(limit is None for limit in total)


class _Rung(LocalitySolver):
    """The locality solver where only slots and shares are wanted: what plans say of locality takes long."""

    def finished(self, problem: Problem, plan: Plan) -> Plan:
        """The plan as it is."""
        return plan


def _merged_front(
    problem: Problem,
    names: tuple[str, ...],
    points: int,
    seed: int,
    stop: Stop | None,
    progress: ProgressCallback | None,
) -> ParetoFront:
    """Each layer's placements at a few tolerances, from the loosest on, merged by what steps gain.

    A search starts where the one at the next looser tolerance ended (near none, where groups are at home). A
    layer that ends late is balanced alone, which the lower hull of its placements leaves aside.
    """
    began, plans, start = Clock.begin(), list[Plan](), None
    rungs = _rungs(problem, names, _SEARCHED)[::-1]
    for done, rung in enumerate(rungs):
        if plans and stop is not None and stop():
            break
        loose = rung.objective.balance_tolerance
        if plans and names[1] == "groups" and loose <= _TIGHT:  # late from the one before, more often
            start = plans[0].slots_LGC
        solver = _Rung("locality", start_LGC=start, searches=loose > 0)  # within none, in vain
        require(solver, rung)
        effort = "normal" if loose <= _TIGHT else "quick"
        plan = solver.solve(rung, stop=stop or NeverStop(), seed=seed, effort=effort).plan
        if plan is None:
            continue
        plans.append(plan)
        start = plan.slots_LGC
        if progress is not None:
            progress(_reached(began, plan, (done + 1) / len(rungs)))
    if not plans:
        return _unbeaten(problem, names, [])
    free = problem
    if names[1] == "groups" and problem.groups is not None:
        free = problem.replace(groups=problem.groups.replace(max_outside=1.0))
    cost_L = traffic_L if names[1] == "traffic" else outside_L
    cost_KL = np.stack([cost_L(free, plan.slots_LGC, plan.share_LGC) for plan in plans])
    chosen = _merge(np.stack([plan.imbalance_L for plan in plans]), cost_KL, points)
    every, bound, found = np.arange(problem.layers), lower_bound(free), list[tuple[float, float, Plan]]()
    slots_KLGC, share_KLGC = (np.stack([getattr(one, key) for one in plans]) for key in _TABLES)
    for index_L in chosen:
        built = Built(slots_LGC=slots_KLGC[index_L, every], share_LGC=share_KLGC[index_L, every], bound=bound)
        plan = finish(free, built, solver="pareto", began=began, certify=False)
        plan = plan.replace(locality=locality_of(free, plan))
        verify(free, plan)
        found.append((float(plan.imbalance_L.mean()), objective_vector(free, plan)[names[1]], plan))
    return _unbeaten(problem, names, found)


def _rungs(problem: Problem, names: tuple[str, ...], points: int) -> list[Problem]:
    """The problems whose plans make the front."""
    wish = problem.objective.replace(horizon=None)
    if names[0] == "traffic":
        if problem.current is None:
            raise ProblemError("current", "is missing: without a live placement every replica moves")
        wish = wish.replace(priorities=("balance", "moves"))
        few = get_solver("replan").solve(problem.replace(objective=wish), stop=NeverStop()).plan
        assert few is not None
        least, most = few.moves.count, few.replicas
        wish = wish.replace(priorities=("balance", "traffic"))
        steps = np.unique(np.rint(least + (most - least) * np.linspace(0, 1, points) ** 2).astype(np.int64))
        return [
            problem.replace(objective=wish, limits=problem.limits.replace(max_moves=int(step)))
            for step in steps
        ]
    wish = wish.replace(priorities=("balance", names[1]))
    keep = np.unique(np.rint(np.linspace(0, len(_TOLERANCES) - 1, min(points, len(_TOLERANCES)))).astype(int))
    rungs = [problem.replace(objective=wish.replace(balance_tolerance=_TOLERANCES[i])) for i in keep]
    if names[1] == "survival":
        if failure_sets(problem).gone_FD.shape[1] < 2:
            raise ProblemError("topology.domain", "has one failure domain: there is no survival to trade")
        rungs.append(rungs[0].replace(objective=wish.replace(priorities=("survival", "balance"))))
    if names[1] == "groups" and problem.groups is not None:
        free = problem.groups.replace(max_outside=1.0)
        rungs = [rung.replace(groups=free) for rung in rungs]
        if GroupWays(problem, 0).fits_W.any():
            rungs.append(rungs[0].replace(groups=problem.groups.replace(max_outside=0.0)))
    return rungs


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
