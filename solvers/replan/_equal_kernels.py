"""The compiled form of `equal_state`; importing this module imports Numba.

All of `equal_state` is compiled as it stands but for the choice of the best changes, which runs here
candidate by candidate, with the same numbers in the same order, and leaves out what cannot be among the best.
"""

# mypy: disable-error-code="untyped-decorator"

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit, types, uint64
from numba.extending import intrinsic, overload, register_jitable

from moeless_opt.solvers.replan import equal_state as plain
from moeless_opt.solvers.replan.equal_state import _FREE, _SOFT, ADD, BARRED, DROP, MOVE, SWAP

__all__ = ["search_layers"]

for _function in (
    plain.slowest,
    plain.give_rooms,
    plain.together,
    plain.descend,
    plain.fill_up,
    plain.put_back,
    plain.shake,
    plain.reach,
    plain.new_state,
):
    register_jitable(_function)

_SURELY = 1.0 - 1e-9
_SLOTS = 30  # bits for a slot, or an expert, in the order of changes
_HERE = 4  # comes after the other kinds


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
    return np.float64(cap) < bar * _SURELY * max(np.float64(price), 1.0 / _FREE)


@njit
def _offer(rate_K: Any, order_K: Any, best: Any, rate: Any, order: Any) -> int:  # pragma: no cover
    """Make room for a change among the best; returns its row, -1 where it is not among them.

    Of equal rates the one that comes first in `order` counts.
    """
    k = len(rate_K) - 1
    if rate < rate_K[k] or (rate == rate_K[k] and order > order_K[k]):
        return -1
    while k > 0 and (rate > rate_K[k - 1] or (rate == rate_K[k - 1] and order < order_K[k - 1])):
        rate_K[k] = rate_K[k - 1]
        order_K[k] = order_K[k - 1]
        for i in range(best.shape[1]):
            best[k, i] = best[k - 1, i]
        k -= 1
    rate_K[k] = rate
    order_K[k] = order
    return k


@njit
def _write(
    row: Any, kind: Any, e: Any, h: Any, at: Any, f: Any, g: Any, to: Any, gain: Any, price: Any
) -> None:  # pragma: no cover
    row[0] = kind
    row[1] = e
    row[2] = h
    row[3] = at
    row[4] = f
    row[5] = g
    row[6] = to
    row[7] = gain
    row[8] = price


@njit
def _harm(
    e: Any, g: Any, rise: Any, on_EG: Any, host_KE: Any, hosts: Any, over_G: Any, soft_G: Any
) -> Any:  # pragma: no cover
    """Pressure that GPUs other than `g` gain when each slot of an expert there gets heavier by `rise`."""
    harm = 0
    for k in range(hosts):
        q = host_KE[k, e]
        if q != g:
            harm += _above(over_G[q] + on_EG[e, q] * rise, soft_G[q]) - _above(over_G[q], soft_G[q])
    return harm


@njit
def _needed(state: Any, e: Any, g: Any) -> Any:  # pragma: no cover
    """Whether an expert would reach too few domains without its slot on a GPU."""
    if state.spread_E[e] <= 1 or state.reach_E[e] > state.spread_E[e]:
        return False
    return state.on_EG[e, g] == 1 and state.inside_ED[e, state.domain_G[g]] == 1


@njit
def _astray(state: Any, e: Any, g: Any, to: Any) -> Any:  # pragma: no cover
    """Whether an expert would reach too few domains if its slot went from a GPU to another."""
    there = state.domain_G[to]
    return _needed(state, e, g) and state.domain_G[g] != there and state.inside_ED[e, there] > 0


@njit
def _gather(state: Any, h: Any, over_G: Any, press_G: Any) -> Any:  # pragma: no cover
    """Slots that can take an expert, in rows of the work; returns how many.

    GPU, slot, who yields, pressure there less the harm elsewhere, load over the room without who yields,
    slack, and what is paid back.
    """
    content_GC, on_EG, host_KE, hosts_E = state.content_GC, state.on_EG, state.host_KE, state.hosts_E
    count_E, least_E, piece_E, heavier_E = state.count_E, state.least_E, state.piece_E, state.heavier_E
    held_EG, soft_G, left, capacity_G = state.held_EG, state.slack_G, state.left_1[0], state.capacity_G
    back_GC, work = state.back_GC, state.work_WX
    spread, held = state.facts_3[2] > 0, state.facts_3[1] > 0
    G, C = content_GC.shape
    n = 0
    for g in range(G):
        if g == h:
            continue
        free = False
        for c in range(C):
            f = content_GC[g, c]
            harm = change = 0
            if f < 0:
                if free or c >= capacity_G[g] or left <= 0:
                    continue
                free = True
            else:
                if count_E[f] <= least_E[f]:
                    continue
                if (held and held_EG[f, g]) or (spread and _needed(state, f, g)):
                    continue
                m = on_EG[f, g]
                harm = _harm(f, g, heavier_E[f] - piece_E[f], on_EG, host_KE, hosts_E[f], over_G, soft_G)
                change = (m - 1) * heavier_E[f] - m * piece_E[f]
            work[0, n] = g
            work[1, n] = c
            work[2, n] = f
            work[3, n] = press_G[g] - harm
            work[4, n] = over_G[g] + change
            work[5, n] = soft_G[g]
            work[6, n] = back_GC[g, c]
            n += 1
    return n


@njit
def _any_place(
    n: Any, freed: Any, come: Any, price: Any, bar: Any, base_Y: Any, over_Y: Any, soft_Y: Any, back_Y: Any
) -> Any:  # pragma: no cover
    """Whether a place gains enough for so much load and at least such a price."""
    count = 0
    for y in range(n):
        gain = freed + base_Y[y] - _above(over_Y[y] + come, soft_Y[y])
        count += not _hopeless(gain, price - back_Y[y], bar)
    return count > 0


@njit
def _unheld(price_EG: Any, on_EG: Any, e: Any) -> Any:  # pragma: no cover
    """Whether a GPU could hold an expert for nothing, and does not."""
    count = 0
    for g in range(price_EG.shape[1]):
        count += (price_EG[e, g] == 0) & (on_EG[e, g] == 0)
    return count > 0


@njit
def _try_places(
    state: Any,
    full: Any,
    copies: Any,
    seed: Any,
    h: Any,
    best: Any,
    rate_K: Any,
    order_K: Any,
    over_G: Any,
    press_G: Any,
) -> None:  # pragma: no cover
    content_GC, on_EG, price_EG, open_EG = state.content_GC, state.on_EG, state.price_EG, state.open_EG
    soft_G, spread, back_GC, work = state.slack_G, state.facts_3[2] > 0, state.back_GC, state.work_WX
    piece_E, lighter_E, cheapest = state.piece_E, state.lighter_E, state.facts_3[0]
    C = content_GC.shape[1]
    n = _gather(state, h, over_G, press_G)
    gpu_Y, slot_Y, yields_Y = work[0], work[1], work[2]
    base_Y, over_Y, soft_Y, back_Y = work[3], work[4], work[5], work[6]
    K = len(rate_K) - 1
    for at in range(C):
        e = content_GC[h, at]
        if e < 0 or piece_E[e] == 0:
            continue
        piece, lighter = piece_E[e], lighter_E[e]
        unheld = _unheld(price_EG, on_EG, e)
        for kind in (ADD, MOVE):
            if kind == ADD:
                if state.count_E[e] >= state.most_E[e]:
                    continue
                freed = -_harm(e, -1, lighter - piece, on_EG, state.host_KE, state.hosts_E[e], over_G, soft_G)
                come, paid_back = lighter, 0
            else:
                if full or state.held_EG[e, h]:  # full: it would leave a slot empty
                    continue
                freed = press_G[h] - _above(over_G[h] - piece, soft_G[h])
                come, paid_back = piece, back_GC[h, at]
            least = (0 if unheld else cheapest) - paid_back
            if not copies and not _any_place(
                n, freed, come, least, rate_K[K], base_Y, over_Y, soft_Y, back_Y
            ):
                continue
            for y in range(n):
                g, f = gpu_Y[y], yields_Y[y]
                m = on_EG[e, g]
                over, soft = over_Y[y], soft_Y[y]
                gain = freed + base_Y[y]
                if kind == MOVE or m == 0:
                    gain -= _above(over + come, soft)
                else:
                    gain -= press_G[g] - _above(over_G[g] - m * (piece - lighter), soft)
                    gain -= _above(over + (m + 1) * lighter - m * piece, soft)
                if gain <= 0 or f == e or (m > 0 and not copies) or not open_EG[e, g]:
                    continue
                to = slot_Y[y]
                price = (price_EG[e, g] if m == 0 else 0) - back_Y[y] - paid_back
                if _hopeless(gain, price, rate_K[K]):
                    continue
                if spread and kind == MOVE and _astray(state, e, h, g):
                    continue
                rate = _rate(gain, price)
                if rate >= rate_K[K]:
                    order = ((kind * C + at) << _SLOTS) + g * C + to
                    rate = rate * _noise(seed, e * 4 + kind, g * C + to)
                    k = _offer(rate_K, order_K, best, rate, order)
                    if k >= 0:
                        _write(best[k], kind, e, h, at, f, g, to, gain, price)


@njit
def _arrivals(state: Any, copies: Any, h: Any, arrive_E: Any) -> None:  # pragma: no cover
    """What it costs that each expert comes to a GPU; barred where it must not."""
    arrive_GE = state.arrive_GE
    for e in range(arrive_GE.shape[1]):
        arrive_E[e] = arrive_GE[h, e]
    for c in range(state.content_GC.shape[1]):
        f = state.content_GC[h, c]
        if f >= 0:
            arrive_E[f] = 0 if copies and arrive_E[f] < BARRED else BARRED


@njit
def _spread_out(state: Any, h: Any, over_G: Any, press_G: Any) -> Any:  # pragma: no cover
    """Slots of other GPUs, in rows of the work; returns whether one comes cheaper than any price.

    Load of its expert (without end where it must not come), its price at the hot GPU; load over the room of
    its GPU, slack, pressure.
    """
    content_GC, held_EG, back_GC, piece_E = state.content_GC, state.held_EG, state.back_GC, state.piece_E
    work, soft_G, cheapest = state.work_WX, state.slack_G, state.facts_3[0]
    arrive_E = work[7]
    spread, held = state.facts_3[2] > 0, state.facts_3[1] > 0
    G, C = content_GC.shape
    cheap = 0
    for g in range(G):
        over, soft, press = over_G[g], soft_G[g], press_G[g]
        for c in range(C):
            s, f = g * C + c, content_GC[g, c]
            piece = far = BARRED
            barred = f < 0 or g == h or arrive_E[f] == BARRED
            barred = barred or (held and held_EG[f, g]) or (spread and _astray(state, f, g, h))
            if not barred:
                piece, far = piece_E[f], arrive_E[f] - back_GC[g, c]
            work[0, s] = piece
            work[1, s] = far
            work[2, s] = over
            work[3, s] = soft
            work[4, s] = press
            cheap += far < cheapest
    return cheap > 0


@njit
def _any_swap(
    n: Any, piece: Any, over: Any, soft: Any, press: Any, price: Any, bar: Any, work: Any
) -> Any:  # pragma: no cover
    """Whether an exchange of a hot GPU's expert for that of a slot gains enough."""
    piece_S, far_S, over_S, soft_S, press_S = work[0], work[1], work[2], work[3], work[4]
    count = 0
    for s in range(n):
        shift = max(piece - piece_S[s], 0)
        gain = press - _above(over - shift, soft) + press_S[s] - _above(over_S[s] + shift, soft_S[s])
        count += not _hopeless(gain, price + far_S[s], bar)
    return count > 0


@njit
def _try_swaps(
    state: Any,
    copies: Any,
    seed: Any,
    h: Any,
    best: Any,
    rate_K: Any,
    order_K: Any,
    over_G: Any,
    press_G: Any,
) -> None:  # pragma: no cover
    content_GC, on_EG, price_EG, open_EG = state.content_GC, state.on_EG, state.price_EG, state.open_EG
    piece_E, held_EG, cheapest, work = state.piece_E, state.held_EG, state.facts_3[0], state.work_WX
    spread = state.facts_3[2] > 0
    G, C = content_GC.shape
    K = len(rate_K) - 1
    over_h, soft_h, before_h = over_G[h], state.slack_G[h], press_G[h]
    cheap = _spread_out(state, h, over_G, press_G)
    piece_S, far_S, over_S, soft_S, press_S = work[0], work[1], work[2], work[3], work[4]
    for at in range(C):
        e = content_GC[h, at]
        if e < 0 or piece_E[e] == 0 or held_EG[e, h]:
            continue
        piece, paid_back = piece_E[e], state.back_GC[h, at]
        least = (0 if copies or _unheld(price_EG, on_EG, e) else cheapest) - paid_back
        cap = before_h - _above(over_h - piece, soft_h)
        if not cheap and _hopeless(cap, least + cheapest, rate_K[K]):
            continue
        if not _any_swap(G * C, piece, over_h, soft_h, before_h, least, rate_K[K], work):
            continue
        for s in range(G * C):
            shift = piece - piece_S[s]
            if shift <= 0:
                continue
            gain = before_h + press_S[s] - _above(over_h - shift, soft_h)
            gain -= _above(over_S[s] + shift, soft_S[s])
            if gain <= 0 or _hopeless(gain, least + far_S[s], rate_K[K]):
                continue
            g, c = s // C, s % C
            m = on_EG[e, g]
            if (m > 0 and not copies) or not open_EG[e, g]:
                continue
            price = (price_EG[e, g] if m == 0 else 0) - paid_back + far_S[s]
            if _hopeless(gain, price, rate_K[K]) or (spread and _astray(state, e, h, g)):
                continue
            rate = _rate(gain, price)
            if rate >= rate_K[K]:
                order = ((SWAP * C + at) << _SLOTS) + s
                rate = rate * _noise(seed, e * 4 + SWAP, s)
                k = _offer(rate_K, order_K, best, rate, order)
                if k >= 0:
                    _write(best[k], SWAP, e, h, at, content_GC[g, c], g, c, gain, price)


@njit
def _reliefs(state: Any, copies: Any, h: Any, over_G: Any, press_G: Any, relief_E: Any) -> None:
    """What GPUs other than the hot one lose of their pressure by another slot of each expert."""
    on_EG, host_KE, hosts_E, soft_G = state.on_EG, state.host_KE, state.hosts_E, state.slack_G
    piece_E, lighter_E = state.piece_E, state.lighter_E
    E = len(piece_E)
    if copies:
        for x in range(E):
            rise = lighter_E[x] - piece_E[x]
            relief_E[x] = -_harm(x, h, rise, on_EG, host_KE, hosts_E[x], over_G, soft_G)
        return
    for x in range(E):
        q = host_KE[0, x]
        relief_E[x] = press_G[q] - _above(over_G[q] + lighter_E[x] - piece_E[x], soft_G[q])
    for x in range(E):
        if hosts_E[x] != 1 or host_KE[0, x] == h:
            rise = lighter_E[x] - piece_E[x]
            relief_E[x] = -_harm(x, h, rise, on_EG, host_KE, hosts_E[x], over_G, soft_G)


@njit
def _any_comer(
    cap: Any, over: Any, soft: Any, back: Any, bar: Any, relief_E: Any, lighter_E: Any, arrive_E: Any
) -> Any:  # pragma: no cover
    """Whether an expert gains enough on a GPU."""
    count = 0
    for x in range(len(lighter_E)):
        gain = relief_E[x] + cap - _above(over + lighter_E[x], soft)
        count += not _hopeless(gain, arrive_E[x] - back, bar)
    return count > 0


@njit
def _try_here(
    state: Any,
    full: Any,
    copies: Any,
    seed: Any,
    h: Any,
    best: Any,
    rate_K: Any,
    order_K: Any,
    over_G: Any,
    press_G: Any,
) -> None:  # pragma: no cover
    content_GC, on_EG = state.content_GC, state.on_EG
    piece_E, lighter_E, heavier_E = state.piece_E, state.lighter_E, state.heavier_E
    count_E, most_E, host_KE, hosts_E = state.count_E, state.most_E, state.host_KE, state.hosts_E
    soft_G = state.slack_G
    arrive_E, relief_E = state.work_WX[7], state.work_WX[8]
    C, E = content_GC.shape[1], len(piece_E)
    K = len(rate_K) - 1
    over_h, soft_h, before = over_G[h], soft_G[h], press_G[h]
    known = False
    for at in range(C):
        e = content_GC[h, at]
        if e < 0 or piece_E[e] == 0 or count_E[e] <= state.least_E[e] or state.held_EG[e, h]:
            continue
        if _needed(state, e, h):
            continue
        harm = _harm(e, h, heavier_E[e] - piece_E[e], on_EG, host_KE, hosts_E[e], over_G, soft_G)
        m = on_EG[e, h]
        change = (m - 1) * heavier_E[e] - m * piece_E[e]
        paid_back = state.back_GC[h, at]
        target = h * C + at
        gain = before - _above(over_h + change, soft_h) - harm
        if gain > 0 and not full:
            rate = _rate(gain, -paid_back) * _noise(seed, e * 4 + DROP, target)
            k = _offer(rate_K, order_K, best, rate, (DROP * C + at) << _SLOTS)
            if k >= 0:
                _write(best[k], DROP, e, h, at, -1, h, at, gain, -paid_back)
        if not known:
            _reliefs(state, copies, h, over_G, press_G, relief_E)
            known = True
        cap, over = before - harm, over_h + change
        if not copies and not _any_comer(
            cap, over, soft_h, paid_back, rate_K[K], relief_E, lighter_E, arrive_E
        ):
            continue
        for x in range(E):
            arrive = arrive_E[x]
            n = on_EG[x, h] if arrive == 0 else 0
            gain = relief_E[x] + cap - _above(over + (n + 1) * lighter_E[x] - n * piece_E[x], soft_h)
            price = arrive - paid_back
            if gain <= 0 or arrive == BARRED or _hopeless(gain, price, rate_K[K]):
                continue
            if x == e or count_E[x] >= most_E[x]:
                continue
            rate = _rate(gain, price)
            if rate >= rate_K[K]:
                order = ((_HERE * C + at) << _SLOTS) + x
                rate = rate * _noise(seed, x * 4 + DROP, target)
                k = _offer(rate_K, order_K, best, rate, order)
                if k >= 0:
                    _write(best[k], ADD, x, h, at, e, h, at, gain, price)


@njit
def _note(state: Any, n: Any, comes: Any, x: Any, g: Any, c: Any) -> Any:  # pragma: no cover
    """Write down that an expert comes to a slot or goes; returns how many such steps there are."""
    step = state.steps_X4[n]
    step[0] = comes
    step[1] = x
    step[2] = g
    step[3] = c
    return n + 1


@njit
def _run(state: Any, n: Any) -> Any:  # pragma: no cover
    """Run the steps that are written down; returns their price."""
    content_GC, on_EG, host_KE, hosts_E = state.content_GC, state.on_EG, state.host_KE, state.hosts_E
    load_E, count_E, piece_E, price_EG = state.load_E, state.count_E, state.piece_E, state.price_EG
    lighter_E, heavier_E, carried_G = state.lighter_E, state.heavier_E, state.carried_G
    domain_G, inside_ED, reach_E, left_1 = state.domain_G, state.inside_ED, state.reach_E, state.left_1
    back_GC, steps_X4 = state.back_GC, state.steps_X4
    price = 0
    for i in range(n):
        comes, x, g, c = steps_X4[i, 0], steps_X4[i, 1], steps_X4[i, 2], steps_X4[i, 3]
        before, count, on = piece_E[x], count_E[x], on_EG[x, g]
        if comes > 0:
            count_E[x] = count + 1
            piece_E[x] = lighter_E[x]
            heavier_E[x] = before
            lighter_E[x] = load_E[x] // (count + 2)
            for k in range(hosts_E[x]):
                q = host_KE[k, x]
                carried_G[q] += on_EG[x, q] * (piece_E[x] - before)
            carried_G[g] += piece_E[x]
            if on == 0:
                price += price_EG[x, g]
                host_KE[hosts_E[x], x] = g
                hosts_E[x] += 1
                inside_ED[x, domain_G[g]] += 1
                if inside_ED[x, domain_G[g]] == 1:
                    reach_E[x] += 1
            on += 1
            content_GC[g, c] = x
            back_GC[g, c] = price_EG[x, g] if on == 1 else 0
            left_1[0] -= 1
        else:
            on -= 1
            carried_G[g] -= before
            if on == 0:
                price -= price_EG[x, g]
                last = hosts_E[x] - 1
                for k in range(last):
                    if host_KE[k, x] == g:
                        host_KE[k, x] = host_KE[last, x]
                        break
                hosts_E[x] = last
                inside_ED[x, domain_G[g]] -= 1
                if inside_ED[x, domain_G[g]] == 0:
                    reach_E[x] -= 1
            on_EG[x, g] = on
            count_E[x] = count - 1
            lighter_E[x] = before if count > 1 else load_E[x]
            piece_E[x] = heavier_E[x]
            heavier_E[x] = load_E[x] // (count - 2) if count > 2 else 0
            for k in range(hosts_E[x]):
                q = host_KE[k, x]
                carried_G[q] += on_EG[x, q] * (piece_E[x] - before)
            content_GC[g, c] = -1
            back_GC[g, c] = 0
            left_1[0] += 1
        on_EG[x, g] = on
        if on + 1 - comes > 0 and on < 3:  # there are other slots: one alone pays back, of two none
            for q in range(content_GC.shape[1]):
                if content_GC[g, q] == x:
                    back_GC[g, q] = price_EG[x, g] if on == 1 else 0
    return price


@overload(plain.make)
def _make(state: Any, change: Any) -> Any:
    def make(state: Any, change: Any) -> Any:  # pragma: no cover
        kind, e, h, at = change[0], change[1], change[2], change[3]
        f, g, to = change[4], change[5], change[6]
        n = 0
        if kind != ADD:
            n = _note(state, n, 0, e, h, at)
        if f >= 0:
            n = _note(state, n, 0, f, g, to)
        if kind != DROP:
            n = _note(state, n, 1, e, g, to)
        if kind == SWAP:
            n = _note(state, n, 1, f, h, at)
        return _run(state, n)

    return make


@overload(plain.unmake)
def _unmake(state: Any, change: Any) -> Any:
    def unmake(state: Any, change: Any) -> None:  # pragma: no cover
        kind, e, h, at = change[0], change[1], change[2], change[3]
        f, g, to = change[4], change[5], change[6]
        n = 0
        if kind == SWAP:
            n = _note(state, n, 0, f, h, at)
        if kind != DROP:
            n = _note(state, n, 0, e, g, to)
        if f >= 0:
            n = _note(state, n, 1, f, g, to)
        if kind != ADD:
            n = _note(state, n, 1, e, h, at)
        _run(state, n)

    return unmake


@overload(plain.bring)
def _bring(state: Any, start_GC: Any, chosen_G: Any, best_GC: Any, most: int) -> Any:
    def bring(state: Any, start_GC: Any, chosen_G: Any, best_GC: Any, most: int) -> None:  # pragma: no cover
        content_GC = state.content_GC
        G, C = content_GC.shape
        n = 0
        for g in range(G):
            for c in range(C):
                wanted = start_GC[g, c] if chosen_G[g] else best_GC[g, c]
                if content_GC[g, c] != wanted and content_GC[g, c] >= 0:
                    n = _note(state, n, 0, content_GC[g, c], g, c)
        for g in range(G):
            for c in range(C):
                wanted = start_GC[g, c] if chosen_G[g] else best_GC[g, c]
                if content_GC[g, c] != wanted and wanted >= 0:
                    n = _note(state, n, 1, wanted, g, c)
        _run(state, n)

    return bring


@overload(plain.refresh)
def _refresh(state: Any, most: int) -> Any:
    def refresh(state: Any, most: int) -> None:  # pragma: no cover
        content_GC, on_EG, host_KE, hosts_E = state.content_GC, state.on_EG, state.host_KE, state.hosts_E
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
                        host_KE[hosts_E[e], e] = g
                        hosts_E[e] += 1
                        state.inside_ED[e, state.domain_G[g]] += 1
                        if state.inside_ED[e, state.domain_G[g]] == 1:
                            state.reach_E[e] += 1
                    on_EG[e, g] += 1
                    count_E[e] += 1
                    used += 1
        load_E = state.load_E
        for e in range(len(count_E)):
            n = count_E[e]
            piece_E[e] = load_E[e] // n if n > 0 else 0
            state.lighter_E[e] = load_E[e] // (n + 1)
            state.heavier_E[e] = load_E[e] // (n - 1) if n > 1 else 0
        for g in range(G):
            for c in range(C):
                e = content_GC[g, c]
                if e >= 0:
                    carried_G[g] += piece_E[e]
                    state.back_GC[g, c] = state.price_EG[e, g] if on_EG[e, g] == 1 else 0
                else:
                    state.back_GC[g, c] = 0
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
                total += state.price_EG[e, state.host_KE[k, e]]
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
        order_K = np.zeros(len(best), dtype=np.int64)
        press_G = np.empty_like(over_G)
        for g in range(len(over_G)):
            press_G[g] = _above(over_G[g], state.slack_G[g])
        copies, full = search.copies, search.full
        _arrivals(state, copies, h, state.work_WX[7])
        _try_here(state, full, copies, seed, h, best, rate_K, order_K, over_G, press_G)
        _try_places(state, full, copies, seed, h, best, rate_K, order_K, over_G, press_G)
        _try_swaps(state, copies, seed, h, best, rate_K, order_K, over_G, press_G)
        found = 0
        while found < len(rate_K) and rate_K[found] > 0.0:
            found += 1
        return found

    return best_changes


@intrinsic
def _count(context: Any, array: Any, at: Any, by: Any) -> Any:
    """Add to an entry of an array of int64, alone; returns what was there."""

    def make(context: Any, builder: Any, _: Any, values: Any) -> Any:
        view = context.make_array(array)(context, builder, values[0])
        place = builder.gep(view.data, [values[1]])
        return builder.atomic_rmw("add", place, values[2], "seq_cst")

    return types.int64(array, types.int64, types.int64), make


@overload(plain.take)
def _take(turns_2: Any, at: int) -> Any:
    def take(turns_2: Any, at: int) -> Any:  # pragma: no cover
        return _count(turns_2, at, 1)

    return take


@overload(plain.await_others)
def _await_others(turns_2: Any, count: int) -> Any:
    def await_others(turns_2: Any, count: int) -> None:  # pragma: no cover
        while _count(turns_2, 1, 0) < count:
            pass

    return await_others


register_jitable(plain.search_layer)
register_jitable(plain.search_layers)


def _search_layers(
    layers: Any, search: Any, task: Any, turns_2: Any, told: Any, waits: Any
) -> None:  # pragma: no cover
    plain.search_layers(layers, search, task, turns_2, told, waits)


# Numba looks at one file alone to tell whether cached code is stale: the name of this one tells of both.
_search_layers.__qualname__ = plain.compiled_name()
search_layers = njit(cache=True, nogil=True)(_search_layers)
