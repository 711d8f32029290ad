"""The one way from what was built to a plan: evaluated, bounded and certified."""

from __future__ import annotations

from dataclasses import dataclass

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
    gpu_times,
    imbalance,
    timed_bound,
)
from moeless_opt.problems.spec import Problem, equal_shares
from moeless_opt.solvers.core.stopping import Clock

__all__ = ["Bound", "Built", "finish", "in_time", "lower_bound", "token_bound"]

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


def lower_bound(problem: Problem, split: str | None = None) -> Bound:
    """The best cheap lower bound on each layer's largest GPU time, and its name."""
    time, limits = problem.time, problem.limits
    if time.has_curve:
        most = min(int(problem.capacity_LG.max()), problem.experts)
        bound_L = timed_bound(
            problem.load_LE, problem.capacity_LG, problem.topology.speed_G, TimeTable.of(time, most)
        )
        return bound_L, ("capacity",) * problem.layers
    bound_L, name_L = best_bound(
        problem.load_LE,
        problem.capacity_LG,
        problem.topology.speed_G,
        split or problem.split,
        max_replicas=limits.max_replicas,
        min_replicas=limits.min_replicas if limits.min_replicas > 1 else None,
        replicas_L=None
        if limits.max_layer_replicas is None
        else np.full(problem.layers, limits.max_layer_replicas),
        time=time,
    )
    return bound_L, tuple(name_L.tolist())


def token_bound(problem: Problem) -> FloatArray:
    """The lower bound in tokens over speed, whatever a token costs, shape [L]."""
    bound_L, _ = lower_bound(problem)
    return np.asarray(np.maximum(bound_L - _launch(problem), 0.0) / problem.time.token_cost)


def in_time(problem: Problem, token_L: FloatArray) -> FloatArray:
    """Tokens over speed as time: the way back from `token_bound`, where time follows tokens alone."""
    return np.asarray(token_L * problem.time.token_cost + _launch(problem))


def _launch(problem: Problem) -> float:
    return problem.time.launch / float(problem.topology.speed_G.max())


def _bound_for(problem: Problem, value_L: FloatArray) -> Bound:
    """The best cheap bound; the mean alone where every layer attains it."""
    if problem.time.counts_tokens_only:
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
    slots_LGC, share_LGC = built.slots_LGC, built.shares_LGC
    speed_G = problem.topology.speed_G
    time_LG = gpu_times(problem.load_LE, slots_LGC, share_LGC, speed_G, problem.time)
    value_L = time_LG.max(1)
    try:
        bound_L, names = _certified(problem, value_L, built.bound, certify)
    except InvalidPlanError:
        for slots_GC, capacity_G in zip(slots_LGC, problem.capacity_LG, strict=True):
            check_slots(slots_GC, problem.experts, capacity_G)  # what breaks a rule may be below any bound
        raise
    current = None if problem.current is None else problem.current.slots_LGC
    return Plan(
        slots_LGC=slots_LGC,
        share_LGC=share_LGC,
        experts=problem.experts,
        layers=problem.loads.layers,
        split=problem.split,
        time_LG=time_LG,
        imbalance_L=imbalance(time_LG, speed_G),
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
    )


def _certified(problem: Problem, value_L: FloatArray, proven: Bound | None, certify: bool) -> Bound:
    """The best bound known of each layer."""
    bound_L, names = np.zeros(problem.layers), ("none",) * problem.layers
    if certify:
        bound_L, names = _bound_for(problem, value_L)
    if proven is not None:
        pairs = zip(names, proven[1], bound_L, proven[0], strict=True)
        names = tuple(b if y > x else a for a, b, x, y in pairs)
        bound_L = np.maximum(bound_L, proven[0])
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
