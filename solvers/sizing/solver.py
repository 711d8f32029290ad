"""Sizing policies as a solver of the registry.

`Sized` takes the policies ``makespan`` (the fewest replicas for a wanted imbalance) and ``memory`` (all
layers share the GPUs' bytes, replicas go where they buy most).
"""

from __future__ import annotations

import numpy as np

from moeless_opt.problems.arrays import FloatArray, IntArray, SlotArray
from moeless_opt.problems.errors import InfeasibleError, ProblemError
from moeless_opt.problems.plan.evaluate import gpu_times
from moeless_opt.problems.spec.placement import equal_shares
from moeless_opt.problems.spec.problem import Problem
from moeless_opt.solvers.construct.equal import construct_equal
from moeless_opt.solvers.construct.fractional import construct_fractional
from moeless_opt.solvers.core.finish import Built
from moeless_opt.solvers.core.options import NoOptions
from moeless_opt.solvers.core.solver import Heuristic, Task
from moeless_opt.solvers.core.stopping import Stop
from moeless_opt.solvers.shares.best import best_shares
from moeless_opt.solvers.sizing.budget import plan_budget
from moeless_opt.solvers.sizing.memory import share_slots, slots_for_one_each
from moeless_opt.solvers.sizing.minimal import fewest_for_time

__all__ = ["Sized"]


class Sized(Heuristic):
    """The policies ``makespan`` and ``memory``."""

    name = "sized"
    summary = "fewest replicas for a wanted imbalance, or one budget of bytes over all layers"

    def build(self, task: Task[NoOptions]) -> Built:
        """Size, place, share."""
        problem = task.problem
        policy = problem.sizing.policy
        size = {"makespan": _few_replicas, "memory": _shared_memory}.get(policy)
        if size is None:
            raise ProblemError(
                "sizing.policy", f"is {policy!r}; solver {self.name!r} takes 'makespan' and 'memory'"
            )
        slots_LGC, message = size(problem, task.stop)
        share_LGC = best_shares(problem, slots_LGC)
        return Built(slots_LGC=slots_LGC, share_LGC=share_LGC, message=message, proof=message)


def _few_replicas(problem: Problem, stop: Stop) -> tuple[SlotArray, str]:
    wanted = problem.sizing.imbalance
    speed_G = problem.topology.speed_G
    mean_L = problem.load_LE.sum(1) / speed_G.sum()
    found = fewest_for_time(
        problem.load_LE,
        problem.capacity_LG,
        speed_G,
        wanted * mean_L,
        "equal" if problem.split == "equal" else "fractional",
        stop=stop,
    )
    if not found.met_L.all():
        missed = [problem.loads.layers[i] for i in np.flatnonzero(~found.met_L)]
        raise InfeasibleError(
            f"sizing.imbalance: {wanted} was not reached in {len(missed)} layer(s), first {missed[0]}; "
            f"{'more time, ' if stop() else ''}more slots or a larger imbalance would do"
        )
    few, least = int(found.replicas_L.sum()), int(found.bound_L.sum())
    return found.slots_LGC, f"{few} replicas for an imbalance of {wanted}; no plan has fewer than {least}"


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
    load_LE, speed_G, memory_G = problem.load_LE, topology.speed_G, topology.memory_G
    starts = [slots_for_one_each(bytes_L, memory_G, problem.experts, stop)]
    budget = int(memory_G.sum()) - problem.experts * int(bytes_L.sum())
    mean_L = load_LE.sum(1) / speed_G.sum()
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

    slots_LGC = share_slots(load_LE, mean_L, bytes_L, memory_G, starts, build, stop)
    spare_L = (slots_LGC >= 0).sum((1, 2)) - problem.experts
    mean = float(mean_L.sum()) or 1.0
    return slots_LGC, (
        f"{spare_L.sum()} spare replicas, {spare_L.min()} to {spare_L.max()} a layer; "
        f"no spending of {budget} bytes has a mean imbalance below {bound / mean:.5f}"
    )
