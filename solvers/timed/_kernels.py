"""The inner loops of `timed`: one source, compiled where Numba is installed, interpreted where it is not.

Both run the same additions and comparisons in the same order, so they give the same plans; the compiled one
is some hundred times sooner.

Axes: E experts, G GPUs, W places in a GPU's list of the experts that it serves, A activated experts (from
0), K knots of the time table.
"""

# mypy: disable-error-code="untyped-decorator, no-any-return"
from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

try:
    from numba import njit
except ImportError:  # the extra "fast" is not installed

    def njit(**_options: Any) -> Callable[[Any], Any]:
        """Leave the function as it is."""
        return lambda function: function


__all__ = ["Costs", "reserve", "rows"]

TRIES = 8
CLOSE = 1e-4
TINY = 1e-9
STEPS = 1000
ASKED = 8
SMALL = 128


class Costs(NamedTuple):
    """What time things take, for all layers alike.

    speed_G: relative speeds; load_G: seconds until a GPU has loaded a replica; may_load: whether any may be;
    knot_K, table_AK: the time table; halt: one number that another thread sets to end all searches.
    """

    speed_G: Any
    load_G: Any
    may_load: bool
    knot_K: Any
    table_AK: Any
    halt: Any


class State(NamedTuple):
    """A layer while it is searched: what is given, what is served now, and the best so far.

    Parameters
    ----------
    held_EG : bool, shape [E, G]
        Where a replica is held.
    room_G : int, shape [G]
        How many experts a GPU may serve.
    lead, price : float
        Time in which loading is hidden, and what a load must save at least.
    y_EG : float, shape [E, G]
        Tokens that are served.
    on_GW, a_G : int, shapes [G, W], [G]
        The experts that a GPU serves, and how many they are.
    n_G, t_G : float, shape [G]
        Tokens and time of a GPU.
    new_G : int, shape [G]
        Replicas that a GPU must load.
    best_on_GW, best_y_GW, best_a_G : int, float, int; shapes [G, W], [G, W], [G]
        The best so far, GPU by GPU.
    """

    held_EG: Any
    room_G: Any
    lead: float
    price: float
    y_EG: Any
    on_GW: Any
    a_G: Any
    n_G: Any
    t_G: Any
    new_G: Any
    best_on_GW: Any
    best_y_GW: Any
    best_a_G: Any


@njit(cache=True)
def seconds(tokens: float, used: int, speed: float, knot_K: Any, table_AK: Any) -> float:
    """Time of a GPU: linear between the knots, the last segment goes on, the first value holds below."""
    if used == 0:
        return table_AK[0, 0] / speed
    low, high = 0, len(knot_K) - 1
    while high - low > 1:
        middle = (low + high) // 2
        if knot_K[middle] <= tokens:
            low = middle
        else:
            high = middle
    along = (tokens - knot_K[low]) / (knot_K[low + 1] - knot_K[low])
    along = max(along, 0.0)
    row_K = table_AK[min(used, len(table_AK) - 1)]
    return (row_K[low] + (row_K[low + 1] - row_K[low]) * along) / speed


@njit(cache=True)
def _part(
    amount: float,
    n_g: float,
    a_g: int,
    s_g: float,
    n_h: float,
    a_h: int,
    s_h: float,
    knot_K: Any,
    table_AK: Any,
) -> tuple[float, float]:
    """How many of `amount` tokens to hand from g to h (which then uses a_h experts), and when both end."""
    # The gap between the two falls with what is handed on: regula falsi, Illinois style.
    low, high = 0.0, amount
    gap_low = seconds(n_g, a_g, s_g, knot_K, table_AK) - seconds(n_h, a_h, s_h, knot_K, table_AK)
    t_g = seconds(n_g - amount, a_g, s_g, knot_K, table_AK)
    t_h = seconds(n_h + amount, a_h, s_h, knot_K, table_AK)
    gap_high = t_g - t_h
    best, value = amount, max(t_g, t_h)
    if gap_low <= 0.0 or gap_high >= 0.0:
        return best, value
    for _ in range(TRIES):
        middle = high - gap_high * (high - low) / (gap_high - gap_low)
        t_g = seconds(n_g - middle, a_g, s_g, knot_K, table_AK)
        t_h = seconds(n_h + middle, a_h, s_h, knot_K, table_AK)
        if max(t_g, t_h) < value:
            best, value = middle, max(t_g, t_h)
        gap = t_g - t_h
        if abs(gap) <= CLOSE * value:
            break
        if gap > 0.0:
            low, gap_low = middle, gap
            gap_high *= 0.5
        else:
            high, gap_high = middle, gap
            gap_low *= 0.5
    return best, value


@njit(cache=True)
def _join(
    e: int, h: int, amount: float, y_EG: Any, on_GW: Any, n_G: Any, a_G: Any, held_EG: Any, new_G: Any
) -> None:
    """Serve tokens of e on h as well."""
    if y_EG[e, h] <= 0.0:
        on_GW[h, a_G[h]] = e
        a_G[h] += 1
        if not held_EG[e, h]:
            new_G[h] += 1
    y_EG[e, h] += amount
    n_G[h] += amount


@njit(cache=True)
def _leave(e: int, g: int, y_EG: Any, on_GW: Any, n_G: Any, a_G: Any, held_EG: Any, new_G: Any) -> None:
    """Serve no token of e on g any more."""
    n_G[g] -= y_EG[e, g]
    y_EG[e, g] = 0.0
    a_G[g] -= 1
    if not held_EG[e, g]:
        new_G[g] -= 1
    for i in range(a_G[g]):
        if on_GW[g, i] == e:
            on_GW[g, i] = on_GW[g, a_G[g]]
            break


@njit(cache=True)
def _move(
    e: int, g: int, h: int, amount: float, y_EG: Any, on_GW: Any, n_G: Any, a_G: Any, held_EG: Any, new_G: Any
) -> None:
    """Hand tokens of e from g to h."""
    if amount >= y_EG[e, g]:
        amount = y_EG[e, g]
        _leave(e, g, y_EG, on_GW, n_G, a_G, held_EG, new_G)
    else:
        y_EG[e, g] -= amount
        n_G[g] -= amount
    _join(e, h, amount, y_EG, on_GW, n_G, a_G, held_EG, new_G)


@njit(cache=True)
def _start(costs: Costs, state: State, load_E: Any) -> None:
    """Every expert whole on the holder that ends soonest with it, heavy experts first."""
    speed_G, knot_K, table_AK = costs.speed_G, costs.knot_K, costs.table_AK
    y_EG, on_GW, n_G, a_G, new_G = state.y_EG, state.on_GW, state.n_G, state.a_G, state.new_G
    held_EG = state.held_EG
    for e in np.argsort(-load_E, kind="mergesort"):
        if load_E[e] <= 0.0:
            break
        at, least = -1, np.inf
        for g in range(len(n_G)):
            if held_EG[e, g]:
                t = seconds(n_G[g] + load_E[e], a_G[g] + 1, speed_G[g], knot_K, table_AK)
                if t < least:
                    at, least = g, t
        _join(e, at, load_E[e], y_EG, on_GW, n_G, a_G, held_EG, new_G)


@njit(cache=True)
def _shake(state: State, may_load: bool, draw: Any) -> Any:
    """Hand a piece of the slowest GPU, then of any, to wherever it may go; returns the generator's state."""
    y_EG, on_GW, n_G, a_G, t_G, new_G = state.y_EG, state.on_GW, state.n_G, state.a_G, state.t_G, state.new_G
    held_EG, room_G = state.held_EG, state.room_G
    G = len(a_G)
    for push in range(2):
        g = t_G.argmax()
        if push == 1:
            draw = _next(draw)
            g = int(draw >> np.uint64(33)) % G
        if a_G[g] == 0:
            continue
        draw = _next(draw)
        e = on_GW[g, int(draw >> np.uint64(33)) % a_G[g]]
        draw = _next(draw)
        h = int(draw >> np.uint64(33)) % G
        full = y_EG[e, h] <= 0.0 and a_G[h] >= room_G[h]
        if h == g or not (held_EG[e, h] or may_load) or full:
            continue
        _move(e, g, h, y_EG[e, g], y_EG, on_GW, n_G, a_G, held_EG, new_G)
    return draw


@njit(cache=True)
def _descend(costs: Costs, state: State, best: float) -> float:
    """Relieve the slowest GPU until nothing helps; keeps the best state on the way if it is a new best.

    A step moves an expert's tokens from the slowest GPU, all or part, to a GPU that serves it, that holds it,
    or that loads it. Where no such step helps, or in small layers, an expert of it may change places with one
    of a quick GPU. Taking an array out of a record counts a reference: once for a descent, not at each step.
    """
    speed_G, load_G, may_load, knot_K, table_AK, halt = costs
    y_EG, on_GW, n_G, a_G, t_G, new_G = state.y_EG, state.on_GW, state.n_G, state.a_G, state.t_G, state.new_G
    held_EG, room_G, lead, price = state.held_EG, state.room_G, state.lead, state.price
    best_on_GW, best_y_GW, best_a_G = state.best_on_GW, state.best_y_GW, state.best_a_G
    G = len(t_G)
    for g in range(G):
        t_G[g] = seconds(n_G[g], a_G[g], speed_G[g], knot_K, table_AK)
    for _ in range(STEPS):
        g = t_G.argmax()
        value = _value(t_G[g], new_G, load_G, lead, price)
        if value < best * (1 - TINY):
            best = value
            for x in range(G):
                best_a_G[x] = a_G[x]
                for i in range(a_G[x]):
                    best_on_GW[x, i] = on_GW[x, i]
                    best_y_GW[x, i] = y_EG[on_GW[x, i], x]
        if halt[0]:
            break
        soon, step_e, step_h, step_f, step_amount = t_G[g] * (1 - 1e-6), -1, -1, -1, 0.0
        waits = 0.0
        for h in range(G):
            waits = max(waits, new_G[h] * load_G[h] - lead)
        for i in range(a_G[g]):
            e = on_GW[g, i]
            amount = y_EG[e, g]
            without = seconds(n_G[g] - amount, a_G[g] - 1, speed_G[g], knot_K, table_AK)
            for h in range(G):
                if h == g or t_G[h] >= soon:
                    continue
                opens = y_EG[e, h] <= 0.0
                extra = 0.0
                if opens:
                    if a_G[h] >= room_G[h]:
                        continue
                    if not held_EG[e, h]:
                        if not may_load:
                            continue
                        extra = price + max((new_G[h] + 1) * load_G[h] - lead - waits, 0.0)
                a_h = a_G[h] + 1 if opens else a_G[h]
                if t_G[h] + extra >= soon:
                    continue
                if opens and extra + seconds(n_G[h], a_h, speed_G[h], knot_K, table_AK) >= soon:
                    continue
                whole = extra + max(without, seconds(n_G[h] + amount, a_h, speed_G[h], knot_K, table_AK))
                if whole < soon:
                    soon, step_e, step_h, step_f, step_amount = whole, e, h, -1, amount
                part, ends = _part(
                    amount, n_G[g], a_G[g], speed_G[g], n_G[h], a_h, speed_G[h], knot_K, table_AK
                )  # fmt: skip
                if ends + extra < soon:
                    soon, step_e, step_h, step_f, step_amount = ends + extra, e, h, -1, part
        if step_e < 0 or on_GW.size <= SMALL:
            # Whole pieces change places; the quickest GPUs are asked, one after the other.
            asked, last, last_h = 0, -1.0, -1
            while asked < ASKED:
                h = -1
                for x in range(G):
                    later = t_G[x] > last or (t_G[x] == last and x > last_h)
                    if later and (h < 0 or t_G[x] < t_G[h]):
                        h = x
                if h < 0 or t_G[h] >= soon:
                    break
                asked, last, last_h = asked + 1, t_G[h], h
                for i in range(a_G[g]):
                    e = on_GW[g, i]
                    amount = y_EG[e, g]
                    if y_EG[e, h] > 0.0 or not (held_EG[e, h] or may_load):
                        continue
                    for j in range(a_G[h]):
                        f = on_GW[h, j]
                        other = y_EG[f, h]
                        if other >= amount or y_EG[f, g] > 0.0 or not (held_EG[f, g] or may_load):
                            continue
                        extra, worst = 0.0, waits
                        if not held_EG[e, h]:
                            extra += price
                            worst = max(worst, (new_G[h] + 1) * load_G[h] - lead)
                        if not held_EG[f, g]:
                            extra += price
                            worst = max(worst, (new_G[g] + 1) * load_G[g] - lead)
                        extra += worst - waits
                        change = amount - other
                        after = extra + seconds(n_G[h] + change, a_G[h], speed_G[h], knot_K, table_AK)
                        if after < soon:
                            t_g = seconds(n_G[g] - change, a_G[g], speed_G[g], knot_K, table_AK)
                            after = max(after, t_g + extra)
                            if after < soon:
                                soon, step_e, step_h, step_f, step_amount = after, e, h, f, amount
        if step_e < 0:
            break
        h = step_h
        if step_f >= 0:
            # Both first leave: the lists have room for what fits, no more.
            other = y_EG[step_f, h]
            _leave(step_e, g, y_EG, on_GW, n_G, a_G, held_EG, new_G)
            _leave(step_f, h, y_EG, on_GW, n_G, a_G, held_EG, new_G)
            _join(step_e, h, step_amount, y_EG, on_GW, n_G, a_G, held_EG, new_G)
            _join(step_f, g, other, y_EG, on_GW, n_G, a_G, held_EG, new_G)
        else:
            _move(step_e, g, h, step_amount, y_EG, on_GW, n_G, a_G, held_EG, new_G)
        for x in (g, h):
            t_G[x] = seconds(n_G[x], a_G[x], speed_G[x], knot_K, table_AK)
    return best


@njit(cache=True)
def _clear(state: State) -> None:
    """Serve nothing."""
    y_EG, on_GW, n_G, a_G, new_G = state.y_EG, state.on_GW, state.n_G, state.a_G, state.new_G
    for g in range(len(n_G)):
        for i in range(a_G[g]):
            y_EG[on_GW[g, i], g] = 0.0
        n_G[g], a_G[g], new_G[g] = 0.0, 0, 0


@njit(cache=True)
def _restore(costs: Costs, state: State) -> None:
    """Go back to the best."""
    y_EG, on_GW, n_G, a_G, t_G, new_G = state.y_EG, state.on_GW, state.n_G, state.a_G, state.t_G, state.new_G
    held_EG, best_on_GW, best_y_GW = state.held_EG, state.best_on_GW, state.best_y_GW
    _clear(state)
    for g in range(len(n_G)):
        for i in range(state.best_a_G[g]):
            _join(best_on_GW[g, i], g, best_y_GW[g, i], y_EG, on_GW, n_G, a_G, held_EG, new_G)
        t_G[g] = seconds(n_G[g], a_G[g], costs.speed_G[g], costs.knot_K, costs.table_AK)


@njit(cache=True)
def layer(
    costs: Costs,
    load_E: Any,
    held_EG: Any,
    room_G: Any,
    lead: float,
    price: float,
    kicks: int,
    start_EG: Any,
    y_EG: Any,
) -> float:
    """How many tokens of each expert each GPU serves; fills y_EG, returns time plus waiting and prices.

    Relieves the slowest GPU again and again, from whole experts and from the shares `start_EG` (if it has
    any); shakes the best so far and does so again, `kicks` times.
    """
    E, G = held_EG.shape
    width = 1
    for g in range(G):
        width = max(width, room_G[g])
    on_GW, a_G, n_G = np.zeros((G, width), dtype=np.int64), np.zeros(G, dtype=np.int64), np.zeros(G)
    t_G, new_G = np.zeros(G), np.zeros(G, dtype=np.int64)
    best_on_GW, best_y_GW = np.zeros((G, width), dtype=np.int64), np.zeros((G, width))
    best_a_G = np.zeros(G, dtype=np.int64)
    state = State(
        held_EG, room_G, lead, price, y_EG, on_GW, a_G, n_G, t_G, new_G, best_on_GW, best_y_GW, best_a_G
    )
    y_EG[:] = 0.0
    _start(costs, state, load_E)
    best = _descend(costs, state, np.inf)
    if len(start_EG) > 0:
        _clear(state)
        for e in range(E):
            for g in range(G):
                if load_E[e] * start_EG[e, g] > 0.0:
                    _join(e, g, load_E[e] * start_EG[e, g], y_EG, on_GW, n_G, a_G, held_EG, new_G)
        best = _descend(costs, state, best)
    draw = np.uint64(88172645463325252)
    for _ in range(kicks):
        if costs.halt[0]:
            break
        _restore(costs, state)
        draw = _shake(state, costs.may_load, draw)
        best = _descend(costs, state, best)
    _restore(costs, state)
    return best


@njit(cache=True)
def _next(state: Any) -> Any:
    """Next of a sequence of numbers without pattern (Marsaglia's xorshift)."""
    state ^= (state << np.uint64(13)) & np.uint64(0xFFFFFFFFFFFFFFFF)
    state ^= state >> np.uint64(7)
    state ^= (state << np.uint64(17)) & np.uint64(0xFFFFFFFFFFFFFFFF)
    return state


@njit(cache=True)
def _value(worst: float, new_G: Any, load_G: Any, lead: float, price: float) -> float:
    """Time of the layer, waiting for weights, and the price of moves."""
    waits, count = 0.0, 0
    for g in range(len(new_G)):
        waits = max(waits, new_G[g] * load_G[g] - lead)
        count += new_G[g]
    return worst + waits + price * count


@njit(cache=True, nogil=True)
def rows(
    costs: Costs,
    load_RE: Any,
    held_REG: Any,
    room_RG: Any,
    lead_R: Any,
    price_R: Any,
    kicks: int,
    start_REG: Any,
    y_REG: Any,
    value_R: Any,
) -> None:
    """`layer` for many rows of loads; fewer placements than rows are taken in turn."""
    repeats = len(held_REG)
    for r in range(len(load_RE)):
        held_EG, room_G, start_EG = held_REG[r % repeats], room_RG[r % repeats], start_REG[r % len(start_REG)]
        value_R[r] = layer(
            costs, load_RE[r], held_EG, room_G, lead_R[r], price_R[r], kicks, start_EG, y_REG[r]
        )


@njit(cache=True)
def reserve(load_RE: Any, held_REG: Any, room_RG: Any, home_RE: Any) -> None:
    """Give each expert without tokens a home: of its holders the one with most room, which it takes."""
    R, E = load_RE.shape
    for r in range(R):
        for e in range(E):
            home_RE[r, e] = -1
            if load_RE[r, e] > 0.0:
                continue
            for g in range(room_RG.shape[1]):
                if held_REG[r, e, g] and (home_RE[r, e] < 0 or room_RG[r, g] > room_RG[r, home_RE[r, e]]):
                    home_RE[r, e] = g
            room_RG[r, home_RE[r, e]] -= 1
