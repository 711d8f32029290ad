"""Our heuristics as solvers of the registry: construct from nothing, re-plan what is live, or stay."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np

from moeless_opt.problems.arrays import FloatArray, SlotArray
from moeless_opt.problems.errors import InfeasibleError, ProblemError
from moeless_opt.problems.spec import Fill, Problem, equal_shares, without_copies
from moeless_opt.solvers.construct.equal import EFFORTS, construct_equal
from moeless_opt.solvers.construct.fractional import construct_fractional
from moeless_opt.solvers.construct.full import best_full
from moeless_opt.solvers.core import (
    Built,
    Heuristic,
    NoOptions,
    Stop,
    Task,
    best_over_scenarios,
    empty_slots,
    in_time,
    keeps_limits,
    one_of,
    risk_L,
    settle_small,
    token_bound,
    topped_up,
    widened,
)
from moeless_opt.solvers.limits import full_within, layer_front, place_within, rules_of, slots_holding
from moeless_opt.solvers.nearest import FEW_GPUS, NearestTask, beam_layers, nearest_times, settle_nearest
from moeless_opt.solvers.shares import best_shares

__all__ = ["Construct", "ConstructOptions", "Stay"]

_TINY = 64  # pairs of expert and GPU of layers that are searched for the nearest replica over scenarios
_CLEARLY = 1e-6  # share by which that has to be quicker

_STEPS = {
    "quick": ((5e-3, 0),),
    "normal": ((1e-3, 0),),
    "thorough": ((1e-3, 0), (3e-4, 1), (0.0, 4)),
}
"""With tokens that go to the nearest replica: tolerances that are tried, and how often."""
_FEW = 4096  # pairs of expert and GPU of a layer that costs little to search again and again


@dataclass(frozen=True, slots=True, kw_only=True)
class ConstructOptions:
    """How a placement is constructed.

    Parameters
    ----------
    effort : {"quick", "normal", "thorough"}
        How long to search; with a fractional split "quick" is "normal".
    backend : {"auto", "numpy", "numba"}
        Whose kernels an equal split uses, or one by the nearest replica; the plans are the same (see
        `pack.fast.choose_backend`).
    """

    effort: str = "normal"
    backend: str = "auto"

    def __post_init__(self) -> None:
        one_of("effort", self.effort, ("quick", "normal", "thorough"))
        one_of("backend", self.backend, ("auto", "numpy", "numba"))


def _searched(problem: Problem, slots_LGC: SlotArray, stop: Stop) -> SlotArray:
    """A placement whose tiny layers are the quickest over all scenarios, or it as it is."""
    limits = problem.limits
    if problem.experts * problem.topology.gpus > _TINY or limits.max_total_replicas or limits.max_total_bytes:
        return slots_LGC
    time_L = risk_L(problem, slots_LGC)
    wide = max(int(problem.capacity_LG.max()), slots_LGC.shape[2])
    slots_LGC = widened(slots_LGC, wide)
    for row, rules in enumerate(rules_of(problem)):
        front = None if stop() else layer_front(problem, row, rules, layers=problem.layers)
        if front is not None and front.held and front.time[-1] < time_L[row] * (1 - _CLEARLY):
            slots_LGC[row] = widened(slots_holding(problem, [front.held[-1]], row), wide)[0]
    return slots_LGC


class Construct(Heuristic):
    """Sizing, packing and local search (equal split) or exact token shares on them (fractional)."""

    name = "construct"
    summary = "sizing + packing + local search; with a fractional split, exact token shares"
    Options = ConstructOptions

    def unused(self, problem: Problem) -> Mapping[str, str]:
        """Shares that are free have no two backends to choose from."""
        return {"backend": "with a fractional split"} if problem.split == "fractional" else {}

    def build(self, task: Task[ConstructOptions]) -> Iterator[Built]:
        """Construct a placement for the expected loads, or the best of several where there are scenarios.

        Where shares are whole entries, the placement for an even split is another one to be looked at: shares
        of one half or one quarter lose nothing by rounding.
        """
        yield self._built(task)
        if task.problem.share_entries is not None:
            even = task.problem.replace(split="equal", share_entries=None, known=None)
            yield replace(self._built(replace(task, problem=even)), share_LGC=None, bound=None)

    def _built(self, task: Task[ConstructOptions]) -> Built:
        problem = task.problem
        if problem.split == "nearest":
            slots_LGC = best_over_scenarios(
                problem, lambda guise: self._nearest(replace(task, problem=guise)), stop=task.stop
            )
            if problem.loads.shape[0] == 1 and problem.fill == Fill.NONE:
                settle_small(problem, slots_LGC, task.stop)
            if problem.loads.shape[0] > 1 and problem.fill == Fill.NONE:
                slots_LGC = _searched(problem, slots_LGC, task.stop)
            return Built(slots_LGC=full_within(problem, slots_LGC))
        if problem.limits != type(problem.limits)():
            return self._within(task)
        if problem.loads.shape[0] > 1:
            slots_LGC = best_over_scenarios(
                problem, lambda guise: self._construct(replace(task, problem=guise))[0], stop=task.stop
            )
            share_LGC = best_shares(problem, slots_LGC)
        else:
            slots_LGC, share_LGC = self._construct(task)
            if problem.loads.load_TLNE is not None:
                share_LGC = best_shares(problem, slots_LGC)
        return Built(slots_LGC=slots_LGC, share_LGC=share_LGC)

    def _within(self, task: Task[ConstructOptions]) -> Built:
        """As without limits where that keeps them, and within them elsewhere."""
        problem = task.problem
        rules_of(problem)  # says what is impossible before anything is built
        free = self._built(replace(task, problem=problem.replace(limits=type(problem.limits)())))
        if problem.fill != Fill.NONE:
            return self._full_within(task, free)
        found = place_within(problem, free.slots_LGC, stop=task.stop)
        if found.free_L.all():
            return free
        names = tuple("search" if time > 0 else "none" for time in found.proven_L.tolist())
        return Built(
            slots_LGC=found.slots_LGC,
            share_LGC=best_shares(problem, found.slots_LGC),
            bound=(in_time(problem, found.proven_L), names) if problem.loads.shape[0] == 1 else None,
        )

    def _full_within(self, task: Task[ConstructOptions], free: Built) -> Built:
        """Every slot full: what there is without limits mended, or without `fill` filled, then searched."""
        problem, effort = task.problem, EFFORTS[task.options.effort]
        if keeps_limits(problem, free.slots_LGC).all() and not empty_slots(problem, free.slots_LGC).any():
            return free
        starts = [full_within(problem, free.slots_LGC)]
        loose = problem.replace(fill=Fill.NONE, known=None)
        try:
            within_LGC = place_within(loose, without_copies(free.slots_LGC), stop=task.stop).slots_LGC
        except InfeasibleError:  # what second copies alone make possible
            pass
        else:
            starts.append(full_within(problem, within_LGC))
        time_L = [risk_L(problem, one) for one in starts]
        slots_LGC = np.stack(starts)[np.argmin(time_L, axis=0), np.arange(problem.layers)]
        if problem.split == "equal" and problem.loads.shape[0] == 1:
            slots_LGC = best_full(
                problem.load_LE,
                starts,
                problem.topology.speed_G,
                token_bound(problem) * effort.target,
                copies=problem.fill == Fill.COPIES,
                steps=effort.full,
                rules=rules_of(problem),
                stop=task.stop,
            )
        return Built(slots_LGC=slots_LGC, share_LGC=best_shares(problem, slots_LGC))

    def _nearest(self, task: Task[ConstructOptions]) -> SlotArray:
        """An even split's placement, searched for tokens that go to the nearest replica."""
        problem = task.problem
        even = problem.replace(split="equal", fill=Fill.NONE, known=None)
        slots_LGC, rules = self._built(replace(task, problem=even)).slots_LGC, None
        if problem.limits != type(problem.limits)():
            held_L = (slots_LGC >= 0).sum((1, 2))  # where layers share a limit, none takes more of it
            tied = problem.limits.max_total_replicas is not None or problem.limits.max_total_bytes is not None
            rules = rules_of(problem, held_L if tied else None)
        steps = _STEPS[task.options.effort]
        if problem.experts * problem.topology.gpus <= _FEW:
            steps = (*steps[:-1], (0.0, 2))
        near = NearestTask(
            load_LE=problem.load_LE,
            part_LNE=problem.source_parts(),
            node_G=problem.topology.node_G,
            speed_G=problem.topology.speed_G,
            capacity_LG=problem.capacity_LG,
            start_LGC=widened(slots_LGC, int(problem.capacity_LG.max())),
            rules=rules,
            full=problem.fill == Fill.DISTINCT,
        )
        for layer, slots_GC in enumerate(_small_layers(near, problem)):
            if slots_GC is not None:
                near.start_LGC[layer] = widened(slots_GC[None], near.start_LGC.shape[2])[0]
        if near.full:
            near = replace(near, start_LGC=full_within(problem, near.start_LGC))
        return settle_nearest(
            near,
            token_bound(problem),
            steps=steps,
            backend=task.options.backend,
            stop=task.stop,
        )

    @staticmethod
    def _construct(task: Task[ConstructOptions]) -> tuple[SlotArray, FloatArray]:
        problem, options = task.problem, task.options
        load_LE = problem.load_LE
        capacity_LG, speed_G = problem.capacity_LG, problem.topology.speed_G
        if problem.split == "equal":
            slots_LGC = construct_equal(
                load_LE,
                np.minimum(capacity_LG, problem.experts),
                speed_G,
                seed=task.seed,
                effort=options.effort,
                backend=options.backend,
                stop=task.stop,
            )
            if problem.fill != Fill.NONE:
                slots_LGC = _full(task, slots_LGC)
            return slots_LGC, equal_shares(slots_LGC, problem.experts)
        effort = "normal" if options.effort == "quick" else options.effort
        return construct_fractional(
            load_LE, capacity_LG, speed_G, seed=task.seed, effort=effort, stop=task.stop
        )


def _full(task: Task[ConstructOptions], slots_LGC: SlotArray) -> SlotArray:
    """An even placement with every slot full: other replicas than without, or second copies as weights."""
    problem, options = task.problem, task.options
    load_LE, speed_G = problem.load_LE, problem.topology.speed_G
    effort, copies = EFFORTS[options.effort], problem.fill == Fill.COPIES
    first_LGC = topped_up(problem, slots_LGC)
    if first_LGC is slots_LGC and not copies:
        return slots_LGC
    starts = [first_LGC]
    if first_LGC is not slots_LGC and options.effort != "quick":  # what likes its slots empty misleads
        room_LG = np.minimum(problem.capacity_LG, problem.experts)
        starts.append(topped_up(problem, construct_equal(load_LE, room_LG, speed_G, effort="quick")))
    goal_L = token_bound(problem) * effort.target
    return best_full(load_LE, starts, speed_G, goal_L, copies=copies, steps=effort.full, stop=task.stop)


def _small_layers(near: NearestTask, problem: Problem) -> list[SlotArray | None]:
    """Small layers of another kind of search, where that is faster than the start."""
    if len(near.node_G) > FEW_GPUS:
        return [None] * problem.layers
    rules = near.rules or rules_of(problem)
    found = beam_layers(near.load_LE, near.part_LNE, near.node_G, near.speed_G, rules)
    start_L = nearest_times(near, near.start_LGC)
    for layer, slots_GC in enumerate(found):
        if slots_GC is not None:
            time_L = nearest_times(near.rows(np.array([layer])), slots_GC[None])
            found[layer] = slots_GC if time_L[0] < start_L[layer] else None
    return found


class Stay(Heuristic):
    """Keep the live placement; with a fractional split, re-solve the token shares, which moves nothing."""

    name = "stay"
    summary = "keep the live placement and re-solve the token shares: no move at all"
    refuses_initial = "it keeps the live placement"

    def build(self, task: Task[NoOptions]) -> Built:
        """Solve the shares on what is live."""
        problem = task.problem
        if problem.current is None:
            raise ProblemError(
                "current", "is missing: solver 'stay' keeps the live placement, so it needs one"
            )
        missing = np.argwhere(problem.current.replicas_LE == 0)
        if missing.size:
            row, expert = missing[0]
            raise InfeasibleError(
                f"current: expert {expert} of layer {problem.loads.layers[row]} has no live replica; "
                "staying cannot bring it back"
            )
        slots_LGC = problem.current.slots_LGC
        empty = np.argwhere(empty_slots(problem, slots_LGC) > 0)
        if empty.size and problem.fill == Fill.DISTINCT:
            row, gpu = empty[0]
            raise InfeasibleError(
                f"current: GPU {gpu} has empty slots in layer {problem.loads.layers[row]}; staying cannot "
                "fill them with other experts (fill 'distinct')"
            )
        return Built(slots_LGC=slots_LGC, share_LGC=best_shares(problem, slots_LGC))
