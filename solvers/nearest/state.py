"""One layer whose tokens go to the nearest replica, in whole numbers, and the search for few changes on it.

Loads are whole multiples of 2**-40 of the mean GPU load: sums of them are exact, whatever their order, so
that what is kept up to date change by change equals what is computed afresh, and the compiled form
(`_kernels`) finds the same plan as this one, which picks its candidates by arrays.

A node that holds k replicas of an expert divides its own tokens over them, and all r replicas divide the
tokens of the nodes that hold none: a replica there serves ``own // k + others // r``. What a replica serves
depends on the numbers by node alone, so that a change of one expert changes the loads of the GPUs that hold
it, and no others.

Some engines send all that a GPU has no replica for to the first one on its node. Which one that is, is not
looked at: where a node has several replicas (and others have some, too), each can be counted as the first,
which serves all of the node's tokens but for those that the other replicas' GPUs keep. What is fast so is
fast by both rules: hardly an expert is twice on a node.

A *change* relieves a GPU g that carries too much, and is a row of eight numbers: what becomes of an expert e
that g holds, what becomes of the slot that is used for it, then e, g and its slot, the other GPU and its
slot, and the other expert (-1: none).

=========  =====================================================================================
``MOVE``    e goes to another GPU: into a free slot, in exchange (``SWAP``), or in place of a
            replica that others can do without (``YIELD``)
``ADD``     e gets a replica on another GPU, likewise
``DROP``    e leaves g; its slot stays empty, or another expert gets a replica there (``ENTER``)
=========  =====================================================================================
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from moeless_opt.solvers.twins import source_name

__all__ = ["NEAR_UNIT", "NearLayers", "NearSearch", "NearState", "compiled_name", "search_near"]

NEAR_UNIT = 1 << 40
"""The mean GPU load."""

MOVE, ADD, DROP = 0, 1, 2
ALONE, SWAP, YIELD, ENTER = 0, 1, 2, 3
_SOFT = 4  # load between a GPU's fair share and its room counts 2**-_SOFT of what lies above the room
_CHEAP = 0.1  # of a move is what a change counts that costs none
_PRIME = 65521


@functools.cache
def compiled_name() -> str:
    """What the compiled form of these very sources is called in Numba's cache."""
    return source_name("search_near", Path(__file__), Path(__file__).with_name("_kernels.py"))


class NearState(NamedTuple):
    """Placement of one layer and all that follows from it; arrays are changed in place.

    Attributes
    ----------
    source_EN : array of int64, shape [E, N]
        Tokens of each expert by source node.
    node_G : array of int64, shape [G]
        Node of each GPU.
    senders_N : array of int64, shape [N]
        GPUs of each node that send to its first replica where it has several and others have some (see
        above); 0: they send evenly to all of them.
    content_GC : array of int64, shape [G, C]
        Expert in each slot, -1 where empty.
    capacity_G, used_G : array of int64, shape [G]
        Slots (a GPU uses its first ones), and those that are full.
    room_G, slack_G : array of int64, shape [G]
        Load that a GPU may carry, and how much of it is above its fair share.
    price_EG : array of int64, shape [E, G]
        Price of an expert on a GPU: 0 where it is live.
    open_EG, held_EG : array of bool, shape [E, G]
        Where an expert may be placed, and from where it must not go.
    least_E, most_E : array of int64, shape [E]
        Replicas that an expert must and may have.
    count_E, near_EN : array of int64, shapes [E] and [E, N]
        Replicas, in all and by node.
    piece_EN : array of int64, shape [E, N]
        Tokens of each replica on a node; where there is none, of the others' part alone.
    on_EG : array of bool, shape [E, G]
        Whether a GPU holds an expert.
    host_EK : array of int64, shape [E, G]
        GPUs that hold an expert (the first `count_E` entries), in no order.
    carried_G : array of int64, shape [G]
        Load of each GPU.
    left_1 : array of int64, shape [1]
        Replicas that the layer may still gain.
    domain_G, inside_ED, spread_E : arrays of int64
        Failure domains from 0, replicas of each expert there, and domains that it must reach.
    delta_G : array of int64, shape [G]
        Zeros, between uses.
    """

    source_EN: Any
    node_G: Any
    senders_N: Any
    content_GC: Any
    capacity_G: Any
    used_G: Any
    room_G: Any
    slack_G: Any
    price_EG: Any
    open_EG: Any
    held_EG: Any
    least_E: Any
    most_E: Any
    count_E: Any
    near_EN: Any
    piece_EN: Any
    on_EG: Any
    host_EK: Any
    carried_G: Any
    left_1: Any
    domain_G: Any
    inside_ED: Any
    spread_E: Any
    delta_G: Any


class NearSearch(NamedTuple):
    """How a layer is searched.

    Attributes
    ----------
    full : bool
        Full slots stay full.
    tries : int
        Perturbed descents, and looser targets after them, where the wanted time is out of reach.
    rounds : int
        Rounds of putting back and repairing, for fewer moves.
    """

    full: Any
    tries: Any
    rounds: Any


# -- state ---------------------------------------------------------------------------------------------


def pieces(state: NearState, e: int, out: int, into: int, count: int, piece_N: Any) -> None:
    """Tokens of each replica, with one fewer on node `out`, one more on `into` (-1: none), `count` in all."""
    others = 0
    for n in range(len(piece_N)):
        near = state.near_EN[e, n] - (n == out) + (n == into)
        if near == 0:
            others += state.source_EN[e, n]
    each = others // max(count, 1)
    for n in range(len(piece_N)):
        near = state.near_EN[e, n] - (n == out) + (n == into)
        own = state.source_EN[e, n]
        if 1 < near < count and state.senders_N[n] > 0:
            piece_N[n] = each + own - own * (near - 1) // state.senders_N[n]
        else:
            piece_N[n] = each + (own // near if near > 0 else 0)


def _recount(state: NearState, e: int) -> None:
    """Set the pieces of an expert, and the loads of the GPUs that hold it."""
    for k in range(state.count_E[e]):
        g = state.host_EK[e, k]
        state.carried_G[g] -= state.piece_EN[e, state.node_G[g]]
    pieces(state, e, -1, -1, state.count_E[e], state.piece_EN[e])
    for k in range(state.count_E[e]):
        g = state.host_EK[e, k]
        state.carried_G[g] += state.piece_EN[e, state.node_G[g]]


def place(state: NearState, e: int, g: int, c: int) -> None:
    """Put an expert into an empty slot."""
    n = state.node_G[g]
    state.host_EK[e, state.count_E[e]] = g
    state.count_E[e] += 1
    state.carried_G[g] += state.piece_EN[e, n]
    state.near_EN[e, n] += 1
    _recount(state, e)
    state.on_EG[e, g] = True
    state.inside_ED[e, state.domain_G[g]] += 1
    state.content_GC[g, c] = e
    state.used_G[g] += 1
    state.left_1[0] -= 1


def remove(state: NearState, e: int, g: int, c: int) -> None:
    """Empty a slot."""
    n = state.node_G[g]
    last = state.count_E[e] - 1
    for k in range(last):
        if state.host_EK[e, k] == g:
            state.host_EK[e, k] = state.host_EK[e, last]
            break
    state.count_E[e] = last
    state.carried_G[g] -= state.piece_EN[e, n]
    state.near_EN[e, n] -= 1
    _recount(state, e)
    state.on_EG[e, g] = False
    state.inside_ED[e, state.domain_G[g]] -= 1
    state.content_GC[g, c] = -1
    state.used_G[g] -= 1
    state.left_1[0] += 1


def refresh(state: NearState, most: int) -> None:
    """Recompute all that follows from the content; `most` replicas are allowed."""
    state.count_E[:] = 0
    state.near_EN[:] = 0
    state.piece_EN[:] = 0
    state.on_EG[:] = False
    state.inside_ED[:] = 0
    state.carried_G[:] = 0
    state.used_G[:] = 0
    state.left_1[0] = most
    for g in range(len(state.content_GC)):
        n = state.node_G[g]
        for c in range(state.content_GC.shape[1]):
            e = state.content_GC[g, c]
            if e >= 0:
                state.host_EK[e, state.count_E[e]] = g
                state.count_E[e] += 1
                state.near_EN[e, n] += 1
                state.on_EG[e, g] = True
                state.inside_ED[e, state.domain_G[g]] += 1
                state.used_G[g] += 1
                state.left_1[0] -= 1
    for e in range(len(state.count_E)):
        pieces(state, e, -1, -1, state.count_E[e], state.piece_EN[e])
        for k in range(state.count_E[e]):
            g = state.host_EK[e, k]
            state.carried_G[g] += state.piece_EN[e, state.node_G[g]]


def make(state: NearState, change: Any) -> int:
    """Make a change; returns its price, negative where it takes back what was paid for."""
    first, second, e, g, i, h, j, f = (
        change[0], change[1], change[2], change[3], change[4], change[5], change[6], change[7]
    )  # fmt: skip
    price = 0
    if first != ADD:
        remove(state, e, g, i)
        price -= state.price_EG[e, g]
    if second in (SWAP, YIELD):
        remove(state, f, h, j)
        price -= state.price_EG[f, h]
    if first != DROP:
        place(state, e, h, j)
        price += state.price_EG[e, h]
    if second in (SWAP, ENTER):
        place(state, f, g, i)
        price += state.price_EG[f, g]
    return price


def paid(state: NearState) -> int:
    """Price of all that is not live."""
    total = 0
    for e in range(len(state.count_E)):
        for k in range(state.count_E[e]):
            total += state.price_EG[e, state.host_EK[e, k]]
    return total


def slowest(state: NearState, speed_G: Any) -> float:
    """Largest GPU time, in units of the mean load."""
    most = 0.0
    for g in range(len(speed_G)):
        most = max(most, state.carried_G[g] / (speed_G[g] * NEAR_UNIT))
    return most


def give_rooms(state: NearState, speed_G: Any, time: float) -> None:
    """Let each GPU carry what it does in a time."""
    for g in range(len(speed_G)):
        # pieces are rounded down: as many units may be missing
        state.room_G[g] = int(speed_G[g] * time * NEAR_UNIT) + 2 * state.content_GC.shape[1]
        state.slack_G[g] = max(state.room_G[g] - int(speed_G[g] * NEAR_UNIT), 0)


def above(over: Any, slack: Any) -> Any:
    """Pressure of GPUs whose load is `over` above their rooms."""
    return np.maximum(over, 0) + (np.maximum(over + slack, 0) >> _SOFT)


def noise(seed: Any, number: Any) -> Any:
    """A factor of 0.6 to 1 for each number; 1 where the seed is 0."""
    if seed == 0:
        return 1.0
    word = (number * 7919 + seed * 104729) % _PRIME
    word = (word * word * 31 + word * 17 + seed) % _PRIME
    word = (word * word * 13 + word * 7 + number) % _PRIME
    return 0.6 + 0.4 * (word / _PRIME)


def may_leave(state: NearState, e: int, g: int, to: int) -> bool:
    """Whether a replica may go, to another GPU or (-1) for good, as far as domains say."""
    if state.spread_E[e] <= 1:
        return True
    reach = 0
    for d in range(state.inside_ED.shape[1]):
        inside = state.inside_ED[e, d] - (d == state.domain_G[g])
        if to >= 0:
            inside += d == state.domain_G[to]
        reach += inside > 0
    return bool(reach >= state.spread_E[e])


def reaches(state: NearState, e: int) -> bool:
    """Whether an expert is in as many domains as it must be."""
    reach = 0
    for d in range(state.inside_ED.shape[1]):
        reach += state.inside_ED[e, d] > 0
    return bool(reach >= state.spread_E[e])


def pressure(state: NearState) -> int:
    """What GPUs carry above their rooms, and a little of what they carry above their fair share."""
    return int(above(state.carried_G - state.room_G, state.slack_G).sum())


# -- the best change, by arrays ------------------------------------------------------------------------


def _tables(state: NearState, e_X: Any, out_X: Any, into_X: Any, more: int) -> Any:
    """`pieces` of many experts, shape [X, N]."""
    node_N = np.arange(state.near_EN.shape[1])
    near = state.near_EN[e_X] - (node_N == out_X[:, None]) + (node_N == into_X[:, None])
    source = state.source_EN[e_X]
    count_X = state.count_E[e_X] + more
    each_X = np.where(near == 0, source, 0).sum(1) // np.maximum(count_X, 1)
    piece_XN = np.where(near > 0, source // np.maximum(near, 1), 0)
    first = (near > 1) & (near < count_X[:, None]) & (state.senders_N > 0)
    first_XN = source - source * (near - 1) // np.maximum(state.senders_N, 1)
    return each_X[:, None] + np.where(first, first_XN, piece_XN)


def _deltas(state: NearState, e_X: Any, out_X: Any, into_X: Any, piece_XN: Any) -> Any:
    """What new pieces of experts add to every GPU, which leave one GPU and come to another (-1: none)."""
    x, node_G = np.arange(len(e_X)), state.node_G
    was_XG = state.piece_EN[e_X][:, node_G]
    delta_XG = np.where(state.on_EG[e_X], piece_XN[:, node_G] - was_XG, 0)
    left, come = out_X >= 0, into_X >= 0
    delta_XG[x[left], out_X[left]] = -was_XG[x[left], out_X[left]]
    delta_XG[x[come], into_X[come]] += piece_XN[x[come], node_G[into_X[come]]]
    return delta_XG


def _leaves(state: NearState, e_X: Any, g_X: Any, to_X: Any) -> Any:
    """`may_leave` of many, shape [X]."""
    if state.spread_E.max() <= 1:
        return np.ones(len(e_X), dtype=np.bool_)
    asked = zip(e_X.tolist(), g_X.tolist(), to_X.tolist(), strict=True)
    return np.array([may_leave(state, *one) for one in asked], dtype=np.bool_)


class _Parts(NamedTuple):
    """Halves of changes: what they add to every GPU [.., G], whether they may be, and their price [..]."""

    delta: Any
    may: Any
    price: Any


def _first_parts(state: NearState, g: int, slot_I: Any) -> _Parts:
    """An expert of g moves to h, or gets a replica there: shapes [I, 2, G, ..]."""
    E, (G, _) = state.content_GC[g][slot_I], state.content_GC.shape
    I = len(E)  # noqa: E741 -- an axis
    e_X, h_X = np.repeat(E, G), np.tile(np.arange(G), I)
    g_X, none_X = np.full(I * G, g), np.full(I * G, -1)
    delta, may, price = [], [], []
    for first in (MOVE, ADD):
        out_X = g_X if first == MOVE else none_X
        nodes_X = state.node_G[out_X] if first == MOVE else none_X
        piece_XN = _tables(state, e_X, nodes_X, state.node_G[h_X], 0 if first == MOVE else 1)
        delta.append(_deltas(state, e_X, out_X, h_X, piece_XN))
        may_X = state.open_EG[e_X, h_X] & ~state.on_EG[e_X, h_X]
        price_X = state.price_EG[e_X, h_X]
        if first == MOVE:
            may_X = may_X & ~state.held_EG[e_X, g] & _leaves(state, e_X, g_X, h_X)
            price_X = price_X - state.price_EG[e_X, g]
        else:
            may_X = may_X & (state.count_E[e_X] < state.most_E[e_X])
        may.append(may_X)
        price.append(price_X)
    return _Parts(
        np.stack(delta).reshape(2, I, G, G).transpose(1, 0, 2, 3),
        np.stack(may).reshape(2, I, G).transpose(1, 0, 2),
        np.stack(price).reshape(2, I, G).transpose(1, 0, 2),
    )


def _second_parts(state: NearState, g: int) -> _Parts:
    """The other GPU's slot is free, its expert comes over, or goes: shapes [G, 1 + 2 C, ..]."""
    G, C = state.content_GC.shape
    delta = np.zeros((G, 1 + 2 * C, G), dtype=np.int64)
    may = np.zeros((G, 1 + 2 * C), dtype=np.bool_)
    price = np.zeros((G, 1 + 2 * C), dtype=np.int64)
    may[:, 0] = state.used_G < state.capacity_G
    h_X, j_X = np.nonzero(state.content_GC >= 0)
    f_X = state.content_GC[h_X, j_X]
    keep_X = ~state.held_EG[f_X, h_X] & (h_X != g)
    h_X, j_X, f_X = h_X[keep_X], j_X[keep_X], f_X[keep_X]
    g_X, none_X = np.full(len(f_X), g), np.full(len(f_X), -1)
    swapped = _tables(state, f_X, state.node_G[h_X], state.node_G[g_X], 0)
    delta[h_X, 1 + j_X] = _deltas(state, f_X, h_X, g_X, swapped)
    may[h_X, 1 + j_X] = state.open_EG[f_X, g] & ~state.on_EG[f_X, g] & _leaves(state, f_X, h_X, g_X)
    price[h_X, 1 + j_X] = state.price_EG[f_X, g] - state.price_EG[f_X, h_X]
    gone = _tables(state, f_X, state.node_G[h_X], none_X, -1)
    delta[h_X, 1 + C + j_X] = _deltas(state, f_X, h_X, none_X, gone)
    may[h_X, 1 + C + j_X] = (state.count_E[f_X] > state.least_E[f_X]) & _leaves(state, f_X, h_X, none_X)
    price[h_X, 1 + C + j_X] = -state.price_EG[f_X, h_X]
    return _Parts(delta, may, price)


def _rates(state: NearState, gain: Any, may: Any, price: Any, seed: int, number: Any) -> Any:
    rate = gain / np.maximum(price, _CHEAP) * noise(seed, number)
    return np.where(may & (gain > 0), rate, 0.0)


def _elsewhere(state: NearState, full: bool, seed: int, g: int, slot_I: Any) -> Any:
    """Rates of moves and more replicas, shape [I, 2, G, 1 + 2 C]."""
    G, C = state.content_GC.shape
    firsts, seconds = _first_parts(state, g, slot_I), _second_parts(state, g)
    now = pressure(state)
    rates = np.zeros((len(slot_I), 2, G, 1 + 2 * C))
    second_may = np.stack([seconds.may, seconds.may])
    second_may[ADD, :, 1 : 1 + C] = False
    if full:
        second_may[MOVE, :, 0] = second_may[MOVE, :, 1 + C :] = False
    if state.left_1[0] <= 0:
        second_may[ADD, :, 0] = False
    for x, i in enumerate(slot_I):
        for first in (MOVE, ADD):
            added = firsts.delta[x, first][:, None, :] + seconds.delta
            gain = now - above(state.carried_G + added - state.room_G, state.slack_G).sum(2)
            may = firsts.may[x, first][:, None] & second_may[first]
            may[:, 1 : 1 + C] &= added[:, 1 : 1 + C, g] < 0
            price = firsts.price[x, first][:, None] + seconds.price
            number = ((i * 2 + first) * G + np.arange(G)[:, None]) * (1 + 2 * C) + np.arange(1 + 2 * C)
            rates[x, first] = _rates(state, gain, may, price, seed, number)
    return rates


def _here(state: NearState, full: bool, seed: int, g: int, slot_I: Any) -> Any:
    """Rates of replicas that leave g, alone or for another expert, shape [I, 1 + E]."""
    G, C = state.content_GC.shape
    E, e_I = len(state.count_E), state.content_GC[g][slot_I]
    g_I, none_I = np.full(len(e_I), g), np.full(len(e_I), -1)
    may_I = ~state.held_EG[e_I, g] & (state.count_E[e_I] > state.least_E[e_I])
    may_I &= _leaves(state, e_I, g_I, none_I)
    rates = np.zeros((len(slot_I), 1 + E))
    if not may_I.any():
        return rates
    left_IG = _deltas(state, e_I, g_I, none_I, _tables(state, e_I, state.node_G[g_I], none_I, -1))
    x_E = np.arange(E)
    g_E, none_E = np.full(E, g), np.full(E, -1)
    come_EG = _deltas(state, x_E, none_E, g_E, _tables(state, x_E, none_E, state.node_G[g_E], 1))
    open_E = ~state.on_EG[:, g] & state.open_EG[:, g] & (state.count_E < state.most_E)
    now = pressure(state)
    for x, i in enumerate(slot_I):
        if not may_I[x]:
            continue
        added = left_IG[x] + np.concatenate([np.zeros((1, G), dtype=np.int64), come_EG])
        gain = now - above(state.carried_G + added - state.room_G, state.slack_G).sum(1)
        may = np.concatenate([[not full], open_E & (added[1:, g] < 0)])
        price = np.concatenate([[0], state.price_EG[:, g]]) - state.price_EG[e_I[x], g]
        number = C * 2 * G * (1 + 2 * C) + i * (E + 1) + np.arange(1 + E)
        rates[x] = _rates(state, gain, may, price, seed, number)
    return rates


def best_change(state: NearState, full: bool, seed: int, g: int, row: Any) -> float:
    """The change of GPU g that relieves all GPUs most per move; its rate, 0 if there is none."""
    C = state.content_GC.shape[1]
    slot_I = np.flatnonzero(state.content_GC[g] >= 0)
    if not len(slot_I):
        return 0.0
    away, here = _elsewhere(state, full, seed, g, slot_I), _here(state, full, seed, g, slot_I)
    best = max(float(away.max()), float(here.max()))
    if best <= 0.0:
        return 0.0
    if away.max() == best:
        x, first, h, s = (int(k) for k in np.unravel_index(int(away.argmax()), away.shape))
        second = ALONE if s == 0 else SWAP if s <= C else YIELD
        j = int((state.content_GC[h] < 0).argmax()) if s == 0 else (s - 1) % C
        f = -1 if s == 0 else int(state.content_GC[h, j])
        row[:] = first, second, state.content_GC[g, slot_I[x]], g, slot_I[x], h, j, f
    else:
        x, s = (int(k) for k in np.unravel_index(int(here.argmax()), here.shape))
        second = ALONE if s == 0 else ENTER
        row[:] = DROP, second, state.content_GC[g, slot_I[x]], g, slot_I[x], -1, -1, s - 1
    return best


# -- the search ----------------------------------------------------------------------------------------


def descend(state: NearState, full: bool, seed: int, spent: int, told: Any) -> Any:
    """Relieve the GPU that carries most above its room, by the change that relieves all most per move.

    Returns
    -------
    reached : bool
        Whether no GPU carries more than its room.
    spent : int
        Price of the placement, of which `spent` was the price before.
    """
    G = len(state.node_G)
    change = np.zeros(8, dtype=np.int64)
    tried_G = np.zeros(G, dtype=np.bool_)
    while told[0] == 0:
        hot, most = -1, 0
        for g in range(G):
            over = state.carried_G[g] - state.room_G[g]
            if over > most and not tried_G[g]:
                hot, most = g, over
        if hot < 0:
            break
        if best_change(state, full, seed, hot, change) > 0.0:
            spent += make(state, change)
            tried_G[:] = False
        else:
            tried_G[hot] = True
    reached = True
    for g in range(G):
        reached = reached and state.carried_G[g] <= state.room_G[g]
    return reached, spent


def reach(state: NearState, speed_G: Any, search: NearSearch, target: float, most: int, told: Any) -> Any:
    """Reach the wanted time, or the best within reach, with few moves.

    Returns
    -------
    reached : bool
        Whether the time was reached.
    goal : float
        The time that the placement keeps: wanted, or its own.
    spent : int
        Price of the placement.
    """
    start_GC = state.content_GC.copy()
    best_GC = start_GC.copy()
    first = paid(state)
    high, least = slowest(state, speed_G), first
    low = target
    for turn in range(1 + 2 * search.tries):
        if turn > 0 and (told[0] != 0 or high - low < 1e-4 * high):
            break
        # Perturbed descents, then looser times halfway to the best one found.
        wish = target if turn <= search.tries else 0.5 * (low + high)
        seed = turn * 1009 if turn <= search.tries else 0
        state.content_GC[:] = start_GC
        refresh(state, most)
        give_rooms(state, speed_G, wish)
        reached, spent = descend(state, search.full, seed, first, told)
        if reached and turn <= search.tries:
            return True, target, spent
        now = slowest(state, speed_G)
        if now < high:
            high, least = now, spent
            best_GC[:] = state.content_GC
        if not reached:
            low = wish
    state.content_GC[:] = best_GC
    refresh(state, most)
    give_rooms(state, speed_G, high)
    return False, high, least


def put_back(state: NearState, base_GC: Any, g: int) -> None:
    """Make a GPU hold what it held, and those that must follow for no expert to be lost; then `refresh`."""
    G, C = state.content_GC.shape
    back_G = np.zeros(G, dtype=np.bool_)
    back_G[g] = True
    while True:
        count_E = np.zeros(len(state.count_E), dtype=np.int64)
        for h in range(G):
            for c in range(C):
                e = base_GC[h, c] if back_G[h] else state.content_GC[h, c]
                if e >= 0:
                    count_E[e] += 1
        more = False
        for h in range(G):
            for c in range(C):
                e = base_GC[h, c]
                if not back_G[h] and e >= 0 and count_E[e] < state.least_E[e]:
                    back_G[h] = True
                    more = True
        if not more:
            break
    for h in range(G):
        if back_G[h]:
            state.content_GC[h] = base_GC[h]


def shake(
    state: NearState, base_GC: Any, search: NearSearch, spent: int, most: int, seed: int, told: Any
) -> int:
    """Put GPUs back as they were and repair, in rounds, so that less moves. Returns the price."""
    G, C = state.content_GC.shape
    best_GC = state.content_GC.copy()
    word = (seed * 7919 + 12345) % 2147483648
    for turn in range(search.rounds):
        if told[0] != 0 or spent == 0:
            break
        for _ in range(1 + turn % 2):
            word = (word * 1103515245 + 12345) % 2147483648
            first = (word >> 8) % G
            for k in range(G):
                h = (first + k) % G
                moved = False
                for c in range(C):
                    e = state.content_GC[h, c]
                    moved = moved or (e >= 0 and state.price_EG[e, h] > 0)
                if moved:
                    put_back(state, base_GC, h)
                    break
        refresh(state, most)
        reached, now = descend(state, search.full, turn * 31, paid(state), told)
        good = reached and now < spent and state.left_1[0] >= 0
        for e in range(len(state.count_E)):
            good = good and state.count_E[e] <= state.most_E[e] and reaches(state, e)
        if good:
            spent = now
            best_GC[:] = state.content_GC
        else:
            state.content_GC[:] = best_GC
            refresh(state, most)
    state.content_GC[:] = best_GC
    refresh(state, most)
    return spent


class NearLayers(NamedTuple):
    """Many layers to search, arrays as in `NearState` with an axis L or one of length 1 for all alike.

    Attributes
    ----------
    source_LEN, senders_LN, content_LGC, capacity_LG, least_LE, most_LE : arrays of int64
        One row for each layer; the contents are replaced by what is found.
    base_LGC : array of int64, shape [L, G, C]
        What rounds put back.
    live_LGC : array of int64, shape [L, G, C]
        What costs nothing; all experts cost nothing everywhere where `cost_1` is 0.
    cost_1 : array of int64, shape [1]
        Price of a replica that is not live.
    open_LEG, held_LEG : arrays of bool, shape [L or 1, E, G]
        Limits.
    node_G, domain_G : arrays of int64, shape [G]
        Nodes and failure domains, numbers from 0.
    speed_G : array of float, shape [G]
        Speeds, mean 1 in the unit of the loads.
    spread_LE : array of int64, shape [L, E]
        Domains that each expert must reach.
    replicas_L : array of int64, shape [L]
        Replicas that a layer may have.
    seed_L : array of int64, shape [L]
        For the random choices.
    goal_L : array of float, shape [L]
        Times that the layers are to keep; replaced by those that they do.
    price_L : array of int64, shape [L]
        Replaced by what is paid.
    cut_L : array of bool, shape [L]
        Replaced by whether the search was told to stop.
    """

    source_LEN: Any
    senders_LN: Any
    content_LGC: Any
    capacity_LG: Any
    least_LE: Any
    most_LE: Any
    base_LGC: Any
    live_LGC: Any
    cost_1: Any
    open_LEG: Any
    held_LEG: Any
    node_G: Any
    domain_G: Any
    speed_G: Any
    spread_LE: Any
    replicas_L: Any
    seed_L: Any
    goal_L: Any
    price_L: Any
    cut_L: Any


def new_state(layers: NearLayers, x: int) -> NearState:
    """One of the layers, of which nothing is counted yet."""
    _, E, N = layers.source_LEN.shape
    G = len(layers.node_G)
    price_EG = np.full((E, G), layers.cost_1[0], dtype=np.int64)
    for g in range(G):
        for c in range(layers.live_LGC.shape[2]):
            if layers.live_LGC[x, g, c] >= 0:
                price_EG[layers.live_LGC[x, g, c], g] = 0
    return NearState(
        layers.source_LEN[x],
        layers.node_G,
        layers.senders_LN[x],
        layers.content_LGC[x],
        layers.capacity_LG[x],
        np.zeros(G, dtype=np.int64),
        np.zeros(G, dtype=np.int64),
        np.zeros(G, dtype=np.int64),
        price_EG,
        layers.open_LEG[x if len(layers.open_LEG) > 1 else 0],
        layers.held_LEG[x if len(layers.held_LEG) > 1 else 0],
        layers.least_LE[x],
        layers.most_LE[x],
        np.zeros(E, dtype=np.int64),
        np.zeros((E, N), dtype=np.int64),
        np.zeros((E, N), dtype=np.int64),
        np.zeros((E, G), dtype=np.bool_),
        np.zeros((E, G), dtype=np.int64),
        np.zeros(G, dtype=np.int64),
        np.zeros(1, dtype=np.int64),
        layers.domain_G,
        np.zeros((E, layers.domain_G.max() + 1), dtype=np.int64),
        layers.spread_LE[x],
        np.zeros(G, dtype=np.int64),
    )


def search_near(layers: NearLayers, search: NearSearch, first: int, step: int, told: Any) -> None:
    """Search every `step`-th layer from `first` on: to its wanted time, then for fewer moves."""
    for x in range(first, len(layers.source_LEN), step):
        state, most = new_state(layers, x), layers.replicas_L[x]
        refresh(state, most)
        if told[0] != 0:
            layers.cut_L[x] = True
            layers.goal_L[x] = slowest(state, layers.speed_G)
            layers.price_L[x] = paid(state)
            continue
        reached, goal, spent = reach(state, layers.speed_G, search, layers.goal_L[x], most, told)
        layers.cut_L[x] = not reached and told[0] != 0
        if spent > 0 and search.rounds > 0:
            give_rooms(state, layers.speed_G, goal)
            spent = shake(state, layers.base_LGC[x], search, spent, most, layers.seed_L[x], told)
        layers.goal_L[x] = slowest(state, layers.speed_G)
        layers.price_L[x] = spent
