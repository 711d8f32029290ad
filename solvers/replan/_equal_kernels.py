"""The compiled form of `equal_state`; importing this module imports Numba.

All of `equal_state` is compiled as it stands but for the choice of the best changes, which runs here
candidate by candidate, with the same numbers in the same order, and leaves out what cannot be among the best.
"""

# mypy: disable-error-code="untyped-decorator"

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit, uint64
from numba.extending import overload, register_jitable

from moeless_opt.solvers.replan import equal_state as plain
from moeless_opt.solvers.replan.equal_state import _FREE, _SOFT, ADD, DROP, MOVE, SWAP

__all__ = ["search_layers"]

for _function in (
    plain.recount,
    plain._shift,
    plain.place,
    plain.remove,
    plain.enter,
    plain.leave,
    plain.make,
    plain.unmake,
    plain.slowest,
    plain.give_rooms,
    plain.descend,
    plain.fill_up,
    plain.put_back,
    plain.shake,
    plain.reach,
    plain.new_state,
):
    register_jitable(_function)

_SURELY = 1.0 - 1e-9


@njit
def _scrambled(word: Any) -> Any:  # pragma: no cover
    word = word + uint64(0x9E3779B97F4A7C15)
    word = (word ^ (word >> uint64(30))) * uint64(0xBF58476D1CE4E5B9)
    word = (word ^ (word >> uint64(27))) * uint64(0x94D049BB133111EB)
    return word ^ (word >> uint64(31))


@overload(plain.draw)
def _draw(word_1: Any, below: int) -> Any:
    def draw(word_1: Any, below: int) -> Any:  # pragma: no cover
        word_1[0] = _scrambled(word_1[0])
        return np.int64((word_1[0] >> uint64(11)) % uint64(below))

    return draw


@njit
def _noise(seed: Any, first: Any, second: Any) -> Any:  # pragma: no cover
    if seed == 0:
        return 1.0
    word = _scrambled(
        uint64(seed)
        + (uint64(first) * uint64(0x2545F4914F6CDD1D) + uint64(second) * uint64(0xD1342543DE82EF95))
    )
    return 0.6 + 0.4 * (np.float64(word >> uint64(11)) / 9007199254740992.0)


@njit
def _above(over: Any, slack: Any) -> Any:  # pragma: no cover
    soft = over + slack
    return max(over, 0) + (max(soft, 0) >> _SOFT)


@njit
def _rate(gain: Any, price: Any) -> Any:  # pragma: no cover
    return np.float64(gain) / np.float64(price) if price > 0 else np.float64(gain) * _FREE


@njit
def _hopeless(cap: Any, price: Any, bar: Any) -> Any:  # pragma: no cover
    """Whether a gain of at most `cap` cannot rank above `bar`."""
    return price > 0 and np.float64(cap) < bar * np.float64(price) * _SURELY


@njit
def _offer(
    rate_K: Any, best: Any, rate: Any, kind: Any, e: Any, h: Any, at: Any, f: Any, g: Any, to: Any
) -> None:  # pragma: no cover
    k = len(rate_K) - 1
    while k > 0 and rate > rate_K[k - 1]:
        rate_K[k] = rate_K[k - 1]
        best[k] = best[k - 1]
        k -= 1
    rate_K[k] = rate
    best[k, 0] = kind
    best[k, 1] = e
    best[k, 2] = h
    best[k, 3] = at
    best[k, 4] = f
    best[k, 5] = g
    best[k, 6] = to


@njit
def _harm(
    e: Any, g: Any, rise: Any, on_EG: Any, host_EK: Any, hosts: Any, over_G: Any, soft_G: Any
) -> Any:  # pragma: no cover
    """Pressure that GPUs other than `g` gain when each slot of an expert there gets heavier by `rise`."""
    harm = 0
    for k in range(hosts):
        q = host_EK[e, k]
        if q != g:
            harm += _above(over_G[q] + on_EG[e, q] * rise, soft_G[q]) - _above(over_G[q], soft_G[q])
    return harm


@njit
def _needed(state: Any, e: Any, g: Any) -> Any:  # pragma: no cover
    """Whether an expert would reach too few domains without its slot on a GPU."""
    if state.spread_1[0] <= 1 or state.reach_E[e] > state.spread_1[0]:
        return False
    return state.on_EG[e, g] == 1 and state.inside_ED[e, state.domain_G[g]] == 1


@njit
def _astray(state: Any, e: Any, g: Any, to: Any) -> Any:  # pragma: no cover
    """Whether an expert would reach too few domains if its slot went from a GPU to another."""
    there = state.domain_G[to]
    return _needed(state, e, g) and state.domain_G[g] != there and state.inside_ED[e, there] > 0


@njit
def _refunds(state: Any, refund_GC: Any) -> None:  # pragma: no cover
    """What it pays back to empty each slot."""
    content_GC, on_EG, price_EG = state.content_GC, state.on_EG, state.price_EG
    G, C = content_GC.shape
    for g in range(G):
        for c in range(C):
            e = content_GC[g, c]
            refund_GC[g, c] = price_EG[e, g] if e >= 0 and on_EG[e, g] == 1 else 0


@njit
def _gather(state: Any, over_G: Any, refund_GC: Any, figure_YK: Any) -> Any:  # pragma: no cover
    """Slots that can take an expert: GPU, slot, who yields, harm elsewhere, change of the GPU, refund."""
    content_GC, on_EG, host_EK, hosts_E = state.content_GC, state.on_EG, state.host_EK, state.hosts_E
    count_E, least_E, piece_E, heavier_E = state.count_E, state.least_E, state.piece_E, state.heavier_E
    held_EG, soft_G, left, capacity_G = state.held_EG, state.slack_G, state.left_1[0], state.capacity_G
    spread = state.spread_1[0] > 1
    G, C = content_GC.shape
    n = 0
    for g in range(G):
        free = False
        for c in range(C):
            f = content_GC[g, c]
            harm = change = 0
            if f < 0:
                if free or c >= capacity_G[g] or left <= 0:
                    continue
                free = True
            else:
                if count_E[f] <= least_E[f] or held_EG[f, g] or (spread and _needed(state, f, g)):
                    continue
                m = on_EG[f, g]
                harm = _harm(f, g, heavier_E[f] - piece_E[f], on_EG, host_EK, hosts_E[f], over_G, soft_G)
                change = (m - 1) * heavier_E[f] - m * piece_E[f]
            figure_YK[n, 0] = g
            figure_YK[n, 1] = c
            figure_YK[n, 2] = f
            figure_YK[n, 3] = harm
            figure_YK[n, 4] = change
            figure_YK[n, 5] = refund_GC[g, c]
            n += 1
    return n


@njit
def _try_places(
    state: Any, full: Any, copies: Any, seed: Any, h: Any, best: Any, rate_K: Any, over_G: Any, refund_GC: Any
) -> None:  # pragma: no cover
    content_GC, on_EG, price_EG, open_EG = state.content_GC, state.on_EG, state.price_EG, state.open_EG
    soft_G, spread = state.slack_G, state.spread_1[0] > 1
    G, C = content_GC.shape
    figure_YK = np.empty((G * C, 6), dtype=np.int64)
    n = _gather(state, over_G, refund_GC, figure_YK)
    K = len(rate_K) - 1
    for kind in (ADD, MOVE):
        for at in range(C):
            e = content_GC[h, at]
            if e < 0 or state.piece_E[e] == 0:
                continue
            piece, lighter = state.piece_E[e], state.lighter_E[e]
            if kind == ADD:
                if state.count_E[e] >= state.most_E[e]:
                    continue
                hosts = state.hosts_E[e]
                freed = -_harm(e, -1, lighter - piece, on_EG, state.host_EK, hosts, over_G, soft_G)
                paid_back = 0
            else:
                if full or state.held_EG[e, h]:  # full: it would leave a slot empty
                    continue
                freed = _above(over_G[h], soft_G[h]) - _above(over_G[h] - piece, soft_G[h])
                paid_back = refund_GC[h, at]
            for y in range(n):
                g = figure_YK[y, 0]
                if g == h:
                    continue
                over, soft = over_G[g], soft_G[g]
                before = _above(over, soft)
                m = on_EG[e, g]
                price = (price_EG[e, g] if m == 0 else 0) - figure_YK[y, 5] - paid_back
                if _hopeless(freed + before - figure_YK[y, 3], price, rate_K[K]):
                    continue
                if figure_YK[y, 2] == e or (m > 0 and not copies) or not open_EG[e, g]:
                    continue
                if spread and kind == MOVE and _astray(state, e, h, g):
                    continue
                gain = freed - figure_YK[y, 3] + before
                if kind == ADD:
                    if m > 0:
                        gain -= before - _above(over - m * (piece - lighter), soft)
                    gain -= _above(over + figure_YK[y, 4] + (m + 1) * lighter - m * piece, soft)
                else:
                    gain -= _above(over + figure_YK[y, 4] + piece, soft)
                if gain > 0:
                    rate = _rate(gain, price)
                    if rate > rate_K[K]:
                        to = figure_YK[y, 1]
                        rate = rate * _noise(seed, e * 4 + kind, g * C + to)
                        if rate > rate_K[K]:
                            _offer(rate_K, best, rate, kind, e, h, at, figure_YK[y, 2], g, to)


@njit
def _try_swaps(
    state: Any, copies: Any, seed: Any, h: Any, best: Any, rate_K: Any, over_G: Any, refund_GC: Any
) -> None:  # pragma: no cover
    content_GC, on_EG, price_EG, open_EG = state.content_GC, state.on_EG, state.price_EG, state.open_EG
    piece_E, held_EG, soft_G = state.piece_E, state.held_EG, state.slack_G
    spread = state.spread_1[0] > 1
    G, C = content_GC.shape
    K = len(rate_K) - 1
    over_h, soft_h = over_G[h], soft_G[h]
    # What it costs that the expert of each slot goes to the hot GPU, and its load; barred where it must not.
    barred = np.int64(1) << 60
    far_GC = np.empty((G, C), dtype=np.int64)
    piece_GC = np.empty((G, C), dtype=np.int64)
    for g in range(G):
        for c in range(C):
            f = content_GC[g, c]
            if g == h or f < 0 or not open_EG[f, h] or held_EG[f, g]:
                far_GC[g, c] = barred
                continue
            if spread and _astray(state, f, g, h):
                far_GC[g, c] = barred
                continue
            piece_GC[g, c] = piece_E[f]
            if on_EG[f, h] > 0:
                far_GC[g, c] = -refund_GC[g, c] if copies else barred
            else:
                far_GC[g, c] = price_EG[f, h] - refund_GC[g, c]
    before_h = _above(over_h, soft_h)
    for at in range(C):
        e = content_GC[h, at]
        if e < 0 or piece_E[e] == 0 or held_EG[e, h]:
            continue
        piece = piece_E[e]
        cap = before_h - _above(over_h - piece, soft_h)
        paid_back = refund_GC[h, at]
        for g in range(G):
            m = on_EG[e, g]
            if g == h or (m > 0 and not copies) or not open_EG[e, g]:
                continue
            if spread and _astray(state, e, h, g):
                continue
            over, soft = over_G[g], soft_G[g]
            come = (price_EG[e, g] if m == 0 else 0) - paid_back
            before = before_h + _above(over, soft)
            for c in range(C):
                price = come + far_GC[g, c]
                if _hopeless(cap, price, rate_K[K]) or far_GC[g, c] == barred:
                    continue
                shift = piece - piece_GC[g, c]
                if shift <= 0:
                    continue
                gain = before - _above(over_h - shift, soft_h) - _above(over + shift, soft)
                if gain > 0:
                    rate = _rate(gain, price)
                    if rate > rate_K[K]:
                        rate = rate * _noise(seed, e * 4 + SWAP, g * C + c)
                        if rate > rate_K[K]:
                            _offer(rate_K, best, rate, SWAP, e, h, at, content_GC[g, c], g, c)


@njit
def _try_here(
    state: Any, full: Any, copies: Any, seed: Any, h: Any, best: Any, rate_K: Any, over_G: Any, refund_GC: Any
) -> None:  # pragma: no cover
    content_GC, on_EG, price_EG, open_EG = state.content_GC, state.on_EG, state.price_EG, state.open_EG
    piece_E, lighter_E, heavier_E = state.piece_E, state.lighter_E, state.heavier_E
    count_E, most_E, host_EK, hosts_E = state.count_E, state.most_E, state.host_EK, state.hosts_E
    soft_G = state.slack_G
    C, E = content_GC.shape[1], len(piece_E)
    K = len(rate_K) - 1
    over_h, soft_h = over_G[h], soft_G[h]
    before = _above(over_h, soft_h)
    relief_E = np.empty(E, dtype=np.int64)
    known = False
    for kind in (DROP, ADD):
        if kind == DROP and full:
            continue
        for at in range(C):
            e = content_GC[h, at]
            if e < 0 or piece_E[e] == 0 or count_E[e] <= state.least_E[e] or state.held_EG[e, h]:
                continue
            if _needed(state, e, h):
                continue
            harm = _harm(e, h, heavier_E[e] - piece_E[e], on_EG, host_EK, hosts_E[e], over_G, soft_G)
            m = on_EG[e, h]
            change = (m - 1) * heavier_E[e] - m * piece_E[e]
            paid_back = refund_GC[h, at]
            target = h * C + at
            if kind == DROP:
                gain = before - _above(over_h + change, soft_h) - harm
                if gain > 0:
                    rate = _rate(gain, -paid_back) * _noise(seed, e * 4 + DROP, target)
                    if rate > rate_K[K]:
                        _offer(rate_K, best, rate, DROP, e, h, at, -1, h, at)
                continue
            if not known:
                for x in range(E):
                    rise = lighter_E[x] - piece_E[x]
                    relief_E[x] = -_harm(x, h, rise, on_EG, host_EK, hosts_E[x], over_G, soft_G)
                known = True
            for x in range(E):
                n = on_EG[x, h]
                price = (price_EG[x, h] if n == 0 else 0) - paid_back
                cap = relief_E[x] + before - harm
                if cap <= 0 or _hopeless(cap, price, rate_K[K]):
                    continue
                if x == e or (n > 0 and not copies) or not open_EG[x, h] or count_E[x] >= most_E[x]:
                    continue
                gain = cap - _above(over_h + change + (n + 1) * lighter_E[x] - n * piece_E[x], soft_h)
                if gain > 0:
                    rate = _rate(gain, price)
                    if rate > rate_K[K]:
                        rate = rate * _noise(seed, x * 4 + DROP, target)
                        if rate > rate_K[K]:
                            _offer(rate_K, best, rate, ADD, x, h, at, e, h, at)


@overload(plain.refresh)
def _refresh(state: Any, most: int) -> Any:
    def refresh(state: Any, most: int) -> None:  # pragma: no cover
        content_GC, on_EG, host_EK, hosts_E = state.content_GC, state.on_EG, state.host_EK, state.hosts_E
        count_E, piece_E, carried_G = state.count_E, state.piece_E, state.carried_G
        G, C = content_GC.shape
        on_EG[:] = 0
        hosts_E[:] = 0
        count_E[:] = 0
        state.inside_ED[:] = 0
        state.reach_E[:] = 0
        carried_G[:] = 0
        used = 0
        for g in range(G):
            for c in range(C):
                e = content_GC[g, c]
                if e >= 0:
                    if on_EG[e, g] == 0:
                        host_EK[e, hosts_E[e]] = g
                        hosts_E[e] += 1
                        state.inside_ED[e, state.domain_G[g]] += 1
                        if state.inside_ED[e, state.domain_G[g]] == 1:
                            state.reach_E[e] += 1
                    on_EG[e, g] += 1
                    count_E[e] += 1
                    used += 1
        for e in range(len(count_E)):
            plain.recount(state, e, count_E[e])
        for g in range(G):
            for c in range(C):
                if content_GC[g, c] >= 0:
                    carried_G[g] += piece_E[content_GC[g, c]]
        state.left_1[0] = most - used

    return refresh


@overload(plain.overflow)
def _overflow(state: Any) -> Any:
    def overflow(state: Any) -> int:  # pragma: no cover
        total = 0
        for g in range(len(state.room_G)):
            total += max(state.carried_G[g] - state.room_G[g], 0)
        return total

    return overflow


@overload(plain.pressure)
def _pressure(state: Any) -> Any:
    def pressure(state: Any) -> int:  # pragma: no cover
        total = 0
        for g in range(len(state.room_G)):
            total += _above(state.carried_G[g] - state.room_G[g], state.slack_G[g])
        return total

    return pressure


@overload(plain.hot_gpus)
def _hot_gpus(state: Any) -> Any:
    def hot_gpus(state: Any) -> int:  # pragma: no cover
        hot = 0
        for g in range(len(state.room_G)):
            if state.carried_G[g] > state.room_G[g]:
                hot += 1
        return hot

    return hot_gpus


@overload(plain.paid)
def _paid(state: Any) -> Any:
    def paid(state: Any) -> int:  # pragma: no cover
        total = 0
        for e in range(len(state.load_E)):
            for k in range(state.hosts_E[e]):
                total += state.price_EG[e, state.host_EK[e, k]]
        return total

    return paid


@overload(plain.best_changes)
def _best_changes(state: Any, search: Any, seed: int, best: Any) -> Any:
    def best_changes(state: Any, search: Any, seed: int, best: Any) -> int:  # pragma: no cover
        rate_K = np.zeros(len(best))
        h = 0
        for g in range(len(state.room_G)):
            if state.carried_G[g] - state.room_G[g] > state.carried_G[h] - state.room_G[h]:
                h = g
        over_G = state.carried_G - state.room_G
        if over_G[h] <= 0:
            return 0
        refund_GC = np.empty(state.content_GC.shape, dtype=np.int64)
        _refunds(state, refund_GC)
        copies, full = search.copies, search.full
        _try_places(state, full, copies, seed, h, best, rate_K, over_G, refund_GC)
        _try_swaps(state, copies, seed, h, best, rate_K, over_G, refund_GC)
        _try_here(state, full, copies, seed, h, best, rate_K, over_G, refund_GC)
        found = 0
        while found < len(rate_K) and rate_K[found] > 0.0:
            found += 1
        return found

    return best_changes


register_jitable(plain.search_layers)


def _search_layers(
    layers: Any, search: Any, task: Any, first: Any, step: Any, told: Any
) -> None:  # pragma: no cover
    plain.search_layers(layers, search, task, first, step, told)


# Numba looks at one file alone to tell whether cached code is stale: the name of this one tells of both.
_search_layers.__qualname__ = plain.compiled_name()
search_layers = njit(cache=True, nogil=True)(_search_layers)
