"""What every solver is: features, stopping criteria, and the one way from a placement to a Result."""

from __future__ import annotations

import enum
import time as clock
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np

from moeless_opt.problems.arrays import FloatArray, SlotArray
from moeless_opt.problems.plan.bounds import LinearTime, best_bound
from moeless_opt.problems.plan.evaluate import gpu_times, imbalance
from moeless_opt.problems.plan.plan import Certificate, Plan, count_moves
from moeless_opt.problems.plan.result import ProgressCallback, Result, StoppedBy
from moeless_opt.problems.plan.time_bounds import TimeTable, timed_bound
from moeless_opt.problems.spec.placement import equal_shares
from moeless_opt.problems.spec.problem import Problem
from moeless_opt.solvers.core.stopping import Stop

__all__ = [
    "Clock",
    "Feature",
    "Solver",
    "finish",
    "lower_bound",
    "required_features",
]


class Feature(enum.StrEnum):
    """What a problem may ask for and a solver may offer."""

    EQUAL_SPLIT = "equal split"
    FRACTIONAL = "fractional split"
    MIGRATION = "starting from a live placement"
    MOVE_LIMITS = "limits on moves"
    HETEROGENEOUS = "GPUs of different speed or slots"
    MEMORY = "memory in bytes"
    SCENARIOS = "several load scenarios"
    TIME_MODEL = "a time model with more than tokens"
    NODE_AWARE = "loads by source node"
    REPLICA_LIMITS = "limits on replicas"
    PAIRS = "pinned or forbidden pairs"
    SPREAD = "replicas spread over failure domains"
    SIZING_CV = "cv sizing"
    SIZING_MAKESPAN = "makespan sizing"
    SIZING_MEMORY = "memory sizing"
    CERTIFIES = "proofs of optimality"


def required_features(problem: Problem) -> frozenset[Feature]:
    """The features without which a solver would have to ignore a part of the problem."""
    topology, limits = problem.topology, problem.limits
    needs = {Feature.EQUAL_SPLIT if problem.split == "equal" else Feature.FRACTIONAL}
    capacity_LG = problem.capacity_LG
    if not topology.is_uniform or (capacity_LG != capacity_LG[:, :1]).any():
        needs.add(Feature.HETEROGENEOUS)
    if topology.memory_G is not None:
        needs.add(Feature.MEMORY)
    if problem.current is not None:
        needs.add(Feature.MIGRATION)
    if problem.loads.load_TLE.shape[0] > 1:
        needs.add(Feature.SCENARIOS)
    if problem.loads.load_TLNE is not None:
        needs.add(Feature.NODE_AWARE)
    if _more_than_tokens(problem):
        needs.add(Feature.TIME_MODEL)
    if problem.sizing.policy != "slots":
        needs.add(_SIZING[problem.sizing.policy])
    if limits is _NO_LIMITS:
        return frozenset(needs)
    if limits.bounds_moves:
        needs.add(Feature.MOVE_LIMITS)
    if limits.min_replicas > 1 or limits.bounds_replicas:
        needs.add(Feature.REPLICA_LIMITS)
    if limits.pinned or limits.forbidden:
        needs.add(Feature.PAIRS)
    if limits.spread > 1:
        needs.add(Feature.SPREAD)
    return frozenset(needs)


_NO_LIMITS = Problem.__dataclass_fields__["limits"].default
_SIZING = {"cv": Feature.SIZING_CV, "makespan": Feature.SIZING_MAKESPAN, "memory": Feature.SIZING_MEMORY}


def _more_than_tokens(problem: Problem) -> bool:
    """Whether least tokens is not least time: a launch cost alone shifts all times alike on equal GPUs."""
    time = problem.time
    if time.has_curve or time.activation_cost > 0:
        return True
    return time.launch > 0 and not problem.topology.is_uniform


@runtime_checkable
class Solver(Protocol):
    """What the registry holds, and what third parties register (entry points ``moeless_opt.solvers``)."""

    name: str
    summary: str
    features: frozenset[Feature]
    options: frozenset[str]

    def solve(
        self,
        problem: Problem,
        *,
        stop: Stop,
        seed: int = 0,
        initial: Plan | None = None,
        progress: ProgressCallback | None = None,
        **options: Any,
    ) -> Result:
        """Solve, from `initial` where it is given, and return the best found."""


@dataclass(frozen=True, slots=True)
class Clock:
    """Seconds since a solve began."""

    start: float

    @classmethod
    def begin(cls) -> Clock:
        """Start now."""
        return cls(clock.perf_counter())

    @property
    def seconds(self) -> float:
        """Seconds so far."""
        return clock.perf_counter() - self.start


def lower_bound(problem: Problem, split: str | None = None) -> tuple[FloatArray, tuple[str, ...]]:
    """The best cheap lower bound on each layer's largest GPU time, and its name."""
    time, limits = problem.time, problem.limits
    if time.has_curve:
        most = min(int(problem.capacity_LG.max()), problem.experts)
        bound_L = timed_bound(
            problem.load_LE, problem.capacity_LG, problem.topology.speed_G, TimeTable.of(time, most)
        )
        return bound_L, ("capacity",) * problem.layers
    linear = LinearTime(launch=time.launch, activation=time.activation_cost, token=time.token_cost)
    bound_L, name_L = best_bound(
        problem.load_LE,
        problem.capacity_LG,
        problem.topology.speed_G,
        "equal" if (split or problem.split) == "equal" else "fractional",
        max_replicas=limits.max_replicas,
        min_replicas=limits.min_replicas if limits.min_replicas > 1 else None,
        replicas_L=None
        if limits.max_layer_replicas is None
        else np.full(problem.layers, limits.max_layer_replicas),
        time=linear,
    )
    return bound_L, tuple(name_L.tolist())


def _bound_for(problem: Problem, value_L: FloatArray) -> tuple[FloatArray, tuple[str, ...]]:
    """The best cheap bound; the mean alone where every layer attains it."""
    if problem.time.counts_tokens_only:
        mean_L = problem.load_LE.sum(1) * (problem.time.token_cost / problem.topology.speed_G.sum())
        if (value_L <= mean_L * (1 + 1e-9)).all():
            return mean_L, ("mean",) * len(mean_L)
    return lower_bound(problem)


def finish(
    problem: Problem,
    slots_LGC: SlotArray,
    share_LGC: FloatArray | None = None,
    *,
    solver: str,
    began: Clock,
    bound: tuple[FloatArray, tuple[str, ...]] | None = None,
    stopped_by: StoppedBy = StoppedBy.NOTHING,
    options: Mapping[str, Any] | None = None,
    seed: int = 0,
    message: str = "",
    proof: str = "",
    certify: bool = True,
) -> Result:
    """Evaluate a placement, certify it, and wrap it up.

    Parameters
    ----------
    problem : Problem
        What was solved.
    slots_LGC, share_LGC : arrays, shape [L, G, C]
        The placement and its token shares (equal ones if not given).
    solver : str
        Who found it.
    began : Clock
        When the solve began.
    bound : (array [L], names), optional
        A lower bound that the solver proved; combined with the cheap ones.
    stopped_by, options, seed, message, proof
        Told on in the Result and its certificate.
    certify : bool
        Whether to compute a lower bound: for plans that are made in microseconds it takes longest.
    """
    if share_LGC is None:
        share_LGC = equal_shares(slots_LGC, problem.experts)
    load_LE, speed_G = problem.load_LE, problem.topology.speed_G
    time_LG = gpu_times(load_LE, slots_LGC, share_LGC, speed_G, problem.time)
    value_L = time_LG.max(1)
    bound_L, names = np.zeros(problem.layers), ("none",) * problem.layers
    if certify:
        bound_L, names = _bound_for(problem, value_L)
    if bound is not None:
        names = tuple(
            b if y > x else a for a, b, x, y in zip(names, bound[1], bound_L, bound[0], strict=True)
        )
        bound_L = np.maximum(bound_L, bound[0])
    # Rounding may leave a perfect plan a hair below its bound; a bound above the value would be a lie.
    bound_L = np.where(bound_L > value_L, np.minimum(bound_L, value_L * (1 + 1e-9)), bound_L)
    seconds = began.seconds
    plan = Plan(
        slots_LGC=slots_LGC,
        share_LGC=share_LGC,
        experts=problem.experts,
        layers=problem.loads.layers,
        split=problem.split,
        time_LG=time_LG,
        imbalance_L=imbalance(time_LG, speed_G),
        moves=count_moves(
            slots_LGC,
            None if problem.current is None else problem.current.slots_LGC,
            problem.experts,
            problem.bytes_L,
        ),
        certificate=Certificate(
            value_L=value_L,
            lower_bound_L=bound_L,
            bound_L=names,
            solver=solver,
            seconds=seconds,
            proof=proof,
        ),
        made_for=problem,
        unit=problem.time.unit,
        name=problem.name,
    )
    status = plan.certificate.status
    return Result(
        problem=problem,
        plan=plan,
        status=status,
        stopped_by=stopped_by,
        seconds=seconds,
        solver=solver,
        options=dict(options or {}),
        seed=seed,
        message=message,
    )
