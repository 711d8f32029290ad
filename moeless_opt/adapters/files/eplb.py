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

__all__ = ["MAPS", "parse", "render"]

MAPS = (
    "phy2log", "physical_to_logical_map", "last_physical_to_logical_map", "physical_to_logical",
    "physical_to_logical_map_cpu",
)  # fmt: skip
_BARE = ("arr_0", "array", "tensor", "map", "slots", "placement")  # of one array alone, and none of loads
_COUNTS = ("logcnt", "logical_replica_count", "replica_count")


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
    experts = None
    for name in _COUNTS:
        if name in arrays:
            count_LE = np.asarray(arrays[name])
            if count_LE.ndim != 2 or len(count_LE) != len(map_LS) or count_LE.dtype.kind not in "iu":
                raise FormatError(name, f"has shape {count_LE.shape}, must be [{len(map_LS)}, experts]")
            experts = count_LE.shape[1]
            if map_LS.max() >= experts or (expert_slots(map_LS, experts)[1] != count_LE).any():
                raise FormatError(name, f"is not how often the experts are in {names[0]}")
    return EngineMap(map_LS=map_LS, engine="eplb", gpus=gpus, experts=experts)


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
