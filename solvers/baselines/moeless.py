"""MoEless's expert scaler and placer, the method of the paper, step by step.

*Scaler*: every expert starts with one replica; the expert with the highest load per replica gets one more,
until the coefficient of variation (CV) of the loads of all replicas is at most a threshold or the layer's
memory is used up. *Placer*: a replica that is already warm on a GPU is used there (no weights move); the
rest, heaviest first, go to the GPU with the least load, as in join-the-shortest-queue. Tokens of an expert
are spread evenly over its replicas.

The scaler is greedy and not minimal: a threshold may be met with fewer replicas than it uses, and now and
then it misses a threshold that can be met. It is kept as it is: this is the baseline.

What the paper leaves open is an option here: population or sample CV (`ddof`), whether replicas without load
count in it (`idle`), whom a tie favours (`ties`), the memory cap in slots or in bytes (`slots_for_bytes`).
Which warm replicas to use when there are more than wanted is settled in the paper's spirit: the ones on the
least loaded GPUs.

All layers advance together in NumPy, one replica per step.

References
----------
"MoEless: Efficient MoE LLM Serving via Serverless Computing", arXiv 2603.06350, the expert scaler and placer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

from moeless_opt.problems.arrays import BoolArray, FloatArray, IntArray, SlotArray
from moeless_opt.problems.errors import InfeasibleError, ProblemError

__all__ = ["MoelessPlacement", "place", "replica_cv", "scale", "slots_for_bytes"]


_ROUNDING = 1e-12  # a CV this close above the threshold (relative to the mean) has met it


@dataclass(frozen=True, kw_only=True, slots=True)
class MoelessPlacement:
    """Where the placer put the replicas.

    Parameters
    ----------
    slots_LGC : array of int32, shape [L, G, C]
        Expert of each slot; -1 where empty, empty slots last.
    share_LGC : array of float, shape [L, G, C]
        Fraction of the expert's tokens that the slot serves: one over the expert's replicas; 0 where empty.
    replicas_LE : array of int32, shape [L, E]
        Replicas of each expert as placed.
    reused_L : array of int, shape [L]
        Replicas that use a warm one.
    dropped_L : array of int, shape [L]
        Wanted replicas that no GPU could take without holding the expert twice. Every expert keeps at least
        one.
    """

    slots_LGC: SlotArray
    share_LGC: FloatArray
    replicas_LE: SlotArray
    reused_L: IntArray
    dropped_L: IntArray


def scale(
    load_LE: ArrayLike,
    cv: float = 0.2,
    cap: ArrayLike | None = None,
    ddof: int = 0,
    *,
    max_replicas: ArrayLike | None = None,
    idle: Literal["count", "ignore"] = "count",
    ties: Literal["first", "fewest"] = "first",
) -> SlotArray:
    """Choose the number of replicas of every expert by MoEless's greedy rule.

    Parameters
    ----------
    load_LE : float [layers, experts]
        Predicted tokens of each expert.
    cv : float
        Stop at this coefficient of variation of the loads of all replicas of the layer. The paper sweeps
        0.2 to 1.0 and uses 0.2.
    cap : int or int [layers], optional
        Replicas that a layer may have in all, at least one per expert. Default: twice the experts.
    ddof : {0, 1}
        0 for the population's standard deviation, 1 for the sample's.
    max_replicas : int, int [experts] or int [layers, experts], optional
        Replicas that one expert may have, usually the number of GPUs. An expert at its maximum is passed
        over. Default: no limit of its own.
    idle : {"count", "ignore"}
        Whether replicas without any load count in the CV. They can't be helped by more replicas.
    ties : {"first", "fewest"}
        Which of the experts with the highest load per replica gets the next one: the lowest index, or the one
        with the fewest replicas (then the lowest index).

    Returns
    -------
    array of int32, shape [L, E]
        Replicas, at least one each. A layer without load keeps one each.

    Raises
    ------
    ProblemError
        Where an argument is out of range.
    InfeasibleError
        Where a cap is below one replica per expert.

    Examples
    --------
    >>> scale([[30.0, 10.0, 10.0, 10.0]], cv=0.2).tolist()
    [[3, 1, 1, 1]]
    """
    load_LE = _checked_loads(load_LE)
    layers, experts = load_LE.shape
    if not cv >= 0:
        raise ProblemError("cv", f"must be a number >= 0, got {cv}")
    if ddof not in (0, 1):
        raise ProblemError("ddof", f"must be 0 (population) or 1 (sample), got {ddof}")
    if idle not in ("count", "ignore"):
        raise ProblemError("idle", f"must be count or ignore, got {idle!r}")
    if ties not in ("first", "fewest"):
        raise ProblemError("ties", f"must be first or fewest, got {ties!r}")
    cap_L = _checked_cap(2 * experts if cap is None else cap, layers, experts)
    limit = int(cap_L.max()) if max_replicas is None else max_replicas
    limit_LE = _broadcast("max_replicas", limit, (layers, experts))
    if limit_LE.min() < 1:
        raise ProblemError("max_replicas", f"must be at least 1, got {limit_LE.min()}")

    replicas_LE = np.ones((layers, experts), dtype=np.int64)
    active = np.flatnonzero(_unmet(load_LE, replicas_LE, cv, ddof, idle) & (cap_L > experts))
    while active.size:
        piece = np.where(replicas_LE < limit_LE, load_LE / replicas_LE, -1.0)[active]
        top = piece.argmax(axis=1) if ties == "first" else _fewest(piece, replicas_LE[active])
        useful = piece[np.arange(active.size), top] > 0
        active, top = active[useful], top[useful]
        replicas_LE[active, top] += 1
        count_LE = replicas_LE[active]
        unmet = _unmet(load_LE[active], count_LE, cv, ddof, idle)
        active = active[unmet & (count_LE.sum(axis=1) < cap_L[active])]
    return replicas_LE.astype(np.int32)


def _checked_cap(cap: ArrayLike, layers: int, experts: int) -> IntArray:
    cap_L = _broadcast("cap", cap, (layers,))
    if cap_L.min() < experts:
        layer = int(cap_L.argmin())
        raise InfeasibleError(
            f"layer {layer}: the cap of {cap_L[layer]} replicas is {experts - cap_L[layer]} short of one for "
            f"each of {experts} experts"
        )
    return cap_L


def replica_cv(
    load_LE: ArrayLike, replicas_LE: ArrayLike, ddof: int = 0, *, idle: Literal["count", "ignore"] = "count"
) -> FloatArray:
    """Return the coefficient of variation of the replicas' loads, per layer.

    Parameters
    ----------
    load_LE : float [layers, experts]
        Tokens of each expert, spread evenly over its replicas.
    replicas_LE : array of int, shape [L, E]
        Replicas of each expert, at least one.
    ddof : {0, 1}
        0 for the population's standard deviation, 1 for the sample's.
    idle : {"count", "ignore"}
        Whether replicas without any load count.

    Returns
    -------
    array of float, shape [L]
        Standard deviation over mean; 0 for a layer without load.
    """
    load_LE = np.asarray(load_LE, dtype=np.float64)
    count_LE = np.asarray(replicas_LE, dtype=np.int64)
    piece_LE = load_LE / count_LE
    if idle == "ignore":
        count_LE = np.where(load_LE > 0, count_LE, 0)
    count_L = count_LE.sum(axis=1)
    mean_L = load_LE.sum(axis=1) / np.maximum(count_L, 1)
    square_L = (count_LE * (piece_LE - mean_L[:, None]) ** 2).sum(axis=1)
    deviation_L = np.sqrt(square_L / np.maximum(count_L - ddof, 1))
    cv_L: FloatArray = np.divide(deviation_L, mean_L, out=np.zeros_like(mean_L), where=mean_L > 0)
    return cv_L


def slots_for_bytes(experts: int, extra_bytes: float, replica_bytes: float) -> int:
    """Turn a layer's cap on extra memory into the cap on replicas that `scale` takes.

    Parameters
    ----------
    experts : int
        Experts of the layer; their first replicas are not extra.
    extra_bytes : float
        Bytes that the further replicas may take.
    replica_bytes : float
        Bytes of one replica's weights, > 0.

    Returns
    -------
    int
        Replicas in all.
    """
    if not extra_bytes >= 0:
        raise ProblemError("extra_bytes", f"must be a number >= 0, got {extra_bytes}")
    if not replica_bytes > 0:
        raise ProblemError("replica_bytes", f"must be a number > 0, got {replica_bytes}")
    return experts + int(extra_bytes // replica_bytes)


def place(
    load_LE: ArrayLike,
    replicas_LE: ArrayLike,
    capacity_LG: ArrayLike,
    previous_LGC: ArrayLike | None = None,
    *,
    speed_G: ArrayLike | None = None,
    within: float | None = None,
) -> MoelessPlacement:
    """Place replicas by MoEless's rule: warm ones first, then the heaviest to the least loaded GPU.

    Parameters
    ----------
    load_LE : float [layers, experts]
        Predicted tokens of each expert.
    replicas_LE : array of int, shape [L, E]
        Replicas wanted of each expert, at least one each.
    capacity_LG : array of int, shape [L, G]
        Slots of each GPU.
    previous_LGC : array of int, shape [L, G, C], optional
        Experts warm on each GPU (-1 for none), such as the slots of the previous placement. Default: none.
    speed_G : float [gpus], optional
        Relative speed of each GPU, > 0. The least loaded GPU is then the one that would finish first. The
        paper's GPUs are equal, the default.
    within : float, optional
        Use a warm replica only where its GPU's load stays within this share beyond the mean. Default:
        whatever its load, as the paper's text has it.

    Returns
    -------
    MoelessPlacement
        Slots, shares, and how many replicas were reused or dropped.

    Raises
    ------
    ProblemError
        Where shapes or values are wrong.
    InfeasibleError
        Where a layer wants more replicas than it has slots.

    Notes
    -----
    Ties go to the lowest expert and the lowest GPU. Where every free GPU already holds the expert, the paper
    says nothing; then one replica elsewhere makes room: it changes to a free GPU that lacks its expert, the
    one exchange that leaves the two GPUs' larger load lowest. Where no exchange exists either, the replica is
    dropped, and the expert's other replicas take its tokens.

    Examples
    --------
    >>> place([[60.0, 20.0, 20.0]], [[2, 1, 1]], [[2, 2]]).slots_LGC.tolist()
    [[[0, 1], [0, 2]]]
    """
    load_LE = _checked_loads(load_LE)
    layers, experts = load_LE.shape
    wanted_LE = _broadcast("replicas", replicas_LE, (layers, experts))
    if wanted_LE.min() < 1:
        layer, expert = np.argwhere(wanted_LE < 1)[0]
        raise ProblemError("replicas", f"layer {layer}, expert {expert}: must be at least 1")
    room_LG = _checked_room(capacity_LG, wanted_LE)
    gpus = room_LG.shape[1]
    speed = np.ones(gpus) if speed_G is None else np.asarray(speed_G, dtype=np.float64)
    if speed.shape != (gpus,) or not (speed > 0).all():
        raise ProblemError("speed", f"must be [{gpus} gpus], each > 0")

    board = _Board(load_LE, wanted_LE, room_LG, speed)
    pending_LK = board.pending_LK
    nowhere_LGC = np.full((layers, gpus, 0), -1)
    warm_LEG = _membership(nowhere_LGC if previous_LGC is None else previous_LGC, layers, experts, gpus)
    if warm_LEG.any():
        board.put_where_warm(warm_LEG, within)
    for k in range(board.steps):
        board.put_anywhere(k)
        for layer in np.flatnonzero(pending_LK[:, k]):
            board.put_by_exchange(int(layer), k)
    return board.result(warm_LEG)


def _checked_room(capacity_LG: ArrayLike, wanted_LE: IntArray) -> IntArray:
    """Slots of each GPU, enough for what each layer wants, shape [layers, gpus]."""
    layers = len(wanted_LE)
    given = np.asarray(capacity_LG)
    if given.ndim != 2 or len(given) != layers or given.size == 0:
        raise ProblemError("capacity", f"must be [{layers} layers, gpus], got shape {given.shape}")
    room_LG = _broadcast("capacity", given, given.shape)
    if room_LG.min() < 0:
        raise ProblemError("capacity", f"must not be negative, got {room_LG.min()}")
    short_L = wanted_LE.sum(axis=1) - room_LG.sum(axis=1)
    if short_L.max() > 0:
        layer = int(short_L.argmax())
        raise InfeasibleError(
            f"layer {layer}: {wanted_LE[layer].sum()} replicas wanted, {room_LG[layer].sum()} slots: "
            f"{short_L[layer]} too few"
        )
    return room_LG


class _Board:
    """The GPUs of all layers while replicas are being put on them.

    K runs over a layer's replicas, heaviest first; layers with fewer replicas are padded at the end.
    """

    def __init__(
        self, load_LE: FloatArray, wanted_LE: IntArray, room_LG: IntArray, speed_G: FloatArray
    ) -> None:
        layers, experts = load_LE.shape
        self.layers, self.gpus = room_LG.shape
        self.piece_LE, self.total_L = load_LE / wanted_LE, load_LE.sum(axis=1)
        self.capacity_LG, self.speed_G = room_LG, speed_G
        self.free_LG = room_LG.copy()
        self.load_LG = np.zeros(room_LG.shape)
        self.holds_LEG = np.zeros((layers, experts, self.gpus), dtype=np.bool_)
        self.dropped_L = np.zeros(layers, dtype=np.int64)
        self.row_L = np.arange(layers)

        count_L = wanted_LE.sum(axis=1)
        self.steps = int(count_L.max())
        self.expert_LK = np.zeros((layers, self.steps), dtype=np.int64)
        order_LE = np.argsort(-self.piece_LE, axis=1, kind="stable")
        for layer in range(layers):
            order_E = order_LE[layer]
            self.expert_LK[layer, : count_L[layer]] = np.repeat(order_E, wanted_LE[layer, order_E])
        self.pending_LK = np.arange(self.steps) < count_L[:, None]

    def put_where_warm(self, warm_LEG: BoolArray, within: float | None) -> None:
        """Put every layer's replicas, in order, each on its best warm GPU that has room and time, if any."""
        limit_L = np.full(self.layers, np.inf)
        if within is not None:
            limit_L = (1.0 + within) * self.total_L / self.speed_G.sum()
        layer, expert, gpu = np.nonzero(warm_LEG)
        kind = layer * warm_LEG.shape[1] + expert
        nth = np.arange(len(kind)) - np.searchsorted(kind, kind)
        # The warm GPUs of each expert, ascending: few of many. The spare column is never free.
        warm_LEW = np.full((*warm_LEG.shape[:2], int(nth.max()) + 1), self.gpus)
        warm_LEW[layer, expert, nth] = gpu
        for k in range(self.steps):
            self._put(k, self.row_L, warm_LEW[self.row_L, self.expert_LK[:, k]], limit_L)

    def put_anywhere(self, k: int) -> None:
        """Put the k-th replica of the layers where it still waits on its best GPU, if there is one."""
        rows = np.flatnonzero(self.pending_LK[:, k])
        if not rows.size:
            return
        expert_R = self.expert_LK[rows, k]
        allowed_RG = ~self.holds_LEG[rows, expert_R] & (self.free_LG[rows] > 0)
        finish_RG = (self.load_LG[rows] + self.piece_LE[rows, expert_R][:, None]) / self.speed_G
        best_R = np.where(allowed_RG, finish_RG, np.inf).argmin(axis=1)
        self._take(k, rows, best_R, allowed_RG[np.arange(rows.size), best_R])

    def _put(self, k: int, rows: IntArray, gpu_RW: IntArray, limit_R: FloatArray) -> None:
        """Put these layers' k-th replica on the best of the GPUs that each row names."""
        expert_R = self.expert_LK[rows, k]
        at_RW = np.minimum(gpu_RW, self.gpus - 1)
        row_R1 = rows[:, None]
        holds_RW = self.holds_LEG[row_R1, expert_R[:, None], at_RW]
        allowed_RW = (gpu_RW < self.gpus) & ~holds_RW & (self.free_LG[row_R1, at_RW] > 0)
        finish_RW = (self.load_LG[row_R1, at_RW] + self.piece_LE[rows, expert_R][:, None]) / self.speed_G[
            at_RW
        ]
        allowed_RW &= finish_RW <= limit_R[:, None]
        best_R = np.where(allowed_RW, finish_RW, np.inf).argmin(axis=1)
        here = np.arange(rows.size)
        self._take(k, rows, at_RW[here, best_R], allowed_RW[here, best_R])

    def _take(self, k: int, rows: IntArray, gpu_R: IntArray, allowed_R: BoolArray) -> None:
        done = np.flatnonzero(self.pending_LK[rows, k] & allowed_R)
        layer, gpu = rows[done], gpu_R[done]
        expert = self.expert_LK[layer, k]
        self.holds_LEG[layer, expert, gpu] = True
        self.load_LG[layer, gpu] += self.piece_LE[layer, expert]
        self.free_LG[layer, gpu] -= 1
        self.pending_LK[layer, k] = False

    def put_by_exchange(self, layer: int, k: int) -> None:
        """Make room for one replica on a full GPU by moving another from there to a free GPU, or drop it."""
        expert = int(self.expert_LK[layer, k])
        piece_E, load_G = self.piece_LE[layer], self.load_LG[layer]
        holds_EG, free_G = self.holds_LEG[layer], self.free_LG[layer]
        best: tuple[float, int, int, int] | None = None
        for full in np.flatnonzero(~holds_EG[expert] & (self.capacity_LG[layer] > 0)):
            for free in np.flatnonzero(free_G > 0):
                movable = np.flatnonzero(holds_EG[:, full] & ~holds_EG[:, free])
                if movable.size == 0:
                    continue
                full_load = (load_G[full] + piece_E[expert] - piece_E[movable]) / self.speed_G[full]
                free_load = (load_G[free] + piece_E[movable]) / self.speed_G[free]
                peak = np.maximum(full_load, free_load)
                at = int(peak.argmin())
                best = min(
                    best or (np.inf, 0, 0, 0), (float(peak[at]), int(full), int(free), int(movable[at]))
                )
        self.pending_LK[layer, k] = False
        if best is None:
            self._drop(layer, expert)
            return
        _, donor, taker, other = best
        holds_EG[other, donor], holds_EG[other, taker], holds_EG[expert, donor] = False, True, True
        load_G[donor] += piece_E[expert] - piece_E[other]
        load_G[taker] += piece_E[other]
        free_G[taker] -= 1

    def _drop(self, layer: int, expert: int) -> None:
        """Do without one replica; the expert's others, placed or waiting, share its tokens."""
        holds_G = self.holds_LEG[layer, expert]
        waiting = int((self.pending_LK[layer] & (self.expert_LK[layer] == expert)).sum())
        before = self.piece_LE[layer, expert]
        count = int(holds_G.sum()) + waiting
        after = before * (count + 1) / count
        self.load_LG[layer, holds_G] += after - before
        self.piece_LE[layer, expert] = after
        self.dropped_L[layer] += 1

    def result(self, warm_LEG: BoolArray) -> MoelessPlacement:
        """Read the slots off the board: on each GPU the experts in ascending order."""
        replicas_LE = self.holds_LEG.sum(axis=2)
        width = int(self.capacity_LG.max())
        slots_LGC = np.full((self.layers, self.gpus, width), -1, dtype=np.int32)
        layer, expert, gpu = np.nonzero(self.holds_LEG)
        order = np.lexsort((expert, gpu, layer))
        layer, gpu, expert = layer[order], gpu[order], expert[order]
        held_LG = self.holds_LEG.sum(axis=1)
        first_LG = (np.cumsum(held_LG) - held_LG.ravel()).reshape(held_LG.shape)
        place = np.arange(layer.size) - first_LG[layer, gpu]
        slots_LGC[layer, gpu, place] = expert
        share_LGC = np.zeros(slots_LGC.shape)
        share_LGC[layer, gpu, place] = 1.0 / replicas_LE[layer, expert]
        return MoelessPlacement(
            slots_LGC=slots_LGC,
            share_LGC=share_LGC,
            replicas_LE=replicas_LE.astype(np.int32),
            reused_L=(self.holds_LEG & warm_LEG).sum(axis=(1, 2), dtype=np.int64),
            dropped_L=self.dropped_L,
        )


def _unmet(
    load_LE: FloatArray, replicas_LE: IntArray, cv: float, ddof: int, idle: Literal["count", "ignore"]
) -> BoolArray:
    unmet: BoolArray = replica_cv(load_LE, replicas_LE, ddof, idle=idle) > cv + _ROUNDING
    return unmet


def _fewest(piece_LE: FloatArray, replicas_LE: IntArray) -> IntArray:
    """Return, per row, the expert with the fewest replicas among those with the highest load per replica."""
    highest = piece_LE == piece_LE.max(axis=1, keepdims=True)
    fewest: IntArray = np.where(highest, replicas_LE, np.iinfo(np.int64).max).argmin(axis=1)
    return fewest


def _membership(slots_LGC: ArrayLike, layers: int, experts: int, gpus: int) -> BoolArray:
    """Tell, for each layer, expert and GPU, whether the expert is in one of the GPU's slots."""
    slots = np.asarray(slots_LGC)
    if slots.ndim != 3 or slots.shape[:2] != (layers, gpus) or slots.dtype.kind not in "iu":
        raise ProblemError(
            "previous", f"must be an integer array [{layers}, {gpus}, slots], got shape {slots.shape}"
        )
    if slots.size and not -1 <= slots.min() <= slots.max() < experts:
        raise ProblemError("previous", f"must hold experts 0 to {experts - 1}, or -1 for an empty slot")
    member_LEG = np.zeros((layers, experts, gpus), dtype=np.bool_)
    layer, gpu, slot = np.nonzero(slots >= 0)
    member_LEG[layer, slots[layer, gpu, slot], gpu] = True
    return member_LEG


def _broadcast(name: str, value: ArrayLike, shape: tuple[int, ...]) -> IntArray:
    given = np.asarray(value)
    if given.dtype.kind not in "iu":
        raise ProblemError(name, f"must be whole numbers, got {given.dtype}")
    try:
        return np.broadcast_to(given.astype(np.int64), shape)
    except ValueError:
        raise ProblemError(name, f"must fit the shape {shape}, got {given.shape}") from None


def _checked_loads(load_LE: ArrayLike) -> FloatArray:
    given = np.asarray(load_LE, dtype=np.float64)
    if given.ndim != 2 or given.size == 0:
        raise ProblemError("loads", f"must be a non-empty [layers, experts] array, got shape {given.shape}")
    if not (np.isfinite(given).all() and (given >= 0).all()):
        raise ProblemError("loads", "must be finite and not negative")
    return given
