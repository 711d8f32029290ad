"""Whole entries for every replica, so that the largest GPU time is least: the search of `entries`.

The replicas of replicated experts are the edges of a graph whose nodes are GPUs and experts. On a tree of
it, whether a time can be kept is asked exactly, from the leaves to the root: a GPU takes of the expert above
it as many entries as its time leaves room for, and an expert passes on what the GPUs below it cannot take.
Nothing is lost by it, for a GPU that takes more leaves less to all others. Bisection over the time then gives
the best counts on the tree. A component with cycles is solved on spanning trees in turn, its other edges as
they are or a few entries up and down, as long as that lowers the layer's largest time.

All tables are flat, so that the same lines run on lists, interpreted, and on arrays, compiled. Axes: P
replicas (edges), X experts, C cells (GPUs of all layers), Q edges by cell, N nodes (cells, then experts), L
layers, K components of a layer.
"""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import Any, NamedTuple

from moeless_opt.solvers.twins import source_name

__all__ = ["EntryGraph", "lower_peaks"]

_NEAR = 1e-7  # relative difference of two times that are the same
_TINY = 1e-12
_UNIT_TINY = 1e-9  # of an entry: room that lacks so little is room enough
_STEPS = 48  # of a bisection
_IDLE = 6  # spanning trees tried in vain
_REACH = 3  # entries up and down that an edge outside the tree is tried at


@functools.cache
def compiled_name() -> str:
    """What the compiled form of these very sources is called in Numba's cache."""
    return source_name("lower_peaks", Path(__file__), Path(__file__).with_name("_entry_kernels.py"))


class EntryGraph(NamedTuple):
    """Replicas whose entries are to be counted, layer by layer; `count_P` is changed in place.

    Attributes
    ----------
    entries : int
        Entries of every expert.
    gpus : int
        Cells of a layer.
    cell_P, expert_P : sequence of int
        Ends of each edge; those of an expert stand together.
    first_X, first_C : sequence of int
        Where the edges of an expert, and of a cell in `edge_Q`, begin; one more for the end.
    edge_Q : sequence of int
        Edges by cell.
    unit_X : sequence of float
        Tokens of one entry.
    exact_P : sequence of float
        Entries wanted, not whole.
    base_C, speed_C : sequence of float
        Tokens that a cell serves besides, and its speed.
    floor_L : sequence of float
        Largest time of each layer without these edges.
    count_P : sequence of int
        Entries; those of an expert sum to `entries`, before and after.
    order_N, up_N, seen_N, tree_P, most_P, rest_X, free_X, root_K, cycles_K, turns_K, peak_K : sequences
        Room to work in; `seen_N` and `tree_P` are zero at first.
    """

    entries: Any
    gpus: Any
    cell_P: Any
    expert_P: Any
    first_X: Any
    first_C: Any
    edge_Q: Any
    unit_X: Any
    exact_P: Any
    base_C: Any
    speed_C: Any
    floor_L: Any
    count_P: Any
    order_N: Any
    up_N: Any
    seen_N: Any
    tree_P: Any
    most_P: Any
    rest_X: Any
    free_X: Any
    root_K: Any
    cycles_K: Any
    turns_K: Any
    peak_K: Any


def lower_peaks(graph: EntryGraph) -> None:
    """Change the counts so that the largest time of each layer is least, and no further than that asks."""
    stamp = 0
    for layer in range(len(graph.floor_L)):
        stamp = lower_peak(graph, layer, stamp)


def lower_peak(graph: EntryGraph, layer: int, stamp: int) -> int:
    """A layer: its worst component on a tree, one after the other, and on more trees where one has cycles."""
    before, parts = stamp, 0
    for cell in range(layer * graph.gpus, (layer + 1) * graph.gpus):
        if graph.first_C[cell] == graph.first_C[cell + 1] or graph.seen_N[cell] > before:
            continue
        stamp += 1
        end = grow(graph, cell, 0, stamp)
        graph.root_K[parts] = cell
        graph.cycles_K[parts] = cycles(graph, end)
        graph.turns_K[parts] = 0
        graph.peak_K[parts] = peak(graph, end)
        parts += 1
    if parts == 0:
        return stamp
    floor, idle = graph.floor_L[layer], 0
    while True:
        k = worst(graph, parts)
        turn, was = graph.turns_K[k], graph.peak_K[k]
        if was <= floor * (1.0 + _NEAR) or (turn > 0 and (graph.cycles_K[k] == 0 or idle >= _IDLE)):
            break
        stamp += 1
        end = grow(graph, graph.root_K[k], turn, stamp)
        if was <= evenly(graph, end) * (1.0 + _NEAR):
            break
        graph.turns_K[k] = turn + 1
        graph.peak_K[k] = settle(graph, end, stamp, was)
        if turn > 0:
            graph.peak_K[k] = vary(graph, end, stamp, graph.peak_K[k])
        idle = 0 if turn == 0 or graph.peak_K[k] < was * (1.0 - _NEAR) else idle + 1
    allowed = max(floor, graph.peak_K[worst(graph, parts)])
    for k in range(parts):
        if graph.turns_K[k] > 0 and graph.peak_K[k] < allowed:
            stamp += 1
            end = grow(graph, graph.root_K[k], 0, stamp)
            if fits(graph, end, stamp, allowed):
                lay(graph, end, stamp, allowed)
    return stamp


def worst(graph: EntryGraph, parts: int) -> int:
    """The component with the largest time, the first such."""
    k = 0
    for other in range(1, parts):
        if graph.peak_K[other] > graph.peak_K[k]:
            k = other
    return k


def grow(graph: EntryGraph, root: int, turn: int, stamp: int) -> int:
    """A spanning tree of the root's component, breadth first; returns how many nodes it has."""
    cells = len(graph.base_C)
    graph.order_N[0], graph.up_N[root], graph.seen_N[root] = root, -1, stamp
    at, end = 0, 1
    while at < end:
        node = graph.order_N[at]
        at += 1
        if node < cells:
            first = graph.first_C[node]
            width = graph.first_C[node + 1] - first
        else:
            first = graph.first_X[node - cells]
            width = graph.first_X[node - cells + 1] - first
        for j in range(width):
            at_edge = first + (j + turn) % width
            edge = graph.edge_Q[at_edge] if node < cells else at_edge
            other = cells + graph.expert_P[edge] if node < cells else graph.cell_P[edge]
            if graph.seen_N[other] != stamp:
                graph.seen_N[other], graph.up_N[other], graph.tree_P[edge] = stamp, edge, stamp
                graph.order_N[end] = other
                end += 1
    return end


def cycles(graph: EntryGraph, end: int) -> int:
    """Edges of a component that its tree has not."""
    cells, edges = len(graph.base_C), 0
    for at in range(end):
        node = graph.order_N[at]
        if node < cells:
            edges += graph.first_C[node + 1] - graph.first_C[node]
    return edges - (end - 1)


def evenly(graph: EntryGraph, end: int) -> float:
    """Time of a perfect balance of a component: none can be quicker."""
    cells, tokens, speed = len(graph.base_C), 0.0, 0.0
    for at in range(end):
        node = graph.order_N[at]
        if node < cells:
            tokens += graph.base_C[node]
            speed += graph.speed_C[node]
        else:
            tokens += graph.unit_X[node - cells] * graph.entries
    return tokens / speed


def peak(graph: EntryGraph, end: int) -> float:
    """Largest time of a component."""
    cells, most = len(graph.base_C), 0.0
    for at in range(end):
        node = graph.order_N[at]
        if node < cells:
            tokens = graph.base_C[node]
            for q in range(graph.first_C[node], graph.first_C[node + 1]):
                edge = graph.edge_Q[q]
                tokens += graph.count_P[edge] * graph.unit_X[graph.expert_P[edge]]
            most = max(most, tokens / graph.speed_C[node])
    return most


def whole(room: float, unit: float, most: int) -> int:
    """How many entries, `most` at most, have room."""
    if room >= unit * most:
        return most
    return max(math.floor(room / unit + _UNIT_TINY), 0)


def fits(graph: EntryGraph, end: int, stamp: int, time: float) -> bool:
    """Whether the tree's counts can keep a time, other edges as they are; notes what each can take."""
    cells = len(graph.base_C)
    for at in range(end - 1, -1, -1):
        node = graph.order_N[at]
        up = graph.up_N[node]
        if node >= cells:
            x = node - cells
            free, taken = graph.entries, 0
            for edge in range(graph.first_X[x], graph.first_X[x + 1]):
                if graph.tree_P[edge] != stamp:
                    free -= graph.count_P[edge]
                elif edge != up:
                    taken += graph.most_P[edge]
            if free < 0:
                return False
            graph.free_X[x] = free
            graph.rest_X[x] = max(free - taken, 0)
            continue
        room = time * graph.speed_C[node] - graph.base_C[node]
        for q in range(graph.first_C[node], graph.first_C[node + 1]):
            edge = graph.edge_Q[q]
            x = graph.expert_P[edge]
            if graph.tree_P[edge] != stamp:
                room -= graph.count_P[edge] * graph.unit_X[x]
            elif edge != up:
                room -= graph.rest_X[x] * graph.unit_X[x]
        if room < -_TINY * time * graph.speed_C[node]:
            return False
        if up >= 0:
            graph.most_P[up] = whole(room, graph.unit_X[graph.expert_P[up]], graph.entries)
    return True


def lay(graph: EntryGraph, end: int, stamp: int, time: float) -> None:
    """Counts on the tree that keep a time which `fits`, near the wanted ones, from the root down."""
    cells = len(graph.base_C)
    for at in range(end):
        node = graph.order_N[at]
        up = graph.up_N[node]
        if node >= cells:
            hand_out(graph, node - cells, up, stamp)
            continue
        room = time * graph.speed_C[node] - graph.base_C[node]
        for q in range(graph.first_C[node], graph.first_C[node + 1]):
            edge = graph.edge_Q[q]
            x = graph.expert_P[edge]
            down = graph.tree_P[edge] == stamp and edge != up
            room -= (graph.rest_X[x] if down else graph.count_P[edge]) * graph.unit_X[x]
        for q in range(graph.first_C[node], graph.first_C[node + 1]):
            edge = graph.edge_Q[q]
            if graph.tree_P[edge] != stamp or edge == up:
                continue
            x = graph.expert_P[edge]
            wanted = min(math.floor(graph.exact_P[edge] + 0.5), graph.free_X[x])
            more = whole(room, graph.unit_X[x], max(wanted - graph.rest_X[x], 0))
            graph.count_P[edge] = graph.rest_X[x] + more
            room -= more * graph.unit_X[x]


def hand_out(graph: EntryGraph, x: int, up: int, stamp: int) -> None:
    """Give an expert's entries that the cell above does not take to those below, near the wanted ones."""
    left = graph.free_X[x] - graph.count_P[up]
    below = 0
    for edge in range(graph.first_X[x], graph.first_X[x + 1]):
        if graph.tree_P[edge] == stamp and edge != up:
            wanted = max(math.floor(graph.exact_P[edge] + 0.5), 0)
            graph.count_P[edge] = min(wanted, graph.most_P[edge])
            left -= graph.count_P[edge]
            below += 1
    while left != 0:
        best, gain, room = -1, 0.0, 0
        for edge in range(graph.first_X[x], graph.first_X[x + 1]):
            if graph.tree_P[edge] != stamp or edge == up:
                continue
            off = graph.exact_P[edge] - graph.count_P[edge]
            own = off if left > 0 else -off
            may = graph.most_P[edge] - graph.count_P[edge] if left > 0 else graph.count_P[edge]
            if may > 0 and (best < 0 or own > gain):
                best, gain, room = edge, own, may
        if best < 0:  # only where rounding deceived `fits`
            graph.count_P[up] += left
            return
        step = max(min(room, abs(left) // below), 1)
        graph.count_P[best] += step if left > 0 else -step
        left -= step if left > 0 else -step


def settle(graph: EntryGraph, end: int, stamp: int, high: float) -> float:
    """The best counts on a tree, those of a largest time `high` being known; returns the largest time."""
    if not fits(graph, end, stamp, high * (1.0 - _NEAR)):
        return high
    low, known = evenly(graph, end), high
    for _ in range(_STEPS):
        if high - low <= _NEAR * high:
            break
        middle = 0.5 * (low + high)
        if fits(graph, end, stamp, middle):
            high = middle
        else:
            low = middle
    if high < known and fits(graph, end, stamp, high):
        lay(graph, end, stamp, high)
        return peak(graph, end)
    return known


def vary(graph: EntryGraph, end: int, stamp: int, top: float) -> float:
    """The edges outside a tree a few entries up and down, as long as that lowers the largest time."""
    cells = len(graph.base_C)
    for at in range(end):
        node = graph.order_N[at]
        if node >= cells:
            continue
        for q in range(graph.first_C[node], graph.first_C[node + 1]):
            edge = graph.edge_Q[q]
            if graph.tree_P[edge] == stamp:
                continue
            for step in range(1, 2 * _REACH + 1):
                count = graph.count_P[edge]
                more = (step + 1) // 2 if step % 2 else -(step // 2)
                if not 0 <= count + more <= graph.entries:
                    continue
                graph.count_P[edge] = count + more
                if fits(graph, end, stamp, top * (1.0 - _NEAR)):
                    top = settle(graph, end, stamp, top * (1.0 - 0.5 * _NEAR))
                else:
                    graph.count_P[edge] = count
    return top
