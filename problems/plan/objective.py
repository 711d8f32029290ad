"""The figures that a plan is judged by: time over the scenarios, moves, traffic, memory."""

from __future__ import annotations

import numpy as np

from moeless_opt.problems.arrays import FloatArray, SlotArray
from moeless_opt.problems.plan.evaluate import gpu_times, node_traffic
from moeless_opt.problems.plan.plan import Plan
from moeless_opt.problems.spec.problem import Problem
from moeless_opt.problems.spec.wishes import Objective

__all__ = ["objective_vector", "risk", "scenario_value"]


def risk(top_TL: FloatArray, weight_T: FloatArray | None, objective: Objective) -> FloatArray:
    """One value per layer from the values in each scenario, by the objective's risk measure.

    Parameters
    ----------
    top_TL : array, shape [T, L]
        Largest GPU time of each layer in each scenario.
    weight_T : array, shape [T], optional
        Weights of the scenarios, summing to 1; equal by default.
    objective : Objective
        Says ``expected``, ``worst`` or ``cvar``.
    """
    if weight_T is None:
        weight_T = np.full(top_TL.shape[0], 1 / top_TL.shape[0])
    if objective.risk == "worst":
        return np.asarray(top_TL.max(0))
    if objective.risk == "expected":
        return np.asarray(weight_T @ top_TL)
    order_TL = np.argsort(-top_TL, axis=0, kind="stable")
    weight_TL = weight_T[order_TL]
    tail = 1.0 - objective.cvar_alpha
    kept_TL = np.clip(tail - (np.cumsum(weight_TL, axis=0) - weight_TL), 0.0, weight_TL)
    return np.asarray((kept_TL * np.take_along_axis(top_TL, order_TL, axis=0)).sum(0) / tail)


def scenario_value(problem: Problem, slots_LGC: SlotArray, share_LGC: FloatArray) -> float:
    """Sum over the layers of the largest GPU time, over the scenarios as the objective says, shares fixed."""
    speed_G, time = problem.topology.speed_G, problem.time
    top_TL = np.array(
        [gpu_times(load_LE, slots_LGC, share_LGC, speed_G, time).max(1) for load_LE in problem.loads.load_TLE]
    )
    return float(risk(top_TL, problem.loads.weight_T, problem.objective).sum())


def objective_vector(problem: Problem, plan: Plan) -> dict[str, float]:
    """All objectives of a plan, whatever the priorities.

    Returns
    -------
    dict
        ``balance``: sum over the layers of the largest GPU time (over the scenarios by the
        objective's risk), in the time model's unit. ``moves``: bytes to ship, or replicas where the
        size of an expert is unknown. ``traffic``: tokens that leave their node. ``memory``: bytes
        held, or replicas.
    """
    by_node = problem.loads.load_LNE
    held_L = np.count_nonzero(plan.slots_LGC >= 0, axis=(1, 2))
    sized = bool(problem.bytes_L.any())
    return {
        "balance": scenario_value(problem, plan.slots_LGC, plan.share_LGC),
        "moves": float(plan.moves.bytes if sized else plan.moves.count),
        "traffic": float(
            node_traffic(
                problem.load_LE, plan.slots_LGC, plan.share_LGC, problem.topology.node_G, by_node
            ).sum()
        ),
        "memory": float(held_L @ problem.bytes_L if sized else held_L.sum()),
    }
