"""One layer's re-plan on hundreds of GPUs: many changes for each cut, and everything as arrays.

The greedy of `fill` makes one change, solves the flow again and reads the cut again. With thousands
of GPUs and a few hundred experts the cut falls into many separate groups, and a change in one says little
about the others. So a round here reads one cut and takes, from the hottest group down, as many changes as
the groups need, each GPU and each yielding expert at most once; the next round repairs what did not come out
as hoped. Changes on free slots harm nobody and are not limited; with yielding experts a round takes few,
fewer after one that gained less than it should (one where nothing was gained), more after one that came out.
A GPU may take what it has room for and what its other replicas can pass on to their GPUs in turn: without the
latter, rounds end while dozens of small groups are still hot. What no such change can lower is left to
`fill`, which knows exchanges.

Axis letters besides the usual ones: P pairs (replicas), X replicated experts.

References
----------
As for `flow`: Goldberg (1984); Picard and Queyranne (1982).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from ortools.graph.python.max_flow import SimpleMaxFlow

from moeless_opt.problems.arrays import BoolArray, IntArray
from moeless_opt.solvers.core import NeverStop, Stop

__all__ = ["MANY_GPUS", "fill_wide"]


MANY_GPUS = 256
"""More GPUs than this are re-planned so."""

_SHARE = 64  # GPUs for each change, with an expert that yields, that a round may begin with
_FEWEST = 256  # GPUs for each change, below which a round that gains at all does not go
_ROUNDS = 400
_VAIN = 12  # single changes tried in vain, after which no more are


@dataclass(slots=True)
class _Flow:
    """The solved network of a placement.

    Pairs are in GPU order; `linked_P` marks those of experts with others, `flow_P` is what they serve.
    """

    overflow: int
    expert_P: IntArray
    gpu_P: IntArray
    slot_P: IntArray
    linked_P: BoolArray
    flow_P: IntArray
    count_E: IntArray
    fixed_G: IntArray
    free_G: IntArray
    hot_G: BoolArray
    cool_G: BoolArray


def fill_wide(
    load_E: Sequence[int],
    content: Sequence[Sequence[int]],
    capacity_G: Sequence[int],
    room_G: Sequence[int],
    *,
    stop: Stop | None = None,
) -> tuple[list[list[int]], int]:
    """Change a placement until no token overflows, or no change helps.

    Parameters
    ----------
    load_E : sequence of int
        Tokens of each expert, in `flow.UNIT`.
    content : sequence of sequences of int
        Experts on each GPU; every expert has a replica.
    capacity_G, room_G : sequences of int
        Slots of each GPU, and tokens that it may serve.
    stop : Stop, optional
        Asked before every round.

    Returns
    -------
    list of list of int, int
        Contents, and the overflow that is left.
    """
    load, room = np.asarray(load_E, dtype=np.int64), np.asarray(room_G, dtype=np.int64)
    capacity = np.asarray(capacity_G, dtype=np.int64)
    slots_GC: IntArray = np.full((len(content), int(capacity.max(initial=1))), -1, dtype=np.int64)
    for gpu, row in enumerate(content):
        slots_GC[gpu, : len(row)] = row
    flow = _solve(load, slots_GC, room)
    most = max(len(room) // _SHARE, 1)
    stop = stop or NeverStop()
    vain: set[tuple[int, int, int]] = set()  # changes that gained nothing since the last that did
    for _ in range(_ROUNDS):
        if flow.overflow <= 0 or stop():
            break
        changes, hoped = _choose(load, slots_GC, capacity, room, flow, most, vain)
        if not changes:
            break
        before = slots_GC.copy()
        for expert, gpu, slot in changes:
            slots_GC[gpu, slot] = expert
        after = _solve(load, slots_GC, room)
        gain = flow.overflow - after.overflow
        if 4 * gain < 3 * hoped:
            most = max(len(changes) // 2, len(room) // _FEWEST if gain > 0 else 1, 1)
            if gain <= 0:
                slots_GC = before
                if len(changes) == 1:
                    vain.update(changes)
                    if len(vain) > _VAIN:
                        break
                continue
        elif 8 * gain > 7 * hoped:
            most = min(most + 1 + most // 4, len(room))
        vain.clear()
        flow = after
    return [[int(expert) for expert in row if expert >= 0] for row in slots_GC], flow.overflow


def _solve(load_E: IntArray, slots_GC: IntArray, room_G: IntArray) -> _Flow:
    """Send every token to a GPU that holds its expert, as far as the rooms go."""
    gpus, experts = len(room_G), len(load_E)
    gpu_P, slot_P = np.nonzero(slots_GC >= 0)
    expert_P = slots_GC[gpu_P, slot_P]
    count_E = np.bincount(expert_P, minlength=experts)
    linked_P = count_E[expert_P] > 1
    alone = ~linked_P
    fixed_G: IntArray = np.zeros(gpus, dtype=np.int64)
    np.add.at(fixed_G, gpu_P[alone], load_E[expert_P[alone]])
    expert_X = np.flatnonzero(count_E > 1)
    first_gpu, first_expert = 2, 2 + gpus
    all_gpus = first_gpu + np.arange(gpus)
    net = SimpleMaxFlow()
    net.add_arcs_with_capacity(np.zeros(gpus, dtype=np.int64), all_gpus, fixed_G)
    out = net.add_arcs_with_capacity(all_gpus, np.ones(gpus, dtype=np.int64), room_G)
    net.add_arcs_with_capacity(np.zeros_like(expert_X), first_expert + expert_X, load_E[expert_X])
    tail, head = first_expert + expert_P[linked_P], first_gpu + gpu_P[linked_P]
    arcs = net.add_arcs_with_capacity(tail, head, load_E[expert_P[linked_P]])
    net.solve(0, 1)
    flow_P: IntArray = np.zeros(len(gpu_P), dtype=np.int64)
    flow_P[linked_P] = net.flows(arcs) if len(arcs) else 0

    def side(nodes: Any) -> BoolArray:
        marked = np.zeros(first_expert + experts, dtype=np.bool_)
        marked[np.asarray(nodes, dtype=np.int64)] = True
        return marked[first_gpu:first_expert]

    return _Flow(
        overflow=int(load_E.sum()) - int(net.optimal_flow()),
        expert_P=expert_P,
        gpu_P=gpu_P,
        slot_P=slot_P,
        linked_P=linked_P,
        flow_P=flow_P,
        count_E=count_E,
        fixed_G=fixed_G,
        free_G=room_G - np.asarray(net.flows(out), dtype=np.int64),
        hot_G=side(net.get_source_side_min_cut()),
        cool_G=side(net.get_sink_side_min_cut()),
    )


def _joined(expert_P: IntArray, gpu_P: IntArray, experts: int, gpus: int) -> IntArray:
    """Name of each GPU's group, its lowest GPU, where pairs join a GPU to an expert."""
    name_G = np.arange(gpus)
    while True:
        name_E = np.full(experts, gpus)
        np.minimum.at(name_E, expert_P, name_G[gpu_P])
        lower_G = name_G.copy()
        np.minimum.at(lower_G, gpu_P, name_E[expert_P])
        lower_G = lower_G[lower_G]  # jump along the chain
        if (lower_G == name_G).all():
            return name_G
        name_G = lower_G


def _choose(
    load_E: IntArray,
    slots_GC: IntArray,
    capacity_G: IntArray,
    room_G: IntArray,
    flow: _Flow,
    most: int,
    vain: set[tuple[int, int, int]],
) -> tuple[list[tuple[int, int, int]], int]:
    """Changes (expert, GPU, slot), at most so many with a yielding expert, and what they should gain."""
    gpus, experts = len(room_G), len(load_E)
    linked, hot_P, cool_P = flow.linked_P, flow.hot_G[flow.gpu_P], flow.cool_G[flow.gpu_P]
    outside_E = np.bincount(flow.expert_P[~hot_P], minlength=experts)
    captive_P = hot_P & (outside_E[flow.expert_P] == 0)
    tied_P = linked & captive_P
    group_G = _joined(flow.expert_P[tied_P], flow.gpu_P[tied_P], experts, gpus)
    excess_G: IntArray = np.zeros(gpus, dtype=np.int64)
    np.add.at(excess_G, group_G[flow.hot_G], (flow.fixed_G - room_G)[flow.hot_G])
    captive_E = np.unique(flow.expert_P[captive_P])
    home_E = np.zeros(experts, dtype=np.int64)
    home_E[flow.expert_P[::-1]] = flow.gpu_P[::-1]  # the lowest GPU
    shared = captive_E[flow.count_E[captive_E] > 1]
    np.add.at(excess_G, group_G[home_E[shared]], load_E[shared])
    # Room that each cool group has left.
    cool_linked = linked & cool_P
    pool_G = _joined(flow.expert_P[cool_linked], flow.gpu_P[cool_linked], experts, gpus)
    slack_G: IntArray = np.zeros(gpus, dtype=np.int64)
    np.add.at(slack_G, pool_G[flow.cool_G], flow.free_G[flow.cool_G])
    places = _places(slots_GC, capacity_G, flow, int(excess_G.max()))
    taken_G = [False] * gpus
    # The heaviest captives of the hottest group first.
    order = captive_E[np.lexsort((captive_E, -load_E[captive_E], -excess_G[group_G[home_E[captive_E]]]))]
    left, slack = excess_G.tolist(), slack_G.tolist()
    hoped = 0
    changes: list[tuple[int, int, int]] = []
    gone: set[int] = set()
    # Places are tried best first; what was taken, or is no use this round, leaves the list.
    for expert in order.tolist():
        group = int(group_G[home_E[expert]])
        if left[group] <= 0:
            continue
        holders = set(flow.gpu_P[flow.expert_P == expert].tolist())
        out = int(load_E[expert])
        best = 0
        passed: list[_Place] = []
        while places and left[group] > 0 and out > 0:
            place = places.pop()
            harm, after, gpu, slot, yields = place
            if taken_G[gpu] or yields in gone or (yields >= 0 and len(gone) >= most):
                continue
            if gpu in holders or yields == expert or (expert, gpu, slot) in vain:
                passed.append(place)
                continue
            pool = int(pool_G[gpu])
            gain = min(left[group], out, after - harm, slack[pool])
            if gain <= 0 or 2 * gain < best:
                passed.append(place)
                break
            best = max(best, gain)
            changes.append((expert, gpu, slot))
            taken_G[gpu] = True
            if yields >= 0:
                gone.add(yields)
            left[group] -= gain
            out -= gain
            slack[pool] -= gain
            hoped += gain
        places += reversed(passed)
        if not places:
            break
    return changes, hoped


_Place = tuple[int, int, int, int, int]
"""Harm, room then, GPU, slot, yielding expert (or -1)."""


def _places(slots_GC: IntArray, capacity_G: IntArray, flow: _Flow, most: int) -> list[_Place]:
    """Cool GPUs that can take a replica, best last."""
    used_G = (slots_GC >= 0).sum(1)
    open_G = np.flatnonzero(flow.cool_G & (used_G < capacity_G))
    first_open = (slots_GC[open_G] < 0).argmax(1)
    # What a yielding replica serves must fit on its expert's other GPUs.
    spare_E: IntArray = np.zeros(len(flow.count_E), dtype=np.int64)
    np.add.at(spare_E, flow.expert_P, flow.free_G[flow.gpu_P])
    spare_P = spare_E[flow.expert_P] - flow.free_G[flow.gpu_P]  # room on the other GPUs of the expert
    passed_P = np.where(flow.linked_P, np.minimum(flow.flow_P, spare_P), 0)
    reach_G = flow.free_G.copy()  # with what the GPU's replicas can pass on
    np.add.at(reach_G, flow.gpu_P, passed_P)
    give = np.flatnonzero(flow.linked_P & flow.cool_G[flow.gpu_P] & (used_G >= capacity_G)[flow.gpu_P])
    expert, gpu, tokens = flow.expert_P[give], flow.gpu_P[give], flow.flow_P[give]
    own = reach_G[gpu] - passed_P[give]  # what the yielding replica serves counts whole
    harm = np.maximum(tokens - spare_P[give], 0)
    rows = np.stack(
        [
            np.concatenate([np.zeros(len(open_G), dtype=np.int64), harm]),
            np.concatenate([flow.free_G[open_G], own + tokens]),
            np.concatenate([open_G, gpu]),
            np.concatenate([first_open, flow.slot_P[give]]),
            np.concatenate([np.full(len(open_G), -1), expert]),
        ]
    )
    worth = np.minimum(rows[1], most) - rows[0]
    order = np.lexsort((rows[4], rows[2], rows[0] - rows[1], -worth))
    order = order[worth[order] > 0][::-1]
    return [(a, b, c, d, e) for a, b, c, d, e in rows[:, order].T.tolist()]
