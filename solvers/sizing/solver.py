"""Sizing policies as a solver of the registry.

`Sized` takes the policies ``makespan`` (the fewest replicas for a wanted imbalance) and ``memory`` (all
layers share the GPUs' bytes, replicas go where they buy most).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import numpy as np

from moeless_opt.problems.arrays import FloatArray, IntArray, SlotArray
from moeless_opt.problems.errors import InfeasibleError, ProblemError
from moeless_opt.problems.plan import best_bound, gpu_times, new_replicas
from moeless_opt.problems.spec import Limits, Problem, Sizing, equal_shares
from moeless_opt.problems.text import bytes_text
from moeless_opt.solvers.construct import Construct, construct_equal, construct_fractional
from moeless_opt.solvers.core import (
    Built,
    Heuristic,
    NoOptions,
    Stop,
    Task,
    best_over_scenarios,
    bytes_alone,
    guises,
    perfect_tokens,
    risk_L,
    token_bound,
    widened,
)
from moeless_opt.solvers.limits import rules_of
from moeless_opt.solvers.replan import ReplanWish, on_live_gpus, replan_within
from moeless_opt.solvers.shares import best_shares
from moeless_opt.solvers.sizing.budget import plan_budget
from moeless_opt.solvers.sizing.memory import share_slots, slots_for_one_each
from moeless_opt.solvers.sizing.minimal import TimeSizing, fewest_for_time
from moeless_opt.solvers.sizing.near_live import near_live

__all__ = ["Sized"]

TIGHTER = (1.0, 0.97, 0.93, 0.88, 0.8, 0.7)
"""Shares of the wanted time that are asked for of one scenario, so that the others are in time, too."""

EQUAL = 1e-9


class Sized(Heuristic):
    """The policies ``makespan`` and ``memory``, and few replicas where bytes are the only limit."""

    name = "sized"
    summary = "fewest replicas for a wanted imbalance, or one budget of bytes over all layers"

    def build(self, task: Task[NoOptions]) -> Built | Iterable[Built]:
        """Size, place, share."""
        problem = task.problem
        policy = problem.sizing.policy
        size = {"makespan": _few_replicas, "memory": _shared_memory, "slots": _enough}.get(policy)
        if size is None or (size is _enough and not bytes_alone(problem)):
            raise ProblemError(
                "sizing.policy",
                f"is {policy!r}; solver {self.name!r} takes 'makespan' and 'memory', "
                "and 'slots' where nothing is live and memory is the only limit",
            )
        if size is _shared_memory and (kept := _kept_sizes(task)) is not None:
            return kept
        sized = _enough(task) if size is _enough else size(problem, task.stop)  # type: ignore[operator]
        if sized is None:
            return ()
        slots_LGC, message = sized
        share_LGC = best_shares(problem, slots_LGC)
        return Built(slots_LGC=slots_LGC, share_LGC=share_LGC, message=message, proof=message)


def _few_replicas(problem: Problem, stop: Stop) -> tuple[SlotArray, str] | None:
    """Slots and what is to be said of them; None where the time was too short to reach the target."""
    wanted = problem.sizing.imbalance
    speed_G, loads = problem.topology.speed_G, problem.loads
    target_L = wanted * perfect_tokens(problem)
    found = fewest_for_time(
        problem.load_LE,
        problem.capacity_LG,
        speed_G,
        target_L,
        "equal" if problem.split == "equal" else "fractional",
        stop=stop,
    )
    if loads.shape[0] > 1 or problem.share_entries is not None:
        found = _in_every_scenario(problem, found, target_L, stop)
    if not found.met_L.all() and stop():
        return None
    if not found.met_L.all():
        missed = [problem.loads.layers[i] for i in np.flatnonzero(~found.met_L)]
        raise InfeasibleError(
            f"sizing.imbalance: {wanted} was not reached in {len(missed)} layer(s), first {missed[0]}; "
            "more slots or a larger imbalance would do"
        )
    few, least = int(found.replicas_L.sum()), int(found.bound_L.sum())
    rules = [
        replace(one, total=int(count)) for one, count in zip(rules_of(problem), found.replicas_L, strict=True)
    ]
    slots_LGC = near_live(problem, [found.slots_LGC], rules, target_L, stop=stop)
    return slots_LGC, f"{few} replicas for an imbalance of {wanted}; no plan has fewer than {least}"


def _enough(task: Task[NoOptions]) -> tuple[SlotArray, str]:
    """Few replicas within the balance tolerance of perfect balance, or of what all that fit reach.

    The fewest are found for the first aim alone; where it is missed, a layer asks again for what all its
    slots reached. What is said tells what the bytes that stay free could buy.
    """
    problem, stop = task.problem, task.stop
    near = 1 + problem.objective.balance_tolerance
    speed_G, perfect_L = problem.topology.speed_G, perfect_tokens(problem)
    split = "equal" if problem.split == "equal" else "fractional"

    def fewest(target_L: FloatArray, rows: IntArray) -> TimeSizing:
        load_LE, capacity_LG = problem.load_LE[rows], problem.capacity_LG[rows]
        return fewest_for_time(load_LE, capacity_LG, speed_G, target_L, split, seconds=0, stop=stop)

    if problem.loads.shape[0] > 1:
        slots_LGC = _narrowest(task, near)
    else:
        found = fewest(near * perfect_L, np.arange(problem.layers))
        slots_LGC = found.slots_LGC
        rows = np.flatnonzero(~found.met_L)
        if len(rows) and not stop():
            again = fewest(near * risk_L(problem, slots_LGC[rows], rows), rows).slots_LGC
            wide = max(slots_LGC.shape[2], again.shape[2])
            slots_LGC = widened(slots_LGC, wide)
            slots_LGC[rows] = widened(again, wide)
    held_L = (slots_LGC >= 0).sum((1, 2))
    room_L = np.minimum(problem.capacity_LG, problem.experts).sum(1)
    weighed = perfect_L > 0
    now = float(np.mean((risk_L(problem, slots_LGC) / np.where(weighed, perfect_L, 1.0))[weighed]))
    held, room = (bytes_text(int(count_L @ problem.bytes_L)) for count_L in (held_L, room_L))
    return slots_LGC, (
        f"{held_L.sum()} replicas ({held}) have a mean imbalance of {now:.4f}; "
        f"all {room_L.sum()} that fit ({room}) could at best have 1.0000: "
        "the rest is left to the KV cache (sizing 'fill' holds all)"
    )


def _narrowest(task: Task[NoOptions], near: float) -> SlotArray:
    """Over several scenarios: the fewest slots a GPU, of a doubling ladder, that come near enough."""
    problem, capacity_G = task.problem, task.problem.capacity_LG.min(0)
    most, least = int(capacity_G.max()), -(-problem.experts // int((capacity_G > 0).sum()))
    tables: list[SlotArray] = []
    for width in sorted({*(min(least + step, most) for step in (0, 1, 2, 4, 8, 16, 32)), most}):
        slots_G = np.minimum(capacity_G, width)
        if slots_G.sum() < problem.experts:
            continue
        if tables and task.stop():
            break
        narrow = problem.topology.replace(slots_G=slots_G, memory_G=None)
        built = Construct().placed(task, problem.replace(topology=narrow, known=None))
        tables.append(widened(built.slots_LGC, max(most, 1)))
    value_WL = np.stack([risk_L(problem, table) for table in tables])
    aim_L = near * np.maximum(perfect_tokens(problem), value_WL.min(0))
    first_L = (value_WL <= aim_L * (1 + EQUAL)).argmax(0)
    return np.array([tables[w][layer] for layer, w in enumerate(first_L)])


def _in_every_scenario(problem: Problem, found: TimeSizing, target_L: FloatArray, stop: Stop) -> TimeSizing:
    """Fewest replicas whose risk over the scenarios is within the time, of those made for each by itself.

    What suffices for one scenario may be too slow in another, or in whole entries of a table, so ever shorter
    times are asked for. Nothing
    has fewer replicas than the bound for the expected loads: their least time is no more than any risk.
    """
    slots_LGC = found.slots_LGC.copy()
    met_L = risk_L(problem, slots_LGC) <= target_L * (1 + EQUAL)
    count_L = np.where(met_L, found.replicas_L, np.iinfo(np.int64).max)
    for part in TIGHTER:
        for guise in guises(problem):
            if stop():
                break
            mean_L = perfect_tokens(guise)
            other = fewest_for_time(
                guise.load_LE,
                problem.capacity_LG,
                problem.topology.speed_G,
                np.maximum(part * target_L, mean_L),
                "equal" if problem.split == "equal" else "fractional",
                seconds=0,
                stop=stop,
            )
            good_L = (risk_L(problem, other.slots_LGC) <= target_L * (1 + EQUAL)) & (
                other.replicas_L < count_L
            )
            slots_LGC[good_L], count_L[good_L] = other.slots_LGC[good_L], other.replicas_L[good_L]
            met_L |= good_L
    return TimeSizing(
        slots_LGC=slots_LGC,
        share_LGC=equal_shares(slots_LGC, problem.experts),
        replicas_L=(slots_LGC >= 0).sum((1, 2)),
        bound_L=found.bound_L,
        met_L=met_L,
    )


def _shared_memory(problem: Problem, stop: Stop) -> tuple[SlotArray, str]:
    topology, bytes_L = problem.topology, problem.bytes_L
    if topology.memory_G is None or not bytes_L.any():
        raise ProblemError(
            "sizing.policy", "'memory' needs topology.memory and the size of an expert (model=...)"
        )
    if topology.slots_G is not None:
        raise ProblemError(
            "topology.slots", "cannot be given with sizing 'memory': there bytes are the only limit"
        )
    if problem.loads.shape[0] == 1:
        slots_LGC, message = _spend_memory(problem, stop)
        return _on_live(problem, slots_LGC), message
    slots_LGC = best_over_scenarios(problem, lambda guise: _spend_memory(guise, stop)[0], stop=stop)
    slots_LGC = _on_live(problem, slots_LGC)
    spare_L = (slots_LGC >= 0).sum((1, 2)) - problem.experts
    return slots_LGC, f"{spare_L.sum()} spare replicas, {spare_L.min()} to {spare_L.max()} a layer"


def _kept_sizes(task: Task[NoOptions]) -> Built | None:
    """What is live, re-planned layer by layer in the slots that it has; None unless that is near enough.

    As elsewhere a time within the balance tolerance of the bound is good enough, and fewer moves win. Bytes
    that are free become slots of the layers with fewest.
    """
    problem, stop = task.problem, task.stop
    live, topology = problem.current, problem.topology
    if live is None or live.partial or topology.memory_G is None or problem.loads.shape[0] > 1:
        return None
    if "moves" not in problem.objective.priorities or problem.objective.horizon is not None:
        return None
    slots_LG = np.asarray(live.held_LGE.sum(2), dtype=np.int64)
    left_G = topology.memory_G - problem.bytes_L @ slots_LG
    for gpu in range(topology.gpus):
        for layer in np.argsort(slots_LG.sum(1), kind="stable").tolist() * 2:
            size = int(problem.bytes_L[layer])
            if size <= left_G[gpu] and slots_LG[layer, gpu] < problem.experts:
                slots_LG[layer, gpu] += 1
                left_G[gpu] -= size
    enough_L = token_bound(problem) * (1 + problem.objective.balance_tolerance)
    tables: list[SlotArray] = []
    for row, number in enumerate(problem.loads.layers):
        one = problem.replace(
            loads=problem.loads.select([number]),
            topology=topology.replace(slots_G=slots_LG[row], memory_G=None),
            expert_bytes_L=problem.bytes_L[[row]],
            model=None,
            sizing=Sizing(),
            current=live.replace(slots_LGC=live.slots_LGC[[row]]),
            limits=Limits(),
            known=None,
        )
        found = replan_within(one, ReplanWish(tolerance=problem.objective.balance_tolerance), stop=stop)
        if risk_L(one, found.slots_LGC)[0] > enough_L[row] * (1 + EQUAL):
            return None
        tables.append(found.slots_LGC)
    wide = max(table.shape[2] for table in tables)
    slots_LGC = np.concatenate([widened(table, wide) for table in tables])
    moved = int(new_replicas(slots_LGC, live.slots_LGC, problem.experts).sum())
    message = f"as many replicas of each layer on each GPU as are live, or more; {moved} move"
    return Built(slots_LGC=slots_LGC, share_LGC=best_shares(problem, slots_LGC), message=message)


def _on_live(problem: Problem, slots_LGC: SlotArray) -> SlotArray:
    """Each GPU's contents where most of them are live, if anything is."""
    if problem.current is None or "moves" not in problem.objective.priorities:
        return slots_LGC
    return on_live_gpus(problem, slots_LGC)


def _spend_memory(problem: Problem, stop: Stop) -> tuple[SlotArray, str]:
    """Share the GPUs' memory out for one scenario, and tell what was bought."""
    load_LE, speed_G, bytes_L = problem.load_LE, problem.topology.speed_G, problem.bytes_L
    memory_G = problem.topology.memory_G
    assert memory_G is not None
    starts = [slots_for_one_each(bytes_L, memory_G, problem.experts, stop)]
    budget = int(memory_G.sum()) - problem.experts * int(bytes_L.sum())
    mean_L = perfect_tokens(problem)
    bound = float(mean_L.sum())
    try:
        found = plan_budget(load_LE, speed_G, budget, bytes_L=bytes_L, memory_G=memory_G, stop=stop)
    except InfeasibleError:
        pass  # its slots, shared out layer by layer, missed a way that there is
    else:
        bound = found.bound
        starts.insert(0, (found.slots_LGC >= 0).sum(2))

    def build(load_LE: FloatArray, slots_LG: IntArray) -> tuple[SlotArray, FloatArray]:
        if problem.split == "equal":
            slots_LGC = construct_equal(load_LE, slots_LG, speed_G, stop=stop)
            share_LGC = equal_shares(slots_LGC, problem.experts)
        else:
            slots_LGC, share_LGC = construct_fractional(load_LE, slots_LG, speed_G)
        return slots_LGC, gpu_times(load_LE, slots_LGC, share_LGC, speed_G).max(1)

    def least(load_LE: FloatArray, slots_LG: IntArray) -> FloatArray:
        return best_bound(load_LE, slots_LG, speed_G, problem.split)[0]

    slots_LGC = share_slots(load_LE, mean_L, bytes_L, memory_G, starts, build, least, stop)
    spare_L = (slots_LGC >= 0).sum((1, 2)) - problem.experts
    mean = float(mean_L.sum()) or 1.0
    return slots_LGC, (
        f"{spare_L.sum()} spare replicas, {spare_L.min()} to {spare_L.max()} a layer; "
        f"no spending of {budget} bytes has a mean imbalance below {bound / mean:.5f}"
    )
