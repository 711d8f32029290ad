"""EPLB's arrays: ``phy2log`` [layers, slots], and beside it ``log2phy`` and ``logcnt`` which follow from it.

In .npz, .pt and JSON, and under the names that vLLM and SGLang give them.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moeless_opt.adapters import EngineMap, expert_slots
from moeless_opt.adapters.files.rows import stored_map
from moeless_opt.problems.arrays import IntArray
from moeless_opt.problems.errors import FormatError
from moeless_opt.problems.io import json_bytes

__all__ = ["DERIVED", "MAPS", "parse", "render"]

MAPS = (
    "phy2log", "physical_to_logical_map", "last_physical_to_logical_map", "physical_to_logical",
    "physical_to_logical_map_cpu",
)  # fmt: skip
_BARE = ("arr_0", "array", "tensor", "map", "slots", "placement")  # of one array alone, and none of loads
_COUNTS = ("logcnt", "logical_replica_count", "replica_count")
_SLOTS = ("log2phy", "logical_to_physical_map", "logical_to_all_physical_map")
DERIVED = (*_COUNTS, *_SLOTS)
"""What follows from a map: held against it where it is there."""


def parse(arrays: Mapping[str, NDArray[Any]], where: str = "") -> EngineMap:
    """The map among arrays by name."""
    names = [name for name in MAPS if name in arrays]
    if not names and len(arrays) == 1 and set(arrays) <= set(_BARE):
        names = list(arrays)
    if not names:
        raise FormatError(
            where or "file",
            f"holds no map of experts: it has {sorted(arrays)[:8]}, not {' or '.join(MAPS[:2])}",
        )
    map_LS, gpus = stored_map(np.asarray(arrays[names[0]]), names[0])
    for other in names[1:]:
        if not np.array_equal(stored_map(np.asarray(arrays[other]), other)[0], map_LS):
            raise FormatError(other, f"and {names[0]} differ: which of them is meant cannot be told")
    found = [_derived(arrays, name, map_LS, names[0]) for name in DERIVED if name in arrays]
    if len(set(found)) > 1:
        raise FormatError(
            "experts", f"are {' or '.join(map(str, sorted(set(found))))} per layer: which is open"
        )
    experts = found[0] if found else None
    return EngineMap(map_LS=map_LS, engine="eplb", gpus=gpus, experts=experts)


def _derived(arrays: Mapping[str, NDArray[Any]], name: str, map_LS: IntArray, of: str) -> int:
    """Hold an array that follows from a map against it; returns the experts that it is for."""
    array = np.asarray(arrays[name])
    axes = 2 if name in _COUNTS else 3
    if array.ndim != axes or len(array) != len(map_LS) or 0 in array.shape or array.dtype.kind not in "iu":
        wanted = f"[{len(map_LS)}, experts{', slots' if axes == 3 else ''}]"
        raise FormatError(name, f"is {array.dtype} {array.shape}, must be whole numbers {wanted}")
    experts = array.shape[1]
    if int(map_LS.max()) >= experts:
        raise FormatError(name, f"is for {experts} experts, {of} names expert {int(map_LS.max())}")
    slot_LEX, count_LE = expert_slots(map_LS, experts)
    if axes == 2:
        same = np.array_equal(count_LE, array)
    else:
        wide = max(slot_LEX.shape[2], array.shape[2])
        same = np.array_equal(_widened(slot_LEX, wide), _widened(array, wide))
    if not same:
        raise FormatError(name, f"does not follow from {of}: one of them is of another map")
    return int(experts)


def _widened(slot_LEX: NDArray[Any], wide: int) -> IntArray:
    """Slots of every expert, the last ones first, padded to a width with -1."""
    more = wide - slot_LEX.shape[2]
    padded = np.pad(slot_LEX.astype(np.int64), ((0, 0), (0, 0), (0, more)), constant_values=-1)
    return -np.sort(-padded, axis=2)


def render(map_LS: IntArray, experts: int, suffix: str) -> bytes:
    """The three arrays, as .npz, .pt or JSON."""
    slot_LEX, count_LE = expert_slots(map_LS, experts)
    arrays = {"phy2log": map_LS, "log2phy": slot_LEX, "logcnt": count_LE}
    buffer = io.BytesIO()
    if suffix == ".npz":
        np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]
    elif suffix == ".pt":
        import torch

        torch.save({name: torch.from_numpy(array.copy()) for name, array in arrays.items()}, buffer)
    else:
        return json_bytes({name: array.tolist() for name, array in arrays.items()})
    return buffer.getvalue()
