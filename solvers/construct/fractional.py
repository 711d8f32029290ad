"""Placement for free token shares: perfect on the given loads, and sturdy when they turn out different.

Tokens can move between two GPUs when they hold replicas of a common expert. Take that graph: GPUs joined by
replicated experts. Where it is connected, and the shares that level all GPUs are not negative, every
GPU comes out at the mean exactly. S slots for E experts leave S - E spare replicas, and a spanning tree needs
G - 1 of them: the familiar condition E <= G (c - 1) leaves just enough. So the spare replicas are
spent on joining, never on linking GPUs twice:

1. Count replicas by largest ``load / (replicas + 1/2)``, which favours the heavy experts: they fluctuate
most,
   in tokens, and make the widest links.
2. Place the replicas of replicated experts, heaviest first, each on the least loaded GPU among those in
   components that the expert does not reach yet.
3. Fill up with the other experts, heaviest first, always onto the emptiest GPUs.
4. Level: the shares that solve the graph's Laplacian system move as little as possible away from the equal
   split. Where one would be negative, the exact share solver decides.

A layer that misses the mean is tried with other replica counts, then with alias packing, which is brittle;
whoever is first at the mean wins. Where the slots are too few to join all GPUs (E > G (c - 1)) or the GPUs
too unequal, groups of GPUs are joined instead (see `groups`), and the best of these and of the equal-split
construction wins, so that free shares are never worse than equal ones.

Why it is sturdy: with the loads off by a factor, what counts is how much captive load a set of GPUs
has (see `bounds.density_bound`). A tree of wide links leaves few sets with much captive load; the same spare
replicas placed for balance alone leave many GPUs linked to nobody.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moeless_opt.problems.arrays import BoolArray, FloatArray, IntArray, SlotArray
from moeless_opt.problems.plan.bounds import best_bound
from moeless_opt.solvers.construct.alias import alias_pack
from moeless_opt.solvers.construct.equal import construct_equal
from moeless_opt.solvers.construct.groups import pack_groups
from moeless_opt.solvers.construct.pools import group_pack
from moeless_opt.solvers.construct.small import join_layer
from moeless_opt.solvers.pack import fast
from moeless_opt.solvers.pack.counts import apportion, trim
from moeless_opt.solvers.shares.flow import solve_shares
from moeless_opt.solvers.shares.graph import ReplicaGraph

__all__ = ["connect", "construct_fractional", "level"]


LEAN = 0.5  # of the first try; see `sizing.apportion`
OTHER_LEANS = (0.25, 0.0, -0.25, -0.5, -0.75)  # ever fewer replicas for the heaviest, more links elsewhere
THOROUGH_LEANS = (0.0, 0.25, 0.75, 1.0)
NOISE = 0.2  # of the scenarios that a thorough construction is judged by (standard deviation of the log)
SCENARIOS = 6
PERFECT = 1e-10  # relative distance from the mean that counts as none
_SEARCH_PAIRS = 400  # experts x GPUs up to which a layer is worth a local search
_SINGULAR = 1e5  # potentials beyond this, in units of the mean load over a piece, mean a singular system
_SMALL = 512  # layers x experts x GPUs up to which plain Python is faster than NumPy
_NEVER = 1e280  # a full GPU, or one that holds the expert


def construct_fractional(
    load_LE: FloatArray,
    capacity_LG: Any,
    speed_G: Any,
    *,
    seed: int = 0,
    effort: str = "normal",
) -> tuple[SlotArray, FloatArray]:
    """Place the replicas of every layer, and split the tokens, for the least largest GPU time.

    Parameters
    ----------
    load_LE : float array [layers, experts]
        Tokens, not negative.
    capacity_LG : int array [layers, GPUs]
        Slots.
    speed_G : float array [GPUs]
        Relative speeds.
    seed : int
        For the scenarios of ``effort="thorough"``; otherwise nothing is random.
    effort : {"normal", "thorough"}
        Thorough also builds every variant and keeps, among those at the best time, the one that fares best on
        loads with lognormal noise, shares re-solved.

    Returns
    -------
    slots_LGC : int32 array [layers, GPUs, slots]
        Expert in each slot, -1 (last) where empty; no expert twice on a GPU.
    share_LGC : float array [layers, GPUs, slots]
        Fraction of its expert's tokens served by the slot; they sum to 1 per expert.

    Raises
    ------
    InfeasibleError
        The slots can't hold one replica of every expert.

    Examples
    --------
    >>> import numpy as np
    >>> load = np.array([[600.0, 560, 120, 120, 20, 10, 10, 10]])
    >>> slots, share = construct_fractional(load, np.full((1, 8), 2), np.ones(8))
    >>> tokens = np.where(slots >= 0, load[0][slots] * share, 0.0)
    >>> float(tokens.sum(axis=2).max().round(6))
    181.25
    """
    load = np.ascontiguousarray(load_LE, dtype=np.float64)
    capacity = np.ascontiguousarray(capacity_LG, dtype=np.int64)
    speed = np.ascontiguousarray(speed_G, dtype=np.float64)
    if load.size * len(speed) <= _SMALL and effort == "normal":
        small = _small(load, capacity, speed)
        if small is not None:
            return small
    mean_L = load.sum(axis=1) / speed.sum()
    slots, share, time_L = _joined(load, capacity, speed, LEAN)
    _retry(load, capacity, speed, mean_L, slots, share, time_L, seed)
    if effort == "thorough":
        _sturdiest(load, capacity, speed, slots, share, time_L, seed)
    return slots, share


Built = tuple[SlotArray, FloatArray, FloatArray]


def _small(
    load_LE: FloatArray, capacity_LG: IntArray, speed_G: FloatArray
) -> tuple[SlotArray, FloatArray] | None:
    """Small problems in plain Python; None where a layer needs more than the first construction."""
    speed = speed_G.tolist()
    all_slots, all_share = [], []
    C = int(capacity_LG.max())
    for load, capacity in zip(load_LE.tolist(), capacity_LG.tolist(), strict=True):
        joined = join_layer(load, capacity, speed, lean=LEAN)
        if joined is None:
            return None
        all_slots.append([row + [-1] * (C - len(row)) for row in joined[0]])
        all_share.append([row + [0.0] * (C - len(row)) for row in joined[1]])
    return np.array(all_slots, dtype=np.int32), np.array(all_share)


def _joined(load_LE: FloatArray, capacity_LG: IntArray, speed_G: FloatArray, lean: float) -> Built:
    """Steps 1 to 4: placement, shares, largest times; infinite time where a layer can't be packed so."""
    total = np.minimum(capacity_LG, load_LE.shape[1]).sum(axis=1)
    cap = (capacity_LG > 0).sum(axis=1)[:, None]
    replicas = trim(load_LE, apportion(load_LE, total, cap, lean=lean), capacity_LG)
    slots, ok_L = connect(load_LE, replicas, capacity_LG, speed_G)
    share, time_L = _share(load_LE, slots, speed_G, ok_L, replicas)
    return slots, share, time_L


def _share(
    load_LE: FloatArray, slots_LGC: SlotArray, speed_G: FloatArray, ok_L: BoolArray, replicas_LE: NDArray[Any]
) -> tuple[FloatArray, FloatArray]:
    """Level the layers in `ok_L`, exactly where levelling would need negative shares."""
    mean_L = load_LE.sum(axis=1) / speed_G.sum()
    share, time_L = level(load_LE, slots_LGC, speed_G, replicas_LE)
    time_L[~ok_L] = np.inf
    open_L = np.flatnonzero(ok_L & (time_L > mean_L * (1.0 + PERFECT)))
    if len(open_L):
        found = solve_shares(load_LE[open_L], slots_LGC[open_L], speed_G)
        share[open_L], time_L[open_L] = found.share_LGC, found.time_L
    return share, time_L


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
    load_LE : float array [layers, experts]
        Tokens.
    replicas_LE : int array [layers, experts]
        Replicas of each expert.
    capacity_LG : int array [layers, GPUs]
        Slots.
    speed_G : float array [GPUs]
        Relative speeds.
    backend : {"auto", "numpy", "numba"}
        Which of the two twins does the work; the result is the same (see `pack.fast.choose`).

    Returns
    -------
    slots_LGC : int32 array [layers, GPUs, slots]
        Placement.
    ok_L : bool array [layers]
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
    if fast.choose(backend) == "numba":
        limits = {"head": head, "wave": wave, "never": _NEVER}
        return fast.connect(order, pieces, replicas, capacity_LG, speed_G, same_L, **limits)
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


def level(
    load_LE: FloatArray, slots_LGC: SlotArray, speed_G: FloatArray, replicas_LE: NDArray[Any]
) -> tuple[FloatArray, FloatArray]:
    """Step 4: the shares nearest to the equal split that put every GPU at the mean, where they exist.

    Each replica of an expert moves ``piece * (average potential of its GPUs - potential of this GPU)`` tokens
    onto this GPU; the potentials solve a Laplacian system over the GPUs.

    Parameters
    ----------
    load_LE : float array [layers, experts]
        Tokens.
    slots_LGC : int array [layers, GPUs, slots]
        Placement.
    speed_G : float array [GPUs]
        Relative speeds.
    replicas_LE : int array [layers, experts]
        Replicas of each expert in the placement.

    Returns
    -------
    share_LGC : float array [layers, GPUs, slots]
        Shares; the equal split in layers where levelling would make one negative.
    time_L : float array [layers]
        Largest GPU times under them.
    """
    L, G, _ = slots_LGC.shape
    E = load_LE.shape[1]
    rows = np.arange(L)[:, None, None]
    filled = slots_LGC >= 0
    expert = np.where(filled, slots_LGC, 0)
    count_LGC = replicas_LE[rows, expert]
    piece_LGC = np.where(filled, (load_LE / replicas_LE)[rows, expert], 0.0)
    share = np.where(filled, 1.0 / count_LGC, 0.0)
    excess_LG = piece_LGC.sum(axis=2)
    mean_L = load_LE.sum(axis=1) / speed_G.sum()
    equal_L = (excess_LG / speed_G).max(axis=1)
    excess_LG = excess_LG - mean_L[:, None] * speed_G
    linked = filled & (count_LGC > 1)
    layer, gpu, slot = np.nonzero(linked)
    if not len(layer):
        return share, equal_L
    # Links of each layer in a row: X experts, incidence [L, X, G].
    key = layer * E + expert[layer, gpu, slot]
    is_link = np.zeros(L * E, dtype=bool)
    is_link[key] = True
    number = np.cumsum(is_link.reshape(L, E), axis=1) - 1
    X = int(number.max()) + 1
    column = number.reshape(-1)[key]
    weight = piece_LGC[layer, gpu, slot]
    count = count_LGC[layer, gpu, slot]
    # Constant vectors are in the kernel: ground it. A GPU without links gets a potential of its own.
    unit_L = np.where(mean_L > 0.0, mean_L, 1.0)[:, None, None]
    links = _Links(layer, gpu, column, weight, count, (L, X, G))
    solve = _by_experts if 2 * (X + 1) <= G else _by_gpus
    potential, average = solve(links, excess_LG / unit_L[..., 0], unit_L)
    moved = weight * (average[layer, column] / count - potential[layer, gpu])
    token = weight + moved
    token_LGC = piece_LGC.copy()
    token_LGC[layer, gpu, slot] = token
    time_L = (token_LGC.sum(axis=2) / speed_G).max(axis=1)
    negative_L = np.zeros(L, dtype=bool)
    negative_L[layer[token < -1e-12 * unit_L[layer, 0, 0]]] = True
    # GPUs that are not joined make the system singular, and its potentials huge and worthless.
    sound_L = np.isfinite(potential).all(axis=1) & (np.abs(potential).max(axis=1) < _SINGULAR)
    good_L = sound_L & ~negative_L & (time_L <= equal_L * (1.0 + PERFECT))
    load = load_LE[layer, expert[layer, gpu, slot]]
    new = np.where(load > 0.0, np.maximum(token, 0.0) / np.where(load > 0.0, load, 1.0), 1.0 / count)
    keep = good_L[layer]
    share[layer[keep], gpu[keep], slot[keep]] = new[keep]
    return share, np.where(good_L, time_L, equal_L)


@dataclass(frozen=True, slots=True)
class _Links:
    """Replicas of replicated experts, one entry each: layer, GPU, column of the expert, piece, replicas."""

    layer: IntArray
    gpu: IntArray
    column: IntArray
    weight: FloatArray
    count: NDArray[Any]
    shape: tuple[int, int, int]  # layers, experts with replicas, GPUs


def _by_gpus(links: _Links, excess_LG: FloatArray, unit_L: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Potentials of the GPUs, and their sums over each expert's GPUs, from a system over the GPUs."""
    L, X, G = links.shape
    layer, gpu, column = links.layer, links.gpu, links.column
    incidence = np.zeros((L, X, G))
    incidence[layer, column, gpu] = 1.0
    scaled = np.zeros((L, X, G))
    scaled[layer, column, gpu] = links.weight / links.count
    laplacian = -np.matmul(scaled.transpose(0, 2, 1), incidence)
    index = np.arange(G)
    laplacian[:, index, index] += _total(links)
    potential = np.linalg.solve(laplacian / unit_L + 1.0 / G + np.eye(G) * 1e-13, excess_LG[..., None])[
        ..., 0
    ]
    return potential, np.matmul(incidence, potential[..., None])[..., 0]


def _by_experts(links: _Links, excess_LG: FloatArray, unit_L: FloatArray) -> tuple[FloatArray, FloatArray]:
    """The same from a system over the experts, of which there are fewer (Woodbury's identity).

    With D the GPUs' linked tokens, B who is where, S the pieces over the replicas and u = 1 / sqrt(GPUs), the
    system over the GPUs is ``(D - B' S B + u u') p = excess``. The unknowns here are ``B p`` and ``u' p``.
    """
    L, X, G = links.shape
    layer, gpu, column = links.layer, links.gpu, links.column
    unit = unit_L[:, 0, 0]
    inverse_LG = 1.0 / (_total(links) / unit[:, None] + 1e-13)
    scale_LX = np.zeros((L, X))
    scale_LX[layer, column] = links.weight / links.count / unit[layer]

    def over_experts(value_LG: FloatArray) -> FloatArray:
        values = value_LG[layer, gpu]
        sums: FloatArray = np.bincount(layer * X + column, weights=values, minlength=L * X).astype(np.float64)
        return sums.reshape(L, X)

    # Entries of every pair of replicas on one GPU: B D^-1 B'.
    order = np.argsort(layer * G + gpu, kind="stable")
    cell = (layer * G + gpu)[order]
    start = np.searchsorted(cell, cell)
    met_LXX = np.zeros(L * X * X)
    for step in range(int(np.bincount(cell).max())):
        other = start + step
        valid = other < len(cell)
        valid[valid] = cell[other[valid]] == cell[valid]
        a, b = order[valid], order[other[valid]]
        key = (layer[a] * X + column[a]) * X + column[b]
        met_LXX += np.bincount(key, weights=inverse_LG[layer[a], gpu[a]], minlength=L * X * X)
    ground = 1.0 / np.sqrt(G)
    system = np.zeros((L, X + 1, X + 1))
    system[:, :X, :X] = np.eye(X) - met_LXX.reshape(L, X, X) * scale_LX[:, None, :]
    system[:, :X, X] = over_experts(inverse_LG) * ground
    system[:, X, :X] = -system[:, :X, X] * scale_LX
    system[:, X, X] = 1.0 + inverse_LG.sum(axis=1) / G
    right = np.zeros((L, X + 1))
    right[:, :X] = over_experts(inverse_LG * excess_LG)
    right[:, X] = (inverse_LG * excess_LG).sum(axis=1) * ground
    found = _solved(system, right)
    back = np.bincount(
        layer * G + gpu, weights=(found[:, :X] * scale_LX)[layer, column], minlength=L * G
    ).reshape(L, G)
    potential = inverse_LG * (excess_LG + back - ground * found[:, X:])
    return potential, over_experts(potential)


def _solved(system_LNN: FloatArray, right_LN: FloatArray) -> FloatArray:
    """Solutions, shape [L, N]; not a number in layers whose system is singular (GPUs that nothing joins)."""
    try:
        return np.asarray(np.linalg.solve(system_LNN, right_LN[..., None])[..., 0], dtype=np.float64)
    except np.linalg.LinAlgError:
        if len(system_LNN) == 1:
            return np.full(right_LN.shape, np.nan)
        parts = zip(system_LNN, right_LN, strict=True)
        return np.concatenate([_solved(system[None], right[None]) for system, right in parts])


def _total(links: _Links) -> FloatArray:
    """Tokens of the replicated experts on each GPU, shape [L, G]."""
    L, _, G = links.shape
    total: FloatArray = np.bincount(
        links.layer * G + links.gpu, weights=links.weight, minlength=L * G
    ).astype(float)
    return total.reshape(L, G)


def _retry(
    load_LE: FloatArray,
    capacity_LG: IntArray,
    speed_G: FloatArray,
    mean_L: FloatArray,
    slots: SlotArray,
    share: FloatArray,
    time_L: FloatArray,
    seed: int,
) -> None:
    """Other constructions for the layers that miss the mean, in place, until one is as good as can be.

    The equal-split construction comes last, its shares re-solved: an equal split is a choice of shares, too.
    """
    pairs = load_LE.shape[1] * len(speed_G)
    builds: list[_Build] = [lambda load, capacity, _: _aliased(load, capacity, speed_G)]
    # Where slots are too few to join all GPUs in some layer, no tree will do.
    if load_LE.shape[1] <= int(np.maximum(capacity_LG - 1, 0).sum(axis=1).min()):
        builds = [*(_lean(speed_G, lean) for lean in OTHER_LEANS), *builds]
    hard = len(builds)
    builds.append(lambda load, capacity, goal_L: pack_groups(load, capacity, speed_G, goal_L))
    if pairs <= _SEARCH_PAIRS:
        builds.append(lambda load, capacity, _: _pooled(load, capacity, speed_G, seed))
    builds.append(lambda load, capacity, _: _evenly(load, capacity, speed_G))
    goal_L = mean_L
    for number, build in enumerate(builds):
        open_L = np.flatnonzero(time_L > goal_L * (1.0 + PERFECT))
        if number == hard and len(open_L):
            goal_L = mean_L.copy()
            goal_L[open_L], _ = best_bound(load_LE[open_L], capacity_LG[open_L], speed_G, "fractional")
            open_L = np.flatnonzero(time_L > goal_L * (1.0 + PERFECT))
        if not len(open_L):
            return
        slots_O, share_O, time_O = build(load_LE[open_L], capacity_LG[open_L], goal_L[open_L])
        better = time_O < time_L[open_L] * (1.0 - 1e-12)
        layers = open_L[better]
        slots[layers], share[layers], time_L[layers] = slots_O[better], share_O[better], time_O[better]


_Build = Callable[[FloatArray, IntArray, FloatArray], Built]


def _lean(speed_G: FloatArray, lean: float) -> _Build:
    """Joining with other replica counts."""
    return lambda load, capacity, _: _joined(load, capacity, speed_G, lean)


def _aliased(load_LE: FloatArray, capacity_LG: IntArray, speed_G: FloatArray) -> Built:
    """Alias packing of every layer that it can do."""
    return _each(load_LE, capacity_LG, speed_G, lambda load, capacity: alias_pack(load, capacity, speed_G))


def _pooled(load_LE: FloatArray, capacity_LG: IntArray, speed_G: FloatArray, seed: int) -> Built:
    """The best pools of every layer with equal GPUs; see `pools`."""

    def one(load_E: FloatArray, capacity_G: IntArray) -> tuple[SlotArray, FloatArray] | None:
        if (capacity_G != capacity_G[0]).any() or (speed_G != speed_G[0]).any():
            return None
        return group_pack(load_E, len(capacity_G), int(capacity_G[0]), seed=seed)

    return _each(load_LE, capacity_LG, speed_G, one)


def _each(
    load_LE: FloatArray,
    capacity_LG: IntArray,
    speed_G: FloatArray,
    build: Callable[[FloatArray, IntArray], tuple[SlotArray, FloatArray] | None],
) -> Built:
    """A construction of single layers over all of them; infinite time where it found nothing."""
    L, G = capacity_LG.shape
    C = int(capacity_LG.max(initial=1))
    slots = np.full((L, G, C), -1, dtype=np.int32)
    share, time_L = np.zeros((L, G, C)), np.full(L, np.inf)
    for layer in range(L):
        found = build(load_LE[layer], capacity_LG[layer])
        if found is not None:
            c = found[0].shape[1]
            slots[layer, :, :c], share[layer, :, :c] = found
            token = np.where(found[0] >= 0, load_LE[layer][found[0]] * found[1], 0.0)
            time_L[layer] = (token.sum(axis=1) / speed_G).max()
    return slots, share, time_L


def _evenly(load_LE: FloatArray, capacity_LG: IntArray, speed_G: FloatArray) -> Built:
    """The equal-split construction with its shares re-solved."""
    slots = construct_equal(load_LE, capacity_LG, speed_G)
    found = solve_shares(load_LE, slots, speed_G)
    return slots, found.share_LGC, found.time_L


def _sturdiest(
    load_LE: FloatArray,
    capacity_LG: IntArray,
    speed_G: FloatArray,
    slots: SlotArray,
    share: FloatArray,
    time_L: FloatArray,
    seed: int,
) -> None:
    """Among placements of equal time, the one that fares best when the loads turn out different; in place."""
    rng = np.random.default_rng(seed)
    noise = [np.exp(rng.normal(0.0, NOISE, load_LE.shape)) for _ in range(SCENARIOS)]

    def fares(slots_LGC: SlotArray) -> FloatArray:
        graph = ReplicaGraph(slots_LGC, speed_G, load_LE.shape[1])
        mean = [np.maximum((load_LE * factor).sum(axis=1), 1e-300) / speed_G.sum() for factor in noise]
        times = [solve_shares(load_LE * factor, graph).time_L for factor in noise]
        total: FloatArray = sum(time / m for time, m in zip(times, mean, strict=True)) / len(noise)
        return total

    score_L = fares(slots)
    for lean in THOROUGH_LEANS:
        new_slots, new_share, new_time = _joined(load_LE, capacity_LG, speed_G, lean)
        level_L = np.flatnonzero(new_time <= time_L * (1.0 + PERFECT))
        if not len(level_L):
            continue
        new_score = np.full(len(load_LE), np.inf)
        complete = slots.copy()  # layers that can't be packed so keep what they have
        complete[level_L] = new_slots[level_L]
        new_score[level_L] = fares(complete)[level_L]
        better = new_score < score_L
        slots[better], share[better] = new_slots[better], new_share[better]
        score_L = np.where(better, new_score, score_L)
