"""The compiled kernel of `fast.join_layers`; importing this module imports Numba."""

# mypy: disable-error-code="untyped-decorator"

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba import njit

__all__ = ["Links", "connect_layers"]


class Links(NamedTuple):
    """What is to be placed."""

    order_LE: Any  # experts, most replicas first
    piece_LE: Any  # tokens of a replica, in that order; so are the replicas
    replicas_LE: Any
    capacity_LG: Any
    pace_G: Any  # 1 / speed
    same_L: Any  # what it costs to link GPUs that are linked already
    head: int  # replicas that go to GPUs 0, 1, ... without search
    wave: int  # single experts placed between two looks at the times
    never: float  # time of a full GPU


@njit(cache=True)
def connect_layers(links: Links, slots_LGC: Any, ok_L: Any) -> None:  # pragma: no cover
    """Place links, then the rest, layer by layer."""
    order_LE, piece_LE, replicas_LE, capacity_LG, pace_G, same_L, head, wave, never = links
    L, E = order_LE.shape
    G = capacity_LG.shape[1]
    time = np.empty(G)
    barred = np.empty(G)
    used = np.empty(G, np.int64)
    component = np.empty(G, np.int64)
    for layer in range(L):
        for g in range(G):
            time[g] = 0.0 if capacity_LG[layer, g] > 0 else never
            used[g] = 0
            barred[g] = 0.0
            component[g] = g
        root, step, rank = 0, 0, 0
        while rank < E and replicas_LE[layer, rank] > 1 and ok_L[layer]:
            piece = piece_LE[layer, rank]
            for k in range(replicas_LE[layer, rank]):
                if k == 0:
                    barred[:] = 0.0
                best = -1
                if step < head:
                    best = step
                else:
                    least = never
                    for g in range(G):
                        key = time[g] + barred[g]
                        if key < least:
                            best, least = g, key
                if best < 0:
                    ok_L[layer] = False
                    break
                step += 1
                slots_LGC[layer, best, used[best]] = order_LE[layer, rank]
                used[best] += 1
                if used[best] < capacity_LG[layer, best]:
                    time[best] = time[best] + piece * pace_G[best]
                else:
                    time[best] = never
                gone = component[best]
                if k == 0:
                    root = gone
                for g in range(G):
                    if component[g] == gone:
                        component[g] = root
                    if component[g] == root and barred[g] < never:
                        barred[g] = same_L[layer]
                barred[best] = never
            rank += 1
        while rank < E and ok_L[layer]:
            by_time = np.argsort(time, kind="mergesort")
            placed = 0
            for column in range(min(wave, E - rank)):
                g = by_time[column]
                if time[g] >= never:
                    break
                piece = piece_LE[layer, rank + column]
                slots_LGC[layer, g, used[g]] = order_LE[layer, rank + column]
                used[g] += 1
                if used[g] < capacity_LG[layer, g]:
                    time[g] = time[g] + piece * pace_G[g]
                else:
                    time[g] = never
                placed += 1
            if placed == 0:
                ok_L[layer] = False
            rank += placed
        if not ok_L[layer]:
            slots_LGC[layer] = -1
