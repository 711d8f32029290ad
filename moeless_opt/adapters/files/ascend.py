"""vllm-ascend's expert map (``eplb_config.expert_map_path``, and what it records).

Layers by position, the first MoE layer first; ranks by position, each with as many experts. Its own check
takes a layer over only if every expert is there, none is twice on one NPU, and none moves inside an NPU.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from moeless_opt.adapters import EngineMap
from moeless_opt.adapters.files.rows import whole_row
from moeless_opt.problems.arrays import IntArray
from moeless_opt.problems.codec import Fields
from moeless_opt.problems.errors import FormatError
from moeless_opt.problems.io import json_bytes

__all__ = ["parse", "render"]


def parse(document: object) -> EngineMap:
    """The map of a parsed document."""
    entry = Fields(document, "")
    layers = entry.take("layer_list", list)
    count = entry.take("moe_layer_count", int)
    entry.done()
    if count != len(layers) or not layers:
        raise FormatError("moe_layer_count", f"is {count}, layer_list has {len(layers)}")
    rows: list[list[list[int]]] = []
    for number, one in enumerate(layers):
        where = f"layer {number}"
        rows.append(_devices(one, number, where, rows[0] if rows else None))
    gpus = len(rows[0])
    map_LS = np.array(rows).reshape(len(rows), -1)
    return EngineMap(map_LS=map_LS, engine="ascend", gpus=gpus)


def _devices(value: object, number: int, where: str, like: list[list[int]] | None) -> list[list[int]]:
    layer = Fields(value, where)
    _is(layer.take("layer_id", int), number, f"{where}: layer_id")
    devices = layer.take("device_list", list)
    _is(layer.take("device_count", int), len(devices), f"{where}: device_count")
    layer.done()
    if not devices:
        raise FormatError(where, "has no device")
    if like is not None:
        _is(len(devices), len(like), f"{where}: device_count")
    found: list[list[int]] = []
    for rank, one in enumerate(devices):
        device = Fields(one, f"{where}, device {rank}")
        _is(device.take("device_id", int), rank, f"{where}, device {rank}: device_id")
        experts = device.take("device_expert")
        device.done()
        wide = len(like[0]) if like is not None else len(found[0]) if found else None
        found.append(whole_row(experts, f"{where}, device {rank}", slots=wide))
    return found


def _is(found: Any, wanted: int, where: str) -> None:
    if found != wanted:
        raise FormatError(where, f"is {found}, must be {wanted}")


def render(map_LS: IntArray, gpus: int) -> bytes:
    """The document of a map."""
    layers = [
        {
            "layer_id": number,
            "device_count": gpus,
            "device_list": [
                {"device_id": rank, "device_expert": row.tolist()}
                for rank, row in enumerate(row_S.reshape(gpus, -1))
            ],
        }
        for number, row_S in enumerate(map_LS)
    ]
    return json_bytes({"moe_layer_count": len(layers), "layer_list": layers})
