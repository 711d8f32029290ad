"""Layouts that ignore the loads: where every comparison begins.

`contiguous` is static expert parallelism: one replica of each expert, in blocks of consecutive experts.
`wrapped` is how vLLM and SGLang start with spare slots, before they have seen any load: slot i holds expert
i mod E, so the spare slots repeat the first experts.

References
----------
Shoeybi et al., "Megatron-LM", arXiv 1909.08053: its expert parallelism gives GPU g the experts
``g * E/G ... (g + 1) * E/G - 1``.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moeless_opt.problems.errors import InfeasibleError, ProblemError

__all__ = ["block_sizes", "contiguous", "wrapped"]


def contiguous(experts: int, capacity_LG: ArrayLike) -> NDArray[np.int32]:
    """Place one replica of each expert, consecutive experts together, blocks as equal as the slots allow.

    Parameters
    ----------
    experts : int
        Experts of a layer. Need not be a multiple of the number of GPUs.
    capacity_LG : int [layers, gpus]
        Slots of each GPU. A GPU with fewer slots than an equal block gets what fits.

    Returns
    -------
    slots_LGC : int32 [layers, gpus, largest capacity]
        Expert of each slot, ascending; -1 where empty, empty slots last.

    Raises
    ------
    ProblemError
        Where the capacities are not a non-empty array of integers >= 0, or there is no expert.
    InfeasibleError
        Where a layer has fewer slots than experts.

    Examples
    --------
    >>> contiguous(5, [[2, 2, 2]]).tolist()
    [[[0, 1], [2, 3], [4, -1]]]
    """
    capacity = _checked(experts, capacity_LG)
    size_LG = block_sizes(experts, capacity)
    first_LG = np.cumsum(size_LG, axis=1) - size_LG
    place_C = np.arange(int(capacity.max()))
    slots_LGC = np.where(place_C < size_LG[:, :, None], first_LG[:, :, None] + place_C, -1)
    return slots_LGC.astype(np.int32)


def wrapped(experts: int, capacity_LG: ArrayLike) -> NDArray[np.int32]:
    """Fill the slots GPU by GPU with experts 0, 1, ..., E-1, 0, 1, ...: the engines' layout at start.

    Parameters
    ----------
    experts : int
        Experts of a layer.
    capacity_LG : int [layers, gpus]
        Slots of each GPU. Slots beyond one of each expert stay empty.

    Returns
    -------
    slots_LGC : int32 [layers, gpus, largest capacity]
        Expert of each slot; -1 where empty, empty slots last.

    Raises
    ------
    ProblemError
        Where the capacities are not a non-empty array of integers >= 0, or there is no expert.
    InfeasibleError
        Where a layer has fewer slots than experts.

    Examples
    --------
    >>> wrapped(4, [[3, 3]]).tolist()
    [[[0, 1, 2], [3, 0, 1]]]
    """
    used_LG = np.minimum(_checked(experts, capacity_LG), experts)
    first_LG = np.cumsum(used_LG, axis=1) - used_LG
    place_C = np.arange(int(np.asarray(capacity_LG).max()))
    expert_LGC = (first_LG[:, :, None] + place_C) % experts
    return np.where(place_C < used_LG[:, :, None], expert_LGC, -1).astype(np.int32)


def block_sizes(experts: int, capacity_LG: NDArray[np.int64]) -> NDArray[np.int64]:
    """Share out `experts` over the GPUs of each layer, as equally as the capacities allow.

    The sizes are ``min(capacity, level)`` for the highest level that does not overshoot; what is left goes
    one by one to the first GPUs with room.

    Parameters
    ----------
    experts : int
        Experts of a layer, at most the slots of each layer.
    capacity_LG : int64 [layers, gpus]
        Slots of each GPU.

    Returns
    -------
    int64 [layers, gpus]
        Experts of each GPU; each layer sums to `experts`.
    """
    level_K = np.arange(int(capacity_LG.max()) + 1)
    placed_LK = np.minimum(capacity_LG[:, :, None], level_K).sum(axis=1)
    level_L = (placed_LK <= experts).sum(axis=1) - 1
    size_LG = np.minimum(capacity_LG, level_L[:, None])
    room_LG = capacity_LG > size_LG
    left_L = experts - size_LG.sum(axis=1)
    more_LG: NDArray[np.bool_] = room_LG & (np.cumsum(room_LG, axis=1) <= left_L[:, None])
    sizes: NDArray[np.int64] = size_LG + more_LG
    return sizes


def _checked(experts: int, capacity_LG: ArrayLike) -> NDArray[np.int64]:
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
