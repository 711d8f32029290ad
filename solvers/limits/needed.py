"""Which replicas a layer must have under its rules: a flow that finds them wherever they exist.

Every expert needs its pins, so many further failure domains, and so many replicas in all. As a flow:

    source -> expert, reach (domains yet to be reached) -> (expert, domain), one each
    source -> expert, rest (replicas beyond those)      -> (expert, domain), any number
    (expert, domain) -> GPU -> sink (slots)

with one unit from an (expert, domain) to each GPU of the domain that may hold the expert. All of the flow
arrives exactly if the rules leave a placement; the cheapest one changes least of what is there.

References
----------
Minimum-cost flow by cost scaling: Goldberg (1997), as in ortools.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from ortools.graph.python.min_cost_flow import SimpleMinCostFlow

from moeless_opt.problems.arrays import BoolArray, FloatArray, IntArray
from moeless_opt.problems.errors import InfeasibleError
from moeless_opt.solvers.limits.rules import Rules

__all__ = ["mended_within", "needed_EG"]

_NEW = 1 << 20
"""Cost of a pair that is not there, beside the order of the GPUs by load."""


def needed_EG(
    rules: Rules,
    there_EG: BoolArray,
    time_G: FloatArray | None = None,
    arrived_G: IntArray | None = None,
) -> BoolArray:
    """Replicas that suffice for all that must be, as few of them new as possible, shape [E, G].

    Parameters
    ----------
    rules : Rules
        Of the layer.
    there_EG : array of bool, shape [E, G]
        What is there already.
    time_G : array of float, shape [G], optional
        How busy the GPUs are: of equally good ones the least busy are taken.
    arrived_G : array of int, shape [G], optional
        Replicas that come to each GPU anyway: the new ones go where fewest come, not to the least busy.

    Raises
    ------
    InfeasibleError
        If no placement obeys.
    """
    pinned_EG, allowed_EG = rules.pinned_EG, rules.allowed_EG
    room_G = rules.capacity_G - pinned_EG.sum(0)
    _check_fit(rules, room_G)
    experts, gpus = allowed_EG.shape
    domains = int(rules.domain_G.max(initial=0)) + 1
    rank_G = np.zeros(gpus, dtype=np.int64)
    rank_G[np.argsort(np.zeros(gpus) if time_G is None else time_G, kind="stable")] = np.arange(gpus)
    reach_E, rest_E = _wanted(rules)
    # Nodes: sink, GPUs, (expert, domain), reach, rest. Every supply is at the last two.
    pair, reach, rest = 1 + gpus, 1 + gpus + experts * domains, 1 + gpus + experts * (domains + 1)
    e_P, g_P = np.nonzero(allowed_EG & ~pinned_EG)
    tails = [pair + e_P * domains + rules.domain_G[g_P], 1 + np.arange(gpus)]
    heads = [1 + g_P, np.zeros(gpus, dtype=np.int64)]
    caps = [np.ones(len(e_P), dtype=np.int64), room_G]
    costs = [np.where(there_EG[e_P, g_P], 0, _NEW + rank_G[g_P]), np.zeros(gpus, dtype=np.int64)]
    if arrived_G is not None:
        # What is new reaches its GPU through a node of its own, the dearer the more come.
        door = rest + experts
        heads[0] = np.where(there_EG[e_P, g_P], 1 + g_P, door + g_P)
        costs[0] = np.where(there_EG[e_P, g_P], 0, _NEW)
        g_D, cost_D = _doors(room_G, arrived_G + (pinned_EG & ~there_EG).sum(0))
        tails, heads = [*tails, door + g_D], [*heads, 1 + g_D]
        caps, costs = [*caps, np.ones_like(g_D)], [*costs, cost_D]
    e_D, d_D = (index.ravel() for index in np.indices((experts, domains)))
    pinned_in_ED = rules.domains_ED(pinned_EG)
    for start, cap_D in (
        (reach, (pinned_in_ED[e_D, d_D] == 0).astype(np.int64)),
        (rest, np.full(len(e_D), gpus)),
    ):
        tails.append(start + e_D)
        heads.append(pair + e_D * domains + d_D)
        caps.append(cap_D)
        costs.append(np.zeros(len(e_D), dtype=np.int64))
    flow = SimpleMinCostFlow()
    arcs = flow.add_arcs_with_capacity_and_unit_cost(*map(np.concatenate, (tails, heads, caps, costs)))
    flow.set_nodes_supplies(np.arange(reach, reach + experts), reach_E)
    flow.set_nodes_supplies(np.arange(rest, rest + experts), rest_E)
    flow.set_node_supply(0, -int(reach_E.sum() + rest_E.sum()))
    if flow.solve() != flow.OPTIMAL:
        raise InfeasibleError(
            f"limits: layer {rules.number}: no GPU was found for every replica that must be "
            "(slots, pins, bans, failure domains)"
        )
    held_EG = pinned_EG.copy()
    used = np.asarray(flow.flows(arcs[: len(e_P)])) > 0
    held_EG[e_P[used], g_P[used]] = True
    return held_EG


def _check_fit(rules: Rules, room_G: IntArray) -> None:
    """Refuse pins that leave a GPU less room than none, and more replicas than may be."""
    if (room_G < 0).any():
        gpu = int(room_G.argmin())
        raise InfeasibleError(
            f"limits.pinned: layer {rules.number}, GPU {gpu} has {rules.capacity_G[gpu]} slots, "
            "more experts are pinned to it"
        )
    if rules.least_E.sum() > rules.total:
        raise InfeasibleError(
            f"limits: layer {rules.number}: its experts need {rules.least_E.sum()} replicas, "
            f"{rules.total} are allowed"
        )


def _doors(room_G: IntArray, arrived_G: IntArray) -> tuple[IntArray, IntArray]:
    """GPU and cost of each replica that may come: the dearer the more have come before it."""
    g_D = np.repeat(np.arange(len(room_G)), room_G)
    turn_D = np.arange(len(g_D)) - np.repeat(np.cumsum(room_G) - room_G, room_G)
    return g_D, arrived_G[g_D] + turn_D


def _wanted(rules: Rules) -> tuple[np.ndarray, np.ndarray]:
    """Domains that each expert's pins do not reach yet, and replicas that it needs beyond those, [E] each."""
    reach_E = np.maximum(rules.spread_E - rules.reach_E(rules.pinned_EG), 0)
    return reach_E, np.maximum(rules.least_E - rules.pinned_EG.sum(1) - reach_E, 0)


def mended_within(
    rules: Rules,
    load_E: FloatArray,
    content: Sequence[Sequence[int]],
    speed_G: FloatArray,
    arrived_G: IntArray | None = None,
) -> list[list[int]]:
    """Contents that obey the rules with as few new replicas as any; what else is there stays as it fits.

    Parameters
    ----------
    rules : Rules
        Of the layer.
    load_E : array of float, shape [E]
        Tokens: of what has to go, the replicas with the fewest go first.
    content : sequence of sequences of int
        Experts on each GPU.
    speed_G : array of float, shape [G]
        Relative speeds.
    arrived_G : array of int, shape [G], optional
        See `needed_EG`.

    Returns
    -------
    list of list of int
        What stays stands in its order, what is new behind it.

    Raises
    ------
    InfeasibleError
        If no placement obeys.
    """
    there_EG = np.zeros_like(rules.allowed_EG)
    for gpu, row in enumerate(content):
        there_EG[list(row), gpu] = True
    if rules.keeps(there_EG):
        return [list(row) for row in content]
    piece_E = load_E / np.maximum(there_EG.sum(1), 1)
    held_EG = needed_EG(rules, there_EG, piece_E @ there_EG / speed_G, arrived_G)
    count_E, used_G = held_EG.sum(1), held_EG.sum(0)
    left = rules.total - int(count_E.sum())
    rest = np.argwhere(there_EG & rules.allowed_EG & ~held_EG)
    for expert, gpu in rest[np.argsort(-piece_E[rest[:, 0]], kind="stable")].tolist():
        if left > 0 and count_E[expert] < rules.most_E[expert] and used_G[gpu] < rules.capacity_G[gpu]:
            held_EG[expert, gpu] = True
            count_E[expert] += 1
            used_G[gpu] += 1
            left -= 1
    rows = []
    for gpu, row in enumerate(content):
        stay = [expert for expert in row if held_EG[expert, gpu]]
        rows.append(stay + sorted(set(np.flatnonzero(held_EG[:, gpu]).tolist()).difference(stay)))
    return rows
