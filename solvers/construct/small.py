"""The fractional construction of one small layer in plain Python.

The same rules as `fractional`, without its array machinery: for 8 experts on 8 GPUs that is several times
faster than NumPy, whose every call costs a microsecond before it does anything. Levelling needs no linear
system here: in a tree, some GPU always has one open share or some expert one open replica, and that one is
determined.
"""

from __future__ import annotations

__all__ = ["join_layer"]

Layer = tuple[list[list[int]], list[list[float]]]

_NEGATIVE = -1e-12  # of the mean load: a share this far below zero is rounding


def join_layer(
    load: list[float], capacity: list[int], speed: list[float], *, lean: float = 0.5
) -> Layer | None:
    """Experts per GPU and their shares with every GPU at the mean time.

    Parameters
    ----------
    load : list of float [experts]
        Tokens.
    capacity : list of int [GPUs]
        Slots.
    speed : list of float [GPUs]
        Relative speeds.
    lean : float
        See `sizing.apportion`.

    Returns
    -------
    tuple of list [GPUs] of list of int, list [GPUs] of list of float, or None
        Experts and shares of each GPU; None where these rules miss the mean.
    """
    mean = sum(load) / sum(speed)
    if mean <= 0.0:
        return None
    replicas = _count(load, capacity, lean)
    held = None if replicas is None else _place(load, replicas, capacity, speed)
    if held is None or replicas is None:
        return None
    return _peel(load, replicas, held, speed, mean)


def _count(load: list[float], capacity: list[int], lean: float) -> list[int] | None:
    """Replicas by largest ``load / (replicas + lean)``, at most one per GPU."""
    experts = range(len(load))
    most = sum(1 for c in capacity if c)
    spare = sum(min(c, len(load)) for c in capacity) - len(load)
    if spare < 0:
        return None
    replicas = [1] * len(load)
    claim = [w / (1.0 + lean) if most > 1 else -1.0 for w in load]
    for _ in range(spare):
        expert = max(experts, key=claim.__getitem__)
        if claim[expert] < 0.0:
            break
        replicas[expert] += 1
        claim[expert] = load[expert] / (replicas[expert] + lean) if replicas[expert] < most else -1.0
    return replicas


def _place(
    load: list[float], replicas: list[int], capacity: list[int], speed: list[float]
) -> list[list[int]] | None:
    """Replicated experts first, each replica on the least loaded GPU that its expert does not reach yet."""
    gpus = range(len(capacity))
    held: list[list[int]] = [[] for _ in gpus]
    time = [0.0] * len(capacity)
    room = list(capacity)
    component = list(gpus)
    order = sorted(range(len(load)), key=lambda e: (replicas[e] == 1, -load[e] / replicas[e], e))
    for expert in order:
        piece = load[expert] / replicas[expert]
        root = -1
        for _ in range(replicas[expert]):
            best, best_key = -1, (True, 0.0)
            for g in gpus:
                key = (component[g] == root, time[g])
                if room[g] and (best < 0 or key < best_key) and (not key[0] or expert not in held[g]):
                    best, best_key = g, key
            if best < 0:
                return None
            held[best].append(expert)
            room[best] -= 1
            time[best] += piece / speed[best]
            if root < 0:
                root = component[best]
            elif component[best] != root:
                gone = component[best]
                component = [root if c == gone else c for c in component]
    return held


def _peel(
    load: list[float], replicas: list[int], held: list[list[int]], speed: list[float], mean: float
) -> Layer | None:
    """Settle shares one by one, each determined by its GPU or by its expert; None if one is negative."""
    gpus = range(len(held))
    open_gpu = [[e for e in row if replicas[e] > 1] for row in held]
    due = [mean * speed[g] - sum(load[e] for e in held[g] if replicas[e] == 1) for g in gpus]
    left = list(load)
    homes: dict[int, list[int]] = {}
    for g in gpus:
        for e in open_gpu[g]:
            homes.setdefault(e, []).append(g)
    token: dict[tuple[int, int], float] = {}
    floor = _NEGATIVE * mean
    ready = [(g, -1) for g in gpus if len(open_gpu[g]) == 1]
    total = sum(len(row) for row in open_gpu)
    while len(token) < total:
        if ready:
            g, e = ready.pop()
            if e < 0:
                if len(open_gpu[g]) != 1:
                    continue
                e = open_gpu[g][0]
                value = due[g]
            else:
                if len(homes[e]) != 1:
                    continue
                g = homes[e][0]
                value = left[e]
        else:  # a cycle: one share is free, and the equal split a good value
            g = next(g for g in gpus if open_gpu[g])
            e = open_gpu[g][0]
            value = load[e] / replicas[e]
        if value < floor:
            return None
        token[g, e] = value = max(value, 0.0)
        open_gpu[g].remove(e)
        homes[e].remove(g)
        due[g] -= value
        left[e] -= value
        if len(open_gpu[g]) == 1:
            ready.append((g, -1))
        if len(homes[e]) == 1:
            ready.append((-1, e))
    tiny = 1e-10 * mean
    if max(map(abs, due)) > tiny or any(abs(left[e]) > tiny for e in homes):
        return None
    share = [
        [
            1.0 if replicas[e] == 1 else token[g, e] / load[e] if load[e] > 0.0 else 1.0 / replicas[e]
            for e in held[g]
        ]
        for g in gpus
    ]
    return held, share
