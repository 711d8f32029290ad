"""Shares as whole tokens: every token is kept, and each replica serves its part rounded down or up.

Every slot gets the floor of its part; the tokens left over, fewer than the expert has replicas, go to the
slots that lost most by it (largest remainders). Where that would let a GPU exceed the exact shares' largest
time by a token or more, a maximum flow hands them out instead.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from moeless_opt.problems.arrays import FloatArray, IntArray
from moeless_opt.problems.errors import ProblemError

__all__ = ["round_shares", "round_tokens"]


def round_tokens(exact_P: FloatArray, expert_P: IntArray, count_E: IntArray) -> IntArray:
    """Whole tokens of each replica, largest remainders first.

    Parameters
    ----------
    exact_P : float array [replicas]
        Tokens of each replica before rounding; those of an expert sum to its count.
    expert_P : int array [replicas]
        Whose replica it is; they may come in any order.
    count_E : array of int, shape [E]
        Tokens, whole.

    Returns
    -------
    int64 array [replicas]
        Over an expert's replicas they sum to its count.
    """
    token_P, left_E = _floors(exact_P, expert_P, count_E)
    order = np.lexsort((np.arange(exact_P.size), token_P - exact_P, expert_P))
    replicas_E = np.bincount(expert_P, minlength=len(count_E))
    start_E = np.cumsum(replicas_E) - replicas_E
    expert = expert_P[order]
    rank = np.arange(order.size) - start_E[expert]
    # Shares that sum to less than 1 leave more tokens than replicas: some for each.
    each_E, more_E = np.divmod(left_E, np.maximum(replicas_E, 1))
    token_P[order] += each_E[expert] + (rank < more_E[expert])
    return token_P


def _floors(exact_P: FloatArray, expert_P: IntArray, count_E: IntArray) -> tuple[IntArray, IntArray]:
    """Whole tokens that each replica is sure of, and what is then left of each expert's."""
    token_P = np.floor(exact_P + 1e-9 * (1.0 + exact_P)).astype(np.int64)
    given_E = np.bincount(expert_P, weights=token_P, minlength=len(count_E))
    left_E = count_E - given_E.astype(np.int64)
    for expert in np.flatnonzero(left_E < 0).tolist():  # shares that sum to a hair above 1
        own = np.flatnonzero(expert_P == expert)
        token_P[own[token_P[own].argmax()]] += left_E[expert]
        left_E[expert] = 0
    return token_P, left_E


def round_shares(
    count_LE: NDArray[Any], slots_LGC: NDArray[Any], share_LGC: FloatArray, speed_G: FloatArray | None = None
) -> IntArray:
    """Whole tokens per slot: every token is kept, and no GPU exceeds its cap by the rounding.

    The cap of a GPU is the largest time's worth of tokens, rounded up. A rounding of each part down or up
    within all caps exists (flows are integral), so the largest load grows by less than one token.

    Parameters
    ----------
    count_LE : array of int, shape [L, E]
        Tokens, whole.
    slots_LGC : array of int, shape [L, G, C]
        Placement, -1 where empty.
    share_LGC : array of float, shape [L, G, C]
        Shares to round; an expert's sum to 1.
    speed_G : array of float, shape [G], optional
        Relative speeds; ones by default.

    Returns
    -------
    int64 array [layers, GPUs, slots]
        Tokens of each slot. Over an expert's slots they sum to its count.

    Raises
    ------
    ProblemError
        An expert with tokens has no slot.
    """
    count_LE = np.asarray(count_LE, dtype=np.int64)
    L, G, _ = slots_LGC.shape
    E = count_LE.shape[1]
    speed_G = np.ones(G) if speed_G is None else np.asarray(speed_G, dtype=np.float64)
    layer_P, gpu_P, slot_P = np.nonzero(slots_LGC >= 0)
    key_P = layer_P * E + slots_LGC[layer_P, gpu_P, slot_P]
    exact_P = count_LE.reshape(-1)[key_P] * share_LGC[layer_P, gpu_P, slot_P]
    token_P = round_tokens(exact_P, key_P, count_LE.reshape(-1))
    if int(token_P.sum()) != int(count_LE.sum()):
        raise ProblemError("slots_LGC", "holds no replica of an expert that has tokens, would need one")
    cell_P = layer_P * G + gpu_P
    exact_LG = np.bincount(cell_P, weights=exact_P, minlength=L * G).reshape(L, G)
    top_L1 = (exact_LG / speed_G).max(axis=1, keepdims=True)
    cap_LG = np.ceil(top_L1 * speed_G * (1.0 - 1e-9)).astype(np.int64)
    over_L = (np.bincount(cell_P, weights=token_P, minlength=L * G).reshape(L, G) > cap_LG).any(axis=1)
    again = np.flatnonzero(over_L[layer_P])
    if len(again):
        token_P[again] = _within_caps(
            exact_P[again], key_P[again], cell_P[again], count_LE.reshape(-1), cap_LG.reshape(-1)
        )
    token_LGC = np.zeros(slots_LGC.shape, dtype=np.int64)
    token_LGC[layer_P, gpu_P, slot_P] = token_P
    return token_LGC


def _within_caps(
    exact_P: FloatArray, key_P: IntArray, cell_P: IntArray, count_X: IntArray, cap_Y: IntArray
) -> IntArray:
    """Floors, and what they leave by a flow in which no GPU takes more than its cap.

    `key_P` and `cell_P` are the expert and the GPU of each replica, numbered through all layers: axes X, Y.
    """
    from ortools.graph.python import max_flow

    token_P, left_X = _floors(exact_P, key_P, count_X)
    # The replica that lost most by its floor comes first.
    order = np.argsort(token_P - exact_P, kind="stable")
    order = order[left_X[key_P[order]] > 0]
    # Nodes: source, sink, experts with tokens left, GPUs.
    key, node = np.unique(key_P[order], return_inverse=True)
    cell, gpu_node = np.unique(cell_P[order], return_inverse=True)
    room = cap_Y[cell] - np.bincount(cell_P, weights=token_P, minlength=len(cap_Y)).astype(np.int64)[cell]
    experts = 2 + np.arange(len(key))
    gpus = 2 + len(key) + np.arange(len(cell))
    # More than one each only where shares sum to less than 1.
    for extra in range(int(left_X[key].max(initial=0)) + 2):
        network = max_flow.SimpleMaxFlow()
        arcs = network.add_arcs_with_capacity(
            np.concatenate([np.zeros_like(experts), experts[node], gpus]),
            np.concatenate([experts, gpus[gpu_node], np.ones_like(gpus)]),
            np.concatenate([left_X[key], np.full(len(order), 1 + extra), np.maximum(room + extra, 0)]),
        )
        network.solve(0, 1)
        if network.optimal_flow() == int(left_X[key].sum()):
            token_P[order] += np.asarray(network.flows(arcs))[len(key) : len(key) + len(order)]
            return token_P
    raise AssertionError("rounding found no place for a token, though its expert has replicas")
