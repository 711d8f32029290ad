"""The token split, compiled: twins of `shares` and `routes`, the same integers; importing this imports Numba.

The signatures are written out, so everything is compiled (or read from the cache) at import, which
`shares.warm_split` does when a model is attached, and no call in a forward can compile. Whole numbers are
int64, arrays contiguous, except the counts, which are a part of what was gathered.
"""

# mypy: disable-error-code="untyped-decorator"

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

__all__ = ["balanced_quotas", "equal_quotas", "planned_quotas", "route"]

ONE = 2**20


@njit("i8[::1](i8[::1], i8[::1], i8[::1])", cache=True, nogil=True)
def equal_quotas(load_E: Any, replicas_E: Any, to_slots_P: Any) -> Any:  # pragma: no cover
    """Twin of `EqualShares`."""
    quota_P = np.empty(to_slots_P.size, dtype=np.int64)
    at = 0
    for e in range(load_E.size):
        n = replicas_E[e]
        whole = load_E[e] // n
        rest = load_E[e] - whole * n
        for k in range(n):
            quota_P[to_slots_P[at + k]] = whole + (k < rest)
        at += n
    return quota_P


@njit("i8[::1](i8[::1], f8[::1], f8[::1], i8[::1], i8[::1])", cache=True, nogil=True)
def planned_quotas(
    load_E: Any, weight_P: Any, total_E: Any, replicas_E: Any, to_slots_P: Any
) -> Any:  # pragma: no cover
    """Twin of `PlannedShares` and, inside it, of `round_tokens`."""
    quota_P = np.empty(to_slots_P.size, dtype=np.int64)
    widest = 0
    for e in range(load_E.size):
        widest = max(widest, replicas_E[e])
    exact_X, short_X = np.empty(widest), np.empty(widest)
    order_X = np.empty(widest, dtype=np.int64)
    at = 0
    for e in range(load_E.size):
        n = replicas_E[e]
        left, fullest = load_E[e], -1
        for k in range(n):
            p = to_slots_P[at + k]
            exact = exact_X[k] = load_E[e] * weight_P[p] / total_E[e]
            quota_P[p] = np.int64(np.floor(exact + 1e-9 * (1.0 + exact)))
            left -= quota_P[p]
            if fullest < 0 or quota_P[p] > quota_P[fullest]:
                fullest = p
        if left < 0:  # shares that sum to a hair above 1
            quota_P[fullest] += left
            left = 0
        each = left // n
        more = left - each * n
        for k in range(n):
            short_X[k] = quota_P[to_slots_P[at + k]] - exact_X[k]
            j = k
            while j > 0 and short_X[order_X[j - 1]] > short_X[k]:
                order_X[j] = order_X[j - 1]
                j -= 1
            order_X[j] = k
        for k in range(n):
            quota_P[to_slots_P[at + order_X[k]]] += each + (k < more)
        at += n
    return quota_P


@njit("void(i8, i8[::1], i8[::1], i8, i8[::1], i8[::1], i8[::1])", cache=True, nogil=True)
def _pour(
    tokens: int, busy_X: Any, speed_X: Any, n: int, order_X: Any, rest_X: Any, part_X: Any
) -> None:  # pragma: no cover
    """Twin of `pour`, of the first n vessels; `order_X`, `rest_X` are room for it."""
    if n == 2 and speed_X[0] == speed_X[1]:
        level = busy_X[0] + busy_X[1] + tokens
        part_X[0] = min(tokens, max(0, (level + (busy_X[0] <= busy_X[1])) // 2 - busy_X[0]))
        part_X[1] = tokens - part_X[0]
        return
    for i in range(n):
        part_X[i] = 0
        rest_X[i] = busy_X[i] * ONE // speed_X[i]
        j = i
        while j > 0 and rest_X[order_X[j - 1]] > rest_X[i]:
            order_X[j] = order_X[j - 1]
            j -= 1
        order_X[j] = i
    level, width, used = tokens, 0, 0
    while used < n:
        i = order_X[used]
        if used and level * speed_X[i] <= busy_X[i] * width:
            break
        level += busy_X[i]
        width += speed_X[i]
        used += 1
    left = tokens
    for k in range(used):
        i = order_X[k]
        exact = level * speed_X[i]
        part_X[i] = max(0, exact // width - busy_X[i])
        left -= part_X[i]
        rest_X[i] = exact % width
    # Largest remainder first; of equals the first vessel.
    for k in range(1, used):
        i, j = order_X[k], k
        while j > 0:
            before = order_X[j - 1]
            if rest_X[before] > rest_X[i] or (rest_X[before] == rest_X[i] and before < i):
                break
            order_X[j] = before
            j -= 1
        order_X[j] = i
    k = 0
    while left != 0:
        step = 1 if left > 0 else -1
        i = order_X[k % used]
        if part_X[i] + step >= 0:
            part_X[i] += step
            left -= step
        k += 1


@njit("i8[::1](i8[::1], i8[::1], i8[::1], i8[::1], i8[::1], i8)", cache=True, nogil=True)
def balanced_quotas(
    load_E: Any, replicas_E: Any, to_slots_P: Any, rank_P: Any, speed_G: Any, sweeps: int
) -> Any:  # pragma: no cover
    """Twin of `BalancedShares`."""
    quota_P = np.empty(to_slots_P.size, dtype=np.int64)
    starts_E = np.empty(load_E.size, dtype=np.int64)
    busy_G = np.zeros(speed_G.size, dtype=np.int64)
    heavy_S = np.empty(load_E.size, dtype=np.int64)
    at = several = widest = 0
    for e in range(load_E.size):
        n = replicas_E[e]
        starts_E[e] = at
        if n == 1:
            p = to_slots_P[at]
            quota_P[p] = load_E[e]
            busy_G[rank_P[p]] += load_E[e]
        else:
            widest = max(widest, n)
            for k in range(n):
                quota_P[to_slots_P[at + k]] = 0
            if load_E[e] > 0:
                heavy_S[several] = -load_E[e]
                several += 1
        at += n
    order_S = np.argsort(heavy_S[:several], kind="mergesort")
    which_S = np.empty(several, dtype=np.int64)
    s = 0
    for e in range(load_E.size):
        if replicas_E[e] > 1 and load_E[e] > 0:
            which_S[s] = e
            s += 1
    busy_X, speed_X = np.empty(widest, dtype=np.int64), np.empty(widest, dtype=np.int64)
    order_X, rest_X = np.empty(widest, dtype=np.int64), np.empty(widest, dtype=np.int64)
    part_X = np.empty(widest, dtype=np.int64)
    best = -1
    for sweep in range(sweeps):
        for s in range(several):
            e = which_S[order_S[s]]
            n = replicas_E[e]
            for k in range(n):
                p = to_slots_P[starts_E[e] + k]
                busy_G[rank_P[p]] -= quota_P[p]
                busy_X[k], speed_X[k] = busy_G[rank_P[p]], speed_G[rank_P[p]]
            _pour(load_E[e], busy_X, speed_X, n, order_X, rest_X, part_X)
            for k in range(n):
                p = to_slots_P[starts_E[e] + k]
                quota_P[p] = part_X[k]
                busy_G[rank_P[p]] += part_X[k]
        fullest = 0
        for g in range(speed_G.size):
            fullest = max(fullest, busy_G[g] * ONE // speed_G[g])
        if sweep and fullest >= best:
            break
        best = fullest
    return quota_P


@njit("i8[:, ::1](i8[:, :], i8[::1], i8[::1], i8[::1], i8[::1], i8[::1], i8[::1])", cache=True, nogil=True)
def route(
    counts_RE: Any,
    quota_P: Any,
    expert_P: Any,
    rank_P: Any,
    replicas_E: Any,
    to_slots_P: Any,
    node_R: Any,
) -> Any:  # pragma: no cover
    """Twin of `routes.source_aware`."""
    R = counts_RE.shape[0]
    sends_RP = np.zeros((R, expert_P.size), dtype=np.int64)
    for r in range(R):
        for p in range(expert_P.size):
            if replicas_E[expert_P[p]] == 1:
                sends_RP[r, p] = counts_RE[r, expert_P[p]]
    supply_R = np.empty(R, dtype=np.int64)
    demand_P = quota_P.copy()
    at = 0
    for e in range(replicas_E.size):
        n = replicas_E[e]
        if n == 1:
            at += 1
            continue
        for r in range(R):
            supply_R[r] = counts_RE[r, e]
        for k in range(n):
            p = to_slots_P[at + k]
            own = min(supply_R[rank_P[p]], demand_P[p])
            sends_RP[rank_P[p], p] = own
            supply_R[rank_P[p]] -= own
            demand_P[p] -= own
        for everywhere in range(2):
            for k in range(n):
                p = to_slots_P[at + k]
                need = demand_P[p]
                for r in range(R):
                    if need == 0:
                        break
                    if supply_R[r] and (everywhere or node_R[r] == node_R[rank_P[p]]):
                        flow = min(supply_R[r], need)
                        sends_RP[r, p] += flow
                        supply_R[r] -= flow
                        need -= flow
                demand_P[p] = need
        at += n
    return sends_RP
