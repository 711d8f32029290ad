"""The one way from what was built to a plan: evaluated, bounded and certified."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from moeless_opt.problems.arrays import FloatArray, SlotArray
from moeless_opt.problems.errors import InvalidPlanError
from moeless_opt.problems.plan import (
    PROVEN,
    Certificate,
    Plan,
    StoppedBy,
    TimeTable,
    best_bound,
    check_slots,
    count_moves,
    entry_bound,
    judged,
    limit_bound,
    replica_limits,
    risk,
    tau_star,
    timed_bound,
)
from moeless_opt.problems.spec import Fill, Problem, equal_shares, seat_in_place
from moeless_opt.solvers.core.entries import in_entries
from moeless_opt.solvers.core.scenarios import (
    MOST_SCENARIOS,
    one_split,
    perfect_tokens,
    scenario_shares,
    scenario_split,
)
from moeless_opt.solvers.core.slack import only_moves, without_slack
from moeless_opt.solvers.core.stopping import Clock

__all__ = ["Bound", "Built", "finish", "in_time", "kept_in_place", "lower_bound", "token_bound"]

Bound = tuple[FloatArray, tuple[str, ...]]
"""A lower bound on each layer's largest GPU time, shape [L], and its name by layer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Built:
    """What a solver has built: a placement, and what it knows of it.

    Parameters
    ----------
    slots_LGC : array of int32, shape [L, G, C]
        Expert in each slot, -1 for an empty one.
    share_LGC : array, shape [L, G, C], optional
        Token shares; even ones if not given.
    scenario_share_TLGC : array, shape [T, L, G, C], optional
        Shares of each scenario, where the solver has its own; else those of least tokens over speed.
    bound : (array [L], names), optional
        A lower bound that was proven on the way; combined with the cheap ones.
    stopped_by : StoppedBy
        What cut the search short, if anything did.
    message : str
        For people.
    proof : str
        What else was proven, for the certificate.
    """

    slots_LGC: SlotArray
    share_LGC: FloatArray | None = None
    scenario_share_TLGC: FloatArray | None = None
    bound: Bound | None = None
    stopped_by: StoppedBy = StoppedBy.NOTHING
    message: str = ""
    proof: str = ""

    @property
    def shares_LGC(self) -> FloatArray:
        """The token shares, even ones where none were given, shape [L, G, C]."""
        if self.share_LGC is not None:
            return self.share_LGC
        return equal_shares(self.slots_LGC, int(self.slots_LGC.max()) + 1)

    def with_shares(self, problem: Problem) -> Built:
        """The same with shares for every scenario, and in whole entries, where the problem wants them so."""
        each, loads = self.scenario_share_TLGC, problem.loads
        if each is None and loads.shape[0] > 1:
            check_layers(problem, self.slots_LGC)
            if problem.split == "fractional" and one_split(problem):
                return replace(self, share_LGC=scenario_split(problem, self.slots_LGC))
            each = scenario_shares(problem, self.slots_LGC, self.shares_LGC)
        if problem.share_entries is None:
            return self if each is self.scenario_share_TLGC else replace(self, scenario_share_TLGC=each)
        if each is not None:
            pairs = zip(loads.load_TLE, each, strict=True)
            each = np.array([in_entries(problem, load_LE, self.slots_LGC, one) for load_LE, one in pairs])
        share_LGC = in_entries(problem, problem.load_LE, self.slots_LGC, self.shares_LGC)
        return replace(self, share_LGC=share_LGC, scenario_share_TLGC=each)


def kept_in_place(problem: Problem, built: Built) -> Built:
    """The same, every expert that stays on its GPU in the slot where it is live."""
    if problem.current is None:
        return built
    order_LGC = seat_in_place(built.slots_LGC, problem.current.slots_LGC, problem.capacity_LG)
    each = built.scenario_share_TLGC
    return replace(
        built,
        slots_LGC=np.take_along_axis(built.slots_LGC, order_LGC, axis=2),
        share_LGC=np.take_along_axis(built.shares_LGC, order_LGC, axis=2),
        scenario_share_TLGC=None
        if each is None
        else np.stack([np.take_along_axis(one, order_LGC, axis=2) for one in each]),
    )


def check_layers(problem: Problem, slots_LGC: SlotArray) -> None:
    """Raise unless slots place every layer by the rules (see `check_slots`)."""
    for layer, slots_GC, capacity_G in zip(problem.loads.layers, slots_LGC, problem.capacity_LG, strict=True):
        try:
            check_slots(slots_GC, problem.experts, capacity_G, copies=problem.fill == Fill.COPIES)
        except InvalidPlanError as error:
            raise InvalidPlanError([f"layer {layer}: {text}" for text in error.violations]) from None


def lower_bound(problem: Problem, split: str | None = None) -> Bound:
    """The best cheap lower bound on each layer's time, and its name.

    Over several scenarios no placement beats the risk of the scenarios' own bounds, since a risk measure
    never falls where a time rises; nor the bound for the expected loads, since a layer's time is convex in
    them (of free shares, not of whole entries); nor, in the worst case, replicas that must do for every
    expert's largest load. By the covariance see `_covariance_bound`.
    """
    loads = problem.loads
    if loads.shape[0] == 1:
        return _bound_of(problem, problem.load_LE, split)
    if one_split(problem):
        return _covariance_bound(problem, split)
    free = problem if problem.share_entries is None else problem.replace(share_entries=None)
    expected_L, names = _bound_of(free, problem.load_LE, split)
    each = [_bound_of(problem, load_LE, split) for load_LE in loads.load_TLE]
    together_L = risk(np.array([bound_L for bound_L, _ in each]), loads.weight_T, problem.objective)
    known = [{own[x] for _, own in each} for x in range(problem.layers)]
    best: Bound = together_L, tuple(own.pop() if len(own) == 1 else "scenarios" for own in known)
    if not problem.time.has_curve:
        best = _higher(best, (expected_L, names))
    if problem.objective.risk == "worst" and problem.time.counts_tokens_only:
        most_LE = loads.load_TLE.max(0)
        tau_L = tau_star(most_LE, problem.capacity_LG, problem.topology.speed_G, split or _provable(problem))
        best = _higher(best, (tau_L * problem.time.token_cost, ("tau",) * problem.layers))
    return best


def _covariance_bound(problem: Problem, split: str | None) -> Bound:
    """The best bound for loads within the ellipsoid that the covariance describes.

    With one split, m + sigma deviations of a GPU is its time under the loads of an ellipsoid around the mean
    that are worst for it: ``sqrt(s'Cs) >= u's`` for every u of the ellipsoid's surface (Ben-Tal and
    Nemirovski, "Robust solutions of uncertain linear programs", Operations Research Letters 25 (1999)). So no
    layer ends before it would under any of those loads alone; taken are the mean, the mean moved towards the
    heaviest scenarios, and what all GPUs together stray. All are mixtures of scenarios, so that shares which
    follow from them (by source node) are shares, too.
    """
    loads, sigma = problem.loads, problem.objective.sigma
    count = loads.shape[0]
    weight_T = np.full(count, 1 / count) if loads.weight_T is None else loads.weight_T
    usual = _bound_of(problem, problem.load_LE, split)
    even_L = in_time(problem, perfect_tokens(problem))
    best = _higher(usual, (even_L, ("mean",) * problem.layers))
    for t in np.argsort(-weight_T, kind="stable")[:MOST_SCENARIOS].tolist():
        part = min(sigma * weight_T[t] ** 0.5, 1.0)
        load_LE = problem.load_LE + part * (loads.load_TLE[t] - problem.load_LE)
        bound_L, names = _bound_of(problem, np.maximum(load_LE, 0.0), split)
        best = _higher(best, (bound_L, names))
    return best


def _higher(first: Bound, second: Bound) -> Bound:
    """Of two bounds the higher one of each layer; of equals the first."""
    pairs = zip(first[1], second[1], first[0], second[0], strict=True)
    names = tuple(b if y > x * (1 + 1e-12) else a for a, b, x, y in pairs)
    return np.maximum(first[0], second[0]), names


def _bound_of(problem: Problem, load_LE: FloatArray, split: str | None) -> Bound:
    """The best cheap bound for some loads."""
    time = problem.time
    if time.has_curve:
        most = min(int(problem.capacity_LG.max()), problem.experts)
        bound_L = timed_bound(
            load_LE, problem.capacity_LG, problem.topology.speed_G, TimeTable.of(time, most)
        )
        return bound_L, ("capacity",) * problem.layers
    split = split or _provable(problem)
    if problem.share_entries is not None and split == "fractional":
        free = _bound_of(problem.replace(share_entries=None), load_LE, split)
        launch, speed_G = _launch(problem), problem.topology.speed_G
        low_L = np.maximum(free[0] - launch, 0.0) / time.token_cost
        token_L = entry_bound(load_LE, problem.capacity_LG, speed_G, problem.share_entries, low_L)
        return _higher(free, (token_L * time.token_cost + launch, ("entries",) * problem.layers))
    given = (load_LE, problem.capacity_LG, problem.topology.speed_G, split)
    problem = without_slack(problem)
    if problem.limits is (moves := only_moves(problem.limits)) or problem.limits == moves:
        bound_L, name_L = best_bound(*given, time=time)
        return bound_L, tuple(name_L.tolist())
    replicas = replica_limits(problem)
    bound_L, name_L = best_bound(
        *given,
        max_replicas=replicas.most_LE,
        min_replicas=replicas.least_LE if (replicas.least_LE > 1).any() else None,
        replicas_L=replicas.room_L,
        time=time,
    )
    within_L = limit_bound(problem, load_LE, replicas, split) * time.token_cost
    return _higher((bound_L, tuple(name_L.tolist())), (within_L, ("limits",) * problem.layers))


def _provable(problem: Problem) -> str:
    """The split whose bounds hold for the problem's.

    Tokens that go to the nearest replica are divided in some way, so what holds for free shares holds for
    them; and on a single node evenly. Second copies are weights: a GPU with k of an expert's n slots serves
    k/n of it, so of plans with these, too, only what holds for free shares is true.
    """
    if problem.fill == Fill.COPIES:
        return "fractional"
    if problem.split != "nearest":
        return problem.split
    return "equal" if np.unique(problem.topology.node_G[problem.usable_LG.any(0)]).size <= 1 else "fractional"


def token_bound(problem: Problem) -> FloatArray:
    """The lower bound in tokens over speed, whatever a token costs, shape [L]."""
    bound_L, _ = lower_bound(problem)
    return np.asarray(np.maximum(bound_L - _launch(problem), 0.0) / problem.time.token_cost)


def in_time(problem: Problem, token_L: FloatArray) -> FloatArray:
    """Tokens over speed as time: the way back from `token_bound`, where time follows tokens alone."""
    return np.asarray(token_L * problem.time.token_cost + _launch(problem))


def _launch(problem: Problem) -> float:
    usable_G = problem.usable_LG.any(0)
    return problem.time.launch / float(problem.topology.speed_G[usable_G].max(initial=1e-300))


def _bound_for(problem: Problem, value_L: FloatArray) -> Bound:
    """The best cheap bound; the mean alone where every layer attains it."""
    if problem.time.counts_tokens_only and problem.loads.shape[0] == 1 and problem.usable_LG.all():
        mean_L = problem.load_LE.sum(1) * (problem.time.token_cost / problem.topology.speed_G.sum())
        if (value_L <= mean_L * (1 + 1e-9)).all():
            return mean_L, ("mean",) * len(mean_L)
    return lower_bound(problem)


def finish(problem: Problem, built: Built, *, solver: str, began: Clock, certify: bool = True) -> Plan:
    """Evaluate what was built, certify it, and wrap it up.

    Parameters
    ----------
    problem : Problem
        What was solved.
    built : Built
        The placement.
    solver : str
        Who found it.
    began : Clock
        When the solve began.
    certify : bool
        Whether to compute a lower bound: for plans that are made in microseconds it takes longest.

    Raises
    ------
    InvalidPlanError
        If a bound is above the value of the plan by more than rounding: one of them is wrong.
    """
    built = built.with_shares(problem)
    slots_LGC, share_LGC = built.slots_LGC, built.shares_LGC
    told = judged(problem, slots_LGC, share_LGC, built.scenario_share_TLGC)
    value_L = told.value_L
    try:
        bound_L, names = _certified(problem, value_L, built.bound, certify)
    except InvalidPlanError:
        check_layers(problem, slots_LGC)  # what breaks a rule may be below any bound
        raise
    current = None if problem.current is None else problem.current.slots_LGC
    return Plan(
        slots_LGC=slots_LGC,
        share_LGC=share_LGC,
        experts=problem.experts,
        layers=problem.loads.layers,
        split=problem.split,
        share_entries=problem.share_entries,
        time_LG=told.time_LG,
        imbalance_L=told.imbalance_L,
        moves=count_moves(slots_LGC, current, problem.experts, problem.bytes_L),
        certificate=Certificate(
            value_L=value_L,
            lower_bound_L=bound_L,
            bound_L=names,
            solver=solver,
            seconds=began.seconds,
            proof=built.proof,
        ),
        made_for=problem,
        unit=problem.time.unit,
        name=problem.name,
        scenario_share_TLGC=built.scenario_share_TLGC,
    )


def _certified(problem: Problem, value_L: FloatArray, proven: Bound | None, certify: bool) -> Bound:
    """The best bound known of each layer."""
    bound_L, names = np.zeros(problem.layers), ("none",) * problem.layers
    if certify:
        bound_L, names = _bound_for(problem, value_L)
    if proven is not None:
        bound_L, names = _higher((bound_L, names), proven)
    over_L = bound_L > value_L * (1 + PROVEN)
    if over_L.any():
        i = int(np.argmax(over_L))
        raise InvalidPlanError(
            [
                f"layer {problem.loads.layers[i]}: lower bound {bound_L[i]:.9g} ({names[i]}) is above "
                f"the plan's own {value_L[i]:.9g}"
            ]
        )
    # Rounding may leave a perfect plan a hair below its bound.
    return np.where(bound_L > value_L, np.minimum(bound_L, value_L * (1 + 1e-9)), bound_L), names
