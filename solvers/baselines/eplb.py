"""DeepSeek's expert-parallelism load balancer (EPLB), the baseline that every engine ships.

The method, in its two policies:

- *global*: give the spare slots one by one to the expert with the most load per replica, then pack the
  replicas, heaviest first, each to the least loaded GPU that still has a slot (LPT with a count cap);
- *hierarchical*: pack whole groups of experts to nodes the same way, then run the global policy inside each
  node on that node's experts alone, so that group-limited routing stays inside a node.

This is a baseline, so it keeps what the source does, shortcomings included: arithmetic in float32 (ties fall
as they do there), the same number of slots on every GPU, no look at GPU speeds, and no check that a GPU gets
two replicas of one expert. Such a GPU holds the weights once and a slot is wasted: `Rebalanced.slots_LGC` is
the raw answer, `merge_duplicates` the same plan with the wasted slots emptied. All layers advance together in
NumPy, one replica per step, instead of the source's Python loop per layer.

One thing is settled here that the source leaves to its library: replicas of equal load are packed in order.
The source's sort is not stable, so where it puts equal replicas varies with PyTorch and the processor; with
a stable sort its slots, ranks and counts are the ones here.

References
----------
DeepSeek-AI, "Expert Parallelism Load Balancer", https://github.com/deepseek-ai/EPLB (MIT licence);
the policies are described in the DeepSeek-V3 report, arXiv 2412.19437, section 3.4.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike

from moeless_opt.problems.arrays import BoolArray, FloatArray, IntArray, SingleArray, SlotArray
from moeless_opt.problems.errors import InfeasibleError, ProblemError

__all__ = ["EplbPolicy", "Rebalanced", "balanced_packing", "merge_duplicates", "rebalance", "replicate"]

EplbPolicy = Literal["auto", "global", "hierarchical"]

_LARGEST = 1e38  # the arithmetic is float32


@dataclass(frozen=True, kw_only=True, slots=True)
class Rebalanced:
    """What EPLB answers, slot by slot.

    Parameters
    ----------
    slots_LGC : array of int32, shape [L, G, C]
        Expert in each slot, never empty. One GPU may hold the same expert twice. Flattened to
        [layers, slots] it is the source's ``phy2log``.
    rank_LGC : array of int32, shape [L, G, C]
        Which of the expert's replicas that is (0 is the first), the source's replica rank.
    replicas_LE : array of int32, shape [L, E]
        Slots given to each expert, the source's ``logcnt``.
    policy : {"global", "hierarchical"}
        The policy that was run.
    """

    slots_LGC: SlotArray
    rank_LGC: SlotArray
    replicas_LE: SlotArray
    policy: Literal["global", "hierarchical"]

    @property
    def duplicates_L(self) -> IntArray:
        """Slots of each layer wasted on an expert that the GPU already holds."""
        by_id_LGC = np.sort(self.slots_LGC, axis=2)
        same_LGC: BoolArray = by_id_LGC[:, :, 1:] == by_id_LGC[:, :, :-1]
        count_L: IntArray = same_LGC.sum(axis=(1, 2), dtype=np.int64)
        return count_L

    def merged(self) -> tuple[SlotArray, FloatArray, IntArray]:
        """Return the same plan without duplicates: see `merge_duplicates`."""
        return merge_duplicates(self.slots_LGC, self.replicas_LE)


def rebalance(
    load_LE: ArrayLike,
    slots_total: int,
    groups: int,
    nodes: int,
    gpus: int,
    *,
    policy: EplbPolicy = "auto",
) -> Rebalanced:
    """Replicate and place the experts of all layers as EPLB does.

    Parameters
    ----------
    load_LE : float [layers, experts]
        Tokens routed to each expert.
    slots_total : int
        Slots of one layer over all GPUs; a multiple of `gpus`, at least the number of experts.
    groups : int
        Groups of consecutive experts that the hierarchical policy keeps on one node.
    nodes : int
        Nodes; the GPUs are numbered node by node.
    gpus : int
        GPUs over all nodes.
    policy : {"auto", "global", "hierarchical"}
        "auto" is the source's rule: hierarchical where `groups` is a multiple of `nodes`, else global.
        The answer says which one ran.

    Returns
    -------
    Rebalanced
        Slots, replica ranks, replica counts and the policy.

    Raises
    ------
    ProblemError
        Where a size does not divide as the method needs, or the loads are not a finite, non-negative
        [layers, experts] array.
    InfeasibleError
        Where there are fewer slots than experts.

    Examples
    --------
    >>> plan = rebalance([[90, 10, 10, 10]], slots_total=6, groups=1, nodes=1, gpus=2)
    >>> plan.replicas_LE.tolist(), plan.slots_LGC.tolist()
    ([[3, 1, 1, 1]], [[[0, 0, 3], [0, 1, 2]]])
    """
    weight_LE = _checked_loads(load_LE)
    layers, experts = weight_LE.shape
    _check_sizes(experts, slots_total, groups, nodes, gpus)
    _check_policy(policy)
    if policy == "global" or (policy == "auto" and groups % nodes != 0):
        groups, nodes, ran = 1, 1, "global"
    else:
        _must_divide("groups", groups, "nodes", nodes)
        _must_divide("experts", experts, "groups", groups)
        _must_divide("gpus", gpus, "nodes", nodes)
        ran = "hierarchical" if nodes > 1 or groups > 1 else "global"

    # Step 1: groups to nodes. `order_LE` lists the experts node by node; X runs over (layer, node).
    order_LE = _experts_by_node(weight_LE, groups, nodes)
    weight_XE = np.take_along_axis(weight_LE, order_LE, axis=1).reshape(layers * nodes, experts // nodes)
    # Step 2: replicas inside each node.
    expert_XS, rank_XS, count_XE = replicate(weight_XE, slots_total // nodes)
    # Step 3: replicas to the GPUs of the node.
    piece_XS = np.take_along_axis(weight_XE / count_XE.astype(np.float32), expert_XS, axis=1)
    pack_XS, place_XS = balanced_packing(piece_XS, gpus // nodes)
    slot_XS = pack_XS * (slots_total // gpus) + place_XS

    node_first_X = np.tile(np.arange(nodes) * (experts // nodes), layers)[:, None]
    expert_LS = np.take_along_axis(
        order_LE, (_scatter(expert_XS, slot_XS) + node_first_X).reshape(layers, slots_total), axis=1
    )
    count_LE = _scatter(count_XE.reshape(layers, experts), order_LE)
    shape = (layers, gpus, slots_total // gpus)
    return Rebalanced(
        slots_LGC=expert_LS.reshape(shape).astype(np.int32),
        rank_LGC=_scatter(rank_XS, slot_XS).reshape(shape).astype(np.int32),
        replicas_LE=count_LE.astype(np.int32),
        policy="hierarchical" if ran == "hierarchical" else "global",
    )


def _check_policy(policy: str) -> None:
    if policy not in ("auto", "global", "hierarchical"):
        raise ProblemError("policy", f"must be auto, global or hierarchical, got {policy!r}")


def _check_sizes(experts: int, slots_total: int, groups: int, nodes: int, gpus: int) -> None:
    for name, value in (("slots_total", slots_total), ("groups", groups), ("nodes", nodes), ("gpus", gpus)):
        if value < 1:
            raise ProblemError(name, f"must be at least 1, got {value}")
    if slots_total < experts:
        raise InfeasibleError(
            f"{experts} experts need at least {experts} slots per layer, there are {slots_total}: "
            f"{experts - slots_total} too few"
        )
    _must_divide("slots_total", slots_total, "gpus", gpus)


def replicate(load_XE: ArrayLike, slots: int) -> tuple[IntArray, IntArray, IntArray]:
    """Give every expert one slot and each further slot to the expert with the most load per replica.

    For a fixed number of slots this minimises the largest load per replica. Ties go to the lowest expert.

    Parameters
    ----------
    load_XE : float [rows, experts]
        Tokens of each expert; rows are independent.
    slots : int
        Slots of a row, at least the number of experts.

    Returns
    -------
    expert_XS : int64 [rows, slots]
        Expert of each replica: first the experts in order, then the spare slots in the order given.
    rank_XS : int64 [rows, slots]
        Rank of the replica among its expert's.
    count_XE : int64 [rows, experts]
        Replicas of each expert.
    """
    load_XE = np.asarray(load_XE, dtype=np.float32)
    rows, experts = load_XE.shape
    expert_XS = np.empty((rows, slots), dtype=np.int64)
    expert_XS[:, :experts] = np.arange(experts)
    rank_XS = np.zeros((rows, slots), dtype=np.int64)
    count_XE = np.ones((rows, experts), dtype=np.int64)
    piece_XE = load_XE.copy()
    row_X = np.arange(rows)
    for slot in range(experts, slots):
        top_X = piece_XE.argmax(axis=1)
        count_X = count_XE[row_X, top_X]
        expert_XS[:, slot] = top_X
        rank_XS[:, slot] = count_X
        count_XE[row_X, top_X] = count_X + 1
        piece_XE[row_X, top_X] = load_XE[row_X, top_X] / (count_X + 1).astype(np.float32)
    return expert_XS, rank_XS, count_XE


def balanced_packing(weight_XN: ArrayLike, packs: int) -> tuple[IntArray, IntArray]:
    """Pack items, heaviest first, each to the lightest pack that has room; all packs end equally full.

    Parameters
    ----------
    weight_XN : float [rows, items]
        Weight of each item; rows are independent. The number of items is a multiple of `packs`.
    packs : int
        Packs of a row.

    Returns
    -------
    pack_XN : int64 [rows, items]
        Pack of each item.
    place_XN : int64 [rows, items]
        Place of the item in its pack, in the order of arrival.

    Notes
    -----
    Like the source, one item per pack is not sorted at all: item i goes to pack i.
    """
    weight_XN = np.asarray(weight_XN, dtype=np.float32)
    rows, items = weight_XN.shape
    _must_divide("items", items, "packs", packs)
    room = items // packs
    if room == 1:
        return np.tile(np.arange(items, dtype=np.int64), (rows, 1)), np.zeros((rows, items), dtype=np.int64)

    order_XN = np.argsort(-weight_XN, axis=1, kind="stable")
    order_NX = np.ascontiguousarray(order_XN.T)
    sorted_NX = np.ascontiguousarray(np.take_along_axis(weight_XN, order_XN, axis=1).T)
    # Flat views: one fancy index per step is half the cost of a pair.
    weight_XP = np.zeros((rows, packs), dtype=np.float32)
    weight_flat, held_flat = weight_XP.reshape(-1), np.zeros(rows * packs, dtype=np.int64)
    first_X = np.arange(rows) * packs
    pack_NX = np.empty((items, rows), dtype=np.int64)
    place_NX = np.empty((items, rows), dtype=np.int64)
    for n in range(items):
        pick_X = weight_XP.argmin(axis=1)
        at_X = first_X + pick_X
        held_X = held_flat[at_X]
        pack_NX[n] = pick_X
        place_NX[n] = held_X
        held_flat[at_X] = held_X + 1
        weight_flat[at_X] += sorted_NX[n]
        weight_flat[at_X[held_X == room - 1]] = np.inf  # full: never the lightest again
    return _scatter(pack_NX.T, order_NX.T), _scatter(place_NX.T, order_NX.T)


def merge_duplicates(slots_LGC: ArrayLike, replicas_LE: ArrayLike) -> tuple[SlotArray, FloatArray, IntArray]:
    """Turn slots with duplicates into a placement that holds each expert at most once per GPU.

    The source routes an expert's tokens evenly over its *slots*. A GPU with k slots of an expert that has r
    therefore serves k/r of its tokens, and goes on doing so from the one copy that it needs.

    Parameters
    ----------
    slots_LGC : array of int, shape [L, G, C]
        Expert of each slot, -1 where empty.
    replicas_LE : array of int, shape [L, E]
        Slots of each expert over all GPUs, duplicates counted.

    Returns
    -------
    slots_LGC : array of int32, shape [L, G, C]
        The first slot of each expert on a GPU, in the order given, empty slots (-1) last.
    share_LGC : array of float, shape [L, G, C]
        Fraction of the expert's tokens that the slot serves; 0 where empty.
    wasted_L : array of int, shape [L]
        Slots that held a duplicate and are empty now.
    """
    slots_LGC = np.asarray(slots_LGC, dtype=np.int32)
    replicas_LE = np.asarray(replicas_LE, dtype=np.int64)
    layers, gpus, width = slots_LGC.shape
    held_LGC = slots_LGC >= 0
    same_LGCC = slots_LGC[:, :, :, None] == slots_LGC[:, :, None, :]
    earlier_CC = np.tri(width, k=-1, dtype=np.bool_)
    repeat_LGC = held_LGC & (same_LGCC & earlier_CC).any(axis=3)
    copies_LGC = same_LGCC.sum(axis=3)
    count_LGC = np.take_along_axis(
        replicas_LE, np.where(held_LGC, slots_LGC, 0).reshape(layers, gpus * width), axis=1
    ).reshape(slots_LGC.shape)
    keep_LGC = held_LGC & ~repeat_LGC
    share_LGC = np.where(keep_LGC, copies_LGC / np.maximum(count_LGC, 1), 0.0)
    clean_LGC = np.where(keep_LGC, slots_LGC, -1).astype(np.int32)
    empty_last_LGC = np.argsort(~keep_LGC, axis=2, kind="stable")
    return (
        np.take_along_axis(clean_LGC, empty_last_LGC, axis=2),
        np.take_along_axis(share_LGC, empty_last_LGC, axis=2),
        repeat_LGC.sum(axis=(1, 2), dtype=np.int64),
    )


def _experts_by_node(weight_LE: SingleArray, groups: int, nodes: int) -> IntArray:
    """List the experts node by node, whole groups at a time, groups balanced over the nodes."""
    layers, experts = weight_LE.shape
    size, per_node = experts // groups, groups // nodes
    group_LK = weight_LE.reshape(layers, groups, size).sum(axis=2)
    node_LK, place_LK = balanced_packing(group_LK, nodes)
    group_at_LK = _scatter(
        np.broadcast_to(np.arange(groups), (layers, groups)), node_LK * per_node + place_LK
    )
    order_LKS: IntArray = group_at_LK[:, :, None] * size + np.arange(size)
    return order_LKS.reshape(layers, experts)


def _scatter(value_XN: IntArray, to_XN: IntArray) -> IntArray:
    """Return the array whose entry ``to_XN[x, n]`` of row x is ``value_XN[x, n]`` (`to` a permutation)."""
    out_XN = np.empty_like(to_XN)
    np.put_along_axis(out_XN, to_XN, value_XN, axis=1)
    return out_XN


def _checked_loads(load_LE: Any) -> SingleArray:
    exact_LE = np.asarray(load_LE, dtype=np.float64)
    if exact_LE.ndim != 2 or exact_LE.size == 0:
        raise ProblemError(
            "loads", f"must be a non-empty [layers, experts] array, got shape {exact_LE.shape}"
        )
    if not (np.isfinite(exact_LE).all() and (exact_LE >= 0).all() and exact_LE.sum() < _LARGEST):
        raise ProblemError("loads", f"must be finite, not negative, and sum to less than {_LARGEST:g}")
    return exact_LE.astype(np.float32)


def _must_divide(name: str, value: int, by_name: str, by: int) -> None:
    if value % by != 0:
        raise ProblemError(name, f"EPLB needs a multiple of {by_name} ({by}), got {value}")
