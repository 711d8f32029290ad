"""Which expert sits where: the placement of one layer, or of a model, as arrays and as a table.

Plain numpy: no torch, no process groups, so that the same code plans for a live model, for a simulated
one and in tests. A layer's placement is an array ``slots_GC`` (rank of the expert-parallel group by slot,
expert id or -1); a model's is ``slots_LGC``. Ranks may have any number of slots, also none.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from moeless_opt.problems.arrays import IntArray, SlotArray
from moeless_opt.problems.errors import ProblemError

__all__ = ["SlotTable", "one_each", "rows_to_slots", "slots_of", "static_slots", "table_bytes"]

EMPTY = -1


def static_slots(experts: int, gpus: int, layers: int | None = None) -> SlotArray:
    """Contiguous equal blocks, as stock expert parallelism places them.

    Parameters
    ----------
    experts, gpus : int
        The first must be a multiple of the second.
    layers : int, optional
        Add a leading axis of so many equal layers.

    Returns
    -------
    array of int32, shape [G, C] or [L, G, C]
    """
    if experts % gpus:
        raise ProblemError("gpus", f"{experts} experts do not divide among {gpus} ranks")
    slots_GC = np.arange(experts, dtype=np.int32).reshape(gpus, -1)
    return slots_GC if layers is None else np.repeat(slots_GC[None], layers, axis=0)


def one_each(rows: Sequence[Sequence[int]], experts: int) -> SlotArray:
    """Slots that keep one replica of each expert where it is, and as few on the fullest rank as comes easily.

    Experts with the fewest holders choose first, each the holder that keeps least so far.
    """
    holders: list[list[int]] = [[] for _ in range(experts)]
    for g, row in enumerate(rows):
        for e in row:
            holders[e].append(g)
    kept: list[list[int]] = [[] for _ in rows]
    for e in sorted(range(experts), key=lambda e: (len(holders[e]), e)):
        kept[min(holders[e], key=lambda g: (len(kept[g]), g))].append(e)
    return rows_to_slots([sorted(row) for row in kept])


def slots_of(plan: Any) -> SlotArray:
    """The array ``slots_LGC`` of a plan, a placement or an array.

    Parameters
    ----------
    plan : object
        Something with ``slots_LGC``, something with ``placement.slots_LGC``, or the array itself.

    Raises
    ------
    ProblemError
        If it is no such thing, or its shares are entries of a table, which a live model has not.
    """
    entries = getattr(plan, "share_entries", None)
    if entries is not None:
        raise ProblemError(
            "share_entries",
            f"is {entries}: a live model divides every batch into whole tokens; must be None in its plans",
        )
    for holder in (plan, getattr(plan, "placement", None)):
        if holder is not None and hasattr(holder, "slots_LGC"):
            plan = holder.slots_LGC
            break
    slots = np.asarray(plan)
    if slots.ndim != 3 or slots.dtype.kind not in "iu":
        raise ProblemError(
            "slots_LGC", f"must be whole numbers [layer, rank, slot], got {slots.dtype} {slots.shape}"
        )
    return np.ascontiguousarray(slots, dtype=np.int32)


def rows_to_slots(rows: Sequence[Sequence[int]], width: int | None = None) -> SlotArray:
    """``slots_GC`` from one list of experts per rank; short rows are filled with -1."""
    width = max((len(row) for row in rows), default=0) if width is None else width
    slots_GC = np.full((len(rows), width), EMPTY, dtype=np.int32)
    for g, row in enumerate(rows):
        slots_GC[g, : len(row)] = row
    return slots_GC


def table_bytes(rows: Sequence[Sequence[int]], expert_bytes: int) -> IntArray:
    """Bytes of each rank's experts of one layer."""
    return np.array([len(row) * expert_bytes for row in rows], dtype=np.int64)


class SlotTable:
    """The slots of one layer, with every index that dispatching needs worked out once.

    The used slots of all ranks stand in one row, rank by rank ("flat" slots, axis P).

    Parameters
    ----------
    slots_GC : array of int, shape [G, C]
        Expert id of each slot of each rank of the group; -1 where empty.
    experts : int
        Logical experts of the layer; each needs at least one slot.

    Raises
    ------
    ProblemError
        If an expert is missing, out of range, or twice on one rank.
    """

    __slots__ = (
        "ends_G",
        "expert_P",
        "experts",
        "rank_P",
        "replicas_E",
        "rows",
        "single",
        "sorted",
        "starts_G",
        "to_slots_P",
    )

    def __init__(self, slots_GC: ArrayLike, experts: int) -> None:
        slots = np.asarray(slots_GC, dtype=np.int64)
        if slots.ndim != 2:
            raise ProblemError("slots_GC", f"must be [rank, slot], got shape {slots.shape}")
        self.experts = experts
        self.rows: tuple[tuple[int, ...], ...] = tuple(tuple(int(e) for e in row if e >= 0) for row in slots)
        used = slots >= 0
        self.expert_P: IntArray = slots[used]
        self.rank_P: IntArray = np.nonzero(used)[0].astype(np.int64)
        sizes_G = used.sum(axis=1)
        self.ends_G: IntArray = np.cumsum(sizes_G).astype(np.int64)
        self.starts_G: IntArray = self.ends_G - sizes_G
        if self.expert_P.size and int(self.expert_P.max()) >= experts:
            raise ProblemError("slots_GC", f"names expert {int(self.expert_P.max())} of {experts}")
        self.replicas_E: IntArray = np.bincount(self.expert_P, minlength=experts).astype(np.int64)
        if (self.replicas_E == 0).any():
            missing = np.flatnonzero(self.replicas_E == 0)[:8].tolist()
            raise ProblemError("slots_GC", f"experts {missing} have no replica; every expert needs one")
        for g, row in enumerate(self.rows):
            if len(set(row)) < len(row):
                twice = sorted({e for e in row if row.count(e) > 1})
                raise ProblemError(
                    f"slots_GC[{g}]", f"experts {twice} stand twice on rank {g}; once is enough"
                )
        self.single = bool((self.replicas_E == 1).all())
        # Rows of tokens come sorted by expert; to_slots_P lists the flat slots in that order.
        self.to_slots_P: IntArray = np.argsort(self.expert_P, kind="stable").astype(np.int64)
        self.sorted = bool((np.diff(self.expert_P) > 0).all())

    @property
    def gpus(self) -> int:
        """Ranks of the group, with those that hold nothing."""
        return len(self.rows)

    def slots(self, width: int | None = None) -> SlotArray:
        """Back to ``slots_GC``; `width` pads to so many slots."""
        return rows_to_slots(self.rows, width)
