"""Place replicas so that replicated experts join the GPUs: steps 2 and 3 of `fractional`.

Tokens can move between two GPUs that hold replicas of a common expert. A replica is placed on the least
loaded GPU among those in components that its expert does not reach yet, so that no link is spent twice; the
experts with one replica then fill up the emptiest GPUs.
"""

from __future__ import annotations

from heapq import heapify, heappop, heappush
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moeless_opt.problems.arrays import BoolArray, FloatArray, IntArray, SlotArray
from moeless_opt.solvers.pack import fast

__all__ = ["connect"]

MANY_GPUS = 1024
"""More GPUs than this are kept in heaps: a look at all of them for every replica takes longer."""
_NEVER = 1e280  # a full GPU, or one that holds the expert


def connect(
    load_LE: FloatArray,
    replicas_LE: NDArray[Any],
    capacity_LG: IntArray,
    speed_G: FloatArray,
    *,
    backend: str = "auto",
) -> tuple[SlotArray, BoolArray]:
    """Steps 2 and 3: place replicas so that replicated experts join the GPUs into one component.

    Parameters
    ----------
    load_LE : array of float, shape [L, E]
        Tokens.
    replicas_LE : array of int, shape [L, E]
        Replicas of each expert.
    capacity_LG : array of int, shape [L, G]
        Slots.
    speed_G : array of float, shape [G]
        Relative speeds.
    backend : {"auto", "numpy", "numba"}
        Which of the two twins does the work; the result is the same (see `pack.fast.choose_backend`).

    Returns
    -------
    slots_LGC : array of int32, shape [L, G, C]
        Placement.
    ok_L : array of bool, shape [L]
        Whether every replica found a GPU; the other layers are empty.
    """
    L, _ = load_LE.shape
    G = capacity_LG.shape[1]
    piece = load_LE / replicas_LE
    # Replicated experts first, each group by falling piece.
    order = np.argsort(np.where(replicas_LE > 1, -1.0 - piece, 1.0 / (1.0 + piece)), axis=1, kind="stable")
    replicas = np.take_along_axis(replicas_LE, order, axis=1)
    pieces = np.take_along_axis(piece, order, axis=1)
    linked_L = np.where(replicas > 1, replicas, 0).sum(axis=1)
    # A GPU that the expert reaches already is the last choice: later than any other could ever be.
    same_L = (pieces * replicas).sum(axis=1) * float(1.0 / speed_G.min()) + 1.0
    # On empty equal GPUs the first G replicas take one each.
    uniform = bool((capacity_LG > 0).all()) and bool((speed_G == speed_G[0]).all())
    head = int(min(G, linked_L.min())) if uniform else 0
    wave = max(1, 3 * G // 4)  # a whole wave at once is nearly LPT, for a fraction of the steps
    if G > MANY_GPUS:
        state = _Packing(L, G, capacity_LG, speed_G)
        for layer in range(L):
            state.ok_L[layer] = _link_layer(
                state, layer, order[layer], pieces[layer], replicas[layer], same_L, head
            )
        _place_rest(state, order, pieces, (replicas > 1).sum(axis=1), wave)
        state.slots[~state.ok_L] = -1
        return state.slots, state.ok_L
    if fast.choose_backend(backend) == "numba":
        limits = {"head": head, "wave": wave, "never": _NEVER}
        return fast.join_layers(order, pieces, replicas, capacity_LG, speed_G, same_L, **limits)
    state = _Packing(L, G, capacity_LG, speed_G)
    _place_links(state, order, pieces, replicas, linked_L, same_L, head)
    _place_rest(state, order, pieces, (replicas > 1).sum(axis=1), wave)
    state.slots[~state.ok_L] = -1
    return state.slots, state.ok_L


class _Packing:
    """What is where, in all layers at once."""

    def __init__(self, L: int, G: int, capacity_LG: IntArray, speed_G: FloatArray) -> None:
        self._width = int(capacity_LG.max(initial=1))
        self.slots = np.full((L, G, self._width), -1, dtype=np.int32)
        # Time so far; full GPUs are never chosen.
        self.time = np.where(capacity_LG > 0, 0.0, _NEVER)
        self.ok_L = np.ones(L, dtype=bool)
        # The same arrays flat: one index per (layer, GPU) is twice as fast as two.
        self._slots, self._time = self.slots.reshape(-1), self.time.reshape(-1)
        self._used = np.zeros(L * G, dtype=np.int64)
        self._capacity = capacity_LG.reshape(-1)
        self._pace = np.tile(1.0 / speed_G, L)
        self.capacity_LG, self.pace_G = capacity_LG, 1.0 / speed_G

    def begin(self, layer: int, placed: list[tuple[int, int]], time: list[float]) -> None:
        """Put replicas, as (GPU, expert), into an empty layer, and take the GPUs' times from there."""
        gpus = len(time)
        used = [0] * gpus
        slots_GC = self.slots[layer]
        for gpu, expert in placed:
            slots_GC[gpu, used[gpu]] = expert
            used[gpu] += 1
        self._used[layer * gpus : (layer + 1) * gpus] = used
        self.time[layer] = np.where(used < self.capacity_LG[layer], time, _NEVER)

    def put(self, cell: IntArray, experts: IntArray, pieces: FloatArray) -> None:
        """Place one replica per cell (layer * GPUs + GPU), all cells distinct."""
        used = self._used[cell]
        self._slots[cell * self._width + used] = experts
        used += 1
        self._used[cell] = used
        time = self._time[cell] + pieces * self._pace[cell]
        self._time[cell] = np.where(used < self._capacity[cell], time, _NEVER)


def _place_links(
    state: _Packing,
    order: IntArray,
    pieces: FloatArray,
    replicas: NDArray[Any],
    linked_L: IntArray,
    same_L: FloatArray,
    done: int,
) -> None:
    """Replicas of replicated experts, in order, each joining another component to its expert's."""
    L, G = state.time.shape
    E = order.shape[1]
    length = int(linked_L.max(initial=0))
    if length == 0:
        return
    # The sequence of replicas of each layer: rank of the expert, and whether it is its first replica.
    end = np.cumsum(np.where(replicas > 1, replicas, 0), axis=1)
    step = np.arange(length)
    rank_LS = np.minimum(
        (end[:, None, :] <= step[None, :, None]).sum(axis=2) if E <= 64 else _ranks(end, length), E - 1
    )
    expert_LS = np.take_along_axis(order, rank_LS, axis=1)
    piece_LS = np.take_along_axis(pieces, rank_LS, axis=1)
    first_LS = np.ones((L, length), dtype=bool)
    first_LS[:, 1:] = rank_LS[:, 1:] != rank_LS[:, :-1]
    live_LS = step < linked_L[:, None]
    all_rows = np.arange(L)
    component = np.tile(np.arange(G), (L, 1))
    root_L = np.zeros(L, dtype=np.int64)
    barred = np.zeros((L, G))
    same_L1 = same_L[:, None]
    if done:
        cell = (all_rows[:, None] * G + np.arange(done)).reshape(-1)
        state.put(cell, expert_LS[:, :done].reshape(-1), piece_LS[:, :done].reshape(-1))
        start = np.maximum.accumulate(np.where(first_LS[:, :done], step[:done], 0), axis=1)
        component[:, :done] = start
        root_L = start[:, -1].copy()
        barred[:] = np.where(component == root_L[:, None], same_L1, 0.0)
        barred[:, :done][start == root_L[:, None]] = _NEVER
    flat_barred = barred.reshape(-1)
    row_start = all_rows * G
    for s in range(done, length):
        first_L = first_LS[:, s]
        barred[first_L] = 0.0
        key = state.time + barred
        cell_L = row_start + key.argmin(axis=1)
        live_L = live_LS[:, s] & (key.reshape(-1)[cell_L] < _NEVER)
        state.ok_L &= live_L | ~live_LS[:, s]
        joined_L = component.reshape(-1)[cell_L]
        root_L = np.where(first_L, joined_L, root_L)
        if live_L.all():
            state.put(cell_L, expert_LS[:, s], piece_LS[:, s])
            np.copyto(component, root_L[:, None], where=component == joined_L[:, None])
        else:
            rows = np.flatnonzero(live_L)
            state.put(cell_L[rows], expert_LS[rows, s], piece_LS[rows, s])
            np.copyto(component, root_L[:, None], where=(component == joined_L[:, None]) & live_L[:, None])
            cell_L = cell_L[rows]
        np.copyto(barred, same_L1, where=(component == root_L[:, None]) & (barred < _NEVER))
        flat_barred[cell_L] = _NEVER


class _Components:
    """GPUs with room in the components that links have joined, those that end first at hand.

    Every component has a heap of its GPUs, and the least of each is in one heap of all. Entries that
    are no longer true are left where they are and dropped when they come up.
    """

    def __init__(self, time: list[float], room: list[int]) -> None:
        self.time, self.room = time, room
        self._root = list(range(len(time)))
        self._heap = [[(t, g)] if room[g] else [] for g, t in enumerate(time)]
        self._first = [(t, g) for g, t in enumerate(time) if room[g]]
        heapify(self._first)

    def root(self, gpu: int) -> int:
        """The component of a GPU."""
        root = self._root
        while root[gpu] != gpu:
            root[gpu] = gpu = root[root[gpu]]
        return gpu

    def _least(self, root: int) -> tuple[float, int] | None:
        """The GPU of a component that ends first, of those with room."""
        heap, time, room = self._heap[root], self.time, self.room
        while heap and (not room[heap[0][1]] or time[heap[0][1]] != heap[0][0]):
            heappop(heap)
        return heap[0] if heap else None

    def outside(self, root: int) -> int:
        """The GPU that ends first in any other component; -1 if none has room."""
        first, own = self._first, None
        found = -1
        while first:
            entry = first[0]
            home = self.root(entry[1])
            if self._least(home) != entry:
                heappop(first)
            elif home == root:
                own = heappop(first)
            else:
                found = entry[1]
                break
        if own is not None:
            heappush(first, own)
        return found

    def inside(self, root: int, barred: set[int], same: float) -> int:
        """The GPU of this component that ends first and is not barred; times count from `same` on."""
        heap, aside, found = self._heap[root], [], -1
        key = 0.0
        while (entry := self._least(root)) is not None:
            gpu = entry[1]
            if found >= 0 and entry[0] + same > key:
                break
            aside.append(heappop(heap))
            if gpu not in barred and (found < 0 or gpu < found):
                found, key = gpu, entry[0] + same
        for entry in aside:
            heappush(heap, entry)
        return found

    def placed(self, gpu: int, time: float, root: int) -> int:
        """A replica goes there, joining its component to another (-1: to none); the root of both."""
        self.time[gpu] = time
        self.room[gpu] -= 1
        home = self.root(gpu)
        if self.room[gpu]:
            heappush(self._heap[home], (time, gpu))
        if root >= 0 and root != home:
            if len(self._heap[home]) < len(self._heap[root]):
                home, root = root, home
            for entry in self._heap[root]:
                heappush(self._heap[home], entry)
            self._root[root] = home
            self._heap[root] = []
        if (least := self._least(home)) is not None:
            heappush(self._first, least)
        return home


def _link_layer(
    state: _Packing,
    layer: int,
    order_E: IntArray,
    piece_E: FloatArray,
    replicas_E: NDArray[Any],
    same_L: FloatArray,
    head: int,
) -> bool:
    """`_place_links` of one layer with many GPUs: the same places; False if one replica finds none."""
    gpus = state.time.shape[1]
    pace = state.pace_G.tolist()
    room = state.capacity_LG[layer].tolist()
    joined = _Components([0.0] * gpus, list(room))
    same = float(same_L[layer])
    placed: list[tuple[int, int]] = []
    links = int((replicas_E > 1).sum())
    for expert, piece, count in zip(
        order_E[:links].tolist(), piece_E[:links].tolist(), replicas_E[:links].tolist(), strict=True
    ):
        root, holders = -1, set[int]()
        for _ in range(count):
            gpu = len(placed) if len(placed) < head else joined.outside(root)
            if gpu < 0 and root >= 0:
                gpu = joined.inside(root, holders, same)
            if gpu < 0:
                return False
            placed.append((gpu, expert))
            holders.add(gpu)
            root = joined.placed(gpu, joined.time[gpu] + piece * pace[gpu], root)
    state.begin(layer, placed, joined.time)
    return True


def _ranks(end_LE: NDArray[Any], length: int) -> IntArray:
    """For each position of a layer's sequence, the expert whose run covers it."""
    L, E = end_LE.shape
    mark = np.zeros((L, length + 1), dtype=np.int64)
    rows = np.repeat(np.arange(L), E)
    np.add.at(mark, (rows, np.minimum(end_LE, length).reshape(-1)), 1)
    return np.cumsum(mark[:, :length], axis=1)


def _place_rest(state: _Packing, order: IntArray, pieces: FloatArray, linked_L: IntArray, wave: int) -> None:
    """The experts with one replica: rounds of the heaviest ones left onto the emptiest GPUs."""
    L, E = order.shape
    G = state.time.shape[1]
    all_rows = np.arange(L)[:, None]
    at_L = linked_L.copy()
    flat_order, flat_pieces = order.reshape(-1), pieces.reshape(-1)
    while (at_L < E).any():
        gpu_LW = np.argsort(state.time, axis=1, kind="stable")[:, :wave]
        rank_LW = at_L[:, None] + np.arange(wave)
        fits = (state.time[all_rows, gpu_LW] < _NEVER) & (rank_LW < E)
        if not fits[:, 0].all():
            state.ok_L &= fits[:, 0] | (at_L >= E)
            if not fits.any():
                return
        rows, column = np.nonzero(fits)
        cell = rows * G + gpu_LW[rows, column]
        rank = rows * E + rank_LW[rows, column]
        state.put(cell, flat_order[rank], flat_pieces[rank])
        at_L += fits.sum(axis=1)
