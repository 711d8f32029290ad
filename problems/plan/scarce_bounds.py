"""A lower bound for layers whose spare slots are few: heavy experts must lie with light ones.

Call d = slots - experts the spare slots. Join GPUs that hold replicas of a common expert. A group of k GPUs
has k - 1 replicas more than experts, or more; its *cost* is its slots less the experts that lie in it, extra
replicas and empty slots together, and the costs of all groups sum to d. So

- a group without cost is one GPU with every slot full, and all its experts whole;
- K GPUs of whole groups hold at least ``slots - d`` experts: the heavy ones looked at, and fillers, which
  weigh no less than as many of the lightest experts, F(n).

Take the k heaviest experts, and let x of them lie in groups with a cost (of which there are d at most):

=======  ==================================================================================================
all      they lie on at most ``k - x + min(2 d, x + d)`` GPUs, whose mean load the fillers raise
whole    the others are whole on full GPUs, k - x at most: the lightest k - x of them, and their fillers
crowd    if x > d, some group of cost q has q + 1 of them, on at most q + 1 GPUs
=======  ==================================================================================================

No x helps more than these allow, for any k. With d = 0 this says that the heaviest expert lies with the c - 1
lightest ones. It holds for both splits, since a group's mean load is all that it uses. With an equal split,
moreover, a heavy expert that is whole gains nothing from a neighbour: of the k heaviest all but d are whole,
each on a GPU that is full but for the empty slots and the light pieces that the rest of d pays for.

Experts so heavy that they need several GPUs cost whole steps (`_steps`). Let ``F(n) >= p + s n`` for all n.
A group of cost q has at most q + 1 GPUs, and m heavy experts in it weigh at most ``q A + D + m s`` in time T:
``A = T - s (c - 1)`` is what a step brings, and ``D = T - p - s c`` what is there without one. As the sum of
``ceil(a_i)`` is at most m - 1 above ``ceil(sum of a_i)``, joining saves no step: all heavy experts together
need the sum of ``ceil((w - s - max(A, D)) / A)``, and there are d. With s = 0 this is `tau`.

Slow GPUs with many slots bound the time, too: any GPUs carry at least ``F(slots - d)``.

Axes: L layers, E experts, G GPUs, X experts in groups with a cost.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moeless_opt.problems.arrays import BoolArray, FloatArray, IntArray

__all__ = ["scarce_bound"]


_HOPELESS = (
    0.9  # of the bound so far: an expert that ends this early with the lightest fillers bounds nothing
)
_LINES = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 24)  # numbers of lightest experts at which F has its tangent
_HALVINGS = 40
_SLOP = 1e-9  # of a step: what rounding may take for one more
_MOST_CROWDS = 24  # spare slots up to which the crowds of unequal GPUs are looked at


def scarce_bound(
    heavy_LE: FloatArray,
    capacity_G: IntArray,
    speed_G: FloatArray,
    known_L: FloatArray,
    split: str = "fractional",
) -> FloatArray:
    """Return the bound of every layer, or `known_L` where that is larger.

    Parameters
    ----------
    heavy_LE : array of float, shape [L, E]
        Tokens, heaviest expert first.
    capacity_G : array of int, shape [G]
        Slots, the same in all these layers; at least E in all.
    speed_G : array of float, shape [G]
        Relative speeds.
    known_L : array of float, shape [L]
        A bound that is known, for instance the mean.
    split : {"fractional", "equal"}
        With an equal split, what holds for free shares does, too.
    """
    bound_L: FloatArray = known_L.astype(np.float64).copy()
    shape = _Shape.make(heavy_LE.shape[1], capacity_G, speed_G)
    E, G, d = heavy_LE.shape[1], len(shape.slots_K) - 1, shape.spare
    if d < 0 or G == 0 or (d > G and shape.alike):
        return bound_L
    zero_L1 = np.zeros((len(heavy_LE), 1))
    top_LE = np.concatenate([zero_L1, heavy_LE.cumsum(axis=1)], axis=1)
    light_LE = np.concatenate([zero_L1, heavy_LE[:, ::-1].cumsum(axis=1)], axis=1)
    bound_L = np.maximum(bound_L, (_lightest(light_LE, shape.full_K - d) / shape.slow_K).max(axis=1))
    if d > G:
        return bound_L
    alone_LE = shape.alone(heavy_LE, light_LE)
    rows = np.arange(len(heavy_LE))
    for k in range(1, min(E, G + d) + 1):
        rows = rows[alone_LE[rows, k - 1] > _HOPELESS * bound_L[rows]]
        if not len(rows):
            break
        found = _bound(top_LE[rows], light_LE[rows], shape, k)
        if split == "equal" and k > d:
            found = np.maximum(found, _undivided(top_LE[rows], light_LE[rows], shape, k))
        bound_L[rows] = np.maximum(bound_L[rows], found)
    return np.maximum(bound_L, _steps(heavy_LE, light_LE, shape, bound_L)) if d else bound_L


@dataclass(frozen=True, slots=True)
class _Shape:
    """The GPUs: the fewest slots and the highest speed that K of them have, for all K, and the spare slots.

    Also slots and speed of the K GPUs with most slots for their speed.
    """

    slots_K: IntArray
    speed_K: FloatArray
    full_K: IntArray
    slow_K: FloatArray
    spare: int
    alike: bool
    kinds: tuple[tuple[int, float], ...]

    @classmethod
    def make(cls, experts: int, capacity_G: IntArray, speed_G: FloatArray) -> _Shape:
        used_G = capacity_G > 0
        slots_G, speed_G = np.minimum(capacity_G[used_G], experts), speed_G[used_G]
        kinds = tuple(sorted({(int(c), float(s)) for c, s in zip(slots_G, speed_G, strict=True)}))
        order = np.argsort(-slots_G / speed_G, kind="stable")
        return cls(
            np.concatenate([[0], np.sort(slots_G).cumsum()]),
            np.concatenate([[0.0], np.sort(speed_G)[::-1].cumsum()]),
            slots_G[order].cumsum(),
            speed_G[order].cumsum(),
            int(slots_G.sum()) - experts,
            len(kinds) == 1,
            kinds,
        )

    def alone(self, heavy_LE: FloatArray, light_LE: FloatArray) -> FloatArray:
        """Least time of a full GPU that holds the expert and the lightest others."""
        times = [(heavy_LE + light_LE[:, min(c - 1, heavy_LE.shape[1])][:, None]) / s for c, s in self.kinds]
        return np.asarray(np.min(times, axis=0))


def _bound(top_LE: FloatArray, light_LE: FloatArray, shape: _Shape, k: int) -> FloatArray:
    """What the k heaviest experts prove."""
    d, G = shape.spare, len(shape.slots_K) - 1
    most = min(G, k + d)
    K = np.arange(1, most + 1)
    mean_LK = (top_LE[:, k, None] + _lightest(light_LE, shape.slots_K[K] - k - d)) / shape.speed_K[K]
    mean_LK = np.minimum.accumulate(mean_LK, axis=1)
    few = min(d, k)  # with x <= d in groups with a cost, x = d is easiest
    bound_L = np.maximum(mean_LK[:, -1], _whole(top_LE, light_LE, shape, k, np.array([few]))[:, 0])
    if k > d > 0:
        x = np.arange(d + 1, k + 1)
        room_X = np.minimum(G, k - x + 2 * d)
        many_LX = np.maximum(mean_LK[:, np.minimum(room_X, most) - 1], _whole(top_LE, light_LE, shape, k, x))
        many_L = np.maximum(many_LX.min(axis=1), _crowd(top_LE, light_LE, shape, k))
        bound_L = np.minimum(bound_L, many_L)
    return bound_L


def _steps(heavy_LE: FloatArray, light_LE: FloatArray, shape: _Shape, known_L: FloatArray) -> FloatArray:
    """What the steps that heavy experts cost prove, or `known_L` where that is larger."""
    d, c, speed = shape.spare, min(slots for slots, _ in shape.kinds), max(v for _, v in shape.kinds)
    n_N = np.array([n for n in _LINES if n < light_LE.shape[1]])
    slope_LN = light_LE[:, n_N] - light_LE[:, n_N - 1]
    least_LN = light_LE[:, n_N] - slope_LN * n_N  # the tangent of F at n, as F is convex
    top_LX = heavy_LE[:, : d + 1]
    known_L = known_L * speed

    def too_many(rows: IntArray, n: IntArray, time_R: FloatArray) -> BoolArray:
        slope_R, least_R = slope_LN[rows, n], least_LN[rows, n]
        step_R = time_R - slope_R * (c - 1)
        start_R = np.maximum(step_R, time_R - least_R - slope_R * c)
        steps_RX = np.ceil((top_LX[rows] - (slope_R + start_R)[:, None]) / step_R[:, None] - _SLOP)
        return np.asarray((time_R > slope_R * c) & (np.maximum(steps_RX, 0.0).sum(axis=1) > d))

    # A slope that needs more time than is known says nothing. What the largest could not raise is left out.
    usable_LN = known_L[:, None] > slope_LN * c
    least_step_L = known_L - (c - 1) * np.where(usable_LN, slope_LN, 0.0).max(axis=1)
    most_L = (np.ceil(top_LX / np.maximum(least_step_L, 1e-300)[:, None]) - 1.0).sum(axis=1)
    rows, n = np.nonzero((most_L > d)[:, None] & usable_LN)
    some = np.flatnonzero(too_many(rows, n, known_L[rows] * (1.0 + _SLOP)))
    rows, n = rows[some], n[some]
    low, high = known_L[rows], top_LX[rows, 0] + slope_LN[rows, n] * c
    for _ in range(_HALVINGS if len(rows) else 0):
        middle = 0.5 * (low + high)
        over = too_many(rows, n, middle)
        low, high = np.where(over, middle, low), np.where(over, high, middle)
    result_L: FloatArray = known_L.copy()
    np.maximum.at(result_L, rows, low)
    return result_L / speed


def _lightest(light_LE: FloatArray, count: IntArray) -> FloatArray:
    """Load of so many of the lightest experts."""
    found: FloatArray = light_LE[:, np.clip(count, 0, light_LE.shape[1] - 1)]
    return found


def _undivided(top_LE: FloatArray, light_LE: FloatArray, shape: _Shape, k: int) -> FloatArray:
    """What whole experts prove for an equal split if x of the k heaviest are divided, for the easiest x <= d.

    Beside the whole ones there may be up to d slots that are empty or hold a piece of an expert that is
    divided and not wholly there. A piece of a heavy one is no lighter than the lightest experts, unless it is
    divided into three or more; then it costs 2: with x divided, at most ``2 (d - x)`` slots are lighter.
    """
    d = shape.spare
    x = np.arange(d + 1)
    n_X = np.minimum(shape.slots_K[np.minimum(k - x, len(shape.slots_K) - 1)], light_LE.shape[1] - 1)
    heaviest_LX = light_LE[:, n_X] - light_LE[:, np.maximum(n_X - 1, 0)]
    top_L1 = (top_LE[:, k] - top_LE[:, k - 1])[:, None]
    some_LX = _whole(top_LE, light_LE, shape, k, x, np.minimum(d, 2 * (d - x)))
    fewest_LX = _whole(top_LE, light_LE, shape, k, x, np.full(d + 1, d))
    return np.asarray(np.where(top_L1 >= 2 * heaviest_LX, some_LX, fewest_LX).min(axis=1))


def _whole(
    top_LE: FloatArray, light_LE: FloatArray, shape: _Shape, k: int, x: IntArray, lighter: IntArray | int = 0
) -> FloatArray:
    """Least time of the GPUs that hold all but x of the k heaviest experts: K of them, K <= k - x.

    All their slots but `lighter` ones are taken by whole experts.
    """
    G = len(shape.slots_K) - 1
    n = k - x
    beside = n + lighter
    load_LX = top_LE[:, k, None] - top_LE[:, x]  # the lightest of them are left
    if shape.alike:
        # The quotient falls, then rises in K, as F is convex: the last is least if below the one before.
        most = np.minimum(np.maximum(n, 1), G)
        last = (load_LX + _lightest(light_LE, shape.slots_K[most] - beside)) / shape.speed_K[most]
        fewer = np.maximum(most - 1, 1)
        before = (load_LX + _lightest(light_LE, shape.slots_K[fewer] - beside)) / shape.speed_K[fewer]
        return np.where((last <= before) & (n > 0), last, 0.0)
    result = np.full(load_LX.shape, np.inf)
    for K in range(1, min(int(n.max(initial=0)), G) + 1):
        time = (load_LX + _lightest(light_LE, shape.slots_K[K] - beside)) / shape.speed_K[K]
        result = np.where(n >= K, np.minimum(result, time), result)
    return np.where(n > 0, result, 0.0)


def _crowd(top_LE: FloatArray, light_LE: FloatArray, shape: _Shape, k: int) -> FloatArray:
    """Least time of a group of cost q with q + 1 of the k heaviest experts, for the easiest q."""
    d, G = shape.spare, len(shape.slots_K) - 1
    q = np.arange(1, min(d, k - 1) + 1)
    load_LQ = top_LE[:, k, None] - top_LE[:, k - q - 1]
    if shape.alike:
        most = np.minimum(q + 1, G)
        last = (load_LQ + _lightest(light_LE, shape.slots_K[most] - 2 * q - 1)) / shape.speed_K[most]
        fewer = np.maximum(most - 1, 1)
        before = (load_LQ + _lightest(light_LE, shape.slots_K[fewer] - 2 * q - 1)) / shape.speed_K[fewer]
        return np.asarray(np.where(last <= before, last, 0.0).min(axis=1))
    if d > _MOST_CROWDS:
        return np.zeros(len(top_LE))
    result = np.full(load_LQ.shape, np.inf)
    for K in range(1, min(d + 1, G) + 1):
        time = (load_LQ + _lightest(light_LE, shape.slots_K[K] - 2 * q - 1)) / shape.speed_K[K]
        result = np.where(q + 1 >= K, np.minimum(result, time), result)
    return np.asarray(result.min(axis=1))
