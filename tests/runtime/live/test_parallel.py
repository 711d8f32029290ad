"""Models whose attention is divided over ranks and whose layers are over stages: their experts move alike."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

World = Callable[..., list[Any]]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tensor", "pipeline", "expert", "sequence"),
    [(2, 2, 2, 0), (2, 1, 2, 1)],
    ids=["tensor-pipeline", "sequence"],
)
def test_experts_move_under_divided_attention_and_layers(
    run_world: World, tensor: int, pipeline: int, expert: int, sequence: int
) -> None:
    """Outputs are those of the stock dispatchers bit for bit, and of the undivided model to rounding."""
    ranks = tensor * pipeline
    results = run_world("worker_parallel.py", ranks, *map(str, (tensor, pipeline, expert, sequence)))
    for rank, result in enumerate(results):
        assert result["moving"] == result["detached"] == 0.0
        assert 0 < result["against undivided"] < 1e-12  # sums over ranks are added in another order
        assert result.get("microbatches", 0.0) == 0.0
        layers = [[1], [2, 3]][rank // (ranks // 2)] if pipeline == 2 else [1, 2, 3]
        assert result["layers"] == layers
