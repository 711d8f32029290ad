"""The fewest spare replicas when the experts' homes are fixed (fractional split).

Every expert has a home; only the spare slots may be filled, each with one more replica that takes a part of
its expert's tokens. GPUs above the wanted time T have an *excess*, the others *room*.

*Lower bound.* A replica on GPU h adds at most ``room_h``, so the GPUs that receive one must be enough to
hold all the excess: at least as many as of the largest rooms it takes. And each GPU with an excess must
give at least once.

*Construction.* Each replica hands tokens of one GPU to one other. If the replicas form trees, there is one
less than GPUs that take part, for every tree: few replicas means many trees, that is exact fits. So: an
excess that some room can take whole takes the smallest such room; the largest excess for which there is
none fills the largest room. What remains goes on. How much a fit may waste of the rooms' slack is varied
over a few tries, and the fewest replicas are kept.

Axes: E experts, G GPUs.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["Spares", "fewest_spares", "spares_bound"]

Float = NDArray[np.float64]
Int = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Spares:
    """Replicas beyond the homes.

    Parameters
    ----------
    expert_R, gpu_R : ndarray of int, shape (R,)
        What is replicated, and where to.
    tokens_R : ndarray of float, shape (R,)
        Tokens that the replica takes over from the home.
    bound : int
        No plan within the time has fewer.
    met : bool
        Whether the time is met.
    """

    expert_R: Int
    gpu_R: Int
    tokens_R: Float
    bound: int
    met: bool


def spares_bound(load_E: ArrayLike, home_E: ArrayLike, speed_G: ArrayLike, time: float) -> int:
    """Return how many spare replicas any plan within ``time`` needs at least (see the module)."""
    load, home = np.asarray(load_E, dtype=np.float64), np.asarray(home_E)
    speed = np.asarray(speed_G, dtype=np.float64)
    margin_G = time * speed - np.bincount(home, weights=load, minlength=len(speed))
    excess = float(-margin_G[margin_G < 0].sum())
    if excess <= 0:
        return 0
    room = np.sort(margin_G[margin_G > 0])[::-1].cumsum()
    takers = int(np.searchsorted(room, excess * (1 - 1e-12))) + 1
    return max(int((margin_G < -1e-12 * time).sum()), takers)


def fewest_spares(
    load_E: ArrayLike,
    home_E: ArrayLike,
    spare_G: ArrayLike,
    speed_G: ArrayLike | None = None,
    *,
    time: float,
    tries: int = 16,
) -> Spares:
    """Find few spare replicas with which every GPU ends within ``time``.

    Parameters
    ----------
    load_E : array_like of float, shape (E,)
        Tokens of each expert.
    home_E : array_like of int, shape (E,)
        The GPU that holds each expert in any case.
    spare_G : array_like of int, shape (G,)
        Further slots of each GPU.
    speed_G : array_like of float, shape (G,), optional
        Relative speeds (default 1).
    time : float
        Largest GPU time wanted.
    tries : int
        Variations tried while the bound is not reached; 1 is the plain rule.

    Returns
    -------
    Spares
    """
    load, home = np.asarray(load_E, dtype=np.float64), np.asarray(home_E, dtype=np.int64)
    spare = np.asarray(spare_G, dtype=np.int64)
    speed = np.ones(len(spare)) if speed_G is None else np.asarray(speed_G, dtype=np.float64)
    bound = spares_bound(load, home, speed, time)
    margin = (time * speed - np.bincount(home, weights=load, minlength=len(speed))).tolist()
    by_home: list[list[int]] = [[] for _ in spare]
    for e in np.argsort(-load, kind="stable").tolist():
        by_home[home[e]].append(e)
    best: list[tuple[int, int, float]] | None = None
    for attempt in range(tries):
        found = _hand_out(load.tolist(), by_home, margin, spare.tolist(), time, attempt)
        if found is not None and (best is None or len(found) < len(best)):
            best = found
            if len(best) <= bound:
                break
    steps = best or []
    return Spares(
        np.array([s[0] for s in steps], dtype=np.int64),
        np.array([s[1] for s in steps], dtype=np.int64),
        np.array([s[2] for s in steps]),
        bound,
        best is not None,
    )


def _hand_out(
    load: list[float],
    by_home: list[list[int]],
    margin: list[float],
    spare: list[int],
    time: float,
    attempt: int,
) -> list[tuple[int, int, float]] | None:
    """Hand the excesses out once; ``attempt`` varies how much of the slack exact fits may waste."""
    slop = 1e-12 * time
    rooms = sorted((m, g) for g, m in enumerate(margin) if m > slop and spare[g] > 0)
    excesses = sorted((-m, g) for g, m in enumerate(margin) if m < -slop)
    # What may be left unused in rooms, all together; a fit may waste its part of it.
    slack = sum(m for m, _ in rooms) - sum(x for x, _ in excesses)
    if slack < -slop:
        return None
    part = (0.0, 0.02, 0.05, 0.1, 0.2, 0.4, 0.7, 1.0)[attempt % 8]
    smallest_first = attempt // 8 % 2 == 1
    left = dict(enumerate(load))
    slots = dict(enumerate(spare))
    steps: list[tuple[int, int, float]] = []
    while excesses:
        step = _exact_fit(excesses, rooms, part * slack, smallest_first)
        if step is None:
            # Nothing fits whole: the largest excess goes to the largest room.
            step = len(excesses) - 1, len(rooms) - 1
            if not rooms:
                return None
        x, source = excesses.pop(step[0])
        room, target = rooms.pop(step[1])
        expert = max(by_home[source], key=lambda e: left[e])
        amount = min(x, room, left[expert])
        if amount <= slop:
            return None
        left[expert] -= amount
        slots[target] -= 1
        steps.append((expert, target, amount))
        if x - amount > slop:
            insort(excesses, (x - amount, source))
        if room - amount > slop and slots[target] > 0:
            insort(rooms, (room - amount, target))
        else:
            slack -= room - amount
            if slack < -slop * 100:
                return None
    return steps


def _exact_fit(
    excesses: list[tuple[float, int]], rooms: list[tuple[float, int]], waste: float, smallest_first: bool
) -> tuple[int, int] | None:
    """Return an excess, and the smallest room that takes it whole with little wasted."""
    order = range(len(excesses)) if smallest_first else range(len(excesses) - 1, -1, -1)
    for i in order:
        j = bisect_left(rooms, (excesses[i][0], -1))
        if j < len(rooms) and rooms[j][0] - excesses[i][0] <= waste:
            return i, j
    return None
