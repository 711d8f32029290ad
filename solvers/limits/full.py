"""Full slots within the limits on replicas, pairs and domains: the flow of `needed`, every slot a demand.

Beside what must be (pins, domains, least replicas) further slots go to any expert that may have more:

    source -> extra -> expert, rest (each further replica dearer the smaller the pieces are already)

All of the flow arrives exactly if some full placement obeys. What is there costs nothing, so as little of it
goes as can; the rest goes where the pieces are largest.

References
----------
Minimum-cost flow by cost scaling: Goldberg (1997), as in ortools.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from ortools.graph.python.min_cost_flow import SimpleMinCostFlow

from moeless_opt.problems.arrays import BoolArray, FloatArray, IntArray, SlotArray
from moeless_opt.problems.errors import InfeasibleError
from moeless_opt.problems.spec import Fill, Problem
from moeless_opt.solvers.core import only_moves, topped_up, widened
from moeless_opt.solvers.limits.rules import Rules, rules_of

__all__ = ["counts_of", "full_counts_within", "full_within", "slots_counted"]

_STEPS = 8  # further replicas of an expert whose order is told apart


def full_within(problem: Problem, slots_LGC: SlotArray) -> SlotArray:
    """A placement with every slot full within the limits, where the problem's `fill` asks for it.

    Raises
    ------
    InfeasibleError
        If no full placement obeys, naming the layer and the limit.
    """
    slots_LGC = topped_up(problem, slots_LGC)
    if problem.fill == Fill.NONE or problem.limits == only_moves(problem.limits):
        return slots_LGC
    copies, load_LE = problem.fill == Fill.COPIES, problem.load_LE
    slots_LGC = widened(slots_LGC, max(int(problem.capacity_LG.max()), slots_LGC.shape[2]))
    for row, rules in enumerate(rules_of(problem)):
        count_EG = counts_of(slots_LGC[row], problem.experts)
        if (count_EG.sum(0) < rules.capacity_G).any() or not rules.keeps(count_EG):
            count_EG = full_counts_within(rules, load_LE[row], count_EG, copies=copies)
            slots_LGC[row] = slots_counted(count_EG, slots_LGC.shape[2])
    return slots_LGC


def counts_of(slots_GC: SlotArray, experts: int) -> IntArray:
    """Slots of each expert on each GPU, shape [E, G]."""
    rows = [np.bincount(row[row >= 0], minlength=experts) for row in slots_GC]
    return np.stack(rows, axis=1).astype(np.int64)


def slots_counted(count_EG: IntArray, wide: int) -> SlotArray:
    """The way back, experts ascending, shape [G, C]."""
    experts, gpus = count_EG.shape
    slots_GC = np.full((gpus, wide), -1, dtype=np.int32)
    for gpu in range(gpus):
        held = np.repeat(np.arange(experts), count_EG[:, gpu])
        slots_GC[gpu, : len(held)] = held
    return slots_GC


def full_counts_within(rules: Rules, load_E: FloatArray, count_EG: IntArray, *, copies: bool) -> IntArray:
    """Slots of each expert on each GPU, all full, with as much of what is there as can stay, shape [E, G].

    Parameters
    ----------
    rules : Rules
        Of the layer; a full one must not have more replicas than `total`.
    load_E : array of float, shape [E]
        Tokens: further replicas go to the largest pieces.
    count_EG : array of int, shape [E, G]
        What is there.
    copies : bool
        Whether an expert may have several slots of a GPU.

    Raises
    ------
    InfeasibleError
        If there is none, naming the layer and the limit without which there would be one.
    """
    found = _flow(rules, load_E, count_EG, copies)
    if found is not None:
        return found
    raise InfeasibleError(
        f"limits.{_culprit(rules, load_E, count_EG, copies)}: layer {rules.number}: not every slot can be "
        f"full (fill {'copies' if copies else 'distinct'}) within the limits"
    )


def _culprit(rules: Rules, load_E: FloatArray, count_EG: IntArray, copies: bool) -> str:
    """The first limit without which the slots could be full; all of them if one alone does not help."""
    experts, gpus = rules.allowed_EG.shape
    room = int(rules.capacity_G.sum())
    if rules.total < room:
        return "max_layer_replicas"
    open_EG: BoolArray = np.zeros((experts, gpus), dtype=np.bool_) | (rules.capacity_G > 0)
    most_E = np.full(experts, room if copies else int((rules.capacity_G > 0).sum()))
    banned_E = (open_EG & ~rules.allowed_EG).any(1)
    one_E = np.ones_like(rules.least_E)
    alone_E = np.maximum(rules.pinned_EG.sum(1), one_E)
    for name, loose in (
        ("max_replicas", replace(rules, most_E=most_E)),
        ("forbidden", replace(rules, allowed_EG=open_EG, most_E=np.where(banned_E, most_E, rules.most_E))),
        ("min_replicas", replace(rules, least_E=alone_E)),
        ("spread", replace(rules, spread_E=one_E, least_E=alone_E)),
        ("pinned", replace(rules, pinned_EG=np.zeros_like(open_EG), least_E=one_E)),
    ):
        if _flow(loose, load_E, count_EG, copies) is not None:
            return name
    return "max_replicas, forbidden, pinned"


def _flow(rules: Rules, load_E: FloatArray, count_EG: IntArray, copies: bool) -> IntArray | None:
    """The cheapest full placement; None if there is none."""
    pinned_EG, domain_G = rules.pinned_EG, rules.domain_G
    experts, gpus = pinned_EG.shape
    room_G = rules.capacity_G - pinned_EG.sum(0)
    reach_E = np.maximum(rules.spread_E - rules.reach_E(pinned_EG), 0)
    rest_E = np.maximum(rules.least_E - pinned_EG.sum(1) - reach_E, 0)
    more_E = rules.most_E - pinned_EG.sum(1) - reach_E - rest_E
    extra = int(room_G.sum() - reach_E.sum() - rest_E.sum())
    if extra < 0 or (room_G < 0).any() or (more_E < 0).any() or rules.total < rules.capacity_G.sum():
        return None
    domains = int(domain_G.max(initial=0)) + 1
    # Nodes: sink, GPUs, (expert, domain), reach, rest, extra.
    pair, reach = 1 + gpus, 1 + gpus + experts * domains
    rest, source = reach + experts, reach + 2 * experts
    level = experts * _STEPS + 1  # dearer than any order of further replicas
    left_EG = np.maximum(count_EG - pinned_EG, 0)
    e_S, g_S = np.nonzero((left_EG > 0) & rules.allowed_EG)
    e_P, g_P = np.nonzero(rules.allowed_EG & (copies | ~((count_EG > 0) | pinned_EG)))
    here_P = (count_EG > 0)[e_P, g_P] | pinned_EG[e_P, g_P]
    e_D, d_D = (index.ravel() for index in np.indices((experts, domains)))
    free_D = rules.domains_ED(pinned_EG)[e_D, d_D] == 0
    e_X, cap_X, cost_X = _further(load_E, rules.least_E, more_E)
    arcs = (
        (pair + e_S * domains + domain_G[g_S], 1 + g_S, left_EG[e_S, g_S] if copies else 1, 0),
        (
            pair + e_P * domains + domain_G[g_P],
            1 + g_P,
            rules.capacity_G[g_P] if copies else 1,
            np.where(here_P, 1, 2) * level,
        ),
        (1 + np.arange(gpus), np.zeros(gpus, dtype=np.int64), room_G, 0),
        (reach + e_D, pair + e_D * domains + d_D, free_D, 0),
        (rest + e_D, pair + e_D * domains + d_D, int(room_G.sum()), 0),
        (np.full(len(e_X), source), rest + e_X, cap_X, cost_X),
    )
    flow = SimpleMinCostFlow()
    names = [
        flow.add_arcs_with_capacity_and_unit_cost(
            tail, head, *(np.broadcast_to(one, len(tail)).astype(np.int64) for one in (cap, cost))
        )
        for tail, head, cap, cost in arcs
    ]
    flow.set_nodes_supplies(np.arange(reach, reach + experts), reach_E)
    flow.set_nodes_supplies(np.arange(rest, rest + experts), rest_E)
    flow.set_node_supply(source, extra)
    flow.set_node_supply(0, -int(room_G.sum()))
    if flow.solve() != flow.OPTIMAL:
        return None
    full_EG = pinned_EG.astype(np.int64)
    np.add.at(full_EG, (e_S, g_S), np.asarray(flow.flows(names[0])))
    np.add.at(full_EG, (e_P, g_P), np.asarray(flow.flows(names[1])))
    return full_EG


def _further(load_E: FloatArray, have_E: IntArray, more_E: IntArray) -> tuple[IntArray, IntArray, IntArray]:
    """Arcs for replicas beyond the least: expert, how many, and cost by the order of the pieces."""
    step_K = np.arange(_STEPS)
    piece_EK = load_E[:, None] / (np.maximum(have_E, 1)[:, None] + step_K)
    rank = np.empty(piece_EK.size, dtype=np.int64)
    rank[np.argsort(-piece_EK.ravel(), kind="stable")] = np.arange(piece_EK.size)
    cap_EK = (step_K < more_E[:, None]).astype(np.int64)
    cap_EK[:, -1] = np.maximum(more_E - (_STEPS - 1), 0)
    return np.repeat(np.arange(len(load_E)), _STEPS), cap_EK.ravel(), rank
