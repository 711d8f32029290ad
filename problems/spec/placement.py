"""Which GPU holds which experts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from moeless_opt.problems.arrays import BoolArray, FloatArray, IntArray, Record, SlotArray, integers, whole
from moeless_opt.problems.errors import InfeasibleError, ProblemError

__all__ = [
    "Placement",
    "checked_capacity",
    "contiguous",
    "equal_shares",
    "held_LGE",
    "replica_counts",
    "replica_keys",
    "seat_in_place",
    "second_copies",
    "without_copies",
]


def replica_counts(slots_LGC: SlotArray, experts: int) -> SlotArray:
    """Replicas of every expert, shape [L, E] (int32); copies on one GPU count each."""
    layers = slots_LGC.shape[0]
    flat_LP = slots_LGC.reshape(layers, -1)
    # -1 lands in a column of its own, which is cut off
    index = flat_LP + 1 + np.arange(layers)[:, None] * (experts + 1)
    counts = np.bincount(index.ravel(), minlength=layers * (experts + 1))
    return counts.reshape(layers, experts + 1)[:, 1:].astype(np.int32)


def held_LGE(slots_LGC: SlotArray, experts: int) -> BoolArray:
    """Whether a GPU holds an expert, shape [L, G, E]."""
    layers, gpus, _ = slots_LGC.shape
    held = np.zeros((layers, gpus, experts + 1), dtype=np.bool_)
    np.put_along_axis(held, slots_LGC.astype(np.int64) + 1, True, axis=2)
    return held[:, :, 1:]


def replica_keys(slots_LGC: SlotArray, experts: int) -> IntArray:
    """Replicas as one number each, ``(layer * GPUs + GPU) * experts + expert``, ascending.

    What `held_LGE` says, in a list: an expert of which a GPU has several copies stands there once.
    """
    layers, gpus, _ = slots_LGC.shape
    ordered = np.sort(slots_LGC, axis=2).astype(np.int64)
    once = ordered >= 0
    once[:, :, 1:] &= ordered[:, :, 1:] != ordered[:, :, :-1]
    key = ordered + np.arange(layers * gpus).reshape(layers, gpus, 1) * experts
    return np.asarray(key[once])


def second_copies(slots_LGC: SlotArray) -> BoolArray:
    """Slots whose expert an earlier slot of the same GPU holds, shape [L, G, C]."""
    order = np.argsort(slots_LGC, axis=2, kind="stable")
    ordered = np.take_along_axis(slots_LGC, order, axis=2)
    again = np.zeros(slots_LGC.shape, dtype=np.bool_)
    again[:, :, 1:] = (ordered[:, :, 1:] == ordered[:, :, :-1]) & (ordered[:, :, 1:] >= 0)
    if not again.any():
        return again
    second = np.zeros_like(again)
    np.put_along_axis(second, order, again, axis=2)
    return second


def without_copies(slots_LGC: SlotArray) -> SlotArray:
    """The same slots with all but the first copy of an expert on a GPU emptied."""
    second = second_copies(slots_LGC)
    return np.where(second, np.int32(-1), slots_LGC) if second.any() else slots_LGC


def seat_in_place(slots_LGC: SlotArray, live_LGC: SlotArray, capacity_LG: IntArray | None = None) -> IntArray:
    """Order of each GPU's slots in which what stays keeps its slot, shape [L, G, C].

    Engines pay for an expert that changes its slot on a GPU, or refuse the layer. ``np.take_along_axis(slots,
    order, axis=2)``, and so with shares, seats a plan. What is new takes the first slots that are left, empty
    ones come last; between slots that are kept some may be empty.

    Parameters
    ----------
    slots_LGC : array of int32, shape [L, G, C]
        The new placement.
    live_LGC : array of int32, shape [L, G, any]
        What is live. What lies beyond the slots of the new placement cannot stay there.
    capacity_LG : array of int, shape [L, G], optional
        Slots that each GPU has; nothing stays beyond them.
    """
    layers, gpus, wide = slots_LGC.shape
    rows = layers * gpus
    live = np.full((rows, wide), -1, dtype=np.int64)
    same = min(wide, live_LGC.shape[2])
    live[:, :same] = live_LGC.reshape(rows, -1)[:, :same]
    if capacity_LG is not None:
        live[np.arange(wide) >= capacity_LG.reshape(rows, 1)] = -1
    new = slots_LGC.reshape(rows, wide).astype(np.int64)
    seat = np.tile(np.arange(wide), (rows, 1))
    changed = np.flatnonzero((new != live).any(axis=1))
    if len(changed):
        seat[changed] = _seats(new[changed], live[changed])
    return seat.reshape(slots_LGC.shape)


def _seats(new: IntArray, live: IntArray) -> IntArray:
    """Order of the slots of some GPUs in which what stays keeps its slot, shape [rows, C]."""
    rows, wide = new.shape
    base = max(int(new.max(initial=0)), int(live.max(initial=0))) + 1
    key, at = _copy_keys(new, base)
    old_key, old_at = _copy_keys(live, base)
    place = np.minimum(np.searchsorted(old_key, key), max(len(old_key) - 1, 0))
    stays = old_key[place] == key if len(old_key) else np.zeros(len(key), dtype=np.bool_)
    seat = np.full(rows * wide, -1, dtype=np.int64)
    seat[old_at[place[stays]]] = at[stays] % wide
    moved = np.where(new >= 0, 0, 1)  # what does not stay: experts first, then empty slots
    moved.reshape(-1)[at[stays]] = 2
    seat = seat.reshape(rows, wide)
    coming = np.argsort(moved, axis=1, kind="stable")
    free = np.argsort(seat >= 0, axis=1, kind="stable")
    left = np.arange(wide) < (moved < 2).sum(1)[:, None]
    row = np.broadcast_to(np.arange(rows)[:, None], left.shape)
    seat[row[left], free[left]] = coming[left]
    return seat


def _copy_keys(slots_XC: IntArray, base: int) -> tuple[IntArray, IntArray]:
    """(row, expert, which of its copies there) as one ascending number, and the flat slot of each."""
    rows, wide = slots_XC.shape
    order = np.argsort(slots_XC, axis=1, kind="stable")
    ordered = np.take_along_axis(slots_XC, order, axis=1)
    first = np.ones((rows, wide), dtype=np.bool_)
    first[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    begin = np.maximum.accumulate(np.where(first, np.arange(wide), 0), axis=1)
    key = ((np.arange(rows)[:, None] * base) + ordered) * wide + np.arange(wide) - begin
    filled = ordered >= 0
    return key[filled], (order + np.arange(rows)[:, None] * wide)[filled]


def equal_shares(slots_LGC: SlotArray, experts: int) -> FloatArray:
    """Token shares that divide every expert evenly over its replicas, shape [L, G, C]."""
    layers = slots_LGC.shape[0]
    replicas_LE = replica_counts(slots_LGC, experts)
    flat_LP = slots_LGC.reshape(layers, -1)
    count_LP = np.take_along_axis(replicas_LE, np.maximum(flat_LP, 0), axis=1)
    share_LP = np.divide(1.0, count_LP, out=np.zeros(flat_LP.shape), where=flat_LP >= 0)
    return share_LP.reshape(slots_LGC.shape)


def contiguous(experts: int, capacity_LG: ArrayLike) -> SlotArray:
    """Place one replica of each expert, consecutive experts together, blocks as equal as the slots allow.

    Parameters
    ----------
    experts : int
        Experts of a layer. Need not be a multiple of the number of GPUs.
    capacity_LG : array of int, shape [L, G]
        Slots of each GPU. A GPU with fewer slots than an equal block gets what fits.

    Returns
    -------
    slots_LGC : array of int32, shape [L, G, C]
        Expert of each slot, ascending; -1 where empty, empty slots last.

    Raises
    ------
    ProblemError
        Where the capacities are not a non-empty array of integers >= 0, or there is no expert.
    InfeasibleError
        Where a layer has fewer slots than experts.

    References
    ----------
    Shoeybi et al., "Megatron-LM", arXiv 1909.08053: its expert parallelism gives GPU g the experts
    ``g * E/G ... (g + 1) * E/G - 1``.

    Examples
    --------
    >>> contiguous(5, [[2, 2, 2]]).tolist()
    [[[0, 1], [2, 3], [4, -1]]]
    """
    capacity = checked_capacity(experts, capacity_LG)
    size_LG = _block_sizes(experts, capacity)
    first_LG = np.cumsum(size_LG, axis=1) - size_LG
    place_C = np.arange(int(capacity.max()))
    slots_LGC = np.where(place_C < size_LG[:, :, None], first_LG[:, :, None] + place_C, -1)
    return slots_LGC.astype(np.int32)


def _block_sizes(experts: int, capacity_LG: IntArray) -> IntArray:
    """Share out `experts` over the GPUs of each layer, as equally as the capacities allow.

    The sizes are ``min(capacity, level)`` for the highest level that does not overshoot; what is left goes
    one by one to the first GPUs with room.

    Parameters
    ----------
    experts : int
        Experts of a layer, at most the slots of each layer.
    capacity_LG : array of int, shape [L, G]
        Slots of each GPU.

    Returns
    -------
    array of int, shape [L, G]
        Experts of each GPU; each layer sums to `experts`.
    """
    level_K = np.arange(int(capacity_LG.max()) + 1)
    placed_LK = np.minimum(capacity_LG[:, :, None], level_K).sum(axis=1)
    level_L = (placed_LK <= experts).sum(axis=1) - 1
    size_LG = np.minimum(capacity_LG, level_L[:, None])
    room_LG = capacity_LG > size_LG
    left_L = experts - size_LG.sum(axis=1)
    more_LG: BoolArray = room_LG & (np.cumsum(room_LG, axis=1) <= left_L[:, None])
    sizes: IntArray = size_LG + more_LG
    return sizes


def checked_capacity(experts: int, capacity_LG: ArrayLike) -> IntArray:
    """Slots of each GPU as int64 [L, G], enough of them in every layer for one replica of each expert.

    Raises
    ------
    ProblemError
        Where the capacities are not a non-empty array of integers >= 0, or there is no expert.
    InfeasibleError
        Where a layer has fewer slots than experts.
    """
    if experts < 1:
        raise ProblemError("experts", f"must be at least 1, got {experts}")
    given = np.asarray(capacity_LG)
    if given.ndim != 2 or given.size == 0 or given.dtype.kind not in "iu" or given.min() < 0:
        raise ProblemError(
            "capacity", f"must be a non-empty [layers, gpus] array of integers >= 0, got shape {given.shape}"
        )
    slots_L = given.sum(axis=1)
    if slots_L.min() < experts:
        layer = int(slots_L.argmin())
        raise InfeasibleError(
            f"layer {layer}: {experts} experts need at least {experts} slots, there are {slots_L[layer]}: "
            f"{experts - slots_L[layer]} too few"
        )
    return given.astype(np.int64)


def _bring_back(live: Sequence[frozenset[int]], content: list[list[int]], count: IntArray) -> None:
    """Let experts that were dropped everywhere take the slots of others that can do without, in place.

    Who gives up a slot has another replica, or takes a slot on another GPU where it was live as well, and so
    on: an augmenting path. Without one, as many experts are kept as GPUs have room for.

    Parameters
    ----------
    live : sequence of sets of int
        What each GPU held.
    content : list of lists of int
        What of it was kept.
    count : array of int, shape [E]
        Replicas that were kept.
    """
    homes: dict[int, list[int]] = {}
    for gpu, held in enumerate(live):
        for expert in held:
            homes.setdefault(expert, []).append(gpu)
    for missing in sorted(expert for expert in homes if not count[expert]):
        taken: dict[int, tuple[int, int]] = {}  # by whom, and on which GPU, an expert would lose its slot
        seen: set[int] = set()
        queue, last = [missing], -1
        while queue and last < 0:
            expert = queue.pop(0)
            for gpu in homes[expert]:
                if gpu in seen:
                    continue
                seen.add(gpu)
                for other in content[gpu]:
                    if other not in taken:
                        taken[other] = expert, gpu
                        queue.append(other)
                spare = [other for other in content[gpu] if count[other] > 1]
                if spare:
                    last = max(spare, key=lambda other: (count[other], other))
                    taken[last] = expert, gpu
                    break
        if last >= 0:
            count[last] -= 1
            count[missing] += 1
        while last >= 0:
            expert, gpu = taken[last]
            content[gpu][content[gpu].index(last)] = expert
            last = -1 if expert == missing else expert


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Placement(Record):
    """The experts in the slots of every GPU.

    A GPU may hold several copies of an expert, as engines let it; whether a plan may is its problem's `fill`.

    Parameters
    ----------
    slots_LGC : array of int32, shape [L, G, C]
        Expert in each slot, -1 for an empty one.
    experts : int
        Experts per layer, E.
    partial : bool
        Whether experts may be missing, as after the loss of a GPU. A plan must bring them back.

    Raises
    ------
    ProblemError
        If an expert is out of range or has no replica.
    """

    slots_LGC: SlotArray
    experts: int
    partial: bool = False

    def __post_init__(self) -> None:
        experts = whole("placement.experts", self.experts, low=1, high=2**31 - 1)
        slots = integers("placement.slots", self.slots_LGC, low=-1, high=experts - 1).astype(np.int32)
        if slots.ndim != 3 or 0 in slots.shape[:2]:
            raise ProblemError("placement.slots", f"has shape {slots.shape}, must be [layers, gpus, slots]")
        if experts > slots.shape[1] * slots.shape[2] and not self.partial:
            raise ProblemError(
                "placement.slots",
                f"has {slots.shape[1] * slots.shape[2]} slots per layer, {experts} experts need one each",
            )
        slots.flags.writeable = False
        object.__setattr__(self, "slots_LGC", slots)
        missing = self.replicas_LE == 0
        if not missing.any():  # one form of what is whole, however it is told
            object.__setattr__(self, "partial", False)
        elif not self.partial:
            layer, expert = (int(i) for i in np.argwhere(missing)[0])
            raise ProblemError(f"placement.slots[{layer}]", f"expert {expert} has no replica; it needs one")

    @property
    def replicas_LE(self) -> SlotArray:
        """Replicas of every expert, shape [L, E]; copies on one GPU count each."""
        return replica_counts(self.slots_LGC, self.experts)

    @property
    def held_LGE(self) -> BoolArray:
        """Whether a GPU holds an expert, shape [L, G, E]."""
        return held_LGE(self.slots_LGC, self.experts)

    @property
    def used_LG(self) -> IntArray:
        """Filled slots of every GPU, shape [L, G]."""
        return np.asarray((self.slots_LGC >= 0).sum(2))

    @classmethod
    def repaired(cls, value: ArrayLike | object, experts: int, capacity_LG: IntArray) -> Placement:
        """What is usable of a placement that may break every rule; the least is dropped, nothing invented.

        Unknown experts go; a GPU over its slots gives up second copies first, then replicas that others have.
        As many experts as can keep a replica do. Those without one are left to the solver (`partial`).

        Parameters
        ----------
        value : array [L, G, C], or anything with ``slots_LGC``
            The placement as found.
        experts : int
            Experts per layer.
        capacity_LG : array of int, shape [L, G]
            Slots of each GPU.
        """
        slots: Any = getattr(value, "slots_LGC", value)
        found = integers("current", slots, low=-(2**31), high=2**31 - 1)
        if found.ndim != 3 or found.shape[:2] != capacity_LG.shape:
            layers, gpus = capacity_LG.shape
            raise ProblemError("current", f"has shape {found.shape}, must be [{layers}, {gpus}, slots]")
        kept = np.full(found.shape, -1, dtype=np.int32)
        for layer, rows in enumerate(found.tolist()):
            content = [[e for e in row if 0 <= e < experts] for row in rows]
            count = np.bincount([e for row in content for e in row], minlength=experts)
            live = [frozenset(row) for row in content]
            for gpu, row in enumerate(content):
                while len(row) > capacity_LG[layer, gpu]:
                    gone = max(row, key=lambda e: (row.count(e) > 1, count[e], row.index(e)))
                    row.reverse()  # of several copies the last one goes
                    row.remove(gone)
                    row.reverse()
                    count[gone] -= 1
            _bring_back(live, content, count)
            for gpu, row in enumerate(content):
                kept[layer, gpu, : len(row)] = row
        bare = cls(slots_LGC=kept, experts=experts, partial=True)
        return bare if (bare.replicas_LE == 0).any() else bare.replace(partial=False)

    @classmethod
    def of(cls, value: ArrayLike | Placement | object, experts: int, where: str = "current") -> Placement:
        """A placement from an array [L, G, C], a `Placement`, or anything with ``slots_LGC`` (a plan)."""
        slots: Any = getattr(value, "slots_LGC", value)
        if isinstance(value, cls) and value.experts == experts:
            return value
        try:
            return cls(slots_LGC=slots, experts=experts)
        except ProblemError as error:
            raise ProblemError(error.where.replace("placement", where, 1).lstrip("."), error.what) from None
