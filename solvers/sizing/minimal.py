"""The fewest replicas that reach a goal: even per-replica loads, or a time once they are placed.

*Even loads* (MoEless's rule: coefficient of variation of all replicas' loads at most a threshold). With N
replicas in all the loads' mean is ``W / N`` whatever the counts, so only ``sum of w_e^2 / r_e`` is left to
minimise. It is separable and convex: the next replica belongs to the expert with the largest ``w_e^2 / (r_e
(r_e + 1))``, which is Huntington and Hill's apportionment, and one sorted list of those gains holds the
best counts for *every* N. The first N that meets the threshold is the minimum. The paper's greedy adds to
the expert with the largest load per replica instead, which is Adams' apportionment and minimises the
maximum, not the variation.

*A time*: an expert of w tokens needs ``r_e(T)`` replicas to end within T (`bounds.replicas_needed`), which
bounds the total from below. The fewest that can also be packed are found by looking at all placements in tiny
layers, by the pattern search for small layers with equal split, and by the fast constructions for all others,
between that bound and the slots.

Axes: L layers, E experts, G GPUs, C slots of a GPU, P pairs (rank, replicas), N totals.

References
----------
E. V. Huntington, "The apportionment of representatives in Congress", Trans. Amer. Math. Soc. 30 (1928).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from moeless_opt.problems.arrays import BoolArray, FloatArray, IntArray, SlotArray
from moeless_opt.problems.errors import InfeasibleError, ProblemError
from moeless_opt.problems.plan import TimeTable, apportionment_pairs, gpu_times, replicas_needed
from moeless_opt.problems.spec import TOKENS, equal_shares
from moeless_opt.solvers.construct import construct_fractional, search_tiny, widths_for
from moeless_opt.solvers.core import FirstOf, MaxTime, NeverStop, Stop
from moeless_opt.solvers.pack import apportion, fewest_replicas, improve, pack, trim

__all__ = ["CvSizing", "TimeSizing", "fewest_for_cv", "fewest_for_time"]


_ROUND = 1e-12  # relative slop of the threshold
_EVEN = 1e-14  # a variance of no more than rounding makes: as even as can be
_EXTRAS = (0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 1 << 40)  # beyond the bound
_PROVE_EXPERTS = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class CvSizing:
    """Replicas per expert and how even they are.

    Parameters
    ----------
    replicas_LE : array of int32, shape [L, E]
    cv_L : array of float, shape [L]
        Coefficient of variation of the loads of all replicas of the layer.
    met_L : array of bool, shape [L]
        Whether the threshold is met. Where it is not, no counts within the caps meet it: these come closest.
    """

    replicas_LE: SlotArray
    cv_L: FloatArray
    met_L: BoolArray


@dataclass(frozen=True, kw_only=True, slots=True)
class TimeSizing:
    """Few replicas, placed, that end in time.

    Parameters
    ----------
    slots_LGC : array of int32, shape [L, G, C]
        The placement, -1 in empty slots.
    share_LGC : array of float, shape [L, G, C]
        Shares of the experts' tokens.
    replicas_L, bound_L : array of int, shape [L]
        Replicas of each layer, and the fewest that any plan within the time could have.
    met_L : array of bool, shape [L]
        Whether the time is met. Where it is not, all slots are in use; no plan may exist.
    """

    slots_LGC: SlotArray
    share_LGC: FloatArray
    replicas_L: IntArray
    bound_L: IntArray
    met_L: BoolArray


def fewest_for_time(
    load_LE: ArrayLike,
    capacity_LG: ArrayLike,
    speed_G: ArrayLike,
    time_L: ArrayLike,
    split: str = "equal",
    *,
    seconds: float = 0.5,
    stop: Stop | None = None,
) -> TimeSizing:
    """Find few replicas with which every layer ends within its time, placement included.

    Parameters
    ----------
    load_LE : array of float, shape [L, E]
        Tokens of each expert.
    capacity_LG : array of int, shape [L, G]
        Slots.
    speed_G : array of float, shape [G]
        Relative speeds.
    time_L : array of float, shape [L]
        Largest GPU time wanted; for an imbalance x that is x times total load over total speed.
    split : {"equal", "fractional"}
        How tokens are divided.
    seconds : float
        For each layer of up to 16 experts with equal split, to prove the fewest; 0 to do without.
    stop : Stop, optional
        When to stop: layers that miss their time then get all slots at once, and nothing more is proven.

    Returns
    -------
    TimeSizing
    """
    load = np.ascontiguousarray(load_LE, dtype=np.float64)
    speed = np.asarray(speed_G, dtype=np.float64)
    L, E = load.shape
    capacity = np.minimum(np.asarray(capacity_LG, dtype=np.int64), E)
    target_L = np.broadcast_to(np.asarray(time_L, dtype=np.float64), (L,)) * (1 + 1e-9)
    most_L = capacity.sum(axis=1)
    bound_L = np.minimum(replicas_needed(load, target_L, speed, split).sum(axis=1), most_L)
    stop = NeverStop() if stop is None else stop
    slots_LGC, share_LGC, met_L = _few(load, capacity, speed, bound_L, target_L, split, stop)
    bound_L = _exactly(load, capacity, speed, bound_L, target_L, split, (slots_LGC, share_LGC, met_L), stop)
    if split == "equal" and E <= _PROVE_EXPERTS and seconds > 0:
        for layer in range(L):
            used = int((slots_LGC[layer] >= 0).sum())
            if met_L[layer] and used == bound_L[layer]:
                continue
            if stop():
                break
            bound, better = fewest_replicas(
                load[layer],
                capacity[layer],
                speed,
                limit=float(target_L[layer]),
                most=used if met_L[layer] else None,
                stop=FirstOf(stop, MaxTime(seconds)),
            )
            bound_L[layer] = max(int(bound_L[layer]), bound)
            if better is not None:
                slots_LGC[layer] = -1
                slots_LGC[layer, :, : better.shape[1]] = better
                share_LGC[layer] = equal_shares(slots_LGC[layer : layer + 1], E)[0]
                met_L[layer] = True
    return TimeSizing(
        slots_LGC=slots_LGC,
        share_LGC=share_LGC,
        replicas_L=(slots_LGC >= 0).sum(axis=(1, 2)),
        bound_L=bound_L,
        met_L=met_L,
    )


def _exactly(
    load: FloatArray,
    capacity: IntArray,
    speed: FloatArray,
    bound_L: IntArray,
    target_L: FloatArray,
    split: str,
    best: tuple[SlotArray, FloatArray, BoolArray],
    stop: Stop,
) -> IntArray:
    """Tiny layers: ever more replicas from the bound on, until some placement is in time; in place.

    Returns the fewest replicas that any plan in time could have, shape [L].
    """
    slots_LGC, share_LGC, met_L = best
    L, E = load.shape
    bound_L = bound_L.copy()
    widths, table = widths_for(E * len(speed), L, split == "equal", stop), TimeTable.of(TOKENS, 1)
    if not widths:
        return bound_L
    for layer in range(L):
        used = int((slots_LGC[layer] >= 0).sum()) if met_L[layer] else int(capacity[layer].sum()) + 1
        for replicas in range(int(bound_L[layer]), used):
            if stop():
                break
            found = search_tiny(
                load[layer],
                capacity[layer],
                speed,
                table,
                float(target_L[layer]) * (1 + 2e-9),
                equal=split == "equal",
                widths=widths,
                replicas=replicas,
                stop=stop,
            )
            if found.slots_GC is not None and found.share_GC is not None:
                width = found.slots_GC.shape[1]
                slots_LGC[layer], share_LGC[layer], met_L[layer] = -1, 0.0, True
                slots_LGC[layer, :, :width], share_LGC[layer, :, :width] = found.slots_GC, found.share_GC
                break
            # In no placement of so many: one more is the least, where nothing was cut short.
            if found.bound <= 0 or bound_L[layer] != replicas:
                break
            bound_L[layer] = min(replicas + 1, int(capacity[layer].sum()))
    return bound_L


def _few(
    load: FloatArray,
    capacity: IntArray,
    speed: FloatArray,
    bound_L: IntArray,
    target_L: FloatArray,
    split: str,
    stop: Stop,
) -> tuple[SlotArray, FloatArray, BoolArray]:
    """Place ever more replicas until every layer is in time or has all slots: (slots, shares, in time)."""
    most_L = capacity.sum(axis=1)
    slots_LGC = np.full((*capacity.shape, int(capacity.max())), -1, dtype=np.int32)
    share_LGC = np.zeros(slots_LGC.shape)
    met_L = np.zeros(len(load), dtype=bool)
    for extra in _EXTRAS:
        todo = np.flatnonzero(~met_L)
        if not len(todo):
            break
        total = np.minimum(bound_L[todo] + (_EXTRAS[-1] if stop() else extra), most_L[todo])
        slots, share, now = _built(load[todo], capacity[todo], speed, total, target_L[todo], split)
        slots_LGC[todo], share_LGC[todo] = slots, share
        met_L[todo] = now <= target_L[todo]
        if (total == most_L[todo]).all():
            break
    return slots_LGC, share_LGC, met_L


def _built(
    load: FloatArray,
    capacity: IntArray,
    speed: FloatArray,
    total_L: IntArray,
    target_L: FloatArray,
    split: str,
) -> tuple[SlotArray, FloatArray, FloatArray]:
    """Place so many replicas by the fast constructions: (slots, shares, largest GPU times)."""
    E = load.shape[1]
    if split == "equal":
        counts = apportion(load, total_L, (capacity > 0).sum(axis=1)[:, None])
        slots = pack(load, trim(load, counts, capacity), capacity, speed)
        slots = improve(load, slots, capacity, speed, goal_L=target_L)
        share = equal_shares(slots, E)
    else:
        # Slots are taken away where most are left, so that the GPUs keep about the same ...
        fewer = _fewer(capacity, total_L, np.ones(len(speed)))
        slots, share = construct_fractional(load, fewer, speed, enough_L=target_L)
        late_L = np.flatnonzero(gpu_times(load, slots, share, speed).max(axis=1) > target_L)
        if len(late_L) and (speed != speed[0]).any():  # ... or as many as their speed asks for.
            fewer = _fewer(capacity[late_L], total_L[late_L], speed)
            other = construct_fractional(load[late_L], fewer, speed, enough_L=target_L[late_L])
            good = gpu_times(load[late_L], *other, speed).max(axis=1) <= target_L[late_L]
            wide = max(slots.shape[2], other[0].shape[2])
            slots, share = _wide(slots, share, wide)
            other_slots, other_share = _wide(*other, wide)
            slots[late_L[good]], share[late_L[good]] = other_slots[good], other_share[good]
    width = int(capacity.max())
    slots, share = _wide(slots[:, :, :width], share[:, :, :width], width)
    return slots, share, gpu_times(load, slots, share, speed).max(axis=1)


def _fewer(capacity_LG: IntArray, total_L: IntArray, weight_G: FloatArray) -> IntArray:
    """So many slots, taken away where most are left for the weight of the GPU, shape [L, G]."""
    result = capacity_LG.copy()
    for layer, total in enumerate(total_L):
        while result[layer].sum() > total:
            result[layer, int((result[layer] / weight_G).argmax())] -= 1
    return result


def _wide(slots: SlotArray, share: FloatArray, width: int) -> tuple[SlotArray, FloatArray]:
    """As many slots for each GPU, empty ones added."""
    pad = ((0, 0), (0, 0), (0, width - slots.shape[2]))
    return np.pad(slots, pad, constant_values=-1), np.pad(share, pad)


def fewest_for_cv(
    load_LE: ArrayLike,
    cv: float = 0.2,
    cap: ArrayLike | None = None,
    *,
    max_replicas: int | None = None,
    ddof: int = 0,
    idle: str = "count",
) -> CvSizing:
    """Return the fewest replicas with a coefficient of variation of at most ``cv``, layer by layer, exactly.

    Parameters
    ----------
    load_LE : array of float, shape [L, E]
        Tokens of each expert.
    cv : float
        The threshold, at least 0.
    cap : int or array of int, shape [L], optional
        Most replicas of a layer in all, at least one per expert (default: what `max_replicas` allows, or 64
        per expert). For a cap in bytes divide them by the bytes of a replica.
    max_replicas : int, optional
        Most replicas of one expert, usually the number of GPUs.
    ddof : {0, 1}
        0 for the population's standard deviation, 1 for the sample's.
    idle : {"count", "ignore"}
        Whether experts without load count in the variation. Each holds one replica in any case.

    Returns
    -------
    CvSizing
        The fewest replicas in all, and of those counts the ones that vary least.

    Raises
    ------
    ProblemError
        If an argument is out of range.
    InfeasibleError
        If a cap is below one replica per expert.

    Examples
    --------
    >>> fewest_for_cv([[69.0, 10.0, 9.0, 6.0, 4.0]], cv=0.2, cap=16).replicas_LE
    array([[8, 1, 1, 1, 1]], dtype=int32)
    """
    load_LE = np.atleast_2d(np.asarray(load_LE, dtype=np.float64))
    L, E = load_LE.shape
    if not cv >= 0:
        raise ProblemError("cv", f"is {cv!r}, must be a number of at least 0")
    if ddof not in (0, 1):
        raise ProblemError("ddof", f"is {ddof!r}, must be 0 (population) or 1 (sample)")
    if idle not in ("count", "ignore"):
        raise ProblemError("idle", f"is {idle!r}, must be 'count' or 'ignore'")
    if max_replicas is not None and max_replicas < 1:
        raise ProblemError("max_replicas", f"is {max_replicas!r}, must be at least 1")
    most = 64 if max_replicas is None else max_replicas
    cap_L = np.broadcast_to(np.asarray(E * most if cap is None else cap, dtype=np.int64), (L,))
    if (cap_L < E).any():
        layer = int(np.argmax(cap_L < E))
        raise InfeasibleError(
            f"cap: layer {layer} may have {cap_L[layer]} replicas, its {E} experts need {E}"
        )
    if max_replicas is None:
        most = int(cap_L.max()) - E + 1
    spare_L = np.minimum(cap_L - E, E * (most - 1))

    replicas_LE = np.ones((L, E), dtype=np.int32)
    cv_L, met_L = np.full(L, np.inf), np.zeros(L, dtype=bool)
    # Few layers need many replicas: look at short lists of gains first.
    todo, extra = np.arange(L), min(E, int(spare_L.max(initial=0)))
    while len(todo):
        part = _sized(load_LE[todo], np.minimum(spare_L[todo], extra), most, cv, ddof, idle == "count")
        replicas_LE[todo], cv_L[todo], met_L[todo] = part.replicas_LE, part.cv_L, part.met_L
        todo = todo[~part.met_L & (spare_L[todo] > extra)]
        extra *= 2
    return CvSizing(replicas_LE=replicas_LE, cv_L=cv_L, met_L=met_L)


def _sized(
    load_LE: FloatArray, spare_L: IntArray, most: int, cv: float, ddof: int, count_idle: bool
) -> CvSizing:
    """Size layers with at most ``spare_L`` replicas beyond one per expert."""
    L, E = load_LE.shape
    order_LE = np.argsort(-load_LE, axis=1, kind="stable")
    heavy_LE = np.take_along_axis(load_LE, order_LE, axis=1)
    rank_P, count_P = apportionment_pairs(E, most - 1, int(spare_L.max(initial=0)))
    gain_LP = heavy_LE[:, rank_P] ** 2 / (count_P * (count_P + 1))
    given_LP = np.sort(gain_LP, axis=1)[:, ::-1][:, : int(spare_L.max(initial=0))]

    # Squares of the loads with 0, 1, 2, ... spare replicas: the sum over replicas of their load squared.
    square_LN = np.empty((L, given_LP.shape[1] + 1))
    square_LN[:, 0] = (load_LE**2).sum(axis=1)
    square_LN[:, 1:] = square_LN[:, :1] - given_LP.cumsum(axis=1)
    total_LN = np.arange(given_LP.shape[1] + 1) + (
        E if count_idle else np.maximum((load_LE > 0).sum(axis=1), 1)[:, None]
    )
    work_L1 = load_LE.sum(axis=1, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        variance_LN = np.maximum(total_LN * square_LN / work_L1**2 - 1.0, 0.0)
        if ddof:
            variance_LN = np.where(total_LN > 1, variance_LN * total_LN / (total_LN - 1), 0.0)
    variance_LN = np.where(work_L1 > 0, variance_LN, 0.0)

    # Replicas of an expert without load cannot be meant: they would only fill up the mean.
    allowed_LN = np.arange(given_LP.shape[1] + 1) <= spare_L[:, None]
    allowed_LN[:, 1:] &= given_LP > 0
    meets_LN: BoolArray = allowed_LN & (variance_LN <= cv * cv * (1 + _ROUND) + _EVEN)
    met_L: BoolArray = np.logical_or.reduce(meets_LN, axis=1)
    closest_L = np.where(allowed_LN, variance_LN, np.inf).argmin(axis=1)
    spare_used_L = np.where(met_L, meets_LN.argmax(axis=1), closest_L)

    # The gains above the last one given are all taken; of those equal to it the first.
    last_L1 = np.append(np.full((L, 1), np.inf), given_LP, axis=1)[np.arange(L), spare_used_L][:, None]
    taken_LP = gain_LP > last_L1
    equal_LP = gain_LP == last_L1
    equal_LP &= equal_LP.cumsum(axis=1) <= (spare_used_L - taken_LP.sum(axis=1))[:, None]
    layer, pair = np.nonzero(taken_LP | equal_LP)
    expert = order_LE[layer, rank_P[pair]]
    replicas_LE = 1 + np.bincount(layer * E + expert, minlength=L * E).reshape(L, E)
    cv_L = np.sqrt(variance_LN[np.arange(L), spare_used_L])
    return CvSizing(replicas_LE=replicas_LE.astype(np.int32), cv_L=cv_L, met_L=met_L)
