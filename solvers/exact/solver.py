"""Exact solving of whole problems: the heuristic first, then bounds, then proofs, as time allows.

A problem falls into its layers. All get a heuristic plan and a cheap bound at once; the layers whose gap is
open are then proven one by one, those that are farthest from their bound first, each with its part of the
time left.

`Portfolio` takes for each layer the method that suits it. Equal split: the pattern search (small layers),
else CP-SAT. Fractional split: the component bound, which settles layers of few slots at once, else HiGHS.
`CpSat`, `Milp` and `Patterns` use their own method on every layer that is open.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from moeless_opt.problems.arrays import FloatArray, SlotArray
from moeless_opt.problems.errors import ProblemError
from moeless_opt.problems.plan.plan import PROVEN, Plan
from moeless_opt.problems.plan.result import Progress, ProgressCallback, Result, StoppedBy
from moeless_opt.problems.spec.problem import Problem
from moeless_opt.solvers.construct.solver import Construct
from moeless_opt.solvers.core.finish import Clock, Feature, finish, lower_bound
from moeless_opt.solvers.core.stopping import Stop
from moeless_opt.solvers.exact.components import MOST_EXPERTS, component_bound
from moeless_opt.solvers.exact.layer import ExactLayer, layer_of, result_of
from moeless_opt.solvers.pack.patterns import solve_patterns

__all__ = ["CpSat", "Milp", "Patterns", "Portfolio"]

_PATTERN_EXPERTS = 20
_CPSAT_PAIRS = 600  # experts x GPUs up to which a proof can be hoped for
_MILP_PAIRS = 1100
_DEFAULT_SECONDS = 60.0


class _Exact:
    """Heuristic, bounds, then `prove` for every layer with an open gap."""

    name = ""
    summary = ""
    options: ClassVar[frozenset[str]] = frozenset()
    features: ClassVar[frozenset[Feature]] = frozenset(
        {Feature.EQUAL_SPLIT, Feature.FRACTIONAL, Feature.HETEROGENEOUS, Feature.MEMORY, Feature.CERTIFIES}
    )

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
        """Solve layer by layer until every gap is closed or time is up.

        Parameters
        ----------
        problem : Problem
            What is to be solved.
        stop : Stop
            When to stop. Without a time limit a minute is taken for all layers together.
        seed : int
            Handed to the solvers.
        initial : Plan, optional
            A plan to start from, instead of the heuristic's.
        progress : callable, optional
            Called after every layer.
        **options
            Of the method, see the class.
        """
        began = Clock.begin()
        slots_LGC, share_LGC = self._start(problem, seed, initial)
        speed_G = problem.topology.speed_G
        bound_L, name = lower_bound(problem)
        names = list(name)
        value_L = np.array(
            [_value(problem, layer, slots_LGC, share_LGC) for layer in range(problem.layers)],
            dtype=np.float64,
        )
        unlimited = not np.isfinite(stop.remaining)
        order = [int(i) for i in np.argsort(-value_L / np.maximum(bound_L, 1e-300), kind="stable")]
        open_layers = [i for i in order if value_L[i] > bound_L[i] * (1 + PROVEN)]
        stopped_by = StoppedBy.NOTHING
        found: dict[int, tuple[SlotArray, FloatArray]] = {}
        for done, i in enumerate(open_layers):
            if progress is not None:
                share = done / max(len(open_layers), 1)
                progress(
                    Progress(
                        seconds=began.seconds,
                        best=float(value_L.sum()),
                        bound=float(bound_L.sum()),
                        done=share,
                        note=f"layer {problem.loads.layers[i]}",
                    )
                )
            stopped_by = stop(float(value_L.sum()), float(bound_L.sum()))
            remaining = _DEFAULT_SECONDS - began.seconds if unlimited else stop.remaining
            if not stopped_by and remaining <= 0:
                stopped_by = StoppedBy.TIME
            if stopped_by:
                break
            layer = layer_of(
                problem.load_LE[i],
                problem.capacity_LG[i],
                speed_G,
                "equal" if problem.split == "equal" else "fractional",
                slots_GC=slots_LGC[i],
                share_GC=share_LGC[i],
                bound=float(bound_L[i]),
            )
            # Quick layers leave their time to the others.
            seconds = max(remaining / (len(open_layers) - done), min(remaining, 0.05))
            method, bound = self.prove(layer, seconds, seed, found, i, options)
            if bound > bound_L[i] * (1 + 1e-12):
                bound_L[i], names[i] = bound, method
            if i in found:
                value_L[i] = _time(layer, found[i])
        slots_LGC, share_LGC = _replaced(slots_LGC, share_LGC, found)
        left = int((value_L > bound_L * (1 + PROVEN)).sum())
        spent = began.seconds >= _DEFAULT_SECONDS if unlimited else stop.remaining <= 0.01
        if left and not stopped_by and spent:
            stopped_by = StoppedBy.TIME
        message = f"{len(open_layers)} of {problem.layers} layers needed more than the cheap bounds"
        if left:
            message += f"; {left} are not proven"
        return finish(
            problem,
            slots_LGC,
            share_LGC,
            solver=self.name,
            began=began,
            bound=(bound_L, tuple(names)),
            stopped_by=stopped_by,
            options=options,
            seed=seed,
            message=message,
        )

    def _start(self, problem: Problem, seed: int, initial: Plan | None) -> tuple[SlotArray, FloatArray]:
        if initial is None:
            first = Construct().solve(problem, stop=_never(), seed=seed).plan
            assert first is not None
            return first.slots_LGC, first.share_LGC
        if initial.slots_LGC.shape[0] != problem.layers or initial.experts != problem.experts:
            raise ProblemError(
                "initial",
                f"has {initial.slots_LGC.shape[0]} layers of {initial.experts} experts, "
                f"the problem {problem.layers} of {problem.experts}",
            )
        return initial.slots_LGC, initial.share_LGC

    def prove(
        self,
        layer: ExactLayer,
        seconds: float,
        seed: int,
        found: dict[int, tuple[SlotArray, FloatArray]],
        index: int,
        options: dict[str, Any],
    ) -> tuple[str, float]:
        """Try to close one layer's gap: put a better plan into `found`, return the method and its bound."""
        raise NotImplementedError


class Portfolio(_Exact):
    """For each layer the method that suits it; no options."""

    name = "portfolio"
    summary = "heuristic, then bounds, then the exact method that suits each layer"

    def prove(
        self,
        layer: ExactLayer,
        seconds: float,
        seed: int,
        found: dict[int, tuple[SlotArray, FloatArray]],
        index: int,
        options: dict[str, Any],
    ) -> tuple[str, float]:
        """Pattern search or CP-SAT for the equal split, component bound or HiGHS for the fractional."""
        experts, pairs = len(layer.load_E), layer.load_E.size * len(layer.capacity_G)
        if layer.split == "equal":
            if experts <= _PATTERN_EXPERTS:
                return _patterns(layer, seconds, found, index)
            return _cpsat(layer, seconds, seed, found, index) if pairs <= _CPSAT_PAIRS else ("", 0.0)
        began = Clock.begin()
        bound = _components(layer)
        if layer.value <= bound * (1 + PROVEN):
            return "components", bound
        layer.bound = max(layer.bound, bound)
        method, other = "", 0.0
        if pairs <= _MILP_PAIRS:
            method, other = _milp(layer, seconds - began.seconds, found, index, "highs", "mathopt", {})
        return (method, other) if other > bound else ("components", bound)


class Patterns(_Exact):
    """The pattern search (equal split only); no options."""

    name = "patterns"
    summary = "proof of small equal-split layers by dynamic programming over GPU patterns"
    features: ClassVar[frozenset[Feature]] = _Exact.features - {Feature.FRACTIONAL}

    def prove(
        self,
        layer: ExactLayer,
        seconds: float,
        seed: int,
        found: dict[int, tuple[SlotArray, FloatArray]],
        index: int,
        options: dict[str, Any],
    ) -> tuple[str, float]:
        """Run the pattern search."""
        return _patterns(layer, seconds, found, index)


class CpSat(_Exact):
    """CP-SAT on every layer. Option ``threads`` (default 1)."""

    name = "cpsat"
    summary = "CP-SAT on the exact model of every layer"
    options: ClassVar[frozenset[str]] = frozenset({"threads"})

    def prove(
        self,
        layer: ExactLayer,
        seconds: float,
        seed: int,
        found: dict[int, tuple[SlotArray, FloatArray]],
        index: int,
        options: dict[str, Any],
    ) -> tuple[str, float]:
        """Run CP-SAT."""
        return _cpsat(layer, seconds, seed, found, index, **options)


class Milp(_Exact):
    """A mixed-integer solver on every layer.

    Options ``backend`` (``"mathopt"``, the default, or ``"pulp"``), ``milp`` (its solver's name, by default
    HiGHS or what PuLP finds) and ``threads``.
    """

    name = "milp"
    summary = "HiGHS, CBC or another mixed-integer solver on the exact model of every layer"
    options: ClassVar[frozenset[str]] = frozenset({"backend", "milp", "threads"})

    def prove(
        self,
        layer: ExactLayer,
        seconds: float,
        seed: int,
        found: dict[int, tuple[SlotArray, FloatArray]],
        index: int,
        options: dict[str, Any],
    ) -> tuple[str, float]:
        """Run the solver chosen."""
        rest = {k: v for k, v in options.items() if k not in ("milp", "backend")}
        backend = options.get("backend", "mathopt")
        if backend not in ("mathopt", "pulp"):
            raise ProblemError("backend", f"is {backend!r}, must be 'mathopt' or 'pulp'")
        solver = options.get("milp", "highs" if backend == "mathopt" else None)
        return _milp(layer, seconds, found, index, solver, backend, rest)


def _patterns(
    layer: ExactLayer, seconds: float, found: dict[int, tuple[SlotArray, FloatArray]], index: int
) -> tuple[str, float]:
    search = solve_patterns(
        layer.load_E,
        layer.capacity_G,
        layer.speed_G,
        upper=layer.value,
        lower=layer.bound,
        gap=PROVEN,
        seconds=seconds,
    )
    if search.slots_GC is not None:
        width = layer.slots_GC.shape[1] if layer.slots_GC is not None else search.slots_GC.shape[1]
        slots = np.full((len(layer.capacity_G), max(width, search.slots_GC.shape[1])), -1, dtype=np.int32)
        slots[:, : search.slots_GC.shape[1]] = search.slots_GC
        count = np.bincount(slots[slots >= 0], minlength=len(layer.load_E))
        plan = slots, np.where(slots >= 0, 1.0 / count[slots], 0.0)
        if result_of(layer, plan, search.lower, "").improved:
            found[index] = plan
    return "patterns", search.lower


def _cpsat(
    layer: ExactLayer,
    seconds: float,
    seed: int,
    found: dict[int, tuple[SlotArray, FloatArray]],
    index: int,
    threads: int = 1,
) -> tuple[str, float]:
    from moeless_opt.solvers.exact.cpsat import solve_cpsat

    result = solve_cpsat(layer, seconds=seconds, threads=threads, seed=seed)
    if result.improved and result.slots_GC is not None and result.share_GC is not None:
        found[index] = result.slots_GC, result.share_GC
    return "cpsat", result.bound


def _milp(
    layer: ExactLayer,
    seconds: float,
    found: dict[int, tuple[SlotArray, FloatArray]],
    index: int,
    solver: str | None,
    backend: str,
    options: dict[str, Any],
) -> tuple[str, float]:
    from moeless_opt.solvers.exact.milp import solve_mathopt, solve_pulp

    if backend == "mathopt":
        result = solve_mathopt(layer, solver or "highs", seconds=seconds, **options)
    else:
        result = solve_pulp(layer, solver, seconds=seconds, **options)
    if result.improved and result.slots_GC is not None and result.share_GC is not None:
        found[index] = result.slots_GC, result.share_GC
    return "milp", result.bound


def _components(layer: ExactLayer) -> float:
    alike = len(layer.alike) == 1 and len(layer.alike[0]) == len(layer.capacity_G)
    slots = int(layer.capacity_G[0])
    scarce = int(layer.capacity_G.sum()) < len(layer.load_E) + len(layer.capacity_G) - 1
    if not alike or not scarce or len(layer.load_E) > MOST_EXPERTS:
        return 0.0
    speed = float(layer.speed_G[0])
    upper = layer.value * speed
    return component_bound(layer.load_E, len(layer.capacity_G), slots, upper=upper) / speed


def _value(problem: Problem, layer: int, slots_LGC: SlotArray, share_LGC: FloatArray) -> float:
    slots, share = slots_LGC[layer], share_LGC[layer]
    tokens = np.where(slots >= 0, problem.load_LE[layer][slots] * share, 0.0).sum(axis=1)
    return float((tokens / problem.topology.speed_G).max())


def _time(layer: ExactLayer, plan: tuple[SlotArray, FloatArray]) -> float:
    slots, share = plan
    tokens = np.where(slots >= 0, layer.load_E[slots] * share, 0.0).sum(axis=1)
    return float((tokens / layer.speed_G).max())


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


def _never() -> Stop:
    from moeless_opt.solvers.core.stopping import NeverStop

    return NeverStop()
