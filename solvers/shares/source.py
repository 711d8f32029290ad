"""Token shares when each token's source node is known: balance first, then tokens kept in their node.

The optimal time T of a layer depends only on the experts' total loads, so it comes from `shares`. Among
all splits within T (times one plus a slack) the one that keeps most tokens in their node is a
minimum-cost flow: the tokens of node n for expert e go to a GPU of n at cost 0, or through e's pool to any
GPU that holds e at cost 1. All layers go into one network (SimpleMinCostFlow of ortools, cost scaling).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moeless_opt.problems.arrays import FloatArray
from moeless_opt.problems.errors import ProblemError
from moeless_opt.problems.spec import equal_shares
from moeless_opt.solvers.shares.flow import solve_shares
from moeless_opt.solvers.shares.graph import ReplicaGraph

__all__ = ["SourceShares", "pooled_shares", "solve_source_shares"]


_UNITS = float(1 << 38)  # integer units per largest GPU load


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceShares:
    """Shares by source node.

    Attributes
    ----------
    share_LNGC : array of float, shape [L, N, G, C]
        Fraction of a node's tokens for the slot's expert that go to the slot; over an expert's slots they
        sum to 1.
    time_LG : array of float, shape [L, G]
        GPU times.
    bound_L : array of float, shape [L]
        Lower bound on the largest time.
    crossing_L : array of float, shape [L]
        Tokens that leave their node: the fewest possible within the time.
    """

    share_LNGC: FloatArray
    time_LG: FloatArray
    bound_L: FloatArray
    crossing_L: FloatArray


def solve_source_shares(
    load_LSE: FloatArray,
    slots_LGC: NDArray[Any],
    node_G: NDArray[Any],
    speed_G: FloatArray | None = None,
    *,
    node_S: NDArray[Any] | None = None,
    slack: float | FloatArray = 1e-9,
) -> SourceShares:
    """Least largest GPU time first, then fewest tokens that leave their node.

    Parameters
    ----------
    load_LSE : array of float, shape [L, sources, E]
        Tokens by source: a node, or a rank with `node_S`.
    slots_LGC : array of int, shape [L, G, C]
        Placement, -1 where empty.
    node_G : array of int, shape [G]
        Node of each GPU, 0..N-1.
    speed_G : array of float, shape [G], optional
        Relative speeds; ones by default.
    node_S : int array [sources], optional
        Node of each source; by default source n is node n.
    slack : float or float array [layers]
        How far above the least time a GPU may go for the sake of locality, relative.

    Returns
    -------
    SourceShares
        Ranks of one node share their node's row of `share_LNGC`.

    Raises
    ------
    ProblemError
        A source is on a node that has no GPU.
    """
    nodes = int(np.max(node_G)) + 1
    node_S = np.arange(load_LSE.shape[1]) if node_S is None else np.asarray(node_S)
    if node_S.max(initial=0) >= nodes or len(node_S) != load_LSE.shape[1]:
        raise ProblemError(
            "load_LSE", f"has {load_LSE.shape[1]} sources, would be one per node ({nodes}) or as node_S says"
        )
    load_LNE = np.zeros((load_LSE.shape[0], nodes, load_LSE.shape[2]))
    for source, node in enumerate(node_S.tolist()):
        load_LNE[:, node] += load_LSE[:, source]
    load_LE = load_LNE.sum(axis=1)
    speed = np.ones(slots_LGC.shape[1]) if speed_G is None else np.asarray(speed_G, dtype=np.float64)
    graph = ReplicaGraph(slots_LGC, speed, load_LE.shape[1])
    best = solve_shares(load_LE, graph)
    local_LXR, remote_LXR = _flow(graph, load_LNE, best.time_L * (1.0 + slack), np.asarray(node_G))
    share_LNGC = _spread(graph, load_LNE, local_LXR, remote_LXR, np.asarray(node_G))
    filled = slots_LGC >= 0
    expert_LGC = np.where(filled, slots_LGC, 0)
    token_LNGC = (
        np.take_along_axis(
            load_LNE,
            np.broadcast_to(
                expert_LGC.reshape(len(load_LE), 1, -1), (len(load_LE), nodes, expert_LGC[0].size)
            ),
            2,
        ).reshape(share_LNGC.shape)
        * share_LNGC
    )
    leaves_NG = np.arange(nodes)[:, None] != np.asarray(node_G)[None, :]
    return SourceShares(
        share_LNGC=share_LNGC,
        time_LG=token_LNGC.sum(axis=(1, 3)) / speed,
        bound_L=best.bound_L,
        crossing_L=(token_LNGC.sum(axis=3) * leaves_NG).sum(axis=(1, 2)),
    )


def pooled_shares(share_LNGC: FloatArray, load_LNE: FloatArray, slots_LGC: NDArray[Any]) -> FloatArray:
    """Shares of all of an expert's tokens from those by source node, shape [layers, GPUs, slots]."""
    load_LE = load_LNE.sum(axis=1)
    expert_LGC = np.maximum(slots_LGC, 0)
    row_L = np.arange(len(slots_LGC))[:, None, None]
    tokens_LGC = np.zeros(slots_LGC.shape)
    for node in range(load_LNE.shape[1]):
        tokens_LGC += share_LNGC[:, node] * load_LNE[row_L, node, expert_LGC]
    load_LGC = load_LE[row_L, expert_LGC]
    even = equal_shares(slots_LGC, load_LE.shape[1])  # for experts without tokens
    return np.asarray(np.where(load_LGC > 0, tokens_LGC / np.where(load_LGC > 0, load_LGC, 1.0), even))


def _flow(
    graph: ReplicaGraph, load_LNE: FloatArray, time_L: FloatArray, node_G: NDArray[Any]
) -> tuple[FloatArray, FloatArray]:
    """Tokens of each replica that come from its own node, and from the others."""
    from ortools.graph.python import min_cost_flow

    L, G, _ = graph.shape
    X, R = graph.gpu_LXR.shape[1:]
    N = load_LNE.shape[1]
    local, remote = np.zeros((L, X, R)), np.zeros((L, X, R))
    if X == 0:
        return local, remote
    padded = np.concatenate([load_LNE, np.zeros((L, N, 1))], axis=2)
    load_LNX = np.take_along_axis(padded, graph.expert_LX[:, None, :].repeat(N, axis=1), axis=2)
    _, base_LG = graph.loads(load_LNE.sum(axis=1))
    unit_L = np.where(time_L > 0.0, time_L, 1.0) / _UNITS
    supply_LNX = np.floor(load_LNX / unit_L[:, None, None]).astype(np.int64)
    room_LG = np.ceil((time_L[:, None] * graph.speed_G - base_LG) / unit_L[:, None]).astype(np.int64)
    room_LG = np.maximum(room_LG, 0) + N * X  # floors and ceilings never make it infeasible
    source_node = np.arange(L * N * X).reshape(L, N, X)
    pool_node = L * N * X + np.arange(L * X).reshape(L, X)
    gpu_node = L * (N + 1) * X + np.arange(L * G).reshape(L, G)
    sink = L * (N + 1) * X + L * G
    layer, x, r = np.nonzero(graph.gpu_LXR < G)
    gpu = graph.gpu_LXR[layer, x, r]
    own = node_G[gpu]
    pairs = len(layer)
    tail = [source_node[layer, own, x], pool_node[layer, x], source_node.reshape(-1), gpu_node.reshape(-1)]
    head = [
        gpu_node[layer, gpu],
        gpu_node[layer, gpu],
        np.broadcast_to(pool_node[:, None, :], (L, N, X)).reshape(-1),
        np.full(L * G, sink),
    ]
    capacity = [
        supply_LNX[layer, own, x],
        supply_LNX.sum(axis=1)[layer, x],
        supply_LNX.reshape(-1),
        room_LG.reshape(-1),
    ]
    cost = [
        np.zeros(2 * pairs, dtype=np.int64),
        np.ones(L * N * X, dtype=np.int64),
        np.zeros(L * G, dtype=np.int64),
    ]
    network = min_cost_flow.SimpleMinCostFlow()
    arcs = network.add_arcs_with_capacity_and_unit_cost(
        np.concatenate(tail), np.concatenate(head), np.concatenate(capacity), np.concatenate(cost)
    )
    network.set_nodes_supplies(source_node.reshape(-1), supply_LNX.reshape(-1))
    network.set_nodes_supplies(np.array([sink]), np.array([-int(supply_LNX.sum())]))
    if network.solve() != network.OPTIMAL:
        raise ProblemError("load_LSE", "is out of range for the flow, would be finite numbers below 1e300")
    flow = np.asarray(network.flows(arcs))
    local[layer, x, r] = flow[:pairs] * unit_L[layer]
    remote[layer, x, r] = flow[pairs : 2 * pairs] * unit_L[layer]
    return local, remote


def _spread(
    graph: ReplicaGraph,
    load_LNE: FloatArray,
    local_LXR: FloatArray,
    remote_LXR: FloatArray,
    node_G: NDArray[Any],
) -> FloatArray:
    """Shares per source node: own replicas as the flow says, the rest in proportion to the pooled tokens."""
    L, G, C = graph.shape
    N = load_LNE.shape[1]
    share = np.zeros((L, N, G * C + 1))
    layer_s, slot_s = graph.single // (G * C), graph.single % (G * C)
    share[layer_s, :, slot_s] = 1.0
    X = graph.width
    if X:
        padded = np.concatenate([load_LNE, np.zeros((L, N, 1))], axis=2)
        live_LXR = graph.gpu_LXR < G
        own_LXR = np.where(live_LXR, np.append(node_G, -1)[graph.gpu_LXR], -1)
        pool_LX = remote_LXR.sum(axis=2)
        even_LXR = live_LXR / np.maximum(live_LXR.sum(axis=2, keepdims=True), 1)
        spread_LXR = np.where(
            pool_LX[..., None] > 0.0, remote_LXR / np.where(pool_LX > 0.0, pool_LX, 1.0)[..., None], even_LXR
        )
        column = np.where(live_LXR, graph.slot_LXR - np.arange(L)[:, None, None] * (G * C), G * C)
        rows = np.arange(L)[:, None, None]
        for node in range(N):
            load_LX = np.take_along_axis(padded[:, node], graph.expert_LX, axis=1)[..., None]
            kept_LXR = np.where(own_LXR == node, local_LXR, 0.0)
            part = np.where(load_LX > 0.0, kept_LXR / np.where(load_LX > 0.0, load_LX, 1.0), 0.0)
            rest = np.maximum(1.0 - part.sum(axis=2, keepdims=True), 0.0)
            total = part + rest * spread_LXR
            share[rows, node, column] = (
                total / np.where(live_LXR.any(axis=2), total.sum(axis=2), 1.0)[..., None]
            )
    return share[:, :, :-1].reshape(L, N, G, C)
