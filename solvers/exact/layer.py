"""One layer as a mixed-integer programme, written once, and the way back from its solution to a plan.

Equal split: ``z[e,r,g] = 1`` if expert e has r replicas and one of them is on g. Splitting on r makes the
load of a replica, ``w_e / r``, a constant, at the price of one copy of the placement per count.

    min T   s.t.   sum_r n[e,r] = 1,   sum_g z[e,r,g] = r n[e,r],   z[e,r,g] <= n[e,r]
                   sum_{e,r} z[e,r,g] <= slots[g],   sum_{e,r} (w_e / r) z[e,r,g] <= speed[g] T

Fractional split: ``x[e,g] = 1`` if e is on g, and f[e,g] of its tokens are served there.

    min T   s.t.   sum_g f[e,g] = w_e,   f[e,g] <= w_e x[e,g],   sum_g x[e,g] >= needed[e]
                   sum_e x[e,g] <= slots[g],   sum_e f[e,g] <= speed[g] T

A known plan of time U cuts both down: with fewer than ``w_e / (U speed)`` replicas expert e would be
slower. GPUs that are alike could be permuted at will, so the heaviest expert's replicas come first among
them.

Tokens are scaled so that the lower bound is 1: solvers' absolute tolerances then mean the same everywhere.

Axes: E experts, G GPUs, C slots of a GPU, V variables, R rows.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike

from moeless_opt.problems.arrays import BoolArray, FloatArray, IntArray, SlotArray
from moeless_opt.problems.errors import InfeasibleError, InvalidPlanError, ProblemError
from moeless_opt.problems.plan import PROVEN, Status, best_bound, gpu_times, replicas_needed
from moeless_opt.problems.spec import equal_shares
from moeless_opt.solvers.core import LinearModel, Stop

__all__ = ["ExactLayer", "ExactResult", "LayerModel", "build", "layer_of", "read_back", "result_of"]

_TOLERANCE = 1e-5  # by how much solvers may miss their rows, relative


@dataclass(frozen=True, slots=True, kw_only=True)
class ExactResult:
    """What an exact solver returns: always the best plan known, whoever found it.

    Parameters
    ----------
    status : Status
        OPTIMAL if ``value <= bound * (1 + PROVEN)``, else FEASIBLE; INFEASIBLE only if proven; NO_SOLUTION if
        there was no plan to start from and none was found.
    slots_GC, share_GC : array, shape [G, C], or None
        The plan.
    value, bound : float
        Its largest GPU time, and the proven lower bound.
    improved : bool
        Whether the solver beat the plan that it was given.
    message : str
        The solver's own words.
    """

    status: Status
    slots_GC: SlotArray | None
    share_GC: FloatArray | None
    value: float
    bound: float
    improved: bool
    message: str


@dataclass(slots=True, kw_only=True)
class ExactLayer:
    """One layer, checked and scaled, and the plan to beat."""

    load_E: FloatArray
    capacity_G: IntArray
    speed_G: FloatArray
    split: str
    least_E: IntArray
    most_E: IntArray
    scale: float  # tokens per unit of the model
    bound: float
    slots_GC: SlotArray | None
    share_GC: FloatArray | None
    value: float
    alike: list[list[int]]  # GPUs that could be permuted, by class


def layer_of(
    load_E: ArrayLike,
    capacity_G: ArrayLike,
    speed_G: ArrayLike | None = None,
    split: str = "equal",
    *,
    slots_GC: SlotArray | None = None,
    share_GC: FloatArray | None = None,
    max_replicas: int | None = None,
    min_replicas: int = 1,
    bound: float = 0.0,
) -> ExactLayer:
    """Check the arguments of an exact solver, and scale the layer.

    Parameters
    ----------
    load_E : array of float, shape [E]
        Tokens of each expert.
    capacity_G : array of int, shape [G]
        Slots of each GPU.
    speed_G : array of float, shape [G], optional
        Relative speeds (default 1).
    split : {"equal", "fractional"}
        How tokens are divided.
    slots_GC, share_GC : array, optional
        A known plan (for the fractional split with its shares); it cuts the search and is returned if nothing
        better turns up.
    max_replicas, min_replicas : int, optional
        Limits on the replicas of each expert.
    bound : float
        A known lower bound.

    Raises
    ------
    InfeasibleError
        If the experts do not fit.
    """
    load = np.asarray(load_E, dtype=np.float64)
    capacity = np.minimum(np.asarray(capacity_G, dtype=np.int64), len(load))
    speed = np.ones(len(capacity)) if speed_G is None else np.asarray(speed_G, dtype=np.float64)
    if split not in ("equal", "fractional"):
        raise ProblemError("split", f"is {split!r}, must be 'equal' or 'fractional'")
    bound_L, _ = best_bound(
        load[None], capacity[None], speed, split, max_replicas=max_replicas, min_replicas=min_replicas
    )
    bound = max(bound, float(bound_L[0]))
    if not np.isfinite(bound):
        raise InfeasibleError(
            f"slots: {len(load)} experts of {min_replicas} or more replicas do not fit {capacity.sum()} slots"
        )
    gpus = int((capacity > 0).sum())
    most = np.full(len(load), gpus if max_replicas is None else min(gpus, max_replicas))
    least = np.full(len(load), min_replicas)
    value = np.inf
    if slots_GC is not None:
        if split == "equal" or share_GC is None:
            share_GC = equal_shares(slots_GC[None], len(load))[0]
        value = float(gpu_times(load[None], slots_GC[None], share_GC[None], speed).max())
        least = np.maximum(least, replicas_needed(load[None], [value], speed[capacity > 0], split)[0])
    spare = int(capacity.sum() - np.minimum(least, most).sum())
    most = np.minimum(most, least + max(spare, 0))
    classes: dict[tuple[int, float], list[int]] = {}
    for g in np.flatnonzero(capacity > 0).tolist():
        classes.setdefault((int(capacity[g]), float(speed[g])), []).append(g)
    return ExactLayer(
        load_E=load,
        capacity_G=capacity,
        speed_G=speed,
        split=split,
        least_E=np.minimum(least, most),
        most_E=most,
        scale=bound if bound > 0 else 1.0,
        bound=bound,
        slots_GC=slots_GC,
        share_GC=share_GC,
        value=value,
        alike=list(classes.values()),
    )


@dataclass(slots=True)
class LayerModel(LinearModel):
    """The programme of a layer, ``min value[objective]``, and which variable means what."""

    objective: int = -1
    place: dict[tuple[int, int], list[int]] = field(default_factory=dict)  # (e, g): variables that put e on g
    tokens: dict[tuple[int, int], int] = field(default_factory=dict)  # (e, g): tokens served there


def build(layer: ExactLayer, stop: Stop | None = None) -> LayerModel | None:
    """Write the programme of a layer; None if `stop` says so before it is written."""
    model = LayerModel()
    known = _start(layer)
    unit = layer.scale
    upper = layer.value / unit if np.isfinite(layer.value) else np.inf
    start = upper if np.isfinite(upper) else 0.0
    model.objective = model.variable(layer.bound / unit, upper, cost=1.0, start=start, name="T")
    gpus = np.flatnonzero(layer.capacity_G > 0).tolist()
    for e in range(len(layer.load_E)):
        if stop is not None and stop():
            return None
        (_equal_expert if layer.split == "equal" else _fractional_expert)(model, layer, e, gpus, known)
    for g in gpus:
        if stop is not None and stop():
            return None
        held = [(v, 1.0) for e in range(len(layer.load_E)) for v in model.place[e, g]]
        model.row(held, -np.inf, float(layer.capacity_G[g]), name=f"slots_{g}")
        work = [(model.objective, -float(layer.speed_G[g]))]
        for e in range(len(layer.load_E)):
            if layer.split == "equal":
                counts = range(int(layer.least_E[e]), int(layer.most_E[e]) + 1)
                pairs = zip(model.place[e, g], counts, strict=True)
                work += [(v, float(layer.load_E[e]) / unit / r) for v, r in pairs]
            else:
                work.append((model.tokens[e, g], 1.0))
        model.row([(v, c) for v, c in work if c], -np.inf, 0.0, name=f"time_{g}")
    heaviest = int(np.argmax(layer.load_E))
    for some in layer.alike:
        for g, h in itertools.pairwise(some):
            terms = [(v, 1.0) for v in model.place[heaviest, g]]
            terms += [(v, -1.0) for v in model.place[heaviest, h]]
            model.row(terms, 0.0, np.inf, name=f"order_{g}_{h}")
    return model


def _equal_expert(
    model: LayerModel,
    layer: ExactLayer,
    e: int,
    gpus: list[int],
    known: tuple[BoolArray, FloatArray] | None,
) -> None:
    counts = range(int(layer.least_E[e]), int(layer.most_E[e]) + 1)
    held = known[0][e] if known is not None else np.zeros(len(layer.capacity_G), dtype=bool)
    chosen = []
    for r in counts:
        active = known is not None and int(held.sum()) == r
        n = model.variable(0, 1, whole=True, start=float(active), name=f"n_{e}_{r}")
        chosen.append((n, 1.0))
        copies = []
        for g in gpus:
            z = model.variable(0, 1, whole=True, start=float(active and held[g]), name=f"z_{e}_{r}_{g}")
            model.place.setdefault((e, g), []).append(z)
            model.row([(z, 1.0), (n, -1.0)], -np.inf, 0.0, name=f"if_{e}_{r}_{g}")
            copies.append((z, 1.0))
        model.row([*copies, (n, -float(r))], 0.0, 0.0, name=f"copies_{e}_{r}")
    model.row(chosen, 1.0, 1.0, name=f"count_{e}")


def _fractional_expert(
    model: LayerModel,
    layer: ExactLayer,
    e: int,
    gpus: list[int],
    known: tuple[BoolArray, FloatArray] | None,
) -> None:
    load = float(layer.load_E[e]) / layer.scale
    upper = layer.value / layer.scale
    hosts, tokens = [], []
    for g in gpus:
        most = min(load, upper * float(layer.speed_G[g]))
        held, served = (0.0, 0.0) if known is None else (float(known[0][e, g]), float(known[1][e, g]))
        x = model.variable(0, 1, whole=True, start=held, name=f"x_{e}_{g}")
        f = model.variable(0, most, start=served, name=f"f_{e}_{g}")
        model.place[e, g], model.tokens[e, g] = [x], f
        model.row([(f, 1.0), (x, -most)], -np.inf, 0.0, name=f"if_{e}_{g}")
        hosts.append((x, 1.0))
        tokens.append((f, 1.0))
    model.row(hosts, float(layer.least_E[e]), float(layer.most_E[e]), name=f"copies_{e}")
    model.row(tokens, load, load, name=f"served_{e}")


def _start(layer: ExactLayer) -> tuple[BoolArray, FloatArray] | None:
    """Return the known plan as (held, tokens) by expert and GPU, alike GPUs in the order of the rows."""
    if layer.slots_GC is None or layer.share_GC is None:
        return None
    E, G = len(layer.load_E), len(layer.capacity_G)
    held = np.zeros((E, G), dtype=bool)
    tokens = np.zeros((E, G))
    gpu, slot = np.nonzero(layer.slots_GC >= 0)
    expert = layer.slots_GC[gpu, slot]
    held[expert, gpu] = True
    tokens[expert, gpu] = layer.load_E[expert] / layer.scale * layer.share_GC[gpu, slot]
    heaviest = int(np.argmax(layer.load_E))
    source = np.arange(G)
    for some in layer.alike:
        source[some] = sorted(some, key=lambda g: (not held[heaviest, g], g))
    return held[:, source], tokens[:, source]


def read_back(layer: ExactLayer, model: LayerModel, value_V: FloatArray) -> tuple[SlotArray, FloatArray]:
    """Turn a solution into slots and shares."""
    G, C = len(layer.capacity_G), int(layer.capacity_G.max())
    slots = np.full((G, C), -1, dtype=np.int32)
    share = np.zeros((G, C))
    used = np.zeros(G, dtype=np.int64)
    for (e, g), some in sorted(model.place.items()):
        if sum(value_V[v] for v in some) > 0.5:
            slots[g, used[g]] = e
            if layer.split == "fractional":
                share[g, used[g]] = max(float(value_V[model.tokens[e, g]]), 0.0)
            used[g] += 1
    if layer.split == "equal":
        return slots, equal_shares(slots[None], len(layer.load_E))[0]
    total = np.zeros(len(layer.load_E))
    np.add.at(total, slots[slots >= 0], share[slots >= 0])
    even = equal_shares(slots[None], len(layer.load_E))[0]
    held = slots >= 0
    share[held] = np.where(
        total[slots[held]] > 0, share[held] / np.maximum(total[slots[held]], 1e-300), even[held]
    )
    return slots, share


def result_of(
    layer: ExactLayer,
    plan: tuple[SlotArray, FloatArray] | None,
    bound: float,
    message: str,
    *,
    infeasible: bool = False,
) -> ExactResult:
    """Keep the better of the solver's plan and the known one, and say truthfully what is proven.

    Parameters
    ----------
    layer : ExactLayer
        The layer.
    plan : (slots_GC, share_GC) or None
        What the solver found.
    bound : float
        Its lower bound, in tokens; minus infinity if it has none.
    message : str
        The solver's own words.
    infeasible : bool
        Whether the solver proved that no plan is better than the known one (or exists, without one).
    """
    slots, share, value = layer.slots_GC, layer.share_GC, layer.value
    improved = False
    if plan is not None:
        held = np.bincount(plan[0][plan[0] >= 0], minlength=len(layer.load_E))
        time_1G = gpu_times(layer.load_E[None], plan[0][None], plan[1][None], layer.speed_G)
        now = float(time_1G.max()) if held.min() >= 1 else np.inf
        if now < value:
            slots, share, value, improved = plan[0], plan[1], now, now < value * (1 - 1e-9)
    if infeasible and np.isfinite(value):
        bound = value
    if bound > value * (1 + _TOLERANCE):
        raise InvalidPlanError(
            [f"{message}: lower bound {bound:.9g} is above {value:.9g}, the time of a plan that there is"]
        )
    # Within the solvers' tolerance it may be; it never counts for more than the value.
    bound = min(max(layer.bound, bound), value)
    if slots is None:
        status = Status.INFEASIBLE if infeasible else Status.NO_SOLUTION
    else:
        status = Status.OPTIMAL if value <= bound * (1 + PROVEN) + 1e-300 else Status.FEASIBLE
    return ExactResult(
        status=status,
        slots_GC=slots,
        share_GC=share,
        value=value,
        bound=bound,
        improved=improved,
        message=message,
    )
