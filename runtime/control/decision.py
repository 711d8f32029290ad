"""What a controller decided, and whether it changes anything."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from moeless_opt.problems.arrays import FloatArray, SlotArray
from moeless_opt.problems.plan import Plan

__all__ = ["Decision", "LayerDecision", "same_replicas", "stacked"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """What a controller decided.

    Parameters
    ----------
    at_pass : int
        Forward passes seen when the loads were taken.
    plan : Plan
        What was planned.
    applied : int or None
        The backend's number; None if nothing moved and nothing was applied.
    seconds : float
        Time of planning.
    """

    at_pass: int
    plan: Plan
    applied: int | None
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerDecision:
    """What a controller decided for one layer.

    Parameters
    ----------
    layer : int
        The model's own number of it.
    load_E : array, shape [E]
        What was foreseen, over all ranks.
    slots_GC : array of int32, shape [G, C]
        What was planned.
    applied : int or None
        The backend's number; None where the slots stay as they are.
    seconds : float
        Time of planning.
    error : str
        Why there is no plan; the layer then stays as it is.
    """

    layer: int
    load_E: FloatArray
    slots_GC: SlotArray
    applied: int | None
    seconds: float
    error: str = ""


def stacked(layers: Iterable[SlotArray]) -> SlotArray:
    """Slots of layers, [G, C] each, as one array [L, G, C]; narrow ones are filled with -1."""
    rows = list(layers)
    width = max(slots_GC.shape[1] for slots_GC in rows)
    out = np.full((len(rows), rows[0].shape[0], width), -1, dtype=np.int32)
    for layer, slots_GC in enumerate(rows):
        out[layer, :, : slots_GC.shape[1]] = slots_GC
    return out


def same_replicas(a_LGC: SlotArray, b_LGC: SlotArray) -> bool:
    """Whether two placements hold the same experts on the same GPUs."""
    width = max(a_LGC.shape[2], b_LGC.shape[2])

    def ordered(slots_LGC: SlotArray) -> SlotArray:
        padded = np.full((*slots_LGC.shape[:2], width), -1, dtype=np.int32)
        padded[:, :, : slots_LGC.shape[2]] = slots_LGC
        return np.sort(padded, axis=2)

    return a_LGC.shape[:2] == b_LGC.shape[:2] and np.array_equal(ordered(a_LGC), ordered(b_LGC))
