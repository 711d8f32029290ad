"""Layouts that ignore the loads: where every comparison begins.

Static expert parallelism itself, one replica of each expert, is `problems.spec.placement.contiguous`.
`wrapped` is how vLLM and SGLang start with spare slots, before they have seen any load: slot i holds expert
i mod E, so the spare slots repeat the first experts.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from moeless_opt.problems.arrays import SlotArray
from moeless_opt.problems.spec import checked_capacity

__all__ = ["wrapped"]


def wrapped(experts: int, capacity_LG: ArrayLike) -> SlotArray:
    """Fill the slots GPU by GPU with experts 0, 1, ..., E-1, 0, 1, ...: the engines' layout at start.

    Parameters
    ----------
    experts : int
        Experts of a layer.
    capacity_LG : array of int, shape [L, G]
        Slots of each GPU. Slots beyond one of each expert stay empty.

    Returns
    -------
    slots_LGC : array of int32, shape [L, G, C]
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
    used_LG = np.minimum(checked_capacity(experts, capacity_LG), experts)
    first_LG = np.cumsum(used_LG, axis=1) - used_LG
    place_C = np.arange(int(np.asarray(capacity_LG).max()))
    expert_LGC = (first_LG[:, :, None] + place_C) % experts
    return np.where(place_C < used_LG[:, :, None], expert_LGC, -1).astype(np.int32)
