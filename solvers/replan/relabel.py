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

from moeless_opt.problems.arrays import BoolArray, IntArray, SlotArray
from moeless_opt.problems.errors import ProblemError
from moeless_opt.problems.spec import Problem, without_copies
from moeless_opt.solvers.core import keeps_limits, widened

__all__ = ["on_live_gpus", "relabel", "seat", "seat_all"]


MANY = 256
"""More GPUs than this are matched over those pairs alone that have an expert in common."""


def relabel(
    live_LGC: NDArray[Any],
    new_LGC: NDArray[Any],
    *,
    experts: int,
    speed_G: Any = None,
    capacity_LG: Any = None,
    node_G: Any = None,
) -> SlotArray:
    """Permute the GPUs of a new plan so that as few replicas as possible move.

    Parameters
    ----------
    live_LGC, new_LGC : array of int, shape [L, G, C]
        Placements, -1 where empty.
    experts : int
        Number of experts.
    speed_G : array of float, shape [G], optional
        Relative speeds; only GPUs of equal speed trade contents.
    capacity_LG : array of int, shape [L, G], optional
        SlotArray; only GPUs of equal slots trade contents.
    node_G : array of int, shape [G], optional
        Node of each GPU: the second criterion.

    Returns
    -------
    array of int32, shape [L, G, C]
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
    speed = np.ones(G) if speed_G is None else np.asarray(speed_G, dtype=np.float64)
    capacity = np.full((L, G), C) if capacity_LG is None else np.asarray(capacity_LG)
    if G > MANY:
        node = np.zeros(G, dtype=np.int64) if node_G is None else np.asarray(node_G)
        kinds = [np.unique(np.stack([speed, row]), axis=1, return_inverse=True)[1] for row in capacity]
        takes_LG = [
            _assign_sparse(old, fresh, kind.reshape(-1), node, experts)
            for old, fresh, kind in zip(live, new, kinds, strict=True)
        ]
        return _seated(live, new, takes_LG)
    live_LGE, new_LGE = _holds(live, experts), _holds(new, experts)
    # Kept replicas first; the node's overlap, at most C experts, decides among equals.
    value_LGG = np.einsum("lge,lhe->lgh", live_LGE, new_LGE, optimize=True) * (C + 1.0)
    if node_G is not None:
        node = np.asarray(node_G)
        near_NG = (node[None, :] == np.unique(node)[:, None]).astype(np.float32)
        onto_LNE = np.minimum(np.einsum("ng,lge->lne", near_NG, live_LGE, optimize=True), 1.0)
        near_LNG = np.einsum("lne,lhe->lnh", onto_LNE, new_LGE, optimize=True)
        value_LGG = value_LGG + near_LNG[:, np.searchsorted(np.unique(node), node)]
    takes_LG = []
    for layer in range(L):
        alike_GG = (speed[:, None] == speed) & (capacity[layer][:, None] == capacity[layer])
        takes_LG.append(_assign(np.rint(value_LGG[layer]).astype(np.int64), alike_GG))
    return _seated(live, new, takes_LG)


def on_live_gpus(problem: Problem, slots_LGC: SlotArray) -> SlotArray:
    """A new placement with each GPU's contents where most of them are live, in a table as wide.

    A layer in which that breaks a limit (pins and domains know GPUs by name) stays as it is. Where the layers
    share the GPUs' bytes, GPUs alike trade what they hold in all layers, then as many replicas of one layer.
    """
    assert problem.current is not None
    live_LGC = without_copies(problem.current.slots_LGC)
    wide = max(slots_LGC.shape[2], int((live_LGC >= 0).sum(2).max()))
    live_LGC, new_LGC, topology = widened(live_LGC, wide), widened(slots_LGC, wide), problem.topology
    shared = problem.sizing.policy == "memory"
    if shared:
        new_LGC = _relabelled_alike(live_LGC, new_LGC, problem)
    named_LGC = relabel(
        live_LGC,
        new_LGC,
        experts=problem.experts,
        speed_G=topology.speed_G,
        capacity_LG=(new_LGC >= 0).sum(2) if shared else problem.capacity_LG,
        node_G=topology.node_G,
    )
    astray_L = ~keeps_limits(problem, named_LGC, tied=False)
    named_LGC[astray_L] = new_LGC[astray_L]
    return widened(named_LGC, slots_LGC.shape[2])


def _relabelled_alike(live_LGC: SlotArray, new_LGC: SlotArray, problem: Problem) -> SlotArray:
    """As `relabel`, with the same permutation in every layer: all layers as one, of experts of their own."""
    layers, gpus, wide = new_LGC.shape
    first_L11 = (np.arange(layers) * problem.experts)[:, None, None]
    both = [
        np.where(one >= 0, one + first_L11, -1).transpose(1, 0, 2).reshape(1, gpus, layers * wide)
        for one in (live_LGC, new_LGC)
    ]
    topology = problem.topology
    memory_1G = None if topology.memory_G is None else topology.memory_G[None]
    (found_GP,) = relabel(
        *both,
        experts=layers * problem.experts,
        speed_G=topology.speed_G,
        capacity_LG=memory_1G,
        node_G=topology.node_G,
    )
    out_LGC = np.full_like(new_LGC, -1)
    for gpu, row in enumerate(found_GP):
        for layer in range(layers):
            mine = row[(row >= 0) & (row // problem.experts == layer)] - layer * problem.experts
            out_LGC[layer, gpu, : len(mine)] = mine
    return out_LGC


def _seated(live_LGC: NDArray[Any], new_LGC: NDArray[Any], takes_LG: list[list[int]]) -> SlotArray:
    """The new placement with its GPUs permuted, what is kept in its slot."""
    out = np.empty(live_LGC.shape, dtype=np.int32)
    for layer, (live, new, takes) in enumerate(zip(live_LGC, new_LGC, takes_LG, strict=True)):
        rows = new[takes].tolist()
        out[layer] = [
            seat(old, [expert for expert in row if expert >= 0])
            for old, row in zip(live.tolist(), rows, strict=True)
        ]
    return out


def seat(live_C: Sequence[int], content: Sequence[int]) -> list[int]:
    """SlotArray of one GPU: kept experts where they were, new ones in the freed slots, empties last."""
    arrivals = list(content)
    slots: list[int] = []
    for expert in live_C:
        if expert in arrivals:  # an expert may have several slots
            arrivals.remove(expert)
            slots.append(expert)
        else:
            slots.append(-1)
    for slot, expert in enumerate(slots):
        if expert < 0 and arrivals:
            slots[slot] = arrivals.pop(0)
    if -1 not in slots:
        return slots
    # An empty slot between full ones: the last full one moves up.
    while (full := max((slot for slot, expert in enumerate(slots) if expert >= 0), default=-1)) >= 0:
        hole = next((slot for slot in range(full) if slots[slot] < 0), -1)
        if hole < 0:
            break
        slots[hole], slots[full] = slots[full], -1
    return slots


def seat_all(live_GC: Sequence[list[int]], content: Sequence[Sequence[int]]) -> list[list[int]]:
    """SlotArray of every GPU of a layer; those whose experts stay the same stay as they are."""
    return [
        row if _stays(row, experts) else seat(row, experts)
        for row, experts in zip(live_GC, content, strict=True)
    ]


def _stays(live_C: list[int], content: Sequence[int]) -> bool:
    """Whether a GPU's experts are the same as before, its empty slots last."""
    count = len(content)
    if live_C[:count] == list(content):
        return count == len(live_C) or max(live_C[count:]) < 0
    return count == len(live_C) and sorted(content) == sorted(live_C)


def _holds(slots_LGC: NDArray[Any], experts: int) -> NDArray[np.float32]:
    """Membership of each expert on each GPU, 0 or 1."""
    holds_LGE = np.zeros((*slots_LGC.shape[:2], experts), dtype=np.float32)
    layer, gpu, slot = np.nonzero(slots_LGC >= 0)
    holds_LGE[layer, gpu, slots_LGC[layer, gpu, slot]] = 1.0
    return holds_LGE


def _assign(value_GG: IntArray, allowed_GG: BoolArray) -> list[int]:
    """For each GPU, the content it takes: the most valuable perfect matching over allowed pairs."""
    from ortools.graph.python.linear_sum_assignment import SimpleLinearSumAssignment

    left, right = np.nonzero(allowed_GG)
    solver = SimpleLinearSumAssignment()
    solver.add_arcs_with_cost(left, right, int(value_GG.max(initial=0)) - value_GG[left, right])
    if solver.solve() != solver.OPTIMAL:  # the identity is always allowed
        raise AssertionError("linear assignment over alike GPUs has no perfect matching")
    return [solver.right_mate(gpu) for gpu in range(len(value_GG))]


def _assign_sparse(
    live_GC: NDArray[Any],
    new_GC: NDArray[Any],
    kind_G: NDArray[Any],
    node_G: NDArray[Any],
    experts: int,
) -> list[int]:
    """For each GPU, the content it takes, over many GPUs.

    Most pairs of a GPU and a content have nothing in common. A matching of most value over those that do, any
    of them left alone, is a perfect matching of two copies of the graph, each vertex joined to its copy (at
    no value). What stays unmatched goes, kind by kind, to a GPU on a node that holds one of its experts, else
    to the first that is left.
    """
    from ortools.graph.python.linear_sum_assignment import SimpleLinearSumAssignment

    gpus, width = live_GC.shape
    left, right, kept = _overlaps(live_GC, new_GC, experts)
    alike = kind_G[left] == kind_G[right]
    left, right, kept = left[alike], right[alike], kept[alike]
    near = _node_overlap(live_GC, new_GC, node_G, experts)
    value = kept * (width + 1) + near[right, node_G[left]]
    most = int(value.max(initial=0))
    mate, own = gpus + np.arange(gpus), np.arange(gpus)
    solver = SimpleLinearSumAssignment()
    # Left: GPUs, then copies of the contents. Right: contents, then copies of the GPUs.
    solver.add_arcs_with_cost(left, right, 2 * (most - value))
    solver.add_arcs_with_cost(gpus + right, gpus + left, np.zeros(len(left), dtype=np.int64))
    solver.add_arcs_with_cost(own, mate, np.full(gpus, 2 * most))
    solver.add_arcs_with_cost(mate, own, np.zeros(gpus, dtype=np.int64))
    if solver.solve() != solver.OPTIMAL:  # everyone may stay alone
        raise AssertionError("the matching of contents to GPUs has no solution")
    takes = [solver.right_mate(gpu) for gpu in range(gpus)]
    takes = [content if content < gpus else -1 for content in takes]
    given = set(takes)
    idle: dict[tuple[int, int], list[int]] = {}  # GPUs without a content, by kind and node
    for gpu in range(gpus - 1, -1, -1):
        if takes[gpu] < 0:
            idle.setdefault((int(kind_G[gpu]), int(node_G[gpu])), []).append(gpu)
    later = []
    for content in (content for content in range(gpus) if content not in given):
        kind = int(kind_G[content])
        nodes = np.flatnonzero(near[content])
        nodes = nodes[np.argsort(-near[content, nodes], kind="stable")]
        free = next((idle[kind, node] for node in nodes.tolist() if idle.get((kind, node))), None)
        if free is None:
            later.append(content)
        else:
            takes[free.pop()] = content
    rest: dict[int, list[int]] = {}
    for gpu in range(gpus - 1, -1, -1):
        if takes[gpu] < 0:
            rest.setdefault(int(kind_G[gpu]), []).append(gpu)
    for content in later:
        takes[rest[int(kind_G[content])].pop()] = content
    return takes


def _overlaps(
    live_GC: NDArray[Any], new_GC: NDArray[Any], experts: int
) -> tuple[IntArray, IntArray, IntArray]:
    """Pairs of a GPU and a content with experts in common, and how many."""
    gpus = len(live_GC)
    gpu, slot = np.nonzero(live_GC >= 0)
    expert = live_GC[gpu, slot].astype(np.int64)
    content, at = np.nonzero(new_GC >= 0)
    wanted = new_GC[content, at].astype(np.int64)
    order = np.argsort(wanted, kind="stable")
    content, count_E = content[order], np.bincount(wanted, minlength=experts)
    first_E = np.cumsum(count_E) - count_E
    repeat = count_E[expert]
    left = np.repeat(gpu, repeat)
    within = np.arange(int(repeat.sum())) - np.repeat(np.cumsum(repeat) - repeat, repeat)
    right = content[np.repeat(first_E[expert], repeat) + within]
    key, kept = np.unique(left * gpus + right, return_counts=True)
    return key // gpus, key % gpus, kept


def _node_overlap(
    live_GC: NDArray[Any], new_GC: NDArray[Any], node_G: NDArray[Any], experts: int
) -> IntArray:
    """How many experts of each content a node holds, shape [contents, nodes]."""
    on_NE = np.zeros((int(node_G.max()) + 1, experts + 1), dtype=np.int64)
    on_NE[node_G[:, None], live_GC] = 1
    on_NE[:, experts] = 0  # empty slots
    return np.asarray(on_NE[:, new_GC].sum(axis=2).T)
