"""Shares of one batch by the clock: one source, compiled where Numba is, interpreted where it is not.

The search is that of `solvers.timed`, made for a forward pass: only experts with several replicas are looked
at, tokens are whole, and nothing is allocated by expert and GPU. `device._kernels.search` does the same
steps.

Axes: E experts, P flat slots, G GPUs, S experts with several replicas that have tokens, heaviest first,
X replicas of an expert, A activated experts (from 0), K knots of the time table.
"""

# mypy: disable-error-code="untyped-decorator, no-any-return"
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

try:
    from numba import njit
except ImportError:  # the extra "fast" is not installed

    def njit(*_types: Any, **_options: Any) -> Callable[[Any], Any]:
        """Leave the function as it is."""
        return lambda function: function


__all__ = ["CLOSE", "STEPS", "TINY", "TRIES", "timed_quotas"]

TRIES = 8
CLOSE = 1e-4
TINY = 1e-9
STEPS = 1000
FIRST, TIMES, MODULUS = 88172645, 48271, 2147483647
"""Numbers without pattern: S. K. Park, K. W. Miller, "Random number generators", Comm. ACM 31 (1988)."""


@njit("f8(i8, i8, f8, f8[::1], f8[:, :, ::1])", cache=True, nogil=True)
def seconds(tokens: int, used: int, speed: float, knot_K: Any, table_2AK: Any) -> float:
    """Time of a GPU: linear between the knots, the last segment goes on, the first value holds below.

    `table_2AK`: values at the knots, and slopes behind them.
    """
    low, high = 0, len(knot_K) - 1
    while high - low > 1:
        middle = (low + high) // 2
        if knot_K[middle] <= tokens:
            low = middle
        else:
            high = middle
    used = min(used, table_2AK.shape[1] - 1)
    return (table_2AK[0, used, low] + table_2AK[1, used, low] * max(tokens - knot_K[low], 0.0)) / speed


@njit("UniTuple(f8, 2)(i8, i8, i8, f8, i8, i8, f8, f8[::1], f8[:, :, ::1])", cache=True, nogil=True)
def part_of(
    amount: int,
    n_g: int,
    a_g: int,
    s_g: float,
    n_h: int,
    a_h: int,
    s_h: float,
    knot_K: Any,
    table_2AK: Any,
) -> tuple[float, float]:
    """How many of `amount` tokens to hand from g to h (which then uses a_h experts), and when both end."""
    # The gap between the two falls with what is handed on: regula falsi, Illinois style.
    low, high = 0, amount
    gap_low = seconds(n_g, a_g, s_g, knot_K, table_2AK) - seconds(n_h, a_h, s_h, knot_K, table_2AK)
    gap_high = seconds(n_g - amount, a_g, s_g, knot_K, table_2AK) - seconds(
        n_h + amount, a_h, s_h, knot_K, table_2AK
    )
    best, value = 0, np.inf
    if gap_low <= 0.0 or gap_high >= 0.0:
        return float(best), value
    for _ in range(TRIES):
        if high - low < 2:
            break
        middle = low + int((high - low) * (gap_low / (gap_low - gap_high)))
        middle = min(max(middle, low + 1), high - 1)
        t_g = seconds(n_g - middle, a_g, s_g, knot_K, table_2AK)
        t_h = seconds(n_h + middle, a_h, s_h, knot_K, table_2AK)
        worst = max(t_g, t_h)
        if worst < value:
            best, value = middle, worst
        gap = t_g - t_h
        if abs(gap) <= CLOSE * worst:
            break
        if gap > 0.0:
            low, gap_low = middle, gap
            gap_high *= 0.5
        else:
            high, gap_high = middle, gap
            gap_low *= 0.5
    return float(best), value


@njit(
    "void(i8, i8, i8, i8, i8[:, ::1], i8[:, ::1], i8[::1], i8[::1])",
    cache=True,
    nogil=True,
)
def _hand(s: int, source: int, target: int, amount: int, y_SX: Any, rank_SX: Any, n_G: Any, a_G: Any) -> None:
    """Tokens of an expert go from one replica (none: -1) to another."""
    if source >= 0:
        y_SX[s, source] -= amount
        n_G[rank_SX[s, source]] -= amount
        a_G[rank_SX[s, source]] -= int(y_SX[s, source] == 0)
    a_G[rank_SX[s, target]] += int(y_SX[s, target] == 0)
    y_SX[s, target] += amount
    n_G[rank_SX[s, target]] += amount


@njit(
    "f8(f8, i8[:, ::1], i8[:, ::1], i8[:, ::1], i8[::1], i8[:, ::1],"
    " f8[::1], f8[::1], f8[::1], f8[:, :, ::1])",
    cache=True,
    nogil=True,
)
def _descend(
    best: float,
    y_SX: Any,
    best_SX: Any,
    rank_SX: Any,
    copies_S: Any,
    served_2G: Any,
    t_G: Any,
    speed_G: Any,
    knot_K: Any,
    table_2AK: Any,
) -> float:
    """Relieve the slowest GPU by the best single step until none helps; keeps what is a new best."""
    n_G, a_G = served_2G[0], served_2G[1]  # tokens, and activated experts
    for g in range(len(t_G)):
        t_G[g] = seconds(n_G[g], a_G[g], speed_G[g], knot_K, table_2AK)
    for _ in range(STEPS):
        g = t_G.argmax()
        if t_G[g] < best * (1 - TINY):
            best = t_G[g]
            best_SX[:] = y_SX
        soon = limit = t_G[g] * (1 - 1e-6)
        step_s, step_source, step_target, step_amount = -1, -1, -1, 0
        for s in range(len(y_SX)):
            source = -1
            for x in range(copies_S[s]):
                if rank_SX[s, x] == g and y_SX[s, x] > 0:
                    source = x
            if source < 0:
                continue
            amount = y_SX[s, source]
            without = seconds(n_G[g] - amount, a_G[g] - 1, speed_G[g], knot_K, table_2AK)
            for x in range(copies_S[s]):
                h = rank_SX[s, x]
                if x == source or t_G[h] >= limit:
                    continue
                a_h = a_G[h] + int(y_SX[s, x] == 0)
                ends = max(without, seconds(n_G[h] + amount, a_h, speed_G[h], knot_K, table_2AK))
                if ends < soon:
                    soon, step_s, step_source, step_target, step_amount = ends, s, source, x, amount
                part, ends = part_of(
                    amount, n_G[g], a_G[g], speed_G[g], n_G[h], a_h, speed_G[h], knot_K, table_2AK
                )
                if ends < soon:
                    soon, step_s, step_source, step_target, step_amount = ends, s, source, x, int(part)
        if step_s < 0:
            break
        _hand(step_s, step_source, step_target, step_amount, y_SX, rank_SX, n_G, a_G)
        for x in (step_source, step_target):
            h = rank_SX[step_s, x]
            t_G[h] = seconds(n_G[h], a_G[h], speed_G[h], knot_K, table_2AK)
    return best


@njit(
    "void(i8[:, ::1], i8[:, ::1], i8[:, ::1], i8[::1], i8[::1], i8[::1])",
    cache=True,
    nogil=True,
)
def _take(from_SX: Any, y_SX: Any, rank_SX: Any, copies_S: Any, n_G: Any, a_G: Any) -> None:
    """Serve as `from_SX` says."""
    for s in range(len(y_SX)):
        for x in range(copies_S[s]):
            g = rank_SX[s, x]
            n_G[g] += from_SX[s, x] - y_SX[s, x]
            a_G[g] += int(from_SX[s, x] > 0) - int(y_SX[s, x] > 0)
            y_SX[s, x] = from_SX[s, x]


@njit(
    "void(i8, i8[:, ::1], i8[:, ::1], i8[::1], i8[::1], i8[::1], f8[::1])",
    cache=True,
    nogil=True,
)
def _shake(draw: int, y_SX: Any, rank_SX: Any, copies_S: Any, n_G: Any, a_G: Any, t_G: Any) -> None:
    """Hand an expert's tokens on the slowest GPU, then on any, to another replica."""
    for push in range(2):
        g = t_G.argmax()
        if push == 1:
            draw = draw * TIMES % MODULUS
            g = draw % len(t_G)
        count = 0
        for s in range(len(y_SX)):
            for x in range(copies_S[s]):
                count += int(rank_SX[s, x] == g and y_SX[s, x] > 0)
        if count == 0:
            continue
        draw = draw * TIMES % MODULUS
        nth = draw % count
        draw = draw * TIMES % MODULUS
        for s in range(len(y_SX)):
            for x in range(copies_S[s]):
                if rank_SX[s, x] == g and y_SX[s, x] > 0:
                    if nth == 0:
                        target = draw % (copies_S[s] - 1)
                        target += int(target >= x)
                        _hand(s, x, target, y_SX[s, x], y_SX, rank_SX, n_G, a_G)
                    nth -= 1


@njit(
    "i8[::1](i8[::1], i8[::1], i8[::1], i8[::1], i8[::1], f8[::1], f8[::1], f8[:, :, ::1], i8)",
    cache=True,
    nogil=True,
)
def timed_quotas(
    load_E: Any,
    balanced_P: Any,
    replicas_E: Any,
    to_slots_P: Any,
    rank_P: Any,
    speed_G: Any,
    knot_K: Any,
    table_2AK: Any,
    kicks: int,
) -> Any:
    """Tokens of each slot, so that the slowest GPU ends soon: never later than with `balanced_P`.

    Relieves the slowest GPU again and again, from whole experts and from the balanced quotas; then, in two
    rounds of `kicks` in all, shakes the best before the round and does so again.
    """
    quota_P = np.empty(len(rank_P), dtype=np.int64)
    served_2G = np.zeros((2, len(speed_G)), dtype=np.int64)
    n_G, a_G = served_2G[0], served_2G[1]
    several_E = np.zeros(len(load_E), dtype=np.int64)
    starts_E = np.empty(len(load_E), dtype=np.int64)
    at = count = widest = 0
    for e in range(len(load_E)):
        starts_E[e] = at
        if replicas_E[e] == 1:
            p = to_slots_P[at]
            quota_P[p] = load_E[e]
            n_G[rank_P[p]] += load_E[e]
            a_G[rank_P[p]] += int(load_E[e] > 0)
        elif load_E[e] == 0:
            for k in range(replicas_E[e]):
                quota_P[to_slots_P[at + k]] = 0
        else:
            several_E[count] = e
            count += 1
            widest = max(widest, replicas_E[e])
        at += replicas_E[e]
    order_S = np.argsort(-load_E[several_E[:count]], kind="mergesort")
    y_SX, best_SX = np.zeros((count, widest), dtype=np.int64), np.zeros((count, widest), dtype=np.int64)
    rank_SX, copies_S = np.zeros((count, widest), dtype=np.int64), np.empty(count, dtype=np.int64)
    balanced_SX = np.zeros((count, widest), dtype=np.int64)
    for s in range(count):
        e = several_E[order_S[s]]
        copies_S[s] = replicas_E[e]
        first, least = 0, np.inf
        for x in range(replicas_E[e]):
            p = to_slots_P[starts_E[e] + x]
            g = rank_SX[s, x] = rank_P[p]
            balanced_SX[s, x] = balanced_P[p]
            t = seconds(n_G[g] + load_E[e], a_G[g] + 1, speed_G[g], knot_K, table_2AK)
            if t < least:
                first, least = x, t
        # Whole on the replica that ends soonest with it.
        _hand(s, -1, first, load_E[e], y_SX, rank_SX, n_G, a_G)
    t_G = np.empty(len(speed_G))
    best = _descend(np.inf, y_SX, best_SX, rank_SX, copies_S, served_2G, t_G, speed_G, knot_K, table_2AK)
    if count:
        found_SX, base_SX = np.zeros_like(best_SX), balanced_SX
        for k in range(-1, kicks):
            # A round starts from the best of those before: on a GPU all of a round descend at once.
            if k in (0, kicks - kicks // 2):
                base_SX = best_SX.copy()
            _take(base_SX, y_SX, rank_SX, copies_S, n_G, a_G)
            if k >= 0:
                for g in range(len(t_G)):
                    t_G[g] = seconds(n_G[g], a_G[g], speed_G[g], knot_K, table_2AK)
                _shake((k + 1) * FIRST % MODULUS, y_SX, rank_SX, copies_S, n_G, a_G, t_G)
            t = _descend(
                np.inf, y_SX, found_SX, rank_SX, copies_S, served_2G, t_G, speed_G, knot_K, table_2AK
            )
            if t < best:
                best = t
                best_SX[:] = found_SX
    for s in range(count):
        e = several_E[order_S[s]]
        for x in range(copies_S[s]):
            quota_P[to_slots_P[starts_E[e] + x]] = best_SX[s, x]
    return quota_P
