"""The figures that a plan is judged by: one term for each priority, and the order in which they count.

A further priority is a further term here and a name in ``wishes.PRIORITIES``; solvers that minimise it say so
in their features.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from moeless_opt.problems.arrays import FloatArray, SlotArray
from moeless_opt.problems.plan.evaluate import gpu_times, node_traffic
from moeless_opt.problems.plan.plan import Plan
from moeless_opt.problems.spec import PRIORITIES, Objective, Problem

__all__ = ["TERMS", "Term", "objective_vector", "order_of", "risk", "scenario_value", "usual_order"]


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Term:
    """One thing to minimise.

    Parameters
    ----------
    name : str
        As in ``Objective.priorities``.
    unit : callable
        Problem -> unit of the value.
    value : callable
        (problem, plan) -> the value.
    matters : callable
        Problem -> whether plans can differ in it at all.
    """

    name: str
    unit: Callable[[Problem], str]
    value: Callable[[Problem, Plan], float]
    matters: Callable[[Problem], bool]


def _balance(problem: Problem, plan: Plan) -> float:
    return scenario_value(problem, plan.slots_LGC, plan.share_LGC)


def _moves(problem: Problem, plan: Plan) -> float:
    return float(plan.moves.bytes if _sized(problem) else plan.moves.count)


def _traffic(problem: Problem, plan: Plan) -> float:
    loads, node_G = problem.loads, problem.topology.node_G
    leaves_L = node_traffic(problem.load_LE, plan.slots_LGC, plan.share_LGC, node_G, loads.load_LNE)
    return float(leaves_L.sum())


def _memory(problem: Problem, plan: Plan) -> float:
    held_L = np.count_nonzero(plan.slots_LGC >= 0, axis=(1, 2))
    return float(held_L @ problem.bytes_L if _sized(problem) else held_L.sum())


def _sized(problem: Problem) -> bool:
    return bool(problem.bytes_L.any())


def _weights(problem: Problem) -> str:
    return "bytes" if _sized(problem) else "replicas"


TERMS: dict[str, Term] = {
    term.name: term
    for term in (
        Term(
            name="balance",
            unit=lambda problem: problem.time.unit,
            value=_balance,
            matters=lambda problem: True,
        ),
        Term(name="moves", unit=_weights, value=_moves, matters=lambda problem: problem.current is not None),
        Term(
            name="traffic",
            unit=lambda problem: "tokens",
            value=_traffic,
            matters=lambda problem: problem.topology.nodes > 1,
        ),
        Term(name="memory", unit=_weights, value=_memory, matters=lambda problem: True),
    )
}
"""The terms by name."""


def order_of(problem: Problem) -> tuple[str, ...]:
    """The problem's priorities without those in which no two of its plans differ.

    Where nothing is live every replica is loaded, whatever the plan: moves say no more than memory. On one
    node nothing leaves it. Where nothing is left, balance is.
    """
    order = tuple(name for name in problem.objective.priorities if TERMS[name].matters(problem))
    return order or ("balance",)


def usual_order(problem: Problem) -> bool:
    """Whether the priorities are the default ones, or balance, or balance and then moves.

    Solvers at engine speed plan for these. In the default order they keep traffic low by token shares alone,
    and leave memory to the sizing: every slot may be used.
    """
    if problem.objective.priorities == PRIORITIES:
        return True
    return order_of(problem) in (("balance",), ("balance", "moves"))


def objective_vector(problem: Problem, plan: Plan) -> dict[str, float]:
    """All objectives of a plan, whatever the priorities.

    Returns
    -------
    dict
        ``balance``: sum over the layers of the largest GPU time (over the scenarios by the
        objective's risk, with the plan's own shares in each), in the time model's unit. ``moves``: bytes to
        ship, or replicas where the size of an expert is unknown. ``traffic``: tokens that leave their node.
        ``memory``: bytes held, or replicas.
    """
    return {name: term.value(problem, plan) for name, term in TERMS.items()}
