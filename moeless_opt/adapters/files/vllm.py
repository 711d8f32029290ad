"""vLLM's proposed ``eplb_config.initial_expert_map_path``: ``[slots]`` for all layers or ``[layers][slots]``.

Rows are the MoE layers in order. vLLM 0.33 itself reads no placement; our plug-in does, this form and
plans.
"""

from __future__ import annotations

import numpy as np

from moeless_opt.adapters import EngineMap
from moeless_opt.adapters.files.rows import listed_map, whole_row
from moeless_opt.problems.arrays import IntArray
from moeless_opt.problems.io import json_bytes

__all__ = ["parse", "render"]


def parse(document: list[object]) -> EngineMap:
    """The map of a parsed document; lists of lists of lists are [layers, GPUs, slots]."""
    if not document or not isinstance(document[0], list):
        return EngineMap(map_LS=np.array([whole_row(document, "map")]), engine="vllm", repeated=True)
    first = document[0]
    if not (first and isinstance(first[0], list)):
        return EngineMap(map_LS=listed_map(document, "map"), engine="vllm")
    rows = [listed_map(one, f"map: layer {layer}") for layer, one in enumerate(document)]
    for layer, row in enumerate(rows):
        if row.shape != rows[0].shape:
            whole_row([], f"map: layer {layer}", slots=rows[0].size)
    return EngineMap(map_LS=np.array(rows).reshape(len(rows), -1), engine="vllm", gpus=len(rows[0]))


def render(map_LS: IntArray) -> bytes:
    """The document of a map."""
    return json_bytes(map_LS.tolist())
