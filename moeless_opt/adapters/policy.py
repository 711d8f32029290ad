"""What an engine's load balancer asks, answered by our planner: loads and a live map in, a full map out.

Engines speak of maps [layers, slots]: the expert of every slot, GPU after GPU, the same number of slots on
each, none of them empty. The answer depends on its arguments alone, so that every rank of an engine that
asks for itself has the same one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from moeless_opt.adapters.options import PolicyOptions
from moeless_opt.api import make_problem, solve
from moeless_opt.problems.arrays import BoolArray, FloatArray, IntArray, Record, SlotArray, floats, integers
from moeless_opt.problems.errors import InfeasibleError, ProblemError, UnsupportedFeatureError
from moeless_opt.problems.plan import Plan, new_replicas
from moeless_opt.problems.spec import (
    Fill,
    Limits,
    Problem,
    Split,
    Topology,
    replica_counts,
    second_copies,
    uniform,
)
from moeless_opt.solvers.shares import ShareTable, share_table

__all__ = ["MapAnswer", "MapTask", "answer", "first_map", "idle_answer"]

_TOLERANCE = {Split.FRACTIONAL: 0.01}
_TOLERANCE_ELSE = 0.02  # replicas of one size are harder to level, and each step costs more of them


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class MapTask(Record):
    """What an engine asks.

    Parameters
    ----------
    load_LE : array, shape [L, E]
        Tokens of every expert in the window that was watched; all zeros where nothing was.
    slots : int
        Slots of a layer over all GPUs; a multiple of `gpus`, at least E.
    gpus : int
        GPUs over all nodes.
    nodes : int
        Nodes; counts where the GPUs divide over them.
    live_LS : array of int, shape [L, slots before], optional
        Expert of every slot now, -1 where there is none (GPUs that were just added). A map of more or fewer
        slots than `slots` is that of an engine about to shrink, or to grow: slots at its end go, or are
        new.
    wanted_LGC : array of int, shape [L, G, C], optional
        A placement to answer with, instead of planning one.
    """

    load_LE: FloatArray
    slots: int
    gpus: int
    nodes: int = 1
    live_LS: IntArray | None = None
    wanted_LGC: SlotArray | None = None

    def __post_init__(self) -> None:
        load_LE = floats("weight", self.load_LE)
        if load_LE.ndim != 2 or 0 in load_LE.shape:
            raise ProblemError("weight", f"has shape {load_LE.shape}, must be [layers, experts]")
        layers, experts = load_LE.shape
        if self.gpus < 1 or self.slots < 1 or self.slots % self.gpus:
            raise ProblemError("slots", f"are {self.slots}, must be a multiple of the {self.gpus} GPUs")
        if self.slots < experts:
            raise InfeasibleError(
                f"{experts} experts need at least {experts} slots per layer, there are {self.slots}"
            )
        object.__setattr__(self, "load_LE", load_LE)
        if self.live_LS is not None:
            live_LS = integers("map", self.live_LS, low=-1, high=experts - 1)
            if live_LS.ndim != 2 or len(live_LS) != layers:
                raise ProblemError("map", f"has shape {live_LS.shape}, must be [{layers}, slots]")
            object.__setattr__(self, "live_LS", live_LS)

    @property
    def loaded_L(self) -> BoolArray:
        """Layers that served anything, shape [L]."""
        return np.asarray(self.load_LE.sum(axis=1) > 0)

    @property
    def experts(self) -> int:
        """Experts of a layer."""
        return int(self.load_LE.shape[1])

    @property
    def shape(self) -> tuple[int, int, int]:
        """Layers, GPUs, and slots of a GPU."""
        return len(self.load_LE), self.gpus, self.slots // self.gpus

    @property
    def topology(self) -> Topology:
        """The GPUs as our planner has them."""
        nodes = self.nodes if self.nodes > 0 and self.gpus % self.nodes == 0 else 1
        return uniform(nodes, self.gpus // nodes, slots=self.slots // self.gpus)

    @property
    def now_LGC(self) -> SlotArray | None:
        """The live map at the wanted number of slots, -1 where nothing is known."""
        if self.live_LS is None:
            return None
        now_LS = np.full((len(self.live_LS), self.slots), -1, dtype=np.int32)
        kept = min(self.slots, self.live_LS.shape[1])
        now_LS[:, :kept] = self.live_LS[:, :kept]
        return now_LS.reshape(self.shape)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class MapAnswer(Record):
    """What we answer.

    Parameters
    ----------
    map_LS : array of int64, shape [L, slots]
        Expert of every slot; none is empty.
    table : ShareTable, optional
        Where replicas are weighted: the slots of every expert, each as often as it weighs.
    before_L, after_L : array of float, shape [L]
        Largest GPU load over the mean, of the live map (0 where there is none, or not a whole one) and of the
        answer; 1 where there are no loads.
    moved_L : array of int, shape [L]
        Replicas on GPUs that did not hold them; 0 where nothing is live.
    reason : str
        Why the live map was kept, in part or as a whole; empty where it was not.
    """

    map_LS: IntArray
    table: ShareTable | None
    before_L: FloatArray
    after_L: FloatArray
    moved_L: IntArray
    reason: str = ""

    @property
    def figures(self) -> dict[str, Any]:
        """What a line of a log says of it."""
        return {
            "imbalance_before": round(float(self.before_L.mean()), 6),
            "imbalance_after": round(float(self.after_L.mean()), 6),
            "worst_after": round(float(self.after_L.max()), 6),
            "moved": int(self.moved_L.sum()),
            "moved_share": round(float(self.moved_L.sum() / self.map_LS.size), 6),
            "layers_changed": int((self.moved_L > 0).sum()),
            "reason": self.reason,
        }


def first_map(layers: int, experts: int, slots: int) -> IntArray:
    """The map that vLLM and SGLang begin with: experts in order, then copies in order, [L, slots]."""
    return np.tile(np.arange(slots, dtype=np.int64) % experts, (layers, 1))


def answer(task: MapTask, options: PolicyOptions, split: str) -> MapAnswer:
    """The map for a task.

    Layers without loads, and layers in which moving does not pay, keep their live rows where these are
    whole: every slot full, every expert there.

    Parameters
    ----------
    task : MapTask
        What is asked.
    options : PolicyOptions
        How the engine's owner wants it.
    split : Split or str
        What the engine does with an expert's tokens.

    Raises
    ------
    ProblemError, InfeasibleError
        If the task cannot be planned.
    """
    now_LGC, loaded_L = task.now_LGC, task.loaded_L
    before_L = np.full(len(loaded_L), np.inf)
    if now_LGC is not None:
        before_L = _imbalance(task, now_LGC, options, split)
    if task.wanted_LGC is not None:
        every_L = np.ones_like(loaded_L)
        slots_LGC = _stay(task, every_L, task.wanted_LGC, options, split).slots_LGC  # with every slot full
        return _judged(task, options, split, (before_L, slots_LGC), "the plan to begin with")
    if now_LGC is None:
        slots_LGC = _planned(task, np.ones_like(loaded_L), options, split)
        return _judged(task, options, split, (before_L, slots_LGC), "")
    whole_L = is_whole(now_LGC, task.experts, options.fill)
    slots_LGC, reasons = now_LGC.copy(), []
    if not loaded_L.all():
        reasons.append(f"{int((~loaded_L).sum())} layers without loads")
    planned_L = loaded_L | ~whole_L
    if planned_L.any():
        slots_LGC[planned_L] = _planned(task, planned_L, options, split)
        stay_L = planned_L & whole_L & ~_pays(task, before_L, slots_LGC, options, split)
        slots_LGC[stay_L] = now_LGC[stay_L]
        if stay_L.any():
            reasons.append(f"{int(stay_L.sum())} layers would gain less than it costs")
    return _judged(task, options, split, (before_L, slots_LGC), "; ".join(reasons))


def idle_answer(task: MapTask) -> MapAnswer | None:
    """The live map, at once, where it is whole and nothing was served: a profile run, an idle window."""
    now_LGC, layers = task.now_LGC, len(task.load_LE)
    if task.loaded_L.any() or now_LGC is None or not is_whole(now_LGC, task.experts).all():
        return None
    return MapAnswer(
        map_LS=now_LGC.reshape(layers, task.slots).astype(np.int64),
        table=None,
        before_L=np.ones(layers),
        after_L=np.ones(layers),
        moved_L=np.zeros(layers, dtype=np.int64),
        reason="no loads",
    )


def is_whole(slots_LGC: SlotArray, experts: int, fill: str = Fill.COPIES) -> BoolArray:
    """Whether a layer has every slot full, every expert, and second copies only where they may be, [L]."""
    full_L = (slots_LGC >= 0).all(axis=(1, 2))
    if fill == Fill.DISTINCT:
        full_L &= ~second_copies(slots_LGC).any(axis=(1, 2))
    return np.asarray(full_L & (replica_counts(slots_LGC, experts) > 0).all(axis=1))


def _problem(task: MapTask, rows_L: BoolArray, split: str, options: PolicyOptions, **more: Any) -> Problem:
    """Some layers as a problem; of those without loads all experts have the same."""
    load_LE = np.where(task.loaded_L[:, None], task.load_LE, 1.0)[rows_L]
    tolerance = options.tolerance
    if tolerance is None:
        tolerance = _TOLERANCE.get(Split(split), _TOLERANCE_ELSE)
    return make_problem(
        load_LE,
        task.topology,
        split=split,
        balance_tolerance=tolerance,
        **more,
    )


def _planned(task: MapTask, rows_L: BoolArray, options: PolicyOptions, split: str) -> SlotArray:
    """Full slots for some layers.

    Shares are free here and whole entries later: a placement made for entries levels no better by more than
    their rounding, and costs twice the moves.
    """
    more: dict[str, Any] = {"fill": options.fill}
    if task.now_LGC is not None:
        more |= {"current": task.now_LGC[rows_L], "repair": True}
        more |= {"limits": Limits(max_moves=options.max_moves)}
    problem = _problem(task, rows_L, split, options, **more)
    try:
        plan = solve(problem).plan
    except (InfeasibleError, UnsupportedFeatureError):
        if not problem.limits.bounds_moves:
            raise
        plan = solve(problem.replace(limits=Limits())).plan  # what is lost must come back, whatever it costs
    assert plan is not None
    return plan.slots_LGC


def _pays(
    task: MapTask, before_L: FloatArray, slots_LGC: SlotArray, options: PolicyOptions, split: str
) -> BoolArray:
    """Whether a layer's imbalance falls enough for what it ships, shape [L]."""
    gain_L = before_L - _imbalance(task, slots_LGC, options, split)
    assert task.now_LGC is not None
    moved_L = new_replicas(slots_LGC, task.now_LGC, task.experts).sum(axis=(1, 2))
    return np.asarray((gain_L > 0) & (gain_L >= np.maximum(options.min_gain, options.move_price * moved_L)))


def _imbalance(task: MapTask, slots_LGC: SlotArray, options: PolicyOptions, split: str) -> FloatArray:
    """Largest GPU load over the mean, shape [L]; infinite where an expert has no replica."""
    there_L = np.asarray((replica_counts(slots_LGC, task.experts) > 0).all(axis=1))
    found_L = np.full(len(slots_LGC), np.inf)
    if there_L.any():
        found_L[there_L] = _stay(task, there_L, slots_LGC, options, split).imbalance_L
        found_L[there_L & ~task.loaded_L] = 1.0
    return found_L


def _stay(task: MapTask, rows_L: BoolArray, slots_LGC: SlotArray, options: PolicyOptions, split: str) -> Plan:
    """The plan that keeps slots as they are, with the shares that the split, and the table, give them.

    Second copies are taken as they are found, whatever the options want of new plans.
    """
    more = {"current": slots_LGC[rows_L], "fill": Fill.COPIES}
    entries = options.entries if split == Split.FRACTIONAL else None
    problem = _problem(task, rows_L, split, options, share_entries=entries, **more)
    plan = solve(problem, "stay").plan
    assert plan is not None
    return plan


def _judged(
    task: MapTask, options: PolicyOptions, split: str, found: tuple[FloatArray, SlotArray], reason: str
) -> MapAnswer:
    """The answer for slots, with what it is worth and, where replicas are weighted, its dispatch table.

    `found` are the imbalance of what is live, infinite where there is none, and the slots.
    """
    before_L, slots_LGC = found
    layers, now_LGC = len(slots_LGC), task.now_LGC
    plan = _stay(task, np.ones(layers, dtype=np.bool_), slots_LGC, options, split)
    moved_L = np.zeros(layers, dtype=np.int64)
    if now_LGC is not None:
        moved_L = np.asarray(new_replicas(slots_LGC, now_LGC, task.experts).sum(axis=(1, 2)))
    weighted = options.entries is not None and split == Split.FRACTIONAL
    return MapAnswer(
        map_LS=slots_LGC.reshape(layers, task.slots).astype(np.int64),
        table=share_table(plan, options.entries) if weighted else None,
        before_L=np.where(np.isfinite(before_L), before_L, 0.0),
        after_L=np.where(task.loaded_L, plan.imbalance_L, 1.0),
        moved_L=moved_L,
        reason=reason,
    )
