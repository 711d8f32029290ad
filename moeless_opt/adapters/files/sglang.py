"""SGLang's ``--init-expert-location`` (0.5.23, ``srt/eplb/expert_location.py``).

``{"physical_to_logical_map": [layers][slots]}`` and no other key beside it. There is a row for every
decoder layer, dense ones too: SGLang looks at no shape, so that a map without them would be one of other
layers. In a dense layer's row nothing but valid experts matters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from moeless_opt.adapters import EngineMap
from moeless_opt.adapters.files.rows import listed_map
from moeless_opt.problems.arrays import IntArray
from moeless_opt.problems.io import json_bytes

__all__ = ["KEY", "parse", "render"]

KEY = "physical_to_logical_map"


def parse(document: Mapping[str, object]) -> EngineMap:
    """The map of a document with that key alone."""
    return EngineMap(map_LS=listed_map(document[KEY], KEY), engine="sglang", all_layers=True)


def render(map_LS: IntArray, experts: int, numbers: Sequence[int], total: int) -> bytes:
    """The document of a map whose rows are the model's layers `numbers`, of `total` in all."""
    rows = np.tile(np.arange(map_LS.shape[1]) % experts, (total, 1))
    rows[list(numbers)] = map_LS
    return json_bytes({KEY: rows.tolist()})
