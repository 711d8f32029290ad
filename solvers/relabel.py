"""Relabelling: give newly constructed GPU contents to the GPUs that already hold most of them.

A plan constructed from scratch doesn't care which GPU is called which. Among GPUs of equal speed and
slots, the assignment of contents to GPUs that keeps most replicas in place is a linear assignment; of
assignments that keep equally many, the one with most experts already on the *node* wins: those copies stay on
its fast links. Also here: seating a GPU's experts so that what stays doesn't change its slot.

References
----------
Kuhn (1955), "The Hungarian method for the assignment problem"; solved by ortools' cost-scaling push-relabel
(Goldberg and Kennedy 1995).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moeless_opt.problems.errors import ProblemError

__all__ = ["relabel", "seat", "seat_all"]

Slots = NDArray[np.int32]


def relabel(
    live_LGC: NDArray[Any],
    new_LGC: NDArray[Any],
    *,
    experts: int,
    speed_G: Any = None,
    capacity_LG: Any = None,
    node_G: Any = None,
) -> Slots:
    """Permute the GPUs of a new plan so that as few replicas as possible move.

    Parameters
    ----------
    live_LGC, new_LGC : int array [layers, GPUs, slots]
        Placements, -1 where empty.
    experts : int
        Number of experts.
    speed_G : float array [GPUs], optional
        Relative speeds; only GPUs of equal speed trade contents.
    capacity_LG : int array [layers, GPUs], optional
        Slots; only GPUs of equal slots trade contents.
    node_G : int array [GPUs], optional
        Node of each GPU: the second criterion.

    Returns
    -------
    int32 array [layers, GPUs, slots]
        The new placement with its GPUs permuted in each layer and every kept replica in its slot.

    Examples
    --------
    >>> import numpy as np
    >>> relabel(np.array([[[0, 1], [2, 3]]]), np.array([[[3, 2], [1, 0]]]), experts=4).tolist()
    [[[0, 1], [2, 3]]]
    """
    live, new = np.asarray(live_LGC), np.asarray(new_LGC)
    if live.shape != new.shape:
        raise ProblemError("new_LGC", f"has shape {new.shape}, would need the live placement's {live.shape}")
    L, G, C = live.shape
    live_LGE, new_LGE = _holds(live, experts), _holds(new, experts)
    # Kept replicas first; the node's overlap, at most C experts, decides among equals.
    value_LGG = np.einsum("lge,lhe->lgh", live_LGE, new_LGE, optimize=True) * (C + 1.0)
    if node_G is not None:
        node = np.asarray(node_G)
        near_NG = (node[None, :] == np.unique(node)[:, None]).astype(np.float32)
        onto_LNE = np.minimum(np.einsum("ng,lge->lne", near_NG, live_LGE, optimize=True), 1.0)
        near_LNG = np.einsum("lne,lhe->lnh", onto_LNE, new_LGE, optimize=True)
        value_LGG = value_LGG + near_LNG[:, np.searchsorted(np.unique(node), node)]
    speed = np.ones(G) if speed_G is None else np.asarray(speed_G, dtype=np.float64)
    capacity = np.full((L, G), C) if capacity_LG is None else np.asarray(capacity_LG)
    out = np.empty((L, G, C), dtype=np.int32)
    for layer in range(L):
        alike_GG = (speed[:, None] == speed) & (capacity[layer][:, None] == capacity[layer])
        takes = _assign(np.rint(value_LGG[layer]).astype(np.int64), alike_GG)
        for gpu in range(G):
            row = new[layer, takes[gpu]]
            out[layer, gpu] = seat(live[layer, gpu].tolist(), row[row >= 0].tolist())
    return out


def seat(live_C: Sequence[int], content: Sequence[int]) -> list[int]:
    """Slots of one GPU: kept experts where they were, new ones in the freed slots, empties last."""
    stays, wanted = set(content), set(live_C)
    arrivals = [expert for expert in content if expert not in wanted]
    slots: list[int] = []
    for expert in live_C:  # a duplicate, where one was mended, keeps its first slot
        slots.append(expert if expert in stays and expert not in slots else -1)
    for slot, expert in enumerate(slots):
        if expert < 0 and arrivals:
            slots[slot] = arrivals.pop(0)
    # An empty slot between full ones: the last full one moves up.
    while (full := max((slot for slot, expert in enumerate(slots) if expert >= 0), default=-1)) >= 0:
        hole = next((slot for slot in range(full) if slots[slot] < 0), -1)
        if hole < 0:
            break
        slots[hole], slots[full] = slots[full], -1
    return slots


def seat_all(live_GC: Sequence[list[int]], content: Sequence[Sequence[int]]) -> list[list[int]]:
    """Slots of every GPU of a layer; those whose experts stay the same stay as they are."""
    return [
        row if len(experts) == len(row) and set(experts) == set(row) else seat(row, experts)
        for row, experts in zip(live_GC, content, strict=True)
    ]


def _holds(slots_LGC: NDArray[Any], experts: int) -> NDArray[np.float32]:
    """Membership of each expert on each GPU, 0 or 1."""
    holds_LGE = np.zeros((*slots_LGC.shape[:2], experts), dtype=np.float32)
    layer, gpu, slot = np.nonzero(slots_LGC >= 0)
    holds_LGE[layer, gpu, slots_LGC[layer, gpu, slot]] = 1.0
    return holds_LGE


def _assign(value_GG: NDArray[np.int64], allowed_GG: NDArray[np.bool_]) -> list[int]:
    """For each GPU, the content it takes: the most valuable perfect matching over allowed pairs."""
    from ortools.graph.python.linear_sum_assignment import SimpleLinearSumAssignment

    left, right = np.nonzero(allowed_GG)
    solver = SimpleLinearSumAssignment()
    solver.add_arcs_with_cost(left, right, int(value_GG.max(initial=0)) - value_GG[left, right])
    if solver.solve() != solver.OPTIMAL:  # the identity is always allowed
        raise AssertionError("linear assignment over alike GPUs has no perfect matching")
    return [solver.right_mate(gpu) for gpu in range(len(value_GG))]
