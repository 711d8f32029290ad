"""Lower bounds on the largest GPU time of a layer: the half of a certificate that no plan can beat.

Every bound here holds for *any* placement that respects the slots (unless it says that it is about a
given placement), so ``gap = (time - bound) / bound`` of a plan is a proof, not an estimate. All layers are
bounded at once; no solver and nothing but numpy is needed, since every plan carries a certificate.

========  ===============================================================================================
name      argument
========  ===============================================================================================
mean      all work spread over all GPUs that have a slot
tau       within time T an expert needs at least r_e(T) replicas; the least T at which those fit the slots
slots     a GPU cannot serve more tokens than its few slots hold: a GPU of one slot serves one expert at most
packing   d spare slots split at most d experts; the others are whole, and pigeons share holes
fillers   with few spare slots, GPUs are full: heavy experts lie with others (see `scarce_bounds`)
density   (given placement) experts whose replicas all lie on the GPUs R load R, however shares are chosen
========  ===============================================================================================

Axes: L layers, E experts, G GPUs, C slots of a GPU, P pairs (expert rank, replicas).

References
----------
``tau`` is the classic optimality of greedy apportionment: for a given number of replicas, giving the next
one to the expert with the largest load per replica minimises the largest load per replica. ``density`` is
the dual of the token-split LP (a largest induced-subgraph density), and ``slots`` a fractional knapsack.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moeless_opt.problems.arrays import FloatArray, IntArray
from moeless_opt.problems.errors import ProblemError
from moeless_opt.problems.plan.scarce_bounds import scarce_bound
from moeless_opt.problems.spec import TOKENS, Split, TimeModel

__all__ = [
    "apportionment_pairs",
    "best_bound",
    "density_bound",
    "mean_bound",
    "packing_bound",
    "replicas_needed",
    "slots_bound",
    "tau_curve",
    "tau_star",
]


def best_bound(
    load_LE: ArrayLike,
    capacity_LG: ArrayLike,
    speed_G: ArrayLike | None = None,
    split: str = Split.EQUAL,
    *,
    max_replicas: ArrayLike | None = None,
    min_replicas: ArrayLike | None = None,
    replicas_L: ArrayLike | None = None,
    time: TimeModel = TOKENS,
) -> tuple[FloatArray, NDArray[np.str_]]:
    """Return the best of all bounds on the largest GPU time of every layer, and which one it is.

    Parameters
    ----------
    load_LE : array of float, shape [L, E]
        Tokens of each expert, at least 0.
    capacity_LG : array of int, shape [L, G]
        Slots of each GPU in each layer.
    speed_G : array of float, shape [G], optional
        Relative speeds, above 0 (default 1).
    split : Split or str
        Whether an expert's tokens are divided evenly over its replicas or freely.
    max_replicas, min_replicas : int or array of int, shape [E] or [L, E], optional
        Limits on the replicas of an expert (default: 1 to the number of GPUs).
    replicas_L : array of int, shape [L], optional
        Limit on the replicas of a layer in all (default: its slots).
    time : TimeModel
        A linear time model (default: time is tokens).

    Returns
    -------
    bound_L : array of float, shape [L]
        No plan is faster than this. Infinite where even one replica of each expert does not fit.
    name_L : array of str, shape [L]
        ``"mean"``, ``"tau"``, ``"slots"``, ``"packing"`` or ``"fillers"``; the simplest one of equal ones.
    """
    layers = _Layers.make(load_LE, capacity_LG, speed_G, max_replicas, min_replicas, replicas_L)
    key = layers.key(split, time)
    known = _LATEST.get(key)
    if known is None:
        known = _best_of(layers, split, time)
        _LATEST.clear()
        _LATEST[key] = known
    return known[0].copy(), known[1].copy()


# A re-plan asks for the bound first, and its certificate for the same one again.
_LATEST: dict[tuple[object, ...], tuple[FloatArray, NDArray[np.str_]]] = {}


def _best_of(layers: _Layers, split: str, time: TimeModel) -> tuple[FloatArray, NDArray[np.str_]]:
    """The best bound of each layer, and its name."""
    bound_L = _mean(layers, time)
    which_L = np.zeros(len(bound_L), dtype=np.int64)
    others = (
        _tau(layers, split, time),
        None if layers.alike else _slots(layers, time),
        _packing(layers, time),
    )
    for number, other_L in enumerate(others, start=1):
        if other_L is None:
            continue
        better_L = other_L > bound_L * (1 + 1e-12)
        if better_L.any():
            bound_L = np.where(better_L, other_L, bound_L)
            which_L[better_L] = number
    fillers_L = _fillers(layers, bound_L, split, time)
    better_L = fillers_L > bound_L * (1 + 1e-12)
    return np.where(better_L, fillers_L, bound_L), _NAMES[np.where(better_L, len(others) + 1, which_L)]


_NAMES = np.array(["mean", "tau", "slots", "packing", "fillers"])


def _is_tokens(time: TimeModel) -> bool:
    """Whether time is tokens over speed; anything else must be linear."""
    if time.has_curve:
        raise ProblemError("time", "is a measured curve, must be linear here (`timed_bound` takes curves)")
    return time.counts_tokens_only and time.token_cost == 1.0


def mean_bound(
    load_LE: ArrayLike, capacity_LG: ArrayLike, speed_G: ArrayLike | None = None, *, time: TimeModel = TOKENS
) -> FloatArray:
    """Return the time at which all GPUs that have a slot finish together (see `best_bound`)."""
    return _mean(_Layers.make(load_LE, capacity_LG, speed_G), time)


def tau_star(
    load_LE: ArrayLike,
    capacity_LG: ArrayLike,
    speed_G: ArrayLike | None = None,
    split: str = Split.EQUAL,
    *,
    max_replicas: ArrayLike | None = None,
    min_replicas: ArrayLike | None = None,
    replicas_L: ArrayLike | None = None,
    time: TimeModel = TOKENS,
) -> FloatArray:
    """Return the least time at which the replicas that each expert needs fit the slots, exactly.

    With equal speeds an expert of w tokens needs ``ceil(w / T)`` replicas to end within T. With unequal
    speeds it gets the fastest GPUs there are: r replicas serve ``T * (s_1 + ... + s_r)`` tokens with free
    shares and at most ``T * r * s_r`` with equal ones. See `best_bound` for the parameters.

    Notes
    -----
    The least T is one of the values ``Q(e, r)``, the time that expert e needs with r replicas. If d slots
    are spare, it is the (d + 1)-th largest of them: every larger one costs a replica. As Q falls in r and
    rises in the load, the i-th heaviest expert's r-th value can be among the d + 1 largest only if
    i * r <= d + 1, so about d log d candidates are enough and the search is a partition, not a bisection.
    """
    layers = _Layers.make(load_LE, capacity_LG, speed_G, max_replicas, min_replicas, replicas_L)
    return _tau(layers, split, time)


def tau_curve(
    load_LE: ArrayLike,
    speed_G: ArrayLike,
    most: int,
    split: str = Split.EQUAL,
    *,
    max_replicas: int | None = None,
    time: TimeModel = TOKENS,
) -> FloatArray:
    """Return `tau_star` for every number of spare replicas at once: what each one can buy at best.

    Parameters
    ----------
    load_LE, split, time
        As in `best_bound`.
    speed_G : array of float, shape [G]
        Speeds of the GPUs that hold the layer.
    most : int
        Largest number of spare replicas.
    max_replicas : int, optional
        Most replicas of an expert (default: the number of GPUs).

    Returns
    -------
    array of float, shape [L, most + 1]
        The bound with 0, 1, ..., `most` replicas beyond one per expert; it never rises.
    """
    load = np.asarray(load_LE, dtype=np.float64)
    heavy_LE = np.sort(load, axis=1)[:, ::-1]
    speed = np.sort(np.asarray(speed_G, dtype=np.float64))[::-1]
    copies = len(speed) if max_replicas is None else min(len(speed), max_replicas)
    floor_L1 = _quotient(heavy_LE[:, :1], np.array([copies]), speed, split, time)
    rank_P, count_P = apportionment_pairs(load.shape[1], copies - 1, most + 1)
    steps_LP = np.sort(_quotient(heavy_LE[:, rank_P], count_P, speed, split, time), axis=1)[:, ::-1]
    curve_LK = np.zeros((len(load), most + 1))
    listed = min(most + 1, steps_LP.shape[1])
    curve_LK[:, :listed] = steps_LP[:, :listed]
    return np.maximum(curve_LK, floor_L1)


def slots_bound(
    load_LE: ArrayLike, capacity_LG: ArrayLike, speed_G: ArrayLike | None = None, *, time: TimeModel = TOKENS
) -> FloatArray:
    """Return the least T with ``sum over g of min(T * speed_g, load of the C_g heaviest experts) >= total``.

    It exceeds the mean only where GPUs differ: a fast GPU with few slots cannot be filled.
    """
    return _slots(_Layers.make(load_LE, capacity_LG, speed_G), time)


def packing_bound(
    load_LE: ArrayLike,
    capacity_LG: ArrayLike,
    speed_G: ArrayLike | None = None,
    *,
    replicas_L: ArrayLike | None = None,
    time: TimeModel = TOKENS,
) -> FloatArray:
    """Return the pigeonhole bound on the experts that must stay whole.

    With d spare slots at most d experts have two replicas or more. The rest is easiest to pack when those
    are the d heaviest, so take them away: of the ``k * G + 1`` heaviest that remain, ``k + 1`` lie whole on
    one GPU. It matters when slots are scarce (S < E + G: the GPUs then fall into groups that cannot share).
    """
    layers = _Layers.make(load_LE, capacity_LG, speed_G, replicas_L=replicas_L)
    bound_L = _packing(layers, time)
    return np.zeros(len(layers.total_L)) if bound_L is None else bound_L


def replicas_needed(
    load_LE: ArrayLike,
    time_L: ArrayLike,
    speed_G: ArrayLike,
    split: str = Split.EQUAL,
    *,
    time: TimeModel = TOKENS,
) -> IntArray:
    """Return the fewest replicas with which each expert can end in time, if it had the fastest GPUs.

    Parameters
    ----------
    load_LE, speed_G, split, time
        As in `best_bound`.
    time_L : array of float, shape [L]
        The time wanted for each layer.

    Returns
    -------
    array of int, shape [L, E]
        At least 1; G + 1 where not even all GPUs are enough.
    """
    load_LE = np.atleast_2d(np.asarray(load_LE, dtype=np.float64))
    speed_G = np.sort(np.asarray(speed_G, dtype=np.float64))[::-1]
    target_L = np.broadcast_to(np.asarray(time_L, dtype=np.float64), load_LE.shape[:1])
    count_LE = np.ones(load_LE.shape, dtype=np.int64)
    unmet_LE = np.ones(load_LE.shape, dtype=bool)
    for count in range(1, len(speed_G) + 1):
        unmet_LE &= _quotient(load_LE, np.array(count), speed_G, split, time) > target_L[:, None] * (
            1 + 1e-12
        )
        if not unmet_LE.any():
            break
        count_LE += unmet_LE
    return count_LE


def density_bound(
    load_LE: ArrayLike, slots_LGC: ArrayLike, share_LGC: ArrayLike, speed_G: ArrayLike | None = None
) -> FloatArray:
    """Return a bound on the time of a *given placement* over all token shares: it certifies shares.

    Parameters
    ----------
    load_LE, speed_G
        As in `best_bound`.
    slots_LGC : array of int, shape [L, G, C]
        Expert in each slot, -1 where empty.
    share_LGC : array of float, shape [L, G, C]
        Shares whose quality is in question. With optimal shares the bound equals their largest GPU time.

    Returns
    -------
    array of float, shape [L]
        ``max over sets R of GPUs (load of the experts with all replicas in R) / (speed of R)``, over the
        sets that the shares suggest: the slowest GPUs, and those that the slowest can hand tokens on to.
    """
    inside_LR, speed_LR = _dense_sets(load_LE, slots_LGC, share_LGC, speed_G)
    density_L: FloatArray = (inside_LR / speed_LR).max(axis=1)
    return density_L


def _dense_sets(
    load_LE: ArrayLike, slots_LGC: ArrayLike, share_LGC: ArrayLike, speed_G: ArrayLike | None
) -> tuple[FloatArray, FloatArray]:
    """Return the load that cannot leave each set R of `density_bound`, and R's speed, both (L, G + 1)."""
    load = np.asarray(load_LE, dtype=np.float64)
    slots, share = np.asarray(slots_LGC), np.asarray(share_LGC, dtype=np.float64)
    L, E = load.shape
    G = slots.shape[1]
    speed = np.ones(G) if speed_G is None else np.asarray(speed_G, dtype=np.float64)
    layer, gpu, slot = np.nonzero(slots >= 0)
    expert = slots[layer, gpu, slot]
    hosts_LEG = np.zeros((L, E, G), dtype=np.float32)
    hosts_LEG[layer, expert, gpu] = 1.0
    serves_LGE = np.zeros((L, G, E), dtype=np.float32)
    serves_LGE[layer, gpu, expert] = share[layer, gpu, slot] > 1e-9
    token_LG = np.zeros((L, G))
    np.add.at(token_LG, (layer, gpu), load[layer, expert] * share[layer, gpu, slot])
    time_LG = token_LG / speed

    # The k slowest GPUs, for every k: an expert lies inside from the rank of its last host on.
    order_LG = np.argsort(-time_LG, axis=1, kind="stable")
    rank_LG = np.argsort(order_LG, axis=1, kind="stable")
    last_LE = (hosts_LEG * rank_LG[:, None, :]).max(axis=2).astype(np.int64)
    inside_LR = np.zeros((L, G + 1))
    np.add.at(inside_LR, (np.arange(L)[:, None], last_LE), load)
    inside_LR[:, :G] = inside_LR[:, :G].cumsum(axis=1)
    speed_LR = np.empty((L, G + 1))
    speed_LR[:, :G] = speed[order_LG].cumsum(axis=1)

    # All GPUs that the slowest one can reach by handing tokens on: nothing in it can be handed further.
    hands_on_LGG = (serves_LGE @ hosts_LEG) > 0
    reach_LG = time_LG >= time_LG.max(axis=1, keepdims=True)
    for _ in range(G):
        wider_LG = reach_LG | (reach_LG[:, :, None] & hands_on_LGG).any(axis=1)
        if (wider_LG == reach_LG).all():
            break
        reach_LG = wider_LG
    within_LE = (hosts_LEG * ~reach_LG[:, None, :]).sum(axis=2) == 0
    inside_LR[:, G] = (load * within_LE).sum(axis=1)
    speed_LR[:, G] = reach_LG @ speed
    return inside_LR, speed_LR


@dataclass(slots=True)
class _Layers:
    """The arguments of a bound, checked once, with what several bounds need."""

    load_LE: FloatArray
    heavy_LE: FloatArray  # descending
    total_L: FloatArray
    capacity_LG: IntArray
    speed_G: FloatArray
    alike: bool  # every GPU has the same speed, and the same slots within a layer
    max_LE: IntArray | None
    min_LE: IntArray | None
    replicas_L: IntArray | None

    @classmethod
    def make(
        cls,
        load_LE: ArrayLike,
        capacity_LG: ArrayLike,
        speed_G: ArrayLike | None,
        max_replicas: ArrayLike | None = None,
        min_replicas: ArrayLike | None = None,
        replicas_L: ArrayLike | None = None,
    ) -> _Layers:
        load = np.asarray(load_LE, dtype=np.float64)
        capacity = np.asarray(capacity_LG, dtype=np.int64)
        L, G = capacity.shape
        speed = np.ones(G) if speed_G is None else np.asarray(speed_G, dtype=np.float64)
        alike = bool((capacity == capacity[:, :1]).all() and (speed == speed[0]).all())
        heavy = np.sort(load, axis=1)[:, ::-1]
        return cls(
            load,
            heavy,
            load.sum(axis=1),
            capacity,
            speed,
            alike,
            None if max_replicas is None else np.broadcast_to(np.asarray(max_replicas), load.shape),
            None if min_replicas is None else np.broadcast_to(np.asarray(min_replicas), load.shape),
            None if replicas_L is None else np.broadcast_to(np.asarray(replicas_L), (L,)),
        )

    def key(self, split: str, time: TimeModel) -> tuple[object, ...]:
        """All that a bound depends on, to tell whether it is known."""
        given = (self.load_LE, self.capacity_LG, self.speed_G, self.max_LE, self.min_LE, self.replicas_L)
        arrays = tuple(None if one is None else (one.shape, one.dtype.str, one.tobytes()) for one in given)
        return (*arrays, str(split), time.launch, time.activation_cost, time.token_cost)

    def groups(self) -> list[tuple[IntArray | slice, IntArray, int | None]]:
        """Layers with the same slots and the same limit on replicas: (their indices, capacity_G, limit)."""
        if len(self.capacity_LG) == 1 or (
            self.replicas_L is None and bool((self.capacity_LG == self.capacity_LG[0]).all())
        ):
            limit = None if self.replicas_L is None else int(self.replicas_L[0])
            return [(slice(None), self.capacity_LG[0], limit)]
        keys = self.capacity_LG
        if self.replicas_L is not None:
            keys = np.column_stack([keys, self.replicas_L])
        unique, inverse = np.unique(keys, axis=0, return_inverse=True)
        inverse = inverse.reshape(-1)
        G = self.capacity_LG.shape[1]
        return [
            (np.flatnonzero(inverse == k), row[:G], None if self.replicas_L is None else int(row[G]))
            for k, row in enumerate(unique)
        ]


def _mean(layers: _Layers, time: TimeModel) -> FloatArray:
    if layers.alike:
        speed_L = (layers.capacity_LG[:, 0] > 0) * layers.speed_G.sum()
        gpus_L: FloatArray | int = layers.capacity_LG.shape[1]
    else:
        speed_L = (layers.capacity_LG > 0) @ layers.speed_G
        gpus_L = (layers.capacity_LG > 0).sum(axis=1)
    work_L = layers.total_L
    if not _is_tokens(time):
        active_L = (layers.load_LE > 0).sum(axis=1)
        work_L = time.launch * gpus_L + time.activation_cost * active_L + time.token_cost * work_L
    if speed_L.all():
        mean_L: FloatArray = work_L / speed_L
        return mean_L
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(speed_L > 0, work_L / speed_L, np.inf)


def _tau(layers: _Layers, split: str, time: TimeModel) -> FloatArray:
    E = layers.load_LE.shape[1]
    tau_L = np.zeros(len(layers.load_LE))
    for index, capacity_G, limit in layers.groups():
        speed_G = np.sort(layers.speed_G[capacity_G > 0])[::-1]
        slots = int(np.minimum(capacity_G, E).sum())
        if limit is not None:
            slots = min(slots, limit)
        heavy_LE = layers.heavy_LE[index]
        if len(speed_G) == 0 or slots < E:
            tau_L[index] = np.inf
            continue
        if layers.min_LE is None:
            tau_l = _tau_alike(heavy_LE, speed_G, slots - E, split, time)
        else:
            tau_l = _tau_floors(layers.load_LE[index], layers.min_LE[index], speed_G, slots, split, time)
        if layers.max_LE is not None:
            most_LE = np.clip(layers.max_LE[index], 1, max(len(speed_G), 1))
            tau_l = np.maximum(
                tau_l, _quotient(layers.load_LE[index], most_LE, speed_G, split, time).max(axis=1)
            )
        if not layers.alike and slots > E and layers.min_LE is None:
            tau_l = _tau_distinct(tau_l, layers.load_LE[index], capacity_G, speed_G, split, time)
        tau_L[index] = tau_l
    return tau_L


def _tau_alike(
    heavy_LE: FloatArray, speed_G: FloatArray, spare: int, split: str, time: TimeModel
) -> FloatArray:
    """Return the (spare + 1)-th largest ``Q(e, r)``; at least what the heaviest needs on all G GPUs."""
    G = len(speed_G)
    tau_L = _quotient(heavy_LE[:, :1], np.array([G]), speed_G, split, time)[:, 0]
    rank_P, count_P = apportionment_pairs(heavy_LE.shape[1], G - 1, spare + 1)
    if len(rank_P) > spare:
        quotient_LP = _quotient(heavy_LE[:, rank_P], count_P, speed_G, split, time)
        nth = len(rank_P) - 1 - spare
        tau_L = np.maximum(tau_L, np.partition(quotient_LP, nth, axis=1)[:, nth])
    return tau_L


def _tau_floors(
    load_LE: FloatArray, least_LE: IntArray, speed_G: FloatArray, slots: int, split: str, time: TimeModel
) -> FloatArray:
    """`_tau_alike` where experts start from a least number of replicas: all candidates are looked at."""
    L = len(load_LE)
    G = len(speed_G)
    tau_L: FloatArray = _quotient(load_LE, np.array(G), speed_G, split, time).max(axis=1)
    count_R = np.arange(1, G)
    for layer in range(L):
        least_E = np.maximum(least_LE[layer], 1)
        spare = slots - int(least_E.sum())
        if spare < 0 or int(least_E.max()) > G:
            tau_L[layer] = np.inf
            continue
        quotient_ER = _quotient(load_LE[layer][:, None], count_R, speed_G, split, time)
        costs = np.sort(quotient_ER[count_R >= least_E[:, None]])[::-1]
        if len(costs) > spare:
            tau_L[layer] = max(tau_L[layer], costs[spare])
    return tau_L


def _tau_distinct(
    tau_L: FloatArray,
    load_LE: FloatArray,
    capacity_G: IntArray,
    speed_G: FloatArray,
    split: str,
    time: TimeModel,
) -> FloatArray:
    """Raise tau until its replicas fit GPUs of *different* slots without two of one expert on a GPU.

    Gale-Ryser: replicas r_e can be placed on distinct GPUs iff for every k the k most replicated experts
    have at most ``sum over g of min(C_g, k)`` of them. Many slots on one GPU do not help an expert twice.
    """
    E = load_LE.shape[1]
    room_E = np.minimum(capacity_G[:, None], np.arange(1, E + 1)).sum(axis=0)
    count_R = np.arange(1, len(speed_G) + 1)
    result_L = tau_L.copy()
    for layer in range(len(load_LE)):
        quotient_ER = _quotient(load_LE[layer][:, None], count_R, speed_G, split, time)
        steps = np.unique(quotient_ER[quotient_ER > tau_L[layer]])
        steps = np.concatenate([tau_L[layer : layer + 1], steps])
        low, high = 0, len(steps) - 1
        while low < high:
            middle = (low + high) // 2
            need_E = 1 + (quotient_ER[:, :-1] > steps[middle]).sum(axis=1)
            if bool((np.sort(need_E)[::-1].cumsum() <= room_E).all()):
                high = middle
            else:
                low = middle + 1
        result_L[layer] = steps[low]
    return result_L


def _quotient(
    load: FloatArray, count: IntArray, speed_G: FloatArray, split: str, time: TimeModel
) -> FloatArray:
    """Least time of an expert with at most ``count`` replicas on the fastest GPUs (``speed_G`` descends)."""
    start = time.launch + time.activation_cost
    if speed_G[0] == speed_G[-1] and (start == 0 or split == "equal"):
        quotient: FloatArray = load / count
        if not _is_tokens(time):
            quotient = np.where(load > 0, start + time.token_cost * quotient, 0.0)
        return quotient if speed_G[0] == 1.0 else quotient / speed_G[0]
    # Slower GPUs and activation costs can make more replicas worse: "at most count" is the running minimum.
    load, count = np.broadcast_arrays(load, count)
    best = np.full(load.shape, np.inf)
    total = 0.0
    for r in range(1, int(count.max(initial=0)) + 1):
        total += speed_G[r - 1]
        if split == "equal":
            now = (start + time.token_cost * load / r) / speed_G[r - 1]
        else:
            now = (start * r + time.token_cost * load) / total
        best = np.where(count >= r, np.minimum(best, now), best)
    return np.where(load > 0, best, 0.0)


@lru_cache(maxsize=256)
def apportionment_pairs(experts: int, most: int, wanted: int) -> tuple[IntArray, IntArray]:
    """Return all (rank, replicas) that can be among the ``wanted`` largest quotients of an apportionment.

    Quotients fall in the replicas and in the rank by load, so ``(rank + 1) * replicas - 1`` others are at
    least as large: only pairs with ``(rank + 1) * replicas <= wanted`` count, ``wanted * log(wanted)`` or so.

    Parameters
    ----------
    experts, most, wanted : int
        Number of experts, most replicas of one, and quotients wanted.

    Returns
    -------
    rank_P, count_P : array of int, shape [P]
        Rank from 0 (heaviest) and replicas from 1.
    """
    pairs = [
        (rank, count)
        for rank in range(min(experts, wanted))
        for count in range(1, min(most, wanted // (rank + 1)) + 1)
    ]
    array = np.array(pairs, dtype=np.int64).reshape(-1, 2)
    return array[:, 0].copy(), array[:, 1].copy()


def _slots(layers: _Layers, time: TimeModel) -> FloatArray:
    """Return the root of ``sum over g of min(T * speed_g, most_g) - total``, which is concave in T."""
    bound_L = np.zeros(len(layers.load_LE))
    E = layers.load_LE.shape[1]
    room_LE = np.concatenate([np.zeros((len(bound_L), 1)), layers.heavy_LE.cumsum(axis=1)], axis=1)
    for index, capacity_G, _ in layers.groups():
        most_LG = room_LE[index][:, np.minimum(capacity_G, E)]
        used_G = capacity_G > 0
        # From time most/speed on GPU g is limited by its slots: sort those times to get the segments.
        full_LG = np.where(used_G, most_LG / layers.speed_G, 0.0)
        order_LG = np.argsort(full_LG, axis=1, kind="stable")
        full_LG = np.take_along_axis(full_LG, order_LG, axis=1)
        done_LG = np.take_along_axis(most_LG, order_LG, axis=1).cumsum(axis=1)
        speed_LG = np.where(used_G, layers.speed_G, 0.0)[order_LG]
        rest_LG = speed_LG[:, ::-1].cumsum(axis=1)[:, ::-1]  # speed of the GPUs from this one on
        before_LG = np.concatenate([np.zeros((len(done_LG), 1)), done_LG[:, :-1]], axis=1)
        total_L1 = layers.total_L[index][:, None]
        with np.errstate(divide="ignore", invalid="ignore"):
            root_LG = np.where(rest_LG > 0, (total_L1 - before_LG) / rest_LG, np.inf)
        # Concave: every segment's line lies above the sum, so the largest of the lines' roots is the root.
        bound_l = np.where(
            total_L1[:, 0] > 0, root_LG.max(axis=1, where=np.isfinite(root_LG), initial=0.0), 0.0
        )
        short_l = done_LG[:, -1] < layers.total_L[index] * (1 - 1e-12)
        bound_L[index] = np.where(short_l, np.inf, bound_l)
    return bound_L if _is_tokens(time) else time.token_cost * bound_L


def _packing(layers: _Layers, time: TimeModel) -> FloatArray | None:
    L, E = layers.load_LE.shape
    bound_L: FloatArray | None = None
    for index, capacity_G, limit in layers.groups():
        used_G = capacity_G > 0
        G = int(used_G.sum())
        slots = int(np.minimum(capacity_G, E).sum())
        spare = (slots if limit is None else min(slots, limit)) - E
        if spare < 0 or G == 0 or E - spare <= G:
            continue
        whole_LE = layers.heavy_LE[index][:, spare:]
        sum_LE = np.zeros((len(whole_LE), whole_LE.shape[1] + 1))
        np.cumsum(whole_LE, axis=1, out=sum_LE[:, 1:])
        k = np.arange(1, (whole_LE.shape[1] - 1) // G + 1)
        together_LK = sum_LE[:, k * G + 1] - sum_LE[:, k * G - k]
        if not _is_tokens(time):
            lightest_LK = whole_LE[:, k * G]
            together_LK = (
                time.launch
                + time.activation_cost * (k + 1) * (lightest_LK > 0)
                + time.token_cost * together_LK
            )
        if bound_L is None:
            bound_L = np.zeros(L)
        bound_L[index] = together_LK.max(axis=1) / layers.speed_G[used_G].max()
    return bound_L


def _fillers(layers: _Layers, known_L: FloatArray, split: str, time: TimeModel) -> FloatArray:
    """Return `scarce_bound` of the layers that are possible at all; it counts tokens only."""
    bound_L = known_L.copy()
    if time.token_cost <= 0:
        return bound_L
    for index, capacity_G, _ in layers.groups():
        known_l = bound_L[index] / time.token_cost
        if np.isfinite(known_l).all():
            bound_L[index] = time.token_cost * scarce_bound(
                layers.heavy_LE[index], capacity_G, layers.speed_G, known_l, split
            )
    return bound_L
