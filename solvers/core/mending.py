"""A layer's placement that breaks the rules, made to keep them by the least change."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["mended"]


def mended(
    load_E: Sequence[float],
    content: Sequence[Sequence[int]],
    capacity_G: Sequence[int],
    speed_G: Sequence[float] | None = None,
    *,
    free_first: bool = False,
) -> list[list[int]]:
    """Contents with no GPU over its slots and every expert somewhere.

    A GPU over its slots drops replicas that others have, then its lightest experts. Each expert left without
    a replica, heaviest first, gets one on the GPU that is least busy for its speed, on a free slot or that of
    the lightest replica that others have.

    Parameters
    ----------
    load_E : sequence of float, shape [E]
        Tokens of each expert.
    content : sequence of sequences of int
        Experts on each GPU, none twice on one.
    capacity_G : sequence of int, shape [G]
        Slots of each GPU; those of all GPUs, at most E each, suffice for E experts.
    speed_G : sequence of float, shape [G], optional
        Relative speeds; ones by default.
    free_first : bool
        Rather a free slot on any GPU than the slot of a replica on a less busy one: nothing more is dropped.

    Returns
    -------
    list of list of int
        What stays stands in its order, what is new behind it.
    """
    speed = [1.0] * len(content) if speed_G is None else speed_G
    rows = [list(row) for row in content]
    count = [0] * len(load_E)
    for row in rows:
        for expert in row:
            count[expert] += 1
    for row, slots in zip(rows, capacity_G, strict=True):
        while len(row) > slots:
            gone = min(row, key=lambda expert: (count[expert] == 1, load_E[expert] / count[expert], expert))
            row.remove(gone)
            count[gone] -= 1
    missing = [expert for expert, held in enumerate(count) if held == 0]
    if not missing:
        return rows
    busy = [
        sum(load_E[expert] / count[expert] for expert in row) / by
        for row, by in zip(rows, speed, strict=True)
    ]
    for expert in sorted(missing, key=lambda expert: (-load_E[expert], expert)):
        free = [gpu for gpu, row in enumerate(rows) if len(row) < capacity_G[gpu]]
        places = free if free and free_first else [*free, *_shared(rows, capacity_G, count)]
        gpu = min(places, key=lambda gpu: (busy[gpu], gpu))
        row = rows[gpu]
        if len(row) == capacity_G[gpu]:
            spare = [other for other in row if count[other] > 1]
            gone = min(spare, key=lambda other: (load_E[other] / count[other], other))
            row.remove(gone)
            count[gone] -= 1
            busy[gpu] -= load_E[gone] / (count[gone] + 1) / speed[gpu]
        row.append(expert)
        count[expert] = 1
        busy[gpu] += load_E[expert] / speed[gpu]
    return rows


def _shared(rows: list[list[int]], capacity_G: Sequence[int], count: list[int]) -> list[int]:
    """Full GPUs with a replica of an expert that others have."""
    return [
        gpu
        for gpu, row in enumerate(rows)
        if len(row) == capacity_G[gpu] and any(count[expert] > 1 for expert in row)
    ]
