"""What re-planning asks of a problem's layers: what is live in them, their times, moves and bounds."""

from __future__ import annotations

import numpy as np

from moeless_opt.problems.arrays import FloatArray, IntArray, SlotArray
from moeless_opt.problems.errors import ProblemError
from moeless_opt.problems.plan.evaluate import gpu_times, new_replicas
from moeless_opt.problems.spec.placement import equal_shares
from moeless_opt.problems.spec.problem import Problem
from moeless_opt.solvers.shares.flow import solve_shares

__all__ = ["layer_moves", "layer_problem", "layer_times", "live_slots"]


def live_slots(problem: Problem) -> SlotArray:
    """The live placement with as many slots per GPU as the problem allows, shape [L, G, C]."""
    if problem.current is None:
        raise ProblemError("current", "is missing: re-planning starts from a live placement")
    slots_LGC = problem.current.slots_LGC
    wide = max(int(problem.capacity_LG.max()), slots_LGC.shape[2])
    padded = np.full((*slots_LGC.shape[:2], wide), -1, dtype=np.int32)
    # Filled slots first: the kernels take a GPU's slots to be its capacity.
    order = np.argsort(slots_LGC < 0, axis=2, kind="stable")
    padded[:, :, : slots_LGC.shape[2]] = np.take_along_axis(slots_LGC, order, axis=2)
    return padded[:, :, : max(int(problem.capacity_LG.max()), 1)]


def layer_times(problem: Problem, slots_LGC: SlotArray) -> FloatArray:
    """Largest GPU time of each layer with the best shares that the split allows (tokens over speed)."""
    if problem.split == "equal":
        share_LGC = equal_shares(slots_LGC, problem.experts)
        return np.asarray(gpu_times(problem.load_LE, slots_LGC, share_LGC, problem.topology.speed_G).max(1))
    return solve_shares(problem.load_LE, slots_LGC, problem.topology.speed_G).time_L


def layer_moves(problem: Problem, slots_LGC: SlotArray, live_LGC: SlotArray) -> IntArray:
    """Replicas of each layer that are not live, shape [L]."""
    return np.asarray(new_replicas(slots_LGC, live_LGC, problem.experts).sum((1, 2)))


def layer_problem(problem: Problem, layer: int) -> Problem:
    """One layer of a problem, without limits; `layer` is a row."""
    assert problem.current is not None
    return problem.replace(
        loads=problem.loads.select([problem.loads.layers[layer]]),
        topology=problem.topology.replace(slots_G=problem.capacity_LG[layer], memory_G=None),
        expert_bytes_L=None if not problem.bytes_L.any() else problem.bytes_L[layer : layer + 1],
        model=None,
        current=problem.current.replace(slots_LGC=problem.current.slots_LGC[layer : layer + 1]),
        limits=type(problem.limits)(),
        known=None,
    )
