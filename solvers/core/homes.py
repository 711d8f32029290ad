"""Which node holds which expert so that most tokens stay: an assignment, solved as a minimum-cost flow."""

from __future__ import annotations

import numpy as np

from moeless_opt.problems.arrays import BoolArray, FloatArray, IntArray

__all__ = ["near_homes"]

_UNITS = 1 << 30  # whole numbers in which a flow weighs tokens


def near_homes(source_NE: FloatArray, room_N: IntArray) -> BoolArray:
    """Which node holds which expert, so that most tokens stay and every expert has a node, shape [N, E]."""
    from ortools.graph.python import min_cost_flow

    nodes, experts = source_NE.shape
    value_NE = np.rint(source_NE / (source_NE.max() or 1.0) * _UNITS).astype(np.int64)
    must = (experts + 1) * nodes * _UNITS
    # 0 is the source, then experts, nodes, the sink.
    expert_E, node_N, sink = 1 + np.arange(experts), 1 + experts + np.arange(nodes), 1 + experts + nodes
    pair_n, pair_e = (i.ravel() for i in np.indices((nodes, experts)))
    network = min_cost_flow.SimpleMinCostFlow()

    def arcs(tail: IntArray, head: IntArray, room: IntArray, cost: IntArray) -> IntArray:
        parts = np.broadcast_arrays(tail, head, room, cost)
        return np.asarray(network.add_arcs_with_capacity_and_unit_cost(*(np.array(p) for p in parts)))

    total = int(min(room_N.sum(), nodes * experts))
    one, zero = np.ones(1, dtype=np.int64), np.zeros(1, dtype=np.int64)
    arcs(zero, expert_E, one, -must * one)
    arcs(zero, expert_E, nodes * one, zero)
    chosen = arcs(expert_E[pair_e], node_N[pair_n], one, -value_NE.ravel())
    arcs(node_N, np.array([sink]), room_N, zero)
    arcs(zero, np.array([sink]), total * one, zero)
    network.set_nodes_supplies(np.array([0, sink]), np.array([total, -total]))
    status = network.solve()
    assert status == network.OPTIMAL, status
    return np.asarray(np.array(network.flows(chosen)).reshape(nodes, experts) > 0)
