"""The compiled form of `state`; importing this module imports Numba.

All of `state` is compiled as it stands but for the choice of the best change, which runs here candidate by
candidate, with the same numbers, and looks at the GPUs alone whose loads a candidate changes.
"""

# mypy: disable-error-code="untyped-decorator"

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba import njit
from numba.extending import overload, register_jitable

from moeless_opt.solvers.nearest import state as plain
from moeless_opt.solvers.nearest.state import _CHEAP, _SOFT, ADD, ALONE, DROP, ENTER, MOVE, SWAP, YIELD

__all__ = ["search_near"]

for _function in (
    plain.pieces,
    plain._recount,
    plain.place,
    plain.remove,
    plain.refresh,
    plain.make,
    plain.paid,
    plain.slowest,
    plain.give_rooms,
    plain.noise,
    plain.may_leave,
    plain.reaches,
    plain.descend,
    plain.reach,
    plain.put_back,
    plain.shake,
    plain.new_state,
):
    register_jitable(_function)


class _Choice(NamedTuple):
    """What a choice needs: pressure of the GPUs, second halves of changes, and the best so far.

    Attributes
    ----------
    now_G : array of int64, shape [G]
        Pressure of each GPU.
    may, value : arrays, shape [2, G, C]
        Whether the replica in a slot may come over (0), or go (1), and what that takes from third GPUs.
    piece : array of int64, shape [2, G, C, N]
        Its expert's pieces then.
    best : array, shape [2]
        Rate of the best change, and its number.
    row : array of int64, shape [8]
        The best change.
    full, seed
        As in `state.best_change`.
    """

    now_G: Any
    may: Any
    value: Any
    piece: Any
    best: Any
    row: Any
    full: Any
    seed: Any


@njit
def _over(state: Any, g: int, load: Any) -> Any:  # pragma: no cover
    over = load - state.room_G[g]
    return max(over, 0) + (max(over + state.slack_G[g], 0) >> _SOFT)


@overload(plain.pressure)
def _pressure(state: Any) -> Any:
    def pressure(state: Any) -> int:  # pragma: no cover
        total = 0
        for g in range(len(state.room_G)):
            total += _over(state, g, state.carried_G[g])
        return total

    return pressure


@njit
def _others(state: Any, now_G: Any, e: int, piece_N: Any, g: int, h: int) -> Any:  # pragma: no cover
    """Pressure that an expert's new pieces take from the GPUs that keep it, but for two."""
    gain = 0
    for k in range(state.count_E[e]):
        x = state.host_EK[e, k]
        if x not in (g, h):
            n = state.node_G[x]
            gain += now_G[x] - _over(state, x, state.carried_G[x] + piece_N[n] - state.piece_EN[e, n])
    return gain


@njit
def _shift(state: Any, e: int, out: int, to: int, piece_N: Any) -> None:  # pragma: no cover
    """Enter into `delta_G` what a change of an expert adds to every GPU."""
    for k in range(state.count_E[e]):
        x = state.host_EK[e, k]
        n = state.node_G[x]
        state.delta_G[x] -= state.piece_EN[e, n]
        if x != out:
            state.delta_G[x] += piece_N[n]
    if to >= 0:
        state.delta_G[to] += piece_N[state.node_G[to]]


@njit
def _settled(state: Any, now_G: Any, e: int, to: int) -> Any:  # pragma: no cover
    """Pressure that `delta_G` takes from the GPUs of an expert; they are zeros afterwards."""
    gain = 0
    for k in range(state.count_E[e] + (to >= 0)):
        x = state.host_EK[e, k] if k < state.count_E[e] else to
        if state.delta_G[x] != 0:
            gain += now_G[x] - _over(state, x, state.carried_G[x] + state.delta_G[x])
            state.delta_G[x] = 0
    return gain


@njit
def _offer(choice: Any, gain: Any, price: Any, number: int, change: Any) -> None:  # pragma: no cover
    """Keep a change if its rate is the best, of equals the first by number."""
    if gain <= 0:
        return
    best = choice.best
    rate = gain / max(price, _CHEAP) * plain.noise(choice.seed, number)
    if rate > best[0] or (rate == best[0] and number < best[1]):
        best[0], best[1] = rate, number
        row = choice.row
        row[0], row[1], row[2], row[3], row[4], row[5], row[6], row[7] = change


@njit
def _free_slot(state: Any, h: int) -> int:  # pragma: no cover
    for j in range(state.content_GC.shape[1]):
        if state.content_GC[h, j] < 0:
            return j
    return -1


@njit
def _seconds(state: Any, choice: Any, g: int) -> None:  # pragma: no cover
    """What becomes of g and of third GPUs where a replica of another GPU comes over (0) or goes (1)."""
    C, N = state.content_GC.shape[1], state.near_EN.shape[1]
    swap_N, gone_N = np.empty(N, dtype=np.int64), np.empty(N, dtype=np.int64)
    ng = state.node_G[g]
    for h in range(len(state.node_G)):
        if h == g:
            continue
        for j in range(C):
            f = state.content_GC[h, j]
            if f < 0 or state.held_EG[f, h]:
                continue
            nh = state.node_G[h]
            if not state.on_EG[f, g] and state.open_EG[f, g] and plain.may_leave(state, f, h, g):
                plain.pieces(state, f, nh, ng, state.count_E[f], swap_N)
                choice.may[0, h, j] = True
                choice.piece[0, h, j] = swap_N
                choice.value[0, h, j] = _others(state, choice.now_G, f, swap_N, g, h)
            if state.count_E[f] > state.least_E[f] and plain.may_leave(state, f, h, -1):
                plain.pieces(state, f, nh, -1, state.count_E[f] - 1, gone_N)
                choice.may[1, h, j] = True
                choice.piece[1, h, j] = gone_N
                choice.value[1, h, j] = _others(state, choice.now_G, f, gone_N, g, h)


@njit
def _elsewhere(state: Any, choice: Any, g: int, i: int, first: int) -> None:  # pragma: no cover
    """An expert of g moves, or gets a replica, elsewhere."""
    G, C, N = len(state.node_G), state.content_GC.shape[1], state.near_EN.shape[1]
    now_G, may, value, piece, full = choice.now_G, choice.may, choice.value, choice.piece, choice.full
    e, ng = state.content_GC[g, i], state.node_G[g]
    moves = first == MOVE
    if (moves and state.held_EG[e, g]) or (not moves and state.count_E[e] >= state.most_E[e]):
        return
    out = g if moves else -1
    mine = state.piece_EN[e, ng]
    piece_MN = np.empty((N, N), dtype=np.int64)
    others_M = np.empty(N, dtype=np.int64)
    for m in range(N):
        count = state.count_E[e] + (0 if moves else 1)
        plain.pieces(state, e, ng if moves else -1, m, count, piece_MN[m])
        others_M[m] = _others(state, now_G, e, piece_MN[m], g, -1)
    for h in range(G):
        if h == g or state.on_EG[e, h] or not state.open_EG[e, h]:
            continue
        if moves and not plain.may_leave(state, e, g, h):
            continue
        m = state.node_G[h]
        load_g = state.carried_G[g] - mine + (0 if moves else piece_MN[m, ng])
        load_h = state.carried_G[h] + piece_MN[m, m]
        paid = state.price_EG[e, h] - (state.price_EG[e, g] if moves else 0)
        number = ((i * 2 + first) * G + h) * (2 * C + 1)
        free = state.used_G[h] < state.capacity_G[h]
        if free and ((moves and not full) or (not moves and state.left_1[0] > 0)):
            gain = now_G[g] - _over(state, g, load_g) + now_G[h] - _over(state, h, load_h) + others_M[m]
            j = _free_slot(state, h)
            _offer(choice, gain, paid, number, (first, ALONE, e, g, i, h, j, -1))
        for j in range(C):
            f = state.content_GC[h, j]
            if f < 0:
                continue
            left_h = load_h - state.piece_EN[f, m]
            both_g = load_g + piece[0, h, j, ng]
            if moves and may[0, h, j] and both_g < state.carried_G[g]:
                if state.count_E[e] > 1 and state.count_E[f] > 1:
                    _shift(state, e, g, h, piece_MN[m])
                    _shift(state, f, h, g, piece[0, h, j])
                    gain = _settled(state, now_G, e, h) + _settled(state, now_G, f, g)
                else:
                    gain = now_G[g] - _over(state, g, both_g) + now_G[h] - _over(state, h, left_h)
                    gain += others_M[m] + value[0, h, j]
                price = paid + state.price_EG[f, g] - state.price_EG[f, h]
                _offer(choice, gain, price, number + 1 + j, (first, SWAP, e, g, i, h, j, f))
            if may[1, h, j] and not (moves and full):
                if state.count_E[e] > 1 or state.on_EG[f, g]:
                    _shift(state, e, out, h, piece_MN[m])
                    _shift(state, f, h, -1, piece[1, h, j])
                    gain = _settled(state, now_G, e, h) + _settled(state, now_G, f, -1)
                else:
                    gain = now_G[g] - _over(state, g, load_g) + now_G[h] - _over(state, h, left_h)
                    gain += others_M[m] + value[1, h, j]
                price = paid - state.price_EG[f, h]
                _offer(choice, gain, price, number + 1 + C + j, (first, YIELD, e, g, i, h, j, f))


@njit
def _here(state: Any, choice: Any, g: int, i: int) -> None:  # pragma: no cover
    """An expert leaves g, whose others can do without it; another may get a replica there."""
    G, C, N = len(state.node_G), state.content_GC.shape[1], state.near_EN.shape[1]
    now_G = choice.now_G
    e, ng = state.content_GC[g, i], state.node_G[g]
    if state.held_EG[e, g] or state.count_E[e] <= state.least_E[e] or not plain.may_leave(state, e, g, -1):
        return
    gone_N, come_N = np.empty(N, dtype=np.int64), np.empty(N, dtype=np.int64)
    plain.pieces(state, e, ng, -1, state.count_E[e] - 1, gone_N)
    number = C * 2 * G * (2 * C + 1) + i * (len(state.count_E) + 1)
    paid = -state.price_EG[e, g]
    load_g = state.carried_G[g] - state.piece_EN[e, ng]
    if not choice.full:
        gain = now_G[g] - _over(state, g, load_g) + _others(state, now_G, e, gone_N, g, -1)
        _offer(choice, gain, paid, number, (DROP, ALONE, e, g, i, -1, -1, -1))
    for x in range(len(state.count_E)):
        if state.on_EG[x, g] or not state.open_EG[x, g] or state.count_E[x] >= state.most_E[x]:
            continue
        plain.pieces(state, x, -1, ng, state.count_E[x] + 1, come_N)
        if load_g + come_N[ng] < state.carried_G[g]:
            _shift(state, e, g, -1, gone_N)
            _shift(state, x, -1, g, come_N)
            gain = _settled(state, now_G, e, -1) + _settled(state, now_G, x, g)
            price = paid + state.price_EG[x, g]
            _offer(choice, gain, price, number + 1 + x, (DROP, ENTER, e, g, i, -1, -1, x))


@overload(plain.best_change)
def _best_change(state: Any, full: Any, seed: int, g: int, row: Any) -> Any:
    def best_change(state: Any, full: Any, seed: int, g: int, row: Any) -> Any:  # pragma: no cover
        G, C, N = len(state.node_G), state.content_GC.shape[1], state.near_EN.shape[1]
        now_G = np.empty(G, dtype=np.int64)
        for x in range(G):
            now_G[x] = _over(state, x, state.carried_G[x])
        may = np.zeros((2, G, C), dtype=np.bool_)
        value = np.empty((2, G, C), dtype=np.int64)
        piece = np.empty((2, G, C, N), dtype=np.int64)
        choice = _Choice(now_G, may, value, piece, np.zeros(2), row, full, seed)
        _seconds(state, choice, g)
        for i in range(C):
            if state.content_GC[g, i] >= 0:
                _elsewhere(state, choice, g, i, MOVE)
                _elsewhere(state, choice, g, i, ADD)
                _here(state, choice, g, i)
        return choice.best[0]

    return best_change


register_jitable(plain.search_near)


def _search_layers(layers: Any, search: Any, first: Any, step: Any, told: Any) -> None:  # pragma: no cover
    plain.search_near(layers, search, first, step, told)


# Numba looks at one file alone to tell whether cached code is stale: the name of this one tells of both.
_search_layers.__qualname__ = plain.compiled_name()
search_near = njit(cache=True, nogil=True)(_search_layers)
