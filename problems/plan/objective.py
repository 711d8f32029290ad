"""The figures that a plan is judged by: one term for each priority, and the order in which they count.

A further priority is a further term here and a name in ``wishes.Priority``; solvers that minimise it say so
in their features.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from moeless_opt.problems.arrays import FloatArray, SlotArray
from moeless_opt.problems.plan.evaluate import gpu_times, node_traffic, over_perfect, perfect_times
from moeless_opt.problems.plan.failures import failure_sets, loss_chance
from moeless_opt.problems.plan.links import (
    by_expert,
    hop_sources,
    link_costs,
    outside_tokens,
    source_tokens,
    token_flows,
)
from moeless_opt.problems.plan.plan import Plan
from moeless_opt.problems.spec import PRIORITIES, Objective, Problem

__all__ = [
    "TERMS",
    "Judged",
    "Term",
    "gpu_risk",
    "hops_L",
    "judged",
    "objective_vector",
    "order_of",
    "outside_L",
    "risk",
    "source_loads",
    "traffic_L",
    "usual_order",
]


def risk(top_TL: FloatArray, weight_T: FloatArray | None, objective: Objective) -> FloatArray:
    """One value per layer from the values in each scenario, by the objective's risk measure.

    Parameters
    ----------
    top_TL : array, shape [T, L]
        Largest GPU time of each layer in each scenario.
    weight_T : array, shape [T], optional
        Weights of the scenarios, summing to 1; equal by default.
    objective : Objective
        Says ``expected``, ``worst``, ``cvar`` or ``sigma``. None falls where a value rises: the last, too, as
        long as sigma is at most 1 (mean-upper-semideviation; Ruszczynski and Shapiro 2006). ``covariance``
        may fall, and is to be taken of each GPU by itself (see `gpu_risk`).
    """
    if top_TL.shape[0] == 1:
        return np.asarray(top_TL[0])
    if weight_T is None:
        weight_T = np.full(top_TL.shape[0], 1 / top_TL.shape[0])
    if objective.risk == "worst":
        return np.asarray(top_TL.max(0))
    if objective.risk == "expected":
        return np.asarray(weight_T @ top_TL)
    if objective.risk == "covariance":
        mean_L = weight_T @ top_TL
        apart_TL = np.clip(top_TL - mean_L, -1e150, 1e150)
        return np.asarray(mean_L + objective.sigma * np.sqrt(weight_T @ apart_TL**2))
    if objective.risk == "sigma":
        mean_L = weight_T @ top_TL
        above_TL = np.maximum(top_TL - mean_L, 0.0)
        above_TL = np.minimum(above_TL, 1e150)  # times that stand for "impossible" have no square
        return np.asarray(mean_L + objective.sigma * np.sqrt(weight_T @ above_TL**2))
    order_TL = np.argsort(-top_TL, axis=0, kind="stable")
    weight_TL = weight_T[order_TL]
    tail = 1.0 - objective.cvar_alpha
    kept_TL = np.clip(tail - (np.cumsum(weight_TL, axis=0) - weight_TL), 0.0, weight_TL)
    return np.asarray((kept_TL * np.take_along_axis(top_TL, order_TL, axis=0)).sum(0) / tail)


def gpu_risk(time_TX: FloatArray, weight_T: FloatArray | None, objective: Objective) -> FloatArray:
    """Values of GPUs of which the largest counts, for `risk`: of each scenario, or one for all of them.

    A layer's time is the risk of the scenarios' slowest GPUs; by ``covariance``, which asks how far each GPU
    strays, it is that of the GPU with the largest risk of its own: ``max_g m_g + sigma sqrt(s_g' C s_g)``,
    with the shares s_g of the experts that the GPU serves and C the covariance of the experts' loads.

    Parameters
    ----------
    time_TX : array, shape [T, ...]
        Times of GPUs in each scenario.
    weight_T, objective
        As in `risk`.

    Returns
    -------
    array, shape [T, ...] or [1, ...]
        ``risk(gpu_risk(time_TLG, ...).max(2), ...)`` are the layers' values.
    """
    if objective.risk != "covariance" or len(time_TX) == 1:
        return time_TX
    flat_TX = time_TX.reshape(len(time_TX), -1)
    return risk(flat_TX, weight_T, objective).reshape(1, *time_TX.shape[1:])


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """The times that a plan is judged by.

    Parameters
    ----------
    time_LG : array, shape [L, G]
        Time of each GPU under the expected loads; 0 where it can hold no expert.
    value_L : array, shape [L]
        Time of each layer, that of its slowest GPU; over several scenarios by the objective's risk.
    perfect_L : array, shape [L]
        What that would be if the same work were perfectly balanced.
    risk_LG : array, shape [L, G]
        Time of each GPU by the objective's risk. `value_L` may be above the largest: the slowest GPU need not
        be the same in every scenario.
    """

    time_LG: FloatArray
    value_L: FloatArray
    perfect_L: FloatArray
    risk_LG: FloatArray

    @property
    def imbalance_L(self) -> FloatArray:
        """`value_L` over `perfect_L`, shape [L]; 1 is perfect, and what a layer without work counts."""
        return over_perfect(self.value_L, self.perfect_L)


def judged(
    problem: Problem,
    slots_LGC: SlotArray,
    share_LGC: FloatArray,
    scenario_share_TLGC: FloatArray | None = None,
) -> Judged:
    """Judge slots and shares by the problem's own measure.

    Parameters
    ----------
    problem : Problem
        Loads, speeds, time model and risk.
    slots_LGC, share_LGC : arrays, shape [L, G, C]
        Expert in each slot, and the share of its tokens that the slot serves.
    scenario_share_TLGC : array, shape [T, L, G, C], optional
        Shares of each scenario, where they are not the same in all.
    """
    loads, speed_G, usable_LG = problem.loads, problem.topology.speed_G, problem.usable_LG

    def times(load_LE: FloatArray, part_LGC: FloatArray) -> FloatArray:
        time_LG = gpu_times(load_LE, slots_LGC, part_LGC, speed_G, problem.time)
        return time_LG if usable_LG.all() else np.where(usable_LG, time_LG, 0.0)

    time_LG = times(problem.load_LE, share_LGC)
    if loads.shape[0] == 1:
        perfect_L = perfect_times(time_LG, speed_G, usable_LG)
        return Judged(time_LG=time_LG, value_L=time_LG.max(1), perfect_L=perfect_L, risk_LG=time_LG)
    each = [share_LGC] * loads.shape[0] if scenario_share_TLGC is None else scenario_share_TLGC
    time_TLG = np.array([times(*pair) for pair in zip(loads.load_TLE, each, strict=True)])
    perfect_TL = np.array([perfect_times(part_LG, speed_G, usable_LG) for part_LG in time_TLG])
    flat_TL = time_TLG.reshape(len(time_TLG), -1)
    top_TL = gpu_risk(time_TLG, loads.weight_T, problem.objective).max(2)
    value_L, perfect_L, risk_LG = (
        risk(value, loads.weight_T, problem.objective) for value in (top_TL, perfect_TL, flat_TL)
    )
    return Judged(
        time_LG=time_LG, value_L=value_L, perfect_L=perfect_L, risk_LG=risk_LG.reshape(time_LG.shape)
    )


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
    told = judged(problem, plan.slots_LGC, plan.share_LGC, plan.scenario_share_TLGC)
    return float(told.value_L.sum())


def _moves(problem: Problem, plan: Plan) -> float:
    return float(plan.moves.bytes if _sized(problem) else plan.moves.count)


def traffic_L(problem: Problem, slots_LGC: SlotArray, share_LGC: FloatArray) -> FloatArray:
    """Cost of the tokens that leave their source, shape [L]; by default, tokens that leave their node."""
    topology = problem.topology
    if topology.cost_GG is None:
        sources = source_loads(problem)
        return node_traffic(problem.load_LE, slots_LGC, share_LGC, topology.node_G, sources)
    if problem.split == "nearest":
        return np.asarray((token_flows(problem, slots_LGC, share_LGC) * topology.cost_GG).sum((1, 2)))
    served_LGE = by_expert(problem, slots_LGC, share_LGC) * problem.load_LE[:, None, :]
    return link_costs(problem, source_tokens(problem), served_LGE)


def outside_L(problem: Problem, slots_LGC: SlotArray, share_LGC: FloatArray) -> FloatArray:
    """Tokens served outside the home of their group, shape [L]; none where there are no groups."""
    if problem.groups is None:
        return np.zeros(problem.layers)
    return outside_tokens(problem, by_expert(problem, slots_LGC, share_LGC))


def hops_L(problem: Problem, slots_LGC: SlotArray, share_LGC: FloatArray) -> FloatArray:
    """Cost of following tokens from the layer before, shape [L]; none where no flow is known."""
    flow_LEE = problem.loads.flow_LEE
    if flow_LEE is None:
        return np.zeros(problem.layers)
    return link_costs(problem, *hop_sources(flow_LEE, by_expert(problem, slots_LGC, share_LGC)))


def _of(count_L: Callable[[Problem, SlotArray, FloatArray], FloatArray]) -> Callable[[Problem, Plan], float]:
    return lambda problem, plan: float(count_L(problem, plan.slots_LGC, plan.share_LGC).sum())


def _distances(problem: Problem) -> bool:
    """Whether some tokens cost more than others."""
    topology = problem.topology
    return topology.nodes > 1 if topology.cost_GG is None else bool(topology.cost_GG.any())


def source_loads(problem: Problem) -> FloatArray | None:
    """Expected tokens by source node, shape [L, N, E]; None where unknown, that is, evenly from all nodes.

    A split by the nearest replica knows them: where the loads do not say, evenly from all live GPUs.
    """
    if problem.split != "nearest":
        return problem.loads.load_LNE
    return np.asarray(problem.source_parts() * problem.load_LE[:, None, :])


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
            value=_of(traffic_L),
            matters=_distances,
        ),
        Term(name="memory", unit=_weights, value=_memory, matters=lambda problem: True),
        Term(
            name="groups",
            unit=lambda problem: "tokens",
            value=_of(outside_L),
            matters=lambda problem: problem.groups is not None and problem.topology.nodes > 1,
        ),
        Term(
            name="hops",
            unit=lambda problem: "tokens",
            value=_of(hops_L),
            matters=lambda problem: problem.loads.flow_LEE is not None and _distances(problem),
        ),
        Term(
            name="survival",
            unit=lambda problem: "probability of a loss",
            value=lambda problem, plan: loss_chance(problem, plan.slots_LGC),
            matters=lambda problem: failure_sets(problem).gone_FD.shape[1] > 1,
        ),
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
        objective's risk, with the shares of each), in the time model's unit. ``moves``: bytes to
        ship, or replicas where the size of an expert is unknown. ``traffic``: tokens that leave their node.
        ``memory``: bytes held, or replicas. ``groups``: tokens served outside their group's home, where the
        problem has groups. ``hops``: what following tokens from layer to layer costs, where a flow is known.
        ``survival``: the probability that failures lose an expert, where it is a priority.
    """
    left_out = set() if "survival" in problem.objective.priorities else {"survival"}
    if problem.groups is None:
        left_out.add("groups")
    if problem.loads.flow_LEE is None:
        left_out.add("hops")
    return {name: term.value(problem, plan) for name, term in TERMS.items() if name not in left_out}
