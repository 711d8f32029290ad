"""From which rank to which slot the tokens go, once it is known how many each slot serves."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from moeless_opt.problems.arrays import BoolArray, IntArray
from moeless_opt.runtime.live import SlotTable
from moeless_opt.runtime.live.dispatch.shares import split_kernels

__all__ = ["source_aware"]


def source_aware(counts_RE: IntArray, quota_P: IntArray, table: SlotTable, node_R: Sequence[int]) -> IntArray:
    """Who sends how many tokens to which slot: own GPU first, own node second, then the others.

    Parameters
    ----------
    counts_RE : array of int64, shape [R, E]
        Tokens of each expert on each rank of the group.
    quota_P : array of int64, shape [P]
        Tokens that each flat slot serves.
    table : SlotTable
        The layer's slots.
    node_R : sequence of int
        Node of each rank.

    Returns
    -------
    array of int64, shape [R, P]
        Rows add up (by expert) to the counts, columns to the quotas.

    Notes
    -----
    For the given quotas this keeps the most tokens on their GPU, and of the rest the most in their node: the
    matching inside a group is min(supply, demand) per expert, which no other choice can exceed.
    """
    if (kernels := split_kernels()) is not None:
        found_RP: IntArray = kernels.route(
            np.require(counts_RE, np.int64, "W"),
            np.require(quota_P, np.int64, ("C", "W")),
            table.expert_P,
            table.rank_P,
            table.replicas_E,
            table.to_slots_P,
            np.array(node_R, dtype=np.int64),
        )
        return found_RP
    sends_RP = np.zeros((counts_RE.shape[0], quota_P.size), dtype=np.int64)
    supply_RE, demand_P = counts_RE.copy(), quota_P.copy()
    slots = np.arange(quota_P.size)
    # An expert with one replica leaves no choice.
    one_P = table.replicas_E[table.expert_P] == 1
    sends_RP[:, one_P] = counts_RE[:, table.expert_P[one_P]]
    demand_P[one_P] = 0
    own_P = np.minimum(supply_RE[table.rank_P, table.expert_P], demand_P)
    sends_RP[table.rank_P, slots] += own_P
    supply_RE[table.rank_P, table.expert_P] -= own_P
    demand_P -= own_P
    nodes = sorted(set(node_R))
    if len(nodes) > 1:
        node = np.asarray(node_R)
        for n in nodes:
            _match(sends_RP, supply_RE, demand_P, table, np.flatnonzero(node == n), node[table.rank_P] == n)
    _match(sends_RP, supply_RE, demand_P, table, np.arange(len(node_R)), np.ones(quota_P.size, dtype=bool))
    return sends_RP


def _match(
    sends_RP: IntArray,
    supply_RE: IntArray,
    demand_P: IntArray,
    table: SlotTable,
    ranks: NDArray[np.intp],
    inside_P: BoolArray,
) -> None:
    """Serve what can be served inside one group of ranks, in order of rank and slot (north-west corner)."""
    open_P = inside_P & (demand_P > 0)
    order = table.to_slots_P[open_P[table.to_slots_P]]
    if not order.size:
        return
    expert = table.expert_P[order]
    need = demand_P[order]
    # Demand and supply of an expert as intervals on one line; overlaps are what flows.
    total = np.cumsum(need)
    first = np.flatnonzero(np.r_[True, expert[1:] != expert[:-1]])
    base = np.repeat((total - need)[first], np.diff(np.r_[first, expert.size]))
    high_P = total - base
    have = supply_RE[ranks]
    high_RE = np.cumsum(have, axis=0)
    flow = np.minimum(high_RE[:, expert], high_P) - np.maximum((high_RE - have)[:, expert], high_P - need)
    np.maximum(flow, 0, out=flow)
    sends_RP[np.ix_(ranks, order)] += flow
    demand_P[order] -= flow.sum(axis=0)
    supply_RE[np.ix_(ranks, expert[first])] -= np.add.reduceat(flow, first, axis=1)
