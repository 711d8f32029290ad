"""Exact solving of whole problems: the heuristic first, then bounds, then proofs, as time allows.

A problem falls into its layers. All get a heuristic plan and a cheap bound at once; the layers whose gap is
open are then proven one by one, those that are farthest from their bound first, each with its part of the
time left.

`Portfolio` takes for each layer the method that suits it. Equal split: the pattern search (small layers),
else CP-SAT. Fractional split: the component bound, which settles layers of few slots at once, else HiGHS.
`CpSat`, `Milp` and `Patterns` use their own method on every layer that is open.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any

import numpy as np

from moeless_opt.problems.arrays import FloatArray, SlotArray, whole
from moeless_opt.problems.plan import PROVEN, StoppedBy, gpu_times
from moeless_opt.problems.spec import Problem, equal_shares
from moeless_opt.solvers.construct import Construct, ConstructOptions
from moeless_opt.solvers.core import (
    Built,
    FirstOf,
    Heuristic,
    MaxTime,
    Stop,
    Task,
    check_engine,
    in_time,
    lower_bound,
    token_bound,
)
from moeless_opt.solvers.exact.components import MOST_EXPERTS, component_bound
from moeless_opt.solvers.exact.layer import ExactLayer, ExactResult, layer_of, result_of
from moeless_opt.solvers.pack import solve_patterns

__all__ = [
    "CpSat",
    "CpSatOptions",
    "ExactOptions",
    "Milp",
    "MilpOptions",
    "Patterns",
    "Portfolio",
    "Proof",
]

_PATTERN_EXPERTS = 20
_CPSAT_PAIRS = 600  # experts x GPUs up to which a proof can be hoped for
_MILP_PAIRS = 1100

LayerPlan = tuple[SlotArray, FloatArray]
"""Slots and shares of one layer, each of shape [G, C]."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExactOptions(ConstructOptions):
    """How the plan that is to be proven, or beaten, is constructed: as in `ConstructOptions`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CpSatOptions(ExactOptions):
    """Options of CP-SAT.

    Parameters
    ----------
    threads : int
        Threads of the solver.
    """

    threads: int = 1

    def __post_init__(self) -> None:
        super(CpSatOptions, self).__post_init__()
        object.__setattr__(self, "threads", whole("threads", self.threads, low=1))


@dataclass(frozen=True, slots=True, kw_only=True)
class MilpOptions(CpSatOptions):
    """Options of the mixed-integer solvers.

    Parameters
    ----------
    engine : str
        Who solves: ``"highs"`` or another solver that ortools' MathOpt carries (``"gscip"``);
        ``"pulp"`` for the first available of PuLP's, ``"pulp:CBC"`` for one of them by name.
    """

    engine: str = "highs"

    def __post_init__(self) -> None:
        super(MilpOptions, self).__post_init__()
        check_engine(self.engine)


@dataclass(frozen=True, slots=True)
class Proof:
    """What a method found out about one layer.

    Parameters
    ----------
    method : str
        Who proved the bound.
    bound : float
        No plan of the layer has a smaller largest time.
    plan : (slots, shares), optional
        A better plan than the one given.
    """

    method: str
    bound: float
    plan: LayerPlan | None = None


class _Exact(Heuristic):
    """Heuristic, bounds, then `prove` for every layer with an open gap."""

    Options = ExactOptions
    patience = 60.0

    def unused(self, problem: Problem) -> dict[str, str]:
        """What the construction has no use for."""
        return dict(Construct().unused(problem))

    def build(self, task: Task[ExactOptions]) -> Built:
        """Solve layer by layer until every gap is closed or time is up."""
        problem, stop = task.problem, task.stop
        start = task.initial or Construct().placed(
            task, problem, effort=task.options.effort, backend=task.options.backend
        )
        slots_LGC, share_LGC = start.slots_LGC, start.shares_LGC
        speed_G = problem.topology.speed_G
        # In tokens over speed, whatever a token costs; so are the exact models.
        bound_L, names = token_bound(problem), list(lower_bound(problem)[1])
        value_L = gpu_times(problem.load_LE, slots_LGC, share_LGC, speed_G).max(1)
        order = [int(i) for i in np.argsort(-value_L / np.maximum(bound_L, 1e-300), kind="stable")]
        open_layers = [i for i in order if value_L[i] > bound_L[i] * (1 + PROVEN)]
        stopped_by = StoppedBy.NOTHING
        found: dict[int, LayerPlan] = {}
        for done, i in enumerate(open_layers):
            best, least = float(value_L.sum()), float(bound_L.sum())
            task.report(best, least, done=done / len(open_layers), note=f"layer {problem.loads.layers[i]}")
            if stopped_by := stop(best, least):
                break
            layer = layer_of(
                problem.load_LE[i],
                problem.capacity_LG[i],
                speed_G,
                problem.split,
                slots_GC=slots_LGC[i],
                share_GC=share_LGC[i],
                bound=float(bound_L[i]),
            )
            # Quick layers leave their time to the others.
            left = stop.remaining
            part = max(left / (len(open_layers) - done), min(left, 0.05))
            proof = self.prove(layer, FirstOf(stop, MaxTime(part)), task)
            if proof.bound > bound_L[i] * (1 + 1e-12):
                bound_L[i], names[i] = proof.bound, proof.method
            if proof.plan is not None:
                found[i] = proof.plan
                value_L[i] = gpu_times(
                    layer.load_E[None], proof.plan[0][None], proof.plan[1][None], speed_G
                ).max()
        slots_LGC, share_LGC = _replaced(slots_LGC, share_LGC, found)
        left_open = int((value_L > bound_L * (1 + PROVEN)).sum())
        if left_open and not stopped_by:
            stopped_by = stop() or (StoppedBy.TIME if stop.remaining <= 0.01 else stopped_by)
        message = f"{len(open_layers)} of {problem.layers} layers needed more than the cheap bounds"
        if left_open:
            message += f"; {left_open} are not proven"
        return Built(
            slots_LGC=slots_LGC,
            share_LGC=share_LGC,
            bound=(in_time(problem, bound_L), tuple(names)),
            stopped_by=stopped_by,
            message=message,
        )

    @abstractmethod
    def prove(self, layer: ExactLayer, stop: Stop, task: Task[Any]) -> Proof:
        """Try to close one layer's gap."""


class Portfolio(_Exact):
    """For each layer the method that suits it."""

    name = "portfolio"
    summary = "heuristic, then bounds, then the exact method that suits each layer"

    def prove(self, layer: ExactLayer, stop: Stop, task: Task[Any]) -> Proof:
        """Pattern search or CP-SAT for the equal split, component bound or HiGHS for the fractional."""
        experts, pairs = len(layer.load_E), layer.load_E.size * len(layer.capacity_G)
        if layer.split == "equal":
            if experts <= _PATTERN_EXPERTS:
                return _patterns(layer, stop)
            return _cpsat(layer, stop, task.seed) if pairs <= _CPSAT_PAIRS else Proof("", 0.0)
        bound = _components(layer, stop)
        if layer.value <= bound * (1 + PROVEN) or pairs > _MILP_PAIRS:
            return Proof("components", bound)
        layer.bound = max(layer.bound, bound)
        proof = _milp(layer, stop)
        return proof if proof.bound > bound else Proof("components", bound, proof.plan)


class Patterns(_Exact):
    """The pattern search (equal split only)."""

    name = "patterns"
    summary = "proof of small equal-split layers by dynamic programming over GPU patterns"

    def prove(self, layer: ExactLayer, stop: Stop, task: Task[Any]) -> Proof:
        """Run the pattern search."""
        return _patterns(layer, stop)


class CpSat(_Exact):
    """CP-SAT on every layer."""

    name = "cpsat"
    summary = "CP-SAT on the exact model of every layer"
    Options = CpSatOptions

    def prove(self, layer: ExactLayer, stop: Stop, task: Task[CpSatOptions]) -> Proof:
        """Run CP-SAT."""
        return _cpsat(layer, stop, task.seed, task.options.threads)


class Milp(_Exact):
    """A mixed-integer solver on every layer."""

    name = "milp"
    summary = "HiGHS, CBC or another mixed-integer solver on the exact model of every layer"
    Options = MilpOptions

    def prove(self, layer: ExactLayer, stop: Stop, task: Task[MilpOptions]) -> Proof:
        """Run the solver chosen."""
        return _milp(layer, stop, task.options.engine, task.options.threads)


def _patterns(layer: ExactLayer, stop: Stop) -> Proof:
    search = solve_patterns(
        layer.load_E,
        layer.capacity_G,
        layer.speed_G,
        upper=layer.value,
        lower=layer.bound,
        gap=PROVEN,
        stop=stop,
    )
    if search.slots_GC is None:
        return Proof("patterns", search.lower)
    width = layer.slots_GC.shape[1] if layer.slots_GC is not None else search.slots_GC.shape[1]
    slots = np.full((len(layer.capacity_G), max(width, search.slots_GC.shape[1])), -1, dtype=np.int32)
    slots[:, : search.slots_GC.shape[1]] = search.slots_GC
    plan = slots, equal_shares(slots[None], len(layer.load_E))[0]
    improved = result_of(layer, plan, search.lower, "").improved
    return Proof("patterns", search.lower, plan if improved else None)


def _cpsat(layer: ExactLayer, stop: Stop, seed: int, threads: int = 1) -> Proof:
    from moeless_opt.solvers.exact.cpsat import solve_cpsat

    return _proof("cpsat", solve_cpsat(layer, stop=stop, threads=threads, seed=seed))


def _milp(layer: ExactLayer, stop: Stop, engine: str = "highs", threads: int = 1) -> Proof:
    from moeless_opt.solvers.exact.milp import solve_milp

    return _proof("milp", solve_milp(layer, engine, stop=stop, threads=threads))


def _proof(method: str, result: ExactResult) -> Proof:
    if result.improved and result.slots_GC is not None and result.share_GC is not None:
        return Proof(method, result.bound, (result.slots_GC, result.share_GC))
    return Proof(method, result.bound)


def _components(layer: ExactLayer, stop: Stop) -> float:
    alike = len(layer.alike) == 1 and len(layer.alike[0]) == len(layer.capacity_G)
    slots = int(layer.capacity_G[0])
    scarce = int(layer.capacity_G.sum()) < len(layer.load_E) + len(layer.capacity_G) - 1
    if not alike or not scarce or len(layer.load_E) > MOST_EXPERTS:
        return 0.0
    speed = float(layer.speed_G[0])
    upper = layer.value * speed
    return component_bound(layer.load_E, len(layer.capacity_G), slots, upper=upper, stop=stop) / speed


def _replaced(
    slots_LGC: SlotArray, share_LGC: FloatArray, found: dict[int, tuple[SlotArray, FloatArray]]
) -> tuple[SlotArray, FloatArray]:
    """Put better plans of single layers in."""
    width = max([slots_LGC.shape[2], *(slots.shape[1] for slots, _ in found.values())])
    pad = ((0, 0), (0, 0), (0, width - slots_LGC.shape[2]))
    slots_LGC, share_LGC = np.pad(slots_LGC, pad, constant_values=-1), np.pad(share_LGC, pad)
    for i, (slots, share) in found.items():
        slots_LGC[i], share_LGC[i] = -1, 0.0
        slots_LGC[i, :, : slots.shape[1]], share_LGC[i, :, : share.shape[1]] = slots, share
    return slots_LGC, share_LGC
